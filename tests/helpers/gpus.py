"""Context parallelism in bf16 with NCCL: its errors beside those of one GPU, and whether it repeats its bits."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from lightning_megatron import ops, parallel
from tests.helpers.context_parallel import EXCHANGES, draw_documents, results, tokens_of
from tests.ops.cases import pick, randn

# Layout, packed documents, exchange, states that enter and leave.
LAYOUTS = [("contiguous", False), ("contiguous", True), ("zigzag", False), ("zigzag", True), ("zigzag-documents", True)]
CASES = [(*layout, exchange, True) for layout in LAYOUTS for exchange in (*EXCHANGES, "direct")]
CASES.remove(("zigzag-documents", True, "direct", True))
CASES += [
    (layout, True, exchange, False) for layout in ("contiguous", "zigzag") for exchange in ("all-gather", "direct")
]
MORE = 1.1  # the error of P ranks, in errors of one


def compare(
    group: dist.ProcessGroup, layout: str, packed: bool, exchange: str, states: bool, seed: int
) -> dict[str, tuple[float, float]]:
    """Errors against fp64 of every quantity on this rank: of context parallelism, and of one GPU with all tokens.

    Args:
        group: the context-parallel ranks; 2,048 tokens each.
        states: with those that enter and leave; packed documents have none in training.
    """
    rank, world = group.rank(), group.size()
    rng = torch.Generator().manual_seed(seed)
    heads, K, V, T = pick(rng, [(4, 4), (4, 2)]), 128, pick(rng, [64, 128]), 2048 * world
    bounds = None
    if layout == "zigzag-documents":
        bounds = torch.tensor([0, 4, 1000, 1000, 1400, 3200, T]) // (2 * world) * (2 * world)
    elif packed:
        bounds = draw_documents(rng, T)
    bounds = None if bounds is None else bounds.int().cuda()
    N = 1 if bounds is None else bounds.numel() - 1
    log_decay = torch.tensor([0.0, -0.004, -0.1, -0.7]).cuda()
    q, k, v, do = (randn(rng, 1, T, h, d) for h, d in zip((4, heads[1], heads[1], 4), (K, K, V, V), strict=True))
    q, k, v, do = (x.cuda().bfloat16() for x in (q, k, v, do))
    state, dfinal = (randn(rng, N, 4, K, V).cuda().float() for _ in range(2))
    common = dict(cu_seqlens=bounds, output_final_state=states)

    def run(attn, dtype, tokens):
        wide = torch.promote_types(dtype, torch.float32)
        inputs = (x[:, tokens].to(dtype) for x in (q, k, v))
        initial = state.to(wide) if states else None
        return results(attn, *inputs, initial, do[:, tokens].to(dtype), dfinal.to(wide), (True, states))

    everything, mine = slice(None), tokens_of(rank, world, layout, [T // world] * world, bounds).cuda()
    whole = functools.partial(ops.lightning_attn, **common)
    want = run(functools.partial(whole, log_decay=log_decay.double(), backend="torch"), torch.float64, everything)
    alone = run(functools.partial(whole, log_decay=log_decay), torch.bfloat16, everything)
    local = functools.partial(
        parallel.lightning_attn, log_decay=log_decay, group=group, layout=layout, exchange=exchange, **common
    )
    got = run(local, torch.bfloat16, mine)
    assert got.keys() == alone.keys() == want.keys()
    errors = {}
    for name, x in want.items():
        x, one = (y[:, mine] if name in ("o", "dq", "dk", "dv") else y for y in (x, alone[name]))
        errors[name] = tuple(float((y.double() - x).norm() / x.norm()) for y in (got[name], one))
    return errors


def same(group: dist.ProcessGroup, exchange: str) -> bool:
    """Whether three passes over the same tokens, with others in between and the last recomputed, have the same bits."""
    rng = torch.Generator("cuda").manual_seed(group.rank())
    draw = lambda: [torch.randn(1, 4096, 4, 128, generator=rng, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    first, other = draw(), draw()
    attn = functools.partial(
        parallel.lightning_attn, log_decay=torch.full((4,), -0.01).cuda(), group=group, exchange=exchange
    )
    run = lambda q, k, v, do: results(attn, q, k, v, None, do, None, (True, False))
    a, _, b = run(*first), run(*other), run(*first)
    leaves = [x.requires_grad_() for x in first[:3]]
    o = checkpoint(parallel.exchange_once(lambda *qkv: attn(*qkv)[0]), *leaves, use_reentrant=True)
    o.backward(first[3])
    c = {"o": o, **{f"d{name}": x.grad for name, x in zip("qkv", leaves, strict=True)}}
    return all(torch.equal(a[name], x[name]) for x in (b, c) for name in a)


def assert_as_exact_as_one(errors: dict[str, tuple[float, float]], case: tuple, rank: int) -> None:
    """Of all quantities of a case that ``compare`` found on a rank."""
    shown = {name: f"{error:.2e}, alone {alone:.2e}" for name, (error, alone) in errors.items()}
    print(rank, shown)
    assert len(shown) == (6 if case[-1] else 4)
    for name, (error, alone) in errors.items():
        assert 0 < error <= MORE * alone, f"{name}: {shown} {case=} {rank=}"
