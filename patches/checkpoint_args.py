"""Refuses to resume a checkpoint with other lightning options than it was trained with.

Symbol:   megatron.training.checkpointing.check_checkpoint_args
Why:      it compares a fixed list of arguments. Decay, scale, activation and gate leave no trace in the weights, so a
          flag forgotten on resuming would load without a word and go on training another model.
Versions: megatron-core 0.19
Can go:   when Megatron lets a program name the arguments it compares.

Megatron saves all parsed arguments and calls this where it loads a checkpoint without --finetune. Checkpoints of
``pretrain_gpt.py --spec`` hold no lightning options, and nothing is compared for them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from ._replace import replace

SYMBOLS = ("megatron.training.checkpointing.check_checkpoint_args",)
PARAMETERS = ("checkpoint_args", "skip_args")
FREE = {"lightning_backend"}  # another way to the same numbers


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    def check_checkpoint_args(checkpoint_args: Namespace, skip_args: set[str] | None = None) -> None:
        original(checkpoint_args, skip_args)
        from megatron.training import get_args

        now = vars(get_args())
        for name, saved in vars(checkpoint_args).items():
            if name.startswith("lightning_") and name not in FREE and now.get(name, saved) != saved:
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"the checkpoint was trained with {flag} {saved}, but this run has {now[name]}: give the "
                    "checkpoint's value, or load only its weights with --finetune"
                )

    return check_checkpoint_args


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], PARAMETERS, _wrap, "lightning options must equal those of the checkpoint")
