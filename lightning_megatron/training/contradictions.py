"""Flags that cannot go together, as rows of a table; values.py reads it."""

from __future__ import annotations

import ast
import contextlib
import math
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

from ..compat import importable
from ..flags import flag_of
from ..flags.rules import loads


class Contradiction(NamedTuple):
    """A row of the table: flags that cannot go together."""

    when: Callable[[Namespace], Any]
    text: str  # with values in braces, as {num_layers}; begins with a flag, and ends with the remedy


def _cut(whole: int | None, *parts: int | None) -> bool:
    """Whether ``parts`` together do not divide ``whole``; what is not known, or refused by itself, does."""
    given = [part for part in parts if part is not None]
    return whole is not None and all(part > 0 for part in given) and whole % math.prod(given) != 0


def _model_size(args: Namespace) -> tuple[int, ...]:
    return args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size


def data_parallel_size(args: Namespace) -> int:
    """How many ranks share a global batch."""
    return max(args.world_size // math.prod(_model_size(args)), 1)


def _uneven(args: Namespace) -> bool:
    names = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout")
    extra = args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split
    extra = extra or "|" in (args.hybrid_layer_pattern or "")  # its stages may have any number of layers
    return extra or any(getattr(args, name) is not None for name in names)


def _ends(args: Namespace) -> int:
    return (args.decoder_first_pipeline_num_layers or 0) + (args.decoder_last_pipeline_num_layers or 0)


def _sum_of_split(text: str) -> float | None:
    try:
        return sum(float(part) for part in re.split(r"[,/\s]+", text.strip()))
    except ValueError:
        return None


def _listed(value: Any) -> list | None:
    """The list that an expression such as ([1]*3+[0]) makes, as Megatron's own parser made it; None for a number."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    return value if isinstance(value, list) else None


_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _count(text: str) -> int:
    text = text.strip().upper()
    factor = _SUFFIXES.get(text[-1:], 1)
    return int(float(text if factor == 1 else text[:-1]) * factor)


def _batches(args: Namespace) -> list[tuple[int, int]] | None:
    """First sample and batch size of each step of --step-batch-size-schedule, sorted; none if nobody gave it, None if
    it cannot be read."""
    if args.step_batch_size_schedule is None:
        return []
    try:
        pairs = [entry.split(":") for entry in args.step_batch_size_schedule.replace(",", " ").split()]
        steps = sorted((_count(start) // (args.seq_length or 1), _count(size)) for start, size in pairs)
    except (ValueError, OverflowError):
        return None
    return steps or None


_COMMUNICATION = ("p2p", "a2a", "all_gather", "a2a+p2p")
_OF_FILES = (
    "HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer",
    "SFTTokenizer",
)  # fmt: skip

CONTRADICTIONS = (
    # ---- processes
    Contradiction(
        lambda args: _cut(args.world_size, *_model_size(args)),
        "--tensor-model-parallel-size {tensor_model_parallel_size} x --pipeline-model-parallel-size "
        "{pipeline_model_parallel_size} x --context-parallel-size {context_parallel_size} does not divide the number "
        "of processes, {world_size}: start a multiple of it (torchrun --nproc-per-node, --nnodes), or give other sizes",
    ),
    Contradiction(
        lambda args: args.expert_model_parallel_size > 1 and not args.num_experts,
        "--expert-model-parallel-size {expert_model_parallel_size} spreads experts, and this model has none: leave it "
        "out, or give --num-experts",
    ),
    Contradiction(
        lambda args: args.num_experts and _cut(args.num_experts, args.expert_model_parallel_size),
        "--expert-model-parallel-size {expert_model_parallel_size} does not divide --num-experts {num_experts}: give a "
        "size that does",
    ),
    Contradiction(
        lambda args: _cut(
            args.world_size,
            args.expert_model_parallel_size,
            args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
        ),
        "--expert-model-parallel-size {expert_model_parallel_size}, times the tensor- and pipeline-parallel sizes, "
        "does not divide the number of processes, {world_size}: give another size, or --expert-tensor-parallel-size 1",
    ),
    # ---- what is cut over them
    Contradiction(
        lambda args: args.kv_channels is None and _cut(args.hidden_size, args.num_attention_heads),
        "--num-attention-heads {num_attention_heads} does not divide --hidden-size {hidden_size}: give a number that "
        "does, or --kv-channels, the dimension of a head",
    ),
    Contradiction(
        lambda args: _cut(args.num_attention_heads, args.tensor_model_parallel_size),
        "--tensor-model-parallel-size {tensor_model_parallel_size} does not divide --num-attention-heads "
        "{num_attention_heads}: give a size that does",
    ),
    Contradiction(
        lambda args: args.group_query_attention and _cut(args.num_attention_heads, args.num_query_groups),
        "--num-query-groups {num_query_groups} does not divide --num-attention-heads {num_attention_heads}: give a "
        "number that does",
    ),
    Contradiction(
        lambda args: _cut(args.ffn_hidden_size, args.tensor_model_parallel_size),
        "--tensor-model-parallel-size {tensor_model_parallel_size} does not divide --ffn-hidden-size "
        "{ffn_hidden_size}: give a size that does",
    ),
    Contradiction(
        lambda args: (
            args.num_experts
            and args.expert_tensor_parallel_size
            and _cut(args.moe_ffn_hidden_size, args.expert_tensor_parallel_size)
        ),
        "--expert-tensor-parallel-size {expert_tensor_parallel_size} does not divide --moe-ffn-hidden-size "
        "{moe_ffn_hidden_size}: give a size that does",
    ),
    Contradiction(
        lambda args: (
            args.num_experts
            and args.expert_tensor_parallel_size is None
            and _cut(args.moe_ffn_hidden_size, args.tensor_model_parallel_size)
        ),
        "--tensor-model-parallel-size {tensor_model_parallel_size} does not divide --moe-ffn-hidden-size "
        "{moe_ffn_hidden_size}: give a size that does, or --expert-tensor-parallel-size 1",
    ),
    Contradiction(
        lambda args: (
            args.num_experts and _cut(args.moe_shared_expert_intermediate_size, args.tensor_model_parallel_size)
        ),
        "--tensor-model-parallel-size {tensor_model_parallel_size} does not divide "
        "--moe-shared-expert-intermediate-size {moe_shared_expert_intermediate_size}: give a size that does",
    ),
    Contradiction(
        lambda args: args.context_parallel_size > 1 and _cut(args.seq_length, 2, args.context_parallel_size),
        "--context-parallel-size {context_parallel_size} cuts --seq-length {seq_length} into twice as many chunks, "
        "which does not come out even: give a length that 2 x {context_parallel_size} divides",
    ),
    Contradiction(
        lambda args: (
            args.sequence_parallel
            and _cut(args.seq_length, args.context_parallel_size, args.tensor_model_parallel_size)
        ),
        "--sequence-parallel needs a --seq-length that --tensor-model-parallel-size {tensor_model_parallel_size} x "
        "--context-parallel-size {context_parallel_size} divides, not {seq_length}: give one, or leave it out",
    ),
    Contradiction(
        lambda args: not _uneven(args) and _cut(args.num_layers, args.pipeline_model_parallel_size),
        "--pipeline-model-parallel-size {pipeline_model_parallel_size} does not divide --num-layers {num_layers}: give "
        "a size that does, or --decoder-last-pipeline-num-layers N for a shorter last stage",
    ),
    Contradiction(
        lambda args: args.num_layers is not None and _ends(args) > args.num_layers,
        "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers ask for more layers than "
        "--num-layers {num_layers}: give fewer",
    ),
    Contradiction(
        lambda args: (
            _ends(args)
            and args.num_layers is not None
            and (rest := args.pipeline_model_parallel_size
                 - sum(getattr(args, f"decoder_{end}_pipeline_num_layers") is not None for end in ("first", "last")))
            > 0
            and (args.num_layers - _ends(args)) % rest
        ),
        "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers leave a number of --num-layers "
        "{num_layers} that the other stages of --pipeline-model-parallel-size {pipeline_model_parallel_size} cannot "
        "share equally: give other numbers",
    ),
    *(
        Contradiction(
            lambda args, name=name: getattr(args, name) is not None and args.pipeline_model_parallel_size == 1,
            f"{flag_of(name)} {{{name}}} interleaves the stages of a pipeline, and there is none: give "
            "--pipeline-model-parallel-size 2 or more, or leave it out",
        )
        for name in ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage")
    ),
    *(
        Contradiction(
            lambda args, name=name: (
                not _uneven(args)
                and getattr(args, name) is not None
                and _cut(args.num_layers, args.pipeline_model_parallel_size, getattr(args, name))
            ),
            f"{flag_of(name)} {{{name}}} x --pipeline-model-parallel-size {{pipeline_model_parallel_size}} does not "
            "divide --num-layers {num_layers}: give numbers that do",
        )
        for name in ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage")
    ),
    Contradiction(
        lambda args: (
            min(_model_size(args)) > 0
            and not args.rampup_batch_size
            and not args.step_batch_size_schedule
            and args.micro_batch_size
            and _cut(args.global_batch_size, args.micro_batch_size, data_parallel_size(args))
            and not (
                args.decrease_batch_size_if_needed
                and args.global_batch_size > args.micro_batch_size * data_parallel_size(args)
            )
        ),
        "--global-batch-size {global_batch_size} is no multiple of --micro-batch-size {micro_batch_size} x {data} "
        "data-parallel ranks: give one",
    ),
    Contradiction(
        lambda args: (
            args.decrease_batch_size_if_needed
            and args.eval_global_batch_size is None  # which Megatron takes from the other, and does not decrease
            and min(_model_size(args)) > 0
            and (size := args.eval_micro_batch_size or args.micro_batch_size)
            and _cut(args.global_batch_size, size, data_parallel_size(args))
        ),
        "--decrease-batch-size-if-needed decreases --global-batch-size {global_batch_size}, and not the batch of "
        "evaluation, which must be a multiple of --micro-batch-size {micro_batch_size} (or --eval-micro-batch-size) x "
        "{data} data-parallel ranks: give --eval-global-batch-size, too",
    ),
    Contradiction(
        lambda args: _batches(args) is None,
        "--step-batch-size-schedule {step_batch_size_schedule} cannot be read: give pairs TOKENS:BATCH_SIZE with "
        "commas between them, such as 0:256,1B:512",
    ),
    Contradiction(
        lambda args: any(size < 1 for _, size in _batches(args) or ()),
        "--step-batch-size-schedule {step_batch_size_schedule} has a batch size below 1: give 1 or more",
    ),
    Contradiction(
        lambda args: (batches := _batches(args)) and batches[0][0] > 0,
        "--step-batch-size-schedule {step_batch_size_schedule} has no batch size for the first tokens: begin with "
        "0:BATCH_SIZE",
    ),
    Contradiction(
        lambda args: (batches := _batches(args)) and len(dict(batches)) < len(batches),
        "--step-batch-size-schedule {step_batch_size_schedule} changes the batch size twice within one sample: it "
        "counts tokens, so give numbers that are --seq-length {seq_length} or more apart",
    ),
    Contradiction(
        lambda args: (
            not args.load  # which may begin behind the first step
            and min(_model_size(args)) > 0
            and (batches := _batches(args))
            and _cut(batches[0][1], args.micro_batch_size, data_parallel_size(args))
        ),
        "--step-batch-size-schedule {step_batch_size_schedule} begins with a batch that is no multiple of "
        "--micro-batch-size {micro_batch_size} x {data} data-parallel ranks: give one",
    ),
    Contradiction(
        lambda args: (args.seq_length or 0) > (args.max_position_embeddings or math.inf),
        "--max-position-embeddings {max_position_embeddings} is below --seq-length {seq_length}: give at least that",
    ),
    # ---- the model
    Contradiction(
        lambda args: args.num_experts and args.moe_router_topk > args.num_experts,
        "--moe-router-topk {moe_router_topk} is above --num-experts {num_experts}: give at most that",
    ),
    Contradiction(
        lambda args: (
            args.num_experts
            and args.num_layers
            and (listed := _listed(args.moe_layer_freq)) is not None
            and len(listed) != args.num_layers
        ),
        "--moe-layer-freq {moe_layer_freq} must have one entry for each of --num-layers {num_layers}: give so many",
    ),
    Contradiction(
        lambda args: args.hybrid_layer_pattern and args.released_model,
        "--lightning-model {released_model} is a GPTModel, and --hybrid-layer-pattern {hybrid_layer_pattern} makes "
        "another: leave out one of the two",
    ),
    Contradiction(
        lambda args: args.hybrid_layer_pattern and args.moe_layer_freq != 1 and not args.use_checkpoint_args,
        "--moe-layer-freq {moe_layer_freq} and --hybrid-layer-pattern {hybrid_layer_pattern} both place experts: leave "
        "the first out, since E in the pattern says where they are",
    ),
    Contradiction(
        lambda args: args.moe_grouped_gemm and not args.num_experts,
        "--moe-grouped-gemm is about experts, and this model has none: leave it out, or give --num-experts",
    ),
    Contradiction(
        lambda args: (args.mtp_num_layers or 0) > 0 and args.position_embedding_type not in ("rope", "none"),
        "--mtp-num-layers {mtp_num_layers} does not take --position-embedding-type {position_embedding_type}: use rope "
        "or none",
    ),
    Contradiction(
        lambda args: (
            not args.add_position_embedding
            and args.position_embedding_type != "rope"
            and not args.use_rotary_position_embeddings
        ),
        "--no-position-embedding is an older name: use --position-embedding-type none",
    ),
    Contradiction(
        lambda args: args.bf16 and args.fp16,
        "--bf16 and --fp16 are both given: leave out one",
    ),
    Contradiction(
        lambda args: sum((args.swiglu, args.squared_relu, args.quick_geglu)) > 1,
        "--swiglu, --squared-relu and --quick-geglu each choose the activation: leave out all but one",
    ),
    Contradiction(
        lambda args: any(kind not in _COMMUNICATION for kind in args.cp_comm_type or ()),
        "--cp-comm-type {cp_comm_type} is unknown: choose from " + ", ".join(_COMMUNICATION),
    ),
    # ---- recompute
    Contradiction(
        lambda args: args.checkpoint_activations,
        "--checkpoint-activations is no option any more: use --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
    Contradiction(
        lambda args: args.recompute_granularity == "full" and args.recompute_method is None,
        "--recompute-granularity full needs --recompute-method uniform or block, and --recompute-num-layers: add them",
    ),
    Contradiction(
        lambda args: args.recompute_granularity == "full" and args.recompute_num_layers is None,
        "--recompute-granularity full needs --recompute-num-layers: add that, for uniform 1",
    ),
    *(
        Contradiction(
            lambda args, name=name: getattr(args, name) is not None and args.recompute_granularity != "full",
            f"{flag_of(name)} {{{name}}} recomputes nothing without --recompute-granularity full: add that, or leave "
            "it out",
        )
        for name in ("recompute_method", "recompute_num_layers")
    ),
    Contradiction(
        lambda args: args.recompute_modules is not None and args.recompute_granularity != "selective",
        "--recompute-modules {recompute_modules} acts with --recompute-granularity selective alone: add that, or leave "
        "it out",
    ),
    # ---- optimizer and schedule
    Contradiction(
        lambda args: _cut(data_parallel_size(args), args.num_distributed_optimizer_instances),
        "--num-distributed-optimizer-instances {num_distributed_optimizer_instances} does not divide the {data} "
        "data-parallel ranks: give a number that does",
    ),
    Contradiction(
        lambda args: args.train_iters == 0 and args.train_samples is None and not args.skip_train,
        "--train-iters 0 trains nothing: give 1 or more, or --skip-train to evaluate only",
    ),
    Contradiction(
        lambda args: args.train_iters is not None and args.train_samples is not None,
        "--train-iters {train_iters} and --train-samples {train_samples} both say how long to train: leave out one",
    ),
    *(
        Contradiction(
            lambda args, name=name, length=length: (
                not args.skip_train and getattr(args, length) and getattr(args, name)
            ),
            f"{flag_of(name)} {{{name}}} is counted in {unit}, and {flag_of(length)} {{{length}}} is not: give "
            f"{flag_of(length.replace('train', part))}, or {flag_of(other)}",
        )
        for length, other, unit in (
            ("train_iters", "train_samples", "samples"), ("train_samples", "train_iters", "iterations"),
        )
        for part in ("lr_decay", "lr_warmup")
        for name in (other.replace("train", part),)
    ),
    Contradiction(
        lambda args: (
            args.weight_decay_incr_style == "constant"
            and (args.start_weight_decay is not None or args.end_weight_decay is not None)
        ),
        "--start-weight-decay and --end-weight-decay are for a weight decay that grows: add --weight-decay-incr-style "
        "linear or cosine, or give --weight-decay instead",
    ),
    Contradiction(
        lambda args: args.lr is not None and args.min_lr is not None and args.min_lr > args.lr,
        "--min-lr {min_lr} is above --lr {lr}: give at most that",
    ),
    Contradiction(
        lambda args: args.lr_decay_style == "WSD" and not (args.lr_wsd_decay_iters or args.lr_wsd_decay_samples),
        "--lr-decay-style WSD needs --lr-wsd-decay-iters N, the steps of the decay at the end: add that",
    ),
    Contradiction(
        lambda args: args.lr_warmup_fraction is not None and (args.lr_warmup_iters or args.lr_warmup_samples),
        "--lr-warmup-fraction {lr_warmup_fraction} and --lr-warmup-iters or --lr-warmup-samples both say how long to "
        "warm up: leave out one",
    ),
    Contradiction(
        lambda args: (
            not args.skip_train
            and args.lr_warmup_iters
            and (args.lr_decay_iters or args.train_iters)
            and args.lr_warmup_iters >= (args.lr_decay_iters or args.train_iters)
        ),
        "--lr-warmup-iters {lr_warmup_iters} leaves none of the steps of --lr-decay-iters, or of --train-iters "
        "{train_iters}, for the decay: give fewer",
    ),
    Contradiction(
        lambda args: args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler,
        "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler take the schedule from different "
        "places: leave out one",
    ),
    # ---- data
    Contradiction(
        lambda args: args.sft and args.mock_data,
        "--sft reads conversations, and --mock-data makes up none: leave it out, and give --data-path FILE.jsonl",
    ),
    Contradiction(
        lambda args: args.data_path == [] or args.train_data_path == [] or args.valid_data_path == [],
        "--data-path, --train-data-path or --valid-data-path is given without a path: add one, without .bin or .idx",
    ),
    Contradiction(
        lambda args: args.data_path and (args.train_data_path or args.valid_data_path or args.test_data_path),
        "--data-path and --train-data-path, --valid-data-path or --test-data-path exclude each other: use --data-path "
        "with --split, or a path for each part",
    ),
    Contradiction(
        lambda args: args.split is not None and (args.train_data_path or args.per_split_data_args_path),
        "--split {split} cuts --data-path, and the parts are given: leave it out",
    ),
    Contradiction(
        lambda args: args.split is not None and not (_sum_of_split(args.split) or 0) > 0,
        "--split {split} is no split: give the shares of training, validation and test data, such as 969,30,1",
    ),
    Contradiction(
        lambda args: args.dataloader_type == "external",
        "--dataloader-type external is for programs with a loader of their own: use single or cyclic",
    ),
    Contradiction(
        lambda args: args.tokenizer_type in _OF_FILES and not args.tokenizer_model and not args.use_checkpoint_args,
        "--tokenizer-type {tokenizer_type} needs --tokenizer-model, its file or folder: give it",
    ),
    # ---- checkpoints, and what happens on the way
    Contradiction(
        lambda args: args.ckpt_step and not loads(args),
        "--ckpt-step {ckpt_step} chooses a checkpoint, and none is loaded: give --load, or leave it out",
    ),
    Contradiction(
        lambda args: (
            args.save_retain_interval
            and args.save_retain_interval > 0
            and (not args.save or args.save_retain_interval % (args.save_interval or 1))
        ),
        "--save-retain-interval {save_retain_interval} must be a multiple of --save-interval {save_interval}, with "
        "--save: give one",
    ),
    Contradiction(
        lambda args: args.non_persistent_ckpt_type == "local" and not importable("nvidia_resiliency_ext"),
        "--non-persistent-ckpt-type local needs the package nvidia_resiliency_ext, which does not import: install it, "
        "or use global",
    ),
    Contradiction(
        lambda args: (
            args.async_save
            and args.use_persistent_ckpt_worker  # without, Megatron saves at once, and says so
            and args.async_strategy == "nvrx"
            and not importable("nvidia_resiliency_ext")
        ),
        "--async-strategy nvrx, Megatron's default for --async-save, needs the package nvidia_resiliency_ext, which "
        "does not import: install it, or use mcore",
    ),
    Contradiction(
        lambda args: args.position_embedding_type == "mrope",
        "--position-embedding-type mrope needs positions of three axes, and data of this entry point has one: use rope",
    ),
    Contradiction(
        lambda args: args.async_save and args.ckpt_format not in ("torch_dist", "fsdp_dtensor"),
        "--async-save does not write --ckpt-format {ckpt_format}: use torch_dist, or leave it out",
    ),
    Contradiction(
        lambda args: args.profile and args.profile_step_end <= args.profile_step_start,
        "--profile-step-end {profile_step_end} is not after --profile-step-start {profile_step_start}, and nothing "
        "would be profiled: give a later step",
    ),
)  # fmt: skip
