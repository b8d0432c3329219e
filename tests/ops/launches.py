"""What a call of the operator launches, recorded instead of launched: works with and without a GPU, at any size."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from lightning_megatron.ops import attention as operator
from lightning_megatron.ops import pointwise
from lightning_megatron.ops.backend import Destination, Documents
from lightning_megatron.ops.triton import attention as triton_backend
from lightning_megatron.ops.triton import documents as documents_kernels
from lightning_megatron.ops.triton import final, hopper, kernels, paged, plans, states, step, symmetric, tiling
from lightning_megatron.ops.triton import launch as launching
from lightning_megatron.ops.triton import loss as loss_kernels
from lightning_megatron.ops.triton import merge as merge_kernels
from lightning_megatron.ops.triton import pointwise as pointwise_kernels
from lightning_megatron.ops.triton import rotary as rotary_kernels

KERNELS = ("walk_kernel", "gradients_kernel", "step_kernel")
HOPPER = ("hopper_walk_kernel", "hopper_gradients_kernel")
SEGMENTED = ("state", "o", "dstate", "gradients")
SINGLE = ("o", "gradients")  # of a sequence of one segment
DECODING = ("step", "gradients")
POINTWISE = ("split_kernel", "split_grad_kernel", "norm_gate_kernel", "norm_gate_grad_kernel")
GLU = ("swiglu_kernel", "swiglu_grad_kernel")
LOSS = ("sums_kernel", "loss_grad_kernel")
STATES, RECEIVE = ("local_state_kernel", "combine_kernel"), ("receive_kernel",)
PAGED = ("paged_decode_kernel", "combine_parts_kernel")
DERIVED = ("documents_kernel", "decay_kernel")
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "enable_fp_fusion", "debug", "sanitize_overflow")
MODULES = {
    pointwise_kernels: (*POINTWISE, *GLU, "add_heads_kernel"),
    rotary_kernels: ("rotary_kernel",),
    loss_kernels: LOSS,
    merge_kernels: ("merge_kernel",),
    states: STATES,
    symmetric: RECEIVE,
    documents_kernels: DERIVED,
    kernels: ("walk_kernel", "gradients_kernel"),
    hopper: HOPPER,
    step: ("step_kernel",),
    paged: PAGED,
}


def kernel(name: str):
    return getattr(next(module for module, names in MODULES.items() if name in names), name)


@dataclass(frozen=True)
class Launch:
    what: str  # a name of SEGMENTED or DECODING, or the kernel's
    kernel: str  # one of KERNELS or POINTWISE
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, constants included
    options: dict[str, int]


class _Recorder:
    """Stands in for a kernel: ``recorder[grid](...)`` notes the launch."""

    def __init__(self, name: str, launches: list[tuple]) -> None:
        self.name, self.launches, self.arg_names = name, launches, kernel(name).arg_names

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*positional: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in OPTIONS if name in named}
            arguments = dict(zip(self.arg_names, positional, strict=False)) | named
            assert arguments.keys() == set(self.arg_names), f"{self.name} misses or repeats an argument"
            self.launches.append((self.name, grid, arguments, options))

        return launch


def forget_plans() -> None:
    for cache in (
        triton_backend._forwards, triton_backend._backwards, final._local_states, final._final_states,
        launching._launches, operator._calls,
    ):  # fmt: skip
        cache.clear()


def _patch(stack: ExitStack, launches: list[tuple]) -> None:
    for name, owner in zip(KERNELS, (plans, plans, step), strict=True):
        stack.enter_context(patch.object(owner, name, _Recorder(name, launches)))
    forget_plans()
    stack.callback(forget_plans)  # they launch recorders


def record(
    *, dtype: torch.dtype, T: int, B: int = 1, H: int = 32, Hkv: int | None = None, K: int, V: int, documents: int = 0,
    states: bool = True, descriptors: bool = False, by_row: bool = False, overlapped: bool = False,
) -> list[Launch]:  # fmt: skip
    """Launches of a forward and a backward, packed if ``documents`` is not 0; states of documents or ``by_row``.

    ``overlapped``: on a Hopper GPU.
    """
    Hkv, N = Hkv or H, (not by_row and documents) or B
    q, k, v, do = (torch.empty(B, T, h, d, dtype=dtype, device="meta") for h, d in ((H, K), (Hkv, K), (Hkv, V), (H, V)))
    log_decay = torch.empty(H, device="meta")
    state = torch.empty(N, H, K, V, device="meta") if states else None
    packed = _documents(B if by_row else 1, T, documents, by_row)
    launches: list[tuple] = []
    with ExitStack() as stack:
        _patch(stack, launches)
        stack.enter_context(patch.object(tiling, "has_descriptors", lambda *tensors: descriptors))
        stack.enter_context(patch.object(tiling, "has_wgmma", lambda device: overlapped))
        recorders, kernels_of = tuple(_Recorder(name, launches) for name in HOPPER), plans.kernels
        for module in (plans, triton_backend):
            stack.enter_context(patch.object(module, "kernels", lambda x: recorders if x else kernels_of(x)))
        *_, saved, plan = triton_backend.forward(q, k, v, log_decay, 1.0, state, packed, states)
        triton_backend.backward(q, k, v, log_decay, 1.0, state, packed, saved, plan, do, state)
    return [Launch(_what(*launch[::2]), *launch) for launch in launches]


def _documents(rows: int, T: int, count: int, by_row: bool = True) -> Documents | None:
    shapes = (rows, T), (rows, count + 1)
    return Documents(*(torch.empty(x, dtype=torch.int32, device="meta") for x in shapes), by_row) if count else None


def record_derived(*, T: int, documents: int) -> list[Launch]:
    """The launches for what is derived in every call: documents of one rank, of two chunks and of chunks of each;
    factors.
    """
    cu_seqlens = torch.empty(documents + 1, dtype=torch.int32, device="meta")
    pairs, log_decay = torch.empty(40, 2, dtype=torch.int32, device="meta"), torch.empty(32, device="meta")
    launches: list[tuple] = []
    with ExitStack() as stack:
        for name in DERIVED:
            stack.enter_context(patch.object(documents_kernels, name, _Recorder(name, launches)))
        triton_backend.find_documents(cu_seqlens, T, T)
        triton_backend.find_documents(cu_seqlens, T, 8 * T, starts=(T, 6 * T))
        triton_backend.find_documents(cu_seqlens, T, 4 * T, per_document=8)
        triton_backend.decay_factors(log_decay, pairs, length=T)
        triton_backend.decay_factors(log_decay, pairs, length=T, cu_seqlens=cu_seqlens)
        triton_backend.decay_factors(log_decay, pairs, cu_seqlens=cu_seqlens, per_document=8)
    return [Launch(launch[0], *launch) for launch in launches]


def record_pointwise(
    *, dtype: torch.dtype, s: int, b: int = 1, H: int = 32, Hkv: int | None = None, K: int, V: int,
    kind: str = "sigmoid", width: int | None = None, affine: bool = True, silu: tuple[bool, bool] = (True, False),
) -> list[Launch]:  # fmt: skip
    """The launches around the operator, forward and backward; ``width`` is that of the norm."""
    Hkv = Hkv or H
    gated = kind != "none"
    dims = H // Hkv * K, gated * H // Hkv * V, K, V
    mixed = torch.empty(s, b, Hkv * sum(dims), dtype=dtype, device="meta")
    q, k, v, o = (torch.empty(s, b, h, d, dtype=dtype, device="meta") for h, d in ((H, K), (Hkv, K), (Hkv, V), (H, V)))
    weight = torch.empty(H * V, dtype=dtype, device="meta") if affine else None
    gate = pointwise._views(mixed, dims)[1] if gated else None
    launches: list[tuple] = []
    with ExitStack() as stack:
        for name in POINTWISE:
            stack.enter_context(patch.object(pointwise_kernels, name, _Recorder(name, launches)))
        if silu[0]:
            pointwise_kernels.split_forward(mixed, dims, silu[1])
        y = pointwise_kernels.norm_gate_forward(o, gate, weight, kind, width, 1e-6)
        _, dgate, _ = pointwise_kernels.norm_gate_backward(o, gate, weight, kind, width, 1e-6, y, affine)
        pointwise_kernels.split_backward(mixed, dims, silu, q, dgate, k, v)
    return [Launch(launch[0], *launch) for launch in launches]


def record_swiglu(*, dtype: torch.dtype, rows: int, columns: int) -> list[Launch]:
    """The launches of an MLP's activation, forward and backward."""
    x = torch.empty(rows, 2 * columns, dtype=dtype, device="meta")
    launches: list[tuple] = []
    with ExitStack() as stack:
        for name in GLU:
            stack.enter_context(patch.object(pointwise_kernels, name, _Recorder(name, launches)))
        pointwise_kernels.swiglu_backward(x, pointwise_kernels.swiglu_forward(x))
    return [Launch(launch[0], *launch) for launch in launches]


