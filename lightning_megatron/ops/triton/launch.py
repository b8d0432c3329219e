"""Caches compiled kernels to skip Triton's argument processing."""

from __future__ import annotations

import torch
import triton

KEPT = 4096  # entries at most: lengths that never return must not fill the memory
# In Triton 3.6 compiled kernels take the constants as arguments too. With other releases every launch goes through
# Triton, and on AMD, where the compiled kernel also depends on whether a tensor has more than 2 GB.
KNOWN_TRITON = triton.__version__.startswith("3.6.") and torch.version.hip is None
_compiled: dict[tuple, object] = {}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pad(dim: int) -> int:
    """The power of two that holds ``dim`` columns, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def launch(
    kernel,
    grid: int,
    tensors: tuple,
    numbers: tuple,
    constants: tuple,
    *,
    num_warps: int,
    num_stages: int = 3,
    **options,
) -> None:
    """``kernel[grid](...)`` with ``grid > 0``, whose parameters are tensors, then numbers, then constants.

    Triton examines every argument of every launch to find the compiled kernel; with 60 arguments that is half of the
    launch. The compiled kernel depends only on the device, the numbers, the constants, and the dtypes and alignment of
    the tensors: if they are those of an earlier launch, its compiled kernel is called directly. Values are compared
    without their types: a parameter must always be an int or always be a float. One of the first two tensors is not
    None.
    """
    key = None
    first = tensors[1] if tensors[0] is None else tensors[0]
    if KNOWN_TRITON and first.is_cuda and all([x is None or x.data_ptr() % 16 == 0 for x in tensors]):
        types = tuple([None if x is None else x.dtype for x in tensors])
        key = (kernel, first.device, types, numbers, constants, num_warps, num_stages)  # options follow from the kernel
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[grid, 1, 1](*tensors, *numbers, *constants)
            return
    compiled = kernel[(grid,)](*tensors, *numbers, *constants, num_warps=num_warps, num_stages=num_stages, **options)
    if key is not None:
        if len(_compiled) >= KEPT:
            _compiled.clear()
        _compiled[key] = compiled
