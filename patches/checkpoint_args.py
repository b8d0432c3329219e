"""Refuses to go on from a checkpoint that would train another function, before its weights are read.

Symbol:   megatron.training.checkpointing._load_base_checkpoint
Why:      Megatron compares a fixed list of arguments, after loading. Decay, scale, epsilon, and with equal projection
          shapes even which layers are lightning leave no trace in the weights, so a flag forgotten on resuming would go
          on training another model without a word. And where it does refuse (another schedule, the optimizer in another
          layout, a tracker file that cannot be read) it names no remedy, or the wrong one, or exits with status 0.
          Files that are missing or cut off end it in a traceback, and flipped bits of weights load without a word; a
          tensor that is missing or has another shape, in a page of all names on every rank.
Versions: megatron-core 0.19, 0.20
Can go:   when Megatron lets a program check what a checkpoint says of itself before it is loaded.

``load_checkpoint`` calls this first for what the checkpoint says of itself (``rank0``, on every rank), and then for its
weights. Only the first is checked, or the only call of formats that have one; and not where ``--use-checkpoint-args``
reads arguments, before a model exists. The checks themselves are in checkpoint_folder.py and resume/.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from torch.distributed.checkpoint import CheckpointException

from ..checkpoint_folder import gave_up, refuse_broken
from ..record import ATTRIBUTE
from ..resume import check, misfit
from ._replace import replace

SYMBOLS = ("megatron.training.checkpointing._load_base_checkpoint",)
PARAMETERS = (
    "load_dir", "args", "rank0", "sharded_state_dict", "checkpointing_context", "dp_cp_group", "expt_dp_group",
    "gpt_compat_layer_maps",
)  # fmt: skip
_TWO_CALLS = ("torch_dist", "fsdp_dtensor")


def _wrap(original: Callable[..., tuple]) -> Callable[..., tuple]:
    def _load_base_checkpoint(load_dir: str | None, args: Namespace, rank0: bool = False, *others, **more) -> tuple:
        first = rank0 or not (args.auto_detect_ckpt_format or args.ckpt_format in _TWO_CALLS)
        if first:
            refuse_broken(load_dir, args)
        try:
            result = original(load_dir, args, rank0, *others, **more)
        except SystemExit as stop:
            reason = None if stop.code else gave_up(load_dir, args)
            if reason is None:
                raise
            raise reason from stop
        except CheckpointException as error:  # of torch, on all ranks
            if (reason := misfit(error, load_dir, args)) is None:
                raise
            raise reason from error
        if first and result[0] is not None and hasattr(args, ATTRIBUTE):
            check(result[0], load_dir, args)
        return result

    return _load_base_checkpoint


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], PARAMETERS, _wrap, "a checkpoint must compute the same function as this run")
