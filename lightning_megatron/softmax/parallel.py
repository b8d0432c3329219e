"""Softmax attention over context-parallel ranks: which keys a rank's queries need, and how their gradients go back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from ..ops.merge import merge_parts
from ..ops.once import once_differentiable

aten = torch.ops.aten


class Gather(torch.autograd.Function):
    """``rows`` (None: all) of the tokens ``[P * s, ...]`` of all ranks, of each rank's ``[s, ...]``; no row more than
    twice.
    """

    @staticmethod
    def forward(ctx, x, rows, group):
        ctx.save_for_backward(rows)
        ctx.group, ctx.tokens = group, x.shape[0]
        everything = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(everything, x.contiguous(), group=group)
        return everything if rows is None else everything.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        # In fp32, which sends twice the bytes of bf16: up to 2P pieces add to a token, and bf16 would round after each
        # of them
        wide = torch.promote_types(grad.dtype, torch.float32)
        if rows is None:
            everything = grad.to(wide).contiguous()
        else:
            everything = grad.new_zeros(ctx.group.size() * ctx.tokens, *grad.shape[1:], dtype=wide)
            everything.index_add_(0, rows, grad.to(wide))  # 0 + a + b: in either order the same
        mine = everything.new_empty(ctx.tokens, *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, everything, group=ctx.group)
        return mine.to(grad.dtype), None, None


class OverRanks(torch.autograd.Function):
    """Causal attention of rank r's chunks r and 2P-1-r of the 2P of a sequence to all keys before them.

    Three calls of a kernel that knows no mask but none and the square one, whatever P: both chunks to themselves,
    under the mask; both to the first chunks of the ranks before, 0 to r-1; and the second one to both chunks of the
    ranks behind, which lie one after the other where ranks do. Every rank computes as much as another. A log-sum-exp of
    each makes one softmax of them (``merge_parts``), and their backward takes that of the whole.

    With ``exchange`` k and v are this rank's. While ranks gather those of all, the chunks attend to themselves;
    gradients of other ranks' keys are sent to them, in the dtype of keys, while those of the own are computed. A rank
    adds what it gets in fp32 and rounds once.

    Args:
        q: ``[t, b, heads, d]``.
        k, v: ``[t, b, groups, d]``, or without ``exchange`` ``[P * t, b, groups, d]``, one rank's behind another's.
        kernel: what ``merging_kernel`` found.
    """

    @staticmethod
    def forward(ctx, q, k, v, group, scale, kernel, exchange):
        P, r, t = group.size(), group.rank(), q.shape[0]
        if exchange:
            own = k, v
            (k, wait_k), (v, wait_v) = (_start_gather(x, group) for x in own)
        else:
            own = _own(k, r, t), _own(v, r, t)
        heads = _heads_first(q)
        found = [(0, *kernel(heads, *map(_heads_first, own), True, scale))]
        if exchange:
            wait_k(), wait_v()
        for start, rows in _others(P, r, t):
            seen = (_heads_first(rows(x).flatten(0, 1)) for x in (k, v))
            found.append((start, *kernel(heads[:, :, start:], *seen, False, scale)))
        o, lse = merge_parts([(x, log.view(x.shape[:3]), start) for start, x, log, _ in found])
        ctx.again, ctx.shape = [again for *_, again in found], found[0][2].shape[3:]
        ctx.group, ctx.exchange = group, exchange
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        group, (near, *far) = ctx.group, ctx.again
        P, r, t = group.size(), group.rank(), q.shape[0]

        def grads(again, start: int, keys, values):
            """Of queries, keys and values, ``[tokens, b, heads or groups, d]``."""
            inputs = (_heads_first(x) for x in (do[start:], q[start:], keys, values, o[start:]))
            log = lse[..., start:].contiguous()
            return [x.permute(2, 0, 1, 3) for x in again(*inputs, log.view(*log.shape, *ctx.shape))]

        others = _others(P, r, t)
        apart = [
            grads(again, at, *(rows(x).flatten(0, 1) for x in (k, v)))
            for again, (at, rows) in zip(far, others, strict=True)
        ]
        received = [_start_return([g[i] for g in apart], group, t) for i in (1, 2)] if ctx.exchange else []
        dq, *own = grads(near, 0, _own(k, r, t), _own(v, r, t))
        dq = _sum(dq, [(slice(at, None), g[0][None]) for g, (at, _) in zip(apart, others, strict=True)])
        if ctx.exchange:
            dk, dv = (_sum(x, addends()) for x, addends in zip(own, received, strict=True))
        else:
            dk, dv = (torch.zeros_like(x) for x in (k, v))
            for i, (whole, mine) in enumerate(zip((dk, dv), own, strict=True), 1):
                _own(whole, r, t).copy_(mine)
                for g, (_, rows) in zip(apart, others, strict=True):
                    theirs = rows(whole)
                    theirs.copy_(g[i].unflatten(0, theirs.shape[:2]))
        return dq, dk, dv, None, None, None, None


def _own(x: torch.Tensor, r: int, t: int) -> torch.Tensor:
    return x[r * t : (r + 1) * t]


def _others(P: int, r: int, t: int) -> list[tuple[int, Callable]]:
    """Pairs of a rank's first query and the keys of others that all queries from there on see.

    These are a function of all ranks' tokens ``[P * t, ...]``, which returns a view ``[ranks, keys of each, ...]``.
    """

    def before(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (P, 2, t // 2))[:r, 0]

    def behind(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (P, t))[r + 1 :]

    return [(0, before)] * (r > 0) + [(t // 2, behind)] * (r < P - 1)


def _start_gather(x: torch.Tensor, group) -> tuple[torch.Tensor, Callable]:
    """All ranks' x ``[P * t, ...]``, and what waits for it."""
    everything = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    return everything, dist.all_gather_into_tensor(everything, x.contiguous(), group=group, async_op=True).wait


