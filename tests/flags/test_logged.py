"""What a flag changes less than it seems to is one line of the log; nothing is logged without need."""

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
from tests.helpers.flags import CHUNK, FULL, HYBRID, LATER, MUON, OWN, TE, model
from tests.layers import transformer_config

LOGGED = {
    "exchange": ({}, dict(cp_exchange="ring"), OWN, ["--lightning-cp-exchange ring sends states between", "one alone"]),
    "keep-states": ({}, dict(cp_keep_states=False), OWN, ["--no-lightning-cp-keep-states acts on nothing"]),
    "norm-affine": ({}, dict(norm="none", norm_affine=False), OWN, ["--no-lightning-norm-affine acts on nothing"]),
    "norm-eps": ({}, dict(norm="none", norm_eps=1e-3), OWN, ["--lightning-norm-eps 0.001 is that of the output norm"]),
    "offset": ({}, dict(decay="alibi", decay_offset=1), OWN, ["--lightning-decay-offset 1 shifts decays that depend"]),
    "optimizer": (
        {}, {},
        OWN | dict(optimizer="sgd", adam_eps=1e-2, sgd_momentum=0.5, lr_decay_style="cosine", lr_wsd_decay_iters=2),
        ["--adam-eps 0.01 (needs --optimizer adam), --lr-wsd-decay-iters 2 (needs --lr-decay-style WSD): not read"],
    ),
    "optimizer-adam": (
        {}, {}, OWN | dict(sgd_momentum=0.5, muon_momentum=0.5, lr_decay_style="constant", min_lr=1e-4, loss_scale=4.0,
                           lr_warmup_init=1e-3, decoupled_min_lr=1e-3),
        ["--sgd-momentum 0.5", "--muon-momentum 0.5", "--min-lr 0.0001", "--loss-scale 4.0 (needs --fp16)",
         "--lr-warmup-init 0.001", "--decoupled-min-lr 0.001"],
    ),
    "angles": ({}, dict(lrpe_layers=1), OWN | dict(decoupled_lr=1e-4), ["--decoupled-lr 0.0001 holds for the angles"]),
    "chunk-cp": (
        FULL | dict(context_parallel_size=2), CHUNK, OWN,
        ["--lightning-recompute-chunk 64 computes the MLPs in chunks, and attention whole"],
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
    "fsdp2-saves": (
        {}, {}, OWN | dict(use_torch_fsdp2=True, save="there", no_save_optim=False),
        ["--use-torch-fsdp2 saves states of the optimizer with which no run can go on"],
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
    "flash-attention": ({}, {}, OWN | dict(use_flash_attn=True), ["--use-flash-attn is not read", "--attention-back"]),
    "flash-attention-version": (
        HYBRID | dict(flash_attention_version=3), {}, OWN,
        ["--flash-attention-version 3 is not read by softmax layers on torch's SDPA"],
    ),
    **{
        name: (
            {name: True, "num_moe_experts": 4}, {}, OWN,
            [f"--{name.replace('_', '-')} is not read by experts of --transformer-impl local"],
        )
        for name in ("moe_grouped_gemm", "use_fused_weighted_squared_relu")
    },
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
    **{
        f"padding-{name}": (
            {name: value, "num_moe_experts": 4}, {}, OWN | dict(sft=True),
            ["--sft pads conversations, and padding counts among the tokens of experts with"],
        )
        for name, value in (
            ("moe_router_load_balancing_type", "quantile_balancing"), ("mlp_chunks_for_training", 2),
            ("overlap_moe_expert_parallel_comm", True),
        )
    },
    **{
        f"experts-by-rank-{name}": (
            dict(num_moe_experts=4, add_bias_linear=False, moe_aux_loss_coeff=0.0) | config, {}, OWN, [message],
        )
        for name, config, message in (
            (
                "capacity", dict(context_parallel_size=2, moe_expert_capacity_factor=1.0),
                "--moe-expert-capacity-factor 1.0 counts the tokens of each rank by themselves",
            ),
            (
                "capacity-chunks", dict(mlp_chunks_for_training=2, moe_expert_capacity_factor=1.0),
                "--moe-expert-capacity-factor 1.0 counts the tokens of each rank by themselves, and of each chunk",
            ),
            (
                "sinkhorn",
                dict(
                    tensor_model_parallel_size=2, sequence_parallel=True, moe_router_load_balancing_type="sinkhorn",
                ),
                "--moe-router-load-balancing-type sinkhorn balances the tokens of each rank by themselves",
            ),
        )
    },
    **{
        f"one-loss-of-a-batch-{name}": (
            dict(num_moe_experts=4, add_bias_linear=False, moe_aux_loss_coeff=0.1, **config)
            | dict(moe_router_load_balancing_type="seq_aux_loss"), {}, OWN | dict(micro_batch_size=2) | args,
            ["--micro-batch-size 2 of packed documents has one loss of --moe-router-load-balancing-type seq_aux_loss"],
        )
        for name, config, args in (
            ("cp", dict(context_parallel_size=2), dict(dataloader_inter_document_masking=True)),
            ("sp", dict(tensor_model_parallel_size=2, sequence_parallel=True), dict(sft=True)),
        )
    },
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
    "conversations-with-experts": (dict(num_moe_experts=4), {}, OWN | dict(sft=True)),
    "rope": (
        dict(rotary_interleaved=True), dict(rope=True), OWN | dict(position_embedding_type="rope", rotary_percent=0.5),
    ),
    "hybrid-rope": (HYBRID, {}, OWN | dict(position_embedding_type="rope", rotary_percent=0.5)),
    "key-dims": (dict(linear_key_head_dim=32), dict(key_head_dim=32), OWN),
    "a-hybrid-of-ones-own": (HYBRID | dict(rotary_interleaved=True), {}, {}),
    "spec-with-128": (dict(kv_channels=128), {}, {"rank": 0}),
    "muon": ({}, {}, OWN | MUON),
    "muon-values": (
        {}, {},
        OWN | MUON | dict(muon_momentum=0.5, adam_eps=1e-2, muon_scalar_optimizer="adam", lr_decay_style="WSD",
                          lr_wsd_decay_iters=2, lr_warmup_init=1e-3, lr_warmup_fraction=0.1),
    ),
    "fp16": (dict(fp16=True), {}, OWN | dict(loss_scale=4.0, min_lr=1e-4, lr_decay_style="linear")),
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
        | {*tables.SOFTMAX_ONLY, *tables.ROTARY_ONLY, *tables.OPTIMIZER_ONLY}
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
