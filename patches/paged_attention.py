"""Softmax layers in Megatron's dynamic inference engine without flash-attn.

Symbol:   megatron.core.transformer.attention.Attention.forward
          megatron.core.inference.contexts.dynamic_context.triton_append_key_value_cache
Why:      with a dynamic context it asserts flash-attn (2.7.3, 3 or 4), and then calls einops, which megatron-core does
          not install. Here softmax.paged attends to the blocks of keys and values. The second writes keys and values by
          a kernel on the CPU, too, where there is none. Where flash-attn is installed both stay as they are.
Versions: megatron-core 0.19, 0.20
Can go:   when the dynamic engine has attention of its own, or a core_attention may say how it reads blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..softmax.paged import attend
from ._replace import replace

SYMBOLS = (
    "megatron.core.transformer.attention.Attention.forward",
    "megatron.core.inference.contexts.dynamic_context.triton_append_key_value_cache",
)
FORWARD, APPEND = (
    (
        "self", "hidden_states", "attention_mask", "key_value_states", "inference_context", "rotary_pos_emb",
        "rotary_pos_cos", "rotary_pos_sin", "rotary_pos_cos_sin", "attention_bias", "packed_seq_params",
        "sequence_len_offset", "inference_params",
    ),
    (
        "layer_number", "key", "value", "memory_buffer", "padded_active_token_count", "token_to_block_idx",
        "token_to_local_position_within_kv_block",
    ),
)  # fmt: skip


def flash_attention_installed() -> bool:
    """Whether Megatron's own path runs."""
    from megatron.core.transformer import attention
    from megatron.core.utils import is_fa_min_version

    if attention.HAVE_FA4 or attention.HAVE_FA3:
        return True
    return attention.flash_attn_with_kvcache is not None and is_fa_min_version("2.7.3")


def _forward(original: Callable) -> Callable:
    def forward(
        self, hidden_states, attention_mask, key_value_states=None, inference_context=None, rotary_pos_emb=None,
        rotary_pos_cos=None, rotary_pos_sin=None, rotary_pos_cos_sin=None, attention_bias=None, packed_seq_params=None,
        sequence_len_offset=None, *, inference_params=None,
    ):  # fmt: skip
        context = inference_context or inference_params
        if context is None or context.is_static_batching():
            return original(
                self, hidden_states, attention_mask, key_value_states, inference_context, rotary_pos_emb,
                rotary_pos_cos, rotary_pos_sin, rotary_pos_cos_sin, attention_bias, packed_seq_params,
                sequence_len_offset, inference_params=inference_params,
            )  # fmt: skip
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention_bias and packed_seq_params are no options of dynamic batching; leave them out")
        return _dynamic(self, hidden_states, context, rotary_pos_emb, rotary_pos_cos_sin)

    return forward


def _dynamic(layer, hidden_states, context, rope, cos_sin) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention.forward of a step, hidden states ``[tokens, 1, hidden]``."""
    config = layer.config
    fused = context.use_flashinfer_fused_rope and cos_sin is not None
    if fused or (config.no_rope_freq and config.no_rope_freq[layer.layer_number - 1]):
        rope = None
    if rope is not None and not isinstance(rope, tuple):
        rope = (rope, rope)
    gated = config.attention_output_gate
    q, k, v, *gate = layer.get_query_key_value_tensors(hidden_states, None, output_gate=gated, split_qkv=True)
    q, k, v, rope, _, table = layer._adjust_key_value_for_inference(
        context, q, k, v, rope, rotary_pos_cos_sin=cos_sin
    )  # turns k, and gives back the caches
    if rope is not None:
        q = context.apply_rotary_emb_query(
            q, rope[0], config, None, layer.pg_collection.cp, mscale=layer._yarn_concentration_factor
        )
    scale = config.softmax_scale if config.softmax_scale is not None else q.shape[-1] ** -0.5
    o = attend(
        q.squeeze(1), k, v, table, context.cu_query_lengths()[0], context.cu_kv_lengths()[1], scale=scale,
        decode_only=context.is_decode_only(),
    )  # fmt: skip
    o = o.flatten(1).unsqueeze(1)
    if gated:
        o = layer._apply_output_gate(o, *gate)
    return layer.linear_proj(o)


def _append(original: Callable) -> Callable:
    def triton_append_key_value_cache(
        layer_number, key, value, memory_buffer, padded_active_token_count, token_to_block_idx,
        token_to_local_position_within_kv_block,
    ):  # fmt: skip
        if key.is_cuda:
            return original(
                layer_number, key, value, memory_buffer, padded_active_token_count, token_to_block_idx,
                token_to_local_position_within_kv_block,
            )  # fmt: skip
        n = padded_active_token_count
        at = token_to_block_idx[:n].long(), token_to_local_position_within_kv_block[:n].long()
        for cache, new in zip(memory_buffer, (key, value), strict=True):
            cache[layer_number][at] = new[:n, 0]

    return triton_append_key_value_cache


def apply() -> None:
    """Apply the patches where flash-attn is missing; a second call does nothing."""
    if flash_attention_installed():
        return
    replace(SYMBOLS[0], FORWARD, _forward, "softmax layers are served without flash-attn")
    replace(SYMBOLS[1], APPEND, _append, "keys and values are written on the CPU, too")
