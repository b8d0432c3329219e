"""Resumes ``--optimizer sgd``.

Symbol:   megatron.core.optimizer.optimizer.MegatronOptimizer.__init__
Why:      a checkpoint is read into states that exist, and Megatron has no function that makes those of SGD: every
          ``--load`` of a training by SGD ends with "'NoneType' object is not callable".
Versions: megatron-core 0.19, 0.20
Can go:   when a checkpoint of --optimizer sgd resumes with equal losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._replace import replace

SYMBOLS = ("megatron.core.optimizer.optimizer.MegatronOptimizer.__init__",)


def momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """The state of SGD before its first step; with these zeros it is the one that it would make itself."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _wrap(original: Callable) -> Callable:
    def __init__(self: Any, optimizer: Any, config: Any, init_state_fn: Any = lambda x: None) -> None:
        if init_state_fn is None and getattr(config, "optimizer", None) == "sgd" and optimizer is not None:
            init_state_fn = momentum
        original(self, optimizer, config, init_state_fn)

    return __init__


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], ("self", "optimizer", "config", "init_state_fn"), _wrap, "checkpoints of SGD resume")
