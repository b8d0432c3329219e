"""Exchanges between the ranks: the local states of chunks become the states that enter them.

Two are here: ``direct``, where kernels write states into the memory of the other ranks' GPUs, and ``all-gather``
(LASP-2). Both give every rank the local states of all chunks, of which it adds up what it needs. Exchanges that pass
states on from rank to rank are in ring.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist

from ..ops import backend as backends
from ..ops.backend import Backend, Destination
from . import cost, direct, ring
from .factors import Factors, Pairs, left
from .group import state_of
from .plan import ParallelPlan

EXCHANGES = ("auto", "direct", "all-gather", "ring", "pipelined", "scan")

Exchanged = tuple[torch.Tensor, torch.Tensor | None]  # what enters this rank's chunks, and what leaves the last chunk


def choose(
    exchange: str, layout: str, group: dist.ProcessGroup, device: torch.device, backend: Backend, state_bytes: int
) -> str:
    """What "auto" is for these ranks, which ask together; whether "direct" is possible.

    Args:
        state_bytes: of the states of one chunk, by which the cheapest exchange is found (cost.py).
    """
    if exchange not in ("auto", "direct"):
        return exchange
    if layout == "zigzag-documents":
        why_not = (
            "documents that are cut one by one differ in number from batch to batch, and so would the memory for "
            "their states"
        )
    elif not backend.DIRECT:
        why_not = "it takes the triton backend"
    else:
        why_not = direct.why_not(group, device)
    if not why_not:
        return "direct"
    if exchange == "direct":
        raise ValueError(
            f"exchange='direct' needs GPUs that write into each other's memory, but {why_not}; use exchange='auto' or "
            "'all-gather'"
        )
    chunks = 1 if layout == "contiguous" else 2

    def find(captured: bool) -> str:
        return cost.cheapest(group.size(), direct.ranks_of_a_node(group), chunks, state_bytes)

    return state_of(group).constant(("auto", chunks, state_bytes), find)  # 80 us with 4096 ranks, for every layer


def needed_pairs(plan: ParallelPlan, reverse: bool) -> dict[str, Pairs]:
    """The pairs of bounds whose decay factors the exchange of a plan needs, by name.

    ``weights``: from the end of every chunk that is sent to this rank to the bounds where states enter its chunks, and
    to the end of the sequence where states are asked for. ``start``: from the begin of the sequence. ``between``: from
    the end of the first of this rank's chunks to that of the second. Reversed: from begins, to ends.
    """
    if plan.exchange not in ("direct", "all-gather"):
        return ring.needed_pairs(plan, reverse)
    bounds = plan.entrances(reverse) + ((0 if reverse else plan.count,) if plan.states else ())
    pairs = {"weights": tuple((b, c) if reverse else (c + 1, b) for b in bounds for c in _sent(plan, reverse))}
    if plan.states:
        pairs["start"] = tuple((b, plan.count) if reverse else (0, b) for b in bounds)
    if _sends_one_state(plan):
        a, b = plan.mine
        pairs["between"] = ((a, b) if reverse else (a + 1, b + 1),)
    return pairs


def _sends_one_state(plan: ParallelPlan) -> bool:
    """Whether a rank with two chunks sends one state to each rank: what leaves the sequence is made of all chunks."""
    return plan.exchange == "direct" and len(plan.mine) == 2 and not plan.states


def _sent(plan: ParallelPlan, reverse: bool) -> tuple[int, ...]:
    """The chunks at whose ends the states stand that this rank is sent, in the order of ranks."""
    if not _sends_one_state(plan):
        return plan.in_order
    rank = plan.group.rank()
    return tuple(plan.chunks_of(r)[reverse ^ (r > rank)] for r in range(plan.group.size()))


def destination_for(
    plan: ParallelPlan, factors: Factors, q: torch.Tensor, v: torch.Tensor, reverse: bool = False
) -> Destination | None:
    """Where the states of (k, v), reversed of (q, do), go as soon as they are computed.

    None where ``exchange`` sends them.
    """
    if plan.exchange != "direct":
        return None
    between = factors("between", reverse)[0] if _sends_one_state(plan) else None
    ranks, count = plan.group.size(), 1 if between is not None else len(plan.mine)
    shape = count, q.shape[0], q.shape[2], q.shape[3], v.shape[3]
    words = backends.direct(plan.backend).buffer_words(ranks, shape)
    buffers = direct.buffers(plan.group, q.device, shape, words)
    return Destination(buffers.addresses, plan.group.rank(), buffers.limit, shape, between)


def exchange(
    plan: ParallelPlan,
    local: torch.Tensor | None,
    destination: Destination | None,
    factors: Factors,
    start: torch.Tensor | None,
    need_end: bool,
    reverse: bool = False,
) -> Callable[[], Exchanged]:
    """Begin to turn local states into the states that enter this rank's chunks.

    Args:
        local: ``[chunks of this rank, R, H, K, V]``, or None if they have been sent to the ``destination``.
        start: ``[R, H, K, V]``, what enters the first chunk; None for zeros.
        need_end: whether to return what leaves the last chunk, on all ranks.
        reverse: states go from the last chunk to the first.

    Returns:
        A function that waits and returns the incoming states of this rank's chunks, ``[chunks of this rank, R, H, K,
        V]``, and what leaves the last chunk ``[R, H, K, V]``. On a GPU the exchange goes on beside what is launched
        before it is called.
    """
    if destination is not None:
        backend = backends.direct(plan.backend)
        return lambda: _add_up(
            plan, factors, lambda weights: backend.receive(destination, weights), start, need_end, reverse
        )
    assert local is not None
    local = local.contiguous()
    if plan.exchange == "all-gather":
        return _gather(plan, local, factors, start, need_end, reverse)
    pass_on = functools.partial(ring.pass_on, plan, local, factors, start, need_end, reverse)
    return _beside(plan, pass_on, local, start) if local.is_cuda else pass_on


def _gather(plan, local, factors, start, need_end, reverse) -> Callable[[], Exchanged]:
    gathered = local.new_empty(plan.group.size() * local.shape[0], *local.shape[1:])
    work = dist.all_gather_into_tensor(gathered, local, group=plan.group, async_op=True)  # on a GPU on its own stream

    def finish() -> Exchanged:
        work.wait()
        return _add_up(plan, factors, lambda weights: plan.backend.combine(gathered, weights), start, need_end, reverse)

    return finish


def _add_up(
    plan: ParallelPlan,
    factors: Factors,
    combine: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor | None,
    need_end: bool,
    reverse: bool,
) -> Exchanged:
    """What enters this rank's chunks, from the local states of the chunks before them and what enters the first one."""
    count = len(plan.mine) + need_end
    weights = factors("weights", reverse)
    states = combine(weights.unflatten(0, (-1, len(_sent(plan, reverse))))[:count])
    if start is not None:
        states += left(factors("start", reverse)[:count], start)
    return states[: len(plan.mine)], states[-1].contiguous() if need_end else None


def _beside(
    plan: ParallelPlan, pass_on: Callable[[], Exchanged], local: torch.Tensor, start: torch.Tensor | None
) -> Callable[[], Exchanged]:
    """``pass_on`` on a stream of its own, beside what is launched until the function returned is called."""
    stream, here = state_of(plan.group).stream(local.device), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        found = pass_on()
    for x in (local, start):
        if x is not None:
            x.record_stream(stream)

    def finish() -> Exchanged:
        torch.cuda.current_stream().wait_stream(stream)
        for x in found:
            if x is not None:
                x.record_stream(torch.cuda.current_stream())
        return found

    return finish
