"""What is not a number in one packed document stays there, whichever ranks hold the others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_megatron import parallel
from tests.launch import spawn
from tests.ops.cases import randn

BOUNDS = {  # by layout; the second document, where the NaN is, crosses chunks and ranks
    "contiguous": [0, 10, 30, 42, 48],
    "zigzag": [0, 10, 30, 42, 48],
    "zigzag-documents": [0, 8, 24, 40, 48],
}


def places_of(rank: int, world: int, layout: str) -> torch.Tensor:
    bounds = torch.tensor(BOUNDS[layout])
    return parallel.token_positions(48 // world, group=dist.group.WORLD, layout=layout, cu_seqlens=bounds)


def compare(rank: int, world: int, layout: str, exchange: str, bad: float, states: bool) -> list[str]:
    """Names of what differs from the run without ``bad``, outside of the document that has it."""
    mine = places_of(rank, world, layout)
    bounds = torch.tensor(BOUNDS[layout])
    document = torch.searchsorted(bounds, mine, right=True) - 1
    rng = torch.Generator().manual_seed(0)
    whole = [randn(rng, 1, 48, 2, 16).float() for _ in range(4)]
    initial = randn(rng, 4, 2, 16, 16).float() if states else None
    log_decay = torch.tensor([0.0, -0.05])

    def run(value: float | None) -> dict[str, torch.Tensor]:
        q, k, v, do = (x.clone() for x in whole)
        if value is not None:  # among the first tokens of the document: it goes through all of its states
            v[0, bounds[1] + 1, 0, 0] = do[0, bounds[1] + 1, 1, 3] = value
        q, k, v, do = (x[:, mine] for x in (q, k, v, do))
        leaves = [x.requires_grad_() for x in (q, k, v)] + ([initial.clone().requires_grad_()] if states else [])
        o, final = parallel.lightning_attn(
            *leaves[:3], log_decay, group=dist.group.WORLD, layout=layout, exchange=exchange, cu_seqlens=bounds,
            backend="torch", initial_state=leaves[3] if states else None, output_final_state=states,
        )  # fmt: skip
        grads = torch.autograd.grad((o * do).sum() + (final.sum() if states else 0.0), leaves)
        found = dict(zip(("o", "dq", "dk", "dv", "dinitial"), (o.detach(), *grads), strict=False))
        return found | ({"final": final.detach()} if states else {})

    clean, got = run(None), run(bad)
    rest, different = {"o": document != 1, "dq": document != 1, "dk": document != 1, "dv": document != 1}, []
    others = torch.arange(4) != 1
    for name, x in got.items():
        a, b = ((y[:, rest[name]] if name in rest else y[others]) for y in (x, clean[name]))
        if not torch.equal(a, b):
            different.append(name)
    inside = got["o"][:, document == 1]
    assert not inside.numel() or not torch.isfinite(inside).all(), "the document itself must show it"
    return different


def compare_many(rank: int, world: int, layout: str) -> dict[tuple, list[str]]:
    """Differences by exchange, bad value, and whether documents have states: all cases in one process."""
    exchanges, states = ("all-gather", "ring", "pipelined", "scan"), (False, True)
    if layout == "zigzag-documents":
        states = (False,)
    cases = [(e, bad, s) for e in exchanges for bad in (float("nan"), float("inf")) for s in states]
    return {case: different for case in cases if (different := compare(rank, world, layout, *case))}


@pytest.mark.parametrize(
    "world, layout", [(2, "contiguous"), (2, "zigzag"), (2, "zigzag-documents"), (3, "zigzag"), (4, "contiguous")]
)
def test_stays_in_its_document(world, layout):
    assert spawn(compare_many, world, layout) == [{}] * world
