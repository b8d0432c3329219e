"""Core attention of the softmax layers of a hybrid, on one rank and over context-parallel ranks."""

from .core import SDPACoreAttention

__all__ = ["SDPACoreAttention"]
