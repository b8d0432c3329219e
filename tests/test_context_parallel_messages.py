"""What context-parallel ranks send each other for lightning attention."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_megatron import parallel
from lightning_megatron.ops.triton import attention as triton_backend
from lightning_megatron.parallel import direct
from lightning_megatron.parallel.exchange import _sent, destination_for, needed_pairs
from lightning_megatron.parallel.factors import decay_factors
from lightning_megatron.parallel.plan import ParallelPlan
from tests.helpers.context_parallel import EXCHANGES
from tests.helpers.sent import Sent
from tests.launch import spawn

# ---- what is sent ----------------------------------------------------------------------------------------------------


class Ranks:
    """What is asked of a process group without sending."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = (lambda: size), (lambda: rank)


def count_sent(rank: int, world: int, layout: str, exchange: str, tokens: int) -> tuple[int, int]:
    """Elements that one rank sends forward, and backward."""
    H, K, V = 3, 16, 32
    q, k, v = (torch.randn(1, tokens, H, d, dtype=torch.bfloat16, requires_grad=True) for d in (K, K, V))
    with pytest.MonkeyPatch.context() as patch:
        sent = Sent(patch, world)
        o, _ = parallel.lightning_attn(
            q, k, v, torch.full((H,), -0.1), group=dist.group.WORLD, layout=layout, exchange=exchange
        )
        forward = sent.elements
        o.sum().backward()
        assert sent.dtypes <= {torch.float32}, "states travel in fp32"
        return forward, sent.elements - forward


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_what_is_sent_does_not_depend_on_the_length(layout, exchange):
    """(P-1) H K V a chunk and rank for the gather, H K V for a ring, where the last chunk sends nothing
    and the turn of a zigzag stays on its rank."""
    P, state = 4, 3 * 16 * 32
    ranks = [spawn(count_sent, P, layout, exchange, tokens) for tokens in (8, 512)]
    assert ranks[0] == ranks[1]
    found = ranks[0]
    chunks = 1 if layout == "contiguous" else 2
    if exchange == "all-gather":
        want = [(chunks * (P - 1) * state,) * 2] * P
    elif exchange == "scan":  # to the chunks 1, and then 1, 2, 4 behind, as far as there are any on other ranks
        rank = [0, 1, 2, 3] if layout == "contiguous" else [0, 1, 2, 3, 3, 2, 1, 0]
        N = len(rank)
        steps = [d for d in (1, 1, 2, 4) if d == 1 or d < N]
        sends = lambda c, d: 0 <= c + d < N and rank[c + d] != rank[c]
        want = [
            tuple(state * sum(sends(c, s * d) for d in steps for c in range(N) if rank[c] == r) for s in (1, -1))
            for r in range(P)
        ]
    elif layout == "contiguous":
        want = [(state if r < P - 1 else 0, state if r > 0 else 0) for r in range(P)]
    else:  # rank 0 begins and ends, rank P-1 turns
        want = [(state if r in (0, P - 1) else 2 * state,) * 2 for r in range(P)]
    assert found == want


@pytest.mark.parametrize("reverse", [False, True])
def test_direct_sends_a_state_for_each_pair_of_ranks(monkeypatch, reverse):
    """Of two chunks one state, whatever the length; two where a state enters or leaves the sequence."""
    sizes = []
    monkeypatch.setattr(
        direct, "buffers", lambda *where: sizes.append(where[3]) or direct.SymmetricBuffers(torch.zeros(3), 1, None)
    )
    group = Ranks(3, 1)
    log_decay, q, v = torch.tensor([-0.5, -0.1]), torch.empty(2, 8, 2, 16), torch.empty(2, 8, 2, 32)
    for layout, states, sent in (
        ("contiguous", False, 1),
        ("contiguous", True, 1),
        ("zigzag", False, 1),
        ("zigzag", True, 2),
    ):
        plan = ParallelPlan(group, layout, "direct", (8, 8, 8), 1.0, states, states, triton_backend)
        factors = decay_factors(plan, needed_pairs, log_decay, None)
        destination = destination_for(plan, factors, q, v, reverse)
        count = factors("weights", reverse).shape[0]
        assert destination.shape == (sent, 2, 2, 16, 32)
        state = 2 * 2 * 16 * 32  # twice in the buffer for each rank; tiles of 256 have a word for each rank and one
        assert sizes.pop() == sent * (2 * 3 * state + (3 + 1) * state // 256)
        # one weight for each state that is sent, at each place where one enters (or the sequence ends)
        assert count == (1 if layout == "contiguous" else 2) * 3 * sent + (3 * sent if states else 0)
        assert (destination.between is not None) == (layout == "zigzag" and not states)
        if destination.between is not None:
            # chunks are 0 5, 1 4, 2 3: what the first of them add before rank 1, both after it
            assert _sent(plan, reverse) == ((5, 4, 2) if reverse else (0, 1, 3))
            # chunks 1 and 4 of 6: three chunks of 4 tokens from the end of one to that of the other
            assert torch.allclose(destination.between, (12 * log_decay).exp()[None])
