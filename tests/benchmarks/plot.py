"""Plots of the benchmarks' JSON files: ``python -m tests.benchmarks.plot [--results DIR]`` draws those it finds.

speed.json     -> speed.png     percent of the least possible time, per shape
length.json    -> length.png    time against length, log-log
dims.json      -> dims.png      percent of the least possible time, per head dim
training.json  -> training.png  tokens per GPU and second against length
decode_models.json -> decode_models.png  tokens per second of decoding against context
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullLocator  # noqa: E402

from .peers import ROWS  # noqa: E402
from .training_models import how  # noqa: E402

RESULTS = Path(__file__).parent / "results"
COLOURS = {row.name: row.colour for row in ROWS} | {"softmax": "#7f7f7f", "hybrid": "#ff7f0e"}
OTHER_COLOURS = ("#8c564b", "#bcbd22", "#e377c2", "#1b4f72")
OURS = ROWS[0].name
PLOTTED_BATCHES = (16, 64)  # of decoding
FEWEST = 3  # points of a line in the plot of training
# Line style and marker of a way of training, the plainest first.
WAYS = (
    ("-", "o"), ((0, (5, 1.5)), "s"), ((0, (1, 1)), "D"), ("-.", "^"),
    ((0, (6, 1, 1, 1, 1, 1)), "v"), ((0, (2, 2)), "x"), ((0, (1, 3)), "P"), ((0, (8, 2)), "<"),
)  # fmt: skip
STYLE = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.titlesize": 12, "legend.frameon": False, "figure.dpi": 150,
}  # fmt: skip


def _colour(name: str, names: list[str]) -> str:
    unknown = [n for n in names if n not in COLOURS]
    return COLOURS[name] if name in COLOURS else OTHER_COLOURS[unknown.index(name) % len(OTHER_COLOURS)]


def _short(count: float) -> str:
    """1024 -> 1K, 1048576 -> 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def _milliseconds(ms: float) -> str:
    return f"{ms / 1000:g} s" if ms >= 1000 else f"{ms:g} ms" if ms >= 1 else f"{ms * 1000:g} µs"


def _names(rows: list[dict], key: str = "impl") -> list[str]:
    return list(dict.fromkeys(x[key] for x in rows))


