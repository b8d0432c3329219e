"""Plots of docs/quality.md. Every title names tokens, parameters, seeds and card."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

from .picks import Pick, keys_of, loss_of, perplexity_at, row_of
from .results import Results, Run, mean
from .tasks import FORMS
from .variants import MAIN

COLOURS = {name: f"C{number}" for number, name in enumerate(MAIN)}


def title_of(runs: list[Run]) -> str:
    """What a reader must know of the runs in a plot."""
    tokens = sorted({run.about["tokens"] / 1e6 for run in runs})
    sizes = sorted({run.about.get("parameters", 0) / 1e6 for run in runs})
    seeds = ", ".join(str(x) for x in sorted({run.about["seed"] for run in runs}))
    cards = ", ".join(sorted(set().union(*(run.cards for run in runs))))
    span = lambda values, form: " to ".join(format(x, form) + "M" for x in dict.fromkeys((values[0], values[-1])))
    return f"{span(tokens, ',.3g')} tokens, {span(sizes, '.1f')} parameters, seeds {seeds}, {cards}"


def draw(results: Results, folder: Path) -> list[tuple[Path, str]]:
    """Write what can be drawn into ``folder``; returns (file, what it shows)."""
    import matplotlib

    matplotlib.use("Agg")
    plan = results.plan
    trained = [run for name in MAIN for run in results.at(name, plan.size, plan.tokens) if run.losses]
    asked = [run for name in MAIN for run in results.main(name)]
    found = []
    for runs, name, title, plot in (
        (trained, "loss", "Loss by tokens, by GPU time and by position", _loss),
        (asked, "recall", "Perplexity by context, recall and copies", _recall),
        (
            [run for run in asked if run.tasks.get("needle", {}).get("rows")],
            "needle",
            "Needles by length and depth",
            _needle,
        ),
    ):
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if runs:
            figure = plot(results, runs)
            gap, size = ("\n", 9) if figure.get_figwidth() < 8 else (" ", 10)
            figure.suptitle(f"{title}:{gap}{title_of(runs)}", fontsize=size)
            figure.savefig(path, dpi=110, metadata={"Software": None})
            found.append((path, title))
    return found


def _axes(count: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.3 * count, 4.8), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(color="#e4e4e4")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _loss(results: Results, runs: list[Run]):
    figure, axes = _axes(3)
    told: set[str] = set()
    tops = []
    for run in runs:
        window = max(1, run.about["steps"] // 100)
        losses = [statistics.fmean(run.losses[max(0, i - window) : i + 1]) for i in range(len(run.losses))]
        tops += losses[run.about["steps"] // 12 :][:1]
        label = None if run.variant in told else run.variant
        told.add(run.variant)
        line = {"color": COLOURS[run.variant], "linewidth": 1.1, "linestyle": "-" if run.about["seed"] == 1 else "--"}
        axes[0].plot([(i + 1) * run.tokens_a_step / 1e6 for i in range(len(losses))], losses, label=label, **line)
        if speed := run.speed or results.speed(run.variant, results.plan.size):
            minutes = run.tokens_a_step / speed / 60
            axes[1].plot([(i + 1) * minutes for i in range(len(losses))], losses, **line)
        if loss_of(run) is not None:
            parts, length = run.tasks["loss"]["by_position"], run.tasks["loss"]["length"]
            axes[2].plot([(i + 0.5) * length / len(parts) for i in range(len(parts))], parts, **line)
    names = ("million tokens", "minutes, by the median step", "position in the window")
    for axis, name in zip(axes, names, strict=True):
        axis.set_xlabel(name)
    for axis in axes[:2] if tops else ():
        axis.set_ylim(top=max(tops))  # the fall from the first loss hides all else
    axes[0].set_ylabel("training loss (nats per token)")
    axes[2].set_ylabel("held-out loss")
    axes[2].set_xscale("log", base=2)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _recall(results: Results, runs: list[Run]):
    figure, axes = _axes(3)
    copied = lambda x: row_of("copy", "gain", distance=x)
    recalled = lambda x: row_of("recall", "accuracy", pairs=x, form=FORMS[0])
    kinds: tuple[tuple[str, str, Callable[[float], Pick], str, str, Callable[[float], str]], ...] = (
        (
            "context",
            "multiple",
            perplexity_at,
            "perplexity, the better angles",
            "context, in training lengths",
            "{:g}".format,
        ),
        ("recall", "pairs", recalled, "share of values right", f"pairs to recall (MQAR, {FORMS[0]})", "{:g}".format),
        ("copy", "distance", copied, "nats gained", "distance of a copy (tokens)", "{:,.0f}".format),
    )
    for axis, (task, key, pick_at, value, label, form) in zip(axes, kinds, strict=True):
        keys = keys_of(runs, task, key)
        for name in MAIN:
            points = [(x, found) for x in keys if (found := mean(results.main(name), pick_at(x)))]
            if points:
                bars = [found.spread / 2 for _, found in points]
                values = [found.value for _, found in points]
                axis.errorbar(
                    [x for x, _ in points], values, bars, color=COLOURS[name], marker="o", markersize=4, linewidth=1.1,
                    capsize=2, label=name if axis is axes[0] else None,
                )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks(keys, [form(x) for x in keys])
        axis.set_xlabel(label)
        axis.set_ylabel(value)
    axes[0].set_yscale("log")  # softmax may be lost beyond its training length
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _needle(results: Results, runs: list[Run]):
    """A map of each variant: nats gained, lengths to the right, depths downwards."""
    names = [name for name in MAIN if any(run.variant == name for run in runs)]
    lengths, depths = keys_of(runs, "needle", "length"), keys_of(runs, "needle", "depth")
    cells = {
        name: [
            [mean(results.main(name), row_of("needle", "gain", length=x, depth=y)) for x in lengths]
            for y in depths
        ]
        for name in names
    }  # fmt: skip
    values = {
        name: [[float("nan") if x is None else x.value for x in row] for row in rows] for name, rows in cells.items()
    }
    top = max((0.1, *(x for rows in values.values() for row in rows for x in row if x == x)))
    figure, axes = _axes(len(names))
    for axis, name in zip(axes, names, strict=True):
        axis.grid(visible=False)
        image = axis.imshow(values[name], vmin=0, vmax=top, aspect="auto", cmap="viridis")
        for (y, row), x in itertools.product(enumerate(values[name]), range(len(lengths))):
            text = "-" if row[x] != row[x] else f"{row[x]:.1f}"
            colour = "black" if row[x] > 0.7 * top else "white"
            axis.text(x, y, text, ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(len(lengths)), [f"{x:,.0f}" for x in lengths])
        axis.set_yticks(range(len(depths)), [f"{x:g}" for x in depths])
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("length (tokens)")
    axes[0].set_ylabel("depth")
    figure.colorbar(image, ax=list(axes), label="nats gained", shrink=0.8)
    return figure
