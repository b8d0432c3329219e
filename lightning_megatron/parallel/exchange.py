"""Exchanges between the ranks: what chunks add to the state becomes the state that enters them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist

from . import direct
from .chunks import Chain, Plan

EXCHANGES = ("auto", "direct", "all-gather", "ring", "pipelined", "scan")
GATHERED_RANKS = 16  # with more, all-gather sends more than it saves in latency
BLOCKS = 4  # of the pipelined exchange, along K


def choose(exchange: str, layout: str, group: dist.ProcessGroup, device: torch.device, implementation) -> str:
    """What "auto" is for these ranks, which ask together; whether "direct" is possible."""
    if exchange not in ("auto", "direct"):
        return exchange
    if layout == "zigzag-documents":
        why_not = "documents that are cut one by one differ in number from batch to batch, and so would the memory for their states"
    elif not hasattr(implementation, "receive"):
        why_not = "it takes the triton backend"
    else:
        why_not = direct.why_not(group, device)
    if not why_not:
        return "direct"
    if exchange == "direct":
        raise ValueError(
            f"exchange='direct' needs GPUs that write into each other's memory, but {why_not}; use exchange='auto' or 'all-gather'"
        )
    return "all-gather" if group.size() <= GATHERED_RANKS else "scan"


def mail_for(plan: Plan, chain: Chain, q: torch.Tensor, v: torch.Tensor, reverse: bool = False):
    """Where the states of (k, v), reversed of (q, do), are sent as soon as they are computed; None where ``exchange`` does it."""
    if plan.exchange != "direct":
        return None
    rank, count, between, sent = plan.group.rank(), len(plan.mine), None, plan.in_order
    if count == 2 and not plan.states:  # what leaves the sequence is made of all chunks
        a, b = plan.mine
        count, between = 1, chain.factors(((a, b) if reverse else (a + 1, b + 1),))[0]
        sent = tuple(pair[reverse ^ (r > rank)] for r, pair in enumerate(plan.chunks))
    shape = count, q.shape[0], q.shape[2], q.shape[3], v.shape[3]
    boxes = direct.mailboxes(plan.group, q.device, shape, plan.implementation.mailbox_words(plan.group.size(), shape))
    return plan.implementation.Mail(boxes.addresses, rank, boxes.limit, shape, between, sent)


def exchange(
    plan: Plan, own, mail, chain: Chain, start: torch.Tensor | None, need_end: bool, reverse: bool = False
) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
    """Begin to turn what chunks add to the state into the state that enters them.

    Args:
        own: ``[chunks of this rank, R, H, K, V]``, or None if it has been sent with the ``mail``.
        start: ``[R, H, K, V]``, what enters the first chunk; None for zeros.
        need_end: whether to return what leaves the last chunk, on all ranks.
        reverse: states go from the last chunk to the first.

    Returns:
        A function that waits and returns what enters this rank's chunks, ``[chunks of this rank, R, H, K, V]``, and what leaves
        the last chunk ``[R, H, K, V]``. On a GPU the exchange goes on beside what is launched before it is called.
    """
    if mail:
        weights, first = _sums(plan, chain, mail.chunks, need_end, reverse, start is not None)
        return lambda: _summed(plan, plan.implementation.receive(mail, weights), start, first, need_end)
    own = own.contiguous()
    if plan.exchange == "all-gather":
        return _gather(plan, own, chain, start, need_end, reverse)
    pass_on = _scan if plan.exchange == "scan" else _pass_on
    if not own.is_cuda:
        return functools.partial(pass_on, plan, own, chain, start, need_end, reverse)
    stream, here = _stream(own.device), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        found = pass_on(plan, own, chain, start, need_end, reverse)
    for x in (own, start):
        if x is not None:
            x.record_stream(stream)

    def finish():
        torch.cuda.current_stream().wait_stream(stream)
        for x in found:
            if x is not None:
                x.record_stream(torch.cuda.current_stream())
        return found

    return finish


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where states are passed on from rank to rank, beside the operator."""
    return torch.cuda.Stream(device, priority=-1)


def _sums(plan: Plan, chain: Chain, chunks: tuple[int, ...], need_end: bool, reverse: bool, with_start: bool):
    """What is added up from states at the ends of ``chunks``: their weights, and factors of what enters the first chunk of all
    (None without it)."""
    places = _entrances(plan, reverse) + ((0 if reverse else len(plan.bounds) - 1,) if need_end else ())
    return chain.weights(places, chunks, reverse), _of_start(plan, chain, places, reverse) if with_start else None


def _entrances(plan: Plan, reverse: bool) -> tuple[int, ...]:
    """The bounds where states enter this rank's chunks."""
    return tuple(c + 1 if reverse else c for c in plan.mine)


def _of_start(plan: Plan, chain: Chain, places: tuple[int, ...], reverse: bool) -> torch.Tensor:
    """What is left at bounds ``places`` of what enters the first chunk."""
    return chain.factors(tuple((p, len(plan.bounds) - 1) if reverse else (0, p) for p in places))


def _summed(plan: Plan, states: torch.Tensor, start: torch.Tensor | None, first: torch.Tensor | None, need_end: bool):
    if start is not None:
        states += first[..., None, None] * start
    return states[: len(plan.mine)], states[-1].contiguous() if need_end else None


