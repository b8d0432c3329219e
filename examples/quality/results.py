"""Committed results: one JSON file for each run, and what the report computes of them.

    python -m examples.quality.report collect --runs runs        # RUNS/NAME/*.json -> results/NAME.json

A file holds all of run.json, loss, gradient norm, learning rate and seconds of every step, validations, and the tasks
of evaluate: the raw log of a run, whatever its stretches were.
"""

from __future__ import annotations

import collections
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .train import read_lines
from .variants import VARIANTS, Plan

DIVERGED = 1.0  # nats that the last losses may be above the best validation before a run counts as diverged
COLUMNS = {"losses": "loss", "grad_norms": "grad_norm", "lrs": "lr", "seconds": "seconds"}
FIDELITY = "fidelity.json"


def collect(runs: Path, results: Path, names: Sequence[str] = ()) -> int:
    """Write a file for every run, or for those of ``names``, and fidelity.json; returns how many runs there are.

    Raises:
        ValueError: a step of a run is missing, or there twice.
    """
    results.mkdir(parents=True, exist_ok=True)
    folders = sorted(path.parent for path in runs.glob("*/run.json") if not names or path.parent.name in names)
    for folder in folders:
        found = one_file(folder)
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        (results / f"{folder.name}.json").write_text(f"{{\n{rows}\n}}\n")
    if (runs / FIDELITY).is_file():
        shutil.copyfile(runs / FIDELITY, results / FIDELITY)
    return len(folders)


def one_file(folder: Path) -> dict:
    """Everything of a run; losses that are no number are null."""
    run, rows = json.loads((folder / "run.json").read_text("utf-8")), read_lines(folder / "losses.jsonl")
    steps = [row["iteration"] for row in rows]
    if steps != list(range(1, len(rows) + 1)):
        raise ValueError(f"{folder / 'losses.jsonl'} does not hold the steps 1 to {len(rows)}, each once: {steps[:9]}")
    for name, key in COLUMNS.items():
        run[name] = [row[key] if math.isfinite(row[key]) else None for row in rows]
    run["valid"] = read_lines(folder / "valid.jsonl")
    evaluated = folder / "evaluate.json"
    run["tasks"] = json.loads(evaluated.read_text("utf-8"))["tasks"] if evaluated.is_file() else {}
    return run


