"""What Megatron's packed_seq_params say: where documents lie, and which ranks share the batch."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams


def document_bounds(packed: PackedSeqParams) -> torch.Tensor:
    """Where documents lie, padded or not."""
    return packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded


def packed_bounds(packed: PackedSeqParams | None) -> torch.Tensor | None:
    """``document_bounds`` as lightning layers take it; None without packed documents.

    Raises:
        ValueError: documents that are not packed along the sequence.
    """
    if packed is None:
        return None
    if packed.qkv_format != "thd":
        raise ValueError(
            f"packed_seq_params.qkv_format={packed.qkv_format!r} is not supported; lightning layers take 'thd'"
        )
    return document_bounds(packed)


def layout_of(packed: PackedSeqParams | None, layout: str) -> str:
    """Which tokens a rank holds: Megatron cuts a batch of dynamic size, and one without documents, as a whole."""
    if layout == "zigzag-documents" and (packed is None or packed.local_cp_size is not None):
        return "zigzag"
    return layout


def sharing_group(
    packed: PackedSeqParams | None, usual: dist.ProcessGroup | None, *, contiguous: bool = False
) -> dist.ProcessGroup | None:
    """The ranks that share the sequence: the ``usual`` ones, but batches of dynamic size bring their own, or None for
    one rank.

    Args:
        contiguous: whether the caller takes a sequence of which every rank has one piece.

    Raises:
        ValueError: the batch says how many ranks, but brings another group or none; or its sequence is cut in a way
            that the caller does not take.
    """
    group = _sharing_group(packed, usual)
    cut = getattr(packed, "cp_partition_mode", "zigzag")  # of Megatron's branch dev; others have zigzag alone
    if group is not None and group.size() > 1 and cut != "zigzag" and not (contiguous and cut == "contiguous"):
        raise ValueError(
            f"packed_seq_params.cp_partition_mode is {cut!r}, and this layer was built for sequences cut as zigzag "
            "over context-parallel ranks: set cp_partition_mode of Megatron's config to zigzag"
        )
    return group


def _sharing_group(packed: PackedSeqParams | None, usual: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if packed is None or packed.cp_group is None and packed.local_cp_size is None:
        return usual
    size = 1 if packed.cp_group is None else packed.cp_group.size()
    if packed.local_cp_size not in (None, size):
        raise ValueError(
            f"packed_seq_params.local_cp_size is {packed.local_cp_size}, but cp_group there is "
            f"{'None' if packed.cp_group is None else f'of size {size}'}; give the group of the ranks that "
            "share this batch"
        )
    return packed.cp_group


class DynamicBatch(NamedTuple):
    """The ranks that share a batch of dynamic size, which is cut as a whole; ``group`` is None for one rank."""

    group: dist.ProcessGroup | None


# While a layer of Megatron computes one, whose parts do not all look at packed_seq_params (patches/packed_rope.py).
dynamic_batch: ContextVar[DynamicBatch | None] = ContextVar("dynamic_batch", default=None)
