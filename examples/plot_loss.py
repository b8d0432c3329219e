"""Draw the loss from the log that Megatron printed.

    python examples/plot_loss.py --log train.log --out loss.png [--stats data/stats.json]

With the stats.json of prepare_data.py, a line shows the entropy of single tokens: what a model that has learnt only
how frequent every token is would score. A lower loss comes from context.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import megatron_log
import stoppable

INK, MUTED, GRID = "#222222", "#6b6b6b", "#e6e6e6"
BLUE, ORANGE = "#2a6fb0", "#d9822b"


def read_losses(log: str) -> tuple[dict[int, float], dict[int, float]]:
    """Training and validation loss by iteration, in nats per token. Of a repeated iteration, the last counts."""
    rows = list(megatron_log.read(log.splitlines()))
    train, valid = (
        {row.iteration: row.loss for row in rows if isinstance(row, kind) and row.loss is not None}
        for kind in (megatron_log.Step, megatron_log.Validation)
    )
    return train, valid


def final_loss(train: dict[int, float]) -> float:
    """Mean of the last twentieth of the logged losses, each of which is one of few batches."""
    losses = list(train.values())
    last = losses[-max(1, len(losses) // 20) :]
    return sum(last) / len(last)


def plot(train: dict[int, float], valid: dict[int, float], unigram: float | None, title: str, out: Path) -> None:
    """Write the picture; the ending of `out` picks its format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.edgecolor": MUTED, "text.color": INK, "axes.labelcolor": INK})
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    points = {"textcoords": "offset points"}
    blank = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    last, final = max(train), final_loss(train)
    if unigram is not None:
        axes.hlines(unigram, 0, last, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)))
        label = f"unigram entropy {unigram:.2f}: token frequencies alone"
        axes.annotate(label, (last, unigram), (0, 5), color=MUTED, ha="right", va="bottom", bbox=blank, **points)
    axes.plot(list(train), list(train.values()), color=BLUE, linewidth=1.8, label="training")
    note = f"{final:.2f}" + (f"\n{final / unigram:.0%} of unigram" if unigram is not None else "")
    axes.plot(last, final, "o", color=BLUE, markersize=5)
    axes.annotate(note, (last, final), (9, 2), color=BLUE, va="top", **points)
    if valid:
        axes.plot(
            list(valid), list(valid.values()), "D", color=ORANGE, markersize=6, label="held-out documents", zorder=3
        )
        end = max(valid)
        axes.annotate(f"{valid[end]:.2f}", (end, valid[end]), (9, 0), color=ORANGE, va="center", **points)
    axes.set_title(title, loc="left", fontsize=13, pad=12)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
    axes.set_xlim(0, last * 1.22)  # room for the notes
    axes.set_ylim(bottom=0)
    axes.spines["bottom"].set_bounds(0, last)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise SystemExit(f"plot_loss: --out {out} cannot be written ({error.strerror}); give another") from error
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="what the training printed")
    parser.add_argument("--out", type=Path, required=True, help="picture to write: .png, .svg or .pdf")
    parser.add_argument("--stats", type=Path, help="stats.json of prepare_data.py")
    parser.add_argument("--title", default="Loss", help="line above the picture")
    args = parser.parse_args(argv)
    for path in (args.log, args.stats):
        if path and not path.is_file():
            raise SystemExit(f"plot_loss: {path} does not exist")
    train, valid = read_losses(args.log.read_text("utf-8", "replace"))
    if not train:
        raise SystemExit(
            f"plot_loss: {args.log} has no line `iteration N/M | ... | lm loss: X`; did the training start?"
        )
    unigram = json.loads(args.stats.read_text())["unigram_entropy"] if args.stats else None
    plot(train, valid, unigram, args.title, args.out)
    print(f"  {args.out}: {len(train)} points, final loss {final_loss(train):.3f}")


if __name__ == "__main__":
    stoppable.run(main, "nothing was drawn")
