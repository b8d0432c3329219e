"""Datasets, and this rank's slice of every microbatch."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    log_single_rank,
)
from megatron.training import get_args, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from ..parallel import token_positions
from .sft import AnswersDataset, ChatDataset
from .sources import DataError

logger = logging.getLogger("lightning_megatron")


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
_OF_TOKENS = ("tokens", "labels", "loss_mask", "position_ids", "padding_mask")


def get_batch(
    data_iterator: Iterator[dict] | None, config: TransformerConfig, vp_stage: int | None, micro_batch_size: int
) -> dict[str, Any]:
    """This rank's slice of the next microbatch; every key of ``_BATCH`` and padding_mask are there, None where the
    stage needs none.

    Tensors are [b, s], with packing [1, b s]; cu_seqlens is [1, documents + 1] int32; padding_mask is bool, there on
    every stage if ``names_padding``.

    Raises:
        ValueError: documents that context-parallel ranks cannot share (--sft).
    """
    args = get_args()
    nothing: dict[str, Any] = dict.fromkeys((*_BATCH, "padding_mask"))
    if not needs_data(config, args, vp_stage):
        return nothing
    batch, sample = {}, {}
    alone = mpu.get_tensor_model_parallel_world_size() == 1
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        if args.sft:
            check_documents(_bounds(sample), args.context_parallel_size)
        batch = {key: sample.get(key) for key in _BATCH}
        if alone:  # here, where bounds can be read without waiting for the GPU
            batch = flatten_batch_for_packed_sequences(batch)
        stay = ("max_seqlen",) if alone else ()
        batch = {k: x if x is None or k in stay else x.cuda(non_blocking=True) for k, x in batch.items()}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=is_packed(args) and not alone,  # to send
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
    batch = batch if alone else flatten_batch_for_packed_sequences(batch)
    if names_padding(config, args):
        batch["padding_mask"] = _padding(sample, (micro_batch_size, args.seq_length)).reshape(1, -1)
    cp_group = mpu.get_context_parallel_group()
    if not is_end_of_pipeline(config, vp_stage):
        middle = {key: batch[key] for key in (*_BOUNDARIES, "padding_mask") if key in batch}
        return nothing | (documents_on_this_cp_rank(middle, cp_group) if "padding_mask" in middle else middle)
    if args.sft:  # each document is cut by itself; Megatron does it with TransformerEngine only
        return nothing | documents_on_this_cp_rank(batch, cp_group)
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group, use_per_sequence_balancing=True)
    return nothing | batch


def names_padding(config: TransformerConfig, args: Namespace) -> bool:
    """Whether a model is told which tokens are padding: experts would count them. Megatron's quantile balancing, which
    counts nothing, refuses to be told.
    """
    return (
        args.sft and bool(config.num_moe_experts) and "quantile_balancing" not in config.moe_router_load_balancing_type
    )


def _padding(sample: dict[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    """The mask [b, s] of rank 0's ``sample``, on all tensor-parallel ranks; Megatron sends what it knows, alone."""
    group = mpu.get_tensor_model_parallel_group()
    if group.rank() == 0:
        mask = sample["padding_mask"].cuda(non_blocking=True)
    else:
        mask = torch.empty(shape, dtype=torch.bool, device=torch.cuda.current_device())
    if group.size() > 1:
        dist.broadcast(mask, mpu.get_tensor_model_parallel_src_rank(), group=group)
    return mask


def padding_of_stage(mask: torch.Tensor, args: Namespace, first: bool) -> torch.Tensor:
    """The mask as a pipeline stage takes it: of the sequence-parallel rank's tokens, [1, s] -> [1, s / ranks].

    Megatron's GPTModel cuts it by itself on the ``first`` stage, where it has tokens, too, and on no other.
    """
    ranks = args.tensor_model_parallel_size if args.sequence_parallel else 1
    if ranks == 1 or (first and args.hybrid_layer_pattern is None):
        return mask
    return mask.chunk(ranks, 1)[mpu.get_tensor_model_parallel_rank()].contiguous()


def _bounds(batch: dict[str, Any]) -> torch.Tensor:
    padded = batch.get("cu_seqlens_padded")
    return batch["cu_seqlens"] if padded is None else padded


def check_documents(cu_seqlens: torch.Tensor, cp_size: int) -> None:
    """Refuse documents that do not give every context-parallel rank two chunks of the same length; cu_seqlens [b, n].

    ChatDataset pads them. The check runs where samples arrive, so that it waits for no GPU.

    Raises:
        ValueError: naming the first bound that is wrong.
    """
    wrong = cu_seqlens[cu_seqlens % (2 * cp_size) != 0] if cp_size > 1 else cu_seqlens[:0]
    if wrong.numel():
        raise ValueError(
            f"--context-parallel-size {cp_size} cuts every document of --sft into {2 * cp_size} equal chunks, but one "
            f"starts or ends at token {int(wrong[0])}; pad documents to a multiple of {2 * cp_size} tokens, or use "
            "--context-parallel-size 1"
        )


