"""A microbatch of packed samples, as layers get it: bounds, their longest document, and that no GPU is waited for."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from megatron.training import global_vars

from lightning_megatron.training.data import get_batch, packed_seq_params
from tests import layers
from tests.launch import spawn

LENGTH = 16
BOUNDS = [[0, 5, 16], [0, 16], [0, 1, 9, 10, 16]]
MERGED, LONGEST = [0, 5, 16, 32, 33, 41, 42, 48], 16


def sample() -> dict[str, torch.Tensor]:
    """Three samples, with bounds filled up, as Megatron's datasets collate them."""
    tokens = torch.arange(3 * LENGTH).view(3, LENGTH)
    filled = [bounds + [LENGTH] * (LENGTH + 1 - len(bounds)) for bounds in BOUNDS]
    return {
        "tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(3, LENGTH), "position_ids": tokens % LENGTH,
        "cu_seqlens": torch.tensor(filled, dtype=torch.int32),
        "max_seqlen": torch.tensor([max(torch.tensor(x).diff()) for x in BOUNDS], dtype=torch.int32),
    }  # fmt: skip


def read(rank: int, world: int, gpus: bool) -> tuple[dict, list[int], int]:
    layers.start(tp=world)
    args = Namespace(
        sft=False, dataloader_inter_document_masking=True, context_parallel_size=1, tensor_model_parallel_size=world,
        pipeline_model_parallel_size=1, sequence_parallel=False, seq_length=LENGTH, hybrid_layer_pattern=None,
        create_attention_mask_in_dataloader=False, mtp_num_layers=None,
    )  # fmt: skip
    global_vars.set_args(args)
    config = layers.transformer_config(tensor_model_parallel_size=world)
    if gpus:
        torch.cuda.set_sync_debug_mode("error")
    batch = get_batch(iter([sample()]) if rank == 0 else None, config, None, 3)
    packed = packed_seq_params(batch, None)
    if gpus:
        torch.cuda.set_sync_debug_mode("default")
    found = {name: batch[name].cpu() for name in ("tokens", "labels", "loss_mask", "position_ids")}
    return found, packed.cu_seqlens_q.tolist(), packed.max_seqlen_q


@pytest.mark.parametrize("world, gpus", [(1, False), (2, False), pytest.param(1, True, marks=pytest.mark.gpu)])
def test_samples_become_one_packed_sequence(world, gpus):
    """On a GPU without waiting for it, which another one's broadcast does."""
    want = sample()
    for found, bounds, longest in spawn(read, world, gpus, gpus=gpus):
        assert bounds == MERGED and longest == LONGEST and type(longest) is int
        assert all(torch.equal(x, want[name].view(1, -1)) for name, x in found.items())
