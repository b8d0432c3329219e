"""What an eager call costs on the host, beside ``torch.add`` in the same process: ``python -m tests.benchmarks.host``.

Microseconds of wall time of the calling thread, until a call has queued its kernels; a backward's engine thread
included. Rounds of calls that the GPU's queue has room for, one wait between rounds, medians of the rounds. ``nothing``
is an autograd.Function of three tensors that computes nothing: what torch's own part costs. ``--mixer`` adds a
lightning layer of Megatron, projections included. Prints a table and writes <out>/host.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_megatron.ops import lightning_attn

from .measure import DEVICE, Shape, random_inputs
from .peers import BTHD
from .report import environment, write

SHAPES = [Shape(1, 2048, 8), Shape(1, 8192, 32)]
CALLS, ROUNDS, ADDS = 30, 15, 100  # in a round: a layer's call has two dozen launches, and the queue holds a thousand
RESULTS = Path(__file__).parent / "results"


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, do):
        return do, do, do


def times(forward: Callable[[], torch.Tensor], leaves: tuple, do: torch.Tensor, wait: Callable) -> dict[str, float]:
    """Microseconds of ``torch.add``, of a forward and of its backward."""
    one, clock, rounds = torch.ones(4, device=do.device), time.perf_counter, []
    for _ in range(ROUNDS + 3):  # the first ones compile
        wait()
        begin = clock()
        for _ in range(ADDS):
            torch.add(one, one)
        adds, forwards, backwards = clock() - begin, 0.0, 0.0
        for _ in range(CALLS):
            begin = clock()
            o = forward()
            called = clock()
            torch.autograd.grad(o, leaves, do)
            forwards, backwards = forwards + called - begin, backwards + clock() - called
        rounds.append([1e6 * x for x in (adds / ADDS, forwards / CALLS, backwards / CALLS)])
    add, forward_us, backward_us = (statistics.median(x) for x in zip(*rounds[3:], strict=True))
    return dict(
        add_us=add, forward_us=forward_us, backward_us=backward_us,
        forward_adds=forward_us / add, backward_adds=backward_us / add,
    )  # fmt: skip


def operator(shape: Shape, wait: Callable) -> list[dict]:
    q, k, v, do = random_inputs(shape, BTHD, grad=True)
    log_decay = torch.full((shape.H,), -0.01, device=q.device)
    rows = {"lightning_attn": lambda: lightning_attn(q, k, v, log_decay)[0], "nothing": lambda: Nothing.apply(q, k, v)}
    return [dict(what=what, **shape.columns(), **times(call, (q, k, v), do, wait)) for what, call in rows.items()]


def mixer(rank: int, world: int, shape: Shape) -> dict:
    """A layer of Megatron without parallelism, in a process of ``spawn``."""
    from tests.layers import Variant, build_mixer, start

    start()
    sizes = dict(hidden_size=128 * shape.H, num_attention_heads=shape.H, kv_channels=shape.K)
    layer = build_mixer(Variant(dict(decay="tnl", norm="head", gate="sigmoid")), **sizes, params_dtype=torch.bfloat16)
    layer = layer.to(DEVICE, torch.bfloat16)
    hidden, do = (torch.randn(shape.T, shape.B, 128 * shape.H, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    leaves = hidden.requires_grad_(), *layer.parameters()
    found = times(lambda: layer(hidden)[0], leaves, do, torch.cuda.synchronize)
    return dict(what="Megatron layer", **shape.columns(), **found)


def line(row: dict) -> str:
    return (
        f"{row['what']:16s} {row['B']},{row['T']},{row['H']}".ljust(30)
        + f"add {row['add_us']:6.2f} us   forward {row['forward_us']:7.1f} us = {row['forward_adds']:5.1f} adds   "
        + f"backward {row['backward_us']:7.1f} us = {row['backward_adds']:5.1f} adds"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tests.benchmarks.host", description=__doc__)
    parser.add_argument("--mixer", action="store_true", help="a layer of Megatron, too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of host.json (default: %(default)s)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch finds none")
    rows = []
    for shape in SHAPES:
        rows += operator(shape, torch.cuda.synchronize)
        if args.mixer:
            from tests.launch import spawn

            rows += spawn(mixer, 1, shape, gpus=True)
    print("\n".join(map(line, rows)))
    about = environment([], 0.0, command=" ".join(["python -m tests.benchmarks.host", *(argv or sys.argv[1:])]))
    write(args.out / "host.json", about, "host", rows)


if __name__ == "__main__":
    main()
