"""Rows of the tables of flags about memory and CUDA graphs: recompute, inputs on the host, what is captured."""

from __future__ import annotations

from ..compat import importable
from .rules import TE, Rule, Run, selective

_CHUNK, _OFFLOAD = "lightning_recompute_chunk", "lightning_offload_activations"
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

REFUSED = (
    *(
        Rule(name, when, text)
        for name in (_CHUNK, _OFFLOAD)
        for when, text in (
            (lambda run: not run.recomputes, f"acts on layers that are recomputed; add {_FULL}, or leave it out"),
            (
                lambda run: run.graphs,
                "does not go with CUDA graphs, in which nothing is recomputed; use --cuda-graph-impl none",
            ),
        )
    ),
    Rule(
        _CHUNK,
        lambda run: run.get("fp8") or run.get("fp4"),
        "does not go with --fp8-format and --fp4-format, whose scales and kept values are of a whole layer; leave out "
        "one of the two",
    ),
    Rule(
        "lightning_recompute_qkv",
        lambda run: not selective(run, "core_attn"),
        "begins the recomputation of core_attn at the fused projection; add --recompute-granularity selective "
        "--recompute-modules core_attn, or leave it out",
    ),
    Rule(
        _OFFLOAD,
        lambda run: run.config.distribute_saved_activations,
        "moves whole inputs, and --distribute-saved-activations cuts them; leave out one of the two",
    ),
    Rule(
        _CHUNK,
        lambda run: run.config.recompute_method == "uniform" and run.config.recompute_num_layers != 1,
        "recomputes layers one by one; use --recompute-num-layers 1",
    ),
    Rule(
        _CHUNK,
        lambda run: run.config.hidden_dropout > 0,
        "would drop other elements when it recomputes; use --hidden-dropout 0",
    ),
    *(
        Rule(_CHUNK, lambda run, name=name: run.get(name), f"does not go with {flag}; {remedy}")
        for name, flag, remedy in (
            (
                "gradient_accumulation_fusion",
                "gradient accumulation fusion, as it sums gradients of weights by itself",
                "use --no-gradient-accumulation-fusion",
            ),
            ("tp_comm_overlap", "--tp-comm-overlap, whose buffers have one size", "leave that out"),
            ("delay_wgrad_compute", "--delay-wgrad-compute", "leave that out"),
        )
    ),
    Rule(
        "cpu_offloading",
        lambda run: not importable(TE),
        f"needs TransformerEngine, and it does not import; use --lightning-offload-activations with {_FULL}, or "
        "install it",
        "--cpu-offloading-num-layers",
    ),
    Rule(
        "cpu_offloading",
        lambda run: run.get("hybrid_layer_pattern"),
        "is not read by HybridModel, which would keep all on the GPU (Megatron 0.19); use GPTModel, or "
        f"--lightning-offload-activations with {_FULL}",
        "--cpu-offloading-num-layers",
    ),
    Rule(
        _CHUNK,
        lambda run: run.config.context_parallel_size > 1 and not run.options.cp_keep_states,
        "keeps states for the recomputation; leave --no-lightning-cp-keep-states out",
    ),
)


def _captures_experts(run: Run) -> bool:
    """Whether graphs hold experts whose tokens are counted on the host. Megatron's ``local`` captures the layers of a
    GPTModel in training as a whole whatever the modules; HybridModel's layers with experts know theirs. A graph of the
    full iteration holds all layers of any model, in evaluation, too.
    """
    config, impl = run.config, run.get("cuda_graph_impl")
    padded = config.moe_expert_capacity_factor is not None and config.moe_pad_expert_input_to_capacity
    counted = run.experts and config.moe_token_dispatcher_type != "flex" and not padded
    inference = run.get("skip_train") or config.moe_pad_experts_for_cuda_graph_inference
    if not counted or impl == "full_iteration":
        return counted
    if inference or run.get("hybrid_layer_pattern"):
        return False
    return impl == "local" or (impl == "transformer_engine" and not run.graphed)


GRAPHS = (
    Rule(
        "cuda_graph_modules",
        lambda run: run.get("cuda_graph_impl") == "local" and "mlp" in run.graphed and "attn" not in run.graphed,
        "ends in an AttributeError of Megatron's layers with --cuda-graph-impl local; give attn, or leave "
        "--cuda-graph-modules out for whole layers",
    ),
    Rule(
        "cuda_graph_impl",
        lambda run: run.graphs and run.packed,
        "captures a batch of one shape, and packed documents (--sft, --dataloader-inter-document-masking) differ in "
        "number from batch to batch; use --cuda-graph-impl none",
    ),
    Rule(
        "cuda_graph_impl",
        _captures_experts,
        "captures layers as a whole, and experts that take any number of tokens ask for it while they run (a CUDA "
        "error of the capture); use --cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router, or "
        "--moe-expert-capacity-factor with --moe-pad-expert-input-to-capacity",
    ),
    Rule(
        "cuda_graph_impl",
        lambda run: run.get("cuda_graph_impl") == "transformer_engine" and not importable(TE),
        "captures with TransformerEngine's functions, and it does not import: use local or full_iteration, or install "
        "it",
    ),
)

WARNED = (
    Rule(
        _CHUNK,
        lambda run: run.config.context_parallel_size > 1,
        "computes the MLPs in chunks, and attention whole: chunks of lightning layers need the whole sequence on one "
        "context-parallel rank",
    ),
    Rule(
        _CHUNK,
        lambda run: run.experts,
        "leaves layers with experts whole",
    ),
    Rule(_CHUNK, lambda run: run.mtp, "leaves multi-token prediction layers whole"),
    Rule(
        "mlp_chunks_for_training",
        lambda run: run.config.mlp_chunks_for_training > 1 and run.recomputes,
        "keeps what all chunks computed in the backward, and so does not lower its peak; use "
        "--lightning-recompute-chunk",
    ),
)
