"""Rows of the tables of flags for experts: what Megatron's own code finds out in the middle of the first step."""

from __future__ import annotations

import importlib

from ..compat import importable
from .rules import TE, Rule, Run

_OVERLAP = "overlap_moe_expert_parallel_comm"


# by --moe-flex-dispatcher-backend: its name, and what of which module Megatron imports
_BACKENDS = {
    "deepep": ("DeepEP", "deep_ep", "Buffer"),
    "hybridep": ("HybridEP (DeepEP's branch hybrid-ep)", "deep_ep", "HybridEPBuffer"),
    "ncclep": ("TransformerEngine with NCCL EP", "transformer_engine.pytorch.ep", "__name__"),
}


def _biases(run: Run) -> bool:
    return run.local and run.experts and run.config.add_bias_linear


def _fused_bias(run: Run) -> bool:
    """Local experts weigh tokens inside the fused activation, whose kernels take no bias."""
    return _biases(run) and bool(run.config.bias_activation_fusion)


def _trains_biases(run: Run) -> bool:
    return _biases(run) and not run.get("skip_train")


def _unfused_bias(run: Run) -> str:
    """What --disable-bias-linear is not needed for."""
    if run.config.expert_model_parallel_size == 1 or run.config.sequence_parallel:
        return ""
    return ", or --no-bias-gelu-fusion (--no-bias-swiglu-fusion with --swiglu)"


def _balance(run: Run) -> list[str]:
    """Flags of the losses that routers add to that of the model."""
    kinds, weights = run.config.moe_router_load_balancing_type, run.config.moe_aux_loss_coeff
    pairs = zip(kinds, weights, strict=True) if isinstance(kinds, list) else ((kinds, weights),)
    added = any(weight and kind.endswith("aux_loss") for kind, weight in pairs)
    return ["--moe-aux-loss-coeff"] * added + ["--moe-z-loss-coeff"] * bool(run.config.moe_z_loss_coeff)


_CHOOSES = ("sinkhorn", "quantile_balancing")  # experts; other kinds of balancing are losses


def _choices_of_list(run: Run) -> list[str]:
    """Kinds that choose experts and stand in a list, which Megatron compares with their names. Of the command line, a
    list has several.
    """
    kinds = run.config.moe_router_load_balancing_type
    return [kind for kind in _CHOOSES if isinstance(kinds, list) and kind in kinds]


def _flex(run: Run) -> bool:
    return run.experts and run.config.moe_token_dispatcher_type == "flex"


def _alone(run: Run) -> bool:
    """Whether no ranks share experts. HybridEP takes that."""
    config = run.config
    sizes = config.expert_model_parallel_size, config.expert_tensor_parallel_size or config.tensor_model_parallel_size
    return sizes == (1, 1) and config.moe_flex_dispatcher_backend != "hybridep"


def _no_backend(run: Run) -> bool:
    _, module, symbol = _BACKENDS[run.config.moe_flex_dispatcher_backend]
    return not (importable(module) and hasattr(importlib.import_module(module), symbol))


def _embeds_twice(run: Run) -> bool:
    """Whether the first pipeline rank has multi-token prediction, and so another copy of the embeddings, too. Megatron
    means to refuse it, and does in all of its virtual stages but the last.
    """
    layout = getattr(run.config.pipeline_model_parallel_layout, "layout", None)
    return bool(layout) and any(kind.name == "mtp" for stage in layout[0] for kind in stage)


def _shares_sequences(run: Run) -> bool:
    return run.config.context_parallel_size > 1 or run.config.sequence_parallel


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
        lambda run: (
            f"has no fused activation with biases in Megatron 0.19; add --disable-bias-linear{_unfused_bias(run)}"
        ),
        "--num-experts",
    ),
    Rule(
        "num_moe_experts",
        lambda run: _trains_biases(run) and run.config.sequence_parallel,
        "with biases and --sequence-parallel adds up the gradients of different experts' biases (Megatron 0.19), which "
        "trains another function without a word; add --disable-bias-linear",
        "--num-experts",
    ),
    Rule(
        "num_moe_experts",
        lambda run: _trains_biases(run) and run.config.expert_model_parallel_size == 1,
        "with biases ends Megatron 0.19 in a RuntimeError (is a view and is being modified inplace) in the first step; "
        "add --disable-bias-linear, or let ranks share the experts by --expert-model-parallel-size",
        "--num-experts",
    ),
    Rule(
        "mlp_chunks_for_training",
        lambda run: run.config.mlp_chunks_for_training > 1 and run.experts and _balance(run),
        lambda run: (
            f"adds {' and '.join(_balance(run))} up over chunks (Megatron 0.19), so that these losses weigh so many "
            "times as much; leave it out, or these losses"
        ),
    ),
    Rule(
        "moe_router_load_balancing_type",
        lambda run: run.experts and _choices_of_list(run),
        lambda run: (
            f"leaves {' and '.join(_choices_of_list(run))} out without a word: Megatron 0.19 does not look into lists, "
            "and experts are chosen by their scores; give one of these alone, as a string, or losses alone"
        ),
    ),
    Rule(
        "moe_latent_size",
        lambda run: run.experts and not importable(TE),
        "needs TransformerEngine's projections, and it does not import (Megatron ends in an AssertionError); leave it "
        "out, or install it",
    ),
    Rule(
        "moe_token_dispatcher_type",
        lambda run: _flex(run) and _alone(run),
        "has no ranks to send tokens to (Megatron ends in an AssertionError); use alltoall, or let ranks share the "
        "experts by --expert-model-parallel-size",
    ),
    Rule(
        "moe_token_dispatcher_type",
        lambda run: _flex(run) and not _alone(run) and _no_backend(run),
        lambda run: (
            f"needs {_BACKENDS[run.config.moe_flex_dispatcher_backend][0]} (--moe-flex-dispatcher-backend "
            f"{run.config.moe_flex_dispatcher_backend}), which does not import; use alltoall, or install it"
        ),
    ),
    Rule(
        "pipeline_model_parallel_layout",
        _embeds_twice,
        "puts m on the rank of E, in another virtual stage, whose copy of the embeddings Megatron 0.19 trains apart "
        "without a word; move m to another pipeline rank, such as that of L",
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

WARNED = (
    Rule(
        "moe_expert_capacity_factor",
        lambda run: run.experts and (_shares_sequences(run) or run.config.mlp_chunks_for_training > 1),
        lambda run: (
            "counts the tokens of each rank by themselves"
            + ", and of each chunk of --mlp-chunks-for-training" * (run.config.mlp_chunks_for_training > 1)
            + ": other tokens are dropped than by one rank, and losses are not exactly its"
        ),
    ),
    Rule(
        "moe_router_load_balancing_type",
        lambda run: run.experts and "sinkhorn" in run.config.moe_router_load_balancing_type and _shares_sequences(run),
        "balances the tokens of each rank by themselves: context- and sequence-parallel ranks choose other experts "
        "than one rank, and losses are not its",
    ),
    Rule(
        "micro_batch_size",
        lambda run: (
            run.experts
            and run.packed
            and run.get("micro_batch_size") > 1
            and "seq_aux_loss" in run.config.moe_router_load_balancing_type
            and bool(run.config.sequence_parallel or (run.config.context_parallel_size > 1 and not run.get("sft")))
        ),
        "of packed documents has one loss of --moe-router-load-balancing-type seq_aux_loss, where one rank has one of "
        "each sample, because ranks cut the microbatch as a whole; --micro-batch-size 1 is the same on any layout",
    ),
)
