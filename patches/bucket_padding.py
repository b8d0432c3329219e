"""Saves the right states where a buffer of the distributed optimizer has padding between its buckets.

Symbol:   megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable
Why:      it gathers states without the padding at the ends of buckets, and then looks for each parameter where the
          padding still counts: all behind the first padded bucket are saved shifted, the last one filled up with
          zeros, "which can lead to data corruption", as its log says. They are loaded as weights. Buckets are several
          with --overlap-grad-reduce, and where tied embeddings meet pipeline stages.
Versions: megatron-core 0.19, 0.20
Can go:   when --dist-ckpt-optim-fully-reshardable resumes with equal losses where a bucket has padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._replace import replace

SYMBOLS = ("megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable",)
PARAMETERS = ("self", "model_sharded_state_dict", "is_loading", "metadata")


def with_padding(states: torch.Tensor, buffer: Any) -> torch.Tensor:
    """The states of all buckets of a buffer, each where its bucket begins in it; zeros in between."""
    found, at = states.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        found[bucket.offset :][: bucket.numel_unpadded] = states[at : at + bucket.numel_unpadded]
        at += bucket.numel_unpadded
    return found


def _wrap(original: Callable) -> Callable:
    def sharded_param_state_fully_reshardable(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict | None = None
    ) -> Any:
        gather = self.get_parameter_state_dp_zero

        def gathered(*args: Any, **kwargs: Any) -> dict | None:
            state = gather(*args, **kwargs)
            for number, buffer in enumerate(self.buffers if state is not None else ()):
                if buffer.numel_unpadded == buffer.numel:
                    continue
                for tensors in state[number].values():
                    for name, value in tensors.items():
                        if isinstance(value, torch.Tensor):
                            tensors[name] = with_padding(value, buffer)
            return state

        self.get_parameter_state_dp_zero = gathered  # for this call alone: files of other formats have no padding
        try:
            return original(self, model_sharded_state_dict, is_loading, metadata)
        finally:
            del self.get_parameter_state_dp_zero

    return sharded_param_state_fully_reshardable


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], PARAMETERS, _wrap, "states are saved right where buckets have padding")
