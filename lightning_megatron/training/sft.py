"""``--sft``: what is checked before training, and samples of packed conversations.

Samples are those of Megatron's SFTDataset, with these differences: a file is checked before training, by line; it needs
no package beside transformers; padding never counts, whichever token it is, and neither does the first token of a
conversation; a line may hold several conversations without system messages; and ``--lightning-sft-answers-only`` leaves
prompts out of the loss for any chat template.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from .conversations import IGNORED, Conversation, Template, lines, parse_line, read
from .sources import DataError, blends

logger = logging.getLogger("lightning_megatron")


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
    ends = None  # whether the first conversation has the token at which generation stops
    for path in (path for _, prefixes in blends(args) for path in prefixes):
        for where, conversations in read(Path(path)):
            for conversation in conversations:
                try:
                    if template:
                        (template.answers if args.sft_answers_only else template.render)(conversation)
                        ends = template.ends(conversation) if ends is None else ends
                    else:
                        _check_format(conversation, args.sft_tokenizer_prompt_format, tokenizer)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
    if template and ends is False:
        logger.warning(
            "the chat template of %s ends no answer with %s, the tokenizer's end: generation with --chat goes on "
            "behind an answer, unless --stop names what ends it; or make that the tokenizer's eos_token",
            args.tokenizer_model, template.tokenizer.eos_token,
        )  # fmt: skip


def _check_format(conversation: Conversation, name: str, tokenizer: Any) -> None:
    """Refuse what a format of Megatron's leaves out, or fails on in the middle of the training."""
    if name != "identity" and any(message["role"] == "tool" for message in conversation):
        raise ValueError(
            f"--sft-tokenizer-prompt-format {name} leaves out messages of role tool: use default, the tokenizer's own "
            "chat template, or leave them out of the conversation"
        )
    try:
        tokenizer.tokenize_conversation(conversation, return_target=True, add_generation_prompt=False)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"--sft-tokenizer-prompt-format {name}: the tokens of the messages are not those of the conversation, as "
            "where an answer is white space alone; correct it, or leave the conversation out"
        ) from error


# ---- samples ---------------------------------------------------------------------------------------------------------


class Lines:
    """Lines of a file, read when they are wanted."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.places = torch.tensor([(number, start) for number, start, _ in lines(Path(path))]).view(-1, 2)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, list[Conversation]]:
        number, start = self.places[index].tolist()
        where = f"{self.path}, line {number}"
        with open(self.path, "rb") as file:
            file.seek(start)
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
        indices: Sequence[int],
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        if not len(indices) and num_samples != 0:
            raise DataError(
                f"{dataset_path} has {len(dataset)} lines, and none of them for the {index_split.name} split: give "
                "another --split, or --train-data-path and --valid-data-path"
            )
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.template = template_of(config.tokenizer) if self.answers_only else None
        self.told = self.told_nothing = False

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

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Ids, and the labels that they would be."""
        if self.template is not None:
            return self.template.encode(conversation)
        ids, labels = self.config.tokenizer.tokenize_conversation(
            conversation, return_target=True, add_generation_prompt=False
        )
        return ids.tolist(), labels.tolist()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """tokens, labels, loss_mask and position_ids [s]; cu_seqlens [s + 1], filled up with s; max_seqlen [];
        padding_mask [s] bool, True where there is no token of a conversation.
        """
        length, ranks = self.config.sequence_length, self.config.context_parallel_size
        every, pad = 2 * ranks if ranks > 1 else 1, self.config.tokenizer.pad
        where, conversations = self.dataset[int(self.indices[index % len(self.indices)])]
        tokens: list[int] = []
        labels: list[int] = []
        padded: list[bool] = []
        bounds = [0]
        for conversation in conversations:
            ids, wanted = self.encode(conversation)
            padding = -len(ids) % every
            tokens += [*ids, *[pad] * padding]
            padded += [False] * len(ids) + [True] * padding
            # no conversation says how the next one begins; one of white space may have no token
            labels += [*[IGNORED] * len(ids[:1]), *wanted[1:], *[IGNORED] * padding]
            bounds.append(len(tokens))
        if len(tokens) > length and not self.told:
            self.told = True
            logger.warning(
                "%s has %d tokens, and --seq-length is %d: what is longer is cut off, here and in lines like it",
                where, len(tokens), length,
            )  # fmt: skip
        bounds = [bound for bound in bounds[:-1] if bound < length] + [length]  # the last one has the padding
        tokens = tokens[:length] + [pad] * (length - len(tokens))
        labels = labels[1:length] + [IGNORED] * (length - len(labels[1:length]))
        padded = padded[:length] + [True] * (length - len(padded))
        places = [place for start, end in pairwise(bounds) for place in range(end - start)]
        counted = torch.tensor(labels)
        if not self.told_nothing and bool((counted == IGNORED).all()):
            self.told_nothing = True
            logger.warning(
                "%s: nothing before --seq-length %d counts, here and in lines like it, so that they train nothing; "
                "prepare_chat.py pack leaves out such conversations",
                where, length,
            )  # fmt: skip
        cu_seqlens = torch.tensor(bounds + [length] * (length + 1 - len(bounds)), dtype=torch.int32)
        return {
            "tokens": torch.tensor(tokens),
            "labels": counted,
            "loss_mask": (counted != IGNORED).float(),
            "position_ids": torch.tensor(places),
            "cu_seqlens": cu_seqlens,
            "max_seqlen": cu_seqlens.diff().max(),
            "padding_mask": torch.tensor(padded),
        }


class AnswersDataset(ChatDataset):
    """The same, in which answers count and prompts do not."""

    answers_only = True
