"""Command line of the own entry point: our flags, and defaults that fit what is installed."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import functools
import json
import re
import sys
import types
import typing
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

from ..compat import importable, version
from ..config import LightningOptions
from ..flags import flag_of
from ..ops.backend import by_triton
from ..record import FREE_OPTIONS, ROWS, options_from_args
from ..runtime import loader_layout
from ..saved import saved_function
from .released import add_model_arguments

__all__ = ["add_arguments", "args_defaults", "defaults_from_checkpoint", "options_from_args", "parts_in_use"]

_TE = "transformer_engine.pytorch"
_PREFIX = "lightning_"

# Megatron's switches for kernels of optional packages: all default to on, and each has only one direction. Per row:
# attribute, its value with the kernel, the flag we add for it, Megatron's flag against it, the module it needs.
KERNELS = (
    ("apply_rope_fusion", True, "--rope-fusion", "--no-rope-fusion", _TE),
    (
        "no_persist_layer_norm",
        False,
        "--persist-layer-norm",
        "--no-persist-layer-norm",
        "apex.contrib.layer_norm.layer_norm",
    ),
    (
        "masked_softmax_fusion",
        True,
        "--masked-softmax-fusion",
        "--no-masked-softmax-fusion",
        "scaled_masked_softmax_cuda",
    ),
    (
        "gradient_accumulation_fusion",
        True,
        "--gradient-accumulation-fusion",
        "--no-gradient-accumulation-fusion",
        "fused_weight_gradient_mlp_cuda",
    ),
)

# Megatron's flags for the head dims of linear layers, as other names of ours: 128 is honoured, though it is the
# default of Megatron's config, which keeps that default.
_ALIASES = {
    "linear_key_head_dim": "lightning_key_head_dim",
    "linear_value_head_dim": "lightning_value_head_dim",
}
COUNTED = ("NullTokenizer", "NullMultimodalTokenizer", "TikTokenizer")  # whose tokens --vocab-size counts
_EVAL_ITERS = 100  # Megatron's default
# Flags that are refused if given, but have defaults in Megatron.
_UNSET = ("linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim")


def add_arguments(parser: ArgumentParser, checkpoint: dict[str, typing.Any] | None = None) -> ArgumentParser:
    """Megatron's ``extra_args_provider``: add the lightning group and set our defaults.

    Defaults go through ``parser.set_defaults`` because Megatron's ``args_defaults`` reach only what is None after
    parsing, which a switch never is. A flag that the user gives wins over them, as over any default.

    Args:
        checkpoint: more defaults, which ``defaults_from_checkpoint`` found in a checkpoint, or those of a released
            model.
    """
    # Megatron has 700 flags: without this, every typing error scrolls its own message away.
    parser.usage = "%(prog)s [flags of Megatron-LM's pretrain_gpt.py] [--lightning-* flags]; --help lists them all"
    parser.error = functools.partial(_end, parser)  # type: ignore[method-assign]
    group = parser.add_argument_group("lightning", "the lightning layers, and parts used around them")
    types_of = typing.get_type_hints(LightningOptions)
    for field in dataclasses.fields(LightningOptions):
        flag = flag_of(_PREFIX + field.name)
        text = field.metadata["help"].replace("%", "%%")
        if types_of[field.name] is bool:
            action: dict[str, typing.Any] = {"action": argparse.BooleanOptionalAction}
        else:
            action = {"type": _plain_type(types_of[field.name]), "choices": field.metadata["choices"]}
        if field.default is not None:
            text += " (default: %(default)s)"
        group.add_argument(flag, dest=_PREFIX + field.name, default=field.default, help=text, **action)
    for attribute, on, flag, against, module in KERNELS:
        text = f"opposite of {against}, which is the default unless {module} imports"
        group.add_argument(flag, dest=attribute, action="store_const", const=on, help=text)
    add_model_arguments(parser, group)
    # dest has no prefix: chunks make no other model, and a checkpoint goes on with any (patches/checkpoint_args.py)
    group.add_argument(
        "--lightning-loss-chunk",
        dest="loss_chunk",
        type=int,
        metavar="N",
        help="compute output layer and loss in chunks of N tokens, and again in the backward, so that the logits of "
        "all tokens never exist; takes the place of --cross-entropy-loss-fusion; some thousand keep the products large "
        "(default: one chunk)",
    )
    group.add_argument(  # no prefix in dest, as above
        "--lightning-sft-answers-only",
        dest="sft_answers_only",
        action="store_true",
        help="with --sft and the tokenizer's own chat template (--sft-tokenizer-prompt-format default): only the "
        "tokens of answers, and what ends an answer, count in the loss; without it, all tokens count",
    )
    group.add_argument(
        "--create-attention-mask-in-dataloader",
        action="store_true",
        help="build the T x T mask that no layer here reads (opposite of --no-create-attention-mask-in-dataloader, "
        "which is the default here)",
    )
    # An option of older versions, hidden: the data loader decides it. No prefix in dest: it makes no other model.
    parser.add_argument("--lightning-cp-layout", dest="cp_layout", help=argparse.SUPPRESS)
    group.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        dest="dist_ckpt_optim_fully_reshardable",
        action="store_false",
        help="save the state of --use-distributed-optimizer for the present TP and PP only, which takes less time and "
        "memory (opposite of --dist-ckpt-optim-fully-reshardable, which is the default here, except with local "
        "checkpoints)",
    )
    parser.set_defaults(dist_ckpt_optim_fully_reshardable=None)  # args_defaults decides
    defaults = {attribute: on if importable(module) else not on for attribute, on, _, _, module in KERNELS}
    if defaults["apply_rope_fusion"]:
        defaults["apply_rope_fusion"] = None  # args_defaults decides
    defaults["transformer_impl"] = "transformer_engine" if importable(_TE) else "local"
    # None, so that a given value can be told from Megatron's default; args_defaults and _ALIASES have what follows.
    defaults |= dict.fromkeys(("eval_iters", *_UNSET))
    parser.set_defaults(create_attention_mask_in_dataloader=False, **defaults | (checkpoint or {}))
    for action in parser._actions:
        if action.dest in _ALIASES:
            parser.set_defaults(**{action.dest: action.default})
            action.dest, action.default = _ALIASES[action.dest], argparse.SUPPRESS  # ours has the default
        if action.dest == "mtp_num_layers":  # Megatron takes None, and not 0, for none
            action.type = _int_or_none
        if action.dest == "experimental_attention_variant":
            action.type, action.choices, action.metavar = partial(_variant, action.choices), None, "lightning"
            action.help = "lightning names what this entry point builds anyway"
        if action.dest == "yaml_cfg":  # Megatron reads the file while it parses, so refuse() would come too late
            action.type = _refuse_yaml
        if isinstance(action.default, enum.Enum):  # of a wrong name, Megatron's own parsing makes a KeyError
            action.type = functools.partial(_member, type(action.default))
        if action.help and action.help is not argparse.SUPPRESS:
            # A lone % in Megatron's help (0.19) ends --help in a ValueError.
            action.help = re.sub(r"%(?![%(])", "%%", action.help.replace("%%", "%"))
    return parser


def _end(parser: ArgumentParser, message: str) -> typing.NoReturn:
    """argparse's end of a wrong command line, in one line, with the flag that may have been meant."""
    message = message.removeprefix("argument ")
    if unknown := re.match(r"unrecognized arguments: (--[^ =]+)", message):
        near = difflib.get_close_matches(unknown[1], parser._option_string_actions, n=1, cutoff=0.75)
        message += f"; did you mean {near[0]}?" if near else ""
    if message == "--hybrid-layer-pattern: expected one argument":
        message += "; write --hybrid-layer-pattern=-L-*-, with =, where it begins with -"
    parser.exit(2, f"lightning-pretrain: {message} (--help lists all flags and their values)\n")


