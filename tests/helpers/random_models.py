"""Random tiny configurations and weights of the released families."""

from __future__ import annotations

import random
from typing import Any

import torch

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def bailing_config(rng: random.Random, *, latent: bool, experts: bool) -> Config:
    heads = rng.choice((2, 4, 6, 8, 12))  # with and without a power of two
    group = rng.choice((2, 3, 4))
    layers = group + rng.choice((1, 2, 3))  # a tail of full layers, or none
    config = dict(
        model_type="bailing_hybrid" if latent else "bailing_moe_linear",
        architectures=["BailingMoeV2_5ForCausalLM" if latent else "BailingMoeLinearV2ForCausalLM"],
        vocab_size=rng.choice((97, 128, 200)), hidden_size=16 * heads, intermediate_size=rng.choice((48, 80)),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=16,
        hidden_act="silu", rms_norm_eps=rng.choice((1e-6, 1e-3)), rope_theta=rng.choice((10000, 600000)),
        max_position_embeddings=512, tie_word_embeddings=rng.random() < 0.3, use_bias=False, use_qkv_bias=False,
        use_qk_norm=rng.random() < 0.8, linear_silu=rng.random() < 0.3, partial_rotary_factor=rng.choice((0.5, 1.0)),
        layer_group_size=group, group_norm_size=rng.choice([g for g in (2, 4, 6) if heads % g == 0 and g % 2 == 0]),
    )  # fmt: skip
    if latent:
        config |= dict(
            q_lora_rank=rng.choice((None, 24)), kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
            v_head_dim=rng.choice((8, 16)), rope_interleave=True,
        )  # fmt: skip
    else:
        config["num_key_value_heads"] = heads // 2 if heads % 4 == 0 else heads
    if experts:
        groups = rng.choice((1, 4))
        config |= dict(
            num_experts=16, num_experts_per_tok=4, n_group=groups, topk_group=2 if groups > 1 else 1,
            moe_intermediate_size=24, num_shared_experts=rng.choice((0, 1, 2)),
            first_k_dense_replace=rng.choice((0, 1)), norm_topk_prob=True,
            score_function="sigmoid", moe_router_enable_expert_bias=True,
            routed_scaling_factor=rng.choice((1.0, 2.5)),
        )  # fmt: skip
    if latent == experts:  # a layer of multi-token prediction with latents and experts, two with neither
        config |= dict(num_nextn_predict_layers=1 if latent else 2, mtp_loss_scaling_factor=rng.choice((0, 2.0)))
        config["vocab_size"] = 128  # rows of padding would take part in its softmax
    return config


def tnl_config(rng: random.Random) -> Config:
    heads, layers = rng.choice((2, 4, 6)), rng.choice((2, 3))
    first = rng.choice((0, 1, layers))
    return dict(
        model_type="transnormer", architectures=["TransnormerForCausalLM"], vocab_size=rng.choice((97, 128)),
        decoder_embed_dim=16 * heads, decoder_layers=layers, decoder_attention_heads=heads, hidden_dim=16 * heads,
        glu_dim=rng.choice((-1, 48)), linear_act_fun="silu", norm_type="simplermsnorm", bias=False,
        linear_use_lrpe_list=[int(layer < first) for layer in range(layers)], max_position_embeddings=512,
        no_scale_embedding=rng.random() < 0.3, tie_word_embeddings=rng.random() < 0.3,
    )  # fmt: skip


def minimax_config(rng: random.Random) -> Config:
    heads = rng.choice((2, 4, 6, 8, 12))
    types = (
        ["linear_attention"] * rng.choice((1, 2, 3)) + ["full_attention"] + ["linear_attention"] * rng.choice((0, 1))
    )
    factor = lambda: rng.choice((1, 3.5, 0.7))
    return dict(
        model_type="minimax", architectures=["MiniMaxForCausalLM"], vocab_size=rng.choice((97, 128, 200)),
        hidden_size=rng.choice((32, 16 * heads)), intermediate_size=rng.choice((24, 40)), num_hidden_layers=len(types),
        num_attention_heads=heads, num_key_value_heads=heads // 2 if heads % 4 == 0 else heads, head_dim=16,
        num_local_experts=rng.choice((4, 8)), num_experts_per_tok=2, layer_types=types, block_size=8,
        rms_norm_eps=rng.choice((1e-5, 1e-3)), max_position_embeddings=512, hidden_act="silu", dtype="float32",
        rope_parameters=dict(rope_type="default", rope_theta=rng.choice((1e4, 1e6))),
        tie_word_embeddings=rng.random() < 0.3, linear_attn_alpha_factor=factor(), linear_attn_beta_factor=factor(),
        full_attn_alpha_factor=factor(), full_attn_beta_factor=factor(), mlp_alpha_factor=factor(),
        mlp_beta_factor=factor(),
    )  # fmt: skip


def draw(units: list, rng: torch.Generator) -> Tensors:
    """Weights in fp32 for every tensor that is not optional: norms around 1, projections that keep the size."""
    tensors = {}
    for unit in units:
        for name, shape, optional in unit.hf:
            if optional:
                continue
            x = torch.randn(*shape, generator=rng)
            if "theta" in name:
                x = x.abs()
            elif "norm" in name:
                x = 1 + 0.3 * x
            elif "expert_bias" in name:
                x = 0.1 * x
            elif "embed" not in name:
                x = x * shape[-1] ** -0.5
            tensors[name] = x
    return tensors