def record_rotary(*, dtype: torch.dtype, s: int, b: int, heads: int, D: int, pairs: int) -> list[Launch]:
    """The launches that turn q or k, and the gradient back."""
    x, angles = torch.empty(s, b, heads, D, dtype=dtype, device="meta"), torch.empty(s, pairs, device="meta")
    launches: list[tuple] = []
    with patch.object(rotary_kernels, "rotary_kernel", _Recorder("rotary_kernel", launches)):
        for back in (False, True):
            rotary_kernels.turn(x, angles, 1.0, True, False, back=back)
    return [Launch(launch[0], *launch) for launch in launches]


def record_add_heads(*, dtype: torch.dtype, T: int, heads: int, group: int, K: int, V: int) -> list[Launch]:
    """The launch that adds up gradients of k and v over the query heads that share them."""
    empty, launches = functools.partial(torch.empty, dtype=dtype, device="meta"), []
    tensors = [empty(1, T, h, dim) for h in (heads * group, heads) for dim in (K, V)]
    with patch.object(pointwise_kernels, "add_heads_kernel", _Recorder("add_heads_kernel", launches)):
        pointwise_kernels.add_heads(*tensors)
    return [Launch(launch[0], *launch) for launch in launches]


def record_merge(*, dtype: torch.dtype, queries: int, heads: int, D: int) -> list[Launch]:
    """The launch that merges attention to three groups of keys, the last one of half of the queries."""
    empty, launches = functools.partial(torch.empty, device="meta"), []
    starts = 0, 0, queries - queries // 2
    parts = [(empty(1, heads, queries - x, D, dtype=dtype), empty(1, heads, queries - x), x) for x in starts]
    with patch.object(merge_kernels, "merge_kernel", _Recorder("merge_kernel", launches)):
        merge_kernels.merge(parts)
    return [Launch(launch[0], *launch) for launch in launches]