def _member(kind: type[enum.Enum], value: str) -> enum.Enum:
    if value not in kind.__members__:
        raise argparse.ArgumentTypeError(f"{value} is unknown; choose from {', '.join(kind.__members__)}")
    return kind[value]


def _int_or_none(value: str) -> int | None:
    return int(value) or None


def _variant(others: tuple[str, ...], value: str) -> str | None:
    """``lightning`` asks for nothing else. Megatron's own are refused with the reason, when everything is parsed."""
    if value == "lightning" or value in others:
        return None if value == "lightning" else value
    raise argparse.ArgumentTypeError(f"invalid choice: {value!r} (choose lightning, or leave the flag out)")


def _refuse_yaml(value: str) -> str:
    raise argparse.ArgumentTypeError(
        f"{value} would replace the command line, and with it every lightning option: give flags"
    )


def _plain_type(hint: typing.Any) -> type:
    """``int`` of ``int | None``, ``str`` of ``str``."""
    return next(t for t in typing.get_args(hint) if t is not types.NoneType) if typing.get_args(hint) else hint


# Flags by which --use-checkpoint-args makes the same model, beside rows whose key is the flag's own name, and what
# Megatron itself takes with it.
_TAKEN = (
    "linear_attention_freq", "swiglu", "squared_relu", "quick_geglu", "apply_layernorm_1p", "num_experts",
    "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_dtype",
    "rotary_scaling_factor", "mscale", "mscale_all_dim",
    "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow", "yarn_correction_range_round_to_int",
    "use_mup", "mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult", "mup_base_head_dim",
    "mup_attn_scale_power", "mtp_loss_scaling_factor", "hidden_dropout", "attention_dropout",
    "apply_query_key_layer_scaling",
)  # fmt: skip

