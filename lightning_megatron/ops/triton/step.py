"""One token, or a few, of every sequence, as in decoding: the operator alone or with all that a layer does around it.

A program takes one head of one request, or some columns of its state, which it reads once and writes once: that is
what decoding costs. Tiles depend on head dims and options alone, so that a request is rounded alike in any batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, pad

MIN_COLUMNS = 32  # of a tile: whole lines of 128 bytes
TILE = 8192  # elements, in registers; a program that takes all of a head takes several one after another
# Elements per thread where columns are split over programs, and where not. Fewer warps with more loads in flight each
# read faster (decode_ops --sweep, H200): 90 and 89% of a copy at 256 requests, where 32 and 64 give 80%.
PER_THREAD, WHOLE_PER_THREAD = 64, 128
MAX_WARPS = 8


@triton.jit
def _channels(x, c, m, SILU: tl.constexpr):
    """Channels c of one head in fp32, with the feature map."""
    b_x = tl.load(x + c, mask=m, other=0.0).to(tl.float32)
    if SILU:
        b_x *= tl.sigmoid(b_x)
    return b_x


@triton.jit
def _select(x, y, c, m, first):
    """Channels c of x in rows that are ``first`` and of y in the others, in fp32."""
    return tl.load(x + c, mask=m & first, other=0.0).to(tl.float32) + tl.load(y + c, mask=m & ~first, other=0.0).to(
        tl.float32
    )


@triton.jit
def _query_and_key(
    q, k, q_weight, k_weight, angles, o_k, q_eps, k_eps, turn_scale, K: tl.constexpr, PADDED: tl.constexpr,
    SILU: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Channels o_k of q and k: feature map, RMS norm over all K if there is a weight, rotation of the first TURNED.

    As a tile of four rows: q, k, and of both the channels that the rotation mixes in. Of a single row, every thread
    would compute all that its part of the state needs, with several times the registers.
    """
    row, o_k = tl.arange(0, 4)[:, None], o_k[None, :]
    is_q, mixes = row % 2 == 0, row >= 2
    c, m = o_k + 0 * row, (o_k < K) & (row < 2)
    if TURNED > 0:
        if INTERLEAVED:
            first = o_k % 2 == 0
            partner = tl.where(first, o_k + 1, o_k - 1)
        else:
            first = o_k < TURNED // 2
            partner = tl.where(first, o_k + TURNED // 2, o_k - TURNED // 2)
        c, m = tl.where(mixes, partner, c), o_k < tl.where(mixes, TURNED, K)
    b_x = _select(q, k, c, m, is_q)
    if SILU:
        b_x *= tl.sigmoid(b_x)
    if q_weight is not None or k_weight is not None:
        o_all = tl.arange(0, PADDED)[None, :]
        b_all = _select(q, k, o_all + 0 * row, (o_all < K) & (row < 4), is_q)
        if SILU:
            b_all *= tl.sigmoid(b_all)
        b_n = b_x * tl.rsqrt(tl.sum(b_all * b_all, axis=1)[:, None] / K + tl.where(is_q, q_eps, k_eps))
        if q_weight is not None:
            b_x = tl.where(is_q, b_n * tl.load(q_weight + c, mask=m & is_q, other=0.0).to(tl.float32), b_x)
        if k_weight is not None:
            b_x = tl.where(is_q, b_x, b_n * tl.load(k_weight + c, mask=m & ~is_q, other=0.0).to(tl.float32))
    if TURNED > 0:
        b_a = tl.load(angles + o_k, mask=o_k < TURNED, other=0.0)
        b_sin = tl.sin(b_a)
        b_turn = turn_scale * tl.where(mixes, tl.where(first, -b_sin, b_sin), tl.cos(b_a))
        b_x *= tl.where(o_k < TURNED, b_turn, tl.where(mixes, 0.0, 1.0))
    return tl.sum(tl.where(is_q, b_x, 0.0), axis=0), tl.sum(tl.where(is_q, 0.0, b_x), axis=0)


@triton.jit
def _finish(o, gate, weight, b_o, o_v, m_v, eps, V: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr):
    """Norm over the head, weight, gate; writes columns o_v of one head."""
    if NORM:
        b_o *= tl.rsqrt(tl.sum(b_o * b_o, axis=0) / V + eps)  # columns behind V are zero
    if weight is not None:
        b_o *= tl.load(weight + o_v, mask=m_v, other=0.0).to(tl.float32)
    if gate is not None:
        b_g = tl.load(gate + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_o *= tl.sigmoid(b_g) if SIGMOID else b_g
    tl.store(o + o_v, b_o.to(o.dtype.element_ty), mask=m_v)


@triton.jit
def _state(states, o_k, o_v, m_kv, V: tl.constexpr):
    """The tile [o_k, o_v] of one head's state; zeros if there is none."""
    if states is None:
        return tl.zeros(m_kv.shape, dtype=tl.float32)
    else:
        return tl.load(states + o_k[:, None] * V + o_v[None, :], mask=m_kv, other=0.0)


# Counts are not specialised: another number of requests or tokens is not another kernel. Strides are, by alignment.
@triton.jit(do_not_specialize=("S", "N", "H", "group"))
def step_kernel(
    q, k, v, o,  # [R, S, heads, dim] with any strides but the last, which is 1; heads of q are strided by group, too
    log_decay, slots, initial, final, between,  # [H]; [R], None: row r; states [N, H, K, V]; [N, S, H, K, V], None
    q_weight, k_weight, angles, positions, gate, out_weight,  # of a whole layer with S = 1, each may be None
    q_sr, q_ss, q_sg, q_sh, k_sr, k_ss, k_sh, v_sr, v_ss, v_sh, o_sr, o_ss, o_sh,
    initial_sn, final_sn, between_sn, between_ss, angles_sp, gate_sr, gate_sg,
    S, N, H, group, scale, q_eps, k_eps, out_eps, turn_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TILES: tl.constexpr, PADDED: tl.constexpr,  # tiles of BK rows that hold a state, more than one only with S = 1
    SILU: tl.constexpr, SILU_V: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
    OUT_NORM: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Bound by reading and writing states. Computes in fp32."""
    columns = tl.cdiv(V, BV)
    i = tl.program_id(0)
    i_v, i = i % columns, i // columns
    i_h, i_r = i % H, (i // H).to(tl.int64)
    i_g, i_j = (i_h // group).to(tl.int64), i_h % group
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    o += i_r * o_sr + i_h.to(tl.int64) * o_sh
    n = i_r
    if slots is not None:
        n = tl.load(slots + i_r).to(tl.int64)
        if (n < 0) | (n >= N):  # padding; or an error, which NaN shows and no other state suffers from
            b_o = tl.where(m_v, tl.where(n == -1, 0.0, float("nan")), 0.0)
            for t in range(S):
                tl.store(o + t * o_ss + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
            return
    if initial is not None:
        initial += n * initial_sn + i_h.to(tl.int64) * (K * V)
    if final is not None:
        final += n * final_sn + i_h.to(tl.int64) * (K * V)
    if between is not None:
        between += n * between_sn + i_h.to(tl.int64) * (K * V)
    q += i_r * q_sr + i_g * q_sg + i_j.to(tl.int64) * q_sh
    k += i_r * k_sr + i_g * k_sh
    v += i_r * v_sr + i_g * v_sh
    if TURNED > 0:
        angles += tl.load(positions + i_r).to(tl.int64) * angles_sp
    if gate is not None:
        gate += i_r * gate_sr + i_g * gate_sg + i_j * V
    if out_weight is not None:
        out_weight += i_h * V
    if TILES == 1:
        m_kv = (o_k < K)[:, None] & m_v[None, :]
        b_s = _state(initial, o_k, o_v, m_kv, V)  # before all else: this takes longest
        b_decay = tl.exp(tl.load(log_decay + i_h))
        for _ in range(S):
            b_q, b_k = _query_and_key(
                q, k, q_weight, k_weight, angles, o_k, q_eps, k_eps, turn_scale, K, PADDED, SILU, TURNED, INTERLEAVED
            )
            b_v = _channels(v, o_v, m_v, SILU_V)
            b_s = b_decay * b_s + b_k[:, None] * b_v[None, :]
            b_o = tl.sum(b_q[:, None] * b_s, axis=0) * scale
            _finish(o, gate, out_weight, b_o, o_v, m_v, out_eps, V, OUT_NORM, SIGMOID)
            if between is not None:
                tl.store(between + o_k[:, None] * V + o_v[None, :], b_s, mask=m_kv)
                between += between_ss
            q += q_ss
            k += k_ss
            v += v_ss
            o += o_ss
        if final is not None:
            tl.store(final + o_k[:, None] * V + o_v[None, :], b_s, mask=m_kv)
    else:
        b_v = _channels(v, o_v, m_v, SILU_V)
        b_decay = tl.exp(tl.load(log_decay + i_h))
        b_o = tl.zeros([BV], dtype=tl.float32)
        for i_k in range(TILES):
            c = i_k * BK + o_k
            m_kv = (c < K)[:, None] & m_v[None, :]
            b_s = _state(initial, c, o_v, m_kv, V)
            b_q, b_k = _query_and_key(
                q, k, q_weight, k_weight, angles, c, q_eps, k_eps, turn_scale, K, PADDED, SILU, TURNED, INTERLEAVED
            )
            b_s = b_decay * b_s + b_k[:, None] * b_v[None, :]
            b_o += tl.sum(b_q[:, None] * b_s, axis=0)
            if final is not None:
                tl.store(final + c[:, None] * V + o_v[None, :], b_s, mask=m_kv)
        _finish(o, gate, out_weight, b_o * scale, o_v, m_v, out_eps, V, OUT_NORM, SIGMOID)


class StepTiles(NamedTuple):
    """Rows and columns of a state per tile, tiles per program, and its warps."""

    BK: int
    BV: int
    tiles: int
    num_warps: int


@functools.cache
def step_tiles(K: int, V: int, whole: bool) -> StepTiles:
    """A norm over the head needs a program that has the ``whole`` head. Else columns are split over programs: more of
    them, with fewer registers each.
    """
    BK, BV = pad(K), pad(V)
    if whole:
        BK = min(BK, TILE // BV)
    else:
        BV = min(BV, max(MIN_COLUMNS, TILE // BK))
    elements, per_thread = BK * BV, WHOLE_PER_THREAD if whole else PER_THREAD
    return StepTiles(BK, BV, cdiv(K, BK), min(MAX_WARPS, max(1, elements // (32 * per_thread))))


def _launch(
    q, k, v, o, log_decay, slots, initial, final, between, scale, *, group: int, q_sg: int,
    q_norm=None, k_norm=None, angles=None, positions=None, turn_scale=1.0, interleaved=False, gate=None, gate_sg=0,
    sigmoid=False,
    out_norm=None, silu=(False, False),
) -> None:  # fmt: skip
    """q ``[R, S, H or group, K]`` is strided by ``q_sg`` from one head of k to the next."""
    (R, S, H, V), K = o.shape, q.shape[-1]
    if R == 0 or S == 0:
        return
    BK, BV, tiles, num_warps = step_tiles(K, V, out_norm is not None)
    assert S == 1 or tiles == 1
    (q_weight, q_eps), (k_weight, k_eps), (out_weight, out_eps) = (x or (None, 0.0) for x in (q_norm, k_norm, out_norm))
    launch(
        step_kernel, cdiv(V, BV) * H * R,
        (q, k, v, o, log_decay, slots, initial, final, between, q_weight, k_weight, angles, positions, gate,
         out_weight),
        (*q.stride()[:2], q_sg, q.stride(2), *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
         *(0 if x is None else x.stride(0) for x in (initial, final)),
         *((0, 0) if between is None else between.stride()[:2]),
         *(0 if x is None else x.stride(0) for x in (angles, gate)), gate_sg,
         S, R if slots is None else final.shape[0], H, group, scale, float(q_eps), float(k_eps), float(out_eps),
         float(turn_scale)),
        (K, V, BK, BV, tiles, pad(K), *silu, 0 if angles is None else angles.shape[1], interleaved,
         out_norm is not None, sigmoid),
        num_warps=num_warps, num_stages=1,
    )  # fmt: skip


def step(q, k, v, o, log_decay, slots, initial, final, scale, between=None) -> None:
    """Tokens ``[R, S, heads, dim]`` into o, and states behind the last of them into ``final``, behind each into
    ``between``; see ``lightning_step``. ``final`` may be ``initial``; without slots, row r has state r.
    """
    group = q.shape[2] // k.shape[2]
    _launch(q, k, v, o, log_decay, slots, initial, final, between, scale, group=group, q_sg=group * q.stride(2))


def decode(
    mixed, log_decay, states, slots, dims, silu, scale, q_norm, k_norm, angles, positions, turn_scale, interleaved,
    kind, out_norm,
) -> torch.Tensor:  # fmt: skip
    """See ``lightning_decode``."""
    (columns, _, K, V), width = dims, sum(dims)
    R, heads, group = mixed.shape[0], mixed.shape[1] // width, columns // K
    q, gate, k, v = mixed.unflatten(1, (heads, width)).split(dims, 2)
    y = torch.empty(R, heads * group * V, device=mixed.device, dtype=mixed.dtype)
    _launch(
        q.unflatten(2, (group, K))[:, :1], k[:, None], v[:, None], y.view(R, 1, heads * group, V), log_decay, slots,
        states, states, None, scale, group=group, q_sg=width, q_norm=q_norm, k_norm=k_norm, angles=angles,
        positions=positions, turn_scale=turn_scale, interleaved=interleaved, gate=None if kind == "none" else gate,
        gate_sg=width, sigmoid=kind == "sigmoid", out_norm=out_norm, silu=silu,
    )  # fmt: skip
    return y
