"""What will be trained, in words for the log: which layers are lightning, sizes, decays, parameters and parts."""

from __future__ import annotations

import math

import torch

from . import __version__
from .compat import version
from .config import (
    RESIDUAL_FACTORS,
    LightningOptions,
    lightning_depths,
    lightning_pattern,
    mtp_pattern,
    resolve_shape,
)
from .decay import log_decay
from .norm import norm_name

_LETTERS = {
    "L": "lightning", "*": "softmax", "+": "latent attention", "M": "Mamba", "G": "gated delta net", "-": "MLP",
    "E": "experts",
}  # fmt: skip


def attention_parameters(config, options: LightningOptions) -> tuple[int, int]:
    """Parameters of the attention module of one lightning and of one softmax layer, over all tensor-parallel ranks."""
    shape = resolve_shape(config, options, tp=1)
    norms = shape.output_dim * bool(shape.norm_groups and options.norm_affine) + 2 * shape.key_dim * options.qk_norm
    softmax = _latent_parameters if config.multi_latent_attention else _softmax_parameters
    return _projections(config, shape.projection_dim, shape.output_dim) + norms, softmax(config)


def _projections(config, columns: int, rows: int) -> int:
    hidden, bias = config.hidden_size, config.add_bias_linear
    return hidden * (columns + rows) + columns * (bias or config.add_qkv_bias) + hidden * bias


def _norm(config, channels: int) -> int:
    weights = config.qk_layernorm and not config.qk_l2_norm
    return channels * (1 if config.normalization == "RMSNorm" else 2) * weights


def _softmax_parameters(config) -> int:
    query = config.kv_channels * config.num_attention_heads
    gate = query if config.attention_output_gate else 0
    key_value = 2 * config.kv_channels * config.num_query_groups
    return _projections(config, query + gate + key_value, query) + 2 * _norm(config, config.kv_channels)


def _latent_parameters(config) -> int:
    hidden, heads, q_lora, kv_lora = (
        config.hidden_size, config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank,
    )  # fmt: skip
    queries = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
    q = hidden * queries if q_lora is None else q_lora * (hidden + queries)
    kv = hidden * (kv_lora + config.qk_pos_emb_head_dim) + kv_lora * heads * (config.qk_head_dim + config.v_head_dim)
    output = hidden * heads * config.v_head_dim + hidden * config.add_bias_linear
    return q + kv + output + _norm(config, kv_lora + (q_lora or 0))


def layer_map(config, options: LightningOptions) -> str:
    """What will be trained, for the log: which layers are lightning, with which sizes, decays and parts."""
    pattern = lightning_pattern(config.linear_attention_freq, config.num_layers)
    shape = resolve_shape(config, options, config.tensor_model_parallel_size)
    letters = getattr(config, "hybrid_layer_pattern", None)  # of HybridModel, where MLPs are layers, too
    marks = letters or "".join("L" if lightning else "s" for lightning in pattern)
    counted = f"{sum(pattern)} lightning layers (L), {pattern.count(False)} softmax layers (s)"
    if letters is not None:
        counts = (f"{letters.count(x)} {name} ({x})" for x, name in _LETTERS.items() if x in letters)
        counted = f"HybridModel of {len(letters)} layers: {', '.join(counts)}"
    rows = "\n".join(f"  {start:4d}  " + marks[start : start + 64] for start in range(0, len(marks), 64))
    decays = [
        log_decay(options.decay, shape.num_heads, layer, config.num_layers, offset=options.decay_offset)
        for layer in lightning_depths(pattern, mtp_pattern(config.mtp_num_layers, options))
    ]
    lightning_size, softmax_size = attention_parameters(config, options)
    te = config.transformer_impl == "transformer_engine"
    softmax = sum(not lightning for lightning in pattern)
    core = "TransformerEngine's core attention" if te else "torch's scaled_dot_product_attention"
    used = {"lightning": lightning_size} if decays else {}
    used |= {"softmax": softmax_size} if softmax else {}
    sizes = ", ".join(f"{name} {size:,}" for name, size in used.items())
    parts = f"{norm_name(config, options)} for layer norms" + (f", {core} for softmax layers" if softmax else "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch", "triton"))
    return "\n".join(
        (
            f"lightning_megatron {__version__}: {counted}",
            rows,
            *(_lightning_part(shape, options, torch.cat(decays)) if decays else ()),
            *_other_parts(config, options),
            f"  attention parameters a layer: {sizes}",
            f"  parts: {parts}; {versions}",
        )
    )


def _lightning_part(shape, options: LightningOptions, decays: torch.Tensor) -> tuple[str, str]:
    """What lightning layers are; ``decays`` of all of them."""
    scale = shape.key_dim**-0.5 if options.scale is None else options.scale
    on = {True: "on", False: "off"}
    return (
        f"  lightning: {shape.num_heads} heads, {shape.num_kv_heads} of k and v, K {shape.key_dim}, "
        f"V {shape.value_dim}, scale {scale:.4g}, feature map {options.feature_map}, norm {options.norm}, "
        f"gate {options.gate}, rope {on[options.rope]}, q/k norm {on[options.qk_norm]}, backend {options.backend}",
        f"  decay {options.decay}: log_decay {decays.min():.3g} to {decays.max():.3g} per token, half-life "
        f"{_half_life(decays.min())} to {_half_life(decays.max())} tokens",
    )


def _other_parts(config, options: LightningOptions) -> list[str]:
    """A line on what is not usual in a transformer, if there is any."""
    factors = {name: getattr(options, name) for name in (*RESIDUAL_FACTORS, "embedding_scale")}
    parts = [f"{name} {value:.6g}" for name, value in factors.items() if value != 1.0]
    parts += [f"LRPE in the first {options.lrpe_layers} layers"] * bool(options.lrpe_layers)
    parts += ["the residual is the norm's output"] * bool(config.apply_residual_connection_post_layernorm)
    parts += ["layer norms without weights"] * (not options.layernorm_affine)
    parts += ["bilinear GLU"] * options.bilinear_glu
    mtp = config.mtp_num_layers or 0
    parts += [f"{mtp} more {options.mtp_attention} layer{'s' * (mtp > 1)} for multi-token prediction"] * bool(mtp)
    return [f"  {', '.join(parts)}"] if parts else []


def _half_life(value: torch.Tensor) -> str:
    return "infinitely many" if value == 0 else f"{math.log(0.5) / float(value):.3g}"
