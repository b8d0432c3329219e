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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .picks import Pick, loss_of
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
        """Of the last validation of the training; None without one, and where it is no number."""
        found = self.about["valid"][-1]["valid_loss"] if self.about["valid"] else None
        return found if found is not None and math.isfinite(found) else None

    @property
    def transformer_impl(self) -> str:
        return self.about.get("transformer_impl", "local")

    @property
    def speed(self) -> float | None:
        """Tokens per second of a usual step: those in which kernels are compiled or data is awaited do not count. None
        where others used the GPU at the same time.
        """
        seconds = self.about["seconds"]
        if len(seconds) < 3 or self.about.get("shared"):
            return None
        return self.tokens_a_step / statistics.median(seconds)

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


def million(tokens: float) -> str:
    return f"{tokens / 1e6:,.3g}M"


def mean(runs: Iterable[Run], pick: Pick) -> Mean | None:
    """Of what ``pick`` finds; None where it finds nothing."""
    found = [x for run in runs if (x := pick(run)) is not None and math.isfinite(x)]
    return Mean(statistics.mean(found), max(found) - min(found), len(found)) if found else None


class Results:
    """Runs by their part in the plan; tagged ones, of fidelity, have none."""

    def __init__(self, runs: list[Run], plan: Plan):
        self.every, self.plan = runs, plan
        self._groups = collections.defaultdict(list)
        for run in runs:
            if not run.about["tag"] and run.transformer_impl == plan.transformer_impl:
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

    def sweep(self, variant: str) -> dict[float, Run]:
        """By learning rate, runs that choose one: of the short budget and of any layers, of the smallest seed."""
        found: dict[float, Run] = {}
        for run in sorted(self.every, key=lambda run: (run.about["seed"], run.transformer_impl)):
            if run.variant == variant and run.about["size"] == self.plan.size and not run.about["tag"]:
                if self._near(run, self.plan.short):
                    found.setdefault(run.about["lr"], run)
        return found

    def best(self, variant: str, tokens: float) -> list[Run]:
        """Complete runs of the learning rate whose last validation is best, one for each seed."""
        return _best(run for run in self.at(variant, self.plan.size, tokens) if run.state == "complete")

    def main(self, variant: str) -> list[Run]:
        return self.best(variant, self.plan.tokens)

    def speed(self, variant: str, size: str) -> float | None:
        """Of runs that had a GPU to themselves; of the largest budget that has some, since steps are alike in all."""
        for budget in (self.plan.tokens, self.plan.short, self.plan.long_tokens):
            if found := mean(self.at(variant, size, budget), lambda run: run.speed):
                return found.value
        return None

    def missing(self) -> list[tuple[str, str, float, int]]:
        """Runs of the plan that are not there, or not complete."""
        there = {
            (*key, run.about["seed"]) for key, runs in self._groups.items() for run in runs if run.state == "complete"
        }
        return [row for row in self.plan.wanted() if row not in there]

    def loss_at(self, variant: str, tokens: float) -> tuple[str, float] | None:
        """Held-out loss of a run of so many tokens, by complete runs of any budget, each with its own schedule.

        Returns:
            ("", loss) of a run within 2% of the tokens; ("≤", loss) on the line between the next runs over log tokens,
            above which no convex curve lies; (">", loss) of the shortest run where that has more tokens. None where
            runs are missing.
        """
        by_tokens = collections.defaultdict(list)
        for (name, size, _), runs in self._groups.items():
            for run in runs if (name, size) == (variant, self.plan.size) else ():
                if run.state == "complete":
                    by_tokens[run.about["tokens"]].append(run)
        losses = {x: found.value for x, runs in by_tokens.items() if (found := mean(_best(runs), loss_of))}
        if not losses:
            return None
        nearest = min(losses, key=lambda x: abs(x - tokens))
        if abs(nearest - tokens) <= 0.02 * tokens:
            return "", losses[nearest]
        below, above = [x for x in losses if x < tokens], [x for x in losses if x > tokens]
        if not above:
            return None
        b = min(above)
        if not below:
            return ">", losses[b]
        a = max(below)
        part = math.log(tokens / a) / math.log(b / a)
        return "≤", losses[a] + part * (losses[b] - losses[a])


def _best(runs: Iterable[Run]) -> list[Run]:
    """Those of the learning rate whose last validation is best in the mean of the seeds that all rates have."""
    by_rate = collections.defaultdict(list)
    for run in runs:
        if run.valid_loss is not None:
            by_rate[run.about["lr"]].append(run)
    if not by_rate:
        return []
    common = set.intersection(*({run.about["seed"] for run in found} for found in by_rate.values()))
    means = {
        rate: statistics.fmean(run.valid_loss for run in found if not common or run.about["seed"] in common)
        for rate, found in by_rate.items()
    }
    return by_rate[min(means, key=lambda rate: (means[rate], rate))]
