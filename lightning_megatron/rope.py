"""Angles of q and k: rotary embeddings, those of packed documents over context-parallel ranks, and learnt ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from .caches.dynamic import token_index
from .config import LightningOptions
from .ops import rotary
from .ops.backend import choose
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


def own_angles(
    embedding, hidden_states: torch.Tensor, config, packed, inference_context, group, tokens: int | None = None
):  # fmt: skip
    """What a layer's own rotary embedding returns for this rank's tokens, or packed for all positions there are.

    ``tokens``: of the sequence of which these are a chunk.
    """
    if packed is not None and packed.max_seqlen_q is None and tokens is None:
        tp = config.tensor_model_parallel_size if config.sequence_parallel else 1
        tokens = hidden_states.shape[0] * tp * (1 if group is None else group.size())
    if tokens is None or packed is not None and packed.max_seqlen_q is not None:
        tokens = embedding.get_rotary_seq_len(inference_context, None, hidden_states, config, packed)
    return embedding(tokens, packed_seq=packed is not None)


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
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's rotary embedding on the first ``--rotary-percent`` of the head dim, as its SelfAttention applies it.

    Args:
        q, k: ``[s, b, H, K]`` and ``[s, b, Hkv, K]``, this rank's tokens.
        rotary_pos_emb: angles ``[length, 1, 1, dim]`` from GPTModel, or a pair of them for q and k.
        cu_seqlens: bounds of packed documents in the whole sequence.
        inference_context: knows the positions of these tokens.
        cp_group: the usual context-parallel ranks.
        group, layout: the ranks that share this batch, and which tokens each holds.
        backend: as of ``lightning_attn``.

    Raises:
        ValueError: no angles, angles of other tokens, or more channels than K.
    """
    if layout == "contiguous" and cu_seqlens is None and group is not None and group.size() > 1:
        raise ValueError(
            "lightning rope with layout='contiguous' over context-parallel ranks takes packed documents only: "
            "Megatron's GPTModel gives others the angles of layout='zigzag'; use that layout, or rope=False"
        )
    freqs = _angles(rotary_pos_emb, q.shape[-1], config, layer_number)
    if freqs is None:
        return q, k
    return turn(
        q, k, freqs, config=config, mscale=_yarn_get_concentration_factor_from_config(config), cu_seqlens=cu_seqlens,
        inference_context=inference_context, cp_group=cp_group, group=group, layout=layout, backend=backend,
    )  # fmt: skip