def _gather(plan, own, chain, start, need_end, reverse):
    """All ranks get the M of all chunks, and each adds up what it needs (LASP-2)."""
    gathered = own.new_empty(plan.group.size() * own.shape[0], *own.shape[1:])
    work = dist.all_gather_into_tensor(
        gathered, own, group=plan.group, async_op=True
    )  # on a stream of its own on a GPU
    weights, first = _sums(plan, chain, plan.in_order, need_end, reverse, start is not None)

    def finish():
        work.wait()
        return _summed(plan, plan.implementation.combine(gathered, weights), start, first, need_end)

    return finish


def _pass_on(plan, own, chain, start, need_end, reverse):
    """The state goes from chunk to chunk (LASP), in blocks along K that follow each other (ZeCO) if the exchange is pipelined."""
    group, rank = plan.group, plan.group.rank()
    N, owner = len(plan.bounds) - 1, plan.owner
    order = range(N - 1, -1, -1) if reverse else range(N)
    blocks = BLOCKS if plan.exchange == "pipelined" else 1
    entering, sent, leaves = torch.empty_like(own), [], []
    state_blocks = [None] * blocks
    parts = [list(x.chunk(blocks, dim=2)) for x in own]
    zeros = torch.zeros_like(own[0]) if start is None else start
    for step, c in enumerate(order):
        if owner[c] != rank:
            continue
        i = plan.mine.index(c)
        through, on = _passing(chain, c, reverse)
        before = owner[order[step - 1]] if step else None
        after = owner[order[step + 1]] if step + 1 < N else None
        for j, part in enumerate(parts[i]):
            if before is None:
                state = zeros.chunk(blocks, dim=2)[j]
            elif before == rank:
                state = state_blocks[j]
            else:
                state = torch.empty_like(part)
                dist.recv(state, group=group, group_src=before)
            entering[i].chunk(blocks, dim=2)[j].copy_(state)
            state = (on * part + through * state).contiguous()
            state_blocks[j] = state
            if after is not None and after != rank:
                sent.append((dist.isend(state, group=group, group_dst=after), state))
        if after is None:
            leaves = list(state_blocks)
    for work, _ in sent:
        work.wait()
    end = torch.cat(leaves, dim=2) if leaves else None
    return entering, _to_all(plan, end, order[-1], own) if need_end else None


def _scan(plan, own, chain, start, need_end, reverse):
    """Prefix sums by doubling (Hillis and Steele 1986): what enters a chunk is the sum of the 1, 2, 4, ... chunks before it.

    1 + ceil(log2(N - 1)) messages for each of N chunks: fewer than all-gather sends and faster than a state that goes from
    rank to rank where there are many. Any number of ranks and any layout.
    """
    N = len(plan.bounds) - 1
    forth = -1 if reverse else 1
    at = _entrances(plan, reverse)
    entering = torch.zeros_like(own)

    def add(states: torch.Tensor, distance: int, through: int) -> None:
        """``states`` of the chunks that far before, which stand ``through`` bounds before those where they are added."""
        arrived = _moved(plan, states, forth * distance)
        bounds = ((min(max(p - forth * through, 0), N), p) for p in at)
        factors = chain.factors(tuple((min(pair), max(pair)) for pair in bounds))[..., None, None]
        more = [
            None if x is None else factor * x for factor, x in zip(factors, arrived, strict=True)
        ]  # x may be of entering
        for x, y in zip(entering, more, strict=True):
            if y is not None:
                x += y

    add(own, 1, 0)
    distance = 1
    while distance < N - 1:
        add(entering, distance, distance)
        distance *= 2
    if start is not None:
        entering += _of_start(plan, chain, at, reverse)[..., None, None] * start
    if not need_end:
        return entering, None
    last, end = 0 if reverse else N - 1, None
    if last in plan.mine:
        through, on = _passing(chain, last, reverse)
        i = plan.mine.index(last)
        end = on * own[i] + through * entering[i]
    return entering, _to_all(plan, end, last, own)


def _moved(plan: Plan, states: torch.Tensor, by: int) -> list[torch.Tensor | None]:
    """The states of the chunks ``by`` before this rank's, from their ranks; None where there is no such chunk."""
    rank, owner = plan.group.rank(), plan.owner
    found, messages = [None] * len(plan.mine), []
    for c in sorted(
        {*plan.mine, *(c - by for c in plan.mine)}
    ):  # two ranks name what they send each other in the same order
        here, there = owner.get(c), owner.get(c + by)  # one of them, or both, are this rank
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


def _passing(chain: Chain, c: int, reverse: bool) -> torch.Tensor:
    """What is left, where the state leaves chunk c, of what entered it, and of what it added: 0 where a document begins there."""
    edge = c if reverse else c + 1
    return chain.factors(((c, c + 1), (edge, edge)))[..., None, None]


def _to_all(plan: Plan, end: torch.Tensor | None, chunk: int, like: torch.Tensor) -> torch.Tensor:
    """What leaves the last chunk, from the rank that has it."""
    end = torch.empty_like(like[0]) if end is None else end
    dist.broadcast(end, group=plan.group, group_src=plan.owner[chunk])
    return end
