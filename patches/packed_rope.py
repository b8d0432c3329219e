"""RoPE of softmax layers in one launch, and of packed documents that cross the chunks of context-parallel ranks.

Symbol:   megatron.core.transformer.attention.apply_rotary_pos_emb
Why:      without TransformerEngine Megatron turns q and k by eight operations each, which read and write them as often,
          and packed documents by a loop over them that waits for the GPU: more time than the attention itself takes.
          And with context parallelism it assumes each packed document is sharded separately (``cu_seqlens // cp_size``,
          core/models/common/embeddings/rope_utils.py). ``--dataloader-inter-document-masking`` shards the whole
          sequence, so documents cross chunks anywhere: softmax layers crash, or rotate by wrong angles silently. So
          they do where a batch brings other ranks than the usual ones (``packed_seq_params.cp_group``).
Versions: megatron-core 0.19, 0.20
Can go:   when ``apply_rotary_pos_emb`` knows how the sequence was sharded, and has a kernel without TransformerEngine.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core import parallel_state

from ..config import prepared_with
from ..packed import dynamic_batch
from ..rope import one_launch, packed_angles, turn_tokens
from ._replace import replace

SYMBOLS = ("megatron.core.transformer.attention.apply_rotary_pos_emb",)
PARAMETERS = ("t", "freqs", "config", "cu_seqlens", "mscale", "cp_group", "mla_rotary_interleaved")
LATER = (*PARAMETERS, "inverse", "mla_output_remove_interleaving", "max_seqlen")  # 0.20
# How documents of models are cut that nobody prepared: as Megatron assumes, until a model of this process has others.
_others = "zigzag-documents"


def _wrap(original: Callable) -> Callable:
    def apply_rotary_pos_emb(
        t, freqs, config, cu_seqlens=None, mscale=1.0, cp_group=None, mla_rotary_interleaved=False, **added
    ):
        how = dict(config=config, mscale=mscale, mla_rotary_interleaved=mla_rotary_interleaved)
        dynamic, prepared = dynamic_batch.get(), prepared_with(config)
        options, layout = (None, _others) if prepared is None else prepared[:2]
        if cp_group is None and cu_seqlens is not None:  # as Megatron does
            cp_group = parallel_state.get_context_parallel_group()
        group = cp_group
        if dynamic is not None:
            group, layout = dynamic.group, "zigzag"
        plain = not any(value for name, value in added.items() if name != "max_seqlen")
        own = plain and options is not None and one_launch(t, freqs, config, options.backend, mla_rotary_interleaved)
        ranks = 1 if cp_group is None else cp_group.size()
        packed = cu_seqlens is not None
        if packed and (own or dynamic is not None or (layout == "zigzag" and ranks > 1)):
            freqs = packed_angles(freqs, t.shape[0], group=group, layout=layout, cu_seqlens=cu_seqlens)
            t, cu_seqlens = t.unsqueeze(1), None
        if own:
            t = turn_tokens(t, freqs, **how, backend=options.backend)
        else:
            t = original(t, freqs, cu_seqlens=cu_seqlens, cp_group=cp_group, **how, **added)
        return t.squeeze(1) if packed and cu_seqlens is None else t

    return apply_rotary_pos_emb


def apply(*, across: bool = False) -> None:
    """Apply the patch; a second call does nothing. With ``--sft``, which shards each document separately, it keeps
    their angles where batches do not bring their own ranks.

    Args:
        across: documents cross the chunks of ranks, also those of models that nobody prepares.
    """
    global _others
    if across:
        _others = "zigzag"
    replace(
        SYMBOLS[0], PARAMETERS, _wrap,
        "one launch on a GPU, and packed documents may cross the chunks of context-parallel ranks", later=LATER,
    )  # fmt: skip
