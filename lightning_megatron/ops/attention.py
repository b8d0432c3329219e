"""The public operator and its autograd function."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from . import torch_backend
from .backend import Backend, Documents, choose, device_of
from .checks import check_part, check_shapes, check_values, state_dtype_of
from .kept import keep
from .once import once_differentiable

DENSE = torch.contiguous_format


def lightning_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Lightning attention: causal linear attention with one fixed decay per head.

    With ``lambda_h = exp(log_decay[h])`` and a state S that includes the current token::

        S_t = lambda_h S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

    computed in chunks (Lightning Attention-2, Qin et al. 2024, arXiv:2401.04658, section 3.2), in time linear in T.
    Differentiable in q, k, v and initial_state, also through the final state. log_decay is a constant.

    The same inputs give the same bits, run after run. On a GPU a long sequence is cut into as many segments as fill it,
    so that among others in a batch, or with fewer heads, it may be rounded otherwise; after
    ``torch.use_deterministic_algorithms(True)`` (Megatron's --deterministic-mode) not even that.

    Args:
        q: ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too with the torch backend). Any strides; fp32 means fp32 results.
        k: ``[B, T, Hkv, K]``, dtype of q. Hkv divides H: query head h uses key/value head ``h // (H / Hkv)``.
        v: ``[B, T, Hkv, V]``, dtype of q.
        log_decay: ``[H]`` fp32 (fp64 with fp64 inputs), finite and <= 0; natural logarithm of the decay per token.
        scale: factor on q k^T; default ``K ** -0.5``.
        initial_state: ``[N, H, K, V]`` fp32 (fp64 with fp64 inputs), the state before the first token of each sequence.
        output_final_state: also return the state after the last token.
        cu_seqlens: ``[N+1]`` int32 or int64, bounds of N documents packed along T, as in FlashAttention: starts at 0,
            never falls, ends at T; needs B = 1. Without it N = B.
        backend: ``"triton"``, ``"torch"``, or None (or ``"auto"``): triton for CUDA tensors, torch for all others.

    Returns:
        ``(o, final_state)``: o ``[B, T, H, V]`` in q's dtype, dense, in memory ``[B, T, H, V]`` or, from the triton
        backend where q is such a view, ``[T, B, H, V]``; final_state ``[N, H, K, V]`` fp32, or None.

    Raises:
        ValueError: any shape, dtype, device or value outside of the above.

    Nothing derived from the values of log_decay and cu_seqlens is remembered: every call (and every replay of a CUDA
    graph) takes them as they are then, and its backward takes the same documents. Only the check of the values is not
    repeated: on a GPU it waits for them once for every tensor object and ``tensor._version``, and not while a CUDA
    graph is being captured. Values that change without raising the version, as by ``dist.broadcast``, a graph replay or
    a kernel of your own, are not checked again on the host; wrong cu_seqlens then end in an assertion on the device
    (triton backend). On a CPU all calls check.
    """
    if torch.compiler.is_compiling():
        check_shapes(q, k, v, log_decay, scale, initial_state, cu_seqlens)
        scale = None if scale is None else float(scale)
        given = q, k, v, log_decay, initial_state, cu_seqlens
        o, final, *_ = torch.ops.lightning_megatron.attention(*given, scale, output_final_state, backend)
        return o, final if output_final_state else None
    call = _checked(q, k, v, log_decay, scale, initial_state, output_final_state, cu_seqlens, backend)
    return _LightningAttention.apply(call, q, k, v, log_decay, initial_state, cu_seqlens)