_TOKENIZER = ("tokenizer_type", "tokenizer_model")


def defaults_from_checkpoint(saved: Namespace) -> dict[str, typing.Any]:
    """What ``--use-checkpoint-args`` brings beyond Megatron's own list: all that decides the function of the model.

    Args:
        saved: the args in the checkpoint.

    Returns:
        Defaults for the parser, so that a flag that the user gives wins.
    """
    options = saved_function(saved).options
    held = vars(saved)
    names = (*(row.key for row in ROWS if row.applies != "lightning"), *_TAKEN, *_TOKENIZER)
    brought = {name: held[name] for name in names if name in held}
    if options is None:
        return brought
    return brought | {
        _PREFIX + name: value for name, value in dataclasses.asdict(options).items() if name not in FREE_OPTIONS
    }


def tokenizer_defaults(given: Namespace, brought: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Corrections of ``brought``: a tokenizer that is given has its own files, and Megatron leaves it alone."""
    if not given.use_tokenizer_model_from_checkpoint_args:
        return dict.fromkeys(_TOKENIZER)
    found: dict[str, typing.Any] = {"use_tokenizer_model_from_checkpoint_args": False}
    if given.tokenizer_type not in (None, brought.get("tokenizer_type")):
        found["tokenizer_model"] = None
    return found


def refuse_dropped(given: Namespace, args: Namespace, brought: dict[str, typing.Any]) -> None:
    """Refuse flags that ``--use-checkpoint-args`` drops: Megatron sets some to the checkpoint's values, given or not.

    Args:
        given: flags as parsed, with ``brought`` as defaults.
        args: the same, as Megatron made them.

    Raises:
        ValueError: naming flags and both values.
    """
    flags = {row.key: row.flag for row in ROWS}
    lines = [
        f"{flags.get(name, flag_of(name))}: {value} in the checkpoint, {getattr(given, name)} in this run"
        for name, value in brought.items()
        if getattr(given, name, value) not in (value, [value])  # Megatron makes a value of a list of one
        and getattr(args, name) == value
    ]
    if lines:
        raise ValueError(
            "\n  ".join(["--use-checkpoint-args takes these from the checkpoint, whatever else is given:", *lines])
            + "\nLeave these flags out; or leave --use-checkpoint-args out, and give all flags of the model"
        )


def args_defaults(args: Namespace) -> dict[str, typing.Any]:
    """Defaults for Megatron's ``args_defaults``: values that are None unless the user gives them."""
    defaults: dict[str, typing.Any] = {}
    # Megatron promises not to evaluate while training without it, but divides by it (training/training.py:4481).
    if args.eval_interval is None:
        defaults["eval_interval"] = sys.maxsize
    if args.dist_ckpt_optim_fully_reshardable is None:
        # Megatron's default saves an optimizer that no other TP or PP can load. Local checkpoints take nothing else.
        defaults["dist_ckpt_optim_fully_reshardable"] = (
            args.use_distributed_optimizer and args.non_persistent_ckpt_type != "local"
        )
    if args.apply_rope_fusion is None:  # of latents TransformerEngine has no kernel, and Megatron one for YaRN alone
        plain = args.multi_latent_attention and args.rope_type == "rope"
        defaults["apply_rope_fusion"] = importable(_TE) and not plain
    if args.eval_iters is None:
        defaults["eval_iters"] = _EVAL_ITERS if has_validation_data(args) else 0
    if args.skip_train and args.train_iters is None and args.train_samples is None:
        defaults["train_iters"] = 0  # Megatron multiplies it for the training data, which nobody reads
    if args.tokenizer_type is None and args.mock_data:
        defaults["tokenizer_type"] = "NullTokenizer"
    return defaults


def has_training_data(args: Namespace) -> bool:
    """Whether the flags name data to train on."""
    return _has_part(args, 0, "train")


def has_validation_data(args: Namespace) -> bool:
    """Whether the flags name data for validation."""
    return _has_part(args, 1, "valid")


def _has_part(args: Namespace, number: int, name: str) -> bool:
    """As Megatron's get_blend_and_blend_per_split reads them."""
    if args.data_path is not None or args.data_args_path is not None:
        shares = re.findall(r"[.0-9]+", args.split or "969, 30, 1")  # Megatron's default
        return not shares or (len(shares) > number and float(shares[number]) > 0)  # none: refused by itself
    if args.per_split_data_args_path is not None:
        if "://" in args.per_split_data_args_path:
            return True  # left to its reader
        return bool(json.loads(Path(args.per_split_data_args_path).read_text("utf-8")).get(name))
    given = (args.train_data_path, args.valid_data_path, args.test_data_path)
    return bool(getattr(args, f"{name}_data_path")) or not any(given)  # without any, mock data


def notes(raw: Namespace) -> list[str]:
    """Lines for the log on what was parsed, before Megatron fills in defaults."""
    lines = []
    if raw.cp_layout is not None:
        lines.append(
            f"--lightning-cp-layout {raw.cp_layout} is no option any more: Megatron's data loader decides it "
            f"({loader_layout(raw)}); leave the flag out"
        )
    if raw.vocab_size is not None and raw.released_model is None and raw.tokenizer_type not in (None, *COUNTED):
        lines.append(
            f"--vocab-size {raw.vocab_size} is not read: --tokenizer-type {raw.tokenizer_type} has a vocabulary of its "
            "own; for more rows of the embedding give --padded-vocab-size"
        )
    if raw.eval_iters is None and not has_validation_data(raw):
        lines.append("no validation data, so nothing is evaluated (--eval-iters 0); give --valid-data-path, or --split")
    return lines


def parts_in_use(args: Namespace, norm: str) -> str:
    """One line for the log: which implementation every replaceable part has, and versions. ``norm`` names a class."""
    use_te = args.transformer_impl == "transformer_engine"
    rope = "TransformerEngine" if args.apply_rope_fusion else "torch"
    if not args.apply_rope_fusion and by_triton(args.lightning_backend):
        rope = "lightning_megatron" + (" (of latents: torch)" if use_te and args.multi_latent_attention else "")
    adam = "TransformerEngine" if importable(_TE) else "apex" if importable("apex.optimizers") else "torch"
    parts = {
        "linear layers": "TransformerEngine" if use_te else "megatron-core local",
        "layer norms": norm,
        "softmax core": "TransformerEngine" if use_te else "torch scaled_dot_product_attention",
        "rotary positions": rope,
        "gradient accumulation fusion": "apex" if args.gradient_accumulation_fusion else "off",
        "Adam": adam,
    }
    names = ("megatron-core", "torch", "triton", "transformer-engine", "apex")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return "lightning: parts in use: " + "; ".join(f"{k} {v}" for k, v in parts.items()) + f" ({versions})"
