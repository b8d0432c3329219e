"""How kernels are launched: what Triton looks up at every launch is kept from the first one on."""

from __future__ import annotations

import triton

KEPT = 4096  # compiled kernels by arguments: lengths that never return must not fill the memory
# Triton 3.6's compiled kernels take the constants too; with another release every launch goes through Triton's front door.
_KNOWN_TRITON = triton.__version__.startswith("3.6.")
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

    Triton looks at every argument of every launch to find the compiled kernel: for 60 of them half of the time of a launch.
    What it looks for follows from the numbers, the constants, the types and the alignment of the tensors: with the same
    ones as before, its own compiled kernel is called at once. One of the first two tensors is not None.
    """
    key = None
    first = tensors[1] if tensors[0] is None else tensors[0]
    if _KNOWN_TRITON and first.is_cuda and all([x is None or x.data_ptr() % 16 == 0 for x in tensors]):
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
