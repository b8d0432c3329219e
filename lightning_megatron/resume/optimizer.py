"""The optimizer's state, and its schedule of learning rates and weight decay."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from ..checkpoint_folder import CheckpointError
from ..config import flag_of
from ..optimizers import FLAGS, optimizers_of

_ITERATIONS = "--train-iters, --lr-decay-iters or --global-batch-size"
_SCHEDULER = {  # values of OptimizerParamScheduler, by the flags that set them; those called steps count samples
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction",
    "lr_decay_steps": _ITERATIONS,
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--weight-decay or --start-weight-decay",
    "end_wd": "--weight-decay or --end-weight-decay",
    "wd_incr_steps": _ITERATIONS.replace(", --lr-decay-iters", ""),
    "wd_incr_style": "--weight-decay-incr-style",
}
# Values of the schedule that Megatron's checkpoints have among the args alone, and does not compare.
_UNKEPT_SCHEDULE = (
    "lr_warmup_init", "wsd_decay_steps", "lr_wsd_decay_style", "decoupled_lr", "decoupled_min_lr",
    "mup_base_hidden_size",
)  # fmt: skip
# By these Megatron finds groups of parameters; muP divides rates by the hidden size over this one.
_RATES = ("max_lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "mup_base_hidden_size")


def check_optimizer(state: dict[str, Any], saved: Any, load_dir: str, args: Namespace) -> None:
    """What Megatron says of it names a flag that does not help."""
    kind = (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    with_flag = bool(getattr(saved, "use_distributed_optimizer", False)), bool(args.use_distributed_optimizer)
    if with_flag[0] != with_flag[1]:
        said = [f"{'with' if given else 'without'} --use-distributed-optimizer" for given in with_flag]
        raise CheckpointError(
            f"the optimizer's state in {load_dir} was saved {said[0]}, and this run is {said[1]}, which has another "
            f"form. Go on {said[0]}; or without the optimizer's state: --no-load-optim --no-load-rng, or --finetune to "
            "start at iteration 0"
        )
    was, this = (_form_of_optimizer(x) for x in (saved, args))
    if was != this:
        raise CheckpointError(
            f"the optimizer's state in {load_dir} is that of {was}, and this run has {this}. Go on with {was}; or "
            "without the optimizer's state: --no-load-optim --no-load-rng, or --finetune to start at iteration 0"
        )
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    before, now = (tuple(getattr(x, name, 1) for name in names) for x in (saved, args))
    if not args.use_distributed_optimizer or kind != "dp_reshardable" or before == now:
        return
    raise CheckpointError(
        f"the optimizer's state in {load_dir} was saved for TP {before[0]}, PP {before[1]} only, and this run has "
        f"TP {now[0]}, PP {now[1]}. Resume once at TP {before[0]}, PP {before[1]} with "
        "--dist-ckpt-optim-fully-reshardable, which any layout can load, and save; or go on without the optimizer's "
        "state: --no-load-optim --no-load-rng, or --finetune to start at iteration 0"
    )


def _form_of_optimizer(args: Any) -> str:
    """Flags that decide which tensors an optimizer keeps; the distributed one has fp32 weights in any precision."""
    kind = getattr(args, "optimizer", "adam")
    parts = [f"--optimizer {kind}"]
    if "muon" in kind and (scalar := getattr(args, "muon_scalar_optimizer", None)):
        parts.append(f"--muon-scalar-optimizer {scalar}")
    if getattr(args, "decoupled_lr", None) is not None:  # groups of parameters of their own
        parts.append("--decoupled-lr")
    if kind == "sgd" and not getattr(args, "sgd_momentum", None):
        parts.append("--sgd-momentum 0")
    if not getattr(args, "use_distributed_optimizer", False):
        parts.append("--bf16 or --fp16" if getattr(args, "bf16", False) or getattr(args, "fp16", False) else "fp32")
    return ", ".join(parts)


def check_scheduler(saved: dict[str, Any], saved_args: Any, args: Namespace) -> None:
    """What its assertions do not name: the flag, and that there are two to settle it; and what they do not compare."""
    own = hasattr(args, "lightning_decay")  # the own entry point: patches.chained_optimizer
    now = _schedule(args)
    batch = getattr(saved_args, "global_batch_size", None), args.global_batch_size

    def show(name: str, value: Any, size: int | None) -> str:
        return f"{value} samples ({value / size:g} iterations)" if "steps" in name and size else str(value)

    def line(flag: str, name: str, was: Any, this: Any) -> str:
        return f"{flag}: {show(name, was, batch[0])} in the checkpoint, {show(name, this, batch[1])} in this run"

    kept = {
        name: line(flag, name, saved[name], now[name])
        for name, flag in _SCHEDULER.items()
        if name in saved and saved[name] != now[name]
    }
    unkept = {name: line(flag, name, was, this) for name, flag, was, this in _unkept(saved_args, args, now)}
    groups = {name: line(flag_of(name), name, was, this) for name, was, this in _group_values(saved_args, args)}
    rates = {name: x for name, x in (kept | unkept).items() if name in _RATES}
    not_taken = {name: x for name, x in unkept.items() if name not in _RATES}  # by --use-checkpoint-...
    if args.override_opt_param_scheduler:
        found = {} if own else rates | groups
        what = (
            "Megatron finds the optimizer's state by rates and keeps values in it, which the checkpoint has otherwise:"
        )
        remedy = (
            "Give the checkpoint's; or go on without that state, with --no-load-optim; or train by "
            "lightning_megatron.pretrain, which takes this run's"
        )
    elif args.use_checkpoint_opt_param_scheduler:
        found = not_taken if own else rates | not_taken
        what = "--use-checkpoint-opt-param-scheduler does not take these from the checkpoint:"
        remedy = "Give the checkpoint's; or --override-opt-param-scheduler instead, for this run's"
        if not own:
            remedy = "Give the checkpoint's; or go on without the optimizer's state, with --no-load-optim"
    else:
        found = kept | unkept | groups
        what = "the schedule of learning rate and weight decay is another than the checkpoint's:"
        if not kept and not unkept:
            what = "the optimizer's state was saved with other values, with which Megatron would go on:"
        remedy = (
            "To go on with this run's values, give --override-opt-param-scheduler; with the checkpoint's, "
            "--use-checkpoint-opt-param-scheduler"
        )
        if not_taken:
            flags = "; ".join(text.partition(": ")[0] for text in not_taken.values())
            remedy += f" and the checkpoint's {flags}"
    if found:
        raise CheckpointError("\n  ".join([what, *found.values()]) + f"\n{remedy}")


def _schedule(args: Namespace) -> dict[str, Any]:
    """The state of this run's schedule. A length in samples stays one, though Megatron has set ``args.train_iters``
    by now, by which it would count.
    """
    from megatron.training.training import get_optimizer_param_scheduler

    decay = args.lr_decay_iters
    now = get_optimizer_param_scheduler(SimpleNamespace(param_groups=[])).state_dict()
    if args.train_samples:
        args.lr_decay_iters = decay  # which it sets, too
        steps = args.train_samples if args.lr_decay_samples is None else args.lr_decay_samples
        fraction = args.lr_warmup_fraction
        warmup = args.lr_warmup_samples if fraction is None else fraction * steps
        now |= {"lr_decay_steps": steps, "wd_incr_steps": args.train_samples, "lr_warmup_steps": warmup}
    return now


def _unkept(saved: Any, args: Namespace, now: dict[str, Any]) -> list[tuple[str, str, Any, Any]]:
    """Name, flag, and both values of what differs, where it acts."""

    def value(of: Any, name: str) -> Any:
        if name == "mup_base_hidden_size":
            return getattr(of, name, None) or getattr(of, "hidden_size", None)
        if name != "wsd_decay_steps":
            return getattr(of, name, None)
        iterations = getattr(of, "lr_wsd_decay_iters", None)
        return getattr(of, "lr_wsd_decay_samples", None) if iterations is None else iterations * of.global_batch_size

    acts = {"lr_warmup_init": now["lr_warmup_steps"] > 0}
    acts["mup_base_hidden_size"] = bool(getattr(args, "use_mup", False))
    acts |= dict.fromkeys(("wsd_decay_steps", "lr_wsd_decay_style"), now["lr_decay_style"] == "WSD")
    flags = {"wsd_decay_steps": "--lr-wsd-decay-iters, --lr-wsd-decay-samples or --global-batch-size"}
    found = [
        (name, flags.get(name, flag_of(name)), value(saved, name), value(args, name))
        for name in _UNKEPT_SCHEDULE
        if acts.get(name, True)
    ]
    # an older checkpoint, or one of another schedule, holds none
    return [row for row in found if row[2] != row[3] and not (row[2] is None and row[0] != "decoupled_min_lr")]


def _group_values(saved: Any, args: Namespace) -> list[tuple[str, Any, Any]]:
    """Name and both values of what differs, of the optimizers of this run."""
    kinds = optimizers_of(args.optimizer, getattr(args, "muon_scalar_optimizer", None))
    kept = (name for kind in kinds for name, flag in FLAGS.items() if flag.kept and kind in flag.readers)
    names = [name for name in kept if hasattr(saved, name)]
    values = ((name, getattr(saved, name), getattr(args, name)) for name in names)
    return [(name, was, this) for name, was, this in values if was != this]


def refuse_other_main_parameters(found: list[tuple[list[str], int]], args: Namespace) -> None:
    """Refuse a checkpoint whose optimizer holds other main parameters than the weights: these take their place with the
    first step. ``patches.bucket_padding`` says which, once all is loaded.

    Args:
        found: of every rank, the names of those that differ, and how many were compared. Ranks hold parts of tensors.
        args: Megatron's parsed flags.

    Raises:
        CheckpointError: with the first names, and the remedy.
    """
    names = list(dict.fromkeys(name for unequal, _ in found for name in unequal))
    if not names:
        return
    parts, all_parts = sum(len(unequal) for unequal, _ in found), sum(compared for _, compared in found)
    load_dir = args.load or args.pretrained_checkpoint
    raise CheckpointError(
        f"the checkpoint in {load_dir} holds main parameters of the optimizer that are not its weights: "
        f"{_first(names)} ({parts} of {all_parts} parts of tensors, on all ranks). Megatron saves such states by "
        "--dist-ckpt-optim-fully-reshardable without the patch of this package, where one of several buckets of "
        "gradients ends in padding: Adam's moments are wrong, too, and with the first step the main parameters would "
        "take the place of the weights, which are right. Go on without the optimizer's state: give --no-load-optim for "
        "this start, and leave it out again once a checkpoint is saved. If you changed the weights in the "
        "checkpoint yourself, give it, too"
    )


def _first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
