"""The kernels without running them: what is launched, and whether it compiles for GPUs that are not here, and fits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_megatron.ops import kernels

from .launches import SEGMENTED, SINGLE, record

BF16 = torch.bfloat16
KIB = 1024
# shared memory a program may ask for: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
SHARED = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB}


@pytest.mark.parametrize("capability", SHARED)
def test_compiles_and_fits(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.aot", "--few", str(capability)]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    lines = run.stdout.splitlines()
    assert lines and all(line.startswith(f"sm_{capability} ") for line in lines)
    shared = [int(re.search(r"shared=(\d+)", line)[1]) for line in lines]
    assert max(shared) > 40 * KIB, "the kernels that need most are not among them"
    assert max(shared) <= SHARED[capability]


@pytest.mark.parametrize("documents", [0, 3])
@pytest.mark.parametrize("K, V", [(128, 128), (16, 256)])
def test_number_of_launches(K, V, documents):
    """Small inputs cost launches: four for one segment, twice as many from two segments on."""
    for T, names in ((1, SINGLE), (1024, SINGLE), (1025, SEGMENTED), (10**6, SEGMENTED)):
        assert tuple(x.what for x in record(dtype=BF16, T=T, K=K, V=V, documents=documents)) == names


@pytest.mark.parametrize("T, B, H", [(1, 2048, 64), (2048, 1024, 128), (2**20, 1, 64)])
def test_grids_are_within_cuda_limits(T, B, H):
    """CUDA allows 2^31 - 1 programs along the first axis of a grid, and 65535 along the others."""
    for launch in record(dtype=BF16, T=T, B=B, H=H, K=256, V=256):
        x, *others = launch.grid
        assert 0 < x < 2**31 and all(0 < n < 2**16 for n in others), launch


def test_no_recompiles():
    """Constants of the compiled kernels depend on dtype, head dims and features; never on T, B, H or documents."""

    def constants(T, B, H, documents=0):
        constants = []
        for launch in record(dtype=BF16, T=T, B=B, H=H, K=64, V=64, documents=documents):
            annotations = getattr(kernels, launch.kernel).fn.__annotations__
            names = [name for name, kind in annotations.items() if "constexpr" in str(kind)]
            assert names
            constants.append({name: launch.arguments[name] for name in names} | launch.options)
        return constants

    assert constants(3000, 2, 12) == constants(70001, 5, 7)
    assert constants(3000, 1, 12, documents=3) == constants(70001, 1, 7, documents=40)
    assert constants(20, 2, 12) == constants(1000, 1, 8)


def test_segments():
    """Whole chunks, few enough for the scan, long enough to be worth it, and all of T."""
    for T in [*range(1, 3000, 7), *(2**n + d for n in range(10, 24) for d in (-1, 0, 1))]:
        length = kernels._segment_len(T)
        assert length % 64 == 0 and length >= 1024
        assert -(-T // length) <= 16
