"""Exchanges between the ranks: what chunks add to the state becomes the state that enters them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist

from . import direct
from .chunks import Chain, Plan

EXCHANGES = ("auto", "direct", "all-gather", "ring", "pipelined")
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
    return "all-gather" if group.size() <= GATHERED_RANKS else "pipelined"


def mail_for(plan: Plan, q: torch.Tensor, v: torch.Tensor):
    """Where the states of (k, v), or of (q, do), are sent as soon as they are computed; None where ``exchange`` does it."""
    if plan.exchange != "direct":
        return None
    shape = len(plan.mine), q.shape[0], q.shape[2], q.shape[3], v.shape[3]
    boxes = direct.mailboxes(plan.group, q.device, shape, plan.implementation.mailbox_words(plan.group.size(), shape))
    return plan.implementation.Mail(boxes.addresses, plan.group.rank(), boxes.limit, shape)


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
        weights, first = _sums(plan, chain, need_end, reverse, start is not None)
        return lambda: _summed(plan, plan.implementation.receive(mail, weights), start, first, need_end)
    own = own.contiguous()
    if plan.exchange == "all-gather":
        return _gather(plan, own, chain, start, need_end, reverse)
    if not own.is_cuda:
        return functools.partial(_pass_on, plan, own, chain, start, need_end, reverse)
    stream, here = _stream(own.device), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        found = _pass_on(plan, own, chain, start, need_end, reverse)
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


def _sums(plan: Plan, chain: Chain, need_end: bool, reverse: bool, with_start: bool):
    """What is added up from the M of all chunks: weights of chunks, and factors of what enters the first (None without it)."""
    N = len(plan.bounds) - 1
    places = tuple(c + 1 if reverse else c for c in plan.mine) + ((0 if reverse else N,) if need_end else ())
    weights = chain.weights(places, tuple(c for chunks in plan.chunks for c in chunks), reverse)
    return weights, chain.factors(tuple((p, N) if reverse else (0, p) for p in places)) if with_start else None


def _summed(plan: Plan, states: torch.Tensor, start: torch.Tensor | None, first: torch.Tensor | None, need_end: bool):
    if start is not None:
        states += first[..., None, None] * start
    return states[: len(plan.mine)], states[-1] if need_end else None


def _gather(plan, own, chain, start, need_end, reverse):
    """All ranks get the M of all chunks, and each adds up what it needs (LASP-2)."""
    gathered = own.new_empty(plan.group.size() * own.shape[0], *own.shape[1:])
    work = dist.all_gather_into_tensor(gathered, own, group=plan.group, async_op=True)  # on a stream of its own on a GPU
    weights, first = _sums(plan, chain, need_end, reverse, start is not None)

    def finish():
        work.wait()
        return _summed(plan, plan.implementation.combine(gathered, weights), start, first, need_end)

    return finish


def _pass_on(plan, own, chain, start, need_end, reverse):
    """The state goes from chunk to chunk (LASP), in blocks along K that follow each other (ZeCO) if the exchange is pipelined."""
    group, rank = plan.group, plan.group.rank()
    N = len(plan.bounds) - 1
    owner = {c: r for r, chunks in enumerate(plan.chunks) for c in chunks}
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
        a, b = c, c + 1
        edge = a if reverse else b
        through, on = chain.factors(((a, b), (edge, edge)))[..., None, None]  # the second 0 where a document begins there
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
    if not need_end:
        return entering, None
    end = torch.cat(leaves, dim=2) if leaves else torch.empty_like(own[0])
    dist.broadcast(end, group=group, group_src=owner[order[-1]])
    return entering, end
