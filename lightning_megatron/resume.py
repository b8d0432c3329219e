"""What is checked when a checkpoint is loaded: does it go on as it was trained? Before any weight is read.

``patches.checkpoint_args`` calls ``check`` with what a checkpoint says of itself, in both ways of starting.
"""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from .checkpoint_folder import TRACKER, CheckpointError, log
from .config import flag_of
from .optimizers import FLAGS, optimizers_of
from .record import ATTRIBUTE, ROWS_OF_VOCABULARY, differences
from .saved import saved_function

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
# What decides which tokens see each other and count, and may change on purpose: named in the log.
_DATA = (
    "dataloader_inter_document_masking", "sft", "reset_position_ids", "eod_mask_loss", "lightning_sft_answers_only",
    "sft_tokenizer_prompt_format", "tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "tiktoken_pattern",
    "null_tokenizer_eod_id",
)  # fmt: skip
# What decides which samples come in which order.
_SAMPLES = (
    "seed", "data_path", "train_data_path", "data_args_path", "per_split_data_args_path", "split", "mock_data",
    "seq_length", "dataloader_type",
)  # fmt: skip
_SAMPLES_OF_CYCLIC = ("micro_batch_size", "data_parallel_size", "data_sharding")  # and how many they are, in its case
_NAMES = {  # of what is no flag, or has one that says the opposite
    "data_parallel_size": "data-parallel ranks",
    "data_sharding": "data in shares of ranks (off: --no-data-sharding)",
    "muon_split_qkv": "q, k and v as matrices of their own (off: --muon-no-split-qkv)",
}
# What else decides how weights change, and no function.
_TRAINING = (
    "clip_grad", "hidden_dropout", "attention_dropout", "moe_router_load_balancing_type", "moe_aux_loss_coeff",
    "moe_z_loss_coeff", "moe_router_bias_update_rate", "moe_input_jitter_eps", "mtp_loss_scaling_factor",
    "mtp_detach_heads", "calculate_per_token_loss", "apply_wd_to_qk_layernorm",
    "muon_nesterov", "muon_scale_mode", "muon_coefficient_type", "muon_num_ns_steps", "muon_tp_mode",
    "muon_extra_scale_factor", "muon_split_qkv",
)  # fmt: skip


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
        _check_names(saved, load_dir)
        _check_model(saved, load_dir, args)
        _check_function(saved, load_dir, args)
        _check_asserted(saved, load_dir, args)
        _check_parts(state, saved, load_dir, args)
        _compare_data(saved, load_dir, args)
        _set_last_iteration(state, saved, load_dir, args)
    if saved is None or args.finetune or args.no_load_optim or "opt_param_scheduler" not in state:
        return  # an imported checkpoint has no optimizer
    _check_optimizer(state, saved, load_dir, args)
    if state.get("opt_param_scheduler"):
        _check_scheduler(state["opt_param_scheduler"], saved, args)


def _check_names(saved: Any, load_dir: str) -> None:
    """Norms before experts had another name while local layers followed Megatron's (``spec._norm_keys``)."""
    ours = hasattr(saved, ATTRIBUTE) or hasattr(saved, "lightning_decay")
    older = "lrpe_layers" not in getattr(saved, ATTRIBUTE, {"values": {}})["values"]
    experts = getattr(saved, "num_experts", None) and getattr(saved, "transformer_impl", "local") == "local"
    if ours and older and experts:
        raise CheckpointError(
            f"the checkpoint in {load_dir} is of a model with experts in local layers, saved by an earlier version, "
            "which named the norm before experts mlp.linear_fc1.layer_norm_weight and not pre_mlp_layernorm.weight; "
            "go on with the version that saved it, or rename these tensors"
        )


def _check_model(saved: Any, load_dir: str, args: Namespace) -> None:
    """GPTModel and HybridModel name their tensors differently; Megatron translates softmax layers of GPTModel alone."""
    before, now = (getattr(x, "hybrid_layer_pattern", None) for x in (saved, args))
    if before and not now:
        what, remedy = f"HybridModel (--hybrid-layer-pattern {before})", f"give --hybrid-layer-pattern {before}"
    elif now and not before and "L" in now:
        what = f"GPTModel, and this run has HybridModel (--hybrid-layer-pattern {now})"
        remedy = "leave --hybrid-layer-pattern out, and give the checkpoint's --num-layers and --linear-attention-freq"
    else:
        return
    raise CheckpointError(
        f"the checkpoint in {load_dir} is of a {what}, and tensors of lightning layers have other names in the other "
        f"model, also with --finetune: {remedy}; or, of a released model, rename them with `lightning-convert export` "
        "and `import`, for HybridModel with --hybrid-model"
    )


