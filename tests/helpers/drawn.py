"""Of tests with many slow cases, some are drawn by the seed: in a few runs each has its turn."""

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

CASES = pytest.StashKey[Counter[str]]()
"""How many cases of each test function, and of each file, were collected, before some were drawn."""


def read(path: Path) -> dict[str, int]:
    """How many cases of which test functions or files, from lines of a number and ``file::function`` or ``file``; #
    begins a comment.
    """
    lines = (line.partition("#")[0].split() for line in path.read_text().splitlines())
    return {name: int(count) for count, name in filter(None, lines)}


def count(ids: Iterable[str]) -> Counter[str]:
    """Cases of each function and of each file."""
    found: Counter[str] = Counter()
    for nodeid in ids:
        found.update(_names(nodeid))
    return found


def left_out(items: Iterable[pytest.Item], counts: dict[str, int], seed: int) -> set[str]:
    """Ids of the cases that are not drawn: of functions first, then of what is left of files. Those marked gpu stay:
    they are skipped, or fast.
    """
    ids = sorted(item.nodeid for item in items if not item.get_closest_marker("gpu"))
    rng, out = random.Random(seed), set()
    for part in range(2):
        cases: dict[str, list[str]] = {}
        for nodeid in ids:
            if nodeid not in out:
                cases.setdefault(_names(nodeid)[part], []).append(nodeid)
        for name, number in counts.items():
            if name in cases:
                out |= set(rng.sample(cases[name], max(0, len(cases[name]) - number)))
    return out


def _names(nodeid: str) -> tuple[str, str]:
    return nodeid.partition("[")[0], nodeid.partition("::")[0]
