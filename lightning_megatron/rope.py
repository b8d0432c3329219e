"""Rotary embedding of q and k in lightning layers, and of packed documents over context-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config

from .config import LightningOptions
from .parallel import token_positions


def own_rotary_embedding(config, options: LightningOptions, key_dim: int, cp_group) -> RotaryEmbedding | None:
    """The angles of a lightning layer where GPTModel passes none: with multi-latent attention, whose layers have their
    own. None where it passes them, or nothing is turned.
    """
    if not (options.rope and config.multi_latent_attention):
        return None
    percent = config.rotary_percent if options.rotary_percent is None else options.rotary_percent
    return RotaryEmbedding(
        key_dim, percent, config.rotary_interleaved, rotary_base=config.rotary_base,
        use_cpu_initialization=config.use_cpu_initialization, cp_group=cp_group,
    )  # fmt: skip


def own_angles(embedding, hidden_states: torch.Tensor, config, packed, inference_context, group):
    """What a layer's own rotary embedding returns for this rank's tokens, or packed for all positions there are."""
    if packed is not None and packed.max_seqlen_q is None:
        tp = config.tensor_model_parallel_size if config.sequence_parallel else 1
        length = hidden_states.shape[0] * tp * (1 if group is None else group.size())
    else:
        length = embedding.get_rotary_seq_len(inference_context, None, hidden_states, config, packed)
    return embedding(length, packed_seq=packed is not None)


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    *,
    config,
    layer_number: int,
    cu_seqlens: torch.Tensor | None,
    inference_context,
    cp_group: dist.ProcessGroup,
    group: dist.ProcessGroup | None,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's rotary embedding on the first ``--rotary-percent`` of the head dim, as its SelfAttention applies it.

    Args:
        q, k: ``[s, b, H, K]`` and ``[s, b, Hkv, K]``, this rank's tokens.
        rotary_pos_emb: angles ``[length, 1, 1, dim]`` from GPTModel, or a pair of them for q and k.
        cu_seqlens: bounds of packed documents in the whole sequence.
        inference_context: its ``sequence_len_offset`` tokens come before these.
        cp_group: the usual context-parallel ranks.
        group, layout: the ranks that share this batch, and which tokens each holds.

    Raises:
        ValueError: no angles, or more channels than K.
    """
    if config.no_rope_freq and config.no_rope_freq[layer_number - 1]:
        return q, k
    if rotary_pos_emb is None:
        raise ValueError("lightning rope needs a rotary embedding from the model; pass --position-embedding-type rope")
    freqs = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
    if freqs[0].shape[-1] > q.shape[-1]:
        raise ValueError(
            f"the rotary embedding turns {freqs[0].shape[-1]} channels, but q and k of this lightning layer have "
            f"{q.shape[-1]}; use a smaller --rotary-percent, or a larger --lightning-key-head-dim"
        )
    return turn(
        q, k, freqs, config=config, mscale=_yarn_get_concentration_factor_from_config(config), cu_seqlens=cu_seqlens,
        inference_context=inference_context, cp_group=cp_group, group=group, layout=layout,
    )  # fmt: skip


def turn(
    q: torch.Tensor,
    k: torch.Tensor,
    freqs: tuple[torch.Tensor, torch.Tensor],
    *,
    config,
    mscale: float,
    cu_seqlens: torch.Tensor | None,
    inference_context,
    cp_group: dist.ProcessGroup,
    group: dist.ProcessGroup | None,
    layout: str,
    **how: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's ``apply_rotary_pos_emb`` with the angles of this rank's tokens; arguments as of ``rotate``.

    ``mscale`` is the factor of YaRN, 1 without it; ``how`` goes to Megatron's function.
    """
    if inference_context is not None:
        start = inference_context.sequence_len_offset
        freqs = tuple(f[start : start + q.shape[0]] for f in freqs)
    packed = cu_seqlens is not None
    if packed and group is not None and group.size() > 1:
        # Megatron's packed rope assumes each document is sharded separately: here every token gets its own angle
        sharding = dict(group=group, layout=layout, cu_seqlens=cu_seqlens)
        freqs, packed = tuple(packed_angles(f, q.shape[0], **sharding) for f in freqs), False
    common = dict(
        config=config,
        cu_seqlens=cu_seqlens if packed else None,
        mscale=mscale,
        cp_group=cp_group,
        **how,
    )
    q, k = (
        apply_rotary_pos_emb(x.squeeze(1) if packed else x, f, **common) for x, f in zip((q, k), freqs, strict=True)
    )
    return (q.unsqueeze(1), k.unsqueeze(1)) if packed else (q, k)


def packed_angles(
    freqs: torch.Tensor, tokens: int, *, group: dist.ProcessGroup, layout: str, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Rotary angles of this rank's tokens ``[tokens, 1, 1, dim]``, by their positions in their documents.

    ``freqs [length, 1, 1, dim]`` belong to positions in a document; or, if there are as many as tokens on all ranks, to
    positions in the whole sequence, which is what Megatron's GPTModel passes to its layers.
    """
    positions = token_positions(tokens, group=group, layout=layout, cu_seqlens=cu_seqlens)
    if freqs.shape[0] != tokens * group.size():
        bounds = cu_seqlens.long()
        positions = positions - bounds[torch.searchsorted(bounds, positions, right=True) - 1]
    return freqs[positions]
