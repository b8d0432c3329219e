"""Residual connections with factors, which specs take in the place of Megatron's ``get_bias_dropout_add``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.jit import jit_fuser


def scaled_residual(alpha: float, beta: float) -> Callable:
    """Spec of y = alpha * residual + beta * dropout(x + bias): MiniMax's residual (transformers, models/minimax).

    Args:
        alpha, beta: fixed factors.

    Returns:
        A function of ``(training, fused)``, which returns one of ``((x, bias), residual, dropout)``; as Megatron's
        fusions/fused_bias_dropout.py. y has the shape and dtype of the residual, which is fp32 in a fp32 residual
        stream.

    Example::

        layer.mlp_bda = scaled_residual(3.5, 1.0)
    """

    def get(training: bool, fused: bool) -> Callable:
        add = _fused if fused else _add

        def add_residual(x_with_bias, residual: torch.Tensor, dropout: float) -> torch.Tensor:
            return add(*x_with_bias, residual, dropout, training, alpha, beta)

        return add_residual

    return get


def _add(x, bias, residual, dropout: float, training: bool, alpha: float, beta: float) -> torch.Tensor:
    if bias is not None:
        x = x + bias
    return alpha * residual + beta * F.dropout(x.to(residual.dtype), dropout, training)


_fused = jit_fuser(_add)