@dataclass(frozen=True)
class Run:
    """A run as its file tells it."""

    name: str
    about: dict

    @property
    def variant(self) -> str:
        return self.about["variant"]

    @property
    def tasks(self) -> dict:
        return self.about["tasks"]

    @cached_property
    def losses(self) -> list[float]:
        return [math.nan if x is None else x for x in self.about["losses"]]

    @property
    def tokens_a_step(self) -> float:
        return self.about["tokens"] / self.about["steps"]

    @property
    def state(self) -> str:
        """complete, stopped at a step, or diverged."""
        losses, steps = self.losses, self.about["steps"]
        valid = [row["valid_loss"] for row in self.about["valid"]]
        if not losses:
            return "no step"
        if not all(map(math.isfinite, losses)) or "diverged" in self.about:
            return f"diverged at step {self.about.get('diverged', len(losses))}"
        if self.train_loss > min(valid, default=math.inf) + DIVERGED:
            return "diverged"
        return "complete" if len(losses) == steps else f"stopped at {len(losses)} of {steps}"

    @property
    def train_loss(self) -> float:
        """Mean of the last twentieth of the steps."""
        return statistics.mean(self.losses[-max(1, len(self.losses) // 20) :])

    @property
    def valid_loss(self) -> float | None:
        """Of the last validation of the training."""
        return self.about["valid"][-1]["valid_loss"] if self.about["valid"] else None

    @property
    def speed(self) -> float | None:
        """Tokens per second of a usual step: those in which kernels are compiled or data is awaited do not count."""
        seconds = self.about["seconds"]
        return self.tokens_a_step / statistics.median(seconds) if len(seconds) > 2 else None

    @property
    def minutes(self) -> float:
        """Minutes for which the run held the machine: stretches with their starts and saves, and evaluation."""
        stretches = sum(x.get("wall_seconds", 0.0) for x in self.about["stretches"])
        return (stretches + sum(task["seconds"] for task in self.tasks.values())) / 60

    @property
    def cards(self) -> set[str]:
        return {stretch["card"] for stretch in self.about["stretches"]}


def load(results: Path) -> list[Run]:
    """All runs, in the order of variants.py."""
    paths = [path for path in sorted(results.glob("*.json")) if path.name != FIDELITY]
    runs = [Run(path.stem, json.loads(path.read_text("utf-8"))) for path in paths]
    order = {name: number for number, name in enumerate(VARIANTS)}
    seed = lambda run: (order[run.variant], run.about["lr"], run.about["seed"])
    return sorted(runs, key=lambda run: (run.about["tag"], run.about["size"], -run.about["tokens"], *seed(run)))


@dataclass(frozen=True)
class Mean:
    """Over seeds."""

    value: float
    spread: float
    """Largest minus smallest."""
    count: int

    def text(self, form: str = ".4f") -> str:
        return format(self.value, form) + (f" ± {format(self.spread / 2, form)}" if self.count > 1 else "")


Pick = Callable[[Run], float | None]


def mean(runs: Iterable[Run], pick: Pick) -> Mean | None:
    """Of what ``pick`` finds; None where it finds nothing."""
    found = [x for run in runs if (x := pick(run)) is not None and math.isfinite(x)]
    return Mean(statistics.mean(found), max(found) - min(found), len(found)) if found else None


def loss_of(run: Run) -> float | None:
    return run.tasks.get("loss", {}).get("nll")


def row_of(task: str, value: str, **where: float) -> Pick:
    """A ``Pick`` of one value in a task's row, such as ``row_of("recall", "accuracy", pairs=32)``."""

    def pick(run: Run) -> float | None:
        rows = run.tasks.get(task, {}).get("rows", [])
        return next((row.get(value) for row in rows if all(row[key] == x for key, x in where.items())), None)

    return pick


def keys_of(runs: Iterable[Run], task: str, key: str) -> list[float]:
    """All values of ``key`` in a task's rows, sorted."""
    return sorted({row[key] for run in runs for row in run.tasks.get(task, {}).get("rows", [])})


class Results:
    """Runs by their part in the plan; tagged ones, of fidelity, have none."""

    def __init__(self, runs: list[Run], plan: Plan):
        self.every, self.plan = runs, plan
        self._groups = collections.defaultdict(list)
        for run in runs:
            if not run.about["tag"]:
                self._groups[run.variant, run.about["size"], self._budget(run)].append(run)

    def _budget(self, run: Run) -> float | None:
        """Which budget of the plan a run has; its own tokens are whole steps."""
        plan = self.plan
        return next((x for x in (plan.tokens, plan.short, plan.long_tokens) if self._near(run, x)), None)

    @staticmethod
    def _near(run: Run, tokens: float) -> bool:
        return abs(run.about["tokens"] - tokens) <= run.tokens_a_step

    def at(self, variant: str, size: str, tokens: float) -> list[Run]:
        """All runs of a variant with so many tokens, whatever their learning rate, seed and state."""
        return self._groups.get((variant, size, tokens), [])

    def best(self, variant: str, tokens: float) -> list[Run]:
        """Complete runs of the learning rate whose last validation is best in the mean, one for each seed."""
        by_rate = collections.defaultdict(list)
        for run in self.at(variant, self.plan.size, tokens):
            if run.state == "complete":
                by_rate[run.about["lr"]].append(run)
        means = {rate: found.value for rate, runs in by_rate.items() if (found := mean(runs, lambda x: x.valid_loss))}
        return by_rate[min(means, key=lambda rate: (means[rate], rate))] if means else []

    def main(self, variant: str) -> list[Run]:
        return self.best(variant, self.plan.tokens)

    def speed(self, variant: str, size: str, tokens: float) -> float | None:
        found = mean(self.at(variant, size, tokens), lambda run: run.speed)
        return found.value if found else None

    def missing(self) -> list[tuple[str, str, float, int]]:
        """Runs of the plan that are not there, or not complete."""
        there = {
            (*key, run.about["seed"]) for key, runs in self._groups.items() for run in runs if run.state == "complete"
        }
        return [row for row in self.plan.wanted() if row not in there]

    def loss_at(self, variant: str, tokens: float) -> float | None:
        """Held-out loss of a run of so many tokens: on the line through the two budgets of the plan, over log tokens.

        Both ends are complete runs, each with its own schedule. None where one is missing, or outside of both.
        """
        plan = self.plan
        ends = [mean(self.best(variant, x), loss_of) for x in (plan.short, plan.tokens)]
        if tokens >= plan.tokens * 0.999:
            return ends[1].value if ends[1] else None
        if None in ends or tokens < plan.short:
            return None
        part = math.log(tokens / plan.short) / math.log(plan.tokens / plan.short)
        return ends[0].value + part * (ends[1].value - ends[0].value)
