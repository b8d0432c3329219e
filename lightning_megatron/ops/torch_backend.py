"""Chunked lightning attention in plain torch: any device, deterministic, fp32 inside (fp64 for fp64 inputs).

fp32 means fp32: torch's setting for the precision of fp32 matrix products changes nothing here, see ``_matmul``.

The same chunk identities as the Triton kernels (see triton/kernels.py), with all chunks' products in one batched matmul
and a Python loop only over the running state. Packed sequences are walked one document after another.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch

from .backend import Destination, Documents

NAME = "torch"
DIRECT = False
CHUNK = 64


def _without_autocast(function):
    """Autocast would run these fp32 matmuls in half precision."""

    @functools.wraps(function)
    def wrapper(q, *args, **kwargs):
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **kwargs)

    return wrapper


def _fp32_is_reduced() -> bool:
    """Whether torch may multiply fp32 matrices in less than fp32: TF32 on GPUs, bf16 or TF32 on CPUs that have it."""
    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    try:  # the older interface raises where a user has set the newer one
        return any(x.fp32_precision not in ("ieee", "none") for x in matmuls)
    except AttributeError:  # torch before 2.9
        return torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` to the accuracy of a's dtype, whatever ``torch.set_float32_matmul_precision`` says.

    Where that setting allows less than fp32, the product is computed in fp64: the setting is global, and changing it
    even for a moment would change it for the user's other threads.
    """
    if a.dtype == torch.float32 and a.device.type != "mps" and _fp32_is_reduced():  # Apple's GPUs have neither
        return (a.double() @ b.double()).to(a.dtype)
    return a @ b


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor | None,
    *,
    reverse: bool,
    read_scale: float,
    write_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence batch ``[B, H, T, *]`` -> ``(o, outgoing state [B, H, K, V])``.

    Forward: o_i = scale (sum_{j<=i} lambda^(i-j) (q_i.k_j) v_j + lambda^(i+1) q_i S_in), scale = read_scale, and
    S_out = lambda^T S_in + sum_j lambda^(T-1-j) k_j^T v_j.
    Reverse: o_i = scale sum_{j>=i} lambda^(j-i) (q_i.k_j) v_j + lambda^(T-1-i) q_i S_in, scale = write_scale, and
    S_out = lambda^T S_in + scale sum_j lambda^(j+1) k_j^T v_j: scale and one more decay go into the state as it is
    written, so that a final state's gradient enters as it is and no negative power is ever needed.
    """
    B, H, T, K = q.shape
    V = v.shape[-1]
    if T == 0:  # an empty document hands its state on
        return v, q.new_zeros(B, H, K, V) if state is None else state.to(q.dtype)
    C = min(CHUNK, T)
    N = -(-T // C)
    pad = N * C - T
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad)).view(B, H, N, C, x.shape[3]) for x in (q, k, v))

    ld = log_decay.to(q.dtype).view(H, 1, 1, 1)
    i = torch.arange(C, device=q.device, dtype=q.dtype)
    count = torch.full((N, 1), C, device=q.device, dtype=q.dtype)  # tokens of each chunk: the last may be short
    count[-1:] -= pad
    left, right = i + 1, (count - 1 - i).clamp(min=0)  # [C], [N, C]
    read, write = (right, left) if reverse else (left, right)
    distance = (i[None, :] - i[:, None]) if reverse else (i[:, None] - i[None, :])
    weights = torch.where(distance >= 0, (ld * distance).clamp(max=0).exp(), 0)

    products = _matmul(q, k.transpose(-1, -2)) * weights
    o = _matmul(products, v) * (write_scale if reverse else read_scale)
    written = _matmul(k.transpose(-1, -2), v * ((ld * write[..., None]).exp() * write_scale))  # [B, H, N, K, V]
    carry = (ld * count.view(1, N, 1, 1)).exp()  # [H, N, 1, 1]

    state = q.new_zeros(B, H, K, V) if state is None else state.to(q.dtype)
    incoming = []
    for n in reversed(range(N)) if reverse else range(N):
        incoming.append(state)
        state = carry[:, n] * state + written[:, :, n]
    states = torch.stack(incoming[::-1] if reverse else incoming, dim=2)
    o = o + _matmul(q, states) * ((ld * read[..., None]).exp() * read_scale)
    return o.reshape(B, H, N * C, V)[:, :, :T], state


def _heads_first(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, Hx, D] -> [B, H, T, D] in the computation dtype, each k and v head repeated for its group."""
    x = x.transpose(1, 2).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _runs(documents: Documents | None, B: int, T: int) -> list[tuple[slice, slice, slice, slice]]:
    """(rows, tokens, states that enter, states that leave) of each run: the whole batch, or one document at a time."""
    rows = slice(0, B)
    if documents is None:
        return [(rows, slice(0, T), rows, rows)]
    if not documents.by_row:  # states are those of documents
        bounds = documents.bounds[0].tolist()
        return [(rows, slice(a, b), slice(n, n + 1), slice(n, n + 1)) for n, (a, b) in enumerate(pairwise(bounds))]
    runs, none = [], slice(0, 0)
    for r, bounds in enumerate(documents.bounds.tolist()):  # of rows: of what documents have left and right of them
        row = slice(r, r + 1)
        runs += [(row, slice(a, b), none if a else row, row if b == T else none) for a, b in pairwise(bounds) if a < b]
    return runs


