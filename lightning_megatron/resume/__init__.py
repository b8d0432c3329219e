"""What is checked when a checkpoint is loaded: does it go on as it was trained? Before any weight is read.

``patches.checkpoint_args`` calls ``check`` with what a checkpoint says of itself, in both ways of starting.

    function.py   which model, and what it computes
    data.py       which samples come next, and how many are left; what else decides how weights change
    optimizer.py  its state, learning rates and weight decay
"""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

from ..checkpoint_folder import TRACKER, CheckpointError, log
from .data import check_asserted, check_parts, compare_data, set_last_iteration
from .function import check_function, check_model, check_names
from .optimizer import check_optimizer, check_scheduler


def check(state: dict[str, Any], load_dir: str, args: Namespace) -> None:
    """Refuse to go on from a checkpoint with another function, or where Megatron would fail without naming a remedy.

    With ``--finetune``, which takes only the weights, differences are logged instead.

    Args:
        state: what a checkpoint says of itself: ``args``, ``opt_param_scheduler``, ``content_metadata``.
        load_dir: its folder, for messages.
        args: Megatron's parsed flags, with the record of this run.

    Raises:
        CheckpointError: naming every difference, and the remedy.
    """
    saved = state.get("args")
    if saved is None:
        log(
            f"the checkpoint in {load_dir} holds no args: whether it computes the same function as this run is not "
            "checked"
        )
    else:
        check_names(saved, load_dir)
        check_model(saved, load_dir, args)
        check_function(saved, load_dir, args)
        check_asserted(saved, load_dir, args)
        check_parts(state, saved, load_dir, args)
        compare_data(saved, load_dir, args)
        set_last_iteration(state, saved, load_dir, args)
    if saved is None or args.finetune or args.no_load_optim or "opt_param_scheduler" not in state:
        return  # an imported checkpoint has no optimizer
    check_optimizer(state, saved, load_dir, args)
    if state.get("opt_param_scheduler"):
        check_scheduler(state["opt_param_scheduler"], saved, args)


def misfit(error: BaseException, load_dir: str | None, args: Namespace) -> CheckpointError | None:
    """What torch says of a tensor that a checkpoint lacks, or has in another shape, or of bytes that it cannot
    read, in one line; None of other errors.

    It names all tensors that are there, a page for each rank. ``check`` comes before: what is left are sizes that no
    record holds, ``--finetune``, and states of the optimizer.
    """
    text = str(error)
    if missing := re.search(r"KeyError: ['\"](\S+) from model not in state dict", text):
        name, what = missing[1], "is not in it"
    elif shapes := re.search(
        r"loaded \(torch\.Size\((.*?)\)\) and expected \(\((.*?),?\)\) tensor for key (\S+)", text
    ):
        name, what = shapes[3], f"has the shape {shapes[1]} there, and [{shapes[2]}] in this run"
    elif "torch/serialization.py" in text:
        last = text.strip().splitlines()[-1]
        return CheckpointError(
            f"a file of the checkpoint in {load_dir} does not hold what .metadata says ({last}): files of two "
            "checkpoints are mixed, or one is altered. Take the whole folder of the iteration from a copy, or write "
            f"the number of another iteration into {TRACKER}"
        )
    else:
        return None
    if name.startswith("optimizer."):
        remedy = (
            "Give the flags of the optimizer that saved it; or go on without its state: --no-load-optim --no-load-rng"
            + (" (fp16 has no state until its first step that is not skipped)" if getattr(args, "fp16", False) else "")
        )
    elif args.use_checkpoint_args:
        remedy = "Leave out the flags that give other sizes or layers than the checkpoint's"
    else:
        remedy = (
            "Give the sizes and layers of the checkpoint (its flags, or --use-checkpoint-args); --finetune takes "
            "another function, and no other tensors"
        )
    return CheckpointError(f"the checkpoint in {load_dir} does not fit this run: {name} {what}. {remedy}")
