"""Decoding with softmax attention to blocks of keys and values, in Triton: one new token of every request.

A program takes up to BH of the query heads that share keys, and one of SPLITS equal parts of a request's keys; a second
kernel combines the parts. The number of parts depends on what the block table can hold, not on how long requests are: a
CUDA graph captured once is right for all later lengths. Bound by reading keys and values.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, pad

PROGRAMS = 1024  # wanted: several for every multiprocessor, so that requests of unequal lengths even out
SMALLEST_PART = 256  # keys of the longest request


# Counts are not specialised: another number of requests or of parts' keys is not another kernel.
@triton.jit(do_not_specialize=("table_st", "kv_heads"))
def paged_decode_kernel(
    q, k, v, table, lengths, o, part, m, l,  # o contiguous; part, m and l [rows, SPLITS, ...], None with one part
    q_st, q_sh, k_sb, k_sp, k_sh, v_sb, v_sp, v_sh, table_st, kv_heads, scale,
    GROUP: tl.constexpr,  # query heads per head of k and v
    BLOCK: tl.constexpr,  # tokens in a block of the cache
    K: tl.constexpr, K1: tl.constexpr, V: tl.constexpr,  # K1 <= K: channels of the first product, the rest a second one
    BK1: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    PREFIX: tl.constexpr,  # values are the first V = K1 channels of the keys; v is k
    EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``scale`` includes log2 e. Computes in fp32; the tensor cores take the dtype of q."""
    tiles: tl.constexpr = (GROUP + BH - 1) // BH
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    i = tl.program_id(0)
    i_t, i = i % tiles, i // tiles  # side by side: they read the same keys
    i_s, i = i % SPLITS, i // SPLITS
    i_g, i_r = i % kv_heads, (i // kv_heads).to(tl.int64)
    length = tl.load(lengths + i_r)
    keys = tl.cdiv(tl.cdiv(length, SPLITS), BN) * BN  # of a part
    first = i_s * keys
    end = tl.minimum(first + keys, length)

    o_h = i_t * BH + tl.arange(0, BH)
    m_h = o_h < GROUP
    o_h += i_g * GROUP  # among all heads
    row = (i_r * kv_heads * GROUP + o_h) * SPLITS + i_s
    o_1, o_2, o_v, o_n = tl.arange(0, BK1), K1 + tl.arange(0, BK2), tl.arange(0, BV), tl.arange(0, BN)
    q += i_r * q_st + o_h[:, None] * q_sh
    b_q = tl.load(q + o_1[None, :], mask=m_h[:, None] & (o_1 < K1)[None, :], other=0.0)
    if K > K1:
        b_q2 = tl.load(q + o_2[None, :], mask=m_h[:, None] & (o_2 < K)[None, :], other=0.0)
    b_m = tl.full([BH], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BH], dtype=tl.float32)
    b_o = tl.zeros([BH, BV], dtype=tl.float32)
    table += i_r * table_st
    k += i_g.to(tl.int64) * k_sh
    v += i_g.to(tl.int64) * v_sh
    for n in tl.range(first, end, BN, num_stages=STAGES):
        p = n + o_n
        m_n = p < end
        block = tl.load(table + p // BLOCK, mask=m_n, other=0).to(tl.int64)
        k_n = k + block * k_sb + (p % BLOCK) * k_sp
        b_k = tl.load(k_n[None, :] + o_1[:, None], mask=m_n[None, :] & (o_1 < K1)[:, None], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=precision)
        if K > K1:
            b_k2 = tl.load(k_n[None, :] + o_2[:, None], mask=m_n[None, :] & (o_2 < K)[:, None], other=0.0)
            b_s += tl.dot(b_q2, b_k2, input_precision=precision)
        b_s = tl.where(m_n[None, :], b_s * scale, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, axis=1))  # finite: a tile has a key
        b_p = tl.exp2(b_s - b_new[:, None])
        b_w = tl.exp2(b_m - b_new)
        b_l = b_l * b_w + tl.sum(b_p, axis=1)
        if PREFIX:
            b_v = tl.trans(b_k)
        else:
            v_n = v + block * v_sb + (p % BLOCK) * v_sp
            b_v = tl.load(v_n[:, None] + o_v[None, :], mask=m_n[:, None] & (o_v < V)[None, :], other=0.0)
        b_o = b_o * b_w[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=precision)
        b_m = b_new

    m_o = m_h[:, None] & (o_v < V)[None, :]
    if SPLITS == 1:
        b_o /= tl.where(b_l > 0, b_l, 1.0)[:, None]  # a row of padding has no keys
        tl.store(o + row[:, None] * V + o_v[None, :], b_o.to(o.dtype.element_ty), mask=m_o)
    else:
        tl.store(m + row, b_m, mask=m_h)
        tl.store(l + row, b_l, mask=m_h)
        if end > first:
            tl.store(part + row[:, None] * V + o_v[None, :], b_o, mask=m_o)


