"""RoPE of packed documents that cross the chunks of context-parallel ranks.

Symbol:   megatron.core.transformer.attention.apply_rotary_pos_emb
Why:      with context parallelism Megatron assumes each packed document is sharded separately (``cu_seqlens //
          cp_size``, core/models/common/embeddings/rope_utils.py). ``--dataloader-inter-document-masking`` shards the
          whole sequence, so documents cross chunks anywhere: softmax layers crash, or rotate by wrong angles silently.
          So they do where a batch brings other ranks than the usual ones (``packed_seq_params.cp_group``).
Versions: megatron-core 0.19, 0.20
Can go:   when ``apply_rotary_pos_emb`` knows how the sequence was sharded.
"""

from __future__ import annotations

from collections.abc import Callable

from ..config import prepared_with
from ..packed import dynamic_batch
from ..rope import packed_angles
from ._replace import replace

SYMBOLS = ("megatron.core.transformer.attention.apply_rotary_pos_emb",)
PARAMETERS = ("t", "freqs", "config", "cu_seqlens", "mscale", "cp_group", "mla_rotary_interleaved")
LATER = (*PARAMETERS, "inverse", "mla_output_remove_interleaving", "max_seqlen")  # 0.20


def _wrap(original: Callable) -> Callable:
    def apply_rotary_pos_emb(
        t, freqs, config, cu_seqlens=None, mscale=1.0, cp_group=None, mla_rotary_interleaved=False, **added
    ):
        how = dict(config=config, mscale=mscale, cp_group=cp_group, mla_rotary_interleaved=mla_rotary_interleaved)
        how |= added
        if cu_seqlens is not None and (dynamic := dynamic_batch.get()) is not None:
            freqs = packed_angles(freqs, t.shape[0], group=dynamic.group, layout="zigzag", cu_seqlens=cu_seqlens)
            return original(t.unsqueeze(1), freqs, **how).squeeze(1)
        prepared = prepared_with(config)  # another model of this process may have documents that are cut one by one
        whole = prepared is None or prepared[1] == "zigzag"
        if not whole or cu_seqlens is None or cp_group is None or cp_group.size() == 1:
            return original(t, freqs, cu_seqlens=cu_seqlens, **how)
        freqs = packed_angles(freqs, t.shape[0], group=cp_group, layout="zigzag", cu_seqlens=cu_seqlens)
        return original(t.unsqueeze(1), freqs, **how).squeeze(1)

    return apply_rotary_pos_emb


def apply() -> None:
    """Apply the patch; a second call does nothing. With ``--sft``, which shards each document separately, it acts on
    batches that bring their own ranks alone.
    """
    replace(
        SYMBOLS[0], PARAMETERS, _wrap, "packed documents may cross the chunks of context-parallel ranks", later=LATER
    )
