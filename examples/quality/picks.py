"""Values of a run, as tables and plots take them; and the gap between runs by package."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import Run

Pick = Callable[["Run"], float | None]


def loss_of(run: Run) -> float | None:
    """Held-out loss; evaluations that do not know packages read other text."""
    task = run.tasks.get("loss", {})
    return task.get("nll") if "by_package" in task else None


def row_of(task: str, value: str, **where: object) -> Pick:
    """A ``Pick`` of one value in a task's row, such as ``row_of("recall", "accuracy", pairs=32)``."""

    def pick(run: Run) -> float | None:
        rows = run.tasks.get(task, {}).get("rows", [])
        return next((row.get(value) for row in rows if all(row.get(key) == x for key, x in where.items())), None)

    return pick


def keys_of(runs: Iterable[Run], task: str, key: str) -> list[float]:
    """All values of ``key`` in a task's rows, sorted."""
    return sorted({row[key] for run in runs for row in run.tasks.get(task, {}).get("rows", [])})


def perplexity_at(multiple: float) -> Pick:
    """Perplexity at so many times the training length, of the better one of trained and scaled angles."""

    def pick(run: Run) -> float | None:
        of = lambda scaled: row_of("context", "perplexity", multiple=multiple, scaled=scaled)(run)
        return min((x for x in map(of, (False, True)) if x is not None), default=None)

    return pick


def needle_of(value: str, length: float) -> Pick:
    """Mean over depths, weighted by the number of cases; ``cases``: their sum."""

    def pick(run: Run) -> float | None:
        rows = [row for row in run.tasks.get("needle", {}).get("rows", []) if row["length"] == length]
        cases = sum(row["cases"] for row in rows)
        if not cases or value == "cases":
            return cases or None
        return sum(row[value] * row["cases"] for row in rows) / cases

    return pick


def sliding(run: Run) -> float | None:
    parts = run.tasks["loss"].get("by_position") if loss_of(run) is not None else None
    return math.exp(statistics.fmean(parts[-max(1, len(parts) // 4) :])) if parts else None


def of_packages(run: Run) -> float | None:
    """Held-out loss in which every package counts the same."""
    rows = run.tasks.get("loss", {}).get("by_package")
    return statistics.fmean(row["nll"] for row in rows.values()) if rows else None


@dataclass(frozen=True)
class Gap:
    """Held-out loss of some runs minus that of others on the same text."""

    value: float
    error: float | None
    """Standard error over packages (bootstrap); None of one package."""
    better: int
    packages: int


def gap(runs: Sequence[Run], others: Sequence[Run]) -> Gap | None:
    """By package, in the mean over seeds; None where that is missing."""
    own, other = (_by_package(x) for x in (runs, others))
    names = sorted(own.keys() & other.keys())
    if not names:
        return None
    weights = [own[name][0] for name in names]
    differences = [own[name][1] - other[name][1] for name in names]
    draw, means = random.Random(1), []
    for _ in range(1000):
        chosen = draw.choices(range(len(names)), k=len(names))
        means.append(statistics.fmean([differences[i] for i in chosen], [weights[i] for i in chosen]))
    better = sum(x < 0 for x in differences)
    error = statistics.pstdev(means) if len(names) > 1 else None
    return Gap(statistics.fmean(differences, weights), error, better, len(names))


def _by_package(runs: Sequence[Run]) -> dict[str, tuple[int, float]]:
    """(tokens, mean loss) of packages that all runs have."""
    found = [rows for run in runs if (rows := run.tasks.get("loss", {}).get("by_package"))]
    names = set.intersection(*map(set, found)) if found else set()
    return {name: (found[0][name]["tokens"], statistics.fmean(x[name]["nll"] for x in found)) for name in names}
