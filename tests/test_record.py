"""The record of a model's function: what is compared, what is not, what older checkpoints tell. Nothing is trained."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
from megatron.core.activations import squared_relu
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from lightning_megatron.checkpoint_folder import CheckpointError
from lightning_megatron.config import KINDS, RESIDUAL_FACTORS, LightningOptions
from lightning_megatron.record import (
    FREE_OPTIONS,
    ROWS,
    differences,
    function_record,
    options_from_record,
)
from lightning_megatron.resume import check

# Fields of TransformerConfig that change no function, or nothing that a checkpoint of the same shapes could hide:
# parallel layouts, kernels, precision, recomputation, noise, terms of the loss, initial values, and models that specs
# refuse.
FREE = """
tensor_model_parallel_size tensor_parallel_num_weight_shards gtp_weight_remat_size pipeline_model_parallel_comm_backend
pipeline_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel context_parallel_size
hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel expert_model_parallel_size
expert_tensor_parallel_size expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size perform_initialization
use_cpu_initialization fp16 bf16 params_dtype timers finalize_model_grads_func grad_scale_func moe_grad_scale_func
mtp_grad_scale_func no_sync_func grad_sync_func param_sync_func deterministic_mode enable_autocast autocast_dtype
num_microbatches_with_partial_activation_checkpoints gradient_accumulation_fusion use_te_rng_tracker tp_comm_overlap
tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag
tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs cross_entropy_loss_fusion cross_entropy_fusion_impl
tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend overlap_moe_expert_parallel_comm
delay_wgrad_compute overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release pipeline_dtype
variable_seq_lengths overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs
defer_embedding_wgrad_compute wgrad_deferral_limit overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage
mtp_standalone cpu_offloading cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_activations
cpu_offloading_weights cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers barrier_with_L1_time
mtp_loss_scaling_factor mtp_detach_heads mtp_hybrid_override_pattern num_layers_in_first_pipeline_stage
num_layers_in_last_pipeline_stage pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
account_for_loss_in_pipeline_split attention_backend flash_attention_version hidden_dropout attention_dropout
fp32_residual_connection activation_func_fp8_input_store qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit
test_mode calculate_per_token_loss experimental_attention_variant
experimental_attention_variant_loss_scale_func dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_kernel_backend
dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
dsa_indexer_k_norm_fp32 linear_conv_kernel_dim init_method output_layer_init_method init_method_std
embedding_init_method embedding_init_method_std init_model_with_meta_device mup_width_mult mup_base_hidden_size
mup_base_head_dim mup_attn_scale_power apply_query_key_layer_scaling attention_softmax_in_fp32
disable_bf16_reduced_precision_matmul bias_activation_fusion masked_softmax_fusion persist_layer_norm
memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion use_fused_weighted_squared_relu fused_single_qkv_rope
fused_residual_rmsnorm use_transformer_engine_op_fuser recompute_granularity recompute_method recompute_num_layers
distribute_saved_activations recompute_modules fp8 fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval
fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_output_proj fp8_dot_product_attention fp8_multi_head_attention
tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 use_kitchen
use_kitchen_attention kitchen_attention_backend fp4 fp4_recipe fp4_param fp4_quantizer_factory
high_priority_a2a_comm_stream moe_shared_expert_overlap use_grouped_gemm_for_shared_expert moe_enable_routing_replay
moe_router_topk_limited_devices moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_dtype
moe_router_bias_update_rate moe_router_quantile_balancing_ema use_grouped_gemm_for_dense_mlp moe_grouped_gemm
moe_single_grouped_weight moe_single_grouped_bias moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps
moe_token_dropping moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend
moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs moe_per_layer_logging
moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference moe_layer_recompute moe_permute_fusion
moe_router_fusion moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_blocks_permute
moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing moe_ncclep_zero_copy
cp_comm_type enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps
external_cuda_graph cuda_graph_impl cuda_graph_modules inference_cuda_graph_scope cuda_graph_scope
clone_scatter_output_in_embedding disable_parameter_transpose_cache config_logger_dir flash_decode batch_invariant_mode
use_te_activation_func inference_rng_tracker inference_sampling_seed symmetric_ar_type nccl_all_reduce_for_prefill
use_inference_optimized_layers inference_fuse_tp_communication inference_disable_triton_nvls_kernels
inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads mamba_training_ssm_states_dtype
use_mamba_mem_eff_path mlp_chunks_for_prefill mlp_chunks_for_training heterogeneous_block_specs
hetereogenous_dist_checkpoint quant_recipe transformer_impl fine_grained_activation_offloading offload_modules
min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks activation_offload_fraction
moe_paged_stash moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu
fine_grained_offloading_max_inflight_offloads
""".split()
LATER = """
batch_invariant_backend enable_mhc_connections gdp_cutedsl_kernel gdp_num_chunk_states_to_recompute gdp_num_householder
gtp_remat_opt_in_modules mhc_init_gating_factor mhc_num_residual_streams mhc_recompute_layer_num mhc_sinkhorn_iterations
moe_combine_bwd_dtype moe_dispatch_fwd_dtype moe_use_grouped_tensor mtp_hsm
""".split()  # of 0.20
EARLIER = ["moe_ncclep_static_shape"]  # not in 0.20
IN_SHAPES = {"hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size"}  # another value does not load
COMPUTED = {"linear_num_key_heads", "linear_num_value_heads"}  # read to be refused


def transformer_config(**fields) -> SimpleNamespace:
    """A TransformerConfig whose fields can be set one by one, with what every row of the table needs."""
    base = dict(
        num_layers=4, hidden_size=64, num_attention_heads=4, linear_attention_freq=2, num_moe_experts=4,
        add_bias_linear=False, moe_expert_capacity_factor=1.0, window_size=(8, 0), mtp_num_layers=1, use_mup=True,
        moe_token_drop_policy="probs",
    )  # fmt: skip
    config = SimpleNamespace(**vars(TransformerConfig(**base)))
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def flags(**values) -> Namespace:
    base = dict(
        position_embedding_type="rope", rotary_base=10000, rotary_percent=1.0, use_rope_scaling=False,
        rotary_seq_len_interpolation_factor=None, untie_embeddings_and_output_weights=False, padded_vocab_size=256,
    )  # fmt: skip
    return Namespace(**base | values)


YARN = {
    f"yarn_{name}": 1.0
    for name in (
        "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "correction_range_round_to_int",
    )
}  # fmt: skip
LATENT = {field.name: field.default for field in dataclasses.fields(MLATransformerConfig)}
LATENT = {
    name: value
    for name, value in LATENT.items()
    if name not in vars(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
}
LATENT["multi_latent_attention"] = True
LATENT_ROWS = (
    "lightning_rotary_percent", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
    "rope_type", "latent_yarn",
)  # fmt: skip
# Of every row one change: of the config, the options or the args.
CHANGES = {
    "layers": ("config", "linear_attention_freq", [0, 1, 1, 1]),
    "hybrid_layer_pattern": ("config", "hybrid_layer_pattern", "L-E*-|L-*E"),
    "decay": ("options", "decay", "minimax"),
    "feature_map": ("options", "feature_map", "none"),
    "kv_heads": ("options", "num_kv_heads", 2),
    "key_dim": ("options", "key_head_dim", 8),
    "value_dim": ("options", "value_head_dim", 8),
    "scale": ("options", "scale", 1.0),
    "rope": ("options", "rope", True),
    "qk_norm": ("options", "qk_norm", True),
    "norm_groups": ("options", "norm", "all"),
    "norm_affine": ("options", "norm_affine", False),
    "norm_eps": ("options", "norm_eps", 1e-3),
    "gate": ("options", "gate", "none"),
    "lrpe_layers": ("options", "lrpe_layers", 1),
    **{name: ("options", name, 2.0) for name in RESIDUAL_FACTORS},
    "layernorm_affine": ("options", "layernorm_affine", False),
    "bilinear_glu": ("options", "bilinear_glu", True),
    "embedding_scale": ("options", "embedding_scale", 8.0),
    "num_attention_heads": ("config", "num_attention_heads", 8),
    "padded_vocab_size": ("args", "padded_vocab_size", 1024),
    "normalization": ("config", "normalization", "RMSNorm"),
    "layernorm_epsilon": ("config", "layernorm_epsilon", 1e-6),
    "layernorm_zero_centered_gamma": ("config", "layernorm_zero_centered_gamma", True),
    "activation": ("config", "activation_func", squared_relu),
    "activation_func_clamp_value": ("config", "activation_func_clamp_value", 7.0),
    "glu_linear_offset": ("config", "glu_linear_offset", 1.0),
    "add_bias_linear": ("config", "add_bias_linear", True),
    "add_qkv_bias": ("config", "add_qkv_bias", True),
    "apply_residual_connection_post_layernorm": ("config", "apply_residual_connection_post_layernorm", True),
    "untie_embeddings_and_output_weights": ("args", "untie_embeddings_and_output_weights", True),
    "mup": ("config", "mup_embedding_mult", 2.0),
    "mtp_num_layers": ("config", "mtp_num_layers", 2),
    "mtp_attention": ("options", "mtp_attention", "lightning"),
    "mtp_use_repeated_layer": ("config", "mtp_use_repeated_layer", True),
    "position_embedding_type": ("args", "position_embedding_type", "learned_absolute"),
    "rotary_base": ("args", "rotary_base", 500000),
    "rotary_percent": ("args", "rotary_percent", 0.5),
    "rotary_interleaved": ("config", "rotary_interleaved", True),
    "use_rope_scaling": ("args", "use_rope_scaling", True),
    "rotary_seq_len_interpolation_factor": ("args", "rotary_seq_len_interpolation_factor", 2),
    "no_rope_freq": ("config", "no_rope_freq", [0, 0, 0, 1]),
    "mrope_section": ("config", "mrope_section", [8, 4, 4]),
    "yarn": ("config", "yarn_beta_fast", 2.0),
    "lightning_rotary_percent": ("options", "rotary_percent", 0.5),
    "multi_latent_attention": ("config", "multi_latent_attention", True),
    "q_lora_rank": ("config", "q_lora_rank", None),
    "kv_lora_rank": ("config", "kv_lora_rank", 256),
    "qk_head_dim": ("config", "qk_head_dim", 64),
    "qk_pos_emb_head_dim": ("config", "qk_pos_emb_head_dim", 32),
    "v_head_dim": ("config", "v_head_dim", 64),
    "rope_type": ("config", "rope_type", "rope"),
    "latent_yarn": ("config", "mscale", 2.0),
    "num_query_groups": ("config", "num_query_groups", 2),
    "kv_channels": ("config", "kv_channels", 32),
    "attention_output_gate": ("config", "attention_output_gate", True),
    "qk_layernorm": ("config", "qk_layernorm", True),
    "qk_l2_norm": ("config", "qk_l2_norm", True),
    "softmax_scale": ("config", "softmax_scale", 1.0),
    "softmax_type": ("config", "softmax_type", "off-by-one"),
    "window_size": ("config", "window_size", (16, 0)),
    "window_attn_skip_freq": ("config", "window_attn_skip_freq", 2),
    "num_moe_experts": ("config", "num_moe_experts", 8),
    "moe_layer_freq": ("config", "moe_layer_freq", 2),
    "moe_router_topk": ("config", "moe_router_topk", 1),
    "moe_router_score_function": ("config", "moe_router_score_function", "sigmoid"),
    "moe_router_pre_softmax": ("config", "moe_router_pre_softmax", True),
    "moe_router_num_groups": ("config", "moe_router_num_groups", 2),
    "moe_router_group_topk": ("config", "moe_router_group_topk", 1),
    "moe_router_topk_scaling_factor": ("config", "moe_router_topk_scaling_factor", 2.5),
    "moe_router_enable_expert_bias": ("config", "moe_router_enable_expert_bias", True),
    "moe_router_force_load_balancing": ("config", "moe_router_force_load_balancing", True),
    "moe_router_force_biased": ("config", "moe_router_force_biased", 1.0),
    "moe_sinkhorn": ("config", "moe_router_load_balancing_type", "sinkhorn"),
    "moe_quantile_balancing": ("config", "moe_router_load_balancing_type", "quantile_balancing"),
    "moe_expert_capacity_factor": ("config", "moe_expert_capacity_factor", 2.0),
    "moe_expert_rank_capacity_factor": ("config", "moe_expert_rank_capacity_factor", 2.0),
    "moe_token_drop_policy": ("config", "moe_token_drop_policy", "position"),
    "moe_apply_probs_on_input": ("config", "moe_apply_probs_on_input", True),
    "moe_latent_size": ("config", "moe_latent_size", 16),
    "moe_shared_expert_intermediate_size": ("config", "moe_shared_expert_intermediate_size", 64),
    "moe_shared_expert_gate": ("config", "moe_shared_expert_gate", True),
    "moe_mlp_glu_interleave_size": ("config", "moe_mlp_glu_interleave_size", 32),
    "moe_shared_expert_glu_interleave_size": ("config", "moe_shared_expert_glu_interleave_size", 32),
}

# Options that nobody sets follow these, and are named as well: head dims, scale, groups, epsilon.
FOLLOWED = ("num_attention_heads", "key_dim", "kv_channels", "layernorm_epsilon", "rope_type", "multi_latent_attention")


def parts(key: str):
    """config, options and args of the base model for one row."""
    yarn = key == "yarn"
    kind = "yarn" if yarn else "rope"
    options = LightningOptions(rope=key == "lightning_rotary_percent")
    fields = YARN if yarn else LATENT if key in LATENT_ROWS else {}
    if key == "multi_latent_attention":  # whose fields Megatron's config has either way
        fields = LATENT | {key: False}
    if key == "hybrid_layer_pattern":
        fields = {key: "L-*E|L-*-"}
    return transformer_config(**fields), options, flags(position_embedding_type=kind)


def changed(key: str):
    config, options, args = parts(key)
    where, name, value = CHANGES[key]
    if where == "options":
        options = dataclasses.replace(options, **{name: value})
    else:
        setattr(config if where == "config" else args, name, value)
    return config, options, args


# ---- the table -------------------------------------------------------------------------------------------------------


def test_every_row_has_a_change():
    assert [row.key for row in ROWS] == list(CHANGES)


@pytest.mark.parametrize("key", CHANGES)
def test_compared_value_is_named(key):
    """One change is one difference, under its flag and with both values; the other way round as well."""
    row = next(row for row in ROWS if row.key == key)
    before, after = function_record(*parts(key)), function_record(*changed(key))
    assert differences(before, before) == []
    found = differences(before, after)
    if key in FOLLOWED:
        found = [entry for entry in found if entry[0] == row.flag]
    if key == "position_embedding_type":
        assert "rotary_base" in before["values"] and "rotary_base" not in after["values"]
    assert [flag for flag, _, _ in found] == [row.flag]
    ((flag, saved, now),) = found
    assert (saved, now) == (before["values"][key], after["values"][key]) and saved != now
    assert flag.startswith("--")
    assert (row.flag, now, saved) in differences(after, before)


@pytest.mark.parametrize("key", CHANGES)
def test_compared_value_is_refused(key):
    """By the check of a checkpoint; with --finetune it is not."""
    row = next(row for row in ROWS if row.key == key)
    record, other = function_record(*parts(key)), function_record(*changed(key))
    running = dict(no_load_optim=True, lightning_function=other)
    with pytest.raises(CheckpointError) as error:
        check({"args": Namespace(lightning_function=record)}, "folder", Namespace(finetune=False, **running))
    message = str(error.value)
    assert f"  {row.flag}: " in message and "in the checkpoint, " in message and "--finetune" in message
    check({"args": Namespace(lightning_function=record)}, "folder", Namespace(finetune=True, **running))


@pytest.mark.parametrize("row", [row for row in ROWS if row.before is not None], ids=lambda row: row.key)
def test_records_without_a_row_stand_for_what_their_version_did(row):
    before, after = function_record(*parts(row.key)), function_record(*changed(row.key))
    del before["values"][row.key]
    assert differences(before, after) == [(row.flag, row.before, after["values"][row.key])]
    assert differences(before, function_record(*parts(row.key))) == []
    before["options"] = {}  # a spec of one's own, whose options are not known
    assert differences(before, after) == []


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_multi_token_prediction_that_come_or_go_have_no_kind_to_compare(kind):
    """Nor do their decays: the last layer of the model, whose decay they have, is a softmax layer."""
    options = LightningOptions(mtp_attention=kind)
    records = [function_record(transformer_config(mtp_num_layers=n), options, flags()) for n in (None, 1)]
    assert differences(*records) == [("--mtp-num-layers", None, 1)]
    assert [record["values"].get("mtp_attention") for record in records] == [None, kind]


def test_decays_of_lightning_layers_of_multi_token_prediction_count():
    """Also where the model has no other lightning layer."""
    config = transformer_config(linear_attention_freq=[0] * 4)
    options = [LightningOptions(mtp_attention="lightning", decay=decay) for decay in ("tnl", "minimax", "bailing")]
    digests = [function_record(config, x, flags())["values"]["decay"][-1] for x in options]
    assert len(set(digests)) == 3
    plain = function_record(config, LightningOptions(), flags())["values"]
    assert "qk_layernorm" in function_record(config, options[0], flags())["values"] and "qk_layernorm" in plain
    config.linear_attention_freq = None
    assert "qk_layernorm" not in function_record(config, options[0], flags())["values"]
    assert "qk_layernorm" in function_record(config, LightningOptions(), flags())["values"]


def test_older_checkpoints_of_experts_are_refused():
    """They name a norm otherwise; Megatron would end in a traceback."""
    record = function_record(*parts("layers"))
    args = Namespace(lightning_function=record, num_experts=4, transformer_impl="local", no_save_optim=True)
    running = Namespace(finetune=False, no_load_optim=True, lightning_function=record)
    check({"args": args}, "folder", running)
    del record["values"]["lrpe_layers"]
    with pytest.raises(
        CheckpointError, match=r"named the norm before experts mlp\.linear_fc1.*; go on with the version"
    ):
        check({"args": args}, "folder", running)
    args.num_experts = None
    check({"args": args}, "folder", running)


def test_every_field_of_megatrons_config_is_decided():
    """Read into the record, or free on purpose. A new field of Megatron's must be put somewhere."""
    read = set()

    class Spy:
        def __init__(self, config):
            self.__dict__["config"] = config

        def __getattr__(self, name):
            value = getattr(self.__dict__["config"], name)
            read.add(name)
            return value

    for key in ("layers", "yarn", "kv_lora_rank"):
        config, options, args = parts(key)
        function_record(Spy(config), options, args)
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    read &= fields
    free = {*FREE, *LATER, *EARLIER}
    assert not read & free and not read & IN_SHAPES
    undecided = fields - read - free - IN_SHAPES
    assert not undecided, f"{sorted(undecided)}: compare them in lightning_megatron.record.ROWS, or add them to FREE"
    assert not (set(FREE) | IN_SHAPES) - fields
    named = {name for where, name, _ in CHANGES.values() if where == "config"}
    assert read - named <= COMPUTED | {"num_layers", "gated_linear_unit", "use_mup", "mup_output_mult"} | {
        "linear_key_head_dim", "linear_value_head_dim",  # also set the head dims of lightning layers
    }  # fmt: skip


