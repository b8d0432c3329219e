"""Triton kernels of pointwise.py and their launches. Bound by memory: every value is read once and written once.

A program takes a tile of BR tokens by the columns of one head, of one group that is normalised together, or by BC
columns of an MLP. They run fastest over the grid, so that programs side by side read memory that lies side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, flat, launch, pad

TILE = 4096  # elements
GLU_COLUMNS = 1024  # of a tile of swiglu, at most
# Tokens over which a program sums the weight's gradient; fewer where that would leave less than PROGRAMS programs.
SUMMED, PROGRAMS = 128, 1024


@triton.jit
def _tile(i_r, rows, columns: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Tokens [BR, 1], columns [1, BD] and which of them exist, of the tile that starts at row i_r * BR."""
    p = i_r * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    return p.to(tl.int64)[:, None], o_d[None, :], (p < rows)[:, None] & (o_d < columns)[None, :]


@triton.jit
def _silu(x, y, x_st, y_st, i_r, rows, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    """y = silu(x) of one head; x and y at its column 0 of token 0."""
    p, o_d, m = _tile(i_r, rows, D, BR, BD)
    b_x = tl.load(x + p * x_st + o_d, mask=m, other=0.0).to(tl.float32)
    tl.store(y + p * y_st + o_d, (b_x * tl.sigmoid(b_x)).to(y.dtype.element_ty), mask=m)


@triton.jit
def _silu_grad(
    x, dx, dy, x_st, dx_st, dy_st, dy_sh, i_h, i_r, rows, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """dx = silu'(x) dy of one head, or dx = dy; x and dx at its column 0 of token 0, dy at that of head 0 (None: 0)."""
    p, o_d, m = _tile(i_r, rows, D, BR, BD)
    if dy is None:
        b_dx = tl.zeros([BR, BD], dtype=tl.float32)
    else:
        b_dx = tl.load(dy + p * dy_st + i_h.to(tl.int64) * dy_sh + o_d, mask=m, other=0.0).to(tl.float32)
        if SILU:
            b_x = tl.load(x + p * x_st + o_d, mask=m, other=0.0).to(tl.float32)
            b_s = tl.sigmoid(b_x)
            b_dx *= b_s * (1.0 + b_x * (1.0 - b_s))
    tl.store(dx + p * dx_st + o_d, b_dx.to(dx.dtype.element_ty), mask=m)


# Counts are not specialised: another s or b is not another kernel. Strides are, by their alignment.
@triton.jit(do_not_specialize=("rows", "kv_heads"))
def split_kernel(
    mixed, q, k, v, mixed_st,  # of q, k and v contiguous results
    rows, kv_heads,
    GROUP: tl.constexpr,  # query heads per head of k and v
    WIDTH: tl.constexpr, K_AT: tl.constexpr,  # columns of mixed per head of k and v, and the first of k among them
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """silu of q, k and, unless it is None, v."""
    parts: tl.constexpr = GROUP + (1 if v is None else 2)
    i = tl.program_id(0)
    i_p, i = i % parts, i // parts
    i_g, i_r = i % kv_heads, i // kv_heads
    mixed += i_g * WIDTH
    if i_p < GROUP:
        _silu(mixed + i_p * K, q + (i_g * GROUP + i_p) * K, mixed_st, kv_heads * GROUP * K, i_r, rows, K, BK, BR)
    if i_p == GROUP:
        _silu(mixed + K_AT, k + i_g * K, mixed_st, kv_heads * K, i_r, rows, K, BK, BR)
    if v is not None:
        if i_p == GROUP + 1:
            _silu(mixed + K_AT + K, v + i_g * V, mixed_st, kv_heads * V, i_r, rows, V, BV, BR)


@triton.jit(do_not_specialize=("rows", "kv_heads"))
def split_grad_kernel(
    mixed, dmixed, dq, dgate, dk, dv,  # dmixed contiguous; any of the last four may be None
    mixed_st, dq_st, dq_sh, dgate_st, dgate_sh, dk_st, dk_sh, dv_st, dv_sh,
    rows, kv_heads,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, K_AT: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    SILU_QK: tl.constexpr, SILU_V: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The gradient of mixed, whole."""
    gates: tl.constexpr = GROUP if GATED else 0
    parts: tl.constexpr = GROUP + gates + 2
    i = tl.program_id(0)
    i_p, i = i % parts, i // parts
    i_g, i_r = i % kv_heads, i // kv_heads
    mixed += i_g * WIDTH
    dmixed += i_g * WIDTH
    st = kv_heads * WIDTH
    if i_p < GROUP:
        x, dx, i_h = mixed + i_p * K, dmixed + i_p * K, i_g * GROUP + i_p
        _silu_grad(x, dx, dq, mixed_st, st, dq_st, dq_sh, i_h, i_r, rows, K, BK, BR, SILU_QK)
    if GATED:
        if (i_p >= GROUP) & (i_p < GROUP + gates):
            i_h = i_p - GROUP  # among the heads of i_g
            if dgate is not None:
                dgate += i_g.to(tl.int64) * dgate_sh
            dx = dmixed + GROUP * K + i_h * V
            _silu_grad(mixed, dx, dgate, mixed_st, st, dgate_st, V, i_h, i_r, rows, V, BV, BR, False)
    if i_p == GROUP + gates:
        x, dx = mixed + K_AT, dmixed + K_AT
        _silu_grad(x, dx, dk, mixed_st, st, dk_st, dk_sh, i_g, i_r, rows, K, BK, BR, SILU_QK)
    if i_p == GROUP + gates + 1:
        x, dx = mixed + K_AT + K, dmixed + K_AT + K
        _silu_grad(x, dx, dv, mixed_st, st, dv_st, dv_sh, i_g, i_r, rows, V, BV, BR, SILU_V)


@triton.jit
def _glu_tile(rows, WIDTH: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr):
    """Tokens, columns and which of them exist, of this program's tile of ``[rows, WIDTH]``."""
    blocks: tl.constexpr = (WIDTH + BC - 1) // BC
    i_c, i_r = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    p, c, m = _tile(i_r, rows, BC, BR, BC)
    c += i_c * BC
    return p, c, m & (c < WIDTH)


@triton.jit(do_not_specialize=("rows",))
def swiglu_kernel(x, y, x_st, rows, WIDTH: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr):
    """y = silu(x's first half) x's second half; y ``[rows, WIDTH]`` contiguous."""
    p, c, m = _glu_tile(rows, WIDTH, BC, BR)
    b_a = tl.load(x + p * x_st + c, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(x + p * x_st + WIDTH + c, mask=m, other=0.0).to(tl.float32)
    tl.store(y + p * WIDTH + c, (b_a * tl.sigmoid(b_a) * b_b).to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=("rows",))
def swiglu_grad_kernel(x, dx, dy, x_st, dy_st, rows, WIDTH: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr):
    """dx ``[rows, 2 WIDTH]`` contiguous; with (a, b) = x and s the sigmoid of a: s (1 + a (1 - s)) b dy and s a dy."""
    p, c, m = _glu_tile(rows, WIDTH, BC, BR)
    b_a = tl.load(x + p * x_st + c, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(x + p * x_st + WIDTH + c, mask=m, other=0.0).to(tl.float32)
    b_d = tl.load(dy + p * dy_st + c, mask=m, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_a)
    b_d *= b_s
    dx += p * (2 * WIDTH) + c
    tl.store(dx, (b_d * b_b * (1.0 + b_a * (1.0 - b_s))).to(dx.dtype.element_ty), mask=m)
    tl.store(dx + WIDTH, (b_d * b_a).to(dx.dtype.element_ty), mask=m)


@triton.jit
def _add_heads(x, y, i_r, rows, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    """y ``[rows, D]`` = the sum over heads of x ``[rows, GROUP, D]``, both contiguous."""
    p, o_d, m = _tile(i_r, rows, D, BR, BD)
    b_y = tl.zeros([BR, BD], dtype=tl.float32)
    for i in tl.range(GROUP, loop_unroll_factor=4):
        b_y += tl.load(x + (p * GROUP + i) * D + o_d, mask=m, other=0.0).to(tl.float32)
    tl.store(y + p * D + o_d, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=("rows",))
def add_heads_kernel(
    dk, dv, sum_k, sum_v, rows,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Gradients of heads of k and v from those of the query heads that share them."""
    i_r = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        _add_heads(dk, sum_k, i_r, rows, GROUP, K, BK, BR)
    else:
        _add_heads(dv, sum_v, i_r, rows, GROUP, V, BV, BR)


@triton.jit
def _load_heads(x, p, c, m, x_st, x_sh, DIM: tl.constexpr):
    """Columns c of ``x [rows, heads, DIM]`` in fp32."""
    return tl.load(x + p * x_st + (c // DIM).to(tl.int64) * x_sh + c % DIM, mask=m, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("rows", "groups"))
def norm_gate_kernel(
    o, gate, weight, y,  # y contiguous; gate and weight may be None
    o_st, o_sh, gate_st, gate_sh,
    rows, groups, eps,
    WIDTH: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
    V: tl.constexpr, GATE_DIM: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    i_g, i_r = tl.program_id(0) % groups, tl.program_id(0) // groups
    p, c, m = _tile(i_r, rows, WIDTH, BR, BW)
    c += i_g * WIDTH
    b_y = _load_heads(o, p, c, m, o_st, o_sh, V)
    if gate is not None:
        b_g = _load_heads(gate, p, c, m, gate_st, gate_sh, GATE_DIM)
    if NORM:
        b_y *= tl.rsqrt(tl.sum(b_y * b_y, axis=1) / WIDTH + eps)[:, None]
    if weight is not None:
        b_y *= tl.load(weight + c, mask=c < (i_g + 1) * WIDTH, other=0.0).to(tl.float32)
    if gate is not None:
        b_y *= tl.sigmoid(b_g) if SIGMOID else b_g
    tl.store(y + p * (groups * WIDTH) + c, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=("rows", "groups", "steps"))
def norm_gate_grad_kernel(
    o, gate, weight, dy, more, do, dgate, dweight,  # all d... and more contiguous; dweight [programs, groups * WIDTH]
    o_st, o_sh, gate_st, gate_sh,
    rows, groups, steps, eps,
    WIDTH: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
    V: tl.constexpr, GATE_DIM: tl.constexpr, NORM: tl.constexpr, SIGMOID: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``steps`` tiles of tokens per program, and the sum over them for the weight.

    With n = o r the normalised o, w the weight, a = act(gate) and x = a w dy:
    do = r (x - n mean(x n)) + more      dgate = a' w n dy      dweight = sum a n dy
    """
    i_g, i_s = tl.program_id(0) % groups, tl.program_id(0) // groups
    b_dw = tl.zeros([BR, BW], dtype=tl.float32)
    for i in tl.range(steps, num_stages=STAGES):
        p, c, m = _tile(i_s * steps + i, rows, WIDTH, BR, BW)
        c += i_g * WIDTH
        at = p * (groups * WIDTH) + c
        b_n = _load_heads(o, p, c, m, o_st, o_sh, V)
        b_x = tl.load(dy + at, mask=m, other=0.0).to(tl.float32)
        if gate is not None:
            b_g = _load_heads(gate, p, c, m, gate_st, gate_sh, GATE_DIM)
        if NORM:
            b_r = tl.rsqrt(tl.sum(b_n * b_n, axis=1) / WIDTH + eps)[:, None]
            b_n *= b_r
        b_d = b_n * b_x  # n dy
        if weight is not None:
            b_w = tl.load(weight + c, mask=c < (i_g + 1) * WIDTH, other=0.0).to(tl.float32)
            b_x *= b_w
        if gate is not None:
            b_dg = b_d * b_w if weight is not None else b_d
            if SIGMOID:
                b_g = tl.sigmoid(b_g)
                b_dg *= b_g * (1.0 - b_g)
            tl.store(dgate + at, b_dg.to(dgate.dtype.element_ty), mask=m)
            b_x *= b_g
            b_d *= b_g
        if dweight is not None:
            b_dw += b_d
        if NORM:
            b_x = b_r * (b_x - b_n * (tl.sum(b_x * b_n, axis=1) / WIDTH)[:, None])
        if more is not None:
            b_x += tl.load(more + at, mask=m, other=0.0).to(tl.float32)
        tl.store(do + at, b_x.to(do.dtype.element_ty), mask=m)
    if dweight is not None:
        o_w = tl.arange(0, BW)
        at = i_s.to(tl.int64) * (groups * WIDTH) + i_g * WIDTH + o_w
        tl.store(dweight + at, tl.sum(b_dw, axis=0), mask=o_w < WIDTH)


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else x.stride()[:2]


def _split_constants(dims: tuple[int, ...]) -> dict[str, int]:
    """Of both kernels, in their order."""
    q, gate, K, V = dims
    BK, BV = pad(K), pad(V)
    return dict(GROUP=q // K, WIDTH=sum(dims), K_AT=q + gate, K=K, V=V, BK=BK, BV=BV, BR=max(1, TILE // max(BK, BV)))


def split_forward(
    mixed: torch.Tensor, dims: tuple[int, ...], silu_v: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """silu of q, k and, if asked for, v."""
    (s, b, width), constants = mixed.shape, _split_constants(dims)
    heads, group = width // sum(dims), constants["GROUP"]
    sizes = (heads * group, dims[2]), (heads, dims[2]), (heads, dims[3])
    q, k = (mixed.new_empty(s, b, *size) for size in sizes[:2])
    v = mixed.new_empty(s, b, *sizes[2]) if silu_v else None
    if s * b:
        grid = (group + 1 + silu_v) * heads * cdiv(s * b, constants["BR"])
        mixed = flat(mixed)
        numbers = mixed.stride(0), s * b, heads
        launch(split_kernel, grid, (mixed, q, k, v), numbers, tuple(constants.values()), num_warps=4)
    return q, k, v


def split_backward(mixed, dims, silu, dq, dgate, dk, dv) -> torch.Tensor:
    """The gradient of mixed, from those of its parts or None for zeros."""
    (s, b, width), constants = mixed.shape, _split_constants(dims)
    heads, group = width // sum(dims), constants["GROUP"]
    dmixed = mixed.new_empty(s, b, width)
    if s * b:
        grid = (group * (2 if dims[1] else 1) + 2) * heads * cdiv(s * b, constants["BR"])
        mixed, dq, dgate, dk, dv = (flat(x) for x in (mixed, dq, dgate, dk, dv))
        launch(
            split_grad_kernel, grid, (mixed, dmixed, dq, dgate, dk, dv),
            (mixed.stride(0), *_strides(dq), *_strides(dgate), *_strides(dk), *_strides(dv), s * b, heads),
            (*constants.values(), *silu, dims[1] > 0), num_warps=4,
        )  # fmt: skip
    return dmixed


def _norm_gate_constants(o: torch.Tensor, gate: torch.Tensor | None, kind: str, width: int | None) -> dict[str, int]:
    """Of both kernels, in their order."""
    V = o.shape[-1]
    columns = width or V
    BW = pad(columns)
    return dict(
        WIDTH=columns, BW=BW, BR=max(1, TILE // BW), V=V, GATE_DIM=V if gate is None else gate.shape[-1],
        NORM=width is not None, SIGMOID=kind == "sigmoid",
    )  # fmt: skip


def norm_gate_forward(o, gate, weight, kind, width, eps) -> torch.Tensor:
    (s, b, H, V), constants = o.shape, _norm_gate_constants(o, gate, kind, width)
    y, groups = o.new_empty(s, b, H * V), H * V // constants["WIDTH"]
    if s * b:
        o, gate = flat(o), flat(gate)
        launch(
            norm_gate_kernel, groups * cdiv(s * b, constants["BR"]), (o, gate, weight, y),
            (*_strides(o), *_strides(gate), s * b, groups, eps), tuple(constants.values()),
            num_warps=16 if constants["BW"] > TILE else 8,
        )  # fmt: skip
    return y


def norm_gate_backward(
    o, gate, weight, kind, width, eps, dy, learns: bool, more: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, ...]:
    """``(do, dgate, dweight)``; dweight only if the weight ``learns``. ``more`` is added to do."""
    (s, b, H, V), constants = o.shape, _norm_gate_constants(o, gate, kind, width)
    groups, BW, BR = H * V // constants["WIDTH"], constants["BW"], constants["BR"]
    steps = max(1, min(SUMMED // BR, s * b * groups // (BR * PROGRAMS)))
    programs = cdiv(s * b, BR * steps)
    do = o.new_empty(s, b, H, V)
    dgate = None if gate is None else gate.new_empty(gate.shape)
    dweight = torch.empty(programs, H * V, device=o.device, dtype=torch.float32) if learns else None
    if s * b:
        o, gate, more = flat(o), flat(gate), None if more is None else more.contiguous()
        launch(
            norm_gate_grad_kernel, groups * programs, (o, gate, weight, dy.contiguous(), more, do, dgate, dweight),
            (*_strides(o), *_strides(gate), s * b, groups, steps, eps),
            (*constants.values(), 3 if BW <= TILE else 1),  # tiles in flight, as shared memory has room
            num_warps=8 if BW < 1024 else 4 if BW <= TILE else 16,
        )  # fmt: skip
    return do, dgate, dweight.sum(0).to(weight.dtype) if learns else None


def _glu_constants(width: int) -> tuple[int, int, int]:
    """WIDTH, BC and BR of both kernels."""
    BC = min(GLU_COLUMNS, TILE, pad(width))
    return width, BC, TILE // BC


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[..., columns]`` as ``[rows, columns]`` with stride 1 along the last."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def swiglu_forward(x: torch.Tensor) -> torch.Tensor:
    constants = WIDTH, BC, BR = _glu_constants(x.shape[-1] // 2)
    y, x = x.new_empty(*x.shape[:-1], WIDTH), _rows(x)
    if x.numel():
        grid = cdiv(WIDTH, BC) * cdiv(len(x), BR)
        launch(swiglu_kernel, grid, (x, y), (x.stride(0), len(x)), constants, num_warps=4)
    return y


def swiglu_backward(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    constants = WIDTH, BC, BR = _glu_constants(x.shape[-1] // 2)
    dx, x, dy = x.new_empty(x.shape), _rows(x), _rows(dy)
    if x.numel():
        grid = cdiv(WIDTH, BC) * cdiv(len(x), BR)
        numbers = x.stride(0), dy.stride(0), len(x)
        launch(swiglu_grad_kernel, grid, (x, dx, dy), numbers, constants, num_warps=4)
    return dx


def add_heads(dk: torch.Tensor, dv: torch.Tensor, sum_k: torch.Tensor, sum_v: torch.Tensor) -> None:
    """``[B, T, heads, dim]`` of heads that share one are added up in fp32; all four in the same order, without gaps."""
    (B, T, heads, K), V = sum_k.shape, sum_v.shape[-1]
    rows, BK, BV = B * T * heads, pad(K), pad(V)
    BR = max(1, TILE // 2 // max(BK, BV))
    if rows:
        constants = dk.shape[2] // heads, K, V, BK, BV, BR
        launch(add_heads_kernel, 2 * cdiv(rows, BR), (dk, dv, sum_k, sum_v), (rows,), constants, num_warps=4)
