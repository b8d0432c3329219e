"""Rows of the tables of flags: what changes less than it seems to, or costs something and gives nothing.

Those of one topic, such as multi-latent attention, are in files of their own.
"""

from __future__ import annotations

from argparse import Namespace

from .rules import ROTARY, Rule

WARNED = (
    Rule(
        "linear_attention_freq",
        lambda run: run.softmax == run.config.num_layers and not any(run.ahead),
        "makes all layers softmax layers, for comparison; --lightning-* options of lightning layers act on nothing",
    ),
    Rule(
        "lightning_cp_exchange",
        lambda run: run.options.cp_exchange != "auto" and run.config.context_parallel_size == 1,
        "sends states between context-parallel ranks, and there is one alone",
    ),
    Rule(
        "context_parallel_size",
        lambda run: not run.options.cp_keep_states and run.config.context_parallel_size == 1,
        "exchanges no states, so that --no-lightning-cp-keep-states acts on nothing",
    ),
    Rule(
        "lightning_norm",
        lambda run: run.options.norm == "none" and not run.options.norm_affine,
        "has no weight, so that --no-lightning-norm-affine acts on nothing",
    ),
    Rule(
        "lightning_norm_eps",
        lambda run: run.options.norm == "none" and not run.options.qk_norm,
        "is that of the output norm and of --lightning-qk-norm, and there are none",
    ),
    Rule(
        "lightning_decay_offset",
        lambda run: run.options.decay_offset and run.options.decay in ("alibi", "none"),
        "shifts decays that depend on the layer, which those of --lightning-decay alibi and none do not",
    ),
    Rule(
        "decoupled_lr",
        lambda run: run.options.lrpe_layers,
        "holds for the angles of --lightning-lrpe-layers, too",
    ),
    Rule(
        "offload_modules",
        lambda run: (
            run.get("fine_grained_activation_offloading")
            and {"qkv_linear", "core_attn", "attn_proj"} & set(run.get("offload_modules"))
        ),
        "moves nothing of the attention of lightning layers to the host; of these layers it takes attn_norm, mlp_norm "
        "and the parts of experts",
    ),
    Rule(
        "layernorm_zero_centered_gamma",
        lambda run: run.options.qk_norm or (run.options.norm != "none" and run.options.norm_affine),
        "holds for layer norms; the weights of the q, k and output norms of lightning layers stay around 1",
        "--apply-layernorm-1p",
    ),
    Rule(
        "apply_wd_to_qk_layernorm",
        lambda run: run.options.qk_norm and run.softmax,
        "decays the norms of softmax layers only; those of --lightning-qk-norm get no weight decay",
    ),
    Rule("use_flash_attn", lambda run: True, "is not read by Megatron 0.19; use --attention-backend flash"),
    Rule(
        "flash_attention_version",
        lambda run: run.local and run.attends,
        "is not read by softmax layers on torch's SDPA, whose FlashAttention is torch's own",
    ),
    Rule(
        "apply_query_key_layer_scaling",
        lambda run: run.local and run.attends,
        "is not read by softmax layers on torch's SDPA, whose kernels sum in fp32 anyway",
    ),
    *(
        Rule(
            name,
            lambda run: not run.local and (run.config.num_moe_experts is None or run.config.moe_layer_freq != 1),
            "does not reach dense MLPs: Megatron's specs of models with different layers do not pass it on",
        )
        for name in ("use_transformer_engine_op_fuser", "use_grouped_gemm_for_dense_mlp")
    ),
    Rule(
        "window_size",
        lambda run: run.softmax,
        "limits the softmax layers only; lightning layers see all tokens",
    ),
    Rule(
        "cp_comm_type",
        lambda run: (
            run.local and run.attends and run.config.context_parallel_size > 1 and run.get("cp_comm_type") != "p2p"
        ),
        "is not read by softmax layers on torch's SDPA, which have one way to communicate",
    ),
    Rule(
        "mtp_num_layers",
        lambda run: run.mtp and run.config.context_parallel_size > 1,
        "has a loss that Megatron divides by the numbers of tokens of each context-parallel rank, which differ by a "
        "few (with --sft more), so that it is not exactly that of one rank",
    ),
    Rule(
        "sft",
        lambda run: (
            run.experts
            and (
                "quantile_balancing" in run.config.moe_router_load_balancing_type
                or run.config.mlp_chunks_for_training > 1
                or run.config.overlap_moe_expert_parallel_comm
            )
        ),
        "pads conversations, and padding counts among the tokens of experts with --moe-router-load-balancing-type "
        "quantile_balancing, --mlp-chunks-for-training and --overlap-moe-expert-parallel-comm: Megatron routes there "
        "without knowing it",
    ),
    Rule(
        "use_mup",
        lambda run: run.options.scale is None and not run.latent,
        "scales the logits of softmax layers only; choose that of lightning layers with --lightning-scale, or "
        "make_spec(scale=...)",
    ),
    Rule(
        "position_embedding_type",
        lambda run: run.get("position_embedding_type") in ROTARY and not run.rotates,
        "rotates q and k of softmax layers only, and this model has none: no position embedding is used; "
        "pass --lightning-rope, or --position-embedding-type none",
    ),
    *(
        Rule(
            f"linear_{dim}",
            lambda run, dim=dim: (
                getattr(run.options, dim) not in (None, run.get(f"linear_{dim}")) and run.get(f"linear_{dim}") != 128
            ),
            f"gives way to the option {dim} of the lightning layers, which has another value; leave one of them out",
        )
        for dim in ("key_head_dim", "value_head_dim")
    ),
    Rule(
        "linear_key_head_dim",
        # The own entry point knows which flags were given; here, Megatron's default looks like a given 128.
        lambda run: (
            run.args != Namespace()
            and not hasattr(run.args, "lightning_key_head_dim")
            and run.get("linear_key_head_dim") == 128
            and run.options.key_head_dim is None
            and run.config.kv_channels != 128
        ),
        "is Megatron's default, which cannot be told from a given 128 (likewise --linear-value-head-dim 128, "
        "--linear-num-key-heads 16 and --linear-num-value-heads 32): the head dim K of lightning layers is "
        "--kv-channels; for 128, use a spec of your own, make_spec(key_head_dim=128)",
    ),
    Rule(
        "create_attention_mask_in_dataloader",
        lambda run: True,
        "builds a seq_length x seq_length attention mask that no layer here reads; pass "
        "--no-create-attention-mask-in-dataloader, which doubles the speed at a length of 32K",
    ),
)
