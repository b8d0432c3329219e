"""Triton kernels of loss.py and their launches. Bound by memory: logits are read once each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, pad

BLOCK = 4096  # columns at a time
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=("rows",))
def sums_kernel(x, index, out, x_st, rows, columns, BLOCK: tl.constexpr):
    """out [3, rows] = largest logit, sum of exp(logit - largest), logit at index or 0; a program per row."""
    i = tl.program_id(0).to(tl.int64)
    x += i * x_st
    o_c = tl.arange(0, BLOCK)
    low = float("-inf")
    # a running maximum and sum for every lane: no lane waits for another before the end
    b_m = tl.full([BLOCK], low, dtype=tl.float32)
    b_s = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        b_x = tl.load(x + start + o_c, mask=start + o_c < columns, other=low).to(tl.float32)
        b_n = tl.maximum(b_m, b_x, propagate_nan=tl.PropagateNan.ALL)
        b_r = tl.where(b_n == low, 0.0, b_n)  # -inf minus itself is not a number
        b_s = b_s * tl.exp2((b_m - b_r) * _LOG2_E) + tl.exp2((b_x - b_r) * _LOG2_E)
        b_m = b_n
    top = tl.max(b_m)
    total = tl.sum(b_s * tl.exp2((b_m - tl.where(top == low, 0.0, top)) * _LOG2_E))
    at = tl.load(index + i)
    mine = (at >= 0) & (at < columns)
    hit = tl.load(x + at, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + i, top)
    tl.store(out + rows + i, total)
    tl.store(out + 2 * rows + i, hit)


@triton.jit
def loss_grad_kernel(x, index, log_total, dloss, dx, x_st, columns, dloss_st, BLOCK: tl.constexpr):
    """dx = (exp(x - log_total) - 1 at index) dloss, one block of one row; dx contiguous, may be x."""
    blocks = tl.cdiv(columns, BLOCK)
    i, start = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK
    o_c = start + tl.arange(0, BLOCK)
    b_x = tl.load(x + i * x_st + o_c, mask=o_c < columns, other=0.0).to(tl.float32)
    b_y = tl.exp2((b_x - tl.load(log_total + i)) * _LOG2_E)
    b_y = tl.where(o_c == tl.load(index + i), b_y - 1.0, b_y) * tl.load(dloss + i * dloss_st)
    tl.store(dx + i * columns + o_c, b_y.to(dx.dtype.element_ty), mask=o_c < columns)


def _block(columns: int) -> int:
    return min(BLOCK, pad(columns))


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def sums(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[3, N] fp32, as of ``loss.sums``."""
    rows, columns = logits.shape
    out = torch.empty(3, rows, device=logits.device, dtype=torch.float32)
    if rows:
        x = _rows(logits)
        launch(sums_kernel, rows, (x, index, out), (x.stride(0), rows, columns), (_block(columns),), num_warps=8)
    return out


def gradient(
    logits: torch.Tensor,
    index: torch.Tensor,
    log_total: torch.Tensor,
    dloss: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``loss.gradient``. ``out`` is contiguous and may be logits: programs read before they write."""
    rows, columns = logits.shape
    dlogits = torch.empty(rows, columns, device=logits.device, dtype=logits.dtype) if out is None else out
    if rows:
        x, BC = _rows(logits), _block(columns)
        launch(
            loss_grad_kernel,
            rows * cdiv(columns, BC),
            (x, index, log_total, dloss, dlogits),
            (x.stride(0), columns, dloss.stride(0)),
            (BC,),
            num_warps=8,
        )
    return dlogits
