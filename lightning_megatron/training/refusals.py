"""What the own entry point refuses of its command line, before Megatron acts on it."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from ..compat import importable
from ..config import LINEAR_HEADS
from ..flags import flag_of, refuse_parts, shown
from ..runtime import loader_layout
from .arguments import COUNTED, KERNELS, args_defaults, has_training_data, has_validation_data
from .sources import blends

_UPSTREAM = "Megatron-LM's pretrain_gpt.py with --spec lightning_megatron.spec lightning_spec"

# Flags of Megatron that select another model, another loss or another input than this entry point builds; ../flags has
# those that matter with --spec, too.
_REFUSED = {
    "spec": "this entry point builds the lightning spec itself: leave the flag out and use the --lightning-* flags, or "
    f"run {_UPSTREAM}",
    "hybrid_override_pattern": "it is an older name: use --hybrid-layer-pattern",
    "hybrid_context_parallel": "its scheduler of samples is not wired here: leave it out (layers take its groups)",
    "fim_data": f"it is not supported here: run {_UPSTREAM}",
    "logits_load_dir": f"it is not supported here: run {_UPSTREAM}",
    "linear_num_key_heads": LINEAR_HEADS,
    "linear_num_value_heads": LINEAR_HEADS,
    "linear_conv_kernel_dim": "lightning layers have no convolution: leave it out",
    "perform_rl_step": "this entry point only pretrains and fine-tunes: leave it out",
}

_WHOLE_WEIGHT = "chunks read the output layer's weight where it may be sharded: use --use-distributed-optimizer"
# ... and those that use the output layer otherwise than --lightning-loss-chunk does.
_REFUSED_WITH_LOSS_CHUNK = {
    "mtp_num_layers": "its layers take the logits of all tokens: leave out one of the two (--mtp-num-layers 0, where a "
    "model or a checkpoint brings it)",
    "fp8_output_proj": "chunks are multiplied in the dtype of the parameters: leave out one of the two",
    "defer_embedding_wgrad_compute": "it keeps the gradient of the logits of all tokens: leave it out",
    "use_megatron_fsdp": _WHOLE_WEIGHT,
    "use_torch_fsdp2": _WHOLE_WEIGHT,
}

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}

_INDEX_OF_A_SAMPLE = 12  # bytes: 4 for its place in the shuffled order, 2 x 4 for where it begins; 8 each in long ones

_FILES = (
    "tokenizer_model", "vocab_file", "merge_file", "data_args_path", "per_split_data_args_path",
    "per_dataset_sequences_path", "te_precision_config_file", "tp_comm_overlap_cfg", "nccl_communicator_config_path",
)  # fmt: skip


def refuse(args: Namespace) -> None:
    """Refuse parsed arguments that cannot work here, before Megatron acts on them.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    refuse_parts(args)
    _refuse_any(args, _REFUSED, "is refused")
    layout = loader_layout(args)
    if args.cp_layout not in (None, "auto", layout):
        raise ValueError(
            f"--lightning-cp-layout {args.cp_layout} is refused: Megatron's data loader cuts sequences as {layout}, so "
            "leave the flag out"
        )
    if args.loss_chunk is not None:
        if args.loss_chunk < 1:
            raise ValueError(
                f"--lightning-loss-chunk {args.loss_chunk} must be 1 token or more: use some thousand, or leave it out"
            )
        _refuse_any(args, _REFUSED_WITH_LOSS_CHUNK, f"is refused with --lightning-loss-chunk {args.loss_chunk}")
        if "/" in (args.hybrid_layer_pattern or ""):
            raise ValueError(
                f"--hybrid-layer-pattern {args.hybrid_layer_pattern} is refused with --lightning-loss-chunk "
                f"{args.loss_chunk}: layers of multi-token prediction (behind /) take the logits of all tokens; leave "
                "out one of the two"
            )
        dtype = _DTYPES.get(logits := getattr(args, "logit_dtype", None), logits)  # in 0.20; first a name, then a dtype
        hidden = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        if dtype not in (None, hidden):
            raise ValueError(
                f"--output-logit-dtype {dtype} is refused with --lightning-loss-chunk {args.loss_chunk}: the logits of "
                f"chunks have the dtype of hidden states, {hidden}, and their loss is fp32; leave out one of the two"
            )
        if getattr(args, "gtp_weight_remat_size", 1) > 1:  # known once Megatron has validated the arguments
            raise ValueError(
                f"--tensor-parallel-num-weight-shards {args.tensor_parallel_num_weight_shards} is refused with "
                f"--lightning-loss-chunk {args.loss_chunk}: chunks need whole weights, so use "
                f"{args.tensor_model_parallel_size}, the tensor-parallel size, or leave it out"
            )
    routed = args.num_experts and (not isinstance(args.moe_layer_freq, list) or any(args.moe_layer_freq))
    if routed and args.tensor_model_parallel_size > 1 and not (args.sequence_parallel or args.skip_train):
        # Megatron says so in the first step
        raise ValueError(
            f"--num-experts {args.num_experts} with --tensor-model-parallel-size {args.tensor_model_parallel_size} "
            "trains with --sequence-parallel only: add that"
        )
    packed = "sft" if args.sft else "dataloader_inter_document_masking"
    if getattr(args, packed) and args.pipeline_model_parallel_size > 1:
        # Packing makes one sample of a microbatch, but Megatron's pipeline expects the unpacked shape to arrive.
        for name in ("micro_batch_size", "eval_micro_batch_size"):
            if (getattr(args, name) or 1) > 1:
                raise ValueError(
                    f"{flag_of(packed)} with --pipeline-model-parallel-size {args.pipeline_model_parallel_size} needs "
                    f"{flag_of(name)} 1, not {getattr(args, name)}: use 1, and more microbatches or a "
                    "longer --seq-length"
                )
    if args.save is not None and (args.save_interval or 0) < 1:
        raise ValueError(
            f"--save {args.save} needs --save-interval N, the iterations from one checkpoint to the next, not "
            f"{args.save_interval}: give it ({args.train_iters} saves once, at the end), or leave --save out"
        )
    if args.attention_backend is not None and args.attention_backend.name == "local":
        raise ValueError("--attention-backend local works only with --spec local: use --transformer-impl local")
    for name in ("transformers", "jinja2") if args.sft else ():
        if not importable(name):
            raise ValueError(
                f"--sft writes conversations with the package {name}, which does not import: pip install {name}"
            )
    for name, needs in (("lightning_backend", "triton"), ("lightning_cp_exchange", "direct")):
        if getattr(args, name) == needs and not torch.cuda.is_available():
            raise ValueError(f"{flag_of(name)} {needs} needs a CUDA device, and there is none: use auto")
    _refuse_missing_kernels(args)
    _refuse_missing_files(args)
    if not args.skip_train and not has_training_data(args):
        raise ValueError(
            "no training data, so nothing would be trained: give --train-data-path, or a --split with a first part, or "
            "--skip-train to evaluate only"
        )
    if args.eval_iters and not has_validation_data(args):
        raise ValueError(
            f"--eval-iters {args.eval_iters}, but no validation data: give --valid-data-path, or a --split with a "
            "second part, or leave --eval-iters out"
        )


