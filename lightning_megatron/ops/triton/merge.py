"""The Triton kernel of merge.py and its launch. Bound by memory: every part is read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, pad

TILE = 4096  # elements
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _part(x, lse, i_b, i_h, p, start, m, x_sb, x_sh, x_st, l_sb, l_sh, D: tl.constexpr, BD: tl.constexpr):
    """Values [BT, BD] and log-sum-exps [BT] of queries p, of a part that begins at query ``start``."""
    o_d, q, m = tl.arange(0, BD), (p - start).to(tl.int64), m & (p >= start)
    b_l = tl.load(lse + i_b * l_sb + i_h * l_sh + q, mask=m, other=float("-inf"))
    x += i_b * x_sb + i_h * x_sh
    b_x = tl.load(x + q[:, None] * x_st + o_d[None, :], mask=m[:, None] & (o_d < D)[None, :], other=0.0)
    return b_x.to(tl.float32), b_l


@triton.jit(do_not_specialize=("rows", "start_1", "start_2"))
def merge_kernel(
    x0, x1, x2, l0, l1, l2, o, lse,  # o [rows, batch, heads, D] and lse [batch, heads, rows] contiguous; x2, l2 or None
    x0_sb, x0_sh, x0_st, l0_sb, l0_sh, x1_sb, x1_sh, x1_st, l1_sb, l1_sh, x2_sb, x2_sh, x2_st, l2_sb, l2_sh,
    rows, start_1, start_2, batch, heads,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_h, i = i % heads, i // heads
    i_b, i_t = (i % batch).to(tl.int64), i // batch
    p = i_t * BT + tl.arange(0, BT)
    m = p < rows
    b_x0, b_l0 = _part(x0, l0, i_b, i_h, p, 0, m, x0_sb, x0_sh, x0_st, l0_sb, l0_sh, D, BD)
    b_x1, b_l1 = _part(x1, l1, i_b, i_h, p, start_1, m, x1_sb, x1_sh, x1_st, l1_sb, l1_sh, D, BD)
    b_top = tl.maximum(b_l0, b_l1)
    if x2 is not None:
        b_x2, b_l2 = _part(x2, l2, i_b, i_h, p, start_2, m, x2_sb, x2_sh, x2_st, l2_sb, l2_sh, D, BD)
        b_top = tl.maximum(b_top, b_l2)
    b_top = tl.where(m, b_top, 0.0)
    b_w0, b_w1 = tl.exp2((b_l0 - b_top) * _LOG2_E), tl.exp2((b_l1 - b_top) * _LOG2_E)
    b_sum = b_w0 + b_w1
    b_o = b_x0 * b_w0[:, None] + b_x1 * b_w1[:, None]
    if x2 is not None:
        b_w2 = tl.exp2((b_l2 - b_top) * _LOG2_E)
        b_sum += b_w2
        b_o += b_x2 * b_w2[:, None]
    b_sum = tl.where(m, b_sum, 1.0)
    o_d = tl.arange(0, BD)
    at = ((p.to(tl.int64) * batch + i_b) * heads + i_h) * D
    inside = m[:, None] & (o_d < D)[None, :]
    tl.store(o + at[:, None] + o_d[None, :], (b_o / b_sum[:, None]).to(o.dtype.element_ty), mask=inside)
    tl.store(lse + (i_b * heads + i_h) * rows + p, b_top + tl.log(b_sum), mask=m)


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``merge_parts`` of two or three parts, which the caller has checked."""
    (b, h, t, D), dtype = parts[0][0].shape, parts[0][0].dtype
    o = torch.empty(t, b, h, D, dtype=dtype, device=parts[0][0].device)
    lse = torch.empty(b, h, t, dtype=torch.float32, device=o.device)
    values = [x if x.stride(-1) == 1 else x.contiguous() for x, *_ in parts]
    logs = [x if x.stride(-1) == 1 else x.contiguous() for _, x, _ in parts]
    strides = [n for x, log in zip(values, logs, strict=True) for n in (*x.stride()[:3], *log.stride()[:2])]
    missing = 3 - len(parts)
    BD = pad(D)
    BT = max(16, TILE // BD)
    launch(
        merge_kernel, h * b * cdiv(t, BT), (*values, *[None] * missing, *logs, *[None] * missing, o, lse),
        (*strides, *[0] * 5 * missing, t, *(start for *_, start in parts[1:]), *[0] * missing, b, h), (D, BD, BT),
        num_warps=4,
    )  # fmt: skip
    return o, lse
