"""The operator. Imports torch and triton only, never megatron."""

from .api import lightning_attn

__all__ = ["lightning_attn"]
