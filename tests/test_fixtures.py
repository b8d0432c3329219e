"""The fixtures themselves: poison that does not poison, or a seed that repeats nothing, would make other tests pass."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkout import python_path

ALLOCATIONS = {
    "empty": lambda **o: torch.empty(3, 2, **o),
    "empty_like": lambda **o: torch.empty_like(torch.zeros(3, 2), **o),
    "empty_strided": lambda **o: torch.empty_strided((3, 2), (2, 1), **o),
    "new_empty": lambda **o: torch.zeros(1).new_empty(3, 2, **o),
    "new_empty_strided": lambda **o: torch.zeros(1).new_empty_strided((3, 2), (2, 1), **o),
}


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_memory_is_poisoned(allocate):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64):
        x = allocate(dtype=dtype)
        assert x.dtype == dtype and x.shape == (3, 2) and x.isnan().all()
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert (allocate(dtype=dtype) == torch.iinfo(dtype).max).all()
    assert allocate(dtype=torch.bool).all()
    x = allocate(requires_grad=True)
    assert x.requires_grad and x.is_leaf and x.isnan().all()


def test_memory_of_the_meta_device():
    assert torch.empty(2, device="meta").is_meta


TESTS = """
import torch

def test_one(rng):
    print("values", torch.rand(2, generator=rng).tolist())
    assert False

def test_two(rng):
    print("values", torch.rand(2, generator=rng).tolist())
    assert False
"""


def failing_output(tmp_path, *arguments, seed=""):
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text("utf-8"))
    (tmp_path / "test_x.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, *arguments, tmp_path]
    environment = {"LIGHTNING_TEST_SEED": seed, "PYTHONPATH": python_path()}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    values = [line for line in run.stdout.splitlines() if line.startswith("values")]
    seeds = {line for line in run.stdout.splitlines() if "LIGHTNING_TEST_SEED=" in line and "repeats" not in line}
    assert run.returncode == 1 and len(seeds) == 1, run.stdout + run.stderr
    return values, seeds.pop().rpartition("=")[2]


def test_seed_is_printed_and_repeats_the_values(tmp_path):
    values, seed = failing_output(tmp_path)
    assert len(set(values)) == 2
    assert failing_output(tmp_path, "-k", "two", seed=seed) == (values[1:], seed)
