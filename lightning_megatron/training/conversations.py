"""Conversations for ``--sft``: files of JSON lines, and the tokens of a chat template. Without torch and Megatron.

A line is ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}``.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path
from typing import Any

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
    if isinstance(row, dict) and row.get("tools"):
        raise ValueError(
            f'{where} has "tools", which no chat template is given here: write them into a system message, or leave '
            "them out"
        )
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
        if message.get("weight", 1) != 1:
            raise ValueError(
                f'{at}: "weight" is {json.dumps(message["weight"])[:80]}, and all answers count in the same way; leave '
                "the field out, or the conversation"
            )
        for field, value in message.items():
            try:
                json.dumps([field, value], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                raise ValueError(f"{at}: {field!a} holds {half!a}, half of a surrogate pair; take it out") from None
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

    def ends(self, conversation: Conversation) -> bool:
        """Whether the token at which generation stops is in a conversation."""
        ids = self.tokenizer(self.render(conversation), add_special_tokens=False)["input_ids"]
        return self.tokenizer.eos_token_id in ids

    def answers(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where in it are the answers, each with what ends it.

        An answer begins behind the prompt. (That of Ring ends with the begin of a thought, which an answer without
        thoughts lacks: it begins behind what all answers begin with.)

        Raises:
            ValueError: see ``render``; or a template by which a later message changes an earlier one, or which leaves
                one out.
        """
        text, spans = self.render(conversation), []
        for i, message in enumerate(conversation):
            if message["role"] not in ("assistant", "tool"):
                continue
            before = self.render(conversation[:i]) if i else ""  # a tool may be the first
            after = self.render(conversation[: i + 1])
            if before == after:
                raise ValueError(
                    f"the chat template leaves out message {i + 1}, of role {message['role']}: give a template that "
                    "writes it, or leave it out of the conversation"
                )
            if message["role"] == "tool":
                continue
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "the chat template writes earlier messages in another way once later ones are there, so that no "
                    "text is that of one answer: split the conversation, or train on all tokens, without "
                    "--lightning-sft-answers-only"
                )
            prompt = self.render(conversation[:i], prompt=True)
            begin = commonprefix([prompt, after])
            if begin != prompt:  # else "<table>" would begin behind the "<t" that it shares with "<think>"
                others = [conversation[:i] + [message | {"content": content}] for content in ("a", "b")]
                begin = commonprefix([begin, *map(self.render, others)])
            spans.append((max(len(before), len(begin)), len(after)))
        return text, spans

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Ids, and the same with IGNORED in place of all tokens that hold nothing of an answer.

        A token may begin before the answer: that of a space and the first word, where the prompt ends in a space.

        Raises:
            ValueError: see ``answers``.
        """
        text, spans = self.answers(conversation)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        starts, ends = ([place[side] for place in encoded["offset_mapping"]] for side in (0, 1))
        labels = [IGNORED] * len(ids)
        for begin, end in spans:
            first, last = bisect_right(ends, begin), bisect_left(starts, end)
            labels[first:last] = ids[first:last]
        return ids, labels
