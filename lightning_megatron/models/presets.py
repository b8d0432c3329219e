"""The released models by name: their config.json, as far as it decides what they compute, and the same at test size.

A field that no source at hand quotes from the released config.json is listed as ``assumed``. It is derived from models
of the same line, and ``lightning-convert`` reads the real one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .family import Config, Flags, family_of

TINY = "@tiny"


@dataclass(frozen=True)
class Preset:
    """One released model."""

    config: Config
    source: str
    assumed: tuple[str, ...] = field(default=())


def _bailing(**changes: Any) -> Config:
    common = dict(
        vocab_size=157184, hidden_act="silu", rms_norm_eps=1e-6, max_position_embeddings=131072, head_dim=128,
        num_experts=256, num_experts_per_tok=8, num_shared_experts=1, n_group=8, topk_group=4, norm_topk_prob=True,
        score_function="sigmoid", moe_router_enable_expert_bias=True, routed_scaling_factor=2.5, linear_silu=False,
        use_qk_norm=True, partial_rotary_factor=0.5, tie_word_embeddings=False, use_bias=False, use_qkv_bias=False,
    )  # fmt: skip
    return common | changes


def _ring(**changes: Any) -> Config:
    return _bailing(model_type="bailing_moe_linear", architectures=["BailingMoeLinearV2ForCausalLM"], **changes)


def _ling(**changes: Any) -> Config:
    latent = dict(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        rope_interleave=True, rope_theta=6000000, layer_group_size=8, num_nextn_predict_layers=1,
    )  # fmt: skip
    return _bailing(model_type="bailing_hybrid", architectures=["BailingMoeV2_5ForCausalLM"], **latent | changes)


def _ling_1t() -> Config:
    return _ling(
        num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=64,
        intermediate_size=18432, moe_intermediate_size=2048, moe_shared_expert_intermediate_size=2048,
        first_k_dense_replace=4, group_norm_size=8,
    )  # fmt: skip


def _minimax(**changes: Any) -> Config:
    factor = 3.5565588200778455
    config = dict(
        model_type="minimax", architectures=["MiniMaxForCausalLM"], vocab_size=200064, hidden_size=6144,
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, head_dim=128, rotary_dim=64,
        intermediate_size=9216, num_local_experts=32, num_experts_per_tok=2, hidden_act="silu", rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=10000000.0), tie_word_embeddings=False, block_size=256,
        layer_types=(["linear_attention"] * 7 + ["full_attention"]) * 10, linear_attn_alpha_factor=factor,
        full_attn_alpha_factor=factor, mlp_alpha_factor=factor,
    )  # fmt: skip
    return config | changes


def _tnl(hidden: int, layers: int, heads: int, glu: int, vocabulary: int = 64000) -> Config:
    return dict(
        model_type="transnormer", architectures=["TransnormerForCausalLM"], vocab_size=vocabulary,
        decoder_embed_dim=hidden, decoder_layers=layers, decoder_attention_heads=heads, hidden_dim=hidden, glu_dim=glu,
        linear_act_fun="silu", norm_type="simplermsnorm", linear_use_lrpe_list=[1] + [0] * (layers - 1), bias=False,
        no_scale_embedding=False, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip


_CODE = "OpenNLPLab's modeling_transnormer and its defaults, arXiv 2307.14995"
_TNL = ("glu_dim", "linear_use_lrpe_list", "max_position_embeddings", "tie_word_embeddings")

PRESETS = {
    "ring-mini-linear-2.0": Preset(
        _ring(
            num_hidden_layers=20,
            hidden_size=2048,
            num_attention_heads=16,
            num_key_value_heads=4,
            intermediate_size=5120,
            moe_intermediate_size=512,
            moe_shared_expert_intermediate_size=512,
            first_k_dense_replace=1,
            layer_group_size=5,
            group_norm_size=4,
            rope_theta=1000000,
        ),  # fmt: skip
        "config.json of Ring-mini-linear-2.0",
    ),
    "ring-flash-linear-2.0": Preset(
        _ring(
            num_hidden_layers=32,
            hidden_size=4096,
            num_attention_heads=32,
            num_key_value_heads=4,
            intermediate_size=9216,
            moe_intermediate_size=1024,
            moe_shared_expert_intermediate_size=1024,
            first_k_dense_replace=1,
            layer_group_size=8,
            group_norm_size=4,
            rope_theta=1000000,
        ),  # fmt: skip
        "arXiv 2510.19338 and the models of its line",
        ("num_key_value_heads", "group_norm_size", "rope_theta", "intermediate_size", "routed_scaling_factor"),
    ),
    "ling-2.6-flash": Preset(
        _ling(
            num_hidden_layers=32,
            hidden_size=4096,
            num_attention_heads=32,
            num_key_value_heads=32,
            intermediate_size=9216,
            moe_intermediate_size=1024,
            moe_shared_expert_intermediate_size=1024,
            first_k_dense_replace=1,
            group_norm_size=4,
        ),  # fmt: skip
        "arXiv 2606.15079, table 1, and ports of the checkpoint",
    ),
    "ling-2.5-1t": Preset(_ling_1t(), "arXiv 2606.15079, table 1, and the modeling code of Ring-2.5"),
    "minimax-text-01": Preset(
        _minimax(max_position_embeddings=8192), "model card, and the text model of MiniMax-VL-01", ("rms_norm_eps",)
    ),
    "minimax-m1": Preset(_minimax(max_position_embeddings=10240000), "config.json of MiniMax-M1"),
    "tnl-385m": Preset(_tnl(1024, 24, 8, 2816), _CODE, _TNL),
    "tnl-1b": Preset(_tnl(2048, 16, 16, 5632), _CODE, _TNL),
    "tnl-7b": Preset(_tnl(4096, 30, 32, 11264), _CODE, _TNL),
    "tnl-15b": Preset(_tnl(5120, 42, 40, 13824, 100280), "model card of TransNormerLLM3-15B", (*_TNL, "vocab_size")),
}
REFUSED = {
    "minicpm-sala": "8 of its 32 layers are InfLLM-v2 sparse attention, which neither Megatron nor this package has",
}


def preset_config(name: str) -> Config:
    """The config.json of a released model, or of ``NAME@tiny``: the same shape of architecture at test size.

    Raises:
        ValueError: an unknown name, or a model that is not supported, and why.

    Example::

        preset_config("ling-2.6-flash@tiny")["hidden_size"]  # 64
    """
    base = name.removesuffix(TINY)
    if base in REFUSED:
        raise ValueError(f"--lightning-model {name}: {REFUSED[base]}")
    if base not in PRESETS:
        raise ValueError(
            f"--lightning-model {name} is unknown; choose one of {', '.join(PRESETS)}, each also with {TINY}, or list"
        )
    config = PRESETS[base].config
    return family_of(config).tiny(config) if name.endswith(TINY) else dict(config)


def preset_flags(name: str) -> Flags:
    """Megatron's flags of ``preset_config``."""
    config = preset_config(name)
    return family_of(config).flags(config)
