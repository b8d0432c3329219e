"""What context-parallel ranks exchange: the state at the end of each one's tokens, and sums of the states of all.

GPUs of one node write into each other's memory, in two halves, so that other work can go on between them: ``send_tile``, at
the end of the kernel that computes the states (``end_state_kernel``), and ``receive``. A rank sends to all ranks, itself
included; a message is cut into tiles of 16 columns of a state. The mailbox of a rank holds

    data   fp32  [2, ranks, tiles, tile]  of this exchange and of the one before
    full   int32 [ranks, tiles]           number of the last exchange of which a rank's tile has arrived
    count  int32 [tiles]                  number of the last exchange to which this rank has sent

Of two chunks, as under zigzag, each other rank needs one state only. Let rank r have chunks r and 2P-1-r in the direction of the
exchange. The two chunks of a rank a > r come after the first and before the second: it needs what the first adds. Those of a rank
a < r come one before, one after both: it needs their sum, at the end of the second (``Mail.between``).

Nobody waits before it writes. A rank sends exchange n+1 after it has received exchange n, which the others have sent after
they received exchange n-1: what exchange n+1 overwrites has been read. Numbers are in memory and not in arguments, so that a
CUDA graph can repeat the launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from .kernels import _incoming_state, _state_tile
from .launch import cdiv, launch, pad

COLUMNS = 16  # of a state in a program


class Mail(NamedTuple):
    """Where states go: ``mailboxes`` is ``[ranks]`` int64, their addresses in this GPU's address space, in the order of ranks."""

    mailboxes: torch.Tensor
    rank: int
    limit: int  # ns after which a program that still waits ends in an error of the GPU
    shape: tuple[int, int, int, int, int]  # of the states that a rank sends to another: chunks, R, H, K, V
    # [R or 1, H], where a rank has two chunks and sends one state: what is left after the second of what the first adds
    between: torch.Tensor | None = None
    chunks: tuple[
        int, ...
    ] = ()  # of the whole sequence, at whose ends the states stand that this rank is sent, in the order of ranks


@triton.jit
def _mailbox(mailboxes, rank, ranks, tiles, SIZE: tl.constexpr):
    """A rank's data, full and count."""
    data = tl.multiple_of(tl.load(mailboxes + rank).to(tl.pointer_type(tl.float32)), 16)
    full = (data + 2 * ranks * tiles.to(tl.int64) * SIZE).to(tl.pointer_type(tl.int32), bitcast=True)
    return data, full, full + ranks * tiles


@triton.jit
def send_tile(x, y, tile, o_e, mailboxes, me, ranks, tiles, SIZE: tl.constexpr):
    """Write a tile, whose elements belong at o_e, into all mailboxes, then say so there: y for ranks before this one, else x."""
    _, _, count = _mailbox(mailboxes, me, ranks, tiles, SIZE)
    number = tl.load(count + tile) + 1
    at = (((number & 1) * ranks + me) * tiles + tile).to(tl.int64) * SIZE
    for d in range(ranks):
        to = (me + d) % ranks
        data, _, _ = _mailbox(mailboxes, to, ranks, tiles, SIZE)
        tl.store(data + at + o_e, tl.where(to < me, y, x))
    tl.debug_barrier()  # all threads have written, and read the number
    tl.store(count + tile, number)
    for d in range(ranks):
        _, full, _ = _mailbox(mailboxes, (me + d) % ranks, ranks, tiles, SIZE)
        tl.atomic_xchg(full + me * tiles + tile, number, sem="release", scope="sys")


@triton.jit
def _end_state(
    split_states, split_rows, doc, b_ld, i_b, i_h, o_k, o_v, m_vk, T, H, split_len,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr, SPLIT_STATES: tl.constexpr,
):  # fmt: skip
    """Tile [BV, BK] of the state at the end (reversed at the start) of sequence i_b."""
    at = 0 if REVERSE else T
    if VARLEN:
        doc += i_b * T
    return _incoming_state(
        split_states, split_rows, 0, None, doc, b_ld, i_b, i_h, o_k, o_v, m_vk, at, at, T, H, split_len,
        K, V, BK, BV, REVERSE, False, SPLIT_STATES, False, VARLEN, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=("T", "H", "split_len", "split_rows", "first", "sequences", "me", "ranks", "rows"))
