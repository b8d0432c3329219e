"""Selective recompute of a lightning layer: what lies between its projections is computed again in the backward.

Megatron's ``tensor_parallel.checkpoint`` would keep the result, which ``linear_proj`` saves, and its
``CheckpointWithoutOutput`` compiles C++ in the first backward and hides parameters from CUDA graphs, which capture the
gradients of parameters that they find in the autograd graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

# [s, b, channels] -> (output, bias or None)
Consumer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def recomputed(
    function: Callable[..., torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    consumer: Consumer,
    *inputs: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``consumer(function(*inputs))``, of which ``inputs`` are kept, and what consumer saves beside its argument.

    The memory of ``function``'s result is given back as soon as the consumer has run. When the gradient of the
    consumer's output arrives, function runs again, and its result takes the place of the first one.

    Args:
        function: makes the same in every call, without random numbers; its result is no view of ``inputs``.
        parameters: all that function uses.
        consumer: may save its argument, or views of it, for its backward, and must not return it.
    """
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        return consumer(function(*inputs))
    region = _Region(function, len(inputs))
    y = _Recomputed.apply(region, *inputs, *(p for p in parameters if p.requires_grad))
    output, bias = consumer(y)
    region.first, region.size = y.detach(), y.untyped_storage().nbytes()
    region.forget()
    output.register_hook(region.restore)
    return output, bias


def parameters_of(*modules: torch.nn.Module | None) -> list[torch.nn.Parameter]:
    return [p for module in modules if module is not None for p in module.parameters()]


class _Region:
    """One call of a function, from its forward to its backward."""

    def __init__(self, function: Callable[..., torch.Tensor], inputs: int) -> None:
        self.function, self.inputs = function, inputs
        self.context: Any = None  # weak reference to what holds the inputs, which holds this
        self.first: torch.Tensor | None = None  # the result of the first run, mostly without memory
        self.size = 0  # of that memory, in bytes
        self.second: tuple[torch.Tensor, list[torch.Tensor | None]] | None = None  # of the second: result and inputs

    def forget(self) -> None:
        assert self.first is not None
        self.first.untyped_storage().resize_(0)

    def again(self) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        if self.second is None:
            saved = self.context().saved_tensors[: self.inputs]
            leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in saved]
            with torch.enable_grad():
                self.second = self.function(*leaves), leaves
        return self.second

    def restore(self, _gradient: torch.Tensor) -> None:
        """Hook of the consumer's output: before its backward reads what it has saved."""
        first, (y, _) = self.first, self.again()
        assert first is not None and first.stride() == y.stride()
        first.untyped_storage().resize_(self.size)
        first.data.copy_(y.detach())  # .data: the same values are no change that autograd must refuse


class _Recomputed(torch.autograd.Function):
    """inputs, parameters -> function(*inputs)."""

    @staticmethod
    def forward(ctx, region, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.region, region.context = region, weakref.ref(ctx)
        return region.function(*tensors[: region.inputs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        region = ctx.region
        (y, leaves), parameters = region.again(), ctx.saved_tensors[region.inputs :]
        region.second = None
        region.forget()
        wanted = [x for x in (*leaves, *parameters) if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        grads = [next(found) if x is not None and x.requires_grad else None for x in (*leaves, *parameters)]
        return None, *grads
