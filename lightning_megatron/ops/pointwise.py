"""Operations of a layer around the operator, one launch each: split the fused projection, norm and gate the output, and
the gated activation of the MLP.

All are bound by memory, and torch's own operations would read and write the same values several times. The torch
functions below state the formulas and compute on the CPU; everything is fp32 inside and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import torch_backend
from .backend import choose, device_of
from .once import once_differentiable

SILU = {"silu": (True, False), "silu-qkv": (True, True), "none": (False, False)}  # of q and k, and of v
GATES = ("sigmoid", "linear", "none")

Heads = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]


def split_heads(
    mixed: torch.Tensor, dims: tuple[int, int, int, int], *, feature_map: str = "silu", backend: str | None = None
) -> Heads:
    """q, gate, k and v out of the fused projection, with the feature map applied.

    Args:
        mixed: ``[s, b, Hkv * sum(dims)]``, for every key/value head the columns ``q..., gate..., k, v``.
        dims: columns of q (of all query heads of one key/value head), gate (0: none), k and v in one such group.
        feature_map: ``"silu"`` on q and k, ``"silu-qkv"`` on v as well, or ``"none"``.
        backend: as of ``lightning_attn``.

    Returns:
        q ``[s, b, H, K]``, gate ``[s, b, Hkv, H / Hkv * V]`` or None, k ``[s, b, Hkv, K]``, v ``[s, b, Hkv, V]``. What
        is not activated is a view of mixed; only q without feature map is a copy where heads share k and v.
    """
    silu = SILU[feature_map]
    assert mixed.shape[-1] % sum(dims) == 0 and dims[0] % dims[2] == 0, f"{list(mixed.shape)} is not groups of {dims}"
    if choose(backend, mixed) is torch_backend:
        return _split_heads(mixed, dims, silu)
    return _SplitHeads.apply(mixed, dims, silu)


def norm_gate(
    o: torch.Tensor,
    gate: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    *,
    kind: str = "none",
    width: int | None = None,
    eps: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """y = act(gate) * o * rsqrt(mean over a group of o^2 + eps) * weight

    Args:
        o: ``[s, b, H, V]``.
        gate: ``[s, b, G, H * V / G]``, G any; not read if kind is none.
        weight: ``[H * V]``, or None for 1.
        kind: act is the ``"sigmoid"``, or nothing (``"linear"``); ``"none"`` is no gate.
        width: neighbouring channels that are normalised together; divides H * V. None for no norm.
        backend: as of ``lightning_attn``.

    Returns:
        ``[s, b, H * V]`` in the dtype of o.
    """
    assert kind in GATES and (kind == "none" or gate is not None and gate.shape[2:].numel() == o.shape[2:].numel())
    if kind == "none":
        gate = None
    if gate is None and weight is None and width is None:
        return o.flatten(2)
    if choose(backend, o) is torch_backend:
        return _norm_gate(o, gate, weight, kind, width, eps)
    return _NormGate.apply(o, gate, weight, kind, width, eps)


def norm_residual(
    x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 0.0, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, x) with y = x * rsqrt(mean over h of x^2 + eps) * weight: a norm, and what the residual connection takes.

    One launch adds the gradients of both, which autograd would do in another.

    Args:
        x: ``[s, b, h]``.
        weight: ``[h]``, or None for 1.
        backend: as of ``lightning_attn``.

    Returns:
        y and x ``[s, b, h]``; x in the memory of the argument.

    Example::

        y, residual = norm_residual(hidden, weight, eps=1e-5)
        hidden = residual + attention(y)
    """
    if choose(backend, x) is torch_backend:
        return _norm_gate(x.unsqueeze(2), None, weight, "none", x.shape[-1], eps), x
    return _NormResidual.apply(x, weight, eps)


