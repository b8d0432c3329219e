"""Rows of the tables of flags for experts: what Megatron's own code finds out in the middle of the first step."""

from __future__ import annotations

from .rules import Rule, Run


def _fused_bias(run: Run) -> bool:
    """Local experts weigh tokens inside the fused activation, whose kernels take no bias."""
    return run.local and bool(run.config.bias_activation_fusion and run.config.add_bias_linear)


REFUSED = (
    Rule(
        "num_moe_experts",
        lambda run: run.config.add_bias_linear and run.config.moe_shared_expert_intermediate_size,
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
        "distribute_saved_activations",
        lambda run: run.mtp,
        "cuts inputs of layers in place, which multi-token prediction reads again (Megatron 0.19); leave out one of "
        "the two",
    ),
)