def test_free_fields_say_nothing():
    config, options, args = parts("layers")
    before = function_record(config, options, args)
    for name in FREE:
        setattr(config, name, "something else")
    assert function_record(config, options, args) == before


def test_every_option_is_decided():
    options = {field.name for field in dataclasses.fields(LightningOptions)}
    named = {name for where, name, _ in CHANGES.values() if where == "options"}
    assert options - named == {*FREE_OPTIONS, "decay_offset", "norm_groups"}  # the last two: below


@pytest.mark.parametrize(
    "option",
    [
        {"backend": "torch"},
        {"cp_exchange": "ring"},
        {"cp_keep_states": False},
        {"recompute_chunk": 64},
        {"offload_activations": True},
    ],
)
def test_free_option_says_nothing(option):
    config, options, args = parts("layers")
    before = function_record(config, options, args)
    assert differences(before, function_record(config, LightningOptions(**option), args)) == []


def test_options_count_by_what_they_do():
    """Another way to write the same function is no difference."""
    config, _, args = parts("layers")

    def found(first: dict, second: dict, **fields) -> list[str]:
        models = (LightningOptions(**x) for x in (first, second))
        one, two = (function_record(transformer_config(**fields), options, args) for options in models)
        return [flag for flag, _, _ in differences(one, two)]

    assert found({}, dict(scale=16**-0.5, key_head_dim=16, value_head_dim=16, num_kv_heads=4, norm_eps=1e-5)) == []
    assert found(dict(norm="all"), dict(norm="group", norm_groups=1)) == []
    assert found(dict(norm="group", norm_groups=2), dict(norm="group", norm_groups=4)) == [
        "--lightning-norm, --lightning-norm-groups"
    ]
    assert found(dict(norm="none"), dict(norm="none", norm_affine=False, norm_eps=1e-3)) == []
    assert found(dict(decay="none"), dict(decay="none", decay_offset=1)) == []
    assert found({}, dict(decay="bailing", decay_offset=1)) == []  # vLLM's bailing is tnl
    assert found(dict(decay="bailing"), dict(decay="bailing", decay_offset=1)) == [
        "--lightning-decay, --lightning-decay-offset"
    ]
    assert found({}, {}, linear_attention_freq=[1, 0, 1, 0]) == []
    freq = function_record(transformer_config(linear_attention_freq=[1, 0, 1, 0]), LightningOptions(), args)
    assert differences(freq, function_record(config, LightningOptions(), args)) == []
    assert differences(
        function_record(transformer_config(no_rope_freq=2), LightningOptions(), args),
        function_record(transformer_config(no_rope_freq=[0, 1, 0, 1]), LightningOptions(), args),
    ) == []  # fmt: skip


