"""The public operator and its autograd function."""

from __future__ import annotations

import torch

from .backend import Backend, Documents, choose
from .checks import check_shapes, check_values


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
    check_shapes(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    computing = choose(backend, q)
    check_values(log_decay, cu_seqlens, q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    # the kernels read along the head dim with stride 1; every other stride is free
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    log_decay = log_decay.detach().contiguous()
    return _LightningAttention.apply(
        computing, q, k, v, log_decay, scale, initial_state, output_final_state, cu_seqlens
    )


class _LightningAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: Backend, q, k, v, log_decay, scale, initial_state, need_final, cu_seqlens):
        with torch.cuda.device_of(q):  # Triton launches on the current device; autograd sees to it in the backward
            documents = None if cu_seqlens is None else backend.find_documents(cu_seqlens, q.shape[1], q.shape[1])
            o, final, saved, plan = backend.forward(q, k, v, log_decay, scale, initial_state, documents, need_final)
        ids, bounds = (None, None) if documents is None else documents[:2]
        ctx.save_for_backward(q, k, v, log_decay, initial_state, ids, bounds, *saved)
        ctx.backend, ctx.scale, ctx.plan = backend, scale, plan
        ctx.set_materialize_grads(False)
        return o, final if need_final else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, log_decay, initial_state, ids, bounds, *saved = ctx.saved_tensors
        documents = None if bounds is None else Documents(ids, bounds, by_row=False)
        if do is None:  # only the final state was used
            do = q.new_zeros(*q.shape[:3], v.shape[3])
        do = do if do.stride(-1) == 1 else do.contiguous()
        dq, dk, dv, dinitial = ctx.backend.backward(
            q, k, v, log_decay, ctx.scale, initial_state, documents, tuple(saved), ctx.plan, do, dfinal
        )
        return None, dq, dk, dv, None, None, dinitial if initial_state is not None else None, None, None
