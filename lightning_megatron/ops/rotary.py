"""Rotary position embedding in one launch each way."""

from __future__ import annotations

import math

import torch

from . import torch_backend
from .backend import choose, device_of


def rotary(
    x: torch.Tensor,
    angles: torch.Tensor,
    *,
    scale: float = 1.0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """(a, b) -> scale (a cos t - b sin t, b cos t + a sin t), of pairs of channels (Su et al. 2021, arXiv 2104.09864,
    section 3.2.2).

    Sines, cosines and products are fp32, and rounded once. x is not kept for the backward.

    Args:
        x: ``[s, b, heads, D]``; bf16, fp16 or fp32, by torch fp64, too.
        angles: ``[s, n]`` of every position, in fp32 or fp64 and in radians; the first 2 n channels are turned, others
            stay as they are.
        scale: of what is turned (YaRN's concentration).
        interleaved: pair i is the channels (2 i, 2 i + 1), and not (i, i + n).
        interleaved_out: where the pairs of the result stand; by default where they stood.
        backend: as of ``lightning_attn``.

    Returns:
        ``[s, b, heads, D]`` in the dtype of x.

    Raises:
        ValueError: angles of other positions, or of more channels than x has.

    Example::

        positions, inverse = torch.arange(8.0, device="cuda"), 10000 ** (-torch.arange(0, 64, device="cuda") / 64)
        q = rotary(torch.randn(8, 2, 16, 128, device="cuda"), positions[:, None] * inverse)
    """
    if x.dim() != 4 or angles.dim() != 2 or len(angles) != len(x) or 2 * angles.shape[1] > x.shape[-1]:
        raise ValueError(
            f"angles have shape {list(angles.shape)} and x {list(x.shape)}; they must be [s, n] and [s, b, heads, D] "
            "with 2 n <= D"
        )
    if angles.requires_grad:
        raise ValueError("angles learn, and rotary has no gradient for them; detach them")
    pairs = interleaved, interleaved if interleaved_out is None else interleaved_out
    if choose(backend, x) is torch_backend:
        return _turn(x, angles, scale, *pairs)
    if angles.dtype == torch.float64:  # of large ones fp32 would round off the part of a turn
        angles = angles.remainder(2 * math.pi).float()
    return _Rotary.apply(x, angles, scale, pairs)


def _turn(x: torch.Tensor, angles: torch.Tensor, scale: float, interleaved: bool, interleaved_out: bool):
    n = angles.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x[..., : 2 * n].to(wide), x[..., 2 * n :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    angles = angles.to(torch.promote_types(angles.dtype, wide))[:, None, None]
    cos, sin = (f(angles).to(wide) * scale for f in (torch.cos, torch.sin))
    both = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(both, -1).flatten(-2) if interleaved_out else torch.cat(both, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


class _Rotary(torch.autograd.Function):
    """``_turn`` by Triton. The gradient is turned back."""

    @staticmethod
    def forward(ctx, x, angles, scale, pairs):
        from .triton import rotary as rotary_kernels

        # Megatron memoizes its table, maybe made in inference mode: autograd saves no tensor of that
        ctx.angles = angles if angles.is_inference() else None
        ctx.save_for_backward(None if angles.is_inference() else angles)
        ctx.options = scale, pairs
        with device_of(x):
            return rotary_kernels.turn(x, angles, scale, *pairs, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        from .triton import rotary as rotary_kernels

        (saved,), (scale, (interleaved, interleaved_out)) = ctx.saved_tensors, ctx.options
        angles = ctx.angles if saved is None else saved
        return rotary_kernels.turn(dy, angles, scale, interleaved_out, interleaved, back=True), None, None, None
