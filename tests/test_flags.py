"""Every flag is honoured, refused before any GPU work, or named in the log: tables for both ways of starting."""

import functools
import logging
from argparse import Namespace

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.training import arguments as megatron_arguments
from megatron.training import global_vars
from megatron.training.argument_utils import core_transformer_config_from_args

from lightning_megatron import flags as tables
from lightning_megatron import patches
from lightning_megatron.config import LightningOptions
from lightning_megatron.flags import warnings_of
from lightning_megatron.mixer import LightningAttention
from lightning_megatron.runtime import prepare, refuse
from lightning_megatron.spec import get_lightning_layer_spec
from lightning_megatron.training.arguments import args_defaults, options_from_args
from tests.helpers.arguments import parse_flags, pretend_without
from tests.layers import latent_config, transformer_config

HYBRID = dict(linear_attention_freq=2)
LATENT = dict(multi_latent_attention=True)
TE = dict(transformer_impl="transformer_engine")
SWIGLU = dict(gated_linear_unit=True, activation_func=torch.nn.functional.silu)
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
CHUNK, HOST = dict(recompute_chunk=64), dict(offload_activations=True)
LATER = {  # fields and flags of later versions of Megatron
    "cp_partition_mode", "enable_mhc_connections", "gdp_num_householder", "gdp_cutedsl_kernel",
    "gdp_num_chunk_states_to_recompute", "mtp_hsm",
}  # fmt: skip
MUON = dict(optimizer="muon", muon_split_qkv=True)


@pytest.fixture
def parse(monkeypatch):
    return functools.partial(parse_flags, monkeypatch)


@pytest.fixture
def without(monkeypatch):
    return functools.partial(pretend_without, monkeypatch)


def model(**changes):
    """A config with ``changes`` past Megatron's own checks, some of which want packages or a GPU."""
    latent = changes.get("multi_latent_attention")
    config = latent_config(linear_attention_freq=None) if latent else transformer_config()
    for name, value in changes.items():
        assert hasattr(config, name) or name in LATER, name
        setattr(config, name, value)
    return config


# ---- both ways of starting: the config, and Megatron's flags ---------------------------------------------------------

