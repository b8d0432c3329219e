"""What it costs to pass states between context-parallel ranks: ``python -m tests.benchmarks.exchange``.

Runs on CPUs (gloo, one process a rank), where every message goes through the kernel: it shows how the schemes grow with
the ranks, not what a GPU needs. Prints a table of milliseconds per layer, forward and backward exchange each once, and
writes <out>/exchange.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from examples.provenance import when
from lightning_megatron.ops import torch_backend
from lightning_megatron.parallel.exchange import exchange, needed_pairs
from lightning_megatron.parallel.factors import decay_factors
from lightning_megatron.parallel.plan import ParallelPlan
from tests.launch import spawn

from .report import write

SCHEMES = ("all-gather", "ring", "pipelined", "scan")
LAYOUTS = ("contiguous", "zigzag")
HEADS, DIM = 8, 128  # of the 0.4B model
REPEATS, WARMUP = 20, 3


def times(rank: int, world: int, layout: str) -> dict[str, list[float]]:
    """Seconds of each repetition on this rank, by scheme."""
    torch.set_num_threads(1)
    found = {}
    for scheme in SCHEMES:
        plan = ParallelPlan(dist.group.WORLD, layout, scheme, (64,) * world, 1.0, False, False, torch_backend)
        factors = decay_factors(plan, needed_pairs, torch.full((HEADS,), -0.01), None)
        own = torch.randn(len(plan.mine), 1, HEADS, DIM, DIM)
        seconds = []
        for _ in range(WARMUP + REPEATS):
            dist.barrier()
            start = time.perf_counter()
            for reverse in (False, True):
                exchange(plan, own, None, factors, None, False, reverse)()
            seconds.append(time.perf_counter() - start)
        found[scheme] = seconds[WARMUP:]
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tests.benchmarks.exchange", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    rows = []
    print(f"ms per layer, {HEADS} heads of {DIM} x {DIM} fp32, {os.cpu_count()} cores")
    print(f"{'layout':12s}{'ranks':>6s}" + "".join(f"{scheme:>12s}" for scheme in SCHEMES))
    for layout in LAYOUTS:
        for world in args.ranks:
            ranks = spawn(times, world, layout)
            row = {"layout": layout, "ranks": world}
            for scheme in SCHEMES:  # the exchange is over when the last rank is done
                slowest = map(max, zip(*(found[scheme] for found in ranks), strict=True))
                row[scheme] = statistics.median(slowest) * 1e3
            rows.append(row)
            print(f"{layout:12s}{world:6d}" + "".join(f"{row[scheme]:12.2f}" for scheme in SCHEMES), flush=True)
    write(args.out / "exchange.json", {"cores": os.cpu_count(), **when()}, "exchange", rows)


if __name__ == "__main__":
    main()
