"""Tokens that both models read, and the text of those that they write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import ConvertError, UsageError

TEXT = (
    "Linear attention keeps a state of constant size, however long the text is that it has read. Every new token adds "
    "the outer product of its key and its value to the state, after what was there has decayed by a fixed factor, and "
    "every query reads the sum. Softmax attention keeps all keys and values instead, and looks at each of them again."
)
SEED, RANDOM = 20260, 96  # of the random token ids, and how many there are
_FILE = "tokenizer.json"


class Prompt:
    """Real text through the folder's tokenizer.json where it can be read, else random token ids.

    Args:
        folder: of the model.
        text: of ``--prompt``; None for a text of our own.
        vocab_size: of config.json; all ids are below.
        say: told where the tokens come from.

    Attributes:
        tokens: the ids.
        source: where they come from, in words.

    Raises:
        ConvertError: ``text`` cannot be turned into tokens of this model.
    """

    def __init__(self, folder: Path, text: str | None, vocab_size: int, say: Callable[[str], None]) -> None:
        self._tokenizer: Any = None
        why = self._read(folder / _FILE)
        if why and text is not None:
            raise UsageError(f"--prompt: {why}; leave it out for random token ids")
        if not why:
            self.source = repr(TEXT if text is None else text)
            self.tokens = self._encode(TEXT if text is None else text, vocab_size, folder)
        else:
            generator = torch.Generator().manual_seed(SEED)
            self.source = f"{RANDOM} random token ids, seed {SEED}"
            self.tokens = torch.randint(vocab_size, (RANDOM,), generator=generator).tolist()
            say(f"{why}: {self.source}")

    def _read(self, path: Path) -> str | None:
        """Load the tokenizer, which is data and no code; returns why not."""
        if not path.is_file():
            return f"{path.parent} has no {_FILE}"
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            return f"tokenizers, which reads {path}, is not installed (pip install tokenizers)"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # of the library's own; it names no class
            return f"{path} cannot be read ({error})"
        return None

    def _encode(self, text: str, vocab_size: int, folder: Path) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text).ids
        if not tokens:
            raise UsageError(f"--prompt {text!r} has no tokens; give some text")
        if max(tokens) >= vocab_size:
            raise ConvertError(
                f"{folder / _FILE} gives token {max(tokens)}, but vocab_size of config.json is {vocab_size}: tokenizer "
                "and model do not belong together"
            )
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say; the ids where there is no tokenizer."""
        return str(self._tokenizer.decode(list(tokens))) if self._tokenizer else " ".join(map(str, tokens))