def packed_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    start: int,
    total: int,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``lightning_attn`` of some consecutive tokens of packed documents, which may begin and end inside of documents.

    Differentiable in q, k, v and initial_state, also through the state. Part after part, each with the state that the
    one before it returned, computes what ``lightning_attn`` does of all tokens with these cu_seqlens. torch.compile
    does not trace it: inside of a compiled function call ``torch.compiler.disable(packed_part)``.

    Args:
        q, k, v, log_decay, scale, backend: as of ``lightning_attn``; B = 1, and at least one token.
        start: the first of the tokens, of ``total`` ones that all documents have; start + T is at most total.
        cu_seqlens: ``[N+1]`` int32 or int64, bounds of all documents: starts at 0, never falls, ends at total.
        initial_state: ``[1, H, K, V]`` fp32 (fp64 with fp64 inputs), what the part before returned; None exactly where
            start is 0. It counts where a document goes on from there.

    Returns:
        ``(o [1, T, H, V], state [1, H, K, V])``: o as of ``lightning_attn``, and the state
        of the last token's document.

    Raises:
        ValueError: as ``lightning_attn``; and a start, a total or an initial_state outside of the above.

    Example::

        state, outputs = None, []
        for a in range(0, T, 4096):
            part = [x[:, a : a + 4096] for x in (q, k, v)]
            o, state = packed_part(*part, log_decay, start=a, total=T, cu_seqlens=cu_seqlens, initial_state=state)
            outputs.append(o)
    """
    part = start, total
    call = _checked(q, k, v, log_decay, scale, initial_state, True, cu_seqlens, backend, part)._replace(part=part)
    if initial_state is not None:  # chosen, not multiplied by 0: another document's NaN stays there
        initial_state = torch.where((cu_seqlens == start).any(), 0.0, initial_state)
    return _LightningAttention.apply(call, q, k, v, log_decay, initial_state, cu_seqlens)


class _Call(NamedTuple):
    """What follows from the arguments that are no tensors, and from shapes, dtypes and devices."""

    backend: Backend
    scale: float
    need_final: bool
    part: tuple[int, int] | None = None
    """Of packed documents: the first token, and the number of all."""


_calls: dict[Hashable, _Call] = {}


def _checked(q, k, v, log_decay, scale, initial_state, need_final, cu_seqlens, backend, part=None) -> _Call:
    """Check everything: shapes, dtypes and devices once for each set of them, values as ``check_values`` does."""
    key: Hashable
    try:
        key = (
            q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device,
            log_decay.shape, log_decay.dtype, log_decay.device, log_decay.requires_grad, scale, need_final, backend,
            None if initial_state is None else (initial_state.shape, initial_state.dtype, initial_state.device),
            None if cu_seqlens is None else (cu_seqlens.shape, cu_seqlens.dtype, cu_seqlens.device), part is None,
        )  # fmt: skip
        call = _calls.get(key)
    except (AttributeError, TypeError):  # something that is no tensor, or a scale that is no number
        key = call = None
    if call is None:
        check_shapes(q, k, v, log_decay, scale, initial_state, cu_seqlens, part=part is not None)
        call = _call(q, scale, need_final, backend)
        if key is not None:
            keep(_calls, key, call)
    if part is None:
        check_values(log_decay, cu_seqlens, q.shape[1])
    else:
        start, total = part
        check_part(start, total, q.shape[1], initial_state)
        check_values(log_decay, cu_seqlens, total, "total")
    return call


def _call(q, scale, need_final, backend) -> _Call:
    return _Call(choose(backend, q), q.shape[-1] ** -0.5 if scale is None else float(scale), bool(need_final))


def _forward(call: _Call, q, k, v, log_decay, initial_state, cu_seqlens):
    """Results, and what the backward needs: q, k, v and log_decay as the kernels read them, ids and bounds of
    documents, tensors of the backend; and its plan.
    """
    # the kernels read along the head dim with stride 1; every other stride is free
    if not (q.stride(-1) == k.stride(-1) == v.stride(-1) == 1):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    log_decay, documents, ids, bounds = log_decay.contiguous(), None, None, None
    with device_of(q):  # Triton launches on the current device; autograd sees to it in the backward
        if cu_seqlens is not None:
            start, total = call.part or (None, q.shape[1])
            documents = ids, bounds, _ = call.backend.find_documents(
                cu_seqlens, q.shape[1], total, starts=None if start is None else (start,)
            )
        o, final, saved, plan = call.backend.forward(
            q, k, v, log_decay, call.scale, initial_state, documents, call.need_final
        )
    return o, final if call.need_final else None, (q, k, v, log_decay, initial_state, ids, bounds, *saved), plan


def _backward(call: _Call, saved, plan, do, dfinal):
    """Gradients of q, k, v and initial_state."""
    q, k, v, log_decay, initial_state, ids, bounds, *rest = saved
    documents = None if bounds is None else Documents(ids, bounds, by_row=call.part is not None)
    if do is None:  # only the final state was used
        do = q.new_zeros(*q.shape[:3], v.shape[3])
    do = do if do.stride(-1) == 1 else do.contiguous()
    dq, dk, dv, dinitial = call.backend.backward(
        q, k, v, log_decay, call.scale, initial_state, documents, tuple(rest), plan, do, dfinal
    )
    return dq, dk, dv, None if initial_state is None else dinitial


class _LightningAttention(torch.autograd.Function):
    """In eager mode. The same as ``torch.ops.lightning_megatron.attention`` below, which costs three
    times the host time.
    """

    @staticmethod
    def forward(ctx, call, q, k, v, log_decay, initial_state, cu_seqlens):
        o, final, saved, plan = _forward(call, q, k, v, log_decay, initial_state, cu_seqlens)
        ctx.save_for_backward(*saved)
        ctx.call, ctx.plan = call, plan
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        dq, dk, dv, dinitial = _backward(ctx.call, ctx.saved_tensors, ctx.plan, do, dfinal)
        return None, dq, dk, dv, None, dinitial, None


# ---- torch.compile ---------------------------------------------------------------------------------------------------
# It sees one operation each way, of which it knows shapes and strides. What is missing is a tensor of 0 elements.


def _or_empty(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if x is None else x


@torch.library.custom_op(
    "lightning_megatron::attention", mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? initial_state, Tensor? cu_seqlens, float? scale, "
    "bool need_final, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _attention(q, k, v, log_decay, initial_state, cu_seqlens, scale, need_final, backend):
    """o, final state, tensor of the backend, and ids and bounds of documents."""
    call = _checked(q, k, v, log_decay, scale, initial_state, need_final, cu_seqlens, backend)
    o, final, saved, _ = _forward(call, q, k, v, log_decay, initial_state, cu_seqlens)
    ids, bounds, states = (*saved[5:], None)[:3]
    return o, *(_or_empty(x, q) for x in (final, states)), *(_or_empty(x, q).int() for x in (ids, bounds))


@_attention.register_fake
def _(q, k, v, log_decay, initial_state, cu_seqlens, scale, need_final, backend):
    (B, _, H, K), packed = q.shape, cu_seqlens is not None
    o, states, ids = choose(backend, q).outputs_like(q, k, v, packed)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = q.new_empty((N, H, K, v.shape[3]), dtype=state_dtype_of(q)) if need_final else q.new_empty(0)
    return o, final, states, ids.int(), q.new_empty((1, N + 1) if packed else (0,), dtype=torch.int32)


@torch.library.custom_op(
    "lightning_megatron::attention_backward", mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? initial_state, Tensor states, Tensor ids, "
    "Tensor bounds, Tensor? do, Tensor? dfinal, float? scale, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _attention_backward(q, k, v, log_decay, initial_state, states, ids, bounds, do, dfinal, scale, backend):
    call = _call(q, scale, False, backend)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    ids, bounds, states = (x if x.numel() else None for x in (ids, bounds, states))
    saved = q, k, v, log_decay.contiguous(), initial_state, ids, bounds, states
    with device_of(q):
        *found, dinitial = _backward(call, saved, call.backend.plan_of(q, v), do, dfinal)
    found = [x.contiguous() if call.backend is torch_backend else x for x in found]
    return *found, _or_empty(dinitial, q)


@_attention_backward.register_fake
def _(q, k, v, log_decay, initial_state, states, ids, bounds, do, dfinal, scale, backend):
    dinitial = q.new_empty(0) if initial_state is None else torch.empty_like(initial_state, memory_format=DENSE)
    return *choose(backend, q).gradients_like(q, k, v), dinitial


def _keep(ctx, inputs, output):
    *tensors, _, ctx.scale, _, ctx.backend = inputs  # without cu_seqlens, which may change: documents are found
    _, _, states, ids, bounds = output
    ctx.save_for_backward(*tensors, states, ids, bounds)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dfinal, *_):
    saved = ctx.saved_tensors
    dq, dk, dv, dinitial = torch.ops.lightning_megatron.attention_backward(*saved, do, dfinal, ctx.scale, ctx.backend)
    return dq, dk, dv, None, None if saved[4] is None else dinitial, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)