@triton.jit
def combine_parts_kernel(
    part, m, l, o,
    V: tl.constexpr, BV: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """o of one request and head: parts weighted by exp2(m - largest)."""
    i = tl.program_id(0).to(tl.int64)
    o_s, o_v = tl.arange(0, BS), tl.arange(0, BV)
    largest = tl.max(tl.load(m + i * SPLITS + o_s, mask=o_s < SPLITS, other=float("-inf")), axis=0)
    total = 0.0
    b_o = tl.zeros([BV], dtype=tl.float32)
    for s in tl.range(0, SPLITS, BC):
        at = i * SPLITS + s + tl.arange(0, BC)
        b_l = tl.load(l + at, mask=s + tl.arange(0, BC) < SPLITS, other=0.0)
        some = b_l > 0  # the other parts have no keys, and were not written
        b_w = tl.where(some, tl.exp2(tl.load(m + at, mask=some, other=0.0) - largest), 0.0)
        total += tl.sum(b_w * b_l, axis=0)
        b_p = tl.load(part + at[:, None] * V + o_v[None, :], mask=some[:, None] & (o_v < V)[None, :], other=0.0)
        b_o += tl.sum(b_w[:, None] * b_p, axis=0)
    b_o /= tl.where(total > 0, total, 1.0)
    tl.store(o + i * V + o_v, b_o.to(o.dtype.element_ty), mask=o_v < V)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """KiB that a program may have."""
    if device.type != "cuda":
        return 227
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


def _tiles(group: int, K: int, V: int, itemsize: int, shared: int) -> dict[str, int]:
    """BH, BN, stages and warps: queries and one or two tiles of keys and values must fit into ``shared`` KiB."""
    wide = pad(V) > 256
    keys = 2**15 if shared >= 96 else 2**14  # bytes of a tile
    BN = max(16, min(64, keys // (itemsize * pad(min(K, V) if wide else K))))
    most = 64
    if max(pad(K), pad(V)) > 128:
        most = 64 if shared >= 160 else 32 if shared >= 96 else 16
        most = max(16, most * 2 // itemsize)
    BH = min(pad(group), most)
    return dict(BH=BH, BN=BN, stages=2 if itemsize == 4 else 3, warps=8 if wide or BH * pad(V) > 4096 else 4)


def parts(programs: int, keys: int) -> int:
    """SPLITS: a power of two, for few kernels; from numbers that the host knows without asking the device.

    Args:
        programs: there are without parts.
        keys: that the block table can hold for one request.
    """
    wanted = min(cdiv(PROGRAMS, programs), cdiv(keys, SMALLEST_PART), 128)
    return 1 << (wanted - 1).bit_length()


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | int, table: torch.Tensor, lengths: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """o ``[requests, H, V]``; arguments as of ``softmax.paged.decode``."""
    (requests, H, K), (_, block, heads, _) = q.shape, k.shape
    prefix = isinstance(v, int)
    V = v if prefix else v.shape[3]
    o = q.new_empty(requests, H, V)
    if not requests:
        return o
    values = k if prefix else v
    q, table = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, table))
    group = H // heads
    K1 = V if prefix else K
    BH, BN, stages, warps = _tiles(group, K, V, q.element_size(), _shared_memory(q.device)).values()
    splits = parts(requests * heads * cdiv(group, BH), table.shape[1] * block)
    part = m = l = None
    if splits > 1:
        part, (m, l) = o.new_empty(o[..., 0].numel(), splits, V, dtype=torch.float32), (
            o.new_empty(o[..., 0].numel(), splits, dtype=torch.float32) for _ in range(2)
        )  # fmt: skip
    launch(
        paged_decode_kernel, requests * heads * cdiv(group, BH) * splits, (q, k, values, table, lengths, o, part, m, l),
        (*q.stride()[:2], *k.stride()[:3], *values.stride()[:3], table.stride(0), heads, scale * math.log2(math.e)),
        (
            group, block, K, K1, V, pad(K1), pad(K - K1) if K > K1 else 16, pad(V), BH, BN, splits, prefix,
            q.dtype == torch.float32, stages,
        ),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            combine_parts_kernel, o[..., 0].numel(), (part, m, l, o), (),
            (V, pad(V), splits, pad(splits), min(pad(splits), max(1, 4096 // pad(V)))), num_warps=4,
        )  # fmt: skip
    return o
