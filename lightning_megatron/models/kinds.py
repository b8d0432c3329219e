"""Which values the fields of a config.json may have: what JSON allows, models do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_MOST = 10_000  # layers or experts: what is above is a mistake, and takes minutes before shapes show it
_SIZE = 2**31 - 1


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) and abs(value) <= _SIZE or isinstance(value, float) and math.isfinite(value)


# kind -> (what is allowed, for messages; whether a value is; the fields)
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    f"a whole number from 1 to {_SIZE}": (
        lambda value: _whole(value) and 1 <= value <= _SIZE,
        """num_attention_heads num_key_value_heads hidden_size head_dim intermediate_size vocab_size group_norm_size
        max_position_embeddings kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim
        layer_group_size moe_intermediate_size num_experts_per_tok n_group topk_group block_size
        decoder_attention_heads decoder_embed_dim hidden_dim""",
    ),
    f"a whole number from 1 to {_MOST}": (
        lambda value: _whole(value) and 1 <= value <= _MOST,
        "num_hidden_layers decoder_layers num_local_experts",
    ),
    f"a whole number from 0 to {_MOST}": (
        lambda value: _whole(value) and 0 <= value <= _MOST,
        "num_experts num_shared_experts first_k_dense_replace num_nextn_predict_layers",
    ),
    f"a whole number from 0 to {_SIZE}": (
        lambda value: _whole(value) and 0 <= value <= _SIZE,
        "moe_shared_expert_intermediate_size",
    ),
    f"a whole number from 1 to {_SIZE}, or -1": (
        lambda value: _whole(value) and (1 <= value <= _SIZE or value == -1),
        "glu_dim",
    ),
    # Megatron's --rotary-base takes no other
    "a whole number of at least 1, as 10000 or 1e7": (
        lambda value: _number(value) and value >= 1 and value == int(value),
        "rope_theta",
    ),
    "a number above 0": (
        lambda value: _number(value) and value > 0,
        "rms_norm_eps partial_rotary_factor routed_scaling_factor",
    ),
    "a number of at least 0": (
        lambda value: _number(value) and value >= 0,
        "mtp_loss_scaling_factor router_aux_loss_coef",
    ),
    "a number": (
        _number,
        """linear_attn_alpha_factor linear_attn_beta_factor full_attn_alpha_factor full_attn_beta_factor
        mlp_alpha_factor mlp_beta_factor layernorm_linear_attention_alpha layernorm_linear_attention_beta
        layernorm_full_attention_alpha layernorm_full_attention_beta layernorm_mlp_alpha layernorm_mlp_beta""",
    ),
    "true or false": (
        lambda value: isinstance(value, bool),
        """tie_word_embeddings use_qk_norm linear_silu use_linear_silu moe_router_enable_expert_bias
        no_scale_embedding""",
    ),
    "an object": (lambda value: isinstance(value, dict), "rope_parameters rope_scaling"),
    "a list of 0 and 1": (
        lambda value: isinstance(value, list) and all(entry in (0, 1) for entry in value),
        "attn_type_list linear_use_lrpe_list",
    ),
    "text": (lambda value: isinstance(value, str), "model_type dtype torch_dtype"),
    "a list of text": (
        lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value),
        "architectures layer_types",
    ),
}
_ALLOWED = {name: (what, holds) for what, (holds, names) in _KINDS.items() for name in names.split()}


def check_kind(name: str, value: Any) -> None:
    """Refuse a value that the field cannot have; null stands for a missing field.

    Raises:
        ValueError: the field, its value, and what is allowed.
    """
    what, holds = _ALLOWED.get(name, (None, None))
    if holds is None or value is None or holds(value):
        return
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    raise ValueError(f"config.json: {name} is {shown}; it must be {what}")


def check_kinds(config: dict[str, Any]) -> None:
    """See ``check_kind``, of all fields."""
    for name, value in config.items():
        check_kind(name, value)
