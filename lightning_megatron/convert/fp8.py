"""Block-scaled fp8 weights, as DeepSeek-V3 and its kin store them, turned into bf16.

``X.weight`` [..., rows, columns] is float8_e4m3fn; ``X.weight_scale_inv`` [..., ceil(rows / b), ceil(columns / c)] is
fp32, one factor for each block of b x c weights, with [b, c] = quantization_config.weight_block_size of config.json.
"""

from __future__ import annotations

from typing import Any

import torch

SCALE = "_scale_inv"  # appended to the name of the weight
DTYPE = torch.float8_e4m3fn
_ELEMENTS = 1 << 24  # in fp32 at a time


def block_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, None where config.json says nothing of quantization.

    Raises:
        ValueError: names the field that says another kind of quantization.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"quantization_config.quant_method is {method!r}; only fp8 with weight_block_size is read, or no "
            "quantization: take the bf16 release of the model"
        )
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise ValueError(
            f"quantization_config.weight_block_size is {block!r}; fp8 weights need [rows, columns], such as [128, 128]"
        )
    return block[0], block[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the factors of a weight of this shape."""
    rows, columns = shape[-2:]
    return (*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """weight * scale, computed in fp32 and rounded to bf16 once.

    Args:
        weight: [..., rows, columns], float8_e4m3fn.
        scale: [..., ceil(rows / block[0]), ceil(columns / block[1])], of any floating dtype.

    Returns:
        Tensor: [..., rows, columns], bf16.

    Example:
        >>> dequantize(torch.ones(2, 3).to(DTYPE), torch.full((1, 1), 0.5), (128, 128)).tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    rows, columns = weight.shape[-2:]
    step = max(1, _ELEMENTS // max(1, columns * block[0])) * block[0]
    flat = out.view(-1, rows, columns), weight.reshape(-1, rows, columns), scale.reshape(-1, *scale.shape[-2:])
    for to, values, factors in zip(*flat, strict=True):
        for first in range(0, rows, step):
            part = factors[first // block[0] : -(-min(first + step, rows) // block[0])].float()
            part = part.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: rows - first, :columns]
            to[first : first + step] = values[first : first + step].float() * part[: to[first : first + step].shape[0]]
    return out
