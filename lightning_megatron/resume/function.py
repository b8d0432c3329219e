"""Which model a checkpoint is of, and what it computes."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from ..checkpoint_folder import CheckpointError, log
from ..record import ATTRIBUTE, ROWS_OF_VOCABULARY, differences
from ..saved import saved_function
from .shown import show


def check_names(saved: Any, load_dir: str) -> None:
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


def check_model(saved: Any, load_dir: str, args: Namespace) -> None:
    """GPTModel and HybridModel name their tensors differently; Megatron translates softmax layers of GPTModel alone.

    Raises:
        CheckpointError: the checkpoint is of one, and ``args`` are of the other.
    """
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


def check_function(saved_args: Any, load_dir: str, args: Namespace) -> None:
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
    if rows and padded_by_tensor_parallelism(saved_args, args):
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
    lines = [f"{flag}: {show(old, flag)} in the checkpoint, {show(new, flag)} in this run" for flag, old, new in found]
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


def padded_by_tensor_parallelism(saved: Any, args: Namespace) -> bool:
    """Whether one vocabulary gives both numbers of rows, and only the tensor-parallel size differs."""
    names = ("padded_vocab_size", "tensor_model_parallel_size", "make_vocab_size_divisible_by")
    (rows, tp, divisor), now = ([getattr(x, name, None) for name in names] for x in (saved, args))
    if None in (rows, tp, divisor, *now) or divisor != now[2] or rows % (tp * divisor) or now[0] % (now[1] * divisor):
        return False  # not known, or given
    # between these two lie the vocabularies that are padded to both
    return max(rows - tp * divisor, now[0] - now[1] * divisor) < min(rows, now[0])


def _count(record: dict[str, Any]) -> str:
    layers = record["values"]["layers"]
    return f"{layers.count('L')} lightning layers ({layers})"


def _options(record: dict[str, Any]) -> str:
    values = record["values"]
    names = ("decay", "scale", "feature_map", "norm_groups", "gate", "rope", "qk_norm")
    return f"{_count(record)}, " + ", ".join(f"{name} {show(values[name], name)}" for name in names)