def end_state_kernel(
    split_states, log_decay, out, doc, mailboxes, between,  # states of all splits [B, own_rows, H, K, V], out [B, H, K, V], between [rows, H]
    T, H, split_len, split_rows,
    first, sequences, me, ranks, rows,  # SEND: number of the first sequence among those of this rank's message
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr, SPLIT_STATES: tl.constexpr, SEND: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The state at the end of a sequence (reversed at its start) of its own states; packed, of its last (first) document.

    With SEND it goes to all ranks of a group and not into out. PAIRS: sequences 2 i and 2 i + 1 are the chunks of one row, of
    which every rank gets what it needs.
    """
    columns = tl.cdiv(V, BV)
    i = tl.program_id(0)
    i_v, i = i % columns, i // columns
    i_h, i_b = i % H, (i // H).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_vk = (o_v < V)[:, None] & (o_k < K)[None, :]
    b_ld = tl.load(log_decay + i_h)
    i_s = i_b
    if PAIRS:
        i_s = 2 * i_b + (1 if REVERSE else 0)
    b_s = _end_state(
        split_states,
        split_rows,
        doc,
        b_ld,
        i_s,
        i_h,
        o_k,
        o_v,
        m_vk,
        T,
        H,
        split_len,
        K,
        V,
        BK,
        BV,
        REVERSE,
        VARLEN,
        SPLIT_STATES,
    )
    if SEND:
        b_sum = b_s
        if PAIRS:
            i_s = 2 * i_b + (0 if REVERSE else 1)
            b_w = tl.load(between + tl.minimum(i_b, rows - 1) * H + i_h)
            b_sum = tl.where(b_w == 0, 0.0, b_w * b_s)  # 0: another document's, which may hold infinities and NaN
            b_sum += _end_state(
                split_states,
                split_rows,
                doc,
                b_ld,
                i_s,
                i_h,
                o_k,
                o_v,
                m_vk,
                T,
                H,
                split_len,
                K,
                V,
                BK,
                BV,
                REVERSE,
                VARLEN,
                SPLIT_STATES,
            )
        o_e = o_k[None, :] * BV + tl.arange(0, BV)[:, None]
        tile = ((first + i // H) * H + i_h) * columns + i_v
        send_tile(b_s, b_sum, tile, o_e, mailboxes, me, ranks, sequences * H * columns, BK * BV)
    else:
        tl.store(_state_tile(out, i_b, H, i_h, o_k, o_v, K, V, False), b_s, mask=m_vk)


@triton.jit(do_not_specialize=("me", "ranks", "chunks", "places", "rows", "H", "limit"))
def receive_kernel(
    weights, out, mailboxes,  # [places, ranks * chunks, rows, H], [R, places, H, K, V], [ranks]
    me, ranks, chunks, places, rows, H, limit,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """out[r, p] = sum over the chunks c of all ranks of weights[p, c, r] states[c, r], in the same order on every rank."""
    SIZE: tl.constexpr = BK * BV
    columns = tl.cdiv(V, BV)
    i = tl.program_id(0)
    tiles = tl.num_programs(0) // places * chunks
    i_v, i = i % columns, i // columns
    i_h, i_p, i_r = i % H, i // H % places, i // (places * H)
    i_w = tl.minimum(i_r, rows - 1)
    o_e = tl.arange(0, SIZE)
    data, full, count = _mailbox(mailboxes, me, ranks, tiles, SIZE)
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
            # written by another GPU; without weight another document's, which may hold infinities and NaN
            b_o += b_w * tl.load(data + at + o_e, mask=(o_e < SIZE) & (b_w != 0), other=0.0, cache_modifier=".cg")
    o_k, o_v = o_e // BV, i_v * BV + o_e % BV
    tl.store(out + i.to(tl.int64) * K * V + o_k * V + o_v, b_o, mask=(o_k < K) & (o_v < V))


@triton.jit(do_not_specialize=("N", "R", "places", "rows", "H"))
def combine_kernel(states, weights, out, N, R, places, rows, H, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """out [R, places, H, SIZE] = sum over n of weights [places, N, rows, H] states [N, R, H, SIZE]; what has no weight is not read."""
    blocks = tl.cdiv(SIZE, BLOCK)
    i = tl.program_id(0)
    o_e = i % blocks * BLOCK + tl.arange(0, BLOCK)
    i = i // blocks
    i_h, i_p, i_r = i % H, i // H % places, i // (places * H)
    i_w = tl.minimum(i_r, rows - 1)
    m_e = o_e < SIZE
    b_o = tl.zeros([BLOCK], dtype=tl.float32)
    for n in range(N):
        b_w = tl.load(weights + ((i_p * N + n) * rows + i_w) * H + i_h)
        if b_w != 0:
            b_o += b_w * tl.load(states + ((n * R + i_r) * H + i_h).to(tl.int64) * SIZE + o_e, mask=m_e, other=0.0)
    tl.store(out + i.to(tl.int64) * SIZE + o_e, b_o, mask=m_e)


def reduce_splits(
    split_states, log_decay, doc, size, split_len, *, reverse: bool, mail: Mail | None, first: int
) -> torch.Tensor | None:
    """The state at the end of each of B sequences of own states ``[B, parts, H, K, V]`` (None: no tokens), ``size`` B, T, K, V.

    Packed (with ``doc``), of the last document; with ``reverse``, at the start, of the first. With ``mail`` the states are
    sent, as the sequences from number ``first`` on of the message, and not returned; or with ``mail.between`` what the
    two chunks of every row add.
    """
    (B, T, K, V), H = size, log_decay.numel()
    out = None if mail else torch.empty(B, H, K, V, device=log_decay.device, dtype=torch.float32)
    mailboxes, between, to, pairs = None, None, (0, 0, 0, 0, 0), False
    if mail:
        mailboxes, between, pairs = mail.mailboxes, mail.between, mail.between is not None
        to = first, mail.shape[0] * mail.shape[1], mail.rank, mailboxes.numel(), between.shape[0] if pairs else 0
    launch(
        end_state_kernel, cdiv(V, COLUMNS) * H * (B // 2 if pairs else B), (split_states, log_decay, out, doc, mailboxes, between),
        (T, H, split_len, 0 if split_states is None else split_states.shape[1], *to),
        (K, V, pad(K), COLUMNS, reverse, doc is not None, split_states is not None, mail is not None, pairs), num_warps=4,
    )  # fmt: skip
    return out


def mailbox_words(ranks: int, shape: tuple[int, int, int, int, int]) -> int:
    """Size of a mailbox for messages of this ``shape``, in words of 4 bytes, which must be zero at first."""
    chunks, R, H, K, V = shape
    return chunks * R * H * cdiv(V, COLUMNS) * (2 * ranks * pad(K) * COLUMNS + ranks + 1)


def receive(mail: Mail, weights: torch.Tensor) -> torch.Tensor:
    """``combine(states, weights)`` of the states ``[ranks * chunks, R, H, K, V]`` that this rank has been sent; chunks in the order
    of ranks."""
    chunks, R, H, K, V = mail.shape
    (places, _, rows, _), ranks = weights.shape, mail.mailboxes.numel()
    out = weights.new_empty(R, places, H, K, V)
    launch(
        receive_kernel, R * places * H * cdiv(V, COLUMNS), (weights.contiguous(), out, mail.mailboxes),
        (mail.rank, ranks, chunks, places, rows, H, mail.limit), (K, V, pad(K), COLUMNS), num_warps=4,
        debug=True, sanitize_overflow=False,  # debug for the assertion alone
    )  # fmt: skip
    return out.transpose(0, 1)


def combine(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See ``torch_backend.combine``. In memory the places of a row follow each other, as the pieces of a row do."""
    (N, R, H, K, V), (places, _, rows, _) = states.shape, weights.shape
    out = states.new_empty(R, places, H, K, V)
    if out.numel():
        BLOCK = 1024
        launch(
            combine_kernel, cdiv(K * V, BLOCK) * R * places * H, (states, weights.contiguous(), out), (N, R, places, rows, H),
            (K * V, BLOCK), num_warps=4,
        )  # fmt: skip
    return out.transpose(0, 1)
