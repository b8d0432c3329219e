"""Softmax attention from its formula, for any mask."""

from __future__ import annotations

import torch


def softmax_attention(q, k, v, allowed: torch.Tensor, scale: float | None) -> torch.Tensor:
    """q [sq, b, h, d], k, v [sk, b, g, d], allowed [b or 1, 1, sq, sk] -> [sq, b, h * d]."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~allowed, float("-inf")).exp()
    return torch.einsum("bhqk,kbhd->qbhd", weights / weights.sum(-1, keepdim=True), v).flatten(2)


def causal(n: int) -> torch.Tensor:
    return torch.ones(1, 1, n, n, dtype=torch.bool).tril()
