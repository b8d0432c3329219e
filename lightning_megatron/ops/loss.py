"""Cross entropy over a vocabulary that is split over tensor-parallel ranks: reads logits once forward, once backward.

Megatron's own (core/fusions/fused_cross_entropy.py) copies them to fp32 and passes over the copy several times, which
takes 4 to 8% of a training step with a vocabulary of 32,000.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from . import torch_backend
from .backend import choose, device_of
from .once import once_differentiable


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, tp_group=None, *, backend: str | None = None
) -> torch.Tensor:
    """loss = log( sum_c exp(logits_c) ) - logits_target, of every token

    Args:
        logits: ``[..., vocabulary / tp]``, this rank's slice; slices are equal and in the order of ranks.
        targets: ``[...]`` integers, indices into the whole vocabulary, the same on all ranks. An index outside gives
            the logarithm alone as loss, to be masked.
        tp_group: the ranks that hold the other slices; None if this one has all.
        backend: as of ``lightning_attn``.

    Returns:
        ``[...]`` fp32 (fp64 of fp64 logits). Gradients of logits have their dtype. Kept for the backward: logits, and
        one number per token. No matrix products: ``torch.set_float32_matmul_precision`` changes nothing.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if logits.shape[:-1] != targets.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"targets must have the shape of logits without the last dimension, a vocabulary of 1 or more: got "
            f"{list(targets.shape)} for logits {list(logits.shape)}"
        )
    if not logits.is_floating_point() or targets.is_floating_point() or targets.device != logits.device:
        raise ValueError(
            "logits must be floating point and targets integers on the same device: got "
            f"{logits.dtype} on {logits.device} and {targets.dtype} on {targets.device}"
        )
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    return _CrossEntropy.apply(logits, targets, tp_group, choose(backend, logits) is torch_backend)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, tp_group, by_torch):
        shape, columns = logits.shape, logits.shape[-1]
        logits, index = logits.reshape(-1, columns), own_columns(targets.reshape(-1), columns, tp_group)
        top, total, hit = sums(logits, index, by_torch)
        log_total, hit = over_ranks(top, total, hit, tp_group)
        ctx.save_for_backward(logits, index, log_total)
        ctx.by_torch, ctx.shape = by_torch, shape
        return (log_total - hit).view(shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, index, log_total = ctx.saved_tensors
        dlogits = gradient(logits, index, log_total, dloss.reshape(-1), ctx.by_torch)
        return dlogits.view(ctx.shape), None, None, None


def own_columns(targets: torch.Tensor, columns: int, tp_group) -> torch.Tensor:
    """Targets as indices into the columns of this rank, or outside of them."""
    return targets if tp_group is None else targets - tp_group.rank() * columns


def sums(logits: torch.Tensor, index: torch.Tensor, by_torch: bool) -> torch.Tensor:
    """[3, N], of every row of logits [N, C]: the largest, exp(logit - largest) summed, the logit at index or 0."""
    if by_torch:
        return _sums(logits, index)
    from .triton import loss as loss_kernels

    with device_of(logits):
        return loss_kernels.sums(logits, index)


def over_ranks(
    top: torch.Tensor, total: torch.Tensor, hit: torch.Tensor, tp_group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithm of the sum of exp over all ranks' columns, and the logit at the target or 0."""
    if tp_group is not None:
        local, top = top, top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=tp_group)
        both = torch.stack((total * torch.exp(local - top), hit))
        dist.all_reduce(both, group=tp_group)
        total, hit = both
    return top + torch.log(total), hit


def gradient(
    logits: torch.Tensor,
    index: torch.Tensor,
    log_total: torch.Tensor,
    dloss: torch.Tensor,
    by_torch: bool,
    *,
    reuse=False,
) -> torch.Tensor:
    """(softmax - 1 at index) dloss, of rows; ``reuse`` writes it over logits, which have to be contiguous."""
    if by_torch:
        return _gradient(logits, index, log_total, dloss)
    from .triton import loss as loss_kernels

    return loss_kernels.gradient(logits, index, log_total, dloss, logits if reuse else None)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _mine(index: torch.Tensor, columns: int) -> torch.Tensor:
    return (index >= 0) & (index < columns)


def _sums(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    x, columns = logits.to(wide(logits.dtype)), logits.shape[-1]
    top = x.amax(-1)
    total = torch.exp(x - top.clamp(min=torch.finfo(x.dtype).min)[:, None]).sum(-1)  # all of them -inf: 0
    hit = x.gather(1, index.clamp(0, columns - 1)[:, None]).squeeze(1)
    return torch.stack((top, total, torch.where(_mine(index, columns), hit, 0.0)))


def _gradient(logits: torch.Tensor, index: torch.Tensor, log_total: torch.Tensor, dloss: torch.Tensor) -> torch.Tensor:
    columns = logits.shape[-1]
    y = torch.exp(logits.to(wide(logits.dtype)) - log_total[:, None])
    y.scatter_add_(1, index.clamp(0, columns - 1)[:, None], -_mine(index, columns).to(y.dtype)[:, None])
    return (y * dloss[:, None]).to(logits.dtype)
