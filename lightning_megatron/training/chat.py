"""Conversations for ``--sft``: their file, the tokens of a chat template, and samples of packed conversations.

Samples are those of Megatron's SFTDataset, with these differences: a file is checked before training, by line; it needs
no package beside transformers; padding never counts, whichever token it is; a line may hold conversations without a
system message; and ``--lightning-sft-answers-only`` leaves prompts out of the loss for any chat template.
"""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Iterator
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

logger = logging.getLogger("lightning_megatron")

Message = dict[str, Any]
Conversation = list[Message]
IGNORED = -100  # the label of a token that does not count, as Megatron's SFTTokenizer has it
ROLES = ("system", "user", "assistant", "tool")
_FORMAT = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


# ---- the file --------------------------------------------------------------------------------------------------------


def parse_line(line: bytes, where: str) -> list[Conversation]:
    """The conversations of one line of JSON lines.

    Args:
        line: an object with ``messages``: a list of messages, in which a system message begins another conversation; or
            a list of such lists, each a conversation.
        where: file and line, for messages.

    Raises:
        ValueError: naming the line, what it holds and what it should hold.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); write one object on every line: {_FORMAT}") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        held = f"an object with {', '.join(row) or 'no fields'}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f'{where} is {held}, without a list "messages"; write {_FORMAT}')
    if messages and all(isinstance(part, list) for part in messages):
        conversations = messages
    else:
        starts = [i for i, x in enumerate(messages) if i and isinstance(x, dict) and x.get("role") == "system"]
        conversations = [messages[a:b] for a, b in pairwise([0, *starts, len(messages)])]
    for number, conversation in enumerate(conversations, 1):
        _check(conversation, where if len(conversations) == 1 else f"{where}, conversation {number}")
    return conversations


def _check(conversation: Conversation, where: str) -> None:
    if not conversation:
        raise ValueError(f"{where}: there is no message; leave it out")
    previous = None
    for number, message in enumerate(conversation, 1):
        at = f"{where}, message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f'{at} is {json.dumps(message)[:80]}; it must have "role" and "content"')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"{at}: role is {json.dumps(role)[:80]}; it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{at}: content is {json.dumps(content)[:80]}; it must be a string")
        if role == "system" and number > 1:
            raise ValueError(f"{at}: a system message must be the first of its conversation; move it there")
        if role == "assistant" and previous not in ("user", "tool"):
            raise ValueError(f"{at}: an assistant answers {previous or 'nobody'}; a user or a tool must come before it")
        if role == "assistant" and not content:
            raise ValueError(f"{at}: the answer is empty; write one, or leave the conversation out")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            half = content[error.start]
            raise ValueError(f"{at}: content holds {half!a}, half of a surrogate pair; take it out") from None
        previous = role
    if not any(message["role"] == "assistant" for message in conversation):
        raise ValueError(f"{where}: no message is the assistant's, so that there is nothing to learn; leave it out")


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, position in bytes, and content of every line that is not blank.

    Raises:
        ValueError: a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, start, line
                start += len(line)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; --sft reads local files of JSON lines") from error


def read(path: Path) -> Iterator[tuple[str, list[Conversation]]]:
    """File and line, and the conversations there.

    Raises:
        ValueError: of a line, see ``parse_line``; or a file without lines.
    """
    empty = True
    for number, _, line in lines(path):
        where, empty = f"{path}, line {number}", False
        yield where, parse_line(line, where)
    if empty:
        raise ValueError(f"{path} holds no line; write conversations into it: {_FORMAT}")


# ---- the tokens ------------------------------------------------------------------------------------------------------


class Template:
    """The chat template of a tokenizer of transformers, and which of its tokens are answers."""

    def __init__(self, tokenizer: Any) -> None:
        """
        Raises:
            ValueError: a tokenizer without a template, or one that cannot tell where its tokens come from.
        """
        name = getattr(tokenizer, "name_or_path", "")
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer {name} has no chat template; give one that has, or put chat_template.jinja beside it"
            )
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer {name} has no tokenizer.json, which tells where each token comes from")
        self.tokenizer = tokenizer

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """The text of a conversation; with ``prompt`` up to where an answer begins.

        Raises:
            ValueError: what the template says that it does not take.
        """
        try:
            return self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # jinja's errors, those that templates raise, and those of Python within
            raise ValueError(f"the chat template does not take the conversation: {error}") from error

    def answers(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where in it are the answers, each with what ends it.

        An answer begins where the text stops being that of the prompt. (That of Ring ends with the begin of a thought,
        which an answer without thoughts lacks.)

        Raises:
            ValueError: see ``render``; or a template by which a later message changes an earlier one.
        """
        text, spans = self.render(conversation), []
        for i, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            before, after = self.render(conversation[:i]), self.render(conversation[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "the chat template writes earlier messages in another way once later ones are there, so that no "
                    "text is that of one answer: split the conversation, or train on all tokens, without "
                    "--lightning-sft-answers-only"
                )
            prompt = self.render(conversation[:i], prompt=True)
            spans.append((max(len(before), len(commonprefix([prompt, after]))), len(after)))
        return text, spans

    def encode(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Ids [t] int64, and the same with IGNORED in place of all tokens that do not begin within an answer.

        Raises:
            ValueError: see ``answers``.
        """
        text, spans = self.answers(conversation)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
        counts = np.zeros(len(ids), dtype=bool)
        for first, last in spans:
            counts |= (starts >= first) & (starts < last)
        return ids, np.where(counts, ids, IGNORED)


def template_of(tokenizer: Any) -> Template:
    """Of Megatron's tokenizer of type SFTTokenizer.

    Raises:
        ValueError: see ``Template``.
    """
    return Template(tokenizer._tokenizer._tokenizer)


def check(args: Namespace, tokenizer: Any) -> None:
    """Refuse conversations and tokenizers that end a training of ``--sft`` in the middle. Only rank 0 reads the files.

    Raises:
        ValueError: naming the flag, or file and line, and the remedy.
    """
    own = args.sft_tokenizer_prompt_format == "default"
    if not args.sft:
        if args.sft_answers_only:
            raise ValueError("--lightning-sft-answers-only acts on --sft: add it, or leave the flag out")
        return
    if args.tokenizer_type != "SFTTokenizer":
        raise ValueError(f"--sft needs --tokenizer-type SFTTokenizer, not {args.tokenizer_type}")
    if args.sft_answers_only and not own:
        raise ValueError(
            f"--lightning-sft-answers-only needs the tokenizer's own chat template, --sft-tokenizer-prompt-format "
            f"default; {args.sft_tokenizer_prompt_format} "
            + ("knows no roles" if args.sft_tokenizer_prompt_format == "identity" else "counts answers only, anyway")
        )
    if tokenizer.pad is None:
        raise ValueError(
            f"--sft-tokenizer-prompt-format {args.sft_tokenizer_prompt_format}: the tokenizer {args.tokenizer_model} "
            "has no token for padding; use default, the tokenizer's own chat template, or add the format's tokens"
        )
    template = template_of(tokenizer) if own else None
    if args.rank:
        return
    for path in _paths(args):
        for where, conversations in read(Path(path)):
            for conversation in conversations if template else []:
                try:
                    (template.answers if args.sft_answers_only else template.render)(conversation)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error


def _paths(args: Namespace) -> list[str]:
    """Files of a blend, in which weights may stand between them."""
    sources = (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path)
    words = [word for source in sources for word in source or ()]
    return [word for i, word in enumerate(words) if Path(word).exists() or not _is_number(word)]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


# ---- samples ---------------------------------------------------------------------------------------------------------


class Lines:
    """Lines of a file, read when they are wanted."""

    def __init__(self, path: str) -> None:
        found = [(number, start) for number, start, _ in lines(Path(path))]
        self.path, (self.numbers, self.starts) = path, np.array(found, dtype=np.int64).reshape(-1, 2).T

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[str, list[Conversation]]:
        where = f"{self.path}, line {self.numbers[index]}"
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            return where, parse_line(file.readline(), where)


class ChatDataset(MegatronDataset):
    """A sample is a line: its conversations one behind the other, padded to the length of the sequence.

    With context parallelism every conversation is padded so that its ranks have two chunks of the same length. What is
    longer than the sequence is cut off, and the log says so once.
    """

    answers_only = False

    def __init__(
        self,
        dataset: Lines,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        if not len(indices):
            raise ValueError(
                f"{dataset_path} has {len(dataset)} lines, and none of them for the {index_split.name} split: give "
                "another --split, or --train-data-path and --valid-data-path"
            )
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.template = template_of(config.tokenizer) if self.answers_only else None
        self.told = False

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Lines) -> int:
        """How many lines there are to split."""
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> Lines:
        """The file itself."""
        return Lines(dataset_path)

    def __len__(self) -> int:
        return self.num_samples or len(self.indices)

    def encode(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and the labels that they would be, [t] int64."""
        if self.template is not None:
            return self.template.encode(conversation)
        both = self.config.tokenizer.tokenize_conversation(
            conversation, return_target=True, add_generation_prompt=False
        )
        return tuple(x.astype(np.int64) for x in both)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """tokens, labels, loss_mask and position_ids [s]; cu_seqlens [s + 1], filled up with s; max_seqlen []."""
        length, ranks = self.config.sequence_length, self.config.context_parallel_size
        every, pad = 2 * ranks if ranks > 1 else 1, self.config.tokenizer.pad
        where, conversations = self.dataset[int(self.indices[index % len(self.indices)])]
        ids, wanted, places, bounds = [], [], [], [0]
        for conversation in conversations:
            tokens, targets = self.encode(conversation)
            padding = -len(tokens) % every
            targets[:1] = IGNORED  # no conversation says how the next one begins
            ids.append(np.pad(tokens, (0, padding), constant_values=pad))
            wanted.append(np.pad(targets, (0, padding), constant_values=IGNORED))
            places.append(np.arange(len(tokens) + padding))
            bounds.append(bounds[-1] + len(tokens) + padding)
        if bounds[-1] > length and not self.told:
            self.told = True
            logger.warning(
                "%s has %d tokens, and --seq-length is %d: what is longer is cut off, here and in lines like it",
                where, bounds[-1], length,
            )  # fmt: skip
        tokens, labels, positions = (np.concatenate(x)[:length] for x in (ids, wanted, places))
        padding = length - len(tokens)
        labels = torch.from_numpy(np.pad(labels[1:], (0, padding + 1), constant_values=IGNORED))
        bounds = [bound for bound in bounds[:-1] if bound < length] + [length]
        cu_seqlens = torch.full((length + 1,), length, dtype=torch.int32)
        cu_seqlens[: len(bounds)] = torch.tensor(bounds, dtype=torch.int32)
        return {
            "tokens": torch.from_numpy(np.pad(tokens, (0, padding), constant_values=pad)),
            "labels": labels,
            "loss_mask": (labels != IGNORED).float(),
            "position_ids": torch.from_numpy(np.concatenate([positions, positions[-1] + 1 + np.arange(padding)])),
            "cu_seqlens": cu_seqlens,
            "max_seqlen": cu_seqlens.diff().max(),
        }


class AnswersDataset(ChatDataset):
    """The same, in which answers count and prompts do not."""

    answers_only = True