def swiglu(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """y = silu(a) * b with (a, b) the halves of x (Shazeer 2020, arXiv 2002.05202, section 2); x alone is kept.

    Args:
        x: ``[..., 2 F]``.
        backend: as of ``lightning_attn``.

    Returns:
        ``[..., F]`` in the dtype of x.

    Raises:
        ValueError: x has no two halves.

    Example::

        y = swiglu(torch.randn(8, 2, 1024, device="cuda"))  # [8, 2, 512]
    """
    if x.dim() < 2 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {list(x.shape)}; its last dimension must hold two halves, [..., 2 F]")
    return _SwiGLU.apply(x, choose(backend, x) is torch_backend)


def _views(mixed: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """The four parts of every key/value head, [s, b, Hkv, dim] each."""
    return mixed.unflatten(-1, (mixed.shape[-1] // sum(dims), sum(dims))).split(dims, dim=-1)


def _split_heads(mixed: torch.Tensor, dims: tuple[int, ...], silu: tuple[bool, bool]) -> Heads:
    q, gate, k, v = _views(mixed, dims)
    q = q.unflatten(-1, (dims[0] // dims[2], dims[2])).flatten(2, 3)
    if silu[0]:
        q, k = F.silu(q), F.silu(k)
    return q, gate if dims[1] else None, k, F.silu(v) if silu[1] else v


def _norm_gate(o, gate, weight, kind: str, width: int | None, eps: float) -> torch.Tensor:
    wide = torch.promote_types(o.dtype, torch.float32)
    y = o.flatten(2).to(wide)
    if width is not None:
        y = F.rms_norm(y.unflatten(-1, (y.shape[-1] // width, width)), (width,), None, eps).flatten(-2)
    if weight is not None:
        y = y * weight.to(wide)
    if gate is not None:
        gate = gate.flatten(2).to(wide)
        y = y * (gate.sigmoid() if kind == "sigmoid" else gate)
    return y.to(o.dtype)


class _SplitHeads(torch.autograd.Function):
    """``_split_heads`` by Triton; its backward writes the gradient of mixed whole."""

    @staticmethod
    def forward(ctx, mixed, dims, silu):
        from .triton import pointwise as pointwise_kernels

        heads: Heads
        if silu[0]:
            _, gate, _, v = _views(mixed, dims)
            with device_of(mixed):
                q, k, activated_v = pointwise_kernels.split_forward(mixed, dims, silu[1])
            heads = q, gate if dims[1] else None, k, v if activated_v is None else activated_v
        else:
            heads = _split_heads(mixed, dims, silu)
        ctx.save_for_backward(mixed)
        ctx.dims, ctx.silu = dims, silu
        ctx.set_materialize_grads(False)
        return heads

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dgate, dk, dv):
        from .triton import pointwise as pointwise_kernels

        (mixed,) = ctx.saved_tensors
        return pointwise_kernels.split_backward(mixed, ctx.dims, ctx.silu, dq, dgate, dk, dv), None, None


class _NormGate(torch.autograd.Function):
    """``_norm_gate`` by Triton; keeps nothing but its inputs for the backward."""

    @staticmethod
    def forward(ctx, o, gate, weight, kind, width, eps):
        from .triton import pointwise as pointwise_kernels

        ctx.save_for_backward(o, gate, weight)
        ctx.options = kind, width, eps
        with device_of(o):
            return pointwise_kernels.norm_gate_forward(o, gate, weight, kind, width, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        from .triton import pointwise as pointwise_kernels

        o, gate, weight = ctx.saved_tensors
        kind, width, eps = ctx.options
        learns = ctx.needs_input_grad[2]
        grads = pointwise_kernels.norm_gate_backward(o, gate, weight, kind, width, eps, dy, learns)
        return *grads, None, None, None


class _NormResidual(torch.autograd.Function):
    """``_norm_gate`` without a gate, and its input once more, by Triton."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        from .triton import pointwise as pointwise_kernels

        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        with device_of(x):
            y = pointwise_kernels.norm_gate_forward(x.unsqueeze(2), None, weight, "none", x.shape[-1], eps)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dx):
        from .triton import pointwise as pointwise_kernels

        if dy is None:
            return dx, None, None
        x, weight = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]
        dx, _, dweight = pointwise_kernels.norm_gate_backward(
            x.unsqueeze(2), None, weight, "none", x.shape[-1], ctx.eps, dy, learns, more=dx
        )
        return dx.squeeze(2), dweight, None


class _SwiGLU(torch.autograd.Function):
    """Keeps x alone for the backward, with torch's operations as well: what MLPs keep is most of a layer's memory."""

    @staticmethod
    def forward(ctx, x, by_torch):
        ctx.save_for_backward(x)
        ctx.by_torch = by_torch
        if by_torch:
            a, b = _halves(x)
            y = F.silu(a) * b
            # torch.compile (2.11) takes an output of to() that changes nothing for one without a gradient: dx is 0
            return y if y.dtype == x.dtype else y.to(x.dtype)
        from .triton import pointwise as pointwise_kernels

        with device_of(x):
            return pointwise_kernels.swiglu_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if ctx.by_torch:
            a, b = _halves(x)
            s, dy = a.sigmoid(), dy.to(a.dtype)
            return torch.cat((dy * b * s * (1 + a * (1 - s)), dy * a * s), -1).to(x.dtype), None
        from .triton import pointwise as pointwise_kernels

        return pointwise_kernels.swiglu_backward(x, dy), None


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves of x, in fp32 at least."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return a, b