def _angles(rotary_pos_emb, channels: int, config, layer_number: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A pair for q and k, of which a layer has ``channels``; None where the layer turns nothing."""
    if config.no_rope_freq and config.no_rope_freq[layer_number - 1]:
        return None
    if rotary_pos_emb is None:
        raise ValueError("lightning rope needs a rotary embedding from the model; pass --position-embedding-type rope")
    freqs = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
    if freqs[0].shape[-1] > channels:
        raise ValueError(
            f"the rotary embedding turns {freqs[0].shape[-1]} channels, but q and k of this lightning layer have "
            f"{channels}; use a smaller --rotary-percent, or a larger --lightning-key-head-dim"
        )
    return freqs


def angle_table(rotary_pos_emb, channels: int, *, config, layer_number: int) -> tuple[torch.Tensor, float] | None:
    """Angles ``[positions, n]`` by which ``rotate`` turns tokens, and the factor of YaRN; None if it turns nothing."""
    freqs = _angles(rotary_pos_emb, channels, config, layer_number)
    return None if freqs is None else (freqs[0].flatten(1), _yarn_get_concentration_factor_from_config(config))


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
    backend: str | None = None,
    mla_rotary_interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's ``apply_rotary_pos_emb`` with the angles of this rank's tokens; arguments as of ``rotate``.

    ``mscale`` is the factor of YaRN, 1 without it; ``mla_rotary_interleaved`` as Megatron has it.
    """
    how = dict(config=config, mscale=mscale, mla_rotary_interleaved=mla_rotary_interleaved)
    if inference_context is not None:
        index = token_index(inference_context, q.shape[0])
        freqs = tuple(f[index] for f in freqs)
    own = one_launch(q, freqs[0], config, backend, mla_rotary_interleaved)
    if cu_seqlens is not None and (own or any(ranks is not None and ranks.size() > 1 for ranks in (group, cp_group))):
        # Megatron's packed rope assumes each document is sharded separately, over the usual ranks even where a batch
        # has one of its own: here every token gets its own angle
        sharding = dict(group=group, layout=layout, cu_seqlens=cu_seqlens)
        freqs, cu_seqlens = tuple(packed_angles(f, q.shape[0], **sharding) for f in freqs), None
    if own:
        q, k = (turn_tokens(x, f, **how, backend=backend) for x, f in zip((q, k), freqs, strict=True))
        return q, k
    packed, how = cu_seqlens is not None, how | dict(cu_seqlens=cu_seqlens, cp_group=cp_group)
    q, k = (apply_rotary_pos_emb(x.squeeze(1) if packed else x, f, **how) for x, f in zip((q, k), freqs, strict=True))
    return (q.unsqueeze(1), k.unsqueeze(1)) if packed else (q, k)


def one_launch(x: torch.Tensor, freqs: torch.Tensor, config, backend: str | None, mla_rotary_interleaved: bool) -> bool:
    """Whether ``turn_tokens`` takes the place of Megatron's operations, of which there are eight for q, and for k, and
    with packed documents as many for each.

    It does where TransformerEngine's kernel is off, and a position has one angle.
    """
    if config.apply_rope_fusion or freqs.shape[1:3] != (1, 1) or (mla_rotary_interleaved and config.rotary_interleaved):
        return False
    return choose(backend, x).NAME != "torch"


def turn_tokens(
    x: torch.Tensor, freqs: torch.Tensor, *, config, mscale: float, mla_rotary_interleaved: bool, backend: str | None
) -> torch.Tensor:
    """``[s, b, heads, d]`` turned by ``freqs [s, 1, 1, n]``, which hold the angle of each pair of channels twice."""
    interleaved, freqs = config.rotary_interleaved, freqs.flatten(1)
    angles = freqs[:, ::2] if interleaved else freqs[:, : freqs.shape[1] // 2]
    return rotary(
        x, angles, scale=mscale, interleaved=interleaved or mla_rotary_interleaved, interleaved_out=interleaved,
        backend=backend,
    )  # fmt: skip


def packed_angles(
    freqs: torch.Tensor, tokens: int, *, group: dist.ProcessGroup | None, layout: str, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Rotary angles of this rank's tokens ``[tokens, 1, 1, dim]``, by their positions in their documents.

    ``freqs [length, 1, 1, dim]`` belong to positions in a document; or, if there are as many as tokens on all ranks, to
    positions in the whole sequence, which is what Megatron's GPTModel passes to its layers.
    """
    ranks = 1 if group is None else group.size()
    whole = freqs.shape[0] == tokens * ranks
    if whole and ranks == 1:
        return freqs
    positions = token_positions(tokens, group=group, layout=layout, cu_seqlens=cu_seqlens)
    return freqs[positions if whole else _in_documents(positions, cu_seqlens)]


def chunk_angles(rotary_pos_emb, start: int, tokens: int, cu_seqlens: torch.Tensor | None):
    """Angles ``[tokens, 1, 1, dim]`` of so many tokens from ``start`` on, of those of all positions, or a pair of each;
    of packed documents by their positions in these.
    """
    if isinstance(rotary_pos_emb, (tuple, list)):
        return tuple(chunk_angles(x, start, tokens, cu_seqlens) for x in rotary_pos_emb)
    if rotary_pos_emb is None or cu_seqlens is None:
        return None if rotary_pos_emb is None else rotary_pos_emb[start : start + tokens]
    positions = torch.arange(start, start + tokens, device=rotary_pos_emb.device)
    return rotary_pos_emb[_in_documents(positions, cu_seqlens)]


def _in_documents(positions: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Positions in the whole sequence -> in their documents."""
    bounds = cu_seqlens.long()
    return positions - bounds[torch.searchsorted(bounds, positions, right=True) - 1]


class LRPE(torch.nn.Module):
    """Linearized relative positional encoding with learnt angles, on one tensor-parallel rank's heads.

    x -> [x cos(t theta), x sin(t theta)] at position t, so that q of token t and k of token s meet as
    sum_d q_d k_d cos((t - s) theta_d). theta ``[heads, K]`` is a parameter, first 10000^(-2 i / (H K)) of channel i of
    all H heads (Qin et al. 2023, "Linearized Relative Positional Encoding"; TransNormerLLM, section 3.1).
    """

    def __init__(self, heads: int, dim: int, *, tp_group, dtype: torch.dtype):
        """``heads`` on this rank, each of ``dim`` channels."""
        super().__init__()
        self.tp_group = tp_group
        channels = heads * dim
        i = torch.arange(channels, device="cpu", dtype=torch.float64) + tp_group.rank() * channels
        theta = (10000 ** (-2 / (channels * tp_group.size()) * i)).reshape(heads, dim)
        self.theta = torch.nn.Parameter(theta.to(torch.cuda.current_device(), dtype))
        set_tensor_model_parallel_attributes(self.theta, is_parallel=True, dim=0, stride=1)
        # Angles, no matrix that multiplies: by this mark Muon leaves them to its optimizer of vectors and embeddings.
        self.theta.is_embedding_or_output_parameter = True

    def forward(
        self,
        *xs: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        inference_context,
        group: dist.ProcessGroup | None,
        layout: str,
        start: int = 0,
    ) -> list[torch.Tensor]:
        """Each x ``[s, b, heads, K]``, of tokens from ``start`` on, -> ``[s, b, heads, 2 K]``; the other arguments are
        those of ``rotate``.
        """
        tokens, device = xs[0].shape[0], xs[0].device
        positions = start + token_positions(tokens, group=group, layout=layout, cu_seqlens=cu_seqlens, device=device)
        if cu_seqlens is not None:
            positions = _in_documents(positions, cu_seqlens)
        if inference_context is not None:
            index = token_index(inference_context, tokens)
            positions = positions + index.start if isinstance(index, slice) else index
        # in fp32 at least: in bf16 neighbouring positions have the same angle
        wide = torch.promote_types(self.theta.dtype, torch.float32)
        angles = positions.to(wide)[:, None, None, None] * self.theta.to(wide)
        turns = [f(angles).to(xs[0].dtype) for f in (torch.cos, torch.sin)]
        return [torch.cat([x * turn for turn in turns], dim=-1) for x in xs]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Shards for distributed checkpoints: slices are whole heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"theta": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
