"""Softmax attention over the GPUs of a context-parallel group, ours beside TransformerEngine's:

    torchrun --standalone --nproc-per-node 2 -m tests.benchmarks.softmax_parallel

Every rank holds ``tokens`` tokens of one causal sequence, chunks r and 2P-1-r of its 2P, in bf16. "lightning_megatron"
is the core attention of softmax layers without TransformerEngine; "te, p2p" its ring over cuDNN blocks, "te, a2a" its
all-to-all of heads, "te, all_gather" keys gathered before attention; "one GPU" scaled_dot_product_attention of as many
tokens alone. Times are medians of the slowest rank, of the GPU alone unless a row says with_host; backward is what both
take beyond forward. Outputs and gradients of all are compared with ours. Writes <out>/softmax_parallel.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from examples.provenance import output, when
from lightning_megatron.compat import importable
from lightning_megatron.softmax.core import SDPACoreAttention

from .context_parallel import CALLS, median_ms
from .report import write
from .training_models import parse_length, show_length

TE = ("p2p", "a2a", "all_gather")
CLOSE = 2e-2  # of norms, in bf16


def ours(heads: int, groups: int, dim: int, group: dist.ProcessGroup | None) -> Callable:
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * dim, num_attention_heads=heads, num_query_groups=groups, kv_channels=dim,
        attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16,
        context_parallel_size=1 if group is None else group.size(),
    )  # fmt: skip
    core = SDPACoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(cp=group))
    return lambda q, k, v: core(q, k, v, None)


def transformer_engine(heads: int, groups: int, dim: int, group: dist.ProcessGroup, comm: str) -> Callable:
    from transformer_engine.pytorch import DotProductAttention

    core = DotProductAttention(
        heads, dim, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal",
        cp_group=group, cp_global_ranks=list(range(group.size())), cp_stream=torch.cuda.Stream(), cp_comm_type=comm,
    )  # fmt: skip
    return core


def both(attend: Callable, q, k, v, do) -> tuple[torch.Tensor, ...]:
    o = attend(q, k, v)
    return (o.detach(), *torch.autograd.grad(o, (q, k, v), do))


def with_host_ms(calls: list[Callable]) -> float:
    """As ``median_ms``, but of host and GPU, for calls that wait for the GPU or queue more than it takes."""
    times = []
    for call in itertools.islice(itertools.cycle(calls), CALLS):
        torch.cuda.synchronize()
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    found = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def measured(attend: Callable, inputs: list[tuple[torch.Tensor, ...]]) -> dict[str, float | bool]:
    calls = [partial(attend, *x[:3]) for x in inputs], [partial(both, attend, *x) for x in inputs]
    forward, total = map(median_ms, calls)
    if with_host := math.isnan(forward + total):
        forward, total = map(with_host_ms, calls)
    return dict(forward_ms=forward, backward_ms=total - forward, with_host=with_host)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("tests.benchmarks.softmax_parallel", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--tokens", nargs="+", type=parse_length, default=[2**n * 1024 for n in range(3, 8)], help="of a GPU"
    )
    parser.add_argument("--heads", nargs="+", default=["16", "32/8"], metavar="HEADS[/GROUPS]")
    parser.add_argument("--dim", type=int, default=128, help="of a head")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    group, first, rows = dist.group.WORLD, dist.get_rank() == 0, []
    torch.manual_seed(dist.get_rank())
    te = TE if importable("transformer_engine.pytorch") else ()
    about = {"card": torch.cuda.get_device_name(), "gpus": group.size(), "torch": torch.__version__, **when()}
    about["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if te:
        about["transformer-engine"] = importlib.metadata.version("transformer-engine")
    if first:
        print(f"{'heads':>8s}{'tokens':>8s}  {'scheme':24s}{'fwd ms':>9s}{'bwd ms':>9s}{'of ours':>9s}  differs by")
    for word in options.heads:
        heads, groups = (int(x) for x in (word.split("/") * 2)[:2])
        schemes = {"lightning_megatron": ours(heads, groups, options.dim, group)}
        schemes |= {f"te, {x}": transformer_engine(heads, groups, options.dim, group, x) for x in te}
        for tokens in options.tokens:
            shapes = [(tokens, 1, n, options.dim) for n in (heads, groups, groups)]
            shapes.append((tokens, 1, heads * options.dim))
            inputs = [
                tuple(torch.randn(x, device="cuda", dtype=torch.bfloat16).requires_grad_(len(x) == 4) for x in shapes)
                for _ in range(2)
            ]
            want, took = None, 0.0
            for scheme, attend in schemes.items():
                got = both(attend, *inputs[0])
                want = want or got
                errors = [
                    float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, want, strict=True)
                ]
                worst = torch.tensor(max(errors), device="cuda")
                dist.all_reduce(worst, op=dist.ReduceOp.MAX)
                assert worst < CLOSE, f"{scheme} computes something else: o, dq, dk, dv differ by {errors}"
                row = dict(heads=heads, groups=groups, dim=options.dim, tokens=tokens, scheme=scheme)
                rows.append(row | measured(attend, inputs) | dict(difference=worst.item()))
                total = rows[-1]["forward_ms"] + rows[-1]["backward_ms"]
                took = took or total
                if first:
                    print(
                        f"{word:>8s}{show_length(tokens):>8s}  {scheme:24s}{rows[-1]['forward_ms']:9.3f}"
                        f"{rows[-1]['backward_ms']:9.3f}{total / took:9.3f}  {worst.item():.1e}",
                        flush=True,
                    )
            alone = measured(ours(heads, groups, options.dim, None), inputs)
            rows.append(dict(heads=heads, groups=groups, dim=options.dim, tokens=tokens, scheme="one GPU") | alone)
            if first:
                print(f"{word:>8s}{show_length(tokens):>8s}  {'one GPU':24s}{alone['forward_ms']:9.3f}"
                      f"{alone['backward_ms']:9.3f}", flush=True)  # fmt: skip
            del inputs, want, got
            if first:
                write(options.out / "softmax_parallel.json", about, "softmax_parallel", rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
