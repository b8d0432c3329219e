"""Tables and plots of docs/quality.md, from the JSON files of the other steps.

    python -m examples.quality.report collect --runs runs           # JSON of runs -> examples/quality/results
    python -m examples.quality.report write                         # results -> docs/quality.md and its plots

``collect`` copies run.json, losses.jsonl, valid.jsonl and evaluate.json of every run, and fidelity.json. ``write``
replaces what stands between the two marks in docs/quality.md. Nothing is left out: runs that diverged or are not
complete have their row.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import shutil
import statistics
from pathlib import Path

from . import RESULTS, ROOT
from .train import read_lines
from .variants import VARIANTS

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
FILES = ("run.json", "losses.jsonl", "valid.jsonl", "evaluate.json")
NOTHING = "**Nothing is measured yet.** The pipeline is there and tested on CPUs; no run on a GPU has been committed."
DIVERGED = 1.0  # nats that the last losses may be above the best validation before a run counts as diverged


def collect(runs: Path, results: Path) -> int:
    """Copy the JSON of all runs; returns how many runs there are."""
    folders = sorted(path.parent for path in runs.glob("*/run.json"))
    for folder in folders:
        (results / folder.name).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, results / folder.name / name)
    if (runs / "fidelity.json").is_file():
        results.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(runs / "fidelity.json", results / "fidelity.json")
    return len(folders)


def load(results: Path) -> list[dict]:
    """All runs: run.json with losses, valid and tasks, by variant as variants.py orders them."""
    found = []
    for path in sorted(results.glob("*/run.json")):
        run = json.loads(path.read_text("utf-8"))
        run["losses"], run["valid"] = (read_lines(path.with_name(f"{x}.jsonl")) for x in ("losses", "valid"))
        evaluated = path.with_name("evaluate.json")
        run["tasks"] = json.loads(evaluated.read_text("utf-8"))["tasks"] if evaluated.is_file() else {}
        found.append(run | {"name": path.parent.name})
    order = {name: number for number, name in enumerate(VARIANTS)}
    return sorted(found, key=lambda run: (run["size"], -run["tokens"], order[run["variant"]], run["lr"], run["seed"]))


def state(run: dict) -> str:
    """complete, stopped at a step, or diverged."""
    losses = [row["loss"] for row in run["losses"]]
    if not losses:
        return "no step"
    last = losses[-max(1, len(losses) // 20) :]
    if not all(map(math.isfinite, losses)):
        return "diverged"
    best = min((row["valid_loss"] for row in run["valid"]), default=math.inf)
    if statistics.mean(last) > best + DIVERGED:
        return "diverged"
    return "complete" if len(losses) == run["steps"] else f"stopped at {len(losses)} of {run['steps']}"


def gpu_seconds(run: dict) -> float:
    return sum(row["seconds"] for row in run["losses"])


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def section(runs: list[dict]) -> list[str]:
    """Tables of runs of one size and number of tokens, which can be compared."""
    first = runs[0]
    cards = sorted({stretch["card"] for run in runs for stretch in run["stretches"]})
    where = f"{first['tokens'] / 1e6:,.3g}M tokens, sequences of {first['seq_length']}, {', '.join(cards)}"
    lines = [f"### {first['size']}: {where}", ""]
    lines += ["Loss in nats per token, of held-out packages. Minutes: of training steps.", ""]
    head = ["variant", "seed", "lr", "parameters", "held-out loss", "train loss", "minutes", "tokens/s", "state"]
    rows = []
    for run in runs:
        seconds, losses = gpu_seconds(run), [row["loss"] for row in run["losses"]]
        count = len(losses) / run["steps"] * run["tokens"]
        last = losses[-max(1, len(losses) // 20) :]
        rows.append(
            [run["variant"], str(run["seed"]), f"{run['lr']:g}", f"{run.get('parameters', 0) / 1e6:.2f}M"]
            + [number(run["tasks"].get("loss", {}).get("nll"), ".4f"), number(statistics.mean(last) if last else None)]
            + [f"{seconds / 60:.1f}", f"{count / seconds:,.0f}" if seconds else "-", state(run)]
        )
    lines += [*table(head, rows), ""]
    seeds = collections.defaultdict(list)
    for run in runs:
        if "loss" in run["tasks"]:
            seeds[run["variant"], run["lr"]].append(run["tasks"]["loss"]["nll"])
    spread = [
        f"{name} (lr {lr:g}): {max(x) - min(x):.4f} over {len(x)} seeds"
        for (name, lr), x in seeds.items()
        if len(x) > 1
    ]
    lines += ["Spread of held-out losses: " + ("; ".join(spread) if spread else "no variant has two seeds") + ".", ""]
    for title, cells in (
        ("Perplexity by context, in multiples of the training length, states carried", _context),
        (
            "Recall of N pairs (MQAR): share of values right, of the whole vocabulary; chance among the values is 1/N",
            _recall,
        ),
        ("Needle in held-out text: share found / nats gained, by length, mean over depths", _needle),
        ("Copy of an identifier: share right as a whole, by distance in tokens", _copy),
    ):
        found = {run["name"]: cells(run) for run in runs}
        columns = list(dict.fromkeys(key for row in found.values() for key in row))
        if columns:
            rows = [
                [f"{run['variant']} (seed {run['seed']})", *(found[run["name"]].get(key, "-") for key in columns)]
                for run in runs
                if found[run["name"]]
            ]
            lines += [f"{title}:", "", *table(["variant", *columns], rows), ""]
    return lines


def _context(run: dict) -> dict[str, str]:
    rows = run["tasks"].get("context", {}).get("rows", [])
    return {f"{row['multiple']}x": number(row.get("perplexity"), ".2f") for row in rows}


def _recall(run: dict) -> dict[str, str]:
    return {f"{row['pairs']}": f"{row['accuracy']:.1%}" for row in run["tasks"].get("recall", {}).get("rows", [])}


def _needle(run: dict) -> dict[str, str]:
    by_length = collections.defaultdict(list)
    for row in run["tasks"].get("needle", {}).get("rows", []):
        by_length[row["length"]].append(row)
    mean = lambda rows, key: sum(row[key] * row["cases"] for row in rows) / sum(row["cases"] for row in rows)
    return {str(n): f"{mean(rows, 'exact'):.0%} / {mean(rows, 'gain'):.2f}" for n, rows in by_length.items()}


def _copy(run: dict) -> dict[str, str]:
    return {str(row["distance"]): f"{row['exact']:.0%}" for row in run["tasks"].get("copy", {}).get("rows", [])}


def fidelity(found: dict) -> list[str]:
    """Tables of fidelity.json."""
    lines = []
    if "curves" in found:
        about = found["curves"]
        lines += [f"### Fidelity: {about['size']}, {about['card']}, distance to {about['reference']}", ""]
        rows = [
            [name, str(row["steps"]), f"{row['mean']:.5f}", f"{row['end']:.5f}", f"{row['of_noise']:.2f}"]
            for name, row in about["distances"].items()
        ]
        lines += [*table(["path", "steps", "mean |difference|", "last tenth", "of the seeds' distance"], rows), ""]
    if "states" in found:
        about = found["states"]
        lines += [f"Largest |state| of {about['run']}; weakest decay {about['log_decay']:.2e} per token:", ""]
        shown = [row for i, row in enumerate(about["rows"], 1) if i & (i - 1) == 0 or i == len(about["rows"])]
        rows = [[f"{row['tokens']:,}", f"{row['all']:.4g}", f"{row['weakest']:.4g}"] for row in shown]
        lines += [*table(["tokens", "all heads", "head of weakest decay"], rows), ""]
    return lines


def draw(runs: list[dict], folder: Path) -> list[Path]:
    """Loss against tokens and against GPU time, and by position: one picture for comparable runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, path = runs[0], folder / f"{runs[0]['size']}-{runs[0]['tokens'] / 1e6:.0f}M.png"
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(run["variant"] for run in runs))}
    for run in runs:
        label, line = f"{run['variant']}, seed {run['seed']}", {"color": colours[run["variant"]], "linewidth": 1.3}
        rows, each = run["losses"], run["tokens"] / run["steps"]
        window = max(1, run["steps"] // 100)
        means = [statistics.mean(x["loss"] for x in rows[max(0, i - window) : i + 1]) for i in range(len(rows))]
        axes[0].plot([row["iteration"] * each / 1e6 for row in rows], means, label=label, **line)
        times, total = [], 0.0
        for row in rows:
            total += row["seconds"] / 60
            times.append(total)
        axes[1].plot(times, means, **line)
        if "loss" in run["tasks"]:
            parts, length = run["tasks"]["loss"]["by_position"], run["tasks"]["loss"]["length"]
            axes[2].plot([(i + 0.5) * length / len(parts) for i in range(len(parts))], parts, **line)
    for axis, name in zip(axes, ("million tokens", "minutes of training steps", "position in the window"), strict=True):
        axis.set_xlabel(name)
        axis.grid(color="#e4e4e4")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss (nats per token)")
    cards = ", ".join(sorted({stretch["card"] for run in runs for stretch in run["stretches"]}))
    sizes = sorted({f"{run.get('parameters', 0) / 1e6:.1f}M" for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    size = f"{first['size']}: {sizes[0]} to {sizes[-1]} parameters, {first['tokens'] / 1e6:,.3g}M tokens"
    figure.suptitle(f"{size}, seeds {seeds}, {cards}")
    figure.legend(loc="outside right center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def write(results: Path, page: Path) -> str:
    """Put tables and plots of all results into ``page``, between its marks; returns what stands there.

    Raises:
        ValueError: the page has no marks.
    """
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must hold {BEGIN} and {END} once each")
    groups = collections.defaultdict(list)
    for run in load(results):
        groups[run["size"], run["tokens"]].append(run)
    lines = []
    for runs in groups.values():
        lines += section(runs)
        if any(run["losses"] for run in runs):
            for picture in draw(runs, results):
                place = picture.resolve().relative_to(page.resolve().parent, walk_up=True)
                lines += [f"![Loss of {runs[0]['size']}]({place})", ""]
    if (results / "fidelity.json").is_file():
        lines += fidelity(json.loads((results / "fidelity.json").read_text("utf-8")))
    made = "\n".join(lines).strip() or NOTHING
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}")
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collect", "write"))
    parser.add_argument("--runs", type=Path, help="folder of all runs, to collect from")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/quality.md", help="(%(default)s)")
    options = parser.parse_args(argv)
    if options.what == "collect":
        if options.runs is None:
            parser.error("collect needs --runs, the folder of train")
        print(f"{collect(options.runs, options.results)} runs are in {options.results}")
    else:
        write(options.results, options.page)
        print(f"{options.page} is written")


if __name__ == "__main__":
    main()
