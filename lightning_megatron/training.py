"""What the entry point gives to Megatron's training loop: configuration, datasets, batches, forward step and loss."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
    log_single_rank,
)
from megatron.training import get_args, get_timers, inprocess_restart, pretrain, print_rank_0, set_startup_timestamps
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.config import PretrainConfigContainer
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from .arguments import add_arguments, args_defaults, options_from_args, parts_in_use, refuse
from .config import LightningOptions, resolve_shape
from .ops import linear_cross_entropy
from .spec import get_hybrid_layer_specs, layer_norm, make_spec

logger = logging.getLogger("lightning_megatron")
stimer = StragglerDetector()

_SPIKE = 10  # a loss this many times the largest one so far is reported with --check-for-spiky-loss


def configure() -> tuple[PretrainConfigContainer, LightningOptions]:
    """Everything that the command line decides, checked, before any process talks to another.

    Raises:
        ValueError, AssertionError: the command line asks for something that cannot work.
    """
    raw = parse_args(add_arguments)
    refuse(raw)  # first, because Megatron opens files and builds the tokenizer while it validates
    options = options_from_args(raw)
    args = parse_and_validate_args(extra_args_provider=add_arguments, args_defaults=args_defaults(raw))
    args.spec = None  # --use-checkpoint-args brings the one that pretrain_gpt.py --spec saved
    refuse(args)
    config = core_transformer_config_from_args(args)
    resolve_shape(config, options, args.tensor_model_parallel_size)
    get_hybrid_layer_specs(config, options)  # only to hear now what it refuses
    model = gpt_config_from_args(args, config=config)
    model.transformer_layer_spec = make_spec(options)
    log_single_rank(logger, logging.INFO, parts_in_use(args, layer_norm(config).__name__))
    return pretrain_cfg_container_from_args(args, model), options


def needs_data(config: TransformerConfig, args: Namespace, vp_stage: int | None) -> bool:
    """Whether this pipeline stage reads batches: the ends read tokens and labels, with packing all read boundaries."""
    return is_packed(args) or is_end_of_pipeline(config, vp_stage)


def is_packed(args: Namespace) -> bool:
    """Whether samples carry document boundaries (cu_seqlens)."""
    return args.sft or args.dataloader_inter_document_masking


def is_end_of_pipeline(config: TransformerConfig, vp_stage: int | None) -> bool:
    """First or last stage, or one with multi-token prediction: it needs tokens, labels and loss mask."""
    return is_first_or_last_pipeline_stage(vp_stage) or mtp_here(config, vp_stage)


def mtp_here(config: TransformerConfig, vp_stage: int | None) -> bool:
    """Whether this stage holds multi-token prediction layers."""
    layout = config.pipeline_model_parallel_layout
    return mtp_on_this_rank(
        layout=layout, mtp_num_layers=config.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage
    )


_BATCH = (
    "tokens", "position_ids", "labels", "loss_mask", "attention_mask",
    "cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group",
)  # fmt: skip
_BOUNDARIES = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")


def get_batch(
    data_iterator: Iterator[dict] | None, config: TransformerConfig, vp_stage: int | None, micro_batch_size: int
) -> dict[str, Any]:
    """This rank's slice of the next microbatch; every key of ``_BATCH`` is there, None where the stage needs none.

    Tensors are [b, s], with packing [1, b s]; cu_seqlens is [1, documents + 1] int32.
    """
    args = get_args()
    nothing: dict[str, Any] = dict.fromkeys(_BATCH)
    if not needs_data(config, args, vp_stage):
        return nothing
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        batch = {k: None if sample.get(k) is None else sample[k].cuda(non_blocking=True) for k in _BATCH}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=is_packed(args),
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_here(config, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not is_end_of_pipeline(config, vp_stage):
        return nothing | {key: batch[key] for key in _BOUNDARIES}
    batch = get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=not args.sft,
    )
    return nothing | batch


def packed_seq_params(batch: dict[str, Any], seq_length: int) -> PackedSeqParams | None:
    """Document boundaries as attention layers take them, or None where samples carry none.

    Boundaries are those of the padded documents, because that is where the data lies in the batch.
    """
    if batch["cu_seqlens"] is None:
        return None
    padded = batch["cu_seqlens_padded"]
    padded = None if padded is None else padded.squeeze(0)
    boundaries = batch["cu_seqlens"].squeeze(0) if padded is None else padded
    longest = int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=seq_length,
    )


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum of the token losses, the number of tokens it is a sum of, and both for the log. Megatron divides."""
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)

    rerun = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for reject, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            message = f"found {name} in local forward loss calculation"
            rerun.validate_result(result=loss, rejection_func=reject, message=message, tolerance=0.0, fatal=True)
    if args.check_for_spiky_loss:
        spike = partial(rerun.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        rerun.validate_result(result=loss, rejection_func=spike, message="Spiky loss", tolerance=0.0, fatal=False)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def chunked_loss(
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    scale_logits: Callable,
    context: int,
    **_: Any,
) -> torch.Tensor:
    """GPTModel's ``output_processor``: the loss [b, s] as of ``compute_language_model_loss``, of ``context`` tokens at a time.

    It goes through the output layer's own call, whose hooks wait for its weight (--overlap-param-gather) and whose forward
    knows which weight, group and layout: only the product in it is another one, which returns losses instead of logits.
    """

    def product(input, weight, bias, sequence_parallel, tp_group, **_):
        if bias is not None:
            raise ValueError(
                "--lightning-loss-chunk needs an output layer without bias: build it without, or leave the flag out"
            )
        return linear_cross_entropy(
            input, weight, labels.transpose(0, 1), tp_group, chunk=context, sequence_parallel=sequence_parallel
        )

    output_layer._forward_impl = product
    try:
        # scaled hidden states (--use-mup) make scaled logits
        loss, _ = output_layer(scale_logits(hidden_states), weight=output_weight, runtime_gather_output=False)
    finally:
        del output_layer._forward_impl
    return loss.transpose(0, 1).contiguous()


def forward_step(
    data_iterator: Iterator[dict] | None, model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Any, Callable]:
    """One microbatch through this pipeline stage; what Megatron's schedules call."""
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        samples = args.micro_batch_size if model.training else args.eval_micro_batch_size
        batch = get_batch(data_iterator, get_model_config(model), vp_stage, samples)
    packed = packed_seq_params(batch, args.seq_length)
    if packed is not None and not vp_stage and model.training:
        # Feeds the FLOPs count of one training step: once per microbatch, not once per chunk or evaluation.
        update_seqlen_stats_from_cu_seqlens(batch["cu_seqlens"].squeeze(0))
    timers("batch-generator").stop()

    # --overlap-moe-expert-parallel-comm asks for the plan of the step instead of the step.
    forward = model.build_schedule_plan if return_schedule_plan else model
    chunks = {"output_processor": chunked_loss, "output_processor_context": args.loss_chunk} if args.loss_chunk else {}
    with stimer:
        output = forward(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed,
            **chunks,
        )
    return output, partial(loss_func, batch["loss_mask"])


def datasets_provider(config: TransformerConfig, samples: list[int], vp_stage: int | None = None) -> Any:
    """Train, validation and test datasets of ``samples`` sequences each; None where this rank reads none."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    dataset_config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=sequences and json.loads(Path(sequences).read_text("utf-8")),
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    dataset = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset

    def built_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and needs_data(config, args, vp_stage)

    print_rank_0("> building train, validation, and test datasets ...")
    return BlendedMegatronDatasetBuilder(dataset, samples, built_here, dataset_config).build()


def embedding_ranks(config: TransformerConfig, tied: bool, pp_ranks: list[int]) -> list[int]:
    """Ranks of a pipeline group with a word embedding: the first, the last if tied to it, those with MTP layers."""
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        ranks |= {pp_ranks[-1]} if tied else set()
        ranks |= set(get_mtp_ranks(pp_ranks, config))
    return sorted(ranks)


def run(container: PretrainConfigContainer, program_start: float, main_entry: float) -> None:
    """Train, once everything is decided and patched. The two times are for Megatron's start-up report."""
    set_startup_timestamps(program_start=program_start, main_entry=main_entry)
    train, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    config = container.model.transformer
    provider = partial(datasets_provider, config)
    provider.is_distributed = True  # every rank calls it, and each decides what it reads
    tied = container.model.share_embeddings_and_output_weights
    train(
        container,
        provider,
        ModelType.encoder_or_decoder,
        forward_step,
        store=store,
        get_embedding_ranks=partial(embedding_ranks, config, tied),
    )
