"""Flags that change nothing in models without the layers that read them, and the values that nobody gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..optimizers import FLAGS, Flag, optimizers_of
from .rules import Run

# Flags of softmax attention that change nothing in an all-lightning model, and the values that nobody gave.
SOFTMAX_ONLY = {
    "apply_query_key_layer_scaling": (False,),
    "apply_wd_to_qk_layernorm": (None, False),
    "attention_backend": ("auto",),
    "attention_dropout": (0.0, 0.1),
    "attention_output_gate": (False,),
    "cp_comm_type": (None, "p2p"),
    "flash_attention_version": (None,),
    "fp8_dot_product_attention": (False,),
    "fp8_multi_head_attention": (False,),
    "log_max_attention_logit": (False,),
    "qk_l2_norm": (False,),
    "qk_layernorm": (False,),
    "softmax_scale": (None,),
    "use_kitchen_attention": (False,),
    "window_attn_skip_freq": (None,),
}
# ... and those of rotary embeddings, which change nothing where no layer turns.
ROTARY_ONLY = {
    "no_rope_freq": (None,),
    "rotary_base": (None, 10000),
    "rotary_interleaved": (False,),
    "rotary_percent": (None, 1.0),
    "rotary_seq_len_interpolation_factor": (None,),
    "use_rope_scaling": (None, False),
}


def _reads(flag: Flag) -> Callable[[Run], Any]:
    return lambda run: {*optimizers_of(run.get("optimizer"), run.get("muon_scalar_optimizer"))} & {*flag.readers}


def _wsd(run: Run) -> Any:
    return run.get("lr_decay_style") == "WSD"


def _fp16(run: Run) -> Any:
    return run.get("fp16")


# Flags of the optimizer and its schedule, the values that nobody gave, and where they are read.
OPTIMIZER_ONLY: dict[str, tuple[tuple, Callable[[Run], Any], str]] = {
    **{name: ((flag.default,), _reads(flag), flag.where) for name, flag in FLAGS.items()},
    "lr_wsd_decay_iters": ((None,), _wsd, "--lr-decay-style WSD"),
    "lr_wsd_decay_samples": ((None,), _wsd, "--lr-decay-style WSD"),
    "lr_wsd_decay_style": (("exponential",), _wsd, "--lr-decay-style WSD"),
    "lr_warmup_init": (
        (0.0,),
        lambda run: any(run.get(f"lr_warmup_{x}") for x in ("iters", "samples", "fraction")),
        "--lr-warmup-iters, -samples or -fraction",
    ),
    "min_lr": ((0.0,), lambda run: run.get("lr_decay_style") != "constant", "another --lr-decay-style than constant"),
    "decoupled_min_lr": ((None,), lambda run: run.get("decoupled_lr") is not None, "--decoupled-lr"),
    "loss_scale": ((None,), _fp16, "--fp16"),
    "initial_loss_scale": ((2.0**32,), _fp16, "--fp16"),
    "min_loss_scale": ((1.0,), _fp16, "--fp16"),
    "loss_scale_window": ((1000,), _fp16, "--fp16"),
    "hysteresis": ((2,), _fp16, "--fp16"),
}
