"""Chooses the backend that computes: triton or torch."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType

import torch

from . import torch_backend

logger = logging.getLogger(__name__)


@functools.cache
def _triton_interpreted() -> bool:
    import triton

    knobs = getattr(triton, "knobs", None)  # since Triton 3.4
    return bool(knobs.runtime.interpret) if knobs else os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _auto_backend(device_type: str) -> str:
    if device_type != "cuda":
        return "torch"
    if importlib.util.find_spec("triton") is None:
        logger.warning(
            "triton is not installed: lightning_attn uses its slower torch backend on the GPU; pip install triton"
        )
        return "torch"
    return "triton"


def choose(backend: str | None, q: torch.Tensor) -> ModuleType:
    if backend in (None, "auto"):
        backend = _auto_backend(q.device.type)
    if backend == "torch":
        return torch_backend
    if backend != "triton":
        raise ValueError(f"backend={backend!r} is unknown; choose 'triton', 'torch', or None to choose by device")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend='triton' needs the triton package, which is not installed; use backend='torch'")
    if q.device.type != "cuda" and not _triton_interpreted():
        raise ValueError(
            f"backend='triton' needs CUDA tensors, but q is on {q.device}; use backend='torch' or leave backend out"
        )
    if q.dtype == torch.float64:
        raise ValueError("q is float64, which the triton backend does not compute; use backend='torch', or fp32 inputs")
    from .triton import attention as triton_backend

    return triton_backend
