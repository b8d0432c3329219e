"""The operator, and what a layer does around it. Imports torch and triton only, never megatron."""

from .attention import lightning_attn, packed_part
from .linear_loss import linear_cross_entropy
from .loss import vocab_parallel_cross_entropy
from .pointwise import norm_gate, norm_residual, split_heads, swiglu
from .rotary import rotary
from .step import lightning_decode, lightning_step, unfusable

__all__ = [
    "lightning_attn", "lightning_decode", "lightning_step", "linear_cross_entropy", "norm_gate", "norm_residual",
    "packed_part", "rotary", "split_heads", "swiglu", "unfusable", "vocab_parallel_cross_entropy",
]  # fmt: skip
