"""Exchanges that pass states on from rank to rank: ``ring``, ``pipelined`` and ``scan``.

The papers' schemes, and what others compare with. What each costs, and when "auto" takes it, is in cost.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .factors import Factors, Pairs, left
from .plan import ParallelPlan

BLOCKS = 4  # of the pipelined exchange, along K


def needed_pairs(plan: ParallelPlan, reverse: bool) -> dict[str, Pairs]:
    """See ``exchange.needed_pairs``. ``passing``: for each of this rank's chunks, through it, and from its end to its
    end.

    For a scan also ``step d``: through the d chunks before this rank's; ``start``: from the begin of the sequence.
    """
    passing: list[tuple[int, int]] = []
    for c in plan.mine:
        edge = c if reverse else c + 1
        passing += [(c, c + 1), (edge, edge)]
    pairs = {"passing": tuple(passing)}
    if plan.exchange == "scan":
        N, entrances = plan.count, plan.entrances(reverse)
        for through in (0, *distances(N)):
            begins = [min(max(b + through if reverse else b - through, 0), N) for b in entrances]
            pairs[f"step {through}"] = tuple((min(p), max(p)) for p in zip(begins, entrances, strict=True))
        pairs["start"] = tuple((b, N) if reverse else (0, b) for b in entrances)
    return pairs


def distances(chunks: int) -> list[int]:
    """1, 2, 4, ... as far as there are chunks so far apart whose states are not yet in the sum."""
    found = [1]
    while found[-1] < chunks - 1:
        found.append(2 * found[-1])
    return found[:-1]


def pass_on(
    plan: ParallelPlan,
    local: torch.Tensor,
    factors: Factors,
    start: torch.Tensor | None,
    need_end: bool,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See ``exchange.exchange``: what enters this rank's chunks, and what leaves the last chunk."""
    return (_scan if plan.exchange == "scan" else _ring)(plan, local, factors, start, need_end, reverse)


def _ring(plan, local, factors, start, need_end, reverse):
    """The state goes from chunk to chunk (LASP); if pipelined, in blocks along K that follow each other (ZeCO)."""
    group, rank = plan.group, plan.group.rank()
    N = plan.count
    order = range(N - 1, -1, -1) if reverse else range(N)
    blocks = BLOCKS if plan.exchange == "pipelined" else 1
    incoming = torch.empty_like(local)
    sent: list = []
    outgoing: list[torch.Tensor] = []
    state_blocks: list = [None] * blocks
    local_blocks = [list(x.chunk(blocks, dim=2)) for x in local]
    zeros = torch.zeros_like(local[0]) if start is None else start
    for step, c in enumerate(order):
        if plan.owner(c) != rank:
            continue
        i = plan.mine.index(c)
        through, on = factors("passing", reverse)[2 * i : 2 * i + 2]
        before = plan.owner(order[step - 1]) if step else None
        after = plan.owner(order[step + 1]) if step + 1 < N else None
        for j, block in enumerate(local_blocks[i]):
            if before is None:
                state = zeros.chunk(blocks, dim=2)[j]
            elif before == rank:
                state = state_blocks[j]
            else:
                state = torch.empty_like(block)
                dist.recv(state, group=group, group_src=before)
            incoming[i].chunk(blocks, dim=2)[j].copy_(state)
            state = (left(on, block) + left(through, state)).contiguous()
            state_blocks[j] = state
            if after is not None and after != rank:
                sent.append((dist.isend(state, group=group, group_dst=after), state))
        if after is None:
            outgoing = list(state_blocks)
    for work, _ in sent:
        work.wait()
    end = torch.cat(outgoing, dim=2) if outgoing else None
    return incoming, _to_all(plan, end, order[-1], local) if need_end else None


def _scan(plan, local, factors, start, need_end, reverse):
    """Prefix sums by doubling (Hillis and Steele 1986): what enters a chunk is the sum of the 1, 2, 4, ... chunks
    before it.

    1 + ceil(log2(N - 1)) messages for each of N chunks: fewer than all-gather sends and faster than a state that goes
    from rank to rank where there are many. Any number of ranks and any layout.
    """
    forth = -1 if reverse else 1
    incoming = torch.zeros_like(local)

    def add(states: torch.Tensor, distance: int, through: int) -> None:
        """``states`` of the chunks that far before, which stand ``through`` bounds before those where they are
        added.
        """
        arrived = _moved(plan, states, forth * distance)
        passed = zip(factors(f"step {through}", reverse), arrived, strict=True)
        more = [None if x is None else left(factor, x) for factor, x in passed]  # x may be of incoming
        for x, y in zip(incoming, more, strict=True):
            if y is not None:
                x += y

    add(local, 1, 0)
    for distance in distances(plan.count):
        add(incoming, distance, distance)
    if start is not None:
        incoming += left(factors("start", reverse), start)
    if not need_end:
        return incoming, None
    last, end = 0 if reverse else plan.count - 1, None
    if last in plan.mine:
        i = plan.mine.index(last)
        through, on = factors("passing", reverse)[2 * i : 2 * i + 2]
        end = left(on, local[i]) + left(through, incoming[i])
    return incoming, _to_all(plan, end, last, local)


def _moved(plan: ParallelPlan, states: torch.Tensor, by: int) -> list[torch.Tensor | None]:
    """The states of the chunks ``by`` before this rank's, from their ranks; None where there is no such chunk."""
    rank = plan.group.rank()
    found: list[torch.Tensor | None] = [None] * len(plan.mine)
    messages = []
    # two ranks name what they send each other in the same order
    for c in sorted({*plan.mine, *(c - by for c in plan.mine)}):
        here, there = plan.owner(c), plan.owner(c + by)  # one of them, or both, are this rank
        if here is None or there is None:
            continue
        state = states[plan.mine.index(c)] if here == rank else torch.empty_like(states[0])
        if there == rank:
            found[plan.mine.index(c + by)] = state
        if here != there:
            what, peer = (dist.isend, there) if here == rank else (dist.irecv, here)
            messages.append(dist.P2POp(what, state, group=plan.group, group_peer=peer))
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    return found


def _to_all(plan: ParallelPlan, end: torch.Tensor | None, chunk: int, like: torch.Tensor) -> torch.Tensor:
    """What leaves the last chunk, from the rank that has it."""
    end = torch.empty_like(like[0]) if end is None else end
    dist.broadcast(end, group=plan.group, group_src=plan.owner(chunk))
    return end
