"""How the next token is drawn, and text that stops at given words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.inference.sampling.torch_sampling import TorchSampling

_MOST = 2**31 - 1
_MOST_SEED = 2**62


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    p(token) = softmax( logits / temperature ), of the likeliest ``top_k`` tokens, or of the fewest likeliest ones whose
    probabilities sum to ``top_p``, after Megatron's ``TorchSampling``.
    """

    tokens: int = 64
    """At most so many for each sample."""
    temperature: float = 0.7
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    samples: int = 1
    """Continuations of each prompt."""
    stop: tuple[str, ...] = ()
    """Text that ends a sample, and is not part of it."""
    stop_at_eod: bool = False
    """Whether the tokenizer's end of document ends a sample."""

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: naming the option, its value, and what is allowed.
        """
        for name in ("tokens", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
            if getattr(self, name) > _MOST:
                raise ValueError(f"--{name} {getattr(self, name)} must be at most {_MOST}")
        if not abs(self.seed) <= _MOST_SEED:  # with the number of a sample it must go into 64 bits
            raise ValueError(f"--seed {self.seed} must be from {-_MOST_SEED} to {_MOST_SEED}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature} must be at least 0, and finite; 0 takes the likeliest")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--top-k {self.top_k} must be at least 1 token; leave it out to draw from all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} must be above 0 and at most 1; leave it out to draw from all")
        if self.top_k is not None and self.top_p is not None:
            raise ValueError(
                f"--top-k {self.top_k} and --top-p {self.top_p}: Megatron takes one of the two; leave one out"
            )
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            given = f"--top-k {self.top_k}" if self.top_p is None else f"--top-p {self.top_p}"
            raise ValueError(
                f"{given} with --temperature 0, which takes the likeliest token: leave it out, or give a temperature "
                "above 0"
            )
        if "" in self.stop:
            raise ValueError("--stop '' would end every sample at once: give some text, or leave it out")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse more tokens to choose from than there are.

        Raises:
            ValueError: naming both.
        """
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(f"--top-k {self.top_k} is more than the {vocab_size} tokens of the vocabulary: give less")

    def generator(self, request: int, sample: int, device: torch.device) -> torch.Generator:
        """Random numbers of one sample, whatever else is generated."""
        return torch.Generator(device).manual_seed(self.seed + request * self.samples + sample)

    def draw(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """[n] int64, a column of each row of logits [n, vocabulary without padding], by the generator of the row.

        As ``torch.multinomial`` draws: argmax_i p_i / e_i, where the e_i are exponentially distributed.
        """
        if self.temperature == 0 or self.top_k == 1:
            return logits.argmax(-1)
        p = TorchSampling.filter_logits(
            logits.float(), self.temperature, self.top_k or 0, float(self.top_p or 0)
        ).softmax(-1)
        e = torch.empty_like(p)
        for row, generator in zip(e, generators, strict=True):
            row.exponential_(generator=generator)
        return (p / e).argmax(-1)


class Text:
    """The text of tokens as they come: whole characters only, and nothing of a stop word, which may span tokens."""

    _BEFORE = 8  # tokens of the prompt that the text of the first new one may depend on

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-self._BEFORE :])
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """New text that is certain; afterwards ``stopped`` says whether a stop word ended it."""
        self._ids.append(token)
        before = self._tokenizer.detokenize(self._ids[self._start : self._read])
        now = self._tokenizer.detokenize(self._ids[self._start :])
        if now.endswith("\ufffd"):  # bytes of an unfinished character
            return ""
        # Text of a token depends on those just before it (spaces, bytes), not on all: a window keeps the cost linear.
        if self._read - self._start >= self._BEFORE:
            self._start = self._read
        self._read = len(self._ids)
        self._held += now[len(before) :]
        return self._release()

    def flush(self) -> str:
        """What was held back because a stop word might have begun; call it after the last token."""
        held, self._held = self._held, ""
        return held

    def _release(self) -> str:
        found = [at for at in (self._held.find(word) for word in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, word) for word in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, word: str) -> int:
    """The longest end of ``text`` that begins ``word``, and is not all of it."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
