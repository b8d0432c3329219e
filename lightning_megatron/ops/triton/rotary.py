"""Triton kernel of rotary.py. Bound by memory: every value is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, flat, launch, pad

TILE = 1024  # pairs of channels of one head, in BR tokens
HEADS = 8  # of a program, which computes sines and cosines once for all of them


@triton.jit(do_not_specialize=("tokens", "batch", "heads"))
def rotary_kernel(
    x, angles, y, x_st, x_sh, angles_st,  # y contiguous
    tokens, batch, heads, scale,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, HEADS: tl.constexpr,
    ANGLE: tl.constexpr,  # stride of angles from pair to pair
    STEP: tl.constexpr, GAP: tl.constexpr, STEP_OUT: tl.constexpr, GAP_OUT: tl.constexpr,  # (i STEP, i STEP + GAP)
    BACK: tl.constexpr,
):  # fmt: skip
    """A program turns BR tokens of HEADS heads; a token is a position of one sequence of the batch."""
    parts = tl.cdiv(heads, HEADS)
    i_h, i_r = tl.program_id(0) % parts * HEADS, tl.program_id(0) // parts
    p = i_r * BR + tl.arange(0, BR)
    o_n = tl.arange(0, BN)
    m = (p < tokens)[:, None] & (o_n < N)[None, :]
    at = (p // batch).to(tl.int64)[:, None] * angles_st + o_n[None, :] * ANGLE
    b_t = tl.load(angles + at, mask=m, other=0.0).to(tl.float32)
    b_cos, b_sin = tl.cos(b_t) * scale, tl.sin(b_t) * scale
    if BACK:
        b_sin = -b_sin
    p = p.to(tl.int64)[:, None]
    o_p = 2 * N + tl.arange(0, BP)
    m_p = (p < tokens) & (o_p < D)[None, :]
    for j in tl.static_range(HEADS):
        h = i_h + j
        x_h = x + p * x_st + h.to(tl.int64) * x_sh
        y_h = y + (p * heads + h) * D
        m_h = m & (h < heads)
        b_a = tl.load(x_h + o_n[None, :] * STEP, mask=m_h, other=0.0).to(tl.float32)
        b_b = tl.load(x_h + o_n[None, :] * STEP + GAP, mask=m_h, other=0.0).to(tl.float32)
        tl.store(y_h + o_n[None, :] * STEP_OUT, (b_a * b_cos - b_b * b_sin).to(y.dtype.element_ty), mask=m_h)
        tl.store(y_h + o_n[None, :] * STEP_OUT + GAP_OUT, (b_b * b_cos + b_a * b_sin).to(y.dtype.element_ty), mask=m_h)
        if D > 2 * N:
            rest = tl.load(x_h + o_p[None, :], mask=m_p & (h < heads), other=0.0)
            tl.store(y_h + o_p[None, :], rest, mask=m_p & (h < heads))


def _pairs(n: int, interleaved: bool) -> tuple[int, int]:
    """STEP and GAP."""
    return (2, 1) if interleaved else (1, n)


def turn(
    x: torch.Tensor, angles: torch.Tensor, scale: float, interleaved: bool, interleaved_out: bool, *, back: bool
) -> torch.Tensor:
    """``[s, b, heads, D]``, turned by ``angles [s, n]``, or back by them."""
    (s, b, heads, D), n = x.shape, angles.shape[1]
    y = x.new_empty(x.shape)
    if y.numel():
        rows, BN = flat(x), pad(n)
        BR = max(1, TILE // BN)
        constants = (
            D, n, BN, pad(max(1, D - 2 * n)), BR, HEADS, angles.stride(1) if n > 1 else 1,
            *_pairs(n, interleaved), *_pairs(n, interleaved_out), back,
        )  # fmt: skip
        launch(
            rotary_kernel, cdiv(s * b, BR) * cdiv(heads, HEADS), (rows, angles, y),
            (*rows.stride()[:2], angles.stride(0), s * b, b, heads, float(scale)), constants, num_warps=4,
        )  # fmt: skip
    return y