def _start_return(grads: list[torch.Tensor], group, t: int) -> Callable[[], list[tuple[slice, torch.Tensor]]]:
    """Sends gradients of other ranks' keys, as ``_others`` has them; what is returned waits for those of the own.

    To a rank before go those of its first chunk, to one behind those of both: so half a chunk's bytes less on average,
    and half of those that fp32 has.
    """
    P, r, n = group.size(), group.rank(), t // 2
    message = torch.cat(grads) if len(grads) > 1 else grads[0].contiguous()
    received = message.new_empty((r * t + (P - 1 - r) * n), *message.shape[1:])
    sizes = [t] * r + [0] + [n] * (P - 1 - r), [n] * r + [0] + [t] * (P - 1 - r)
    work = dist.all_to_all_single(received, message, *sizes, group=group, async_op=True)

    def wait() -> list[tuple[slice, torch.Tensor]]:
        work.wait()
        before, behind = received[: r * t], received[r * t :]
        found = [(slice(None), before.view(r, t, *message.shape[1:]))] * (r > 0)
        return found + [(slice(n), behind.view(P - 1 - r, n, *message.shape[1:]))] * (r < P - 1)

    return wait


def _sum(x: torch.Tensor, addends: list[tuple[slice, torch.Tensor]]) -> torch.Tensor:
    """x plus sums over the first dimension of addends of some of its rows, rounded once; x may be changed."""
    if sum(len(parts) for _, parts in addends) == 1:
        ((rows, parts),) = addends
        x[rows] += parts[0]
        return x.contiguous()
    total = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    for rows, parts in addends:
        total[rows] += parts.sum(0, dtype=total.dtype)
    return total.to(x.dtype).contiguous()


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(1, 2, 0, 3)


def _cudnn(q, k, v, causal: bool, scale: float | None):
    o, lse, *rest = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    *lengths, seed, offset = rest[:6]

    def again(do, q, k, v, o, lse):
        return aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, lse, seed, offset, None, *lengths, 0.0, causal, scale=scale
        )

    return o, lse, again


def _cpu(q, k, v, causal: bool, scale: float | None):
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)

    def again(do, q, k, v, o, lse):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, causal, scale=scale)

    return o, lse, again


# FlashAttention itself knows the mask of the last queries of more keys, and needs no merging
_MERGING = {("cuda", SDPBackend.CUDNN_ATTENTION): _cudnn, ("cpu", SDPBackend.FLASH_ATTENTION): _cpu}


def merging_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Callable | None:
    """What ``OverRanks`` takes, if scaled_dot_product_attention would choose it for the causal part."""
    if q.device.type == "cpu" and q.shape[2] != k.shape[2]:
        return None  # its gradients are of as many heads
    own = (_heads_first(x[: q.shape[0] // 2]) for x in (q, k, v))
    choice = torch._fused_sdp_choice(*own, None, 0.0, True, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return _MERGING.get((q.device.type, SDPBackend(choice)))


def sequence(tokens: int, P: int, device: torch.device) -> torch.Tensor:
    """Rows of the whole sequence, from its begin, among the tokens of all ranks, each with its chunks r and 2P-1-r."""
    chunks = torch.arange(P * tokens, device=device).view(P, 2, tokens // 2)
    return torch.cat((chunks[:, 0], chunks[:, 1].flip(0))).flatten()


def pieces_of_documents(
    chunks: torch.Tensor, tokens: int, P: int, r: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What rank r's pieces attend to: of every document chunks r and 2P-1-r, to its tokens up to their end.

    Args:
        chunks: ``[N]``, tokens of a chunk of each document.
        tokens: of a rank.

    Returns:
        Rows of the pieces' keys among the tokens of all ranks, ``[(2P + 1) tokens / 2]``; bounds of the pieces and of
        their keys, ``[2N + 1]``.
    """
    keys = torch.stack(((r + 1) * chunks, (2 * P - r) * chunks), 1).flatten()
    bounds_q, bounds_k = (F.pad(x.cumsum(0), (1, 0)) for x in (chunks.repeat_interleave(2), keys))
    piece = torch.repeat_interleave(keys, output_size=(2 * P + 1) * tokens // 2)
    document, place = piece // 2, torch.arange(piece.numel(), device=keys.device) - bounds_k[piece]
    n = chunks[document]
    chunk, offset = place // n, place % n
    second = chunk >= P
    rank = torch.where(second, 2 * P - 1 - chunk, chunk)
    return rank * tokens + bounds_q[2 * document] + second * n + offset, bounds_q, bounds_k


def joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Bounds of what lies one after the other."""
    return torch.cat((first, first[-1] + second[1:]))


def check_packed_bounds(tokens: int, chunks: int, bounds: torch.Tensor) -> None:
    ends = bounds.tolist()
    if ends[-1] != tokens:
        raise ValueError(
            f"packed_seq_params.cu_seqlens_q ends at {ends[-1]}, but all context-parallel ranks together have {tokens} "
            "tokens; give bounds in the whole packed sequence"
        )
    for document, (a, b) in enumerate(pairwise(ends)):
        if (b - a) % chunks:
            raise ValueError(
                f"with per_document=True every document is cut into {chunks} equal chunks, but document {document} "
                f"has {b - a} tokens; pad documents to a multiple of {chunks}, or set per_document=False for a "
                "sequence cut as a whole"
            )
