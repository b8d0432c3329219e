"""Writes norms of states and gradients of every lightning layer to TensorBoard, and Weights & Biases.

Symbol:   megatron.training.training.finalize_model_grads
Why:      Megatron logs the norm of all gradients together, which does not tell the layer that grows, and knows nothing
          of states. Here gradients are summed over ranks, and neither clipped nor overwritten.
Versions: megatron-core 0.19, 0.20
Can go:   when a layer can give values of its own to Megatron's log.

Applied for ``--lightning-log-norms`` alone. Every ``--tensorboard-log-interval`` steps it costs a pass over the
gradients of lightning layers, a sum of 3 numbers a layer over all ranks, and the wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..layer_log import norms, squares
from ._replace import replace

SYMBOLS = ("megatron.training.training.finalize_model_grads",)
PARAMETERS = ("model", "num_tokens", "pg_collection", "force_all_reduce")


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def finalize_model_grads(
        model: Any, num_tokens: Any = None, pg_collection: Any = None, force_all_reduce: bool | None = False
    ) -> Any:
        result = original(model, num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
        from megatron.training.global_vars import get_args

        args = get_args()
        if (args.curr_iteration + 1) % args.tensorboard_log_interval == 0:
            write(model, args.curr_iteration + 1, args.num_layers, args.mtp_num_layers or 0)
        return result

    return finalize_model_grads


def write(model: list[torch.nn.Module], iteration: int, layers: int, ahead: int) -> None:
    """Sum over all ranks, and write on the one that writes."""
    from megatron.core.utils import get_model_config
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    scaled = get_model_config(model[0]).grad_scale_func
    scale = 1.0 if scaled is None else float(scaled(torch.ones(1, device=torch.cuda.current_device())))
    total = squares(model, layers, ahead, scale)
    torch.distributed.all_reduce(total)
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if not writer:
        return
    for kind, values in zip(("state", "grad"), norms(total), strict=True):
        for layer, value in enumerate(values):
            if not math.isnan(value):
                name = f"lightning-{kind}-norm/layer-{layer:03d}"
                writer.add_scalar(name, value, iteration)
                if wandb:
                    wandb.log({name: value}, iteration)


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], PARAMETERS, _wrap, "norms of lightning layers are written where losses are")
