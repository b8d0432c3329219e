"""Softmax attention over context-parallel ranks: which keys a rank's queries need, and how their gradients go back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

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


class Merged(torch.autograd.Function):
    """Causal attention of queries to the keys up to their own, of the keys before and of their own apart.

    Kernels that know no mask but none and the square one do both halves, and a log-sum-exp of each makes one softmax of
    them (Dao et al. 2022, FlashAttention, section 3.1). Their backward takes the log-sum-exp of the whole.

    Args:
        q, k, v: ``[t, b, heads, d]``, ``[T, b, groups, d]`` twice.
        pieces: queries and the keys before their end, whose last are their own.
        kernel: what ``merging_kernel`` found.
    """

    @staticmethod
    def forward(ctx, q, k, v, pieces, scale, kernel):
        o, sums, ctx.again = q.new_empty(*q.shape[:3], v.shape[3]), [], []
        for queries, keys in pieces:
            found = None
            for part, causal in _parts(queries, keys):
                x, lse, again = kernel(*map(_heads_first, (q[queries], k[part], v[part])), causal, scale)
                ctx.again.append(again)
                if found is not None:
                    weight = torch.sigmoid(lse - found[1]).view(*x.shape[:3], 1)
                    x = torch.lerp(*(part.to(lse.dtype) for part in (found[0], x)), weight)
                    lse = torch.logaddexp(found[1], lse)
                found = x, lse
            o[queries] = found[0].permute(2, 0, 1, 3)
            sums.append(found[1])
        ctx.pieces = pieces
        ctx.save_for_backward(q, k, v, o, *sums)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, *sums = ctx.saved_tensors
        wide = torch.promote_types(
            q.dtype, torch.float32
        )  # a key's gradients come from several parts, and are rounded once
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        again = iter(ctx.again)
        for (queries, keys), lse in zip(ctx.pieces, sums, strict=True):
            for part, _ in _parts(queries, keys):
                inputs = map(_heads_first, (q[queries], k[part], v[part]))
                grads = next(again)(_heads_first(do[queries]), *inputs, _heads_first(o[queries]), lse)
                for total, rows, grad in zip((dq, dk, dv), (queries, part, part), grads, strict=True):
                    total[rows] += grad.permute(2, 0, 1, 3)
        return *(x.to(q.dtype) for x in (dq, dk, dv)), None, None, None


def _parts(queries: slice, keys: slice) -> list[tuple[slice, bool]]:
    """The keys before the queries' own, if any, and these, under the causal mask."""
    own = keys.stop - (queries.stop - queries.start)
    return [(slice(keys.start, own), False)] * (own > keys.start) + [(slice(own, keys.stop), True)]


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
    """What ``Merged`` takes, if scaled_dot_product_attention would choose it for the causal part; q, k, v as there."""
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
