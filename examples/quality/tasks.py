"""Questions to a model, and scores: recall of many pairs, a needle in a haystack, a copy of a long identifier.

All are made of token ids with a seeded generator, so that every model is asked the same. Nothing here knows a model:
recall is scored from logits, the others from the tokens that a model continues with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall (Arora et al., arXiv 2312.04927): pairs, then every key again in another order.

    Of the form "adjacent", as there, a value follows its key at once. Of the form "lines", as in code, it stands behind
    ``key =``: a model must look back from the same token for all keys.
    """

    tokens: list[int]
    places: list[int]
    """Positions in ``tokens`` behind which a value is asked for."""
    answers: list[int]
    values: list[int]
    """All values of the pairs: a guess among them is right once in ``len(values)``."""


def word_tokens(processor) -> list[int]:
    """Ids of the tokenizer's pieces that are whole lower-case words of at least 2 letters."""
    pieces = ((i, processor.id_to_piece(i)) for i in range(processor.get_piece_size()))
    return [i for i, x in pieces if x[0] == "\u2581" and len(x) > 2 and x[1:].isascii() and x[1:].islower()]


FORMS = ("adjacent", "lines")


def recall(words: Sequence[int], equals: int, newline: int, form: str, pairs: int, rng: random.Random) -> Recall:
    """One case: ``key value`` or lines ``key = value``, then the same shuffled, whose values are asked for.

    Args:
        words: tokens for keys and values; each is used at most once.
        equals: token between key and value of a line.
        newline: token behind the value of a line.
        form: one of ``FORMS``.

    Raises:
        ValueError: fewer than 2 words for a pair.
    """
    if len(words) < 2 * pairs:
        raise ValueError(f"{pairs} pairs need {2 * pairs} words, and the tokenizer has {len(words)}: ask for fewer")
    drawn = rng.sample(list(words), 2 * pairs)
    lines = list(zip(drawn[:pairs], drawn[pairs:], strict=True))
    asked = rng.sample(lines, pairs)
    between, behind = ([equals], [newline]) if form == "lines" else ([], [])
    tokens = [x for key, value in (*lines, *asked) for x in (key, *between, value, *behind)]
    each = 2 + len(between) + len(behind)
    places = [each * (pairs + i) + len(between) for i in range(pairs)]
    return Recall(tokens[: places[-1] + 1], places, [value for _, value in asked], drawn[pairs:])


def score_recall(cases: Iterable[Recall], logits: Callable[[list[int], list[int]], torch.Tensor]) -> dict[str, float]:
    """Shares of right answers.

    Args:
        logits: of the next token behind each place: ``logits(tokens, places)`` is [places, vocabulary].

    Returns:
        accuracy: of the likeliest token of the vocabulary; among: of the likeliest of the case's values; nll: nats of
        the right one.
    """
    whole, among, nll, count = 0, 0, 0.0, 0
    for case in cases:
        found = logits(case.tokens, case.places).double().cpu()
        answers, values = torch.tensor(case.answers), torch.tensor(case.values)
        whole += int((found.argmax(-1) == answers).sum())
        among += int((values[found[:, values].argmax(-1)] == answers).sum())
        nll += float(torch.nn.functional.cross_entropy(found, answers, reduction="sum"))
        count += len(answers)
    return {"accuracy": whole / count, "among": among / count, "nll": nll / count, "queries": count}


@dataclass(frozen=True)
class Case:
    """A prompt and how it must go on."""

    prompt: list[int]
    answer: list[int]
    without: list[int]
    """A prompt of the same length that does not hold the answer."""
    label: dict[str, float] = field(default_factory=dict)


def needle(text: Sequence[int], encode: Encode, length: int, depth: float, rng: random.Random) -> Case:
    """A line with a number inside of held-out text; at the end the line begins again.

    Args:
        text: held-out tokens; a stretch at random is the haystack.
        length: tokens of prompt and answer.
        depth: where the needle is: 0 at the beginning, 1 right before the question.

    Raises:
        ValueError: text or length too short.
    """
    name = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))
    answer = encode("".join(rng.choices("0123456789", k=8)))
    ask = encode(f"\n# The access code of {name} is ")
    line = [*ask, *answer, *encode("\n")]
    hay = length - len(line) - len(ask) - len(answer)
    if hay < 1:
        raise ValueError(f"length {length} has no room beside needle and question, {length - hay} tokens: give more")
    found = _stretch(text, hay + len(line), rng)
    at = round(depth * hay)
    prompt = [*found[:at], *line, *found[at:hay], *ask]
    return Case(prompt, answer, [*found, *ask], {"length": length, "depth": depth})


def copy(text: Sequence[int], encode: Encode, words: Sequence[str], distance: int, rng: random.Random) -> Case:
    """A function with a long name, then held-out text, then the first word of the name: the rest is asked for.

    Args:
        words: of which 6 make a name.
        distance: tokens of text between.

    Raises:
        ValueError: text too short.
    """
    first, *rest = rng.sample(list(words), 6)
    cue, answer = encode(first), encode("_" + "_".join(rest))
    define = [*encode("\n\ndef "), *cue, *answer, *encode("(self):\n")]
    ask = [*encode("\n    return self."), *cue]
    found = _stretch(text, distance + len(define), rng)
    return Case([*define, *found[:distance], *ask], answer, [*found, *ask], {"distance": distance})


def _stretch(text: Sequence[int], length: int, rng: random.Random) -> list[int]:
    if len(text) < length:
        raise ValueError(f"a stretch of {length} tokens is longer than the text, {len(text)}: ask for a shorter one")
    start = rng.randrange(len(text) - length + 1)
    return [int(token) for token in text[start : start + length]]


def score_cases(
    cases: Iterable[Case], ask: Callable[[list[int], list[int]], tuple[int, float]]
) -> list[dict[str, float]]:
    """A row for every label, in the order of the cases.

    Args:
        ask: ``ask(prompt, answer)``: how many tokens of the answer the likeliest continuation has before another one;
            mean of -log p of the answer's tokens, in nats.

    Returns:
        exact: share of answers that are right as a whole; tokens: share of their tokens up to the first wrong one; nll
        of answers; gain: by how much less it is than where the prompt does not hold the answer; cases.
    """
    rows: dict[tuple, dict[str, float]] = {}
    for case in cases:
        (right, known), (_, unknown) = ask(case.prompt, case.answer), ask(case.without, case.answer)
        row = rows.setdefault(
            tuple(case.label.items()), case.label | {"exact": 0.0, "tokens": 0.0, "nll": 0.0, "gain": 0.0, "cases": 0}
        )
        row["exact"] += right == len(case.answer)
        row["tokens"] += right / len(case.answer)
        row["nll"] += known
        row["gain"] += unknown - known
        row["cases"] += 1
    for row in rows.values():
        for key in ("exact", "tokens", "nll", "gain"):
            row[key] /= row["cases"]
            assert math.isfinite(row[key]), (key, row)
    return list(rows.values())
