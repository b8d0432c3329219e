"""Resumes ``--use-distributed-optimizer`` where neither TransformerEngine nor apex brings its Adam.

Symbols:  megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict, .load_state_dict and
          ._set_main_param_and_optimizer_states
Why:      torch's Adam keeps a ``step`` tensor for every parameter, and loading a checkpoint then fails four times over:
          state_dict() asserts that steps exist, before the first one (distrib_optimizer.py:840);
          load_state_dict() gives one ``step`` tensor to all parameters, each of which counts it up (:1032);
          _set_main_param_and_optimizer_states() overwrites the loaded step with that of the empty template, or misses
          it in the fully reshardable format (:1222), and writes to fp32 parameters that require grad (:1225).
Versions: megatron-core 0.19, 0.20
Can go:   when a checkpoint of the distributed optimizer resumes without TransformerEngine and apex, with equal losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._replace import replace

_OWNER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
SYMBOLS = tuple(
    f"{_OWNER}.{name}" for name in ("state_dict", "load_state_dict", "_set_main_param_and_optimizer_states")
)


def _wrap_state_dict(original: Callable) -> Callable:
    def state_dict(self: Any) -> dict:
        from megatron.core.optimizer import distrib_optimizer

        if distrib_optimizer.HAVE_APEX_OR_TE or self.optimizer.state or self.ddp_config.use_megatron_fsdp:
            return original(self)
        # Nothing was stepped yet: the same shape with step 0, which the loaded values replace.
        inner = {key: value for key, value in self.optimizer.state_dict().items() if key != "state"}
        groups = [{k: v for k, v in group.items() if k != "params"} | {"step": 0.0} for group in inner["param_groups"]]
        template: dict[str, Any] = {"optimizer": inner | {"param_groups": groups}}
        if self.grad_scaler:
            template["grad_scaler"] = self.grad_scaler.state_dict()
        return template

    return state_dict


def _wrap_load_state_dict(original: Callable) -> Callable:
    def load_state_dict(self: Any, state_dict: dict) -> None:
        from megatron.core.optimizer import distrib_optimizer

        original(self, state_dict)
        if not distrib_optimizer.HAVE_APEX_OR_TE:
            for state in self.optimizer.state.values():
                if "step" in state:
                    state["step"] = state["step"].clone()

    return load_state_dict


def _wrap_set(original: Callable) -> Callable:
    def _set_main_param_and_optimizer_states(self: Any, model_param: torch.nn.Parameter, tensors: dict) -> None:
        with torch.no_grad():
            original(self, model_param, tensors | {"step": None})  # what is no tensor is not copied

    return _set_main_param_and_optimizer_states


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    effect = "checkpoints resume without TransformerEngine and apex"
    parameters = ("self",), ("self", "state_dict"), ("self", "model_param", "tensors")
    wraps = _wrap_state_dict, _wrap_load_state_dict, _wrap_set
    for symbol, names, wrap in zip(SYMBOLS, parameters, wraps, strict=True):
        replace(symbol, names, wrap, effect)
