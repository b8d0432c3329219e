"""Self-attention of the softmax layers of a hybrid, where a batch brings the ranks that share it."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.transformer.attention import SelfAttention

from ..packed import DynamicBatch, dynamic_batch, sharing_group


class DynamicSelfAttention(SelfAttention):
    """Megatron's, which turns q and k as if the usual context-parallel ranks shared every batch.

    Where ``packed_seq_params`` bring other ranks (``cp_group``, ``local_cp_size``), angles follow those.

    Args:
        before_dynamic: called before such a batch; patches/packed_rope.py.
    """

    def __init__(self, *args, before_dynamic: Callable[[], None], **kwargs):
        super().__init__(*args, **kwargs)
        self.before_dynamic = before_dynamic

    def forward(self, hidden_states, attention_mask, *args, packed_seq_params=None, **kwargs):
        """As Megatron's."""
        packed, batch = packed_seq_params, None
        if packed is not None and not (packed.cp_group is None and packed.local_cp_size is None):
            self.before_dynamic()
            batch = DynamicBatch(sharing_group(packed, self.pg_collection.cp))
        token = dynamic_batch.set(batch)
        try:
            return super().forward(hidden_states, attention_mask, *args, packed_seq_params=packed, **kwargs)
        finally:
            dynamic_batch.reset(token)