def documents_on_this_cp_rank(batch: dict[str, Any], cp_group: dist.ProcessGroup) -> dict[str, Any]:
    """The tokens of this context-parallel rank: of every document two of 2 * ranks chunks, the i-th from either end.

    Tensors [1, s] become [1, s / ranks]. Bounds stay those of whole documents, which is what attention layers take.
    """
    if cp_group.size() == 1:
        return batch
    tokens = next(batch[key].shape[1] for key in _OF_TOKENS if batch.get(key) is not None)
    here = token_positions(
        tokens // cp_group.size(), group=cp_group, layout="zigzag-documents", cu_seqlens=_bounds(batch).squeeze(0)
    )
    return batch | {key: batch[key].index_select(1, here) for key in _OF_TOKENS if batch.get(key) is not None}


def tokens_per_sample(args: Namespace) -> int | None:
    """Of a packed microbatch, those here of one sample, where samples stand one behind the other: experts have a loss
    of each (seq_aux_loss). None where ranks cut the microbatch elsewhere: Megatron divides by this number, and fails
    where it leaves a rest.
    """
    if args.sequence_parallel or (args.context_parallel_size > 1 and not args.sft):
        return None
    return args.seq_length // args.context_parallel_size


def packed_seq_params(batch: dict[str, Any], of_sample: int | None) -> PackedSeqParams | None:
    """Document boundaries as attention layers take them, or None where samples carry none.

    Boundaries are those of the padded documents, because that is where the data lies in the batch. ``of_sample`` is
    ``tokens_per_sample``.
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
        tokens_per_sample=of_sample,
    )


def _samples_of_schedule(args: Namespace) -> int:
    """Samples of --train-iters steps with --step-batch-size-schedule. Megatron counts a batch without it for each step,
    or leaves out a part of the last batch, so that the data would end before the training (StopIteration)."""
    consumed = 0
    for _ in range(args.train_iters):
        update_num_microbatches(consumed, consistency_check=False)
        consumed += get_current_global_batch_size()
    update_num_microbatches(args.consumed_train_samples, consistency_check=False)
    return consumed


class GPTDataset(gpt_dataset.GPTDataset):
    """Megatron's, under its name, which those of its cache hold; refused where it holds no token and some are wanted.

    Megatron's adds nothing to nothing until it is enough tokens, and never ends; its C++ aborts without documents.
    """

    def _build_document_sample_shuffle_indices(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        if len(self.indices):
            return super()._build_document_sample_shuffle_indices()  # type: ignore[no-any-return]
        if self.num_samples != 0:
            self._refuse()
        return numpy.empty(0, numpy.int32), numpy.zeros((1, 2), numpy.int32), numpy.empty(0, numpy.int32)

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        if not num_tokens_per_epoch:
            self._refuse()
        return int(super()._get_num_epochs(num_tokens_per_epoch))

    def _refuse(self) -> NoReturn:
        part, split = self.index_split.name, self.config.split
        if split is None:
            raise DataError(f"{self.dataset_path} holds no token to read as data of the {part} split; give another")
        raise DataError(
            f"--split {split}: the {part} part of {self.dataset_path} holds no token, as that has "
            f"{self.numel_low_level_dataset(self.dataset)} documents; give a --split with a larger part, such as "
            "90,5,5, or files of its own to each (--train-data-path, --valid-data-path, --test-data-path)"
        )


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
    if args.sft:
        dataset = AnswersDataset if args.sft_answers_only else ChatDataset
    else:
        dataset = MockGPTDataset if args.mock_data else GPTDataset

    def built_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and needs_data(config, args, vp_stage)

    masked = args.sft or args.eod_mask_loss
    if masked and args.context_parallel_size > 1 and not args.calculate_per_token_loss:
        log_single_rank(
            logger,
            logging.WARNING,
            "every context-parallel rank divides its loss by its own number of tokens that count, which --sft and "
            "--eod-mask-loss leave unequal: pass --calculate-per-token-loss to weigh all tokens alike",
        )
    if args.step_batch_size_schedule is not None and args.train_iters and not args.phase_transition_iterations:
        samples = [max(samples[0], _samples_of_schedule(args)), *samples[1:]]
    print_rank_0("> building train, validation, and test datasets ...")
    built = BlendedMegatronDatasetBuilder(dataset, samples, built_here, dataset_config).build()
    if not args.full_validation and not args.eval_iters:  # an empty one would be an error of Megatron's loader
        built = [built[0], None, None]
    if args.dataloader_type != "cyclic":  # which begins anew
        _refuse_short(built, samples)
    return built


def _refuse_short(built: Any, samples: list[int]) -> None:
    """Refuse what ends before the training: Megatron reads several datasets without weights once (StopIteration)."""
    for name, dataset, wanted in zip(("training", "validation", "test"), built, samples, strict=True):
        if hasattr(dataset, "__len__") and not isinstance(dataset, list) and wanted and len(dataset) < wanted:
            raise DataError(
                f"the data of the {name} have {len(dataset)} samples, as several paths without weights are read once, "
                f"and it reads {wanted}: give a weight before each path, such as 1 A 1 B, or train for fewer samples "
                "(--train-iters, --global-batch-size, --eval-iters)"
            )