def record_decode(
    *, dtype: torch.dtype, R: int, H: int = 32, Hkv: int | None = None, K: int, V: int, fused: bool, S: int = 1,
    normed: bool = True,
) -> list[Launch]:  # fmt: skip
    """The launch that decodes S tokens of R requests; ``fused`` with all that a layer does around it, or without."""
    Hkv = Hkv or H
    group, launches = H // Hkv, []
    empty = functools.partial(torch.empty, device="meta")
    log_decay, states, slots = empty(H), empty(R + 1, H, K, V), empty(R, dtype=torch.int64)
    with patch.object(step, "step_kernel", _Recorder("step_kernel", launches)):
        if fused:
            dims = group * K, group * V, K, V
            head, out = (empty(K, dtype=dtype), 1e-6), (empty(H * V, dtype=dtype), 1e-6)
            angles, mixed = empty(64, K // 2), empty(R, Hkv * sum(dims), dtype=dtype)
            positions = empty(R, dtype=torch.int64)
            step.decode(
                mixed, log_decay, states, slots, dims, (True, True), 1.0, head, head, angles, positions, 1.0, False,
                "sigmoid", out if normed else None,
            )  # fmt: skip
        else:
            q, k, v, o = (empty(R, S, h, d, dtype=dtype) for h, d in ((H, K), (Hkv, K), (Hkv, V), (H, V)))
            step.step(q, k, v, o, log_decay, slots, states, states, 1.0, empty(R + 1, S, H, K, V) if S > 1 else None)
    return [Launch("decode" if fused else "step", *launch) for launch in launches]


def record_local_states(
    *, dtype: torch.dtype, T: int, B: int = 1, H: int = 32, K: int, V: int, documents: int = 0
) -> list[Launch]:
    """The launches for what context-parallel ranks send, forward and backward; backward into each other's memory."""
    k, v = (torch.empty(B, T, H, d, dtype=dtype, device="meta") for d in (K, V))
    buffers, between = torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(1, H, device="meta")
    destination = Destination(buffers, 1, 10**12, (1, B, H, K, V), between)
    launches: list[tuple] = []
    with ExitStack() as stack:
        _patch(stack, launches)
        for module in (states, symmetric):
            for name in MODULES[module]:
                stack.enter_context(patch.object(module, name, _Recorder(name, launches)))
        gathered, weights = torch.empty(2, B, H, K, V, device="meta"), torch.empty(2, 2, 1, H, device="meta")
        log_decay = torch.empty(H, device="meta")
        triton_backend.local_states(k, v, log_decay, None, _documents(B, T, documents))
        triton_backend.combine(gathered, weights)
        packed = _documents(2 * B, T, documents)
        q, do = (torch.empty(B, 2 * T, *x.shape[2:], dtype=dtype, device="meta") for x in (k, v))
        triton_backend.local_states(q, do, log_decay, None, packed, reverse=True, pieces=2, destination=destination)
        triton_backend.receive(destination, weights)
    return [Launch(_what(*launch[::2]), *launch) for launch in launches]


def record_loss(*, dtype: torch.dtype, rows: int, columns: int) -> list[Launch]:
    """The launches of a cross entropy, forward and backward."""
    logits = torch.empty(rows, columns, dtype=dtype, device="meta")
    index = torch.empty(rows, dtype=torch.int64, device="meta")
    launches: list[tuple] = []
    with ExitStack() as stack:
        for name in LOSS:
            stack.enter_context(patch.object(loss_kernels, name, _Recorder(name, launches)))
        top, total, _ = loss_kernels.sums(logits, index)
        loss_kernels.gradient(logits, index, top, total)
    return [Launch(launch[0], *launch) for launch in launches]


def record_paged(
    *, dtype: torch.dtype, H: int, Hkv: int, K: int, V: int, prefix: bool = False, requests: int = 8, block: int = 64,
    max_blocks: int = 512, shared: int = 227,
) -> list[Launch]:  # fmt: skip
    """The launches of a step of decoding with softmax attention; with ``prefix`` values are the keys' first channels.
    A program may have ``shared`` KiB of shared memory.
    """
    empty = functools.partial(torch.empty, device="meta")
    q, k = empty(requests, H, K, dtype=dtype), empty(1000, block, Hkv, K, dtype=dtype)
    v = V if prefix else empty(1000, block, Hkv, V, dtype=dtype)
    table, lengths = (empty(*size, dtype=torch.int32) for size in ((requests, max_blocks), (requests,)))
    launches: list[tuple] = []
    with ExitStack() as stack:
        for name in PAGED:
            stack.enter_context(patch.object(paged, name, _Recorder(name, launches)))
        stack.enter_context(patch.object(paged, "_shared_memory", lambda device: shared))
        paged.decode(q, k, v, table, lengths, 1.0)
    return [Launch(launch[0], *launch) for launch in launches]


def _what(kernel: str, arguments: dict[str, Any]) -> str:
    if kernel == "walk_kernel" and arguments["STATE_ONLY"]:
        return "dstate" if arguments["REVERSE"] else "state"
    if kernel == "local_state_kernel":
        return "send" if arguments["SEND"] else "local state"
    names = {"walk_kernel": "o", "gradients_kernel": "gradients", "step_kernel": "step"}
    return names.get(kernel.removeprefix("hopper_"), kernel)
