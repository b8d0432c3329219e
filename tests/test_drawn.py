"""tests/drawn.txt, and what is drawn of it."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import drawn

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests/drawn.txt"


def item(nodeid: str, gpu: bool = False) -> SimpleNamespace:
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: gpu and name == "gpu")


def test_so_many_cases_of_each_are_drawn_and_in_time_all():
    ids = [f"tests/a.py::test_x[{n}]" for n in range(6)]
    items = [*map(item, ids), item("tests/a.py::test_x[gpu]", gpu=True), item("tests/a.py::test_y[0]")]
    seen = set()
    for seed in range(50):
        out = drawn.left_out(items, {"tests/a.py::test_x": 2, "tests/a.py::test_z": 1}, seed)
        assert out < set(ids) and len(out) == 4
        assert out == drawn.left_out(items[::-1], {"tests/a.py::test_x": 2}, seed), "workers must draw the same"
        seen |= set(ids) - out
    assert seen == set(ids)
    assert drawn.left_out(items, {"tests/a.py::test_x": 6}, 0) == set()


def test_of_a_file_so_many_cases_are_drawn_behind_those_of_its_functions():
    x, y = ([f"tests/a.py::test_{name}[{n}]" for n in range(4)] for name in "xy")
    items, seen = [*map(item, x + y), item("tests/b.py::test_x"), item("tests/a.py::test_z", gpu=True)], set()
    for seed in range(50):
        out = drawn.left_out(items, {"tests/a.py": 3, "tests/a.py::test_x": 1}, seed)
        assert out == drawn.left_out(items[::-1], {"tests/a.py::test_x": 1, "tests/a.py": 3}, seed)
        stay = set(x + y) - out
        assert out < set(x + y) and len(stay) == 3 and len(stay & set(x)) <= 1
        seen |= stay
    assert seen == set(x + y)


def test_the_list_names_tests(request: pytest.FixtureRequest):
    """With more cases than are drawn. Those that this session has not collected itself are collected by another."""
    counts = drawn.read(LIST)
    assert counts
    cases = Counter(request.config.stash[drawn.CASES])
    if others := [name for name in counts if name not in cases]:
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *others]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr
        cases.update(drawn.count(line for line in run.stdout.splitlines() if "::" in line))
    for name, count in counts.items():
        assert cases[name] > count, f"{name} has no more cases"
