"""Lightning attention over ranks: outputs, states and every gradient on every rank, against one rank that has all tokens."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from lightning_megatron import ops, parallel
from tests.launch import spawn
from tests.ops.cases import pick, randn

DECAYS = (0.0, -0.003, -0.1, -0.7, -3.0)
EXCHANGES = ("all-gather", "ring", "pipelined")
RANKS = {"contiguous": (2, 3, 4), "zigzag": (2, 3, 4, 8), "zigzag-documents": (2, 4)}
CASES = [
    (world, layout, packed)
    for layout, worlds in RANKS.items()
    for world in worlds
    for packed in ([True] if layout == "zigzag-documents" else [False, True])
]
TOLERANCE = 1e-12


def draw_documents(rng: torch.Generator, tokens: int) -> torch.Tensor:
    """1 to 20 documents, some empty, some of one token."""
    inner = torch.randint(0, tokens + 1, (int(torch.randint(0, 20, (), generator=rng)),), generator=rng)
    if inner.numel() > 3:
        inner[0], inner[1] = inner[2], (inner[3] + 1).clamp(max=tokens)
    return torch.cat((torch.tensor([0]), inner.sort().values, torch.tensor([tokens])))


def tokens_of(rank: int, world: int, layout: str, lengths: list[int], cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Which tokens of the whole sequence a rank holds, written down from Megatron's and TransformerEngine's definitions."""
    everything = torch.arange(sum(lengths))
    if layout == "contiguous":
        return everything.split(lengths)[rank]
    if layout == "zigzag":
        chunks = everything.chunk(2 * world)
        return torch.cat((chunks[rank], chunks[2 * world - 1 - rank]))
    found = []
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        chunks = everything[a:b].view(2 * world, -1)
        found += [chunks[rank], chunks[2 * world - 1 - rank]]
    return torch.cat(found)


def results(attn, q, k, v, state, do, dfinal, used: tuple[bool, bool]) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of <o, do> and <final_state, dfinal> as far as they are used."""
    leaves = {"q": q, "k": k, "v": v} | ({} if state is None else {"initial_state": state})
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    o, final = attn(*(leaves[n] for n in "qkv"), initial_state=leaves.get("initial_state"))
    outputs = [(o, do)] if used[0] else []
    outputs += [(final, dfinal)] if used[1] else []
    grads = torch.autograd.grad([y for y, _ in outputs], list(leaves.values()), [g for _, g in outputs], allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True)]
    found = {"o": o.detach()} | ({} if final is None else {"final_state": final.detach()})
    return found | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def check(rank: int, world: int, layout: str, exchange: str, seed: int, packed: bool, backend: str, dtype) -> dict[str, float]:
    """One random case; the largest error of each quantity on this rank."""
    rng = torch.Generator().manual_seed(seed)
    integer = lambda low, high: int(torch.randint(low, high + 1, (), generator=rng))
    H, Hkv = pick(rng, [(3, 3), (4, 2), (5, 1)])
    K, V, B = pick(rng, [16, 32]), pick(rng, [16, 32]), 1 if packed else integer(1, 2)
    cu_seqlens = None
    if layout == "contiguous":
        lengths = [integer(1, 60) for _ in range(world)]
    elif layout == "zigzag":
        lengths = [2 * integer(1, 40)] * world
    else:
        cu_seqlens = torch.tensor([0] + [2 * world * integer(0, 8) for _ in range(integer(1, 6))]).cumsum(0)
        lengths = [int(cu_seqlens[-1]) // world] * world
    T = sum(lengths)
    if packed and cu_seqlens is None:
        cu_seqlens = draw_documents(rng, T)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(pick(rng, [torch.int32, torch.int64]))
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    log_decay = torch.tensor([pick(rng, DECAYS) for _ in range(H)], dtype=torch.float64)
    q, k, v, do = (randn(rng, B, T, h, d) for h, d in ((H, K), (Hkv, K), (Hkv, V), (H, V)))
    state, dfinal = randn(rng, N, H, K, V), randn(rng, N, H, K, V)
    with_state, used = pick(rng, [True, False]), pick(rng, [(True, True), (True, False), (False, True)])
    state = state if with_state else None
    common = dict(scale=pick(rng, [None, 1.0]), cu_seqlens=cu_seqlens, output_final_state=used[1])
    said = f"{seed=} {layout=} {exchange=} {lengths=} {B=} {H=} {Hkv=} {K=} {V=} cu_seqlens={cu_seqlens} {log_decay=} {used=}"

    whole = functools.partial(ops.lightning_attn, log_decay=log_decay, backend="torch", **common)
    want = results(whole, q, k, v, state, do, dfinal, used)
    mine = tokens_of(rank, world, layout, lengths, cu_seqlens)
    want |= {name: want[name][:, mine] for name in ("o", "dq", "dk", "dv")}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    local = functools.partial(
        parallel.lightning_attn, log_decay=log_decay.to(wide), group=dist.group.WORLD, layout=layout, exchange=exchange,
        backend=backend, **common,
    )  # fmt: skip
    tokens = (x[:, mine].to(dtype) for x in (q, k, v))
    got = results(local, *tokens, state if state is None else state.to(wide), do[:, mine].to(dtype), dfinal.to(wide), used)
    assert got.keys() == want.keys(), said
    errors = {}
    for name, x in want.items():
        assert got[name].shape == x.shape, f"{name}: {said}"
        scale = float(x.norm()) or 1.0
        errors[name] = float((got[name].double() - x).norm()) / scale
    limit = TOLERANCE if dtype == torch.float64 else 1e-5
    assert all(e <= limit for e in errors.values()), f"{errors} {said}"
    return errors


def check_many(rank: int, world: int, layout: str, exchange: str, seeds: list[int], packed, backend="torch", dtype=torch.float64):
    return [check(rank, world, layout, exchange, seed, packed, backend, dtype) for seed in seeds]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world, layout, packed", CASES)
def test_equals_one_rank(rng, world, layout, packed, exchange):
    seeds = torch.randint(2**31, (12,), generator=rng).tolist()
    ranks = spawn(check_many, world, layout, exchange, seeds, packed)
    assert len(ranks) == world and all(len(errors) == len(seeds) for errors in ranks)