def test_settings_of_layers_that_are_not_there_say_nothing():
    """All lightning without rotary embeddings: it does not matter what softmax layers, RoPE or experts would do."""
    plain = dict(linear_attention_freq=None, mtp_num_layers=None, num_moe_experts=None)
    before = function_record(transformer_config(**plain), LightningOptions(), flags())
    for key, (where, name, value) in CHANGES.items():
        row = next(row for row in ROWS if row.key == key)
        if row.applies not in ("softmax", "rope", "experts") or where == "options":
            continue
        config, args = transformer_config(**plain), flags()
        setattr(config if where == "config" else args, name, value)
        if name != "kv_channels":  # the head dim of lightning layers, too
            assert function_record(config, LightningOptions(), args) == before, key
    none = flags(position_embedding_type="none")
    assert differences(before, function_record(transformer_config(**plain), LightningOptions(), none)) == []
    learned = flags(position_embedding_type="learned_absolute")
    assert differences(before, function_record(transformer_config(**plain), LightningOptions(), learned)) == [
        ("--position-embedding-type", "none", "learned_absolute")
    ]
    rope = LightningOptions(rope=True)
    one, two = (function_record(transformer_config(**plain), rope, flags(rotary_base=base)) for base in (1, 2))
    assert differences(one, two) == [("--rotary-base", 1, 2)]


