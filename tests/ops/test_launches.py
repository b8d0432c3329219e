"""The kernels without running them: what is launched, and whether it compiles for GPUs that are not here, and fits."""

import heapq
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_megatron.ops.triton import tiling
from tests import benchmarks

from . import aot
from .aot import FEW, SHARED
from .launches import (
    DECODING,
    HOPPER,
    SEGMENTED,
    SINGLE,
    kernel,
    record,
    record_decode,
    record_derived,
    record_local_states,
)

BF16 = torch.bfloat16
KIB = 1024


@pytest.mark.parametrize("gpu, part", [(gpu, part) for gpu in SHARED for part in range(len(aot.parts(gpu, True)))])
def test_compiles_and_fits(gpu, part):
    """In a process without TRITON_INTERPRET."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.aot", "--few", "--part", str(part), gpu]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    shared = [int(re.search(r"shared=(\d+)", line)[1]) for line in lines]
    assert max(shared) <= SHARED[gpu] * KIB
    config, what = FEW[gpu][part] if part < len(FEW[gpu]) else ({}, ())
    overlapped = [line for line in lines if " overlapped " in line]
    assert len(overlapped) == len(what) * config.get("overlapped", False)
    if what and config["T"] > 1:
        assert len(lines) == len(what) and max(shared) > 30 * KIB, "the kernels that need most are not among them"
    # walks that overlap spill outside of their loop over chunks alone, but for a few words of wide states
    for line in overlapped:
        assert int(re.search(r"spills=(\d+)", line)[1]) <= (48 if "64x256" in line else 0), line
    # two programs of a multiprocessor
    pairs = [int(re.search(r"shared=(\d+)", line)[1]) for line in overlapped if "128x128" in line]
    assert all(2 * (n + KIB) <= 228 * KIB for n in pairs), pairs
    usual = [line for line in lines if "bfloat16 128x128" in line and " overlapped " not in line]
    for line in usual if gpu == "sm_90" else ():  # sine and cosine of angles beyond 105615 take an array of 7 words
        stack = int(re.search(r"stack=(\d+)", line)[1])
        assert stack <= 32 * (" decode " in line), f"registers of the usual case are spilled: {line}"


@pytest.mark.parametrize("documents", [0, 3])
@pytest.mark.parametrize("K, V", [(128, 128), (16, 256)])
def test_number_of_launches(K, V, documents):
    """Small inputs cost launches: one forward and one backward for one segment, two and two from two segments on."""
    single = SINGLE if documents else DECODING
    for T, H, names in (
        (1, 32, single),
        (2, 32, SINGLE),
        (1023, 8, SINGLE),
        (1024, 8, SEGMENTED),
        (10**6, 16, SEGMENTED),
    ):
        assert tuple(x.what for x in record(dtype=BF16, T=T, H=H, K=K, V=V, documents=documents)) == names
    crowd = record(dtype=BF16, T=8192, H=1024, K=K, V=V, documents=documents)
    assert tuple(x.what for x in crowd) == SINGLE, "a full GPU needs no segments"


@pytest.mark.parametrize("T, B, H", [(1, 2048, 64), (2048, 1024, 128), (2**20, 1, 64)])
def test_grids_are_within_cuda_limits(T, B, H):
    """CUDA allows 2^31 - 1 programs along the first axis of a grid, and 65535 along the others."""
    for launch in record(dtype=BF16, T=T, B=B, H=H, K=256, V=256):
        x, *others = launch.grid
        assert 0 < x < 2**31 and all(0 < n < 2**16 for n in others), launch


def test_plans_of_many_programs_cost_no_more():
    """A plan is made in the first call of a shape, beside which the GPU waits."""
    before = time.perf_counter()
    assert tiling.plan_splits(8192, 10**7, 2 * 10**7, alone=True) == (8192, 1, 1)
    assert time.perf_counter() - before < 0.1


def test_no_recompiles():
    """Constants of the compiled kernels depend on dtype, head dims and features; never on T, B, H or documents."""

    def constants(T, B, H, documents=0):
        constants = []
        for launch in record(dtype=BF16, T=T, B=B, H=H, K=64, V=64, documents=documents):
            annotations = kernel(launch.kernel).fn.__annotations__
            names = [name for name, kind in annotations.items() if "constexpr" in str(kind)]
            assert names
            constants.append({name: launch.arguments[name] for name in names} | launch.options)
        return constants

    assert constants(3000, 2, 12) == constants(70001, 5, 7)
    assert constants(3000, 1, 12, documents=3) == constants(70001, 1, 7, documents=40)
    assert constants(20, 2, 12) == constants(1000, 1, 8)


@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (96, 192), (256, 64), (256, 256)])
def test_overlapped_walks(K, V):
    """Those of Hopper: the same launches, in which every column of o, dq, dk and dv has a program."""
    for T, names in ((17, SINGLE), (10**5, SEGMENTED)):
        launches = record(dtype=BF16, T=T, H=8, K=K, V=V, descriptors=True, overlapped=True)
        assert tuple(x.what for x in launches) == names
        forward, backward = (x for x in launches if x.what in SINGLE)
        overlapped = [max(K, V) >= 128, True]
        assert [x.kernel for x in (forward, backward)] == [HOPPER[0] if overlapped[0] else "walk_kernel", HOPPER[1]]
        given, found = forward.arguments, backward.arguments
        assert given["BK"] >= K and forward.grid[0] == -(-V // given["BV"]) * 8 * given["segments"]
        columns = [-(-dim // found[name]) for dim, name in ((K, "COLS_K"), (V, "COLS_V"))]
        assert backward.grid[0] == 8 * (sum(columns) * found["segments"] + columns[0] * found["segments_q"])
        for launch in [x for x, is_so in zip((forward, backward), overlapped, strict=True) if is_so]:
            # states that a launch before it computes
            assert launch.options.get("launch_pdl", False) == launch.arguments["AFTER_STATES"] == (names == SEGMENTED)
    for other in (dict(T=16), dict(descriptors=False), dict(dtype=torch.float16)):
        options = dict(dtype=BF16, T=1000, K=K, V=V, descriptors=True, overlapped=True) | other
        assert not {x.kernel for x in record(**options)} & set(HOPPER)


@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (256, 64)])
def test_overlapped_walks_of_documents(K, V):
    """Those of Hopper, but for states of documents."""
    options = dict(dtype=BF16, T=10**4, H=8, K=K, V=V, documents=3, descriptors=True, overlapped=True)
    taken = set(HOPPER)
    for states, wanted in (dict(states=False), taken), (dict(by_row=True), taken), ({}, set()):
        launches = record(**options, **states)
        assert {x.kernel for x in launches} & set(HOPPER) == wanted
        assert all(x.arguments["VARLEN"] for x in launches if x.what in SEGMENTED)


@pytest.mark.parametrize("options", [dict(fused=True), dict(fused=True, normed=False), dict(fused=False, S=4)], ids=str)
def test_decoding(options):
    """One launch, whose constants depend on neither requests nor heads, nor on the number of tokens; within limits."""
    constants = []
    for R, H, Hkv in ((1, 4, 4), (7, 8, 2), (65536, 128, 128)):
        (launch,) = record_decode(dtype=BF16, R=R, H=H, K=256, V=256, **options | dict(Hkv=Hkv))
        assert len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31
        names = [name for name, kind in kernel(launch.kernel).fn.__annotations__.items() if "constexpr" in str(kind)]
        constants.append({name: launch.arguments[name] for name in names} | launch.options)
    assert constants[0] and constants == constants[:1] * 3


LENGTHS = [*range(1, 5000, 7), *(2**n + d for n in range(10, 24) for d in (-1, 0, 1))]


PROGRAMS = [1, 2, 14, 24, 40, 48, 64, 80, 160, 255, 256, 5000]  # of o, where sequences are not cut


@pytest.mark.parametrize("alone", [False, True], ids=["pairs", "alone"])
@pytest.mark.parametrize("programs", PROGRAMS)
def test_plan(programs, alone):
    """Parts of whole chunks, few of them, long enough to be worth it; segments of whole parts that fill the GPU."""
    for T in LENGTHS:
        part, *parts = tiling.plan_splits(T, programs, 2 * programs, alone)
        segments = [-(-T // (part * n)) for n in parts]
        count = -(-T // part)
        assert part % 64 == 0 and count <= 32
        assert count == 1 or part >= (256 if count == max(segments) else 1024)
        assert all(1 <= n <= 32 for n in segments)
        assert T >= 1024 or segments == [1, 1]
        assert segments[1] <= segments[0]


def ends(lengths: list[float], slots: int) -> float:
    """When the last of programs that start in this order ends, if a GPU runs ``slots`` at a time."""
    free = [0.0] * slots
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + length)
    return max(free)


@pytest.mark.parametrize("slots", [tiling.ALONE, tiling.PAIRS])
@pytest.mark.parametrize("kinds", [(1, 2), (2, 3)], ids=str)  # of o and of dk and dv; in (2, 3) V is wider
@pytest.mark.parametrize("programs", [1, 14, 40, 48, 80, 160, 255])
def test_segments_fill_the_gpu(programs, kinds, slots):
    """Their programs, one by one on a GPU, end as soon as is foretold, and not 3% after those of any other numbers."""
    o, grads = (programs * n for n in kinds)

    def time(n: int, n_grad: int) -> float:
        start = tiling.START / 2**20
        forward = ends([1 / n + start] * (o * n), slots)
        backward = ends([1 / n + start] * ((grads - o) * n) + [1 / n_grad + start] * (grads * n_grad), slots)
        return forward + backward + 2 * tiling.STATE_PASS * (1 - 1 / n) * o / slots

    best = tiling._segments(o, grads, 32, 2**20, slots)
    end = ends([1 / best[0]] * ((grads - o) * best[0]) + [1 / best[1]] * (grads * best[1]), slots)
    assert end == pytest.approx(tiling._ends(grads - o, best[0], grads, best[1], slots))
    others = {(n, n_grad) for n in (1, 3, 8, 11) for n_grad in (1, n)}
    assert time(*best) <= 1.03 * min(time(*pair) for pair in others)


def test_segments_are_those_that_were_fastest():
    """Of all cuts that were measured; three shapes are cut into numbers that were not."""
    measured = json.loads((Path(*benchmarks.__path__) / "results" / "segments-h200.json").read_text("utf-8"))
    times: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
    for T, heads, *segments, _, forward, backward in measured["rows"]:
        cuts = times.setdefault((T, heads), {})
        cuts[tuple(segments)] = min(cuts.get(tuple(segments), math.inf), forward + backward)
    unknown = 0
    for (T, heads), cuts in times.items():
        part, *parts = tiling.plan_splits(T, 2 * heads, 4 * heads)
        chosen = tuple(-(-T // (part * n)) for n in parts)
        unknown += chosen not in cuts
        assert cuts.get(chosen, 0) <= 1.01 * min(cuts.values()), f"{T=} {heads=} {chosen=}"
    assert len(times) == 21 and unknown <= 3


def test_plan_of_deterministic_algorithms():
    """Depends on T alone where torch.use_deterministic_algorithms asks for it."""
    sizes = [(1, 2), (24, 48), (5000, 10000)]
    assert len({tiling.plan_splits(70000, *size) for size in sizes}) > 1
    torch.use_deterministic_algorithms(True)
    try:
        for T in LENGTHS:
            assert len({tiling.plan_splits(T, *size) for size in sizes}) == 1
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("documents", [0, 3])
@pytest.mark.parametrize("T", [1, 100, 8192, 10**6])
def test_launches_of_local_states(T, documents):
    """Two each way before the exchange or with it, of which the operator uses the first again, and one behind it."""
    launches = record_local_states(dtype=BF16, T=T, K=128, V=64, documents=documents)
    assert [launch.what for launch in launches] == [
        "state",
        "local state",
        "combine_kernel",
        "dstate",
        "send",
        "receive_kernel",
    ]
    for launch in launches:
        assert len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31
    sent, read = launches[0].arguments["split_states"], launches[1].arguments["split_states"]
    assert sent is read and sent.shape[1] * launches[0].arguments["split_len"] >= T


@pytest.mark.parametrize("T", [1, 8192, 10**6])
def test_launches_of_what_is_derived(T):
    """One each, in every call: documents of the tokens, and decay factors of all pairs of an exchange, both ways."""
    launches = record_derived(T=T, documents=5)
    assert [launch.what for launch in launches] == ["documents_kernel"] * 3 + ["decay_kernel"] * 3
    for launch in launches:
        assert len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31
    for launch, rows in zip(launches, (1, 2, 1), strict=False):
        assert launch.grid[0] * launch.arguments["BLOCK"] >= rows * T
