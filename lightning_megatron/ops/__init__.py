"""The operator, and what a layer does around it. Imports torch and triton only, never megatron."""

from .api import lightning_attn
from .pointwise import norm_gate, split_heads

__all__ = ["lightning_attn", "norm_gate", "split_heads"]
