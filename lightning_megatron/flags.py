"""Megatron's flags that lightning layers cannot honour, in tables: refused, or named in a line of the log.

They hold in both ways of starting, lightning_megatron.pretrain and pretrain_gpt.py --spec: runtime.py reads them. What
matters to the own entry point alone is in training/refusals.py.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from . import expert_flags as experts
from . import fp8_flags as fp8
from . import latent_flags as latent
from . import later_flags as later
from . import log_flags as log
from . import memory_flags as memory
from .compat import importable
from .config import LightningOptions, lightning_pattern, projection_cut
from .rules import ROTARY, TE, Rule, Run, flag_of, selective, shown
from .unread import ROTARY_ONLY, SOFTMAX_ONLY

_APEX_NORM = "fused_layer_norm_cuda"


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def _muon_cut(run: Run) -> str:
    muon = run.get("optimizer") in ("muon", "dist_muon", "adaptive_muon") and run.get("muon_split_qkv")
    return projection_cut(run.config, run.options) if muon else "right"


_NEEDS_TE = (
    "needs TransformerEngine's layers; --transformer-impl local would train in another precision: use "
    "--transformer-impl transformer_engine"
)

_TE_ALONE = (  # Megatron's local layers do not read them
    "tp_comm_overlap", "use_te_activation_func", "fused_residual_rmsnorm", "use_transformer_engine_op_fuser",
    "te_precision_config_file",
)  # fmt: skip

_OTHER_ATTENTION = (
    "chooses another attention than lightning_megatron's specs; leave it out, and place softmax layers with "
    "--linear-attention-freq"
)
# Refused whatever else is asked for: field of the config or flag -> what happens, and the remedy.
REFUSED_ALWAYS = {
    "experimental_attention_variant": _OTHER_ATTENTION,
    "heterogeneous_block_specs": _OTHER_ATTENTION,  # of the config; the next one is the flag for it
    "heterogeneous_layers_config_path": _OTHER_ATTENTION,
    "heterogeneous_layers_config_encoded_json": _OTHER_ATTENTION,
    "flash_decode": "captures Megatron's static inference in CUDA graphs, where states of lightning layers have no "
    "fixed address; leave it out",
    "reset_attention_mask": "has no effect on lightning layers and on causal softmax kernels, so documents would see "
    "each other; use --dataloader-inter-document-masking",
    "rampup_batch_size": "is ignored by Megatron 0.19, which would train with the full batch; use "
    "--step-batch-size-schedule",
    "freeze_all_layers": "is ignored by Megatron 0.19, which would train all layers, and in later versions writes no "
    "checkpoints; leave it out, and evaluate with --skip-train",
    "full_validation": "ends Megatron 0.19 in a TypeError before the first step; use --eval-iters N",
    "multiple_validation_sets": "needs --full-validation, which does not run in Megatron 0.19; blend the sets in "
    "one --valid-data-path",
}

# Refused where the row says so.
REFUSED = (
    Rule("fp8", lambda run: run.local, _NEEDS_TE, "--fp8-format"),
    Rule("fp4", lambda run: run.local, _NEEDS_TE, "--fp4-format"),
    *(
        Rule(
            name,
            lambda run: run.local and not run.get("use_kitchen"),  # kitchen reads the recipe of a file, too
            "acts in TransformerEngine's layers only, and --transformer-impl local would ignore it; use "
            "--transformer-impl transformer_engine, or leave it out",
        )
        for name in _TE_ALONE
    ),
    Rule(
        "batch_invariant_mode",
        lambda run: not run.get("deterministic_mode"),
        "promises the same bits in any batch, but how lightning kernels split a sequence follows the batch size; add "
        "--deterministic-mode, in which it does not",
    ),
    Rule(
        "optimizer",
        lambda run: _muon_cut(run) == "wrong",
        "would cut the fused projection of lightning layers into q, k and v where softmax layers have theirs; use "
        "--muon-no-split-qkv",
    ),
    Rule(
        "rope_scaling_factor",
        lambda run: run.get("rope_scaling_factor") != 8.0,  # Megatron's default
        "is ignored by Megatron 0.19, where --use-rope-scaling always scales by 8; leave it out",
    ),
    Rule(
        "memory_efficient_layer_norm",
        lambda run: not (run.local and run.config.normalization == "LayerNorm" and importable(_APEX_NORM)),
        "is an option of apex's LayerNorm, which this model does not use; leave it out",
        "memory_efficient_layer_norm",  # Megatron has no flag for it
    ),
    Rule(
        "recompute_modules",
        lambda run: selective(run, "layernorm", "moe_act") and not importable(TE),
        "needs TransformerEngine for layernorm and moe_act, and it does not import: use --recompute-granularity full, "
        "or install it",
    ),
    Rule(
        "recompute_modules",
        lambda run: selective(run, "mlp") and run.config.add_bias_linear and not (run.get("fp8") or run.get("fp4")),
        "never ends its backward with biases, which are a result of the recomputed part and its parameter at once "
        "(Megatron 0.19); add --disable-bias-linear, or use --recompute-granularity full",
    ),
    Rule(
        "reset_position_ids",
        lambda run: (
            run.get("position_embedding_type") in (*ROTARY, "none") and not run.get("dataloader_inter_document_masking")
        ),
        "has no effect without learned positions, because rotary embeddings do not read position ids; use "
        "--dataloader-inter-document-masking, which also separates documents",
    ),
    Rule(
        "window_size",
        lambda run: not run.softmax,
        "limits softmax layers, and this model has none: lightning layers would see all tokens; leave it out, and "
        "choose how far they look with --lightning-decay",
    ),
    Rule(
        "softmax_type",
        lambda run: run.get("softmax_type") != "vanilla" and not run.softmax,
        "changes the softmax of softmax layers, and this model has none; leave it out, or place softmax layers with "
        "--linear-attention-freq",
    ),
    Rule(
        "qk_clip",
        lambda run: not run.softmax,
        "clips the logits of softmax layers, and this model has none; leave it out, or bound q and k with "
        "--lightning-qk-norm",
    ),
    Rule(
        "position_embedding_type",
        lambda run: run.options.rope and run.get("position_embedding_type") not in ROTARY,
        "gives no angles to --lightning-rope, or make_spec(rope=True); use --position-embedding-type rope",
    ),
    Rule(
        "linear_conv_kernel_dim",
        lambda run: run.config.linear_conv_kernel_dim != 4,
        "belongs to gated delta net; lightning layers have no convolution, so leave it out",
    ),
    Rule(
        "dataloader_inter_document_masking",
        lambda run: (
            run.config.context_parallel_size > 1 and run.layout != "zigzag-documents" and run.attends and not run.local
        ),
        "with context parallelism lets documents cross the ranks' chunks, which TransformerEngine's softmax "
        "attention does not take; use --transformer-impl local",
    ),
    Rule(
        "fused_residual_rmsnorm",
        lambda run: not run.local and run.own_norms,
        "is an option of TransformerEngine's norms, and --apply-residual-connection-post-layernorm, "
        "--lightning-embedding-scale and --no-lightning-layernorm-affine need other norms; leave it out",
    ),
    Rule(
        "fp32_residual_connection",
        lambda run: not run.local and (run.config.bf16 or run.config.fp16),
        "gives TransformerEngine's layers an input of another dtype than their weights, which ends them in a "
        "TypeError; use --transformer-impl local",
    ),
    Rule(
        "layernorm_zero_centered_gamma",
        lambda run: not run.options.layernorm_affine,
        "is about the weight of layer norms, which have none with --no-lightning-layernorm-affine; leave it out",
        "--apply-layernorm-1p",
    ),
    Rule(
        "lightning_bilinear_glu",
        lambda run: not run.config.gated_linear_unit or _name(run.config.activation_func) != "silu",
        "takes the activation out of the MLP of --swiglu; add that",
    ),
    Rule(
        "lightning_bilinear_glu",
        lambda run: run.config.num_moe_experts is not None,
        "is not an option of experts; leave out --num-experts",
    ),
    Rule(
        "lightning_bilinear_glu",
        lambda run: not run.local and run.get("use_te_activation_func"),
        "has no activation, and --use-te-activation-func one of TransformerEngine's; leave that out",
    ),
    *(
        Rule(
            f"lightning_softmax_{factor}",
            lambda run, factor=factor: getattr(run.options, f"softmax_{factor}") != 1.0 and not run.attends,
            "is a factor of softmax layers, and this model has none; leave it out, or place softmax layers with "
            "--linear-attention-freq",
        )
        for factor in ("alpha", "beta")
    ),
    Rule(
        "offload_modules",
        lambda run: (
            run.config.apply_residual_connection_post_layernorm
            and run.get("fine_grained_activation_offloading")
            and {"attn_norm", "mlp_norm"} & set(run.get("offload_modules"))
        ),
        "frees the output of a norm, which is the residual with --apply-residual-connection-post-layernorm; leave "
        "attn_norm and mlp_norm out",
    ),
    Rule(
        "mtp_num_layers",
        lambda run: (
            run.config.pipeline_model_parallel_size > 1
            and any(map(run.get, ("save", "non_persistent_save_interval", "load", "pretrained_checkpoint")))
            and run.get("untie_embeddings_and_output_weights") is False
        ),
        "with tied embeddings and --pipeline-model-parallel-size above 1 cannot save or load a checkpoint (Megatron "
        "0.19); pass --untie-embeddings-and-output-weights",
    ),
    *fp8.REFUSED,
    *later.REFUSED,
    *latent.REFUSED,
    *memory.REFUSED,
    *experts.REFUSED,
    *memory.GRAPHS,
    *memory.OPTIMIZERS,
    *log.REFUSED,
)

WARNED = (
    *latent.WARNED,
    *memory.WARNED,
    Rule(
        "optimizer",
        lambda run: _muon_cut(run) == "uncut",
        "takes the fused projection of lightning layers, whose parts are not those of softmax layers, as one matrix",
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
        lambda run: run.config.context_parallel_size > 1,
        "has a loss that Megatron divides by the numbers of tokens of each context-parallel rank, which differ by a "
        "few (with --sft more), so that it is not exactly that of one rank",
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


def refuse_parts(asked) -> None:
    """Refuse parts that no spec here builds, and what is refused whatever else is asked for.

    Args:
        asked: a config, or Megatron's flags, maybe before there is a config.

    Raises:
        ValueError: naming what was given, and the remedy.
    """
    implementation = getattr(asked, "transformer_impl", "local")
    if implementation not in ("local", "transformer_engine"):
        raise ValueError(
            f"--transformer-impl {implementation} is not supported by lightning specs; use local or transformer_engine"
        )
    if implementation == "transformer_engine" and not importable(TE):
        raise ValueError(
            "--transformer-impl transformer_engine needs TransformerEngine, but transformer_engine is not installed, "
            "or does not import; install transformer_engine[pytorch], or pass --transformer-impl local"
        )
    if getattr(asked, "multi_latent_attention", False) and getattr(asked, "attention_output_gate", False):
        raise ValueError(
            "--attention-output-gate is not an option of multi-latent attention; leave it out (lightning layers have "
            "--lightning-gate)"
        )
    for name, text in REFUSED_ALWAYS.items():
        value = getattr(asked, name, None)
        if value:
            raise ValueError(f"{flag_of(name)}{shown(value)} {text}")


def messages_of_refusal(config, options: LightningOptions, layout: str, args: Namespace | None = None) -> list[str]:
    """What is asked for and cannot be honoured, by the table."""
    return _messages(REFUSED, _run(config, options, layout, args))


def warnings_of(config, options: LightningOptions, layout: str, args: Namespace | None = None) -> list[str]:
    """Lines for the log: flags that change less than they seem to, or cost something and give nothing."""
    run = _run(config, options, layout, args)
    lines = _messages(WARNED, run)
    if run.softmax == config.num_layers:
        lines.append(
            f"--linear-attention-freq {config.linear_attention_freq}: all layers are softmax layers, for comparison; "
            "--lightning-* options of lightning layers act on nothing"
        )
    if not run.softmax:
        given = _given(SOFTMAX_ONLY, run)
        if config.num_query_groups != config.num_attention_heads:
            given.append(
                f"--num-query-groups {config.num_query_groups} (for lightning layers: --lightning-num-kv-heads)"
            )
        if given:
            besides = " besides its MTP layers" if config.mtp_num_layers else ""
            lines.append(", ".join(given) + f": act on softmax layers only; this model has none{besides}")
    if run.get("position_embedding_type") is not None and not run.rotates:
        if given := _given(ROTARY_ONLY, run):
            lines.append(", ".join(given) + ": act on rotary embeddings only; no layer of this model uses them")
    return lines


def _run(config, options: LightningOptions, layout: str, args: Namespace | None) -> Run:
    pattern = lightning_pattern(config.linear_attention_freq, config.num_layers)
    return Run(config, options, layout, Namespace() if args is None else args, pattern.count(False))


def _messages(table: tuple[Rule, ...], run: Run) -> list[str]:
    return [message for rule in table if (message := rule.message(run)) is not None]


def _given(table: dict[str, tuple], run: Run) -> list[str]:
    """Flags and values of a table that differ from what nobody gave."""
    values = {name: run.get(name) for name in table}
    return [
        flag_of(name) + shown(value)
        for name, value in values.items()
        if getattr(value, "name", value) not in table[name]
    ]