def _check_function(saved_args: Any, load_dir: str, args: Namespace) -> None:
    now = getattr(args, ATTRIBUTE)
    saved = saved_function(saved_args)
    if saved.softmax:
        what = f"the checkpoint in {load_dir} has {saved.softmax} where this run has {_count(now)}"
        if args.finetune:
            return log(f"--finetune: {what}; its weights are taken over")
        raise CheckpointError(
            f"{what}: it would go on training another function. Train it on with the program it comes from; or "
            "start a new run from its weights, where their shapes are those of this model, with --finetune"
        )
    if saved.options is None:
        log(
            f"the checkpoint in {load_dir} was trained with {saved.source}, by a version that saved no record of "
            "the lightning options. Not compared: which layers are lightning, decay, scale, feature map, norm, gate "
            f"and the other lightning options. This run has {_options(now)}"
        )
    assert saved.record is not None
    found = differences(saved.record, now)
    rows = [difference for difference in found if difference[0] == ROWS_OF_VOCABULARY]
    if rows and _padded_by_tensor_parallelism(saved_args, args):
        found.remove(rows[0])
        log(
            f"tensor-parallel size {args.tensor_model_parallel_size} pads the vocabulary to {rows[0][2]} rows, "
            f"{saved_args.tensor_model_parallel_size} padded it to {rows[0][1]} in the checkpoint in {load_dir}: rows "
            "of padding that are added have random values, and take part in the softmax. For the same function give "
            f"--padded-vocab-size {rows[0][1]}"
        )
        if not found:
            return
    if not found:
        return log(
            f"the checkpoint computes the same function as this run, as far as {saved.source} tells", logging.INFO
        )
    lines = [
        f"{flag}: {_show(old, flag)} in the checkpoint, {_show(new, flag)} in this run" for flag, old, new in found
    ]
    if args.finetune:
        return log(
            f"--finetune: this run computes another function than the checkpoint in {load_dir}: {'; '.join(lines)}"
        )
    remedy = "Give the checkpoint's values, or load only its weights with --finetune"
    if not hasattr(args, "lightning_decay") and any("--lightning" in flag for flag, _, _ in found):
        remedy = f"{remedy}. Options of a --spec are not flags: --lightning-x is make_spec(x=...)"
    raise CheckpointError(
        "\n  ".join([f"the checkpoint in {load_dir} was trained with another function than this run has:", *lines])
        + f"\n{remedy}"
    )


def _check_asserted(saved: Any, load_dir: str, args: Namespace) -> None:
    """What else Megatron asserts (``check_checkpoint_args``, and its sampler in the first step), without a remedy."""
    by_flag = {
        "vocab_file": ("max_position_embeddings", "make_vocab_size_divisible_by", "tokenizer_type"),
        "data_parallel_random_init": ("data_parallel_random_init",),
        "phase_transition_iterations": ("global_batch_size",),
    }
    for given, names in by_flag.items():
        if not args.finetune and getattr(args, given, None) and (found := _others(names, saved, args)):
            raise CheckpointError(
                f"with {flag_of(given)} Megatron goes on with the values of the checkpoint in {load_dir} alone: "
                f"{'; '.join(found)}. Give the checkpoint's; or load only its weights with --finetune"
            )
    read, ranks = getattr(saved, "consumed_train_samples", None), getattr(args, "data_parallel_size", 1)
    cyclic = getattr(args, "dataloader_type", None) == "cyclic" and not args.finetune and not args.skip_train
    if cyclic and read and read % (args.micro_batch_size * ranks):
        raise CheckpointError(
            f"--dataloader-type cyclic goes on behind {read} samples only where --micro-batch-size "
            f"{args.micro_batch_size} x {ranks} data-parallel ranks divides that number, which the checkpoint in "
            f"{load_dir} has read: give sizes that do, or --dataloader-type single"
        )


def _check_parts(state: dict[str, Any], saved: Any, load_dir: str, args: Namespace) -> None:
    """What a training was told not to save; without it Megatron ends in a KeyError, or with status 0, or goes on
    without a word.
    """
    if args.finetune:
        return
    if getattr(saved, "no_save_optim", False) and "opt_param_scheduler" not in state and not args.no_load_optim:
        raise CheckpointError(
            f"the checkpoint in {load_dir} holds no state of the optimizer (--no-save-optim): to go on with a new one, "
            "whose schedule of the learning rate begins anew, too, give --no-load-optim"
        )
    if getattr(saved, "no_save_rng", False) and not args.no_load_rng:
        raise CheckpointError(
            f"the checkpoint in {load_dir} holds no states of random numbers (--no-save-rng): to go on with those of "
            "--seed, as a new training begins, give --no-load-rng"
        )


def _set_last_iteration(state: dict[str, Any], saved: Any, load_dir: str, args: Namespace) -> None:
    """Where a training ends whose length is given in samples: Megatron counts iterations as if all of them, those of
    the checkpoint too, had the batch of this run.
    """
    iteration, read = state.get("iteration"), getattr(saved, "consumed_train_samples", None)
    if not iteration or args.finetune or args.skip_train or not args.train_iters:
        return
    if args.train_samples and read and getattr(args, "override_ckpt_iteration", None) is None:
        last = iteration + _iterations(args, read)
        if last != args.train_iters:
            log(
                f"the checkpoint in {load_dir} has read {read} samples in {iteration} iterations, in batches of other "
                f"sizes than this run's: it reads the others of --train-samples {args.train_samples}, and so ends at "
                f"iteration {last}, not {args.train_iters}"
            )
            args.train_iters = last
    if iteration >= args.train_iters:
        name = "train_samples" if args.train_samples else "train_iters"
        log(
            f"the checkpoint in {load_dir} is at iteration {iteration}, and {flag_of(name)} is {getattr(args, name)}: "
            "nothing is left to train"
        )


