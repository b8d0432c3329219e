"""Slopes and presets: the one place where a decay is computed, and where it is sliced by tensor-parallel rank.

A head with slope s keeps exp(-s) of its state per token, so ``log_decay = -s`` and is never positive. Slopes are fixed:
they are not learned and not saved in checkpoints.
"""

from __future__ import annotations

import math

import torch

from .config import DECAY_PRESETS


def _alibi(num_heads: int) -> list[float]:
    """ALiBi slopes (Press et al. 2022, section 3): 2^(-8(h+1)/H), interpolated where H is no power of two."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = _geometric(power)
    return slopes + _geometric(2 * power)[0::2][: num_heads - power]


def _geometric(num_heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]


def _slopes(preset: str, num_heads: int, layer: int, num_layers: int) -> list[float]:
    last = max(num_layers - 1, 1)  # a model of one layer has nothing to interpolate over
    if preset == "tnl":
        return [a * (1 - layer / last + 1e-5) for a in _alibi(num_heads)]
    if preset == "minimax":
        return [a * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5) for a in _geometric(num_heads)]
    if preset == "bailing":
        return [a * (1 - (layer - 1) / last + 1e-5) for a in _alibi(num_heads)]
    if preset == "paper":
        return [8.0 * head / num_heads * (1 - layer / num_layers) for head in range(num_heads)]
    if preset == "alibi":
        return _alibi(num_heads)
    assert preset == "none"
    return [0.0] * num_heads


def log_decay(
    preset: str,
    num_heads: int,
    layer: int,
    num_layers: int,
    *,
    offset: int = 0,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> torch.Tensor:
    """Natural logarithm of the decay per token of every head of one layer.

    With a = 2^(-8(h+1)/H), ALiBi's slope of head h of H, and l the layer of L:

    ========= ======================================== ==========================================================
    preset    slope of head h in layer l               source
    ========= ======================================== ==========================================================
    tnl       a (1 - l/(L-1) + 1e-5)                   TransNormerLLM, OpenNLPLab's kernels, vLLM
    minimax   a (1 - l/(L-1+1e-5) + 1e-5)              transformers, models/minimax; a is never interpolated
    bailing   a (1 - (l-1)/(L-1) + 1e-5)               Ling/Ring linear, Hugging Face remote code (vLLM: offset=1)
    paper     8h/H (1 - l/L), head 0 never decays      Lightning Attention-2; fla.ops.lightning_attn
    alibi     a, the same in every layer               Press et al. 2022
    none      0                                        plain linear attention
    ========= ======================================== ==========================================================

    Args:
        preset: a name of the table.
        num_heads: H, query heads of the whole layer (all tensor-parallel ranks together).
        layer: l, 0-based, counted over all pipeline stages and softmax layers included.
        num_layers: L of the whole model.
        offset: added to ``layer``.
        tp_rank, tp_size: return the slice of heads that this tensor-parallel rank holds.

    Returns:
        fp32 tensor ``[num_heads / tp_size]`` on the CPU, finite and <= 0.

    Raises:
        ValueError: unknown preset, layer outside the model, heads not divisible, or an offset that makes a head grow.
    """
    if preset not in DECAY_PRESETS:
        raise ValueError(f"decay preset {preset!r} is unknown; choose one of {', '.join(DECAY_PRESETS)}")
    if num_heads < 1 or num_layers < 1 or not 0 <= layer < num_layers:
        raise ValueError(
            f"num_heads={num_heads} and num_layers={num_layers} must be positive and layer={layer} within "
            "0..num_layers-1"
        )
    if num_heads % tp_size or not 0 <= tp_rank < tp_size:
        raise ValueError(
            f"{num_heads} heads cannot be sliced for rank {tp_rank} of {tp_size}: choose a tp_size that divides them"
        )
    values = [-slope for slope in _slopes(preset, num_heads, layer + offset, num_layers)]
    if max(values) > 0:
        raise ValueError(
            f"decay={preset!r} with decay_offset={offset} makes layer {layer} of {num_layers} grow (log_decay "
            f"{max(values):.3g} > 0); use a smaller offset"
        )
    local = num_heads // tp_size
    # by name, because models are built under torch.device("meta"), too (--init-model-with-meta-device)
    return torch.tensor(values[tp_rank * local : (tp_rank + 1) * local], dtype=torch.float32, device="cpu")