def _lengths_axis(axis, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    shown: list[int] = []
    for length in sorted(set(lengths), reverse=True):
        if not shown or shown[-1] >= 1.6 * length:  # labels of closer ones overlap
            shown.append(length)
    axis.set_xticks(shown[:: 2 if len(shown) > 6 else 1])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("tokens per sequence")


def _line(axis, points: list[tuple[float, float]], name: str, colour: str) -> None:
    """One implementation's line; ours is thicker and in front."""
    ours = name == OURS
    style = dict(linewidth=3.2, markersize=7, zorder=5) if ours else dict(linewidth=1.6, markersize=4.5, zorder=3)
    axis.plot(*zip(*sorted(points), strict=True), marker="o", color=colour, label=name, **style)


def _save(figure, path: Path, handles, labels) -> Path:
    """With the legend right of the axes."""
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return path


def _all_handles(axes) -> tuple[list, list[str]]:
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _where(data: dict) -> str:
    about = data.get("environment", {})
    decays = " without decay" if about.get("decay") == "zero" else ""
    return f"{about.get('card', 'unknown card')}, bf16{decays}"


def draw_length(data: dict, path: Path) -> Path:
    """Forward, and forward + backward, against the length of one sequence."""
    rows = data["rows"]
    names, sizes = _names(rows), rows[0]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    for axis, key, title in zip(axes, ("forward_ms", "both_ms"), ("forward", "forward + backward"), strict=True):
        for name in names:
            points = [(x["T"], x[key]) for x in rows if x["impl"] == name and key in x]
            if points:
                _line(axis, points, name, _colour(name, names))
        axis.set_yscale("log")
        _lengths_axis(axis, [x["T"] for x in rows])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: _milliseconds(ms)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(title)
    axes[0].set_ylabel("time")
    figure.suptitle(
        f"Time of one layer's attention: B = {sizes['B']}, {sizes['H']} heads of {sizes['K']}; {_where(data)}"
    )
    return _save(figure, path, *_all_handles(axes))


def _draw_floors(data: dict, path: Path, label: Callable[[dict], str], xlabel: str, title: str) -> Path:
    rows = [x for x in data["rows"] if "forward_floor" in x]
    names, groups = _names(rows), list(dict.fromkeys(map(label, rows)))
    figure, axes = plt.subplots(2, 1, figsize=(11, 6.6), sharex=True, layout="constrained")
    width = 0.84 / max(1, len(names))
    for axis, key in zip(axes, ("forward", "backward"), strict=True):
        for i, name in enumerate(names):
            mine = {label(x): x[f"{key}_floor"] for x in rows if x["impl"] == name and f"{key}_floor" in x}
            places = [groups.index(group) + (i - (len(names) - 1) / 2) * width for group in mine]
            bars = axis.bar(places, list(mine.values()), 0.92 * width, color=_colour(name, names), label=name)
            ours = name == OURS
            axis.bar_label(
                bars, fmt="%.0f", padding=1, fontsize=9.5 if ours else 7.5, fontweight="bold" if ours else "normal",
                color="black" if ours else "#555555",
            )  # fmt: skip
        axis.set_ylim(0, 105)
        axis.set_ylabel(f"{key}, %")
        axis.grid(axis="x", visible=False)
        axis.set_xticks(range(len(groups)), groups)
    axes[1].set_xlabel(xlabel)
    figure.suptitle(
        f"{title}; {_where(data)}\n100% = least memory traffic at the bandwidth of a copy; higher is better"
    )
    return _save(figure, path, *_all_handles(axes))


def draw_speed(data: dict, path: Path) -> Path:
    """Percent of the floor per shape: bars of every implementation that has one."""
    label = lambda x: f"{x['B']} × {_short(x['T'])} × {x['H']}"
    return _draw_floors(data, path, label, "batch × tokens × heads", "Share of the possible speed, heads of 128")


def draw_dims(data: dict, path: Path) -> Path:
    """Percent of the floor per head dims."""
    x = data["rows"][0]
    title = f"Share of the possible speed, B,T,H = {x['B']},{x['T']},{x['H']}"
    return _draw_floors(data, path, lambda x: f"{x['K']}, {x['V']}", "head dims K, V", title)


def _way(row: dict) -> str:
    return how(row).removeprefix(", ").replace("recompute full", "full recompute").replace("loss of", "loss chunks of")


def training_lines(rows: list[dict]) -> dict[tuple[str, str, str], list[tuple[int, float]]]:
    """(model, attention, way of training) -> points (length, tokens per GPU and second), by length.

    A run that failed is a point that is NaN, so that no line goes through it. Lines of one or two points, which show no
    course, are left to the tables.
    """
    cells: dict[tuple[str, str, str], dict[int, float]] = {}
    for x in rows:
        line = cells.setdefault((x["model"], x["attention"], _way(x)), {})
        line[x["length"]] = x.get("tokens_per_second") or math.nan
    lines = {key: sorted(cell.items()) for key, cell in cells.items()}
    return {key: line for key, line in lines.items() if sum(y == y for _, y in line) >= FEWEST}


def draw_training(data: dict, path: Path) -> Path:
    """Tokens per GPU and second against length. Panels are models, colours attentions, line styles ways of training."""
    lines = training_lines(data["rows"])
    models, attentions, ways = (list(dict.fromkeys(key[i] for key in lines)) for i in range(3))
    ways.sort(key=len)  # the plainest first
    styles = {way: WAYS[i % len(WAYS)] for i, way in enumerate(ways)}
    widths = [4 + sum(key[0] == model for key in lines) / 5 for model in models]  # more lines, more room
    figure, axes = plt.subplots(
        1, len(models), figsize=(sum(widths) + 0.8, 6), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes.flat, models, strict=True):
        shown = {key: line for key, line in lines.items() if key[0] == model}
        for (_, attention, way), line in shown.items():
            linestyle, marker = styles[way]
            axis.plot(
                *zip(*line, strict=True), color=_colour(attention, attentions), linestyle=linestyle, marker=marker,
                linewidth=2, markersize=6, markerfacecolor="white",
            )  # fmt: skip
        drawn = [(length, y) for line in shown.values() for length, y in line if y == y]
        _lengths_axis(axis, [length for length, _ in drawn])
        axis.set_ylim(0, 1.08 * max(y for _, y in drawn))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.set_title(f"{model} parameters")
    axes[0, 0].set_ylabel("tokens per GPU and second")
    figure.suptitle(f"Training speed against length; {_where(data)}")
    handles = [Line2D([], [], color=_colour(name, attentions), linewidth=4, label=name) for name in attentions]
    handles += [
        Line2D(
            [],
            [],
            color="#444444",
            linestyle=style,
            marker=marker,
            markerfacecolor="white",
            label=way or "nothing recomputed",
        )
        for way, (style, marker) in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=10, handlelength=3.5)
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return path


def draw_decode_models(data: dict, path: Path) -> Path:
    """Tokens per second of the forward on the GPU against context, a panel per batch, a line per model.

    The engine's own steps add its host time, which changes from run to run; the table has both.
    """
    rows = [x for x in data["rows"] if x.get("requests") == "aged"]
    names, batches = _names(rows, "attention"), sorted({x["batch"] for x in rows})
    batches = [b for b in batches if b in PLOTTED_BATCHES] or batches
    figure, axes = plt.subplots(1, len(batches), figsize=(6 * len(batches), 4.8), squeeze=False, layout="constrained")
    for axis, batch in zip(axes.flat, batches, strict=True):
        shown = [x for x in rows if x["batch"] == batch]
        for model in names:
            points = [
                (x["context"], 1e3 * batch / x["forward_ms"])
                for x in shown
                if x["attention"] == model and "forward_ms" in x
            ]
            if points:
                _line(axis, points, model, _colour(model, names))
        _lengths_axis(axis, [x["context"] for x in shown])
        axis.set_xlabel("tokens in context")
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.set_title(f"batch {batch}")
    axes[0, 0].set_ylabel("tokens per second")
    graphs = "CUDA graphs" if any("graph_tokens_per_second" in x for x in rows) else "eager"
    figure.suptitle(f"Decoding: forward passes of models of 1 billion parameters, {graphs}; {_where(data)}")
    return _save(figure, path, *_all_handles(axes.flat))


DRAW = {
    "speed": draw_speed,
    "length": draw_length,
    "dims": draw_dims,
    "training": draw_training,
    "decode_models": draw_decode_models,
}


def draw_all(results: Path, names: Sequence[str] = tuple(DRAW)) -> list[Path]:
    """Draws what there is a file for; returns the images' paths."""
    drawn = []
    with plt.rc_context(STYLE):
        for name in names:
            source = results / f"{name}.json"
            if source.exists():
                drawn.append(DRAW[name](json.loads(source.read_text()), source.with_suffix(".png")))
    return drawn


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.benchmarks.plot", description=__doc__, formatter_class=raw)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    args = parser.parse_args(argv)
    drawn = draw_all(args.results)
    print("\n".join(map(str, drawn)) or f"no results in {args.results}; run python -m tests.benchmarks.attention first")


if __name__ == "__main__":
    main()
