"""Of tests with many slow cases, some are drawn by the seed: in a few runs each has its turn."""

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

CASES = pytest.StashKey[Counter[str]]()
"""How many cases of each test function were collected, before some were drawn."""


def read(path: Path) -> dict[str, int]:
    """How many cases of which test functions, from lines of a number and ``file::function``; # begins a comment."""
    lines = (line.partition("#")[0].split() for line in path.read_text().splitlines())
    return {name: int(count) for count, name in filter(None, lines)}


def left_out(items: Iterable[pytest.Item], counts: dict[str, int], seed: int) -> set[str]:
    """Ids of the cases that are not drawn. Those marked gpu stay: they are skipped, or fast."""
    cases: dict[str, list[str]] = {name: [] for name in counts}
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in cases and not item.get_closest_marker("gpu"):
            cases[name].append(item.nodeid)
    rng, out = random.Random(seed), set()
    for name, ids in cases.items():
        out |= set(rng.sample(sorted(ids), max(0, len(ids) - counts[name])))
    return out