def _of(states: torch.Tensor | None, which: slice) -> torch.Tensor | None:
    return None if states is None or which.start == which.stop else states[which]


def _new_states(like: torch.Tensor, documents: Documents | None, V: int) -> torch.Tensor:
    """Zeros for the states that leave, of the inputs ``like [B, H, T, K]``."""
    B, H, _, K = like.shape
    N = B if documents is None or documents.by_row else documents.bounds.shape[1] - 1
    return like.new_zeros(N, H, K, V)


def _split(x: torch.Tensor, pieces: int) -> torch.Tensor:
    """``[B, pieces * T, ...]`` as ``[B * pieces, T, ...]``."""
    return x.unflatten(1, (pieces, -1)).flatten(0, 1)


@_without_autocast
def forward(q, k, v, log_decay, scale, initial_state, documents, need_final, split_states=None, pieces=1):
    """See ``Backend.forward``; the backward recomputes its states."""
    del need_final, split_states  # the first costs nothing here, the second does not exist
    result = q.new_empty(*q.shape[:3], v.shape[3])  # not a view: the caller may change it in place
    q, k, v, o = (_split(x, pieces) for x in (q, k, v, result))
    B, T, H, _ = q.shape
    qh, kh, vh = (_heads_first(x, H) for x in (q, k, v))
    o, final = o.transpose(1, 2), _new_states(qh, documents, v.shape[3])
    for rows, tokens, enters, leaves in _runs(documents, B, T):
        qs, ks, vs = (x[rows, :, tokens] for x in (qh, kh, vh))
        s0 = _of(initial_state, enters)
        o[rows, :, tokens], state = _attend(qs, ks, vs, log_decay, s0, reverse=False, read_scale=scale, write_scale=1.0)
        final[leaves] = state
    return result, final, (), None


def plan_of(q, v, packed: bool) -> None:
    """See ``Backend.plan_of``."""


def outputs_like(q, k, v, packed: bool):
    """See ``Backend.outputs_like``."""
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(0), q.new_empty(0)


def gradients_like(q, k, v):
    """See ``Backend.gradients_like``."""
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@_without_autocast
def backward(q, k, v, log_decay, scale, initial_state, documents, saved, plan, do, dfinal, split_grads=None, pieces=1):
    """Gradients ``(dq, dk, dv, dinitial)``: three more calls of the same operator (triton/kernels.py says which)."""
    del saved, plan, split_grads
    dfinal = dfinal() if callable(dfinal) else dfinal
    tokens_of_all = q.shape[:2]
    q, k, v, do = (_split(x, pieces) for x in (q, k, v, do))
    B, T, H, _ = q.shape
    qh, kh, vh, doh = (_heads_first(x, H) for x in (q, k, v, do))
    (dq, dk, dv), dinitial = (torch.empty_like(x) for x in (qh, kh, vh)), _new_states(qh, documents, v.shape[3])
    for rows, tokens, enters, leaves in _runs(documents, B, T):
        qs, ks, vs, dos = (x[rows, :, tokens] for x in (qh, kh, vh, doh))
        s0, d0 = _of(initial_state, enters), _of(dfinal, leaves)
        s0_t, d0_t = (None if x is None else x.transpose(-1, -2) for x in (s0, d0))
        dq[rows, :, tokens], _ = _attend(dos, vs, ks, log_decay, s0_t, reverse=False, read_scale=scale, write_scale=1.0)
        dk[rows, :, tokens], _ = _attend(vs, dos, qs, log_decay, d0_t, reverse=True, read_scale=1.0, write_scale=scale)
        dv[rows, :, tokens], state = _attend(
            ks, qs, dos, log_decay, d0, reverse=True, read_scale=1.0, write_scale=scale
        )
        dinitial[enters] = state
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    group = H // k.shape[2]
    if group > 1:
        dk, dv = (x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))
    dq, dk, dv = (dx.to(q.dtype).reshape(*tokens_of_all, *dx.shape[2:]) for dx in (dq, dk, dv))
    return dq, dk, dv, dinitial


