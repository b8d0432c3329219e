"""tests/drawn.txt, and what is drawn of it."""

import subprocess
import sys
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


def test_the_list_names_tests(request: pytest.FixtureRequest):
    """Those of which this session has not as many cases are collected by another: it may run only part of the tests."""
    counts = drawn.read(LIST)
    assert counts
    cases = [item.nodeid.partition("[")[0] for item in request.session.items]
    others = [name for name, count in counts.items() if cases.count(name) < count]
    if others:
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *others]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr
        for name in others:
            found = sum(line.startswith(f"{name}[") for line in run.stdout.splitlines())
            assert found > counts[name], f"{name} has no more cases"
