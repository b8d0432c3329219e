"""What the log of Megatron's training says: steps, validations, the number of parameters.

    for row in megatron_log.read(log.splitlines()):   # Step, Validation or Parameters

The one reader of these lines: for the scripts here, for examples/quality, for tests and benchmarks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_STEP = re.compile(r"\biteration +(\d+)/ *(\d+) \|(.*)")
_FIELD = re.compile(r" *([^|:]+): +(\S+) \|")
_VALIDATION = re.compile(r"validation loss at iteration (\d+)(?: on validation set)? \| lm loss value: (\S+)")
_PARAMETERS = re.compile(r"number of parameters on .*\((?:0, )*0\): (\d+)$")


class Step(NamedTuple):
    """A line of a step; with --log-interval N, the mean of N steps."""

    iteration: int
    last: int  # --train-iters
    seconds: float
    loss: float | None  # None: Megatron prints none for a step that it skipped, nor one that is not finite
    grad_norm: float | None
    lr: float | None


class Validation(NamedTuple):
    iteration: int
    loss: float


class Parameters(NamedTuple):
    count: int  # of the first rank of every kind


class Reader:
    """Reads the lines of one start, one by one.

    Megatron prints the first step of a start at once, but does not reset its average, so that with --log-interval 1
    the second line shows the mean of the first two (megatron/training/training.py:2594). That mean is undone here; the
    second loss has therefore an error of up to 1.5e-6, three times that of the others.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []  # the first two lines

    def __call__(self, line: str) -> Step | Validation | Parameters | None:
        if match := _STEP.search(line):
            return self._step(int(match[1]), int(match[2]), dict(_FIELD.findall(match[3])))
        if match := _VALIDATION.search(line):
            return Validation(int(match[1]), float(match[2]))
        if match := _PARAMETERS.search(line):
            return Parameters(int(match[1]))
        return None

    def _step(self, iteration: int, last: int, fields: dict[str, str]) -> Step:
        seconds = float(fields["elapsed time per iteration (ms)"]) / 1e3
        loss, norm, lr = (
            float(fields[name]) if name in fields else None for name in ("lm loss", "grad norm", "learning rate")
        )
        if len(self.steps) < 2:
            self.steps.append(Step(iteration, last, seconds, loss, norm, lr))
            first = self.steps[0]
            if iteration == first.iteration + 1 and loss is not None and first.loss is not None:
                loss = round(2 * loss - first.loss, 6)
        return Step(iteration, last, seconds, loss, norm, lr)


def read(lines: Iterable[str]) -> Iterator[Step | Validation | Parameters]:
    """Rows of the lines of one start, as they come."""
    return (row for row in map(Reader(), lines) if row is not None)


def steps(log: str) -> list[Step]:
    """All steps of the log of one start."""
    return [row for row in read(log.splitlines()) if isinstance(row, Step)]