def combine(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See ``Backend.combine``.

    A state of weight 0 belongs to another document and adds nothing, even if it holds infinities or NaN.
    """
    total = states.new_zeros(weights.shape[0], *states.shape[1:])
    for state, weight in zip(states, weights.unbind(1), strict=True):  # no product of matrices: 0 times NaN is NaN
        weight = weight[..., None, None]
        total += torch.where(weight == 0, 0.0, weight * state)
    return total


def local_states(
    k, v, log_decay, initial_state, documents, reverse=False, scale=1.0, pieces=1,
    destination: Destination | None = None, first=0,
):  # fmt: skip
    """See ``Backend.local_states``; there are no splits here, and no destination."""
    assert destination is None
    del first  # of the destination
    states = final_states(_split(k, pieces), _split(v, pieces), log_decay, initial_state, documents, reverse, scale)
    if documents is not None and not documents.by_row:  # of the document of the last token, reversed of the first
        at = torch.searchsorted(documents.bounds[0], 0 if reverse else k.shape[1] - 1, right=True) - 1
        states = states[at.clamp(0, states.shape[0] - 1)][None]  # of no tokens: any, for all are zero
    return states, None


@_without_autocast
def final_states(k, v, log_decay, initial_state, documents, reverse=False, scale=1.0):
    """See ``Backend.final_states``."""
    H = log_decay.numel()
    kh, vh = (_heads_first(x, H) for x in (k, v))
    final = _new_states(kh, documents, v.shape[3])
    for rows, tokens, *edges in _runs(documents, *k.shape[:2]):
        enters, leaves = reversed(edges) if reverse else edges
        ks, vs = kh[rows, :, tokens], vh[rows, :, tokens]
        state = _attend(
            ks, ks, vs, log_decay, _of(initial_state, enters), reverse=reverse, read_scale=1.0, write_scale=scale
        )[1]
        final[leaves] = state
    return final


def find_documents(
    cu_seqlens: torch.Tensor, T: int, total: int, starts: tuple[int, ...] | None = None, per_document: int = 0
) -> Documents:
    """See ``Backend.find_documents``."""
    del total
    cu_seqlens = cu_seqlens.detach().long()
    if per_document:  # pieces end at the middle of a document's tokens on this rank, and at their end
        edges = torch.stack((2 * cu_seqlens[:-1], cu_seqlens[:-1] + cu_seqlens[1:]), 1).flatten()
        bounds = torch.cat((edges, 2 * cu_seqlens[-1:]))[None] // per_document
    elif starts is not None:
        bounds = torch.stack([(cu_seqlens - start).clamp(0, T) for start in starts])
    else:
        bounds = cu_seqlens[None]
    return Documents(None, bounds.to(torch.int32, copy=True), starts is not None)


def decay_factors(
    log_decay: torch.Tensor,
    pairs: torch.Tensor,
    *,
    length: int = 0,
    bounds: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    per_document: int = 0,
) -> torch.Tensor:
    """See ``Backend.decay_factors``."""
    a, b = (x.long()[:, None] for x in pairs.unbind(1))
    left = a <= b
    if per_document:
        assert cu_seqlens is not None
        tokens = (b - a) * (cu_seqlens.diff().long() // per_document)
    else:
        begin, end = (x * length if bounds is None else bounds[x] for x in (a, b))
        tokens = end - begin  # in integers: fp32 ends at 2^24 tokens
        if cu_seqlens is not None:
            left = left & ~((cu_seqlens >= begin) & (cu_seqlens <= end)).any(1, keepdim=True)
    return torch.where(left[..., None], torch.exp(tokens.clamp(min=0)[..., None] * log_decay), 0.0)