# config, options, flags, and what the message says
REFUSED = {
    "fp8": (dict(fp8="hybrid"), {}, {}, "--fp8-format hybrid needs .*use --transformer-impl transformer_engine"),
    "fp4": (dict(fp4="e2m1"), {}, {}, "--fp4-format e2m1 needs .*use --transformer-impl transformer_engine"),
    **{
        f"te-only-{name}": (
            {name: True}, {}, {},
            f"--{name.replace('_', '-')} acts in TransformerEngine's layers only.*leave it out",
        )
        for name in (
            "tp_comm_overlap", "use_te_activation_func", "fused_residual_rmsnorm", "use_transformer_engine_op_fuser",
        )
    },
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
    "recompute-layernorm": (
        dict(recompute_granularity="selective", recompute_modules=["layernorm", "mlp"]), {}, {},
        "--recompute-modules layernorm mlp needs TransformerEngine .*use --recompute-granularity full",
    ),
    "recompute-moe-act": (
        dict(recompute_granularity="selective", recompute_modules=["moe_act"]), {}, {},
        "--recompute-modules moe_act needs",
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
    "residual-offload": (
        dict(
            apply_residual_connection_post_layernorm=True, fine_grained_activation_offloading=True,
            offload_modules=["mlp_norm"],
        ), {}, {}, "--offload-modules mlp_norm frees the output of a norm, which is the residual",
    ),
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
    "mlp-bias": (
        dict(recompute_granularity="selective", recompute_modules=["mlp"], add_bias_linear=True), {}, {},
        "--recompute-modules mlp never ends its backward with biases.*--disable-bias-linear",
    ),
    "experts-bias": (
        dict(num_moe_experts=4, add_bias_linear=True, bias_activation_fusion=True), {}, {},
        "--num-experts 4 has no fused activation with biases .*--disable-bias-linear, or --no-bias-gelu-fusion",
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
    "offload-fp32": (
        {}, {}, dict(optimizer_cpu_offload=True), "--optimizer-cpu-offload ends Megatron .* in fp32 .*; use --bf16",
    ),
    "fsdp-fp32": (
        SWIGLU, {}, dict(use_megatron_fsdp=True, save="there"),
        "--use-megatron-fsdp cannot save --swiglu in fp32 .*; use --bf16",
    ),
    "fsdp-saves-nothing": (
        dict(gated_linear_unit=True, bf16=False), {}, dict(use_megatron_fsdp=True, save="x", no_save_optim=True),
        "--use-megatron-fsdp cannot save --swiglu",
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
    "chunk-alone": (
        {}, CHUNK, {},
        "--lightning-recompute-chunk 64 acts on layers that are recomputed; add --recompute-granularity full .*leave",
    ),
    "host-alone": (
        dict(recompute_granularity="selective", recompute_modules=["mlp"]), HOST, {},
        "--lightning-offload-activations acts on layers that are recomputed; add --recompute-granularity full .*leave",
    ),
    "qkv-alone": (
        {}, dict(recompute_qkv=True), {},
        "--lightning-recompute-qkv begins the recomputation of core_attn .*; add --recompute-granularity selective",
    ),
    "qkv-without-core": (
        dict(recompute_granularity="selective", recompute_modules=["mlp"]), dict(recompute_qkv=True), {},
        "--lightning-recompute-qkv begins .* --recompute-modules core_attn, or leave it out",
    ),
    "graphs-of-mlps": (
        dict(cuda_graph_impl="local", cuda_graph_modules=["mlp"]), {}, {},
        "--cuda-graph-modules mlp ends in an AttributeError of Megatron.*give attn, or leave",
    ),
    "graphs-packed": (
        dict(cuda_graph_impl="local"), {}, dict(dataloader_inter_document_masking=True),
        "--cuda-graph-impl local captures a batch of one shape.*use --cuda-graph-impl none",
    ),
    "graphs-sft": (
        dict(cuda_graph_impl="full_iteration"), {}, dict(sft=True), "--cuda-graph-impl full_iteration captures a batch",
    ),
    "graphs-te": (
        dict(cuda_graph_impl="transformer_engine"), {}, {},
        "--cuda-graph-impl transformer_engine captures with .* use local or full_iteration, or install it",
    ),
    "chunk-fp8": (TE | FULL | dict(fp8="hybrid"), CHUNK, {}, "--lightning-recompute-chunk 64 does not go with --fp8"),
    "fp8-hidden": (
        TE | dict(fp8="hybrid", hidden_size=72), {}, {},
        "--fp8-format hybrid needs multiples of 16 in every matrix, and the hidden size has 72: change --hidden-size",
    ),
    "fp8-mlp-tp": (
        TE | dict(fp8="hybrid", ffn_hidden_size=272, tensor_model_parallel_size=2), {}, {},
        "the MLP has 136 on each of 2 tensor-parallel ranks: change --ffn-hidden-size",
    ),
    "fp8-expert": (
        TE | dict(fp8="e4m3", num_moe_experts=4, moe_ffn_hidden_size=40), {}, {},
        "an expert has 40: change --moe-ffn-hidden-size",
    ),
    "fp8-shared-expert": (
        TE | dict(fp8="e4m3", num_moe_experts=4, moe_ffn_hidden_size=48, moe_shared_expert_intermediate_size=40), {},
        {},
        "the shared expert has 40: change --moe-shared",
    ),
    "fp8-softmax": (
        HYBRID | TE | dict(fp8="hybrid", kv_channels=18, num_query_groups=2), dict(key_head_dim=16), {},
        "the output projection of softmax layers has 72: change --kv-channels",
    ),
    "fp8-latent": (
        HYBRID | LATENT | TE | dict(fp8="hybrid", q_lora_rank=16, kv_lora_rank=24), {}, {},
        "the latents of k and v has 24: change --kv-lora-rank",
    ),
    "fp8-lightning-blocks-of-32": (
        TE | dict(fp8="hybrid", fp8_recipe="mxfp8"), dict(num_kv_heads=1, value_head_dim=32, gate="none"), {},
        "multiples of 32 in every matrix, and the fused projection of lightning layers has",
    ),
    "fp8-tokens": (
        TE | dict(fp8="hybrid", context_parallel_size=2), {}, dict(micro_batch_size=1, seq_length=48),
        "multiples of 16 tokens in a microbatch, and --micro-batch-size 1 with --seq-length 48 gives a rank 24: change",
    ),
    "fp8-tokens-of-evaluation": (
        TE | dict(fp8="hybrid"), {}, dict(micro_batch_size=2, eval_micro_batch_size=1, seq_length=40),
        "--eval-micro-batch-size 1 with --seq-length 40 gives a rank 40: change",
    ),
    "fp8-delayed-mlp-chunks": (
        TE | dict(fp8="hybrid", fp8_recipe="delayed", mlp_chunks_for_training=2), {}, {},
        "--mlp-chunks-for-training 2 calls an MLP several times .*use --fp8-recipe tensorwise",
    ),
    "host-graphs": (
        FULL | dict(cuda_graph_impl="full_iteration"), HOST, {},
        "--lightning-offload-activations does not go with CUDA graphs.*use --cuda-graph-impl none",
    ),
    "host-cut": (
        FULL | dict(distribute_saved_activations=True), HOST, {},
        "--lightning-offload-activations moves whole inputs, and --distribute-saved-activations .*leave out one",
    ),
    "chunk-two-layers": (
        FULL | dict(recompute_num_layers=2), CHUNK, {},
        "--lightning-recompute-chunk 64 recomputes layers one by one; use --recompute-num-layers 1",
    ),
    "chunk-dropout": (FULL | dict(hidden_dropout=0.1), CHUNK, {}, "chunk 64 would drop .*use --hidden-dropout 0"),
    "chunk-fusion": (
        FULL | dict(gradient_accumulation_fusion=True), CHUNK, {},
        "chunk 64 does not go with gradient accumulation fusion.*use --no-gradient-accumulation-fusion",
    ),
    "chunk-overlap": (TE | FULL | dict(tp_comm_overlap=True), CHUNK, {}, "does not go with --tp-comm-overlap.*leave"),
    "chunk-delayed": (FULL | dict(delay_wgrad_compute=True), CHUNK, {}, "does not go with --delay-wgrad-compute"),
    "chunk-states": (
        FULL | dict(context_parallel_size=2), CHUNK | dict(cp_keep_states=False), {},
        "chunk 64 keeps states .*leave --no-lightning-cp-keep-states out",
    ),
    "packed-cp-te": (
        HYBRID | TE | dict(context_parallel_size=2), {}, dict(dataloader_inter_document_masking=True),
        "--dataloader-inter-document-masking with context parallelism .*use --transformer-impl local",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_both_ways(name, without):
    config, options, args, message = REFUSED[name]
    without(*(() if config.get("transformer_impl") else ("transformer_engine",)))
    layout = "zigzag-documents" if args.get("sft") else "zigzag"
    with pytest.raises(ValueError, match=message):
        refuse(model(**config), LightningOptions(**options), layout, Namespace(**args))


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
    ],
)
def test_packages_of_optimizers(package, args, without):
    without()
    refuse(model(), LightningOptions(), "zigzag", Namespace(**args))
    without(package)
    with pytest.raises(ValueError, match="needs the package .*; pip install"):
        refuse(model(), LightningOptions(), "zigzag", Namespace(**args))


ALLOWED = {
    "fp8-te": (TE | dict(fp8="hybrid"), {}, dict(micro_batch_size=2, seq_length=40)),
    "fp8-tensorwise-mlp-chunks": (
        TE | dict(fp8="hybrid", fp8_recipe="tensorwise", mlp_chunks_for_training=2), {}, {},
    ),
    "fp8-host": (TE | FULL | dict(fp8="hybrid"), HOST, {}),
    "fp8-hybrid": (HYBRID | TE | dict(fp8="hybrid", fp8_recipe="blockwise", num_query_groups=2), {}, {}),
    "fp8-latent": (
        HYBRID | LATENT | TE | dict(fp8="hybrid", q_lora_rank=32, kv_lora_rank=32, qk_pos_emb_head_dim=16), {}, {},
    ),
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
    "rope-scaling": ({}, {}, dict(use_rope_scaling=True, rope_scaling_factor=8.0)),
    "memory-efficient-norm-apex": (dict(memory_efficient_layer_norm=True, normalization="LayerNorm"), {}, {}),
    "selective-qkv": (
        dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]), dict(recompute_qkv=True), {},
    ),
    "graphs": (dict(cuda_graph_impl="local"), {}, {}),
    "fsdp-bf16": (SWIGLU | dict(bf16=True), {}, dict(use_megatron_fsdp=True, save="there")),
    "offload-bf16": (dict(bf16=True), {}, dict(optimizer_cpu_offload=True)),
    "selective-mlp": (dict(recompute_granularity="selective", recompute_modules=["mlp"]), {}, {}),
    "experts-bias": (dict(num_moe_experts=4, add_bias_linear=True), {}, {}),
    "layernorm-te": (TE | dict(recompute_granularity="selective", recompute_modules=["layernorm"]), {}, {}),
    "modules-unused": (dict(recompute_modules=["layernorm"]), {}, {}),
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
    "mtp-mixed": (
        dict(mtp_num_layers=2, mtp_hsm=True, context_parallel_size=2), {}, dict(dataloader_inter_document_masking=True),
    ),
    "mtp-mixed-sequence-parallel": (
        dict(mtp_num_layers=2, mtp_hsm=True, context_parallel_size=2, sequence_parallel=True), {}, {},
    ),
    "freq": (dict(linear_attention_freq=4), {}, {}),
    "chunk-and-host": (FULL, CHUNK | HOST, {}),
    "chunk-block": (FULL | dict(recompute_method="block", recompute_num_layers=3), CHUNK, {}),
    "packed-cp": (HYBRID | dict(context_parallel_size=2), {}, dict(dataloader_inter_document_masking=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_beside_what_is_refused(name, without):
    config, options, args = ALLOWED[name]
    without(*(() if config.get("transformer_impl") else ("transformer_engine",)))
    refuse(model(**config), LightningOptions(**options), "zigzag", Namespace(**args))


OWN = dict(lightning_key_head_dim=None)  # what only the own entry point has
LOGGED = {
    "muon": ({}, {}, OWN | MUON, ["--optimizer muon", "as one matrix"]),
    "chunk-cp": (
        FULL | dict(context_parallel_size=2), CHUNK, OWN,
        ["--lightning-recompute-chunk 64 computes the MLPs in chunks, and attention whole"],
    ),
    "chunk-packed": (
        FULL, CHUNK, OWN | dict(dataloader_inter_document_masking=True), ["--lightning-recompute-chunk 64", "packed"],
    ),
    "chunk-experts": (FULL | dict(num_moe_experts=4), CHUNK, OWN, ["chunk 64 leaves layers with experts whole"]),
    "mlp-chunks": (
        FULL | dict(mlp_chunks_for_training=4), {}, OWN,
        ["--mlp-chunks-for-training 4 keeps what all chunks", "use --lightning-recompute-chunk"],
    ),
    "offload": (
        HYBRID | TE | dict(fine_grained_activation_offloading=True, offload_modules=["core_attn", "attn_norm"]),
        {}, OWN,
        ["--offload-modules core_attn attn_norm moves nothing of", "attn_norm, mlp_norm"],
    ),
    "layernorm-1p": (
        dict(layernorm_zero_centered_gamma=True), {}, OWN,
        ["--apply-layernorm-1p holds for layer norms", "stay around 1"],
    ),
    "weight-decay-of-qk": (
        HYBRID | dict(qk_layernorm=True), dict(qk_norm=True), OWN | dict(apply_wd_to_qk_layernorm=True),
        ["--apply-wd-to-qk-layernorm", "--lightning-qk-norm"],
    ),
    "weight-decay-of-nothing": (
        {}, dict(qk_norm=True), OWN | dict(apply_wd_to_qk_layernorm=True),
        ["--apply-wd-to-qk-layernorm: act on softmax layers only"],
    ),
    "kitchen": (
        TE | dict(use_kitchen_attention=True), {}, OWN,
        ["--use-kitchen-attention: act on softmax layers only"],
    ),
    "query-key-scaling": (
        HYBRID | dict(apply_query_key_layer_scaling=True), {}, OWN,
        ["--apply-query-key-layer-scaling is not read by softmax layers on torch's SDPA"],
    ),
    "op-fuser": (
        TE | dict(use_transformer_engine_op_fuser=True), {}, OWN,
        ["--use-transformer-engine-op-fuser does not reach dense MLPs"],
    ),
    "dense-grouped-gemm": (
        TE | dict(use_grouped_gemm_for_dense_mlp=True), {}, OWN,
        ["--use-grouped-gemm-for-dense-mlp does not reach dense MLPs"],
    ),
    "window": (
        HYBRID | TE | dict(window_size=(8, 0)), {}, OWN,
        ["--window-size (8, 0) limits the softmax layers only"],
    ),
    "cp-comm": (
        HYBRID | dict(context_parallel_size=2, cp_comm_type="a2a"), {}, OWN,
        ["--cp-comm-type a2a is not read by softmax"],
    ),
    "mtp-cp": (
        dict(mtp_num_layers=1, context_parallel_size=2), {}, OWN,
        ["--mtp-num-layers 1 has a loss that Megatron divides by the numbers of tokens of each context-parallel rank"],
    ),
    "mup": (
        HYBRID | dict(use_mup=True), {}, OWN,
        ["--use-mup scales the logits of softmax layers only", "--lightning-scale"],
    ),
    "no-positions": (
        {}, {}, OWN | dict(position_embedding_type="rope"),
        ["--position-embedding-type rope rotates q and k of softmax",
         "no position embedding is used; pass --lightning-rope"],
    ),
    "rotary": (
        dict(rotary_interleaved=True), {}, OWN | dict(position_embedding_type="none", rotary_percent=0.5),
        ["--rotary-interleaved, --rotary-percent 0.5: act on rotary embeddings only; no layer"],
    ),
    "softmax-only": (
        dict(
            qk_layernorm=True, attention_dropout=0.2, attention_backend=AttnBackend.flash, attention_output_gate=True,
            log_max_attention_logit=True, num_query_groups=2, cp_comm_type="all_gather",
        ), {}, OWN,
        [
            "--attention-backend flash, --attention-dropout 0.2, --attention-output-gate, --cp-comm-type all_gather, "
            "--log-max-attention-logit, --qk-layernorm, --num-query-groups 2 (for lightning layers: "
            "--lightning-num-kv-heads): act on softmax layers only; this model has none",
        ],
    ),
    "kv-channels": (
        {}, {}, {"rank": 0},
        ["--linear-key-head-dim 128 is Megatron's default", "make_spec(key_head_dim=128)"],
    ),
    "two-key-dims": (
        dict(linear_key_head_dim=32), dict(key_head_dim=64), OWN,
        ["--linear-key-head-dim 32 gives way to the option key_head_dim"],
    ),
    "two-value-dims": (
        dict(linear_value_head_dim=32), dict(value_head_dim=64), OWN,
        ["--linear-value-head-dim 32 gives way to the option"],
    ),
    "softmax-alone": (
        dict(linear_attention_freq=[0] * 4), {}, OWN, ["--linear-attention-freq [0,0,0,0] makes all layers softmax"],
    ),
    "mask": (
        {}, {}, OWN | dict(create_attention_mask_in_dataloader=True),
        ["--create-attention-mask-in-dataloader builds", "--no-create-attention-mask-in-dataloader"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGGED)
def test_logged_in_one_line(name):
    config, options, args, words = LOGGED[name]
    (line,) = warnings_of(model(**config), LightningOptions(**options), "zigzag", Namespace(**args))
    assert all(word in line for word in words), line


QUIET = {
    "defaults": ({}, {}, OWN),
    "a-program-of-ones-own": ({}, {}, {}),
    "core-attn": (dict(recompute_granularity="selective", recompute_modules=["core_attn"]), {}, OWN),
    "hybrid": (HYBRID | dict(qk_layernorm=True, attention_output_gate=True, num_query_groups=2), {}, OWN),
    "offload-of-mlps": (TE | dict(fine_grained_activation_offloading=True, offload_modules=["mlp_norm"]), {}, OWN),
    "offload-unused": (dict(offload_modules=["core_attn"]), {}, OWN),
    "layernorm-1p-without-weights": (dict(layernorm_zero_centered_gamma=True), dict(norm_affine=False), OWN),
    "weight-decay-of-qk": (
        HYBRID | dict(qk_layernorm=True), {}, OWN | dict(apply_wd_to_qk_layernorm=True),
    ),
    "op-fuser-of-experts": (
        TE | dict(use_transformer_engine_op_fuser=True, num_moe_experts=4, moe_layer_freq=1), {}, OWN,
    ),
    "rope": (
        dict(rotary_interleaved=True), dict(rope=True), OWN | dict(position_embedding_type="rope", rotary_percent=0.5),
    ),
    "hybrid-rope": (HYBRID, {}, OWN | dict(position_embedding_type="rope", rotary_percent=0.5)),
    "key-dims": (dict(linear_key_head_dim=32), dict(key_head_dim=32), OWN),
    "a-hybrid-of-ones-own": (HYBRID | dict(rotary_interleaved=True), {}, {}),
    "spec-with-128": (dict(kv_channels=128), {}, {"rank": 0}),
    "muon-same-parts": ({}, dict(gate="none"), OWN | MUON),
    "muon-same-parts-gated": (HYBRID | dict(attention_output_gate=True), {}, OWN | MUON),
    "spec-with-option": ({}, dict(key_head_dim=128), {"rank": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", QUIET)
def test_nothing_is_logged_without_need(name):
    config, options, args = QUIET[name]
    assert warnings_of(model(**config), LightningOptions(**options), "zigzag", Namespace(**args)) == []


@pytest.mark.parametrize("flags", ["", "--linear-attention-freq 3", "--group-query-attention --num-query-groups 4"])
def test_megatrons_defaults_are_quiet(parse, flags):
    """What a real command line becomes is neither refused nor named in the log."""
    args = parse(flags)
    megatron_arguments.validate_args(args, args_defaults(args))
    args.params_dtype = torch.float32
    config, options = core_transformer_config_from_args(args), options_from_args(args)
    refuse(config, options, "zigzag", args)
    assert warnings_of(config, options, "zigzag", args) == []


def test_one_layer_of_a_hybrid_with_windows(without):
    """The spec of the lightning layers alone is no model without softmax layers."""
    without("nothing")
    config = model(linear_attention_freq=[1, 0, 1, 1], window_size=(8, 0), window_attn_skip_freq=2)
    assert get_lightning_layer_spec(config).submodules.self_attention.module is LightningAttention


def test_tables_name_fields_and_flags(parse):
    """A misspelt attribute would never speak."""
    known = {*vars(parse()), *vars(transformer_config()), *LATER, "heterogeneous_block_specs"}
    named = (
        {*tables.REFUSED_ALWAYS}
        | {rule.attribute for rule in (*tables.REFUSED, *tables.WARNED)}
        | {*tables.SOFTMAX_ONLY, *tables.ROTARY_ONLY}
    )
    assert named <= known, named - known


@pytest.mark.parametrize("rank", [0, 1])
def test_prepare_logs_on_the_first_rank(monkeypatch, caplog, rank):
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", Namespace(rank=rank, **OWN))
    monkeypatch.setattr(patches.flops, "apply", lambda options: None)
    monkeypatch.setattr(patches.checkpoint_args, "apply", lambda: None)
    monkeypatch.setattr(patches.dynamic_inference, "apply", lambda: None)
    config = model(qk_layernorm=True, log_max_attention_logit=True)
    with caplog.at_level(logging.WARNING, logger="lightning_megatron"):
        prepare(config)
    lines = [record.getMessage() for record in caplog.records]
    assert (
        lines == ["--log-max-attention-logit, --qk-layernorm: act on softmax layers only; this model has none"][rank:]
    )
