"""What numbers and pairs of flags mean nothing, in tables: refused in one line, where Megatron ends in a traceback.

Most of these Megatron finds out in a bare assertion, in a division by zero, after minutes of start-up, or never. What
it does refuse of a command line by itself is reworded by ``megatron_refuses``, so that flags are named.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import linecache
import math
import re
import traceback
from argparse import Namespace
from collections.abc import Iterator

from ..config import LightningOptions
from ..flags import flag_of, shown
from .contradictions import CONTRADICTIONS, data_parallel_size

_NO_END = math.inf
# Ends far above what anyone trains: beyond them the model, or the index of the data, is built for hours without a word,
# or an allocation fails that names no flag.
_MANY, _LARGE, _LONG, _STEPS = 10_000, 10_000_000, 2_000_000_000, 10**11
# lowest value, highest value, what is allowed in words, flags. Values that lie between them pass, nan does not.
_BOUNDS: tuple[tuple[float, float, str, tuple[str, ...]], ...] = (
    (1, _MANY, f"1 or more, up to {_MANY}", (  # modules, one by one
        "num_layers", "encoder_num_layers", "num_attention_heads", "num_query_groups",
    )),
    (0, _MANY, f"0 or more, up to {_MANY}", ("mtp_num_layers", "num_experts")),
    (0, 1000, "0 or more, up to 1000", ("num_workers",)),  # processes of each rank and dataset
    (1, _LARGE, f"1 or more, up to {_LARGE}", (  # dimensions of tensors
        "hidden_size", "ffn_hidden_size", "kv_channels", "moe_ffn_hidden_size", "vocab_size", "padded_vocab_size",
        "make_vocab_size_divisible_by", "micro_batch_size", "global_batch_size", "eval_micro_batch_size",
    )),
    (-_NO_END, _LARGE, f"at most {_LARGE}", (
        "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "moe_latent_size",
        "moe_shared_expert_intermediate_size", "eval_global_batch_size",
    )),
    (1, _LONG, f"1 or more, up to {_LONG}", (  # Megatron's index counts the tokens of a sample in 32 bits
        "seq_length", "encoder_seq_length", "max_position_embeddings", "sft_sequence_length",
    )),
    (1, _STEPS, f"1 or more, up to {_STEPS}", ("train_samples",)),
    (0, _STEPS, f"0 or more, up to {_STEPS}", ("train_iters", "eval_iters")),
    (1, 10**9, "1 or more, up to 1000000000", ("distributed_timeout_minutes",)),  # the end of a timedelta is near
    (1, _NO_END, "1 or more", (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
        "expert_model_parallel_size", "expert_tensor_parallel_size", "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers", "moe_layer_freq", "moe_router_topk", "recompute_num_layers",
        "log_interval", "eval_interval", "save_retain_interval", "loss_scale_window",
        "num_distributed_optimizer_instances",
    )),
    (1, 4_000_000_000, "1 or more, up to 4000000000", ("seed",)),  # numpy's end at 2**32, and stages add to them
    (0, _NO_END, "0 or more", (
        "lr", "min_lr", "lr_warmup_init", "decoupled_lr", "decoupled_min_lr", "lr_warmup_iters", "lr_warmup_samples",
        "weight_decay", "start_weight_decay", "end_weight_decay", "clip_grad", "init_method_std", "layernorm_epsilon",
        "manual_gc_interval", "adam_eps", "exit_interval", "ckpt_step", "save_interval", "non_persistent_save_interval",
        "mtp_loss_scaling_factor",
    )),
    (math.ulp(0), _NO_END, "more than 0", ("initial_loss_scale", "lightning_scale", "lightning_embedding_scale")),
    (math.ulp(0), 10**18, "more than 0, up to 1000000000000000000", ("rotary_base",)),  # an int of 64 bits
    (0, math.nextafter(1, 0), "0 or more, and less than 1", (
        "hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2", "lr_warmup_fraction", "sgd_momentum",
    )),
    (math.ulp(0), 1, "more than 0, and at most 1", ("rotary_percent", "lightning_rotary_percent")),
)  # fmt: skip

_BRINGS = "give it, or --lightning-model or --use-checkpoint-args, which bring it"
# Flags without a default, those that do as well, and what to do.
_NEEDED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("num_layers", ("encoder_num_layers", "hybrid_layer_pattern"), _BRINGS),
    ("hidden_size", (), _BRINGS),
    ("num_attention_heads", (), _BRINGS),
    ("seq_length", ("encoder_seq_length",), "give the tokens of a sample"),
    ("max_position_embeddings", (), "give --seq-length or more"),
    ("micro_batch_size", (), "give the samples that a rank computes at once, such as 1"),
)
_TO_TRAIN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("train_iters", ("train_samples",), "give the number of steps, or --skip-train"),
    ("lr", (), "give the learning rate, or --skip-train"),
)


def refuse_values(args: Namespace) -> None:
    """Refuse what the tables have. Flags as parsed, before Megatron validates them; with ``--use-checkpoint-args``,
    which completes them, only values that mean nothing.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    for low, high, allowed, names in _BOUNDS:
        for name in names:
            value = getattr(args, name, None)
            if isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"{flag_of(_FLAGS.get(name, name))}{shown(value)} is refused: give {allowed}")
    if args.use_checkpoint_args:  # which brings the model
        return
    for name, others, remedy in _NEEDED if args.skip_train else (*_NEEDED, *_TO_TRAIN):
        if all(getattr(args, given) is None for given in (name, *others)):
            raise ValueError(f"{flag_of(name)} is missing: {remedy}")
    refuse_contradictions(args)


