"""Output layer and cross entropy in chunks of tokens: no tensor [tokens, vocabulary] exists, forward or backward.

The forward computes the logits of a chunk for the loss. The backward computes them again, overwrites them with their
gradient and adds it to those of hidden states and weight. That costs one more product by the weight than without
chunks; memory for logits does not grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from . import loss, torch_backend
from .backend import choose
from .once import once_differentiable

# Products of bf16 or fp16 that are added to fp32; the first releases with out_dtype want the sum in bf16 as well.
_ADDS_WIDE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    tp_group=None,
    *,
    chunk: int,
    sequence_parallel: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """``vocab_parallel_cross_entropy(hidden @ weight.T, labels)`` in chunks of ``chunk`` tokens.

    Args:
        hidden: ``[s, b, h]``, the same on all ranks; with ``sequence_parallel`` ``[s / tp, b, h]``, this rank's tokens.
        weight: ``[vocabulary / tp, h]``, this rank's slice of the output layer; dtype and device of hidden.
        labels: ``[s, b]`` integers, indices into the whole vocabulary, the same on all ranks.
        tp_group: the ranks that hold the other slices; None if this one has all.
        chunk: tokens whose logits exist at a time. With ``sequence_parallel`` an equal number of them comes from every
            rank, at least one token.
        sequence_parallel: gather the tokens of all ranks, and give each the gradient of its own, chunk by chunk.
        backend: as of ``lightning_attn``.

    Returns:
        ``[s, b]`` fp32 (fp64 of fp64 hidden states). Gradients have the dtypes of hidden and weight; that of weight is
        summed over the chunks in fp32. Kept for the backward: hidden, weight, labels, and one number per token.

    The matrix products are those of the output layer. With fp32 inputs they follow
    ``torch.set_float32_matmul_precision``, as Megatron's own output layer does; the loss of these logits is fp32.

    Raises:
        ValueError: shapes, dtypes or a chunk that do not fit.
    """
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    parts = tp_group.size() if sequence_parallel and tp_group is not None else 1
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be 1 token or more")
    if hidden.dim() != 3 or weight.dim() != 2 or hidden.shape[2] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            "hidden must be [s, b, h] and weight [vocabulary / tp, h]: got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != (parts * hidden.shape[0], hidden.shape[1]):
        raise ValueError(
            f"labels must be [{parts * hidden.shape[0]}, {hidden.shape[1]}], one per token of the {parts} "
            f"sequence-parallel parts {list(hidden.shape)}: got {list(labels.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype or labels.is_floating_point():
        raise ValueError(
            "hidden and weight must be floating point of the same dtype, and labels integers: got "
            f"{hidden.dtype}, {weight.dtype} and {labels.dtype}"
        )
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"hidden, weight and labels must be on one device: got {hidden.device}, {weight.device} and {labels.device}"
        )
    by_torch = choose(backend, hidden) is torch_backend
    index = loss.own_columns(labels.reshape(parts, -1), weight.shape[0], tp_group)
    rows = max(1, chunk // parts)
    hidden = hidden.flatten(0, 1).contiguous()
    return _LinearCrossEntropy.apply(hidden, weight, index, tp_group, rows, by_torch).view(labels.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden [n, h], weight [C, h], index [parts, n] -> loss [parts, n]; ``rows`` of every part at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, index, tp_group, rows, by_torch):
        parts = index.shape[0]
        totals = hidden.new_empty(3, *index.shape, dtype=loss.wide(hidden.dtype))
        for part, _, logits in _chunks(hidden, weight, parts, tp_group, rows):
            totals[:, :, part] = loss.sums(logits, index[:, part].reshape(-1), by_torch).view(3, parts, -1)
        top, total, hit = totals
        log_total, hit = loss.over_ranks(top, total, hit, tp_group)  # once for all tokens: chunks need not wait
        ctx.save_for_backward(hidden, weight, index, log_total)
        ctx.tp_group, ctx.rows, ctx.by_torch = tp_group, rows, by_torch
        return log_total - hit

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        hidden, weight, index, log_total = ctx.saved_tensors
        parts = index.shape[0]
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=loss.wide(weight.dtype)) if ctx.needs_input_grad[1] else None
        for part, x, logits in _chunks(hidden, weight, parts, ctx.tp_group, ctx.rows):
            at, total, grad = (y[:, part].reshape(-1) for y in (index, log_total, dloss))
            dlogits = loss.gradient(logits, at, total, grad, ctx.by_torch, reuse=True)
            if dweight is not None:
                _add_product(dweight, dlogits.t(), x)
            if dhidden is not None and parts == 1:
                torch.mm(dlogits, weight, out=dhidden[part])
            elif dhidden is not None:
                dist.reduce_scatter_tensor(dhidden[part], dlogits @ weight, group=ctx.tp_group)
        if dhidden is not None and parts == 1 and ctx.tp_group is not None:
            dist.all_reduce(dhidden, group=ctx.tp_group)
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, parts: int, tp_group, rows: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Chunks of ``rows`` tokens per part: their slice, hidden states [parts * rows, h], and logits; the next overwrites
    these."""
    tokens = hidden.shape[0]
    logits = hidden.new_empty(parts * min(rows, tokens), weight.shape[0])
    for start in range(0, tokens, rows):
        part = slice(start, min(start + rows, tokens))
        x = hidden[part]
        if parts > 1:
            x = hidden.new_empty(parts * x.shape[0], x.shape[1])
            dist.all_gather_into_tensor(x, hidden[part], group=tp_group)
        yield part, x, torch.mm(x, weight.t(), out=logits[: x.shape[0]])


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, in the dtype of total; elsewhere than on a GPU the product of narrower ones is rounded first."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and _ADDS_WIDE:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