def _refuse_any(args: Namespace, table: dict[str, str], refused: str) -> None:
    for attribute, remedy in table.items():
        value = getattr(args, attribute, None)
        if value not in (None, False):
            raise ValueError(f"{flag_of(attribute)}{shown(value)} {refused}: {remedy}")


def _refuse_missing_kernels(args: Namespace) -> None:
    for attribute, on, flag, against, module in KERNELS:
        if getattr(args, attribute) is on and not importable(module):
            raise ValueError(
                f"{flag} needs {module}, which does not import: install it, or use {against} (the default without it)"
            )


def _refuse_missing_files(args: Namespace) -> None:
    here = f"(rank {args.rank}, host {socket.gethostname()}; every node needs the same path)"
    for attribute in _FILES:
        value = getattr(args, attribute)
        if value is not None and not _may_exist(value, attribute == "tokenizer_model" and args.tokenizer_type):
            raise ValueError(f"{flag_of(attribute)} {value}: no such file or directory {here}")
    sources = blends(args)
    for name, prefix in ((name, prefix) for name, prefixes in sources for prefix in prefixes):
        if not _may_exist(prefix if args.sft else prefix + ".idx"):
            raise ValueError(
                f"{flag_of(name)} {prefix}: "
                + ("no such file" if args.sft else f"no {prefix}.idx; give the path without .bin or .idx")
                + f" {here}"
            )
    if not (args.mock_data or sources or args.data_args_path or args.per_split_data_args_path):
        raise ValueError("no data: give --data-path PREFIX (or --train-data-path and the like), or --mock-data")
    if not args.use_checkpoint_args:  # the checkpoint may bring the tokenizer
        refuse_missing_tokenizer(args)


