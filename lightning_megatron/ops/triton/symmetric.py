"""Ranks of one node write states into each other's memory, the symmetric buffers.

This takes two halves, so that other work can go on between them: ``send_tile``, at the end of the kernel that computes
the states (states.py), and ``receive``. A rank sends to all ranks, itself included; a message is cut into tiles of 16
columns of a state. The symmetric buffer of a rank holds

    data   fp32  [2, ranks, tiles, tile]  of this exchange and of the one before
    full   int32 [ranks, tiles]           number of the last exchange of which a rank's tile has arrived
    count  int32 [tiles]                  number of the last exchange to which this rank has sent

Of two chunks, as under zigzag, each other rank needs one state only. Let rank r have chunks r and 2P-1-r in the
direction of the exchange. The two chunks of a rank a > r come after the first and before the second: it needs what the
first adds. Those of a rank a < r come one before, one after both: it needs their sum, at the end of the second
(``Destination.between``).

Nobody waits before it writes. A rank sends exchange n+1 after it has received exchange n, which the others have sent
after they received exchange n-1: what exchange n+1 overwrites has been read. Numbers are in memory and not in
arguments, so that a CUDA graph can repeat the launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from ..backend import Destination
from .launch import cdiv, launch, pad

COLUMNS = 16  # of a state in a program


@triton.jit
def _buffer(buffers, rank, ranks, tiles, SIZE: tl.constexpr):
    """A rank's data, full and count."""
    data = tl.multiple_of(tl.load(buffers + rank).to(tl.pointer_type(tl.float32)), 16)
    full = (data + 2 * ranks * tiles.to(tl.int64) * SIZE).to(tl.pointer_type(tl.int32), bitcast=True)
    return data, full, full + ranks * tiles


@triton.jit
def send_tile(x, y, tile, o_e, buffers, me, ranks, tiles, SIZE: tl.constexpr):
    """Write a tile, whose elements belong at o_e, into all buffers, then say so there.

    Ranks before this one get y, the others x.
    """
    _, _, count = _buffer(buffers, me, ranks, tiles, SIZE)
    number = tl.load(count + tile) + 1
    at = (((number & 1) * ranks + me) * tiles + tile).to(tl.int64) * SIZE
    for d in range(ranks):
        to = (me + d) % ranks
        data, _, _ = _buffer(buffers, to, ranks, tiles, SIZE)
        tl.store(data + at + o_e, tl.where(to < me, y, x))
    tl.debug_barrier()  # all threads have written, and read the number
    tl.store(count + tile, number)
    for d in range(ranks):
        _, full, _ = _buffer(buffers, (me + d) % ranks, ranks, tiles, SIZE)
        tl.atomic_xchg(full + me * tiles + tile, number, sem="release", scope="sys")


@triton.jit(do_not_specialize=("me", "ranks", "chunks", "positions", "rows", "H", "limit"))
def receive_kernel(
    weights, out, buffers,  # [positions, ranks * chunks, rows, H], [R, positions, H, K, V], [ranks]
    me, ranks, chunks, positions, rows, H, limit,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """out[r, p] = sum over the chunks c of all ranks of weights[p, c, r] states[c, r].

    In the same order on every rank.
    """
    SIZE: tl.constexpr = BK * BV
    columns = tl.cdiv(V, BV)
    i = tl.program_id(0)
    tiles = tl.num_programs(0) // positions * chunks
    i_v, i = i % columns, i // columns
    i_h, i_p, i_r = i % H, i // H % positions, i // (positions * H)
    i_w = tl.minimum(i_r, rows - 1)
    o_e = tl.arange(0, SIZE)
    data, full, count = _buffer(buffers, me, ranks, tiles, SIZE)
    begin = globaltimer()
    b_o = tl.zeros([SIZE], dtype=tl.float32)
    for c in range(chunks):
        tile = ((i_r * chunks + c) * H + i_h) * columns + i_v
        number = tl.load(count + tile)
        for a in range(ranks):
            # a rank may be one exchange ahead; numbers begin anew after 2^32
            while tl.atomic_add(full + a * tiles + tile, 0, sem="acquire", scope="sys") - number < 0:
                tl.device_assert(
                    globaltimer() - begin < limit,
                    "a rank of the context-parallel group did not send its states within the group's timeout",
                )
            tl.debug_barrier()  # no thread reads before it has arrived
            b_w = tl.load(weights + (((i_p * ranks + a) * chunks + c) * rows + i_w) * H + i_h)
            at = (((number & 1) * ranks + a) * tiles + tile).to(tl.int64) * SIZE
            b_s = tl.load(data + at + o_e, cache_modifier=".cg")  # written by another GPU
            b_o += tl.where(b_w == 0, 0.0, b_w * b_s)  # 0: another document's, which may hold infinities and NaN
    o_k, o_v = o_e // BV, i_v * BV + o_e % BV
    tl.store(out + i.to(tl.int64) * K * V + o_k * V + o_v, b_o, mask=(o_k < K) & (o_v < V))


def buffer_words(ranks: int, shape: tuple[int, int, int, int, int]) -> int:
    """See ``DirectBackend.buffer_words``."""
    chunks, R, H, K, V = shape
    return chunks * R * H * cdiv(V, COLUMNS) * (2 * ranks * pad(K) * COLUMNS + ranks + 1)


def receive(destination: Destination, weights: torch.Tensor) -> torch.Tensor:
    """See ``DirectBackend.receive``."""
    chunks, R, H, K, V = destination.shape
    (positions, _, rows, _), ranks = weights.shape, destination.buffers.numel()
    out = weights.new_empty(R, positions, H, K, V)
    launch(
        receive_kernel, R * positions * H * cdiv(V, COLUMNS), (weights.contiguous(), out, destination.buffers),
        (destination.rank, ranks, chunks, positions, rows, H, destination.limit), (K, V, pad(K), COLUMNS), num_warps=4,
        debug=True, sanitize_overflow=False,  # debug for the assertion alone
    )  # fmt: skip
    return out.transpose(0, 1)
