"""One continuation of one prompt as it grows, and what is told of it after each token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .sampling import Sampling, Text


@dataclass(frozen=True)
class Piece:
    """One token of one sample."""

    request: int
    sample: int
    text: str
    """What can be printed now: parts of a character, or of a stop word, wait for the next tokens."""
    token: int
    finish: str | None = None
    """After the last token: length, stop or eod."""
    cache: dict[str, int] | None = None
    """After the last token: bytes that this rank keeps, by kind of layer."""
    seconds: float | None = None
    """After the last token: since the sample began."""


class Sample:
    """Draws tokens with random numbers of its own, whatever else is generated, and knows when to stop."""

    def __init__(
        self, request: int, number: int, prompt: Sequence[int], tokenizer: Any, sampling: Sampling, device: torch.device
    ):
        self.request, self.number, self.prompt = request, number, list(prompt)
        self.random = sampling.generator(request, number, device)
        self._sampling, self._eod = sampling, tokenizer.eod if sampling.stop_at_eod else None
        self._text = Text(tokenizer, prompt, sampling.stop)
        self._count, self._began = 0, time.perf_counter()

    @property
    def read(self) -> int:
        """Tokens that the model has read: not the last one that was drawn."""
        return len(self.prompt) + self._count - 1

    def piece(self, token: int, cache_sizes: Callable[[], dict[str, int]]) -> Piece:
        """After ``token`` was drawn; ``cache_sizes`` are asked for after the last one."""
        self._count += 1
        if token == self._eod:
            finish, new = "eod", ""
        else:
            new = self._text.push(token)
            finish = "stop" if self._text.stopped else "length" if self._count == self._sampling.tokens else None
        if finish is None:
            return Piece(self.request, self.number, new, token)
        return Piece(
            self.request, self.number, new + self._text.flush(), token, finish,
            cache_sizes(), time.perf_counter() - self._began,
        )  # fmt: skip
