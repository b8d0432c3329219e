"""States of all ranks, exchanged and added up in one launch: GPUs of one node write into each other's memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from .launch import cdiv, launch

BLOCK = 1024
PROGRAMS = 256  # which wait for those of other GPUs: few enough to run all at once, and beside kernels of other streams


@triton.jit
def _take(flag, value, other, limit):
    """Wait until the word at ``flag`` is ``value``, and make it ``other``. What was written before it became so is seen from here on."""
    begin = globaltimer()
    while tl.atomic_cas(flag, value, other, sem="acquire", scope="sys") != value:
        tl.device_assert(
            globaltimer() - begin < limit, "a rank of the context-parallel group did not send its states within the group's timeout"
        )
    tl.debug_barrier()


@triton.jit
def _mailbox(mailboxes, rank):
    """Address of a rank's mailbox, in this GPU's address space."""
    return tl.multiple_of(tl.load(mailboxes + rank).to(tl.pointer_type(tl.float32)), 16)


@triton.jit(do_not_specialize=("me", "ranks", "chunks", "rows", "places", "limit"))
def exchange_kernel(
    own, weights, out, mailboxes,  # [chunks, rows, SIZE], [places, ranks * chunks, rows], [places, rows, SIZE], [ranks]
    me, ranks, chunks, rows, places, limit,  # ns
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """out[p] = sum over the chunks n of all ranks of weights[p, n] own[n]

    A mailbox has room for what each rank sends, ``[ranks, chunks, rows, SIZE]``, and two words for every rank and tile: "full"
    is set by the sender when the tile has arrived, "busy" in the sender's own mailbox until the receiver has read it. So
    both wait on their own memory, a tile is never overwritten before it is read, and nothing is left to be reset: the same
    launch can be repeated, by a CUDA graph too. A program first sends all its tiles, so that nobody waits for one that waits.
    """
    blocks = tl.cdiv(SIZE, BLOCK)
    tiles, message = rows * blocks, chunks.to(tl.int64) * rows * SIZE
    o_p = tl.arange(0, PLACES)
    mine = _mailbox(mailboxes, me)
    full = (mine + ranks * message).to(tl.pointer_type(tl.int32), bitcast=True)
    busy = full + ranks * tiles
    for j in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, o_e = j // blocks, j % blocks * BLOCK + tl.arange(0, BLOCK)
        for d in range(1, ranks):
            _take(busy + (me + d) % ranks * tiles + j, 0, 1, limit)
        for c in range(chunks):
            at = (c * rows + row).to(tl.int64) * SIZE + o_e
            b_x = tl.load(own + at, mask=o_e < SIZE)
            for d in range(1, ranks):
                tl.store(_mailbox(mailboxes, (me + d) % ranks) + me * message + at, b_x, mask=o_e < SIZE)
        tl.debug_barrier()
        for d in range(1, ranks):
            theirs = _mailbox(mailboxes, (me + d) % ranks) + ranks * message
            tl.atomic_xchg(theirs.to(tl.pointer_type(tl.int32), bitcast=True) + me * tiles + j, 1, sem="release", scope="sys")
    for j in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, o_e = j // blocks, j % blocks * BLOCK + tl.arange(0, BLOCK)
        b_o = tl.zeros([PLACES, BLOCK], dtype=tl.float32)
        for a in range(ranks):  # in this order on every rank, so that all get the same bits
            source = (mine + a * message).to(tl.int64)
            if a == me:
                source = own.to(tl.int64)
            else:
                _take(full + a * tiles + j, 1, 0, limit)
            states = tl.multiple_of(source.to(tl.pointer_type(tl.float32)), 16)
            for c in range(chunks):
                b_w = tl.load(weights + (o_p * ranks * chunks + a * chunks + c) * rows + row, mask=o_p < places, other=0.0)
                at = (c * rows + row).to(tl.int64) * SIZE + o_e
                b_x = tl.load(states + at, mask=o_e < SIZE, other=0.0, cache_modifier=".cg")  # written by another GPU
                b_o += b_w[:, None] * b_x[None, :]
            if a != me:
                tl.debug_barrier()
                theirs = _mailbox(mailboxes, a) + ranks * message
                flag = theirs.to(tl.pointer_type(tl.int32), bitcast=True) + (ranks + me) * tiles + j
                tl.atomic_xchg(flag, 0, sem="release", scope="sys")
        p_o = out + (o_p[:, None].to(tl.int64) * rows + row) * SIZE + o_e[None, :]
        tl.store(p_o, b_o, mask=(o_p < places)[:, None] & (o_e < SIZE)[None, :])


def mailbox_words(ranks: int, own: torch.Tensor) -> int:
    """Size of a mailbox for ``own [chunks, R, H, K, V]``, in words of 4 bytes, which must be zero at first."""
    _, R, H, K, V = own.shape
    return ranks * (own.numel() + 2 * R * H * cdiv(K * V, BLOCK))


def exchange(
    own: torch.Tensor, weights: torch.Tensor, mailboxes: torch.Tensor, rank: int, limit: int, programs: int = PROGRAMS
) -> torch.Tensor:
    """``combine(gathered, weights)`` of the ``own [chunks, R, H, K, V]`` of all ranks, without gathering them.

    Args:
        weights: ``[places, ranks * chunks, R or 1, H]``, at most 4 places; chunks in the order of ranks.
        mailboxes: ``[ranks]`` int64, addresses of all mailboxes in this GPU's address space.
        limit: ns after which a program that still waits ends in an error of the GPU.
    """
    chunks, R, H, K, V = own.shape
    places, ranks = weights.shape[0], mailboxes.numel()
    weights = weights.expand(-1, -1, R, -1).contiguous()
    out = own.new_empty(places, R, H, K, V)
    tiles = R * H * cdiv(K * V, BLOCK)
    launch(
        exchange_kernel, min(tiles, programs), (own, weights, out, mailboxes),
        (rank, ranks, chunks, R * H, places, limit), (K * V, BLOCK, 4), num_warps=4,
        debug=True, sanitize_overflow=False,  # debug for the assertion alone
    )  # fmt: skip
    return out
