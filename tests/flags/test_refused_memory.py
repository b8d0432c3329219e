"""Flags of recomputation, offloading, CUDA graphs and fp8 that are refused, in both ways of starting."""

import pytest

from tests.helpers.flags import CHUNK, FULL, HOST, HYBRID, LATENT, TE, check_allowed, check_refused

EXPERTS = dict(num_moe_experts=4, moe_token_dispatcher_type="alltoall", moe_ffn_hidden_size=64)
NORMS = dict(recompute_granularity="selective", recompute_modules=["layernorm"])
# config, options, flags, and what the message says
REFUSED = {
    "fp8": (dict(fp8="hybrid"), {}, {}, "--fp8-format hybrid needs .*use --transformer-impl transformer_engine"),
    "recompute-layernorm": (
        dict(recompute_granularity="selective", recompute_modules=["layernorm", "mlp"]), {}, {},
        "--recompute-modules layernorm mlp needs TransformerEngine .*use --recompute-granularity full",
    ),
    **{
        f"recompute-layernorm-{name}": (
            dict(recompute_granularity="selective", recompute_modules=["layernorm"], **config), options, {},
            "--recompute-modules layernorm frees what a norm returns, which is the residual.*leave layernorm out",
        )
        for name, config, options in (
            ("residual", dict(apply_residual_connection_post_layernorm=True), {}),
            ("scale", {}, dict(embedding_scale=8.0)),
        )
    },
    **{
        f"recompute-layernorm-fused-{name}": (
            TE | NORMS | dict(fused_residual_rmsnorm=True) | config, {}, {},
            "--recompute-modules layernorm frees .* with --fused-residual-rmsnorm .*; leave out one of the two",
        )
        for name, config in (("experts", dict(num_moe_experts=4)), ("latent", HYBRID | LATENT))
    },
    "recompute-moe-act": (
        dict(recompute_granularity="selective", recompute_modules=["moe_act"]), {}, {},
        "--recompute-modules moe_act needs",
    ),
    "residual-offload": (
        dict(
            apply_residual_connection_post_layernorm=True, fine_grained_activation_offloading=True,
            offload_modules=["mlp_norm"],
        ), {}, {}, "--offload-modules mlp_norm frees the output of a norm, which is the residual",
    ),
    "mlp-bias": (
        dict(recompute_granularity="selective", recompute_modules=["mlp"], add_bias_linear=True), {}, {},
        "--recompute-modules mlp never ends its backward with biases.*--disable-bias-linear",
    ),
    "offload-fp32": (
        {}, {}, dict(optimizer_cpu_offload=True), "--optimizer-cpu-offload ends Megatron .* in fp32 .*; use --bf16",
    ),
    "cpu-offloading": (
        dict(cpu_offloading=True), {}, {},
        "--cpu-offloading-num-layers needs TransformerEngine.*use --lightning-offload-activations",
    ),
    "cpu-offloading-hybrid-model": (
        TE | dict(cpu_offloading=True), {}, dict(hybrid_layer_pattern="L-*-"),
        "--cpu-offloading-num-layers is not read by HybridModel.*use GPTModel, or --lightning-offload-activations",
    ),
    **{
        f"optimizer-graph-{name}": (
            config, {}, dict(optimizer_cuda_graph=True) | flags, f"--optimizer-cuda-graph {message}",
        )
        for name, config, flags, message in (
            ("torch", {}, {}, "needs TransformerEngine's Adam .* leave it out, or install TransformerEngine"),
            ("sgd", TE, dict(optimizer="sgd"), "would train on with the learning rate .*; use --optimizer adam"),
            ("muon", TE, dict(optimizer="muon", muon_split_qkv=False), "would train on with the learning rate"),
            ("host", TE | dict(bf16=True), dict(optimizer_cpu_offload=True), "would train.*without --optimizer-cpu"),
            ("fp16", TE | dict(fp16=True), dict(optimizer="adam"), "captures the step, which asks .*; use --bf16"),
            (
                "decay", TE, dict(weight_decay_incr_style="cosine"),
                "would train on with the weight decay .*; use --weight-decay-incr-style constant",
            ),
        )
    },
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
    **{
        f"graphs-experts-{impl}": (
            EXPERTS | dict(cuda_graph_impl=impl, cuda_graph_modules=list(modules)), {}, {},
            f"--cuda-graph-impl {impl} captures layers as a whole.*modules attn moe_router, or --moe-expert-capacity",
        )
        for impl, modules in (("local", ("attn", "moe_router")), ("full_iteration", ()), ("transformer_engine", ()))
    },
    **{  # of evaluation, too, and whatever the model
        f"graphs-experts-full-{name}": (
            EXPERTS | dict(cuda_graph_impl="full_iteration"), {}, flags, "--cuda-graph-impl full_iteration captures",
        )
        for name, flags in (("evaluated", dict(skip_train=True)), ("hybrid", dict(hybrid_layer_pattern="M*E")))
    },
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
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_both_ways(name, without):
    check_refused(REFUSED[name], without)


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
    "selective-qkv": (
        dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]), dict(recompute_qkv=True), {},
    ),
    "graphs": (dict(cuda_graph_impl="local"), {}, {}),
    **{
        f"graphs-no-experts-{impl}": (EXPERTS | dict(moe_layer_freq=[0] * 4, cuda_graph_impl=impl), {}, {})
        for impl in ("local", "full_iteration")
    },
    "graphs-experts-padded": (
        EXPERTS | dict(
            cuda_graph_impl="local", moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True
        ), {}, {},
    ),
    "graphs-experts-served": (
        EXPERTS | dict(cuda_graph_impl="local", moe_pad_experts_for_cuda_graph_inference=True), {}, {},
    ),
    "graphs-experts-hybrid": (EXPERTS | dict(cuda_graph_impl="local"), {}, dict(hybrid_layer_pattern="M*E")),
    "graphs-experts-loaded": (EXPERTS | dict(cuda_graph_impl="local"), {}, dict(skip_train=True)),
    "graphs-routers": (
        TE | EXPERTS | dict(cuda_graph_impl="transformer_engine", cuda_graph_modules=["attn", "moe_router"]), {}, {},
    ),
    "optimizer-graph": (
        TE | dict(bf16=True), {},
        dict(optimizer_cuda_graph=True, optimizer="adam", optimizer_cpu_offload=False)
        | dict(weight_decay_incr_style="constant"),
    ),
    "cpu-offloading-te": (TE | dict(cpu_offloading=True), {}, dict(hybrid_layer_pattern=None)),
    "offload-bf16": (dict(bf16=True), {}, dict(optimizer_cpu_offload=True)),
    "selective-mlp": (dict(recompute_granularity="selective", recompute_modules=["mlp"]), {}, {}),
    "layernorm-fused-dense": (
        TE | NORMS | dict(fused_residual_rmsnorm=True), {}, {},
    ),
    "layernorm-te": (TE | dict(recompute_granularity="selective", recompute_modules=["layernorm"]), {}, {}),
    "modules-unused": (dict(recompute_modules=["layernorm"]), {}, {}),
    "chunk-and-host": (FULL, CHUNK | HOST, {}),
    "chunk-block": (FULL | dict(recompute_method="block", recompute_num_layers=3), CHUNK, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_beside_what_is_refused(name, without):
    check_allowed(ALLOWED[name], without)
