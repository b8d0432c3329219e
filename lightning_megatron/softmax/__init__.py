"""Attention of the softmax layers of a hybrid, on one rank and over context-parallel ranks."""

from .attention import DynamicSelfAttention
from .core import SDPACoreAttention
from .latent import LatentAttention, TELatentAttention

__all__ = ["DynamicSelfAttention", "LatentAttention", "SDPACoreAttention", "TELatentAttention"]
