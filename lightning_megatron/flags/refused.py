"""Rows of the tables of flags: what is refused whatever else is asked for, and what is where a row says so.

Those of one topic, such as fp8, are in files of their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from ..compat import importable
from .rules import ROTARY, TE, Rule, selective

_APEX_NORM = "fused_layer_norm_cuda"


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def strides_saved() -> bool:
    """Whether torch's checkpoints tell the strides of tensors, too, which Megatron passes on to torch.empty."""
    return any(field.name == "strides" for field in dataclasses.fields(TensorProperties))


_NEEDS_TE = (
    "needs TransformerEngine's layers; --transformer-impl local would train in another precision: use "
    "--transformer-impl transformer_engine"
)

_TE_ALONE = (  # Megatron's local layers do not read them
    "tp_comm_overlap", "use_te_activation_func", "fused_residual_rmsnorm", "use_transformer_engine_op_fuser",
    "te_precision_config_file", "overlap_dispatch_backward_with_experts_wgrad", "symmetric_ar_type",
    "use_grouped_gemm_for_dense_mlp", "use_grouped_gemm_for_shared_expert",
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
    "init_method_xavier_uniform": "ends Megatron 0.19 in a TypeError; leave it out, and choose --init-method-std",
    "moe_use_upcycling": "ends Megatron 0.19 in a TypeError before the first step; convert the dense checkpoint with a "
    "program of your own, and --load the result with --finetune",
    "openai_gelu": "is not read by Megatron 0.19; leave it out",
    "config_logger_dir": "ends Megatron 0.19 in a TypeError (cannot pickle a ProcessGroup) while the model is built; "
    "leave it out: the log lists all arguments",
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
    *(
        Rule(
            f"{kind}tensor_parallel_num_weight_shards",
            lambda run, kind=kind: run.local and (run.get(f"{kind}gtp_weight_remat_size") or 1) > 1,
            "shards weights of TransformerEngine's layers only, and --transformer-impl local would keep them whole; "
            "use --transformer-impl transformer_engine, or leave it out",
        )
        for kind in ("", "expert_")
    ),
    Rule(
        "tensor_parallel_num_weight_shards",
        lambda run: (
            (run.get("gtp_weight_remat_size") or 1) > 1 and run.get("untie_embeddings_and_output_weights") is False
        ),
        "ends Megatron in a RuntimeError (shape of the supplied weight) where the output layer has the embeddings' "
        "weight; add --untie-embeddings-and-output-weights, or leave it out",
    ),
    *(
        Rule(
            name,
            lambda run: not importable(TE),
            "ends Megatron 0.19 in a TypeError at the first step that it writes, as it looks for TransformerEngine's "
            "layers, which does not import; leave it out, or install TransformerEngine",
        )
        for name in ("save_activations_interval", "save_dgrads_interval")
    ),
    Rule(
        "use_ring_exchange_p2p",
        lambda run: not hasattr(torch.distributed, "ring_exchange"),
        "needs a PyTorch with torch.distributed.ring_exchange, which this one has not (Megatron ends in an "
        "AttributeError in the first step); leave it out",
    ),
    Rule(
        "dist_ckpt_strictness",
        lambda run: run.loads and run.get("dist_ckpt_strictness") != "assume_ok_unexpected" and strides_saved(),
        f"ends Megatron 0.19 in a TypeError (empty() got ... 'strides') as it loads, with the torch that is installed, "
        f"{torch.__version__}; leave it out, or use torch 2.11",
    ),
    Rule(
        "phase_transition_iterations",
        lambda run: not run.get("train_samples"),
        "ends Megatron 0.19 in a TypeError without --train-samples; give that in place of --train-iters",
    ),
    Rule(
        "batch_invariant_mode",
        lambda run: not run.get("deterministic_mode"),
        "promises the same bits in any batch, but how lightning kernels split a sequence follows the batch size; add "
        "--deterministic-mode, in which it does not",
    ),
    Rule(
        "optimizer",
        lambda run: run.muon_cuts_wrong,
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
        lambda run: (
            selective(run, "layernorm")
            and (run.config.apply_residual_connection_post_layernorm or run.options.embedding_scale != 1.0)
        ),
        "frees what a norm returns, which is the residual, too, with --apply-residual-connection-post-layernorm and "
        "--lightning-embedding-scale; leave layernorm out",
    ),
    Rule(
        "recompute_modules",
        lambda run: (
            selective(run, "layernorm")
            and run.config.fused_residual_rmsnorm
            and (run.experts or run.latent)  # whose norms no projection begins with
        ),
        "frees what a norm returns, which is the residual, too, with --fused-residual-rmsnorm before experts and "
        "multi-latent attention; leave out one of the two",
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
        "position_embedding_type",
        lambda run: run.get("position_embedding_type") == "relative",
        "is a bias of T5's attention, which no layer of this model has; use rope, or none",
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
        lambda run: run.experts,
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
        "lightning_mtp_attention",
        lambda run: run.options.mtp_attention == "lightning" and not run.mtp,
        "is that of multi-token prediction layers, and this model has none; add --mtp-num-layers, or give softmax, "
        "the default",
    ),
    Rule(
        "mtp_num_layers",
        lambda run: (
            run.mtp
            and run.config.pipeline_model_parallel_size > 1
            and (run.loads or run.get("save") or run.get("non_persistent_save_interval"))
            and run.get("untie_embeddings_and_output_weights") is False
        ),
        "with tied embeddings and --pipeline-model-parallel-size above 1 cannot save or load a checkpoint (Megatron "
        "0.19); pass --untie-embeddings-and-output-weights",
    ),
)
