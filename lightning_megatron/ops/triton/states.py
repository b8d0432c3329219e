"""The state at the end of chunks: what the tokens of a context-parallel rank add to it, and weighted sums of many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..backend import Destination, Documents
from .documents import count_documents, ids_and_bounds
from .launch import cdiv, launch, pad
from .symmetric import COLUMNS, send_tile
from .walk import incoming_state, state_tile


@triton.jit
def _local_state(
    split_states, split_rows, doc, cu_seqlens, documents, b_ld, i_b, i_h, o_k, o_v, m_vk, T, H, split_len,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr, SPLIT_STATES: tl.constexpr,
):  # fmt: skip
    """Tile [BV, BK] of the state at the end (reversed at the start) of sequence i_b."""
    at = 0 if REVERSE else T
    if VARLEN:
        doc += i_b * T
        cu_seqlens += i_b * (documents + 1)
    return incoming_state(
        tl.zeros([BV, BK], dtype=tl.float32), split_states, split_rows, 0, None, doc, cu_seqlens, b_ld,
        i_b, i_h, o_k, o_v, m_vk, at, at, T, H, split_len,
        K, V, REVERSE, False, SPLIT_STATES, False, VARLEN, True,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=("T", "H", "split_len", "split_rows", "documents", "first", "sequences", "me", "ranks", "rows")
)
def local_state_kernel(
    split_states, log_decay, out,  # states of all splits [B, split_rows, H, K, V], [H], [B, H, K, V]
    doc, cu_seqlens, buffers, between,  # [B, T], [B, documents + 1], [ranks], [rows, H]
    T, H, split_len, split_rows, documents,
    first, sequences, me, ranks, rows,  # SEND: number of the first sequence among those of this rank's message
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr, SPLIT_STATES: tl.constexpr, SEND: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The state at the end of a sequence (reversed at its start) of its split states; packed, of its last (first)
    document.

    With SEND it goes to all ranks of a group and not into out. PAIRS: sequences 2 i and 2 i + 1 are the chunks of one
    row, of which every rank gets what it needs.
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
    b_s = _local_state(
        split_states, split_rows, doc, cu_seqlens, documents, b_ld, i_s, i_h, o_k, o_v, m_vk, T, H, split_len,
        K, V, BK, BV, REVERSE, VARLEN, SPLIT_STATES,
    )  # fmt: skip
    if SEND:
        b_sum = b_s
        if PAIRS:
            i_s = 2 * i_b + (0 if REVERSE else 1)
            b_w = tl.load(between + tl.minimum(i_b, rows - 1) * H + i_h)
            b_sum = tl.where(b_w == 0, 0.0, b_w * b_s)  # 0: another document's, which may hold infinities and NaN
            b_sum += _local_state(
                split_states, split_rows, doc, cu_seqlens, documents, b_ld, i_s, i_h, o_k, o_v, m_vk, T, H, split_len,
                K, V, BK, BV, REVERSE, VARLEN, SPLIT_STATES,
            )  # fmt: skip
        o_e = o_k[None, :] * BV + tl.arange(0, BV)[:, None]
        tile = ((first + i // H) * H + i_h) * columns + i_v
        send_tile(b_s, b_sum, tile, o_e, buffers, me, ranks, sequences * H * columns, BK * BV)
    else:
        tl.store(state_tile(out, i_b, H, i_h, o_k, o_v, K, V, False), b_s, mask=m_vk)


@triton.jit(do_not_specialize=("N", "R", "positions", "rows", "H"))
def combine_kernel(states, weights, out, N, R, positions, rows, H, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """out [R, positions, H, SIZE] = sum over n of weights [positions, N, rows, H] states [N, R, H, SIZE].

    What has weight 0 is not read.
    """
    blocks = tl.cdiv(SIZE, BLOCK)
    i = tl.program_id(0)
    o_e = i % blocks * BLOCK + tl.arange(0, BLOCK)
    i = i // blocks
    i_h, i_p, i_r = i % H, i // H % positions, i // (positions * H)
    i_w = tl.minimum(i_r, rows - 1)
    m_e = o_e < SIZE
    b_o = tl.zeros([BLOCK], dtype=tl.float32)
    for n in range(N):
        b_w = tl.load(weights + ((i_p * N + n) * rows + i_w) * H + i_h)
        if b_w != 0:
            b_o += b_w * tl.load(states + ((n * R + i_r) * H + i_h).to(tl.int64) * SIZE + o_e, mask=m_e, other=0.0)
    tl.store(out + i.to(tl.int64) * SIZE + o_e, b_o, mask=m_e)


def reduce_splits(
    split_states, log_decay, documents: Documents | None, size, split_len, *,
    reverse: bool, destination: Destination | None, first: int,
) -> torch.Tensor | None:  # fmt: skip
    """The state at the end of each of B sequences of split states ``[B, splits, H, K, V]`` (None: no tokens).

    ``size`` is B, T, K, V. Packed, of the last document; with ``reverse``, at the start, of the first. With
    ``destination`` the states are sent, as the sequences from number ``first`` on of the message, and not returned;
    with ``destination.between`` what the two chunks of every row add.
    """
    (B, T, K, V), H = size, log_decay.numel()
    out = None if destination else torch.empty(B, H, K, V, device=log_decay.device, dtype=torch.float32)
    buffers, between, to, pairs = None, None, (0, 0, 0, 0, 0), False
    if destination:
        buffers, between, pairs = destination.buffers, destination.between, destination.between is not None
        sequences = destination.shape[0] * destination.shape[1]
        to = first, sequences, destination.rank, buffers.numel(), between.shape[0] if pairs else 0
    launch(
        local_state_kernel, cdiv(V, COLUMNS) * H * (B // 2 if pairs else B),
        (split_states, log_decay, out, *ids_and_bounds(documents), buffers, between),
        (T, H, split_len, 0 if split_states is None else split_states.shape[1], count_documents(documents), *to),
        (K, V, pad(K), COLUMNS, reverse, documents is not None, split_states is not None, destination is not None,
         pairs),
        num_warps=4,
    )  # fmt: skip
    return out


def combine(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See ``Backend.combine``. In memory the positions of a row follow each other, as the pieces of a row do."""
    (N, R, H, K, V), (positions, _, rows, _) = states.shape, weights.shape
    out = states.new_empty(R, positions, H, K, V)
    if out.numel():
        BLOCK = 1024
        launch(
            combine_kernel, cdiv(K * V, BLOCK) * R * positions * H, (states, weights.contiguous(), out),
            (N, R, positions, rows, H), (K * V, BLOCK), num_warps=4,
        )  # fmt: skip
    return out.transpose(0, 1)
