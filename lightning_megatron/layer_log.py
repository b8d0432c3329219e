"""Norms of the states and gradients of every lightning layer, for TensorBoard (``--lightning-log-norms``).

Ranks hold parts: heads (tensor parallel), sequences (data parallel), layers (pipeline), parts of gradients (distributed
optimizer), and copies. Each rank sums the squares that it has, divided by the number of ranks that have them, too; one
sum over all ranks, at the steps that are logged, gives the squares of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


class StateSums:
    """Of one layer: sum of the squares of final states, and how many states there were; on the device, never read."""

    def __init__(self) -> None:
        self.values: torch.Tensor | None = None  # fp32 [2]

    @torch.no_grad()
    def add(self, states: torch.Tensor) -> None:
        """states ``[N, H, K, V]``: those behind the last tokens of N sequences or documents, of this rank's heads."""
        new = torch.stack((states.float().square().sum(), states.new_tensor(len(states), dtype=torch.float32)))
        self.values = new if self.values is None else self.values.add_(new)

    def take(self) -> torch.Tensor | None:
        """The two, which begin at 0 again."""
        values, self.values = self.values, None
        return values


def lightning_layers(
    chunks: Iterable[torch.nn.Module], layers: int
) -> Iterator[tuple[torch.nn.Module, torch.nn.Module, int]]:
    """Each lightning attention whose norms are logged, with Megatron's DDP around its part of the model, and its index.

    Layers of multi-token prediction, which count by themselves, follow the ``layers`` of the model.
    """
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if getattr(module, "state_sums", None) is not None:
                yield chunk, module, module.layer_number - 1 + layers * ("mtp.layers." in name)


def squares(chunks: Iterable[torch.nn.Module], layers: int, ahead: int, loss_scale: float) -> torch.Tensor:
    """What this rank adds to the sums over all ranks.

    Args:
        chunks: Megatron's DDP modules, with the gradients that the optimizer will take.
        layers, ahead: of the model, and of multi-token prediction.
        loss_scale: factor on these gradients (fp16), which is taken out.

    Returns:
        fp64 ``[3, layers + ahead]``: squares of states, number of states, squares of gradients, for every layer.
    """
    found = torch.zeros(3, layers + ahead, dtype=torch.float64, device=torch.cuda.current_device())
    for ddp, attention, index in lightning_layers(chunks, layers):
        row, tp = found[:, index], attention.tp_group.size()
        states = attention.state_sums.take()
        if states is not None:
            # Each rank has all sequences of its own heads: a state counts once for tp ranks, its squares as they are.
            row[:2] += states.double() / states.new_tensor([1, tp])
        for name, parameter in attention.named_parameters():
            if parameter.requires_grad and ".layer_norm_" not in name:  # of TransformerEngine: the norm before
                gradient, copies = gradient_here(ddp, parameter)
                copies *= 1 if getattr(parameter, "tensor_model_parallel", False) else tp
                row[2] += gradient.double().square().sum() / copies
    found[2] /= loss_scale**2
    return found


def gradient_here(ddp: torch.nn.Module, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, int]:
    """The part of a summed gradient that this rank has, and how many data-parallel ranks have the same part."""
    group = ddp.param_to_bucket_group[parameter]
    ranks = ddp.dp_cp_group.size()
    if not ddp.ddp_config.use_distributed_optimizer:
        return parameter.main_grad, ranks
    bucket = next(bucket for bucket in group.buckets if parameter in bucket.params)
    shared = group.intra_distributed_optimizer_instance_group
    size = bucket.grad_data.numel() // shared.size()
    first, end = bucket.param_to_index[parameter]
    first, end = max(first, size * shared.rank()), min(end, size * (shared.rank() + 1))
    return bucket.grad_data.view(-1)[first : max(first, end)], ranks // shared.size()


def norms(total: torch.Tensor) -> tuple[list[float], list[float]]:
    """``squares``, summed over all ranks -> state norms and gradient norms, nan for layers that are not lightning.

    A state norm is sqrt(mean of ||S||_F^2 over sequences), S all heads of a layer.
    """
    states, number, gradients = total
    none = torch.full_like(states, float("nan"))
    state = torch.where(number > 0, (states / number).sqrt(), none)
    return state.tolist(), torch.where(number > 0, gradients.sqrt(), none).tolist()
