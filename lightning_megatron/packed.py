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


def sharing_group(packed: PackedSeqParams | None, usual: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks that share the sequence: the ``usual`` ones, but batches of dynamic size bring their own, or None for
    one rank.

    Raises:
        ValueError: the batch says how many ranks, but brings another group or none.
    """
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
