"""Multi-latent attention in softmax layers: without TransformerEngine and over context-parallel ranks, and with it."""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from ..packed import document_bounds, sharing_group
from ..rope import own_angles, turn
from .paged import Requests, decode, read


class _AsInTheSpec(MLASelfAttention):
    """Has the projections and norms of its spec.

    Megatron refuses a norm of the latent beside queries without one where only TransformerEngine has the layer that it
    would take for these; and with TransformerEngine it puts a second norm before such queries, which no released model
    has.

    Megatron sums the gradient of what has q_layernorm in its name over tensor-parallel ranks, as these have other heads
    (core/distributed/finalize_model_grads.py). Here the norm is that of a latent, of which every rank has the whole
    gradient, but for sequence parallelism: it shall be averaged.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.q_lora_rank is not None and not self.config.sequence_parallel:
            for parameter in self.q_layernorm.parameters():
                parameter.average_gradients_across_tp_domain = True

    def _resolve_qk_norm_config(self, submodules) -> dict:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class TELatentAttention(_AsInTheSpec):
    """Megatron's MLASelfAttention on TransformerEngine's layers, with function and checkpoints of LatentAttention.

    Without sequence parallelism every tensor-parallel rank has the rotated part r, and its own heads use it: its
    gradient is their sum, which Megatron leaves out, so that the ranks' copies of a weight would drift apart.
    """

    def _qkv_down_projection(self, hidden_states):
        q_latent, kv = super()._qkv_down_projection(hidden_states)
        tp = self.pg_collection.tp
        if tp.size() > 1 and not self.config.sequence_parallel:
            latent, rotated = kv.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
            kv = torch.cat((latent, copy_to_tensor_model_parallel_region(rotated, tp)), dim=-1)
        return q_latent, kv


class LatentAttention(_AsInTheSpec):
    """Megatron's MLASelfAttention with ``SDPACoreAttention`` as its core; weights and checkpoints are Megatron's.

    DeepSeek-V2, section 2.1. A token's latent c (``--kv-lora-rank``) and its rotated part r (``--qk-pos-emb-head-dim``)
    give the keys and values of all heads,

        [k_h | v_h] = W_h norm(c),    key of head h = [k_h | r].

    Context-parallel ranks exchange c and r, of which all heads are made, and not the keys and values: per token
    kv_lora_rank + qk_pos_emb_head_dim numbers in place of heads (qk_head_dim + qk_pos_emb_head_dim + v_head_dim). With
    sequence parallelism each tensor-parallel rank exchanges its own tokens' c.

    The dynamic inference engine caches norm(c) and r of every token, on every tensor-parallel rank. Prompts are read
    with expanded keys and values; decoding attends to the latents themselves, where query and output absorb W_h = [A_h
    | B_h] (section 2.1.2),

        o_h = B_h^T softmax(scale (q_h A_h^T norm(c) + q_h^r r)) norm(c).

    Args:
        layout: which tokens a context-parallel rank holds (``spec.get_hybrid_layer_specs``).
        backend: of the rotation; as of ``lightning_attn``.
        The others are Megatron's.
    """

    def __init__(self, *args, layout: str = "zigzag", backend: str = "auto", **kwargs):
        super().__init__(*args, **kwargs)
        self.layout, self.backend = layout, backend

    def get_query_key_value_tensors(
        self,
        hidden_states,
        key_value_states=None,
        position_ids=None,
        packed_seq_params=None,
        inference_context=None,
        *,
        inference_params=None,
    ):
        """hidden ``[s, b, h]``, with sequence parallelism ``[s/tp, b, h]`` -> (query, key, value, q latent, kv latent).

        Over context-parallel ranks key is the latent and value the rotated part, and ``_expand`` makes keys and values
        of them; else they are expanded here. Packed, without the dimension of the batch.
        """
        del key_value_states, position_ids
        query, latent, rotated, q_latent = self._latents(
            hidden_states, packed_seq_params, inference_context or inference_params, scatter=True
        )
        if self._over_ranks(packed_seq_params):
            return query, latent, rotated, q_latent, latent
        return query, *self._expand(latent, rotated, 1), q_latent, latent

    def _latents(self, hidden_states, packed_seq_params, context, *, scatter: bool):
        """(query, normed latent, rotated part, q latent); with ``scatter`` and sequence parallelism the latent is that
        of this tensor-parallel rank's tokens only.
        """
        config, tp, heads = self.config, self.pg_collection.tp, self.num_attention_heads_per_partition
        latents = [config.kv_lora_rank, config.qk_pos_emb_head_dim]

        q_latent, kv = self._qkv_down_projection(hidden_states)
        if kv.shape[-1] != sum(latents):  # each tensor-parallel rank projects to a part of the channels
            kv = gather_from_tensor_model_parallel_region(kv, tp)
        latent, rotated = kv.split(latents, dim=-1)
        if config.sequence_parallel and scatter:
            latent = scatter_to_sequence_parallel_region(latent, tp)
        if tp.size() > 1:  # every rank's heads use it: its gradient is their sum, which Megatron's own layer leaves out
            rotated = copy_to_tensor_model_parallel_region(rotated, tp)
        if packed_seq_params is not None:
            q_latent, latent, rotated = (x.squeeze(1) for x in (q_latent, latent, rotated))
        latent = self.kv_layernorm(latent)
        if config.q_lora_rank is None:
            q, _ = self.linear_q_proj(q_latent)
        else:
            q_latent = self.q_layernorm(q_latent)
            q, _ = self.linear_q_up_proj(q_latent)
        q = q.view(*q.shape[:-1], heads, self.q_head_dim)

        q_fixed, q_rotated = q.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        q_rotated, rotated = self._rotate(q_rotated, rotated.unsqueeze(-2), hidden_states, packed_seq_params, context)
        return torch.cat((q_fixed, q_rotated), dim=-1), latent, rotated.squeeze(-2), q_latent

    def forward(self, hidden_states, attention_mask=None, key_value_states=None, inference_context=None, **others):
        """Megatron's, and of a step of the dynamic inference engine: hidden ``[tokens, 1, h]`` -> (output, bias).

        Raises:
            ValueError: packed sequences or context-parallel ranks in the dynamic engine.
        """
        context = inference_context or others.get("inference_params")
        if context is None or context.is_static_batching():
            return super().forward(hidden_states, attention_mask, key_value_states, inference_context, **others)
        if others.get("packed_seq_params") is not None or self.pg_collection.cp.size() > 1:
            raise ValueError(
                "the dynamic engine has requests of its own on one context-parallel rank: leave packed_seq_params out, "
                "and load the checkpoint with --context-parallel-size 1"
            )
        return self.linear_proj(self._serve(hidden_states, context).flatten(1).unsqueeze(1))

    def _serve(self, hidden_states: torch.Tensor, context) -> torch.Tensor:
        """Attention of every request's new tokens, whose latents are kept in the context: ``[tokens, heads, V]``."""
        config, heads = self.config, self.num_attention_heads_per_partition
        query, latent, rotated, _ = self._latents(hidden_states, None, context, scatter=False)
        layer = self.layer_number - self._get_pp_layer_offset_for_inference()
        context.append_key_value_cache(layer, torch.cat((latent, rotated), dim=-1), None)
        cache, _, table = context.key_value_cache(layer)
        (bounds, _), (_, lengths, _) = context.cu_query_lengths(), context.cu_kv_lengths()
        query = query.squeeze(1)
        up = self.linear_kv_up_proj.weight.view(heads, config.qk_head_dim + config.v_head_dim, config.kv_lora_rank)
        up_k, up_v = up.split([config.qk_head_dim, config.v_head_dim], dim=1)

        def absorbed(count: int) -> torch.Tensor:
            q, q_rotated = query[:count].split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
            q = torch.cat((torch.einsum("thd,hdc->thc", q, up_k), q_rotated), dim=-1)
            o = decode(
                q, cache.unsqueeze(2), config.kv_lora_rank, table[:count], lengths[:count], scale=self.softmax_scale
            )
            return torch.einsum("thc,hvc->thv", o, up_v)

        def expanded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            c, r = rows.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
            k, v = torch.einsum("tc,hdc->thd", c, up).split([config.qk_head_dim, config.v_head_dim], dim=-1)
            return torch.cat((k, r.unsqueeze(1).expand(-1, heads, -1)), dim=-1), v

        if context.is_decode_only() and query.shape[0] == lengths.shape[0]:
            return absorbed(query.shape[0])
        requests = Requests.read(bounds, lengths)
        o = query.new_zeros(query.shape[0], heads, config.v_head_dim)
        if requests.decoding:
            o[: requests.decoding] = absorbed(requests.decoding)
        read(o, query, (cache,), expanded, table, requests, self.softmax_scale)
        return o

    def _over_ranks(self, packed) -> bool:
        group = sharing_group(packed, self.pg_collection.cp)
        return group is not None and group.size() > 1

    def _rotate(self, q: torch.Tensor, k: torch.Tensor, hidden_states, packed, context):
        """Turn the channels that carry the position: ``[s, b, heads, d]`` and ``[s, b, 1, d]``, packed without b."""
        group = sharing_group(packed, self.pg_collection.cp)
        freqs, mscale = own_angles(self.rotary_pos_emb, hidden_states, self.config, packed, context, group), 1.0
        if isinstance(self.rotary_pos_emb, YarnRotaryEmbedding):
            freqs, mscale = freqs
        if packed is not None:
            q, k = q.unsqueeze(1), k.unsqueeze(1)
        if packed is None and context is None:
            freqs = freqs[: q.shape[0]]
        q, k = turn(
            q, k, (freqs, freqs), config=self.config, mscale=mscale,
            cu_seqlens=None if packed is None else document_bounds(packed), inference_context=context,
            cp_group=self.pg_collection.cp, group=group,
            layout="zigzag" if packed is not None and packed.local_cp_size is not None else self.layout,
            backend=self.backend, mla_rotary_interleaved=True,
        )  # fmt: skip
        return (q.squeeze(1), k.squeeze(1)) if packed is not None else (q, k)

    def _expand(self, latent: torch.Tensor, rotated: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of this rank's heads, of the latents ``[ranks * s, ..., c]`` of context-parallel ranks."""
        config, heads = self.config, self.num_attention_heads_per_partition
        kv, _ = self.linear_kv_up_proj(latent)
        if config.sequence_parallel and ranks > 1:  # gathered over tensor-parallel ranks, whose tokens then come first
            kv = kv.unflatten(0, (self.pg_collection.tp.size(), ranks, -1)).transpose(0, 1).flatten(0, 2)
        kv = kv.view(*kv.shape[:-1], heads, config.qk_head_dim + config.v_head_dim)
        fixed, value = kv.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        rotated = rotated.unsqueeze(-2).expand(*fixed.shape[:-1], config.qk_pos_emb_head_dim)
        return torch.cat((fixed, rotated), dim=-1), value

    def _run_core_attention(
        self, query, key, value, attention_mask, packed_seq_params=None, attn_mask_type=None, attention_bias=None
    ):
        return self.core_attention(
            query, key, value, attention_mask, attn_mask_type or self.attn_mask_type, attention_bias, packed_seq_params,
            expand=self._expand if self._over_ranks(packed_seq_params) else None,
        )  # fmt: skip
