"""Where a pipeline stage keeps the losses of routers that Megatron logs, whether or not it has a router itself."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

_OF_SEQUENCES = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}
_OF_ALL = "global_load_balancing_loss"
_MEAN = "z_loss"


def make_room(config: Any) -> None:
    """Make room for one number a layer, to be added up over the ranks that a router of this stage would name.

    Stages add these numbers up first, and the last one writes them. Megatron 0.19 learns from routers over which ranks
    to add them up then: a last stage without any would write the part of one rank of a sequence. In HybridModel it does
    not count all layers, either, and sizes that differ end the ranks in the first step.
    """
    kinds = config.moe_router_load_balancing_type
    names = [name for kind, name in _OF_SEQUENCES.items() if kind in kinds]  # in a list, or in a name, as there
    names += [_OF_ALL] * ("global_aux_loss" in kinds) + [_MEAN] * (config.moe_z_loss_coeff is not None)
    tracker = get_moe_metrics_tracker()
    for name in names:
        tracker.ensure_initialized(name, config.num_layers + (config.mtp_num_layers or 0))
        if not parallel_state.model_parallel_is_initialized():
            continue
        entry = tracker.metrics[name]
        if name == _MEAN:
            entry.avg_group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        elif name == _OF_ALL:
            entry.reduce_group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            entry.needs_dp_avg = False
        else:
            entry.reduce_group = parallel_state.get_tensor_and_context_parallel_group()
