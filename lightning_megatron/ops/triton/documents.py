"""Where documents lie among the tokens of a call, and what they and the decay leave of a state between two chunks.

Both are derived from bounds that may change without a trace (a collective, a graph replay or a kernel of one's own
writes into them), so that nothing is remembered: each takes one launch of a call, and no wait for the GPU. Assertions
on the device take the place of checks on the host where these could not see a change.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..backend import Documents, triton_interpreted
from .launch import cdiv, launch

BLOCK = 256
# expf as torch has it, so that factors have torch's bits; Triton's own is less exact. The interpreter lacks it.
LIBDEVICE = tl.constexpr(not triton_interpreted())


@triton.jit
def _bound(cu_seqlens, i, start, T, chunks, PER_DOCUMENT: tl.constexpr):
    """Bound ``i`` of the documents among the tokens of a row: of [start, start + T), or of two chunks of each
    document.
    """
    if PER_DOCUMENT:
        low = tl.load(cu_seqlens + i // 2).to(tl.int64)
        return (low + tl.load(cu_seqlens + (i + 1) // 2).to(tl.int64)) // chunks
    else:
        return tl.minimum(tl.maximum(tl.load(cu_seqlens + i).to(tl.int64) - start, 0), T)


@triton.jit(do_not_specialize=("N", "T", "total", "chunks", "first", "second", "blocks"))
def documents_kernel(
    cu_seqlens, ids, bounds,  # [N+1], [rows, T], [rows, documents + 1]
    N, T, total, chunks, first, second, blocks,  # programs of a row; rows begin at tokens first and second
    PER_DOCUMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Document of every token, the last that begins at or before it, and the bounds of documents in every row."""
    i = tl.program_id(0)
    row, place = i // blocks, i % blocks * BLOCK + tl.arange(0, BLOCK)
    start = tl.where(row == 0, first, second).to(tl.int64)
    documents = N
    if PER_DOCUMENT:
        documents = 2 * N
    # what all programs read must be sound: a bound that nobody has seen change must not lead out of range
    low = tl.load(cu_seqlens + tl.minimum(place, N)).to(tl.int64)
    high = tl.load(cu_seqlens + tl.minimum(place + 1, N)).to(tl.int64)
    tl.device_assert(tl.min((low <= high).to(tl.int32), 0) == 1, "cu_seqlens must never fall")
    tl.device_assert(tl.load(cu_seqlens).to(tl.int64) == 0, "cu_seqlens must start at 0")
    tl.device_assert(tl.load(cu_seqlens + N).to(tl.int64) == total, "cu_seqlens must end at the number of tokens")
    if PER_DOCUMENT:
        tl.device_assert(
            tl.min(((high - low) % chunks == 0).to(tl.int32), 0) == 1,
            "with zigzag-documents cu_seqlens must be multiples of twice the number of ranks",
        )
    found = _bound(cu_seqlens, tl.minimum(place, documents), start, T, chunks, PER_DOCUMENT).to(tl.int32)
    tl.store(bounds + row * (documents + 1) + place, found, mask=place <= documents)
    # the number of bounds 1, 2, ... at or before the token, by bisection
    below = tl.zeros([BLOCK], dtype=tl.int32)  # so many certainly are
    above = below + documents  # and at most so many
    steps = documents
    while steps > 0:
        middle = (below + above) // 2
        before = _bound(cu_seqlens, tl.minimum(middle + 1, documents), start, T, chunks, PER_DOCUMENT) <= place
        active = below < above
        below = tl.where(active & before, middle + 1, below)
        above = tl.where(active & (~before), middle, above)
        steps = steps // 2
    below = tl.minimum(below, documents - 1)  # of places behind the last token
    tl.store(ids + row.to(tl.int64) * T + place, below, mask=place < T)


