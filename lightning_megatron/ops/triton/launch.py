"""Launches kernels. What of a launch stays the same is worked out once; a call passes addresses."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Hashable
from typing import Any

import torch
import triton

from ..kept import keep

logger = logging.getLogger(__name__)

ALIGNED = 16  # bytes: Triton compiles a kernel for addresses that are multiples, and another one for those that are not


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pad(dim: int) -> int:
    """The power of two that holds ``dim`` columns, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def flat(x: torch.Tensor | None) -> torch.Tensor | None:
    """``[s, b, ...]`` as ``[s * b, ...]`` with stride 1 along the last: a view of all that lies in Megatron's order."""
    if x is None:
        return None
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


class Launch:
    """``kernel[grid](...)`` on one device, of which all but the tensors is fixed, with ``grid > 0``.

    The kernel's parameters are tensors, then numbers, then constants. All calls have tensors of the same dtypes, and
    None in the same places; the device is the current one.

    Triton examines every argument of every launch to find the compiled kernel, which depends on the fixed ones, on
    dtypes and on whether addresses are multiples of 16. The first call whose addresses are goes through Triton. Later
    ones give their addresses to the launcher in C of the kernel that it found. Through Triton go also calls with other
    addresses, or while somebody listens to launches (profilers), and all with a Triton whose launcher is another one,
    on AMD and in the interpreter.

    With ``scratch`` programs make tensor descriptors, which need memory.
    """

    __slots__ = ("_compiled", "_kernel", "_options", "_rest", "_scratch", "grid")

    def __init__(
        self, kernel, grid: int, numbers: tuple, constants: tuple, *, num_warps: int, num_stages: int = 3,
        scratch: bool = False, **options,
    ) -> None:  # fmt: skip
        self.grid = grid
        self._kernel, self._rest, self._scratch = kernel, (*numbers, *constants), scratch
        # Triton before 3.10 contracts a * b + c unless told not to, later ones only if told to
        self._options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **options)
        self._compiled: _Compiled | None = None

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        compiled = self._compiled
        if compiled is not None:
            bits, addresses = 0, []
            for x in tensors:
                if x is None:
                    addresses.append(None)
                else:
                    address = x.data_ptr()
                    bits |= address
                    addresses.append(address)
            if bits % ALIGNED == 0 and not _listened_to():
                compiled(addresses, self._rest)
                return
        self._through_triton(tensors)

    def _through_triton(self, tensors: tuple[torch.Tensor | None, ...]) -> None:
        if self._scratch:
            triton.set_allocator(_allocate)
        found = self._kernel[(self.grid,)](*tensors, *self._rest, **self._options)
        given = [x for x in tensors if x is not None]
        if given[0].is_cuda and launcher() and all(x.data_ptr() % ALIGNED == 0 for x in given):
            # else an instrumented kernel, whose memory Triton looks after
            if found.run.profile_scratch_size == 0 and not getattr(found.run, "gsan_enabled", False):
                self._compiled = _Compiled(found, given[0], self.grid)


class _Compiled:
    """The launcher of a compiled kernel, called as ``triton.backends.nvidia.driver.CudaLauncher`` does."""

    __slots__ = (
        "_after", "_before", "_device", "_grid", "_index", "_kernel", "_launch", "_one", "_scratch", "_stream"
    )  # fmt: skip

    def __init__(self, kernel: Any, like: torch.Tensor, grid: int) -> None:
        run = kernel.run
        self._kernel = kernel  # which owns the function on the device
        self._launch, self._device, self._index, self._grid = run.launch, like.device, like.get_device(), grid
        self._stream = torch._C._cuda_getCurrentRawStream
        # what Triton packed of the kernel; metadata of a launch, and its hooks; memory for a profiler
        launched, profile = (kernel.packed_metadata, None, None, None), None
        self._before = kernel.function, run.launch_cooperative_grid, run.launch_pdl
        self._one = launcher() != "3.6"  # takes the kernel's arguments as one
        if self._one:
            self._before += launched
            self._after = profile, run.arg_annotations, run.kernel_signature
        else:
            self._after = profile, *launched
        self._scratch = grid * run.num_ctas * run.global_scratch_size

    def __call__(self, addresses: list[int | None], rest: tuple) -> None:
        scratch = address = None
        if self._scratch:  # given back after the launch: what takes it next on this stream waits for the kernel
            scratch = torch.empty(self._scratch, dtype=torch.int8, device=self._device)
            address = scratch.data_ptr()
        stream = self._stream(self._index)
        if self._one:
            self._launch(self._grid, 1, 1, stream, *self._before, address, *self._after, (*addresses, *rest))
        else:
            self._launch(self._grid, 1, 1, stream, *self._before, address, *self._after, *addresses, *rest)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)


def _listened_to() -> bool:
    """Whether a profiler, or anyone, has hooks in launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # chains, of no calls at first


@functools.cache
def launcher() -> str | None:
    """The first release of Triton whose launcher for CUDA takes the same as this one's: "3.6", or "3.7" for 3.7 to 3.9;
    None of another, which ``_Compiled`` does not know.
    """
    found, why = None, ""
    try:
        from triton.backends.nvidia import driver

        takes = list(inspect.signature(driver.CudaLauncher.__call__).parameters)
        if torch.version.hip is None and hasattr(torch._C, "_cuda_getCurrentRawStream"):
            if takes == _TAKES["3.6"] and driver._BASE_ARGS_FORMAT == "iiiKKppOOOOOO":
                found = "3.6"
            elif takes == _TAKES["3.7"] and hasattr(driver, "make_kernel_signature") and _release() <= (3, 9):
                found = "3.7"
    except (ImportError, AttributeError) as error:
        why = f" ({error})"
    if found is None:
        logger.debug(
            "the launcher of triton %s is none of 3.6 to 3.9%s: launches go through Triton", triton.__version__, why
        )
    return found


_GRID = ["self", "gridX", "gridY", "gridZ", "stream", "function"]
_TAKES = {
    "3.6": [*_GRID, "args"],
    "3.7": [
        *_GRID, "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args"
    ],
}  # fmt: skip


def _release() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


_launches: dict[Hashable, Launch] = {}


def launch(
    kernel, grid: int, tensors: tuple, numbers: tuple, constants: tuple, *, num_warps: int, num_stages: int = 3,
    **options,
) -> None:  # fmt: skip
    """``kernel[grid](*tensors, *numbers, *constants)``, for callers that do not keep a ``Launch``.

    Values are compared without their types: a parameter must always be an int or always be a float. One of the first
    two tensors is not None.
    """
    first = tensors[1] if tensors[0] is None else tensors[0]
    found, key = None, None
    if first.is_cuda:
        dtypes = tuple([None if x is None else x.dtype for x in tensors])
        # options follow from the kernel
        key = (kernel.fn, grid, first.get_device(), dtypes, numbers, constants, num_warps, num_stages)
        found = _launches.get(key)
    if found is None:
        found = Launch(kernel, grid, numbers, constants, num_warps=num_warps, num_stages=num_stages, **options)
        if key is not None:
            keep(_launches, key, found)
    found(*tensors)
