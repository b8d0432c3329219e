"""Compares two runs of a benchmark suite, cell by cell: what a change of a kernel must show.

    python -m tests.benchmarks.compare OLD NEW [--more 2]      folders of <suite>.json, or two files

Give several runs of a side, separated by commas, where the machine is noisy: the median of each cell counts. Prints the
cells that differ by more than ``--more`` percent, and how all cells are spread; ends with status 1 if one is slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

TIMES = ("forward_ms", "backward_ms", "both_ms", "ms")
Cell = tuple[str, ...]


def cells(path: Path) -> dict[Cell, float]:
    """Milliseconds of every cell in a file, or in all files of a folder: (suite, what is measured, which time)."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = {}
    for file in files:
        for row in json.loads(file.read_text("utf-8")).get("rows", []):
            times = {key: row[key] for key in TIMES if isinstance(row.get(key), int | float)}
            what = ", ".join(f"{k} {v}" for k, v in row.items() if isinstance(v, int | str) and not k.endswith("ms"))
            found |= {(file.stem, what, key): value for key, value in times.items()}
    return found


def medians(paths: str) -> dict[Cell, float]:
    runs = [cells(Path(path)) for path in paths.split(",")]
    return {cell: statistics.median(run[cell] for run in runs if cell in run) for cell in runs[0]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="folder or file; several, separated by commas")
    parser.add_argument("new")
    parser.add_argument("--more", type=float, default=2.0, help="percent that count as a difference (2)")
    args = parser.parse_args(argv)
    old, new = medians(args.old), medians(args.new)
    common = [cell for cell in old if cell in new]
    if not common:
        parser.error(f"{args.old} and {args.new} have no cell in common: give results of the same suites")
    change = {cell: 100 * (new[cell] / old[cell] - 1) for cell in common}
    shown = sorted((cell for cell in common if abs(change[cell]) > args.more), key=lambda cell: -change[cell])
    for suite, what, key in shown:
        cell = suite, what, key
        print(f"{change[cell]:+6.1f}%  {old[cell]:9.4f} -> {new[cell]:9.4f} ms  {suite} {key}: {what}")
    values = sorted(change.values())
    print(
        f"{len(common)} cells: {values[0]:+.1f}% to {values[-1]:+.1f}%, median {statistics.median(values):+.2f}%; "
        f"{sum(value > args.more for value in values)} slower by more than {args.more:g}%"
    )
    return int(values[-1] > args.more)


if __name__ == "__main__":
    raise SystemExit(main())
