"""Rows of the tables of flags for multi-latent attention in softmax layers."""

from __future__ import annotations

from .rules import Rule, selective

REFUSED = (
    Rule(
        "position_embedding_type",
        lambda run: run.latent and run.get("position_embedding_type") in ("yarn", "mrope"),
        "does not reach multi-latent attention, whose angles --rope-type chooses; use --position-embedding-type rope",
    ),
    *(
        Rule(
            name,
            lambda run: run.latent,
            "is not passed on to multi-latent attention by Megatron 0.19; leave it out",
        )
        for name in (
            "yarn_original_max_position_embeddings",
            "yarn_beta_fast",
            "yarn_beta_slow",
            "yarn_correction_range_round_to_int",
        )
    ),
    *(
        Rule(
            name,
            lambda run, name=name, default=default: (
                run.latent and run.get("rope_type") == "rope" and run.get(name) != default
            ),
            "belongs to --rope-type yarn; leave it out, or use that",
        )
        for name, default in (("mscale", 1.0), ("mscale_all_dim", 0.0))
    ),
    Rule(
        "rotary_percent",
        lambda run: run.latent and run.get("rope_type") == "yarn" and run.get("rotary_percent") != 1.0,
        "is not read with --rope-type yarn; leave it out, or use --rope-type rope",
    ),
    Rule(
        "apply_rope_fusion",
        lambda run: run.latent and run.local,
        "needs TransformerEngine's layers; use --no-rope-fusion",
        "--rope-fusion",
    ),
    Rule(
        "mla_down_proj_fusion",
        lambda run: run.local,
        "acts in TransformerEngine's layers only, and --transformer-impl local would ignore it; use "
        "--transformer-impl transformer_engine, or leave it out",
    ),
    Rule(
        "mla_down_proj_fusion",
        lambda run: not run.local and run.config.tensor_model_parallel_size > 1,
        "with --tensor-model-parallel-size above 1 leaves the other ranks' heads out of the gradient of the rotated "
        "part (Megatron 0.19); leave it out",
    ),
    Rule(
        "mla_down_proj_fusion",
        lambda run: not run.local and run.get("q_lora_rank") is None,
        "joins the projections to two latents, and queries have none; give --q-lora-rank, or leave it out",
    ),
    Rule(
        "mla_down_proj_fusion",
        lambda run: not run.local and run.own_norms,
        "begins with TransformerEngine's norm, and --apply-residual-connection-post-layernorm, "
        "--lightning-embedding-scale and --no-lightning-layernorm-affine need another; leave it out",
    ),
    Rule(
        "cache_mla_latents",
        lambda run: True,
        "is for Megatron's dynamic inference, where layers of this package keep latents without it; leave it out",
    ),
    Rule("qk_l2_norm", lambda run: run.latent, "is not an option of multi-latent attention; use --qk-layernorm"),
    Rule(
        "rope_type",
        lambda run: run.latent and run.options.rope and run.get("rope_type") != "rope",
        "with --multi-latent-attention scales the angles of its layers only, and --lightning-rope turns by plain ones; "
        "use --rope-type rope",
    ),
    Rule(
        "multi_latent_attention",
        lambda run: not run.softmax,
        "is the attention of softmax layers, and this model has none; leave it out, or place softmax layers with "
        "--linear-attention-freq",
    ),
    Rule(
        "recompute_modules",
        lambda run: run.local and run.latent and selective(run, "mla_up_proj"),
        "recomputes mla_up_proj in TransformerEngine's layers only; use core_attn or --recompute-granularity full",
    ),
    *(
        Rule(
            name,
            lambda run: run.latent,
            "is not read with --multi-latent-attention, whose layers make their own angles; leave it out",
        )
        for name in ("no_rope_freq", "use_rope_scaling", "rotary_seq_len_interpolation_factor")
    ),
)

WARNED = (
    Rule(
        "rotary_scaling_factor",
        lambda run: (
            run.latent and run.get("rope_type") == "rope" and getattr(run.args, "rotary_scaling_factor", 1.0) != 1.0
        ),
        "acts with --rope-type yarn only",
    ),
    Rule(
        "add_qkv_bias",
        lambda run: run.latent and not run.config.add_bias_linear,
        "reaches lightning layers only; the projections of multi-latent attention have no bias",
    ),
    Rule(
        "use_mup",
        lambda run: run.latent,
        "does not scale the logits of softmax layers, which are multi-latent attention here",
    ),
)