@triton.jit(do_not_specialize=("N", "length", "chunks", "count", "R", "H"))
def decay_kernel(
    log_decay, pairs, bounds, cu_seqlens, out,  # [H], [count, 2], [chunks + 1], [N+1], [count, R, H]
    N, length, chunks, count, R, H,
    PACKED: tl.constexpr, PER_DOCUMENT: tl.constexpr, BOUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See ``Backend.decay_factors``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count * R * H
    i_h, i_r, i_p = i % H, i // H % R, i // (H * R)
    a = tl.load(pairs + 2 * i_p, mask=inside, other=0)
    b = tl.load(pairs + 2 * i_p + 1, mask=inside, other=0)
    left = a <= b
    if PER_DOCUMENT:
        size = tl.load(cu_seqlens + tl.minimum(i_r + 1, N)).to(tl.int64) - tl.load(cu_seqlens + i_r).to(tl.int64)
        begin = tl.zeros([BLOCK], dtype=tl.int64)
        end = (b - a) * (size // chunks)
    else:
        if BOUNDS:
            begin, end = tl.load(bounds + a), tl.load(bounds + b)
        else:
            begin, end = a.to(tl.int64) * length, b.to(tl.int64) * length
        if PACKED:  # the first document that begins at or after the first bound, by bisection
            below = tl.zeros([BLOCK], dtype=tl.int32)
            above = below + N + 1
            steps = N + 1
            while steps > 0:
                middle = (below + above) // 2
                before = tl.load(cu_seqlens + tl.minimum(middle, N)).to(tl.int64) < begin
                active = below < above
                below = tl.where(active & before, middle + 1, below)
                above = tl.where(active & (~before), middle, above)
                steps = steps // 2
            edge = tl.load(cu_seqlens + tl.minimum(below, N)).to(tl.int64)
            left = left & ((below > N) | (edge > end))
    # the difference in integers: fp32 ends at 2^24 tokens
    tokens = tl.maximum(end - begin, 0).to(tl.float32)
    if LIBDEVICE:
        factor = libdevice.exp(tokens * tl.load(log_decay + i_h))
    else:
        factor = tl.exp(tokens * tl.load(log_decay + i_h))
    tl.store(out + i, tl.where(left, factor, 0.0), mask=inside)


def find_documents(
    cu_seqlens: torch.Tensor, T: int, total: int, starts: tuple[int, ...] | None = None, per_document: int = 0
) -> Documents:
    """See ``Backend.find_documents``: in one launch."""
    N, rows = cu_seqlens.numel() - 1, 1 if starts is None else len(starts)
    documents = 2 * N if per_document else N
    ids = torch.empty(rows, T, device=cu_seqlens.device, dtype=torch.int32)
    bounds = torch.empty(rows, documents + 1, device=cu_seqlens.device, dtype=torch.int32)
    first, *second = starts or (0,)
    blocks = cdiv(max(T, documents + 1), BLOCK)
    launch(
        documents_kernel, rows * blocks, (cu_seqlens.contiguous(), ids, bounds),
        (N, T, total, per_document or 1, first, second[0] if second else 0, blocks), (per_document > 0, BLOCK),
        num_warps=4, debug=True, sanitize_overflow=False,  # debug for the assertions alone
    )  # fmt: skip
    return Documents(ids, bounds, starts is not None)


def ids_and_bounds(documents: Documents | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if documents is None else documents[:2]


def count_documents(documents: Documents | None) -> int:
    return 0 if documents is None else documents.bounds.shape[1] - 1


def decay_factors(
    log_decay: torch.Tensor,
    pairs: torch.Tensor,
    *,
    length: int = 0,
    bounds: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    per_document: int = 0,
) -> torch.Tensor:
    """See ``Backend.decay_factors``: in one launch. Its bits are those of torch.exp of the same product."""
    N = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    count, R, H = pairs.shape[0], N if per_document else 1, log_decay.numel()
    out = torch.empty(count, R, H, device=log_decay.device, dtype=torch.float32)
    launch(
        decay_kernel, cdiv(out.numel(), 128), (log_decay, pairs, bounds, cu_seqlens, out),
        (N, length, per_document or 1, count, R, H),
        (cu_seqlens is not None, per_document > 0, bounds is not None, 128),
        num_warps=4,
    )  # fmt: skip
    return out
