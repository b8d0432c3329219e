"""The operator over the GPUs of a context-parallel group, beside one GPU and beside an all-to-all of q, k, v and o:

    torchrun --standalone --nproc-per-node 2 -m tests.benchmarks.context_parallel

Every rank holds ``tokens`` tokens. "one GPU" is the operator alone on as many, "exposed" what a scheme takes longer
than that forward and backward. "states alone" is the bare all-gather of the states, once in each direction.
"all-to-all" moves q, k and v in one message so that every rank has all tokens of H / P heads, and o back, as
head-parallel layers do (Ulysses). Times are medians of the slowest rank, of the GPU alone. With --documents N every
rank's tokens are packed documents, N a GPU, of random lengths: then without the all-to-all. --timeline TOKENS also
prints what the first GPU does, stream by stream, in one forward and backward of each exchange. Writes
<out>/context_parallel.json.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from examples.provenance import output, when
from lightning_megatron import decay, ops, parallel

from . import measure
from .report import write
from .training_models import parse_length, show_length

EXCHANGES = ("direct", "all-gather", "ring", "pipelined", "scan")
LAYOUTS = ("contiguous", "zigzag")
CALLS, SLEEP_MS = 10, 250.0  # the ring and all-to-all take the host milliseconds


class AllToAll(torch.autograd.Function):
    """``[n, 1, L, H, D]`` of this rank's tokens to ``[n, 1, P L, H / P, D]`` of its heads, or back."""

    @staticmethod
    def forward(ctx, x, group, to_heads):
        ctx.group, ctx.to_heads = group, to_heads
        return AllToAll.move(x, group, to_heads)

    @staticmethod
    def backward(ctx, dx):
        return AllToAll.move(dx, ctx.group, not ctx.to_heads), None, None

    @staticmethod
    def move(x, group, to_heads):
        P, (n, _, tokens, heads, D) = group.size(), x.shape
        if to_heads:
            sent = x.view(n, tokens, P, heads // P, D).permute(2, 0, 1, 3, 4).contiguous()
        else:
            sent = x.view(n, P, tokens // P, heads, D).transpose(0, 1).contiguous()
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=group)
        if to_heads:
            return got.transpose(0, 1).reshape(n, 1, P * tokens, heads // P, D)
        return got.permute(1, 2, 0, 3, 4).reshape(n, 1, tokens // P, P * heads, D)


def all_to_all(q, k, v, log_decay, *, group):
    mine = log_decay.chunk(group.size())[group.rank()]
    q, k, v = AllToAll.apply(torch.stack((q, k, v)), group, True)
    o, _ = ops.lightning_attn(q, k, v, mine)
    return AllToAll.apply(o[None], group, False)[0], None


def packed(documents: int, tokens: int) -> torch.Tensor | None:
    """Bounds of so many documents, the same on all ranks."""
    if not documents:
        return None
    cuts = sorted(random.Random(0).sample(range(1, tokens), documents - 1))
    return measure.bounds([b - a for a, b in itertools.pairwise((0, *cuts, tokens))])


def median_ms(calls: list[Callable]) -> float:
    """Of the slowest rank. All ranks make as many calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    dist.barrier()
    times, late = measure._batch(itertools.cycle(calls), CALLS, SLEEP_MS)
    found = torch.tensor([statistics.median(times), float(late)], device="cuda")
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found[0].item() if found[1] == 0 else math.nan  # the host was late


def measured(attn: Callable, inputs: list[tuple[torch.Tensor, ...]]) -> tuple[float, float]:
    """(forward, backward) in ms."""
    forward = median_ms([partial(attn, q, k, v) for q, k, v, _ in inputs])
    grads = [partial(torch.autograd.grad, attn(q, k, v)[0], (q, k, v), do, retain_graph=True) for q, k, v, do in inputs]
    return forward, median_ms(grads)


def timeline(attn: Callable, q, k, v, do) -> tuple[list[dict], list[torch.Tensor]]:
    """Kernels of one forward and backward: name, stream, start and duration in us, by start. And the results."""

    def step() -> list[torch.Tensor]:
        o = attn(q, k, v)[0]
        return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]

    for _ in range(3):
        results = step()
    torch.cuda.synchronize()
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):  # the host runs ahead
            torch.cuda._sleep(int(5 * measure.CYCLES_PER_MS))
            step()
        torch.cuda.synchronize()
    events = [x for x in profiler.profiler.kineto_results.events() if x.device_type() == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda x: x.start_ns())
    last = max(i for i, x in enumerate(events) if "spin" in x.name() or "sleep" in x.name())
    begin = events[last].start_ns() + events[last].duration_ns()
    kernels = [x for x in events[last + 1 :] if x.duration_ns() > 0]
    return [
        dict(
            kernel=x.name()[:60],
            stream=x.device_resource_id(),
            start_us=(x.start_ns() - begin) / 1e3,
            us=x.duration_ns() / 1e3,
        )
        for x in kernels
    ], results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("tests.benchmarks.context_parallel", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--tokens", nargs="+", type=parse_length, default=[2**n * 1024 for n in range(1, 8)], help="of a GPU"
    )
    parser.add_argument("--heads", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="of a GPU; default: one sequence")
    parser.add_argument("--timeline", nargs="*", type=parse_length, default=[], metavar="TOKENS")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    group, first = dist.group.WORLD, dist.get_rank() == 0
    torch.manual_seed(dist.get_rank())
    rows = []
    if first:
        print(
            f"{'H':>4s}{'tokens':>8s}  {'scheme':24s}{'fwd ms':>9s}{'bwd ms':>9s}"
            f"{'exposed us':>12s}{'bwd':>8s}{'of one GPU':>12s}"
        )

    def report(
        heads: int, tokens: int, scheme: str, times: tuple[float, float], one: tuple[float, float] | None
    ) -> None:
        row = dict(heads=heads, tokens=tokens, scheme=scheme, forward_ms=times[0], backward_ms=times[1])
        text = f"{heads:4d}{show_length(tokens):>8s}  {scheme:24s}{times[0]:9.4f}{times[1]:9.4f}"
        if one is not None:
            exposed = [(a - b) * 1e3 for a, b in zip(times, one, strict=True)]
            row |= dict(forward_exposed_us=exposed[0], backward_exposed_us=exposed[1], ratio=sum(times) / sum(one))
            text += f"{exposed[0]:12.1f}{exposed[1]:8.1f}{row['ratio']:12.3f}"
        rows.append(
            {key: None if value != value else value for key, value in row.items()}
        )  # not a number: the host was late
        if first:
            print(text, flush=True)

    for heads in options.heads:
        log_decay = decay.log_decay("alibi", heads, 0, 1).cuda()
        for layout in LAYOUTS:
            states = torch.randn(LAYOUTS.index(layout) + 1, heads, 128, 128, device="cuda")
            gathered = states.new_empty(group.size() * states.shape[0], *states.shape[1:])
            alone = median_ms([partial(dist.all_gather_into_tensor, gathered, states, group=group)] * CALLS)
            report(heads, 0, f"states alone, {layout}", (alone, alone), None)
        for tokens in options.tokens:
            shape = measure.Shape(1, tokens, heads)
            copies = measure.copies_beyond_cache(shape.input_bytes() + shape.forward_bytes())
            inputs = [measure.random_inputs(shape, "BTHD", True) for _ in range(min(copies, CALLS))]
            alone, bounds = (packed(options.documents * n, tokens * n) for n in (1, group.size()))
            one = measured(partial(ops.lightning_attn, log_decay=log_decay, cu_seqlens=alone), inputs)
            report(heads, tokens, "one GPU", one, None)
            for layout, exchange in itertools.product(LAYOUTS, EXCHANGES):
                how = dict(log_decay=log_decay, cu_seqlens=bounds, group=group, layout=layout, exchange=exchange)
                attn = partial(parallel.lightning_attn, **how)
                report(heads, tokens, f"{exchange}, {layout}", measured(attn, inputs), one)
            if bounds is None:
                moved = measured(partial(all_to_all, log_decay=log_decay, group=group), inputs)
                report(heads, tokens, "all-to-all, contiguous", moved, one)
            del inputs
    lines = []
    for heads, tokens in itertools.product(options.heads, options.timeline):
        log_decay = decay.log_decay("alibi", heads, 0, 1).cuda()
        inputs, before = measure.random_inputs(measure.Shape(1, tokens, heads), "BTHD", True), None
        for scheme in ("direct", "all-gather"):
            attn = partial(parallel.lightning_attn, log_decay=log_decay, group=group, exchange=scheme)
            found, results = timeline(attn, *inputs)
            for x, y in zip(results, before or results, strict=True):
                assert (x.float() - y.float()).norm() <= 1e-3 * y.float().norm(), "exchanges differ"
            before = results
            lines.append(dict(heads=heads, tokens=tokens, scheme=f"{scheme}, zigzag", kernels=found))
            if first:
                print(
                    f"\n{heads} heads, {show_length(tokens)} tokens, {scheme}, zigzag\n"
                    "   start us      us  stream  kernel"
                )
                for x in found:
                    print(f"{x['start_us']:11.1f}{x['us']:8.1f}{x['stream']:8d}  {x['kernel']}")
    if first:
        about = {"card": torch.cuda.get_device_name(), "gpus": group.size(), "torch": torch.__version__, **when()}
        about["documents of a GPU"] = options.documents
        about["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        write(options.out / "context_parallel.json", about, "context_parallel", rows)
        if lines:
            write(options.out / "context_parallel_timeline.json", about, "context_parallel_timeline", lines)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
