"""Attention of the softmax layers of a hybrid, on one rank and over context-parallel ranks."""

from .core import SDPACoreAttention
from .latent import LatentAttention, TELatentAttention

__all__ = ["LatentAttention", "SDPACoreAttention", "TELatentAttention"]
