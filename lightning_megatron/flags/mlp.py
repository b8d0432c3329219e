"""Rows of the tables of flags for MLPs and experts: what Megatron's choice of their implementation leaves unread."""

from __future__ import annotations

from ..compat import importable, version
from .rules import TE, Rule, Run


def _activation(run: Run) -> str:
    return getattr(run.config.activation_func, "__name__", "")


def _plain(run: Run) -> bool:
    """Whether an MLP has no gate, or TransformerEngine's activation, which takes no parameters."""
    return not run.config.gated_linear_unit or bool(run.config.use_te_activation_func)


def _fused_swiglu(run: Run) -> bool:
    """Whether the activation is the kernel that does not clamp; that of 0.20 does."""
    fused = run.config.bias_activation_fusion and not run.options.bilinear_glu
    return fused and _activation(run) == "silu" and version("megatron-core").startswith("0.19")


def _ungrouped(run: Run) -> bool:
    return run.experts and (run.local or not run.config.moe_grouped_gemm)


def _dense(run: Run) -> bool:
    """Whether some MLP, a shared expert too, is not one of routed experts."""
    return not all(run.routed) or bool(run.config.moe_shared_expert_intermediate_size)


REFUSED = (
    Rule(
        "activation_func_clamp_value",
        lambda run: _plain(run) or _fused_swiglu(run),
        "is read by gated MLPs without a fused activation only (Megatron 0.19), and others would not clamp; add "
        "--no-bias-swiglu-fusion to --swiglu, or leave it out",
    ),
    Rule(
        "glu_linear_offset",
        lambda run: run.config.glu_linear_offset and _plain(run),
        "is added in gated MLPs without --use-te-activation-func only; add --quick-geglu, or leave it out",
    ),
    Rule(
        "bias_activation_fusion",
        lambda run: _activation(run) == "quick_gelu" and _dense(run),
        "has a fused activation for routed experts only, and other MLPs end in a ValueError in the first step "
        "(Megatron 0.19); add --no-bias-gelu-fusion",
        "--quick-geglu",
    ),
    Rule(
        "moe_mlp_glu_interleave_size",
        _ungrouped,
        "is the order of weights of TransformerEngine's grouped experts, and other experts would take them for two "
        "halves; add --moe-grouped-gemm and --transformer-impl transformer_engine, or leave it out",
    ),
    Rule(
        "moe_shared_expert_glu_interleave_size",
        lambda run: not run.config.use_grouped_gemm_for_shared_expert,
        "is the order of weights with --use-grouped-gemm-for-shared-expert, and other shared experts would take them "
        "for two halves; add that, or leave it out",
    ),
    Rule(
        "moe_router_fusion",
        lambda run: run.experts and not importable(TE),
        "needs TransformerEngine's kernels in the first step, and it does not import; leave it out, or install it",
    ),
)

WARNED = tuple(
    Rule(
        name,
        lambda run: run.local and run.experts,
        "is not read by experts of --transformer-impl local, which compute the same, one after the other",
    )
    for name in ("moe_grouped_gemm", "use_fused_weighted_squared_relu")
)
