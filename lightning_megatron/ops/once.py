"""Backwards without a second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def once_differentiable(backward: Callable) -> Callable:
    """As torch's, but second derivatives are refused always.

    Torch's looks at the gradients of the outputs alone. Where these are constants, as under ``o.sum()`` or a loss, it
    returns constants with ``create_graph=True``, though they depend on the inputs, and a penalty on them trains
    nothing, silently.
    """

    def with_inputs(ctx: Any, _: torch.Tensor, *grads: Any) -> Any:
        return backward(ctx, *grads)

    fenced = torch.autograd.function.once_differentiable(with_inputs)

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():  # autograd is in this mode without create_graph
            return backward(ctx, *grads)
        return fenced(ctx, torch.empty(0, requires_grad=True), *grads)  # some input requires grad, or nobody would ask

    return once
