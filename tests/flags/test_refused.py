"""Flags of layers, data and optimizers that are refused before any GPU work, in both ways of starting."""

from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from lightning_megatron.config import LightningOptions
from lightning_megatron.runtime import refuse
from tests.helpers.flags import FULL, HYBRID, LATENT, MUON, QUICK, SWIGLU, TE, check_allowed, check_refused, model

DCP = dict(ckpt_format="torch_dcp")
OVERLAP = dict(
    num_moe_experts=4, overlap_moe_expert_parallel_comm=True, expert_model_parallel_size=2,
    moe_token_dispatcher_type="alltoall", bf16=True,
)  # fmt: skip
# config, options, flags, and what the message says
REFUSED = {
    "fp4": (dict(fp4="e2m1"), {}, {}, "--fp4-format e2m1 needs .*use --transformer-impl transformer_engine"),
    **{
        f"te-only-{name}": (
            {name: True}, {}, {},
            f"--{name.replace('_', '-')} acts in TransformerEngine's layers only.*leave it out",
        )
        for name in (
            "tp_comm_overlap", "use_te_activation_func", "fused_residual_rmsnorm", "use_transformer_engine_op_fuser",
            "overlap_dispatch_backward_with_experts_wgrad", "use_grouped_gemm_for_dense_mlp",
            "use_grouped_gemm_for_shared_expert", "symmetric_ar_type",
        )
    },
    "clamp-without-gate": (
        dict(activation_func_clamp_value=7.0, bias_activation_fusion=False), {}, {},
        "--activation-func-clamp-value 7.0 is read by gated",
    ),
    "clamp-at-zero": (  # a value of 0 is given
        dict(activation_func_clamp_value=0.0, bias_activation_fusion=False), {}, {},
        "--activation-func-clamp-value 0.0 is read by gated",
    ),
    "clamp-te": (
        SWIGLU | TE
        | dict(activation_func_clamp_value=7.0, bias_activation_fusion=False, use_te_activation_func=True), {}, {},
        "--activation-func-clamp-value 7.0 is read by gated",
    ),
    "glu-offset": (
        dict(glu_linear_offset=1.0, bias_activation_fusion=False), {}, {},
        "--glu-linear-offset 1.0 is added in gated .*add --quick-geglu",
    ),
    **{
        f"quick-geglu-{name}": (
            QUICK | dict(bias_activation_fusion=True, **fields), {}, {},
            "--quick-geglu has a fused activation for routed experts only.*add --no-bias-gelu-fusion",
        )
        for name, fields in (
            ("dense", {}), ("mixed", dict(num_moe_experts=4, moe_layer_freq=2)),
            ("shared", dict(num_moe_experts=4, moe_shared_expert_intermediate_size=32)),
        )
    },
    "interleaved-experts": (
        SWIGLU | dict(num_moe_experts=4, moe_mlp_glu_interleave_size=32, moe_grouped_gemm=True), {}, {},
        "--moe-mlp-glu-interleave-size 32 is the order .*add --moe-grouped-gemm",
    ),
    "interleaved-sequential-experts": (
        SWIGLU | TE | dict(num_moe_experts=4, moe_mlp_glu_interleave_size=32), {}, {},
        "--moe-mlp-glu-interleave-size 32 is the order .*add --moe-grouped-gemm",
    ),
    "interleaved-shared": (
        SWIGLU | TE | dict(num_moe_experts=4, moe_shared_expert_glu_interleave_size=32), {}, {},
        "--moe-shared-expert-glu-interleave-size 32 is the order .*add that",
    ),
    "router-fusion": (
        dict(num_moe_experts=4, moe_router_fusion=True), {}, {},
        "--moe-router-fusion needs TransformerEngine's kernels.*leave it out",
    ),
    **{
        f"{kind}weight-shards": (
            {f"{kind}tensor_parallel_num_weight_shards": 2, f"{kind}gtp_weight_remat_size": 2}, {}, {},
            "tensor-parallel-num-weight-shards 2 shards weights of TransformerEngine's layers only.*leave it out",
        )
        for kind in ("", "expert_")
    },
    "weight-shards-tied": (
        dict(transformer_impl="transformer_engine", tensor_parallel_num_weight_shards=2, gtp_weight_remat_size=2), {},
        dict(untie_embeddings_and_output_weights=False),
        "--tensor-parallel-num-weight-shards 2 ends Megatron in a RuntimeError.*add --untie-embeddings-and-output",
    ),
    "xavier": ({}, {}, dict(init_method_xavier_uniform=True), "--init-method-xavier-uniform ends .*--init-method-std"),
    "openai-gelu": ({}, {}, dict(openai_gelu=True), "--openai-gelu is not read by Megatron 0.19; leave it out"),
    "relative": (
        TE, {}, dict(position_embedding_type="relative"), "--position-embedding-type relative is a bias of T5's",
    ),
    "precision-file": (
        {}, {}, dict(te_precision_config_file="some.yaml"),
        "--te-precision-config-file some.yaml acts in TransformerEngine's",
    ),
    "batch-invariant": (
        TE | dict(batch_invariant_mode=True), {}, {},
        "--batch-invariant-mode .* add --deterministic-mode",
    ),
    "memory-efficient-norm": (
        dict(memory_efficient_layer_norm=True, normalization="RMSNorm"), {}, {},
        "memory_efficient_layer_norm is an option of apex's",
    ),
    "kitchen-attention-sdpa": (
        HYBRID | dict(use_kitchen=True, use_kitchen_attention=True), {}, {},
        "--use-kitchen-attention is not supported by the softmax layers on torch's SDPA; leave it out",
    ),
    "position-ids-rope": (
        {}, dict(rope=True), dict(reset_position_ids=True, position_embedding_type="rope"),
        "--reset-position-ids has no effect .*use --dataloader-inter-document-masking",
    ),
    "position-ids-none": (
        {}, {}, dict(reset_position_ids=True, position_embedding_type="none"), "--reset-position-ids has no effect",
    ),
    "attention-mask": ({}, {}, dict(reset_attention_mask=True), "--reset-attention-mask has no effect on lightning"),
    "window": (
        dict(window_size=(8, 0)), {}, {},
        r"--window-size \(8, 0\) limits softmax layers, and this model has none",
    ),
    "window-sdpa": (
        HYBRID | dict(window_size=(8, 0)), {}, {},
        r"--window-size \(8, 0\) is not supported .*SDPA; leave it",
    ),
    "softmax-type": (
        dict(softmax_type="learnable"), {}, {},
        "--softmax-type learnable changes .*this model has none; leave",
    ),
    "softmax-type-sdpa": (
        HYBRID | dict(softmax_type="off-by-one"), {}, {},
        "--softmax-type off-by-one is not supported",
    ),
    "qk-clip": (dict(qk_clip=True), {}, {}, "--qk-clip clips .*this model has none; .*--lightning-qk-norm"),
    "qk-clip-sdpa": (
        HYBRID | dict(qk_clip=True), {}, {},
        "--qk-clip .*is not supported by the softmax layers on torch",
    ),
    "rope-without-angles": (
        {}, dict(rope=True), dict(position_embedding_type="learned_absolute"),
        "--position-embedding-type learned_absolute gives no angles to --lightning-rope",
    ),
    "latent-yarn": (
        HYBRID | LATENT | dict(rope_type="yarn"), dict(rope=True), dict(position_embedding_type="rope"),
        "--rope-type yarn with --multi-latent-attention .*use --rope-type rope",
    ),
    **{
        f"fused-norm-te-{number}": (
            TE | dict(fused_residual_rmsnorm=True) | config, options, {},
            "--fused-residual-rmsnorm is an option of TransformerEngine's norms, and .* leave it out",
        )
        for number, (config, options) in enumerate((
            (dict(apply_residual_connection_post_layernorm=True), {}),
            ({}, dict(embedding_scale=8.0)),
            ({}, dict(layernorm_affine=False)),
        ))
    },
    "fp32-residual-te": (
        TE | dict(fp32_residual_connection=True, bf16=True), {}, {},
        "--fp32-residual-connection gives TransformerEngine's layers .*use --transformer-impl local",
    ),
    "affine-1p": (
        dict(layernorm_zero_centered_gamma=True), dict(layernorm_affine=False), {},
        "--apply-layernorm-1p is about the weight of layer norms, which have none.*leave it out",
    ),
    "key-dim": (
        {}, dict(key_head_dim=24), {}, r"--lightning-key-head-dim \(default: --kv-channels\) is 24, and the",
    ),
    "value-dim": (
        {}, dict(value_head_dim=512), {}, r"--lightning-value-head-dim .* is 512, and .* from 16 to 256; choose one",
    ),
    "bilinear-alone": (
        {}, dict(bilinear_glu=True), {}, "--lightning-bilinear-glu takes the activation out of the MLP of --swiglu",
    ),
    "bilinear-experts": (
        SWIGLU | dict(num_moe_experts=4), dict(bilinear_glu=True), {},
        "--lightning-bilinear-glu is not an option of experts; leave out --num-experts",
    ),
    "bilinear-te": (
        SWIGLU | TE | dict(use_te_activation_func=True), dict(bilinear_glu=True), {},
        "--lightning-bilinear-glu has no activation, and --use-te-activation-func",
    ),
    **{
        f"softmax-{factor}": (
            {}, {f"softmax_{factor}": 2.0}, {}, f"--lightning-softmax-{factor} 2.0 is a factor of softmax layers, and",
        )
        for factor in ("alpha", "beta")
    },
    "latent-alone": (LATENT, {}, {}, "--multi-latent-attention is the attention of softmax layers.*has none; leave"),
    "latent-recompute": (
        HYBRID | LATENT | dict(recompute_granularity="selective", recompute_modules=["mla_up_proj"]), {}, {},
        "--recompute-modules mla_up_proj recomputes .*; use core_attn or --recompute-granularity full",
    ),
    "latent-rope-freq": (HYBRID | LATENT | dict(no_rope_freq=2), {}, {}, "--no-rope-freq .*is not read with"),
    "latent-rope-scaling": (HYBRID | LATENT, {}, dict(use_rope_scaling=True), "--use-rope-scaling is not read with"),
    "latent-interpolation": (
        HYBRID | LATENT, {}, dict(rotary_seq_len_interpolation_factor=2),
        "--rotary-seq-len-interpolation-factor 2 is not read with",
    ),
    "latent-cache": (
        HYBRID | LATENT | dict(cache_mla_latents=True), {}, {},
        "--cache-mla-latents is for Megatron's dynamic inference.*leave it out",
    ),
    "flash-decode": (
        dict(flash_decode=True), {}, {}, "--flash-decode captures Megatron's static inference .*leave it out",
    ),
    "latent-fusion": (
        HYBRID | LATENT | dict(mla_down_proj_fusion=True), {}, {},
        "--mla-down-proj-fusion acts in TransformerEngine's layers only.*use --transformer-impl transformer_engine",
    ),
    "latent-fusion-tp": (
        HYBRID | LATENT | TE | dict(mla_down_proj_fusion=True, tensor_model_parallel_size=2), {}, {},
        "--mla-down-proj-fusion with --tensor-model-parallel-size above 1 leaves .*leave it out",
    ),
    "latent-fusion-queries": (
        HYBRID | LATENT | TE | dict(mla_down_proj_fusion=True, q_lora_rank=None), {}, {},
        "--mla-down-proj-fusion joins .*give --q-lora-rank, or leave it out",
    ),
    "latent-fusion-norm": (
        HYBRID | LATENT | TE | dict(mla_down_proj_fusion=True), dict(layernorm_affine=False), {},
        "--mla-down-proj-fusion begins with TransformerEngine's norm.*leave it out",
    ),
    "latent-position": (
        HYBRID | LATENT, {}, dict(position_embedding_type="yarn"),
        "--position-embedding-type yarn does not reach multi-latent attention.*use --position-embedding-type rope",
    ),
    "latent-yarn-flag": (
        HYBRID | LATENT | dict(rope_type="yarn"), {}, dict(yarn_beta_fast=4.0),
        "--yarn-beta-fast 4.0 is not passed on to multi-latent attention",
    ),
    "latent-mscale": (
        HYBRID | LATENT | dict(mscale_all_dim=1.0), {}, {}, "--mscale-all-dim 1.0 belongs to --rope-type yarn",
    ),
    "latent-percent": (
        HYBRID | LATENT | dict(rope_type="yarn", rotary_percent=0.5), {}, {},
        "--rotary-percent 0.5 is not read with --rope-type yarn",
    ),
    "latent-rope-fusion": (HYBRID | LATENT | dict(apply_rope_fusion=True), {}, {}, "use --no-rope-fusion"),
    "latent-l2": (HYBRID | LATENT | dict(qk_l2_norm=True), {}, {}, "--qk-l2-norm is not an option.*--qk-layernorm"),
    "latent-gate": (
        HYBRID | LATENT | dict(attention_output_gate=True), {}, {}, "--attention-output-gate is not an option of multi",
    ),
    "latent-odd": (HYBRID | LATENT | dict(qk_pos_emb_head_dim=7), {}, {}, "--qk-pos-emb-head-dim 7 must be even"),
    "latent-none": (HYBRID | LATENT | dict(v_head_dim=0), {}, {}, "--v-head-dim 0 must be at least 1"),
    "latent-tp": (
        HYBRID | LATENT | dict(q_lora_rank=25, tensor_model_parallel_size=2), {}, {},
        "--q-lora-rank is 25, which tensor-parallel size 2 does not divide",
    ),
    "latent-type": (HYBRID | LATENT | dict(rope_type="foo"), {}, {}, "--rope-type foo is unknown; choose rope or yarn"),
    "rotary-percent": (
        HYBRID, dict(rope=True, rotary_percent=0.5), dict(position_embedding_type="rope"),
        "--lightning-rotary-percent 0.5 needs --multi-latent-attention; .*use --rotary-percent",
    ),
    "conv": (
        dict(linear_conv_kernel_dim=3), {}, {},
        "--linear-conv-kernel-dim 3 belongs to gated delta net.*leave it out",
    ),
    "cp-partition": (
        dict(context_parallel_size=2, cp_partition_mode="contiguous"), {}, {},
        "--cp-partition-mode contiguous cuts sequences in a way .*use zigzag",
    ),
    "mhc": (dict(enable_mhc_connections=True), {}, {}, "--enable-mhc-connections needs layers of Megatron's own"),
    "gdp": (dict(gdp_num_householder=2), {}, {}, "--gdp-num-householder 2 belongs to gated delta product"),
    "gdp-kernel": (dict(gdp_cutedsl_kernel=True), {}, {}, "--gdp-cutedsl-kernel belongs to gated delta product"),
    "gdp-recompute": (dict(gdp_num_chunk_states_to_recompute=1), {}, {}, "--gdp-num-chunk-states-to-recompute 1 belo"),
    "mtp-mixed-documents": (
        dict(mtp_num_layers=2, mtp_hsm=True, context_parallel_size=2, sequence_parallel=True), {},
        dict(dataloader_inter_document_masking=True),
        "--mtp-hsm with --sequence-parallel and .* different documents; leave it out",
    ),
    "mtp-lightning": (
        {}, dict(mtp_attention="lightning"), {}, "--lightning-mtp-attention lightning is .*add --mtp-num-layers",
    ),
    "mtp-tied": (
        dict(mtp_num_layers=1, pipeline_model_parallel_size=2), {},
        dict(save="there", untie_embeddings_and_output_weights=False),
        "--mtp-num-layers 1 with tied embeddings .*--untie-embeddings-and-output-weights",
    ),
    "mtp-tied-load": (
        dict(mtp_num_layers=1, pipeline_model_parallel_size=2), {},
        dict(load="there", untie_embeddings_and_output_weights=False),
        "--mtp-num-layers 1 with tied embeddings .* cannot save or load a checkpoint",
    ),
    "mtp-split": (
        FULL | dict(mtp_num_layers=1, distribute_saved_activations=True), {}, {},
        "--distribute-saved-activations cuts inputs of layers in place.*leave out one of the two",
    ),
    "experts-bias": (
        dict(
            num_moe_experts=4, add_bias_linear=True, bias_activation_fusion=True, expert_model_parallel_size=2,
        ), {}, {},
        "--num-experts 4 has no fused activation with biases .*--disable-bias-linear, or --no-bias-gelu-fusion",
    ),
    "experts-bias-alone": (
        dict(num_moe_experts=4, add_bias_linear=True, bias_activation_fusion=True), {}, {},
        "--num-experts 4 has no fused activation with biases .*--disable-bias-linear$",
    ),
    "experts-shared-bias": (
        TE | dict(num_moe_experts=4, add_bias_linear=True, moe_shared_expert_intermediate_size=32), {}, {},
        "--num-experts 4 with --moe-shared-expert-intermediate-size has no biases .*--disable-bias-linear",
    ),
    "mtp-window": (
        dict(linear_attention_freq=[1, 0, 1, 1], mtp_num_layers=1, window_size=(8, 0), window_attn_skip_freq=2), {}, {},
        "--window-size .* is not supported by the softmax layers on torch's SDPA",
    ),
    "mtp-packed-te": (
        TE | dict(mtp_num_layers=1, context_parallel_size=2), {}, dict(dataloader_inter_document_masking=True),
        "--dataloader-inter-document-masking with context parallelism .*use --transformer-impl local",
    ),
    "rampup": (
        {}, {}, dict(rampup_batch_size=[16, 8, 300]),
        "--rampup-batch-size 16 8 300 is ignored .*--step-batch-size",
    ),
    "upcycling": (
        {}, {}, dict(moe_use_upcycling=True), "--moe-use-upcycling ends Megatron 0.19 in a TypeError .*--finetune",
    ),
    "freeze": ({}, {}, dict(freeze_all_layers=True), "--freeze-all-layers is ignored by Megatron .*leave it out"),
    "heterogeneous-json": (
        {}, {}, dict(heterogeneous_layers_config_encoded_json="{}"),
        "--heterogeneous-layers-config-encoded-json {} chooses another attention",
    ),
    "rope-scaling-factor": (
        {}, dict(rope=True), dict(position_embedding_type="rope", use_rope_scaling=True, rope_scaling_factor=2.0),
        "--rope-scaling-factor 2.0 is ignored by Megatron .*scales by 8; leave it out",
    ),
    "muon-value-dim": (
        {}, dict(gate="none", key_head_dim=32, value_head_dim=32), MUON,
        "--optimizer muon would cut .*use --muon-no-split-qkv",
    ),
    "muon-gate": (
        dict(num_attention_heads=6, num_query_groups=6), {}, MUON | dict(optimizer="adaptive_muon"),
        "--optimizer adaptive_muon would cut",
    ),
    "sgd-distributed": (
        dict(bf16=True), {}, dict(optimizer="sgd", use_distributed_optimizer=True),
        "--optimizer sgd does not go with --use-distributed-optimizer .*; leave that out, or use adam",
    ),
    "muon-distributed-fp32": (
        {}, {}, dict(optimizer="muon", use_distributed_optimizer=True),
        "--optimizer muon ends Megatron 0.19 .* in fp32; use --bf16, or leave --use-distributed-optimizer out",
    ),
    "lion-distributed-fp32": (
        {}, {}, dict(optimizer="lion", use_layer_wise_distributed_optimizer=True),  # what Megatron makes of the flag
        "--optimizer lion ends Megatron 0.19",
    ),
    "muon-fp16": (
        dict(fp16=True), {}, dict(optimizer="adaptive_muon"),
        "--optimizer adaptive_muon has no loss scale .*; use --bf16",
    ),
    "soap-saves": (
        {}, {}, dict(optimizer="soap", save="there", ckpt_format="torch_dist"),
        "--optimizer soap cannot be saved .*; use --ckpt-format torch, or --no-save-optim",
    ),
    "lion-beta": (
        {}, {}, dict(optimizer="lion", lion_beta1=0.5, lion_beta2=0.98),
        "--lion-beta1 0.5 is not read with --optimizer lion .*--adam-beta1; give that",
    ),
    "adaptive-muon": (
        {}, {}, dict(optimizer="adaptive_muon"), "--optimizer adaptive_muon ends Megatron 0.19 in an AttributeError",
    ),
    "fsdp-fp32": (
        SWIGLU, {}, dict(use_megatron_fsdp=True, save="there"),
        "--use-megatron-fsdp can neither save nor load --swiglu in fp32 .*; use --bf16",
    ),
    "fsdp-loads-fp32": (
        SWIGLU, {}, dict(use_megatron_fsdp=True, load="there", no_load_optim=True),
        "--use-megatron-fsdp can neither save nor load --swiglu in fp32 .*; use --bf16",
    ),
    "fsdp-saves-nothing": (
        dict(gated_linear_unit=True, bf16=False), {}, dict(use_megatron_fsdp=True, save="x", no_save_optim=True),
        "--use-megatron-fsdp can neither save nor load --swiglu",
    ),
    "fsdp-loads-weights": (
        dict(bf16=True), {}, dict(use_megatron_fsdp=True, load="there", no_load_optim=True),
        "--use-megatron-fsdp cannot load weights without the optimizer's in bf16 .*; leave --no-load-optim",
    ),
    **{
        f"fsdp2-{name}": (
            {}, {}, dict(use_torch_fsdp2=True, load="there", ckpt_format="torch_dist") | flags, f"--{flag} {message}",
        )
        for name, flags, flag, message in (
            ("goes-on", {}, "use-torch-fsdp2", "does not go on where it stopped.*add --no-load-optim or --finetune"),
            ("dcp", DCP, "ckpt-format torch_dcp", "can be saved, and not loaded"),
            ("dcp-weights", DCP | dict(finetune=True), "ckpt-format torch_dcp", "can be saved"),
            ("dcp-tuned", DCP | dict(load=None, pretrained_checkpoint="x"), "ckpt-format torch_dcp", "can be saved"),
        )
    },
    **{
        f"overlap-{name}": (
            OVERLAP | config, {}, args, f"--overlap-moe-expert-parallel-comm {message}",
        )
        for name, config, args, message in (
            ("dense", dict(moe_layer_freq=2), {}, "leaves the norm behind the last layer out.*--moe-layer-freq"),
            ("listed", dict(moe_layer_freq=[1, 1, 1, 0]), {}, "leaves the norm behind the last layer out"),
            ("hybrid", {}, dict(hybrid_layer_pattern="L*E"), "has a schedule for GPTModel, and HybridModel none"),
            ("packed", dict(mtp_num_layers=1), dict(sft=True), "has multi-token prediction for plain sequences only"),
        )
    },
    **{
        f"chunks-balance-{name}": (
            dict(num_moe_experts=4, mlp_chunks_for_training=2, add_bias_linear=False, **fields), {}, {},
            "--mlp-chunks-for-training 2 adds .* up over chunks.*leave it out",
        )
        for name, fields in (
            ("aux", dict(moe_aux_loss_coeff=0.1)), ("z", dict(moe_z_loss_coeff=0.1, moe_layer_freq=2)),
            (
                "several",
                dict(
                    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], moe_aux_loss_coeff=[0.0, 0.1],
                    moe_layer_freq=[0, 0, 1, 0],
                ),
            ),
        )
    },
    **{
        f"chooses-in-a-list-{'-'.join(kinds)}": (
            dict(
                num_moe_experts=4, add_bias_linear=False, moe_router_load_balancing_type=kinds,
                moe_aux_loss_coeff=[0.0] * len(kinds),
            ), {}, {},
            f"--moe-router-load-balancing-type {' '.join(kinds)} leaves {left} out without a word",
        )
        for kinds, left in (
            (["aux_loss", "sinkhorn"], "sinkhorn"), (["seq_aux_loss", "quantile_balancing"], "quantile_balancing"),
            (["quantile_balancing", "sinkhorn"], "sinkhorn and quantile_balancing"), (["sinkhorn"], "sinkhorn"),
        )
    },
    "expert-biases-alone": (
        dict(num_moe_experts=4, add_bias_linear=True, bias_activation_fusion=False), {}, {},
        "--num-experts 4 with biases ends .*add --disable-bias-linear, or let ranks share the experts",
    ),
    "expert-biases-sequence-parallel": (
        dict(
            num_moe_experts=4, add_bias_linear=True, bias_activation_fusion=False, expert_model_parallel_size=2,
            tensor_model_parallel_size=2, sequence_parallel=True,
        ), {}, {},
        "--num-experts 4 with biases and --sequence-parallel adds up .*add --disable-bias-linear",
    ),
    "expert-latents": (
        dict(num_moe_experts=4, add_bias_linear=False, moe_latent_size=32), {}, {},
        "--moe-latent-size 32 needs TransformerEngine's .*leave it out, or install it",
    ),
    **{
        f"flex-{name}": (
            dict(num_moe_experts=4, add_bias_linear=False, moe_token_dispatcher_type="flex", **fields), {}, {},
            f"--moe-token-dispatcher-type flex {message}.*use alltoall",
        )
        for name, fields, message in (
            ("alone", {}, "has no ranks to send tokens to"),
            ("deepep", dict(expert_model_parallel_size=2), "needs DeepEP"),
            (
                "hybridep", dict(expert_tensor_parallel_size=2, moe_flex_dispatcher_backend="hybridep"),
                "needs HybridEP",
            ),
            (
                "ncclep", dict(expert_model_parallel_size=2, moe_flex_dispatcher_backend="ncclep"),
                "needs TransformerEngine with NCCL EP",
            ),
        )
    },
    "predictions-with-the-first-embeddings": (
        dict(
            mtp_num_layers=1, pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout=PipelineParallelLayerLayout("E|tttt|m|L", 2),
        ), {}, {},
        r"--pipeline-model-parallel-layout E\|tttt\|m\|L puts m on the rank of E.*move m",
    ),
    "fsdp-pretrained": (  # which Megatron takes as with --finetune
        dict(bf16=True), {}, dict(use_megatron_fsdp=True, pretrained_checkpoint="there"),
        "--use-megatron-fsdp cannot load weights without .* leave --no-load-optim, --finetune and --pretrained",
    ),
    "fsdp-finetunes": (
        dict(fp16=True), {}, dict(use_megatron_fsdp=True, load="there", finetune=True),
        "--use-megatron-fsdp cannot load weights without",
    ),
    "config-logger": (
        {}, {}, dict(config_logger_dir="there"), "--config-logger-dir there ends Megatron .*TypeError.*leave it out",
    ),
    "activations": (
        {}, {}, dict(save_activations_interval=2), "--save-activations-interval 2 ends Megatron .*install Transformer",
    ),
    "dgrads": ({}, {}, dict(save_dgrads_interval=2), "--save-dgrads-interval 2 ends Megatron .*install Transformer"),
    "ring-exchange": (
        dict(use_ring_exchange_p2p=True), {}, {}, "--use-ring-exchange-p2p needs a PyTorch with .*; leave it out",
    ),
    "phases": (
        {}, {}, dict(phase_transition_iterations=[2]),
        "--phase-transition-iterations 2 ends Megatron .*without --train-samples",
    ),
    "full-validation": ({}, {}, dict(full_validation=True), "--full-validation ends Megatron .*use --eval-iters N"),
    "validation-sets": (
        {}, {}, dict(multiple_validation_sets=True),
        "--multiple-validation-sets needs --full-validation",
    ),
    "freq": (
        dict(linear_attention_freq=5), {}, {},
        "--linear-attention-freq 5 would leave no softmax layer.* is 4.*at most 4",
    ),
    "packed-cp-te": (
        HYBRID | TE | dict(context_parallel_size=2), {}, dict(dataloader_inter_document_masking=True),
        "--dataloader-inter-document-masking with context parallelism .*use --transformer-impl local",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_both_ways(name, without):
    check_refused(REFUSED[name], without)


ALLOWED = {
    "no-predictions": (
        dict(mtp_num_layers=0, pipeline_model_parallel_size=2), {},
        dict(save="there", untie_embeddings_and_output_weights=False),
    ),
    "clamp": (SWIGLU | dict(activation_func_clamp_value=7.0, bias_activation_fusion=False), {}, {}),
    "clamp-bilinear": (
        SWIGLU | dict(activation_func_clamp_value=7.0, bias_activation_fusion=True), dict(bilinear_glu=True), {},
    ),
    "glu-offset": (QUICK | dict(glu_linear_offset=1.0, bias_activation_fusion=False), {}, {}),
    "quick-geglu-experts": (QUICK | dict(bias_activation_fusion=True, num_moe_experts=4, moe_layer_freq=1), {}, {}),
    "interleaved-experts": (
        SWIGLU | TE | dict(num_moe_experts=4, moe_mlp_glu_interleave_size=32, moe_grouped_gemm=True), {}, {},
    ),
    "weight-shards-of-tensor-parallelism": (
        dict(tensor_parallel_num_weight_shards=2, tensor_model_parallel_size=2, gtp_weight_remat_size=1), {}, {},
    ),
    "router-fusion-te": (TE | dict(num_moe_experts=4, moe_router_fusion=True), {}, {}),
    "norms-te": (
        SWIGLU | TE | dict(apply_residual_connection_post_layernorm=True),
        dict(embedding_scale=2.0, layernorm_affine=False, bilinear_glu=True), {},
    ),
    "latent-fusion-te": (HYBRID | LATENT | TE | dict(mla_down_proj_fusion=True), {}, {}),
    "te-only-te": (
        TE | dict(tp_comm_overlap=True, use_te_activation_func=True), {}, dict(te_precision_config_file="some.yaml"),
    ),
    "precision-file-kitchen": (dict(use_kitchen=True), {}, dict(te_precision_config_file="some.yaml")),
    "batch-invariant": (TE | dict(batch_invariant_mode=True, deterministic_mode=True), {}, {}),
    "muon-whole": (dict(num_attention_heads=6, num_query_groups=6), {}, MUON | dict(muon_split_qkv=False)),
    "muon-distributed": (
        dict(bf16=True), {}, dict(optimizer="muon", use_layer_wise_distributed_optimizer=True),
    ),
    "muon-fp32": ({}, {}, dict(optimizer="muon", use_distributed_optimizer=False)),
    "adam-distributed": ({}, {}, dict(optimizer="adam", use_distributed_optimizer=True)),
    "rope-scaling": ({}, {}, dict(use_rope_scaling=True, rope_scaling_factor=8.0)),
    "memory-efficient-norm-apex": (dict(memory_efficient_layer_norm=True, normalization="LayerNorm"), {}, {}),
    "overlap-last": (OVERLAP | dict(moe_layer_freq=[0, 0, 0, 1]), {}, dict(sft=True)),
    "fsdp-bf16": (SWIGLU | dict(bf16=True), {}, dict(use_megatron_fsdp=True, save="there")),
    "no-experts-bias": (
        dict(num_moe_experts=4, moe_layer_freq=[0] * 4, add_bias_linear=True, bias_activation_fusion=True), {}, {},
    ),
    "experts-bias": (dict(num_moe_experts=4, add_bias_linear=True, expert_model_parallel_size=2), {}, {}),
    "experts-bias-untrained": (dict(num_moe_experts=4, add_bias_linear=True), {}, dict(skip_train=True)),
    "chunks-without-balance": (
        dict(
            num_moe_experts=4, add_bias_linear=False, mlp_chunks_for_training=2, moe_aux_loss_coeff=[0.1, 0.0],
            moe_router_load_balancing_type=["none", "aux_loss"],
        ), {}, {},
    ),
    "chooses-alone": (
        dict(
            num_moe_experts=4, add_bias_linear=False, moe_router_load_balancing_type="sinkhorn",
            moe_aux_loss_coeff=0.0,
        ), {}, {},
    ),
    "losses-beside": (
        dict(
            num_moe_experts=4, add_bias_linear=False, moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"],
            moe_aux_loss_coeff=[0.1, 0.1],
        ), {}, {},
    ),
    "chunks-of-dense-layers": (
        dict(num_moe_experts=4, moe_layer_freq=[0] * 4, mlp_chunks_for_training=2, moe_aux_loss_coeff=0.1), {}, {},
    ),
    **{
        f"predictions-{name}": (
            dict(
                mtp_num_layers=1, pipeline_model_parallel_size=ranks,
                pipeline_model_parallel_layout=PipelineParallelLayerLayout(layout, ranks),
            ), {}, {},
        )
        for name, layout, ranks in (("with-the-loss", "E|tt|tt|mL", 2), ("alone", "E|tttt|m|L", 4))
    },
    "position-ids": ({}, {}, dict(reset_position_ids=True, position_embedding_type="learned_absolute")),
    "window-te": (HYBRID | TE | dict(window_size=(8, 0)), {}, {}),
    "window-of-a-lightning-layer": (
        dict(linear_attention_freq=[1, 0, 1, 1], window_size=(8, 0), window_attn_skip_freq=2), {}, {},
    ),
    "mtp": (dict(mtp_num_layers=1), {}, dict(save="there", untie_embeddings_and_output_weights=False)),
    "mtp-untied": (
        dict(mtp_num_layers=1, pipeline_model_parallel_size=2), {},
        dict(save="x", untie_embeddings_and_output_weights=True),
    ),
    "mtp-options": (
        SWIGLU | dict(mtp_num_layers=1, apply_residual_connection_post_layernorm=True),
        dict(softmax_beta=2.0, layernorm_affine=False, embedding_scale=2.0, bilinear_glu=True), {},
    ),
    "mtp-ranks": (
        dict(mtp_num_layers=1, context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True), {},
        dict(dataloader_inter_document_masking=True),
    ),
    "mtp-sft": (dict(mtp_num_layers=2), {}, dict(sft=True)),
    "mtp-latent": (HYBRID | LATENT | dict(mtp_num_layers=1), {}, {}),
    "mtp-te": (TE | dict(mtp_num_layers=1, context_parallel_size=2), {}, {}),
    "cp-partition": (dict(context_parallel_size=2, cp_partition_mode="zigzag"), {}, {}),
    "gdp-defaults": (
        dict(
            enable_mhc_connections=False, gdp_num_householder=3, gdp_cutedsl_kernel=False,
            gdp_num_chunk_states_to_recompute=2,
        ), {}, {},
    ),
    "mtp-lightning": (dict(mtp_num_layers=1), dict(mtp_attention="lightning"), {}),
    "mtp-mixed": (
        dict(mtp_num_layers=2, mtp_hsm=True, context_parallel_size=2), {}, dict(dataloader_inter_document_masking=True),
    ),
    "mtp-mixed-sequence-parallel": (
        dict(mtp_num_layers=2, mtp_hsm=True, context_parallel_size=2, sequence_parallel=True), {}, {},
    ),
    "freq": (dict(linear_attention_freq=4), {}, {}),
    "packed-cp": (HYBRID | dict(context_parallel_size=2), {}, dict(dataloader_inter_document_masking=True)),
}  # fmt: skip


@pytest.mark.parametrize("strides", [False, True])
def test_strictness_of_loading_with_a_later_torch(strides, monkeypatch, without):
    """Its checkpoints tell strides, too, and Megatron passes on to torch.empty whatever they tell."""
    monkeypatch.setattr("lightning_megatron.flags.refused.strides_saved", lambda: strides)
    given = dict(dist_ckpt_strictness="log_all")
    message = r"--dist-ckpt-strictness log_all ends Megatron .* leave it out, or use torch 2\.11"
    check_allowed(({}, {}, given), without)
    for way in ("load", "pretrained_checkpoint"):
        loaded = given | {way: "there"}
        if strides:
            check_refused(({}, {}, loaded, message), without)
        else:
            check_allowed(({}, {}, loaded), without)
        check_allowed(({}, {}, loaded | dict(dist_ckpt_strictness="assume_ok_unexpected")), without)


@pytest.mark.parametrize("later", [False, True])
def test_fused_swiglu_clamps_since_0_20(later, monkeypatch):
    monkeypatch.setattr("lightning_megatron.flags.mlp.version", lambda name: "0.20.0" if later else "0.19.2")
    config = model(**SWIGLU, activation_func_clamp_value=7.0, bias_activation_fusion=True)
    message = "--activation-func-clamp-value 7.0 is read by .*add --no-bias-swiglu-fusion"
    with nullcontext() if later else pytest.raises(ValueError, match=message):
        refuse(config, LightningOptions(), "zigzag")


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_beside_what_is_refused(name, without):
    check_allowed(ALLOWED[name], without)


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize(
    "args, message",
    [
        (dict(use_torch_fsdp2=True), "--use-torch-fsdp2 needs CUDA devices.*use --use-megatron-fsdp"),
        (dict(async_save=True, use_persistent_ckpt_worker=True), "--async-save needs CUDA devices.*leave it out"),
    ],
)
def test_needs_cuda(args, message, cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with nullcontext() if cuda else pytest.raises(ValueError, match=message):
        refuse(model(), LightningOptions(), "zigzag", Namespace(**args))


def test_saving_with_megatron_fsdp_needs_a_fused_adam(without):
    args = dict(use_megatron_fsdp=True, save="there")
    without("apex")
    refuse(model(), LightningOptions(), "zigzag", Namespace(**args))
    without("apex", "transformer_engine")
    refuse(model(), LightningOptions(), "zigzag", Namespace(**args, no_save_optim=True))
    with pytest.raises(ValueError, match="--use-megatron-fsdp hangs when it saves .* add --no-save-optim"):
        refuse(model(), LightningOptions(), "zigzag", Namespace(**args))


@pytest.mark.parametrize(
    "package, args",
    [
        ("emerging_optimizers", dict(optimizer="muon", muon_split_qkv=False)),
        ("emerging_optimizers", dict(optimizer="lion")),
        ("einops", dict(use_megatron_fsdp=True)),
        ("einops", dict(num_distributed_optimizer_instances=2)),
    ],
)
def test_packages_of_optimizers(package, args, without):
    without()
    refuse(model(), LightningOptions(), "zigzag", Namespace(**args))
    without(package)
    with pytest.raises(ValueError, match="needs the package .*; pip install"):
        refuse(model(), LightningOptions(), "zigzag", Namespace(**args))
