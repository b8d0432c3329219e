"""Rows of the tables of flags for experts: what Megatron's own code finds out in the middle of the first step."""

from __future__ import annotations

from .rules import Rule, Run

_OVERLAP = "overlap_moe_expert_parallel_comm"


def _fused_bias(run: Run) -> bool:
    """Local experts weigh tokens inside the fused activation, whose kernels take no bias."""
    return run.local and run.experts and bool(run.config.bias_activation_fusion and run.config.add_bias_linear)


def _overlaps(run: Run) -> bool:
    return bool(run.config.overlap_moe_expert_parallel_comm)


def _ends_dense(run: Run) -> bool:
    return not all(run.routed[-1:])


REFUSED = (
    Rule(
        "num_moe_experts",
        lambda run: run.experts and run.config.add_bias_linear and run.config.moe_shared_expert_intermediate_size,
        "with --moe-shared-expert-intermediate-size has no biases in Megatron 0.19; add --disable-bias-linear",
        "--num-experts",
    ),
    Rule(
        "num_moe_experts",
        _fused_bias,
        "has no fused activation with biases in Megatron 0.19; add --disable-bias-linear, or --no-bias-gelu-fusion "
        "(--no-bias-swiglu-fusion with --swiglu)",
        "--num-experts",
    ),
    Rule(
        _OVERLAP,
        lambda run: _overlaps(run) and run.get("hybrid_layer_pattern"),
        "has a schedule for GPTModel, and HybridModel none (Megatron 0.19); leave out one of the two",
    ),
    Rule(
        _OVERLAP,
        lambda run: _overlaps(run) and _ends_dense(run),
        "leaves the norm behind the last layer out where that layer has no experts, which trains another function "
        "(Megatron 0.19); give the last layer experts by --moe-layer-freq, or leave it out",
    ),
    Rule(
        _OVERLAP,
        lambda run: _overlaps(run) and run.mtp and run.packed,
        "has multi-token prediction for plain sequences only, and packed documents (--sft, "
        "--dataloader-inter-document-masking) end in an AssertionError in the first step (Megatron 0.19); leave out "
        "one of the three",
    ),
    Rule(
        "distribute_saved_activations",
        lambda run: run.mtp,
        "cuts inputs of layers in place, which multi-token prediction reads again (Megatron 0.19); leave out one of "
        "the two",
    ),
)