def refuse_too_many_samples(args: Namespace) -> None:
    """Refuse a length of training or evaluation that no host could list: Megatron's data loader would count samples
    for hours, without a word. Flags as Megatron has validated them.

    Raises:
        ValueError: naming the flags that multiply to it, and the memory.
    """
    if args.sft or args.phase_transition_iterations:  # no index of samples; or one of a phase, counted later
        return
    train = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    steps = args.train_iters or train // args.global_batch_size
    times = 1
    if not args.skip_train:
        times = max(steps // args.eval_interval + 1 - (args.start_eval_at_iter or 0) // args.eval_interval, 0)
    evaluated = args.eval_iters * args.eval_global_batch_size
    evaluation = (
        f"--eval-iters {args.eval_iters} x --eval-global-batch-size {args.eval_global_batch_size}"  # test: once
    )
    whole = f"--train-iters {args.train_iters} x --global-batch-size {args.global_batch_size}"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for samples, flags in (
        (train, f"--train-samples {train}" if args.train_samples else whole),
        (evaluated * max(times, 1), f"{evaluation}, {times} times by --eval-interval" if times > 1 else evaluation),
    ):
        if (size := _INDEX_OF_A_SAMPLE * samples) > memory:
            raise ValueError(
                f"{flags} needs an index of {samples} samples, which Megatron builds in the host's memory: "
                f"{size / 2**30:.4g} GiB or more, of {memory / 2**30:.4g}; give fewer"
            )


def refuse_unwritable(args: Namespace) -> None:
    """Refuse folders that cannot be written, which Megatron finds out once it has trained. It makes them, as well.

    One process of each host tries, as the last of all checks.

    Raises:
        ValueError: naming flag, folder and cause.
    """
    if args.local_rank:
        return
    for attribute in ("save", "data_cache_path", "tensorboard_dir"):
        folder = getattr(args, attribute)
        if folder is None or "://" in folder:
            continue
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"{flag_of(attribute)} {folder}: cannot be written ({error.strerror}, host {socket.gethostname()}); "
                "give another folder, or the right to write there"
            ) from error


def refuse_missing_tokenizer(args: Namespace) -> None:
    """Refuse a run without a tokenizer, which Megatron finds out in a traceback."""
    kind = args.tokenizer_type or args_defaults(args).get("tokenizer_type")
    if kind is None:
        raise ValueError("no tokenizer: give --tokenizer-type, e.g. HuggingFaceTokenizer with --tokenizer-model PATH")
    if kind == "NullTokenizer" and args.vocab_size is None:
        if args.use_checkpoint_args:
            raise ValueError(
                "no tokenizer: the checkpoint was made without one, by lightning-convert or on mock data: give "
                "--tokenizer-type, e.g. HuggingFaceTokenizer with --tokenizer-model PATH; or --vocab-size for mock data"
            )
        raise ValueError("NullTokenizer (the default with --mock-data) needs --vocab-size")


def _may_exist(path: str, tokenizer_type: str | bool | None = None) -> bool:
    """False only if ``path`` is surely wrong: URLs and names on the Hugging Face hub are left to their readers."""
    hub_name = tokenizer_type in ("HuggingFaceTokenizer", "SFTTokenizer") and re.fullmatch(
        r"\w[\w.-]*(/[\w.-]+)?", path
    )
    return "://" in path or bool(hub_name) or Path(path).exists()


def refuse_small_vocabulary(args: Namespace, tokens: int) -> None:
    """Refuse an embedding with fewer rows than the tokenizer has tokens, which ends in an index error on the GPU."""
    if args.padded_vocab_size is not None and args.padded_vocab_size < tokens:
        came = "the checkpoint, by --use-checkpoint-args" if args.use_checkpoint_args else "the command line"
        counted = " or --vocab-size" if args.tokenizer_type in COUNTED else ""
        raise ValueError(
            f"--padded-vocab-size {args.padded_vocab_size} (of {came}) is below the {tokens} tokens of the tokenizer: "
            f"give another tokenizer{counted}, or at least that many"
        )