def refuse_contradictions(args: Namespace) -> None:
    """Refuse flags that cannot go together. With ``--use-checkpoint-args``, flags as the checkpoint completes them.

    Raises:
        ValueError: naming the flags, their values and the remedy.
    """
    for row in CONTRADICTIONS:
        if row.when(args):
            values = {name: shown(value).strip() for name, value in vars(args).items()}
            raise ValueError(row.text.format(**values, data=data_parallel_size(args)))


_FLAGS = {"layernorm_epsilon": "norm_epsilon"}
_NAMES = "|".join(field.name for field in dataclasses.fields(LightningOptions))
_OPTION = re.compile(rf"(?<![\w(])(?:lightning )?\b({_NAMES})=('\w+'|[\w.-]*\w)")


@contextlib.contextmanager
def options_as_flags() -> Iterator[None]:
    """Name options by their flags in errors of the block: ``norm_groups=3`` of make_spec is --lightning-norm-groups 3.

    Raises:
        ValueError: with flags.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(_OPTION.sub(_as_flag, str(error))) from error


def _as_flag(option: re.Match) -> str:
    flag, value = flag_of(f"lightning_{option[1]}"), option[2].strip("'")
    return flag if value == "True" else f"{flag} {value}"


@contextlib.contextmanager
def megatron_refuses(given: Namespace) -> Iterator[None]:
    """Reword what Megatron says against a command line inside of the block, so that it names flags and their values.

    Raises:
        ValueError: instead of an assertion, of ``exit()`` without a status, and of any error of a tokenizer.
    """
    try:
        yield
    except SystemExit as stop:
        if stop.code:
            raise
        raise ValueError("Megatron refuses the command line; the line above says why") from stop
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any("/megatron/core/tokenizers/" in frame.filename for frame in frames):
            last = (str(error).strip() or repr(error)).splitlines()[0]
            files = "".join(
                f" {flag_of(name)} {value}"
                for name in ("tokenizer_model", "vocab_file", "merge_file")
                if (value := getattr(given, name)) is not None
            )
            raise ValueError(
                f"--tokenizer-type {given.tokenizer_type}{files}: cannot be read ({type(error).__name__}: {last}); "
                "give the file or folder of such a tokenizer"
            ) from error
        if not isinstance(error, AssertionError | ValueError | ZeroDivisionError):
            raise
        raise ValueError(_with_flags(error, given, frames[-1])) from error


def _with_flags(error: Exception, given: Namespace, frame: traceback.FrameSummary) -> str:
    """What an error of Megatron says, with the flags that it means; half of its checks are bare assertions."""
    text, line = " ".join(str(error).split()), (frame.line or "").strip()
    if isinstance(error, ZeroDivisionError) or not text:
        text = f"Megatron checks `{line.removeprefix('assert ')}`, which does not hold"
    if "--" in text:
        return text
    found = (
        _flags_in(f"{text} {line}", given)
        or [name for name, value in vars(given).items() if isinstance(value, str) and f'"{value}"' in text]
        or _flags_in(_condition(frame), given)
    )
    flags = ", ".join(
        f"{flag_of(name)}{' not given' if value is None or value is False else shown(value)}"
        for name, value in ((name, getattr(given, name)) for name in found)
    )
    return f"{text} (given: {flags}; change one of them)" if flags else text


def _condition(frame: traceback.FrameSummary) -> str:
    """Of the innermost `if` around a line of source."""
    line = frame.lineno or 0
    around = [
        node
        for node in ast.walk(ast.parse("".join(linecache.getlines(frame.filename))))
        if isinstance(node, ast.If) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return ast.unparse(max(around, key=lambda node: node.lineno).test) if around else ""


def _flags_in(text: str, given: Namespace) -> list[str]:
    words = re.findall(r"[a-z][a-z0-9]*(?:[_-][a-z0-9]+)*", text.replace("args.", " "))
    names = dict.fromkeys(word.replace("-", "_") for word in words)
    return [name for name in names if name in vars(given) and ("_" in name or name == "lr")]