def test_record_is_plain():
    config, options, args = parts("layers")
    record = function_record(config, options, args)
    assert json.loads(json.dumps(record)) == record
    assert record["values"]["layers"] == "LsLs" and record["values"]["scale"] == 0.25
    assert options_from_record(record) == options
    later = record | {
        "options": record["options"] | {"of_a_later_version": 1},
        "values": record["values"] | {"later": 1},
    }
    assert options_from_record(later) == options and differences(later, record) == []


def test_without_args_nothing_of_them_is_compared():
    """A program of one's own that has no Megatron args."""
    config, options, args = parts("layers")
    without = function_record(config, options)
    assert "rotary_base" not in without["values"] and without["values"]["rotary_interleaved"] is False
    assert differences(without, function_record(config, options, args)) == []


def test_latent_attention_turns_whatever_the_model_passes():
    """Its angles are compared with any position embedding, and which rotary kind that is makes no difference."""
    base = transformer_config(**LATENT)
    for kind in ("none", "learned_absolute", "rope"):
        now = function_record(base, LightningOptions(), flags(position_embedding_type=kind))
        other = transformer_config(**LATENT | dict(rotary_base=500))
        found = differences(now, function_record(other, LightningOptions(), flags(position_embedding_type=kind)))
        assert [flag for flag, _, _ in found] == ["--rotary-base"]
    none, rope = (function_record(base, LightningOptions(), flags(position_embedding_type=k)) for k in ("none", "rope"))
    assert differences(none, rope) == []
    other = transformer_config(**LATENT, kv_channels=32, num_query_groups=2)
    options = LightningOptions(key_head_dim=16)
    records = (function_record(c, options, flags()) for c in (base, other))
    assert differences(*records) == []
