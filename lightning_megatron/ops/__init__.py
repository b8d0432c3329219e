"""The operator, and what a layer does around it. Imports torch and triton only, never megatron."""

from .attention import lightning_attn
from .linear_loss import linear_cross_entropy
from .loss import vocab_parallel_cross_entropy
from .pointwise import norm_gate, split_heads

__all__ = ["lightning_attn", "linear_cross_entropy", "norm_gate", "split_heads", "vocab_parallel_cross_entropy"]