def _iterations(args: Namespace, read: int) -> int:
    """How many iterations read the samples of ``--train-samples`` behind the first ``read``."""
    if args.step_batch_size_schedule is None:
        return max(args.train_samples - read, 0) // args.global_batch_size
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches

    count = 0
    while read < args.train_samples:  # as Megatron counts them from the first; it sets the batch itself after loading
        update_num_microbatches(read, consistency_check=False)
        read, count = read + get_current_global_batch_size(), count + 1
    return count


def _padded_by_tensor_parallelism(saved: Any, args: Namespace) -> bool:
    """Whether one vocabulary gives both numbers of rows, and only the tensor-parallel size differs."""
    names = ("padded_vocab_size", "tensor_model_parallel_size", "make_vocab_size_divisible_by")
    (rows, tp, divisor), now = ([getattr(x, name, None) for name in names] for x in (saved, args))
    if None in (rows, tp, divisor, *now) or divisor != now[2] or rows % (tp * divisor) or now[0] % (now[1] * divisor):
        return False  # not known, or given
    # between these two lie the vocabularies that are padded to both
    return max(rows - tp * divisor, now[0] - now[1] * divisor) < min(rows, now[0])


def _compare_data(saved: Any, load_dir: str, args: Namespace) -> None:
    if found := _others(_DATA, saved, args):
        log(f"this run reads its data otherwise than the checkpoint in {load_dir} was trained: {'; '.join(found)}")
    if not args.finetune and (found := _others(_TRAINING, saved, args)):
        log(f"this run trains otherwise than the checkpoint in {load_dir} was trained: {'; '.join(found)}")
    cyclic = all(getattr(x, "dataloader_type", None) == "cyclic" for x in (saved, args))
    if not args.finetune and (found := _others(_SAMPLES + (_SAMPLES_OF_CYCLIC if cyclic else ()), saved, args)):
        log(
            f"this run goes on behind the samples that the checkpoint in {load_dir} has consumed, and they come in "
            f"another order, or are others, so that some are read twice or left out: {'; '.join(found)}"
        )
    was, now = (_all_samples(x) for x in (saved, args))
    if not args.finetune and None not in (was, now) and was != now:
        log(
            f"this run reads {now} samples in all, and the one that saved the checkpoint in {load_dir} was to read "
            f"{was} (--train-iters, --train-samples, --global-batch-size): of data that are read more than once, they "
            "come in another order, so that some are read once more or less often"
        )


def _all_samples(args: Any) -> int | None:
    """For how many Megatron shuffles the data; None if not known."""
    if samples := getattr(args, "train_samples", None):
        return samples
    iterations, batch = (getattr(args, name, None) for name in ("train_iters", "global_batch_size"))
    return iterations * batch if iterations and batch else None


def _acts(name: str, args: Any) -> bool:
    """Whether a flag of some part acts on anything: whether the part is there."""
    parts = {"muon_": "muon" in getattr(args, "optimizer", ""), "mtp_": getattr(args, "mtp_num_layers", None)}
    parts |= {"moe_": getattr(args, "num_experts", None), "sft_": getattr(args, "sft", False)}
    return all(there for part, there in parts.items() if name.removeprefix("lightning_").startswith(part))


def _others(names: tuple[str, ...], saved: Any, args: Namespace) -> list[str]:
    return [
        f"{_named(name)}: {_show(getattr(saved, name), name)} in the checkpoint, {_show(getattr(args, name), name)} "
        "in this run"
        for name in names
        if hasattr(saved, name) and hasattr(args, name) and getattr(saved, name) != getattr(args, name)
        if _acts(name, args)
    ]


def _count(record: dict[str, Any]) -> str:
    layers = record["values"]["layers"]
    return f"{layers.count('L')} lightning layers ({layers})"


def _options(record: dict[str, Any]) -> str:
    values = record["values"]
    names = ("decay", "scale", "feature_map", "norm_groups", "gate", "rope", "qk_norm")
    return f"{_count(record)}, " + ", ".join(f"{name} {_show(values[name], name)}" for name in names)


def _show(value: Any, name: str) -> str:
    if "decay" in name:
        preset, offset, digest = value
        return f"{preset} with offset {offset} (values {digest})"
    if value is None:
        return "none"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _check_optimizer(state: dict[str, Any], saved: Any, load_dir: str, args: Namespace) -> None:
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


def _check_scheduler(saved: dict[str, Any], saved_args: Any, args: Namespace) -> None:
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


def _named(name: str) -> str:
    """The flag of an attribute of args, or what it is."""
    return _NAMES.get(name) or flag_of(name)


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
