"""Megatron's TransformerLayer, recomputed in chunks of its tokens: no tensor inside of it is longer than a chunk.

Full recompute runs a layer's forward twice, and its second run keeps all that the backward needs: about 50 h bytes a
token (docs/memory.md). Here the second run does nothing. The backward goes through the chunks from the last to the
first, and for each computes the forward again and differentiates it at once. Products and their number are those of
full recompute; gradients of weights are summed over the chunks in fp32 and rounded once.

A lightning layer is computed whole, chunk after chunk, as each hands its state to the next one: the recurrence itself
(Lightning Attention-2, arXiv:2401.04658, section 3.2). Packed documents may begin and end anywhere in chunks. Where a
chunk cannot be computed by itself, in softmax layers and over context-parallel ranks, that holds for the MLP with its
norm and residual, as in tiled MLPs (ALST, Bekman et al. 2025, arXiv:2506.13996). Layers with experts are left whole, as
their routing looks at all tokens.

Sequence-parallel ranks exchange their rows first, so that each holds its part of every chunk (``parallel.interleave``),
and afterwards again: five exchanges a layer and step, of s / P rows each, beside the 14 times s rows that are gathered
or summed in its projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.transformer_layer import TransformerLayer

from .mixer import LightningAttention
from .parallel import recompute
from .parallel.interleave import Interleave, interleave

# step(x [n, b, h], state before or None, rows) -> (output [n, b, h], state after or None)
Step = Callable[[torch.Tensor, torch.Tensor | None, slice], tuple[torch.Tensor, torch.Tensor | None]]
_KEY = "a layer in chunks"


class ChunkedLayer(TransformerLayer):
    """A TransformerLayer; one with experts is left whole.

    Args:
        config, submodules, layer_number, others: as Megatron's.
        recompute_chunk: tokens of a chunk, over all sequences of a microbatch and all sequence-parallel ranks.

    It is Megatron's own layer where nothing is recomputed, while generating, and where a microbatch is one chunk.
    """

    def __init__(self, config, submodules, *args: Any, recompute_chunk: int, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.recompute_chunk = recompute_chunk
        attention = self.self_attention
        self.passes_state = isinstance(attention, LightningAttention) and attention.pg_collection.cp.size() == 1

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """hidden ``[s, b, h]`` -> ``(output [s, b, h], context)``."""
        if not (self.passes_state and not args and self._in_chunks(hidden_states, kwargs.get("inference_context"))):
            return super().forward(hidden_states, *args, **kwargs)
        plain, rows, ranks = super().forward, self._rows(hidden_states), self._ranks()
        group, tokens = self.self_attention.pg_collection.tp, ranks * hidden_states.shape[0]
        order = interleave(group, hidden_states.shape[0], rows) if ranks > 1 else None

        def step(x: torch.Tensor, state: torch.Tensor | None, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
            with self.self_attention.passing(state, ranks * part.start, tokens) as passed:
                output, _ = plain(x, **kwargs | {"attention_mask": None})
            return output, passed.state

        return in_chunks(step, hidden_states, rows, list(self.parameters()), order), None

    def _forward_mlp(
        self, hidden_states: torch.Tensor, inference_context: Any = None, **kwargs: Any
    ) -> torch.Tensor | list[torch.Tensor | None]:
        plain = partial(super()._forward_mlp, inference_context=inference_context)
        if not self._in_chunks(hidden_states, inference_context):
            return plain(hidden_states, **kwargs)
        parameters = [*self.pre_mlp_layernorm.parameters(), *self.mlp.parameters()]
        return in_chunks(lambda x, *_: (plain(x), None), hidden_states, self._rows(hidden_states), parameters)

    def _in_chunks(self, hidden_states: torch.Tensor, inference_context: Any) -> bool:
        """Whether there are chunks, and this is a run without gradients, or one whose output nobody reads."""
        if self.is_moe_layer or inference_context is not None or hidden_states.shape[0] <= self._rows(hidden_states):
            return False
        return not torch.is_grad_enabled() or (recompute.recomputing() and is_checkpointing())

    def _rows(self, hidden_states: torch.Tensor) -> int:
        """Of ``hidden_states``, in a chunk."""
        return max(1, self.recompute_chunk // (self._ranks() * hidden_states.shape[1]))

    def _ranks(self) -> int:
        """That share a sequence of hidden states."""
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1


def in_chunks(
    step: Step,
    x: torch.Tensor,
    rows: int,
    parameters: Sequence[torch.nn.Parameter],
    order: Interleave | None = None,
) -> torch.Tensor:
    """``step`` over chunks of ``rows`` of x, each beginning with the state that the one before it ended with.

    Without gradients it computes. With gradients, in the second run of a checkpoint (``parallel.exchange_once``), it
    returns a tensor without values, as the checkpoint's output is in use already, and the backward computes.

    Args:
        step: makes the same in every call; random numbers would be others. It may use x, its state and
            ``parameters``, and nothing else that needs gradients.
        x: ``[s, b, h]``.
        parameters: all whose gradients the backward shall give, with and without ``requires_grad``.
        order: brings the rows of x into the order of chunks, where ranks hold parts of the sequence.

    Returns:
        ``[s, b, h]``, dtype of x.
    """
    if torch.is_grad_enabled():
        states = recompute.take(_KEY)
        assert states is not None, "a layer in chunks is recomputed, but its first run kept nothing"
        return _InChunks.apply(step, rows, states, order, x, *(p for p in parameters if p.requires_grad))
    x = x if order is None else order.enter(x)
    output, states, state = torch.empty_like(x), [], None
    for part in _parts(x, rows):
        states.append(state)
        output[part], state = step(x[part], state, part)
    recompute.put(_KEY, states)
    return output if order is None else order.leave(output)


def _parts(x: torch.Tensor, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows)]


class _InChunks(torch.autograd.Function):
    """x [s, b, h] -> [s, b, h] without values; ``states`` is what every chunk begins with."""

    @staticmethod
    def forward(ctx, step, rows, states, order, x, *parameters):
        ctx.step, ctx.rows, ctx.states, ctx.order, ctx.parameters = step, rows, states, order, parameters
        ctx.save_for_backward(x)
        return x.new_empty(1).expand(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if ctx.order is not None:
            x, dy = ctx.order.enter(x), ctx.order.enter(dy)
        dx, dstate = torch.empty_like(x), None
        sums: list[torch.Tensor | None] = [None] * len(ctx.parameters)
        for part, state in reversed(list(zip(_parts(x, ctx.rows), ctx.states, strict=True))):
            values = x[part].detach().requires_grad_()
            begin = [] if state is None else [state.detach().requires_grad_()]
            with torch.enable_grad():
                y, end = ctx.step(values, begin[0] if begin else None, part)
            outputs, grads = [y], [dy[part]]
            if dstate is not None:
                outputs, grads = [y, end], [dy[part], dstate]
            inputs = [values, *begin, *ctx.parameters]
            dx[part], *others = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
            dstate = others.pop(0) if begin else None
            _add(sums, others)
        dparameters = [None if t is None else t.to(p.dtype) for t, p in zip(sums, ctx.parameters, strict=True)]
        dx = dx if ctx.order is None else ctx.order.leave(dx)
        return None, None, None, None, dx, *dparameters


def _add(sums: list[torch.Tensor | None], values: Sequence[torch.Tensor | None]) -> None:
    """sums += values, in fp32 or wider."""
    for i, value in enumerate(values):
        total = sums[i]
        if value is None:
            continue
        if total is None:
            sums[i] = value.to(torch.promote_types(value.dtype, torch.float32))
        else:
            total += value
