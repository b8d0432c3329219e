"""The public operator: validation, choice of the implementation, autograd."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType

import torch

from . import torch_backend

logger = logging.getLogger(__name__)

MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 16, 256, 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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

    The same inputs give the same bits, run after run. On a GPU a long sequence is cut into as many segments as fill it, so
    that among others in a batch, or with fewer heads, it may be rounded otherwise; after
    ``torch.use_deterministic_algorithms(True)`` (Megatron's --deterministic-mode) not even that.

    Args:
        q: ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too with the torch backend). Any strides; fp32 means fp32 results.
        k: ``[B, T, Hkv, K]``, dtype of q. Hkv divides H: query head h uses key/value head ``h // (H / Hkv)``.
        v: ``[B, T, Hkv, V]``, dtype of q.
        log_decay: ``[H]`` fp32 (fp64 with fp64 inputs), finite and <= 0; natural logarithm of the decay per token.
        scale: factor on q k^T; default ``K ** -0.5``.
        initial_state: ``[N, H, K, V]`` fp32 (fp64 with fp64 inputs), the state before the first token of each sequence.
        output_final_state: also return the state after the last token.
        cu_seqlens: ``[N+1]`` int32 or int64, bounds of N documents packed along T, as in FlashAttention: starts at 0, never
            falls, ends at T; needs B = 1. Without it N = B.
        backend: ``"triton"``, ``"torch"``, or None (or ``"auto"``): triton for CUDA tensors, torch for all others.

    Returns:
        ``(o, final_state)``: o ``[B, T, H, V]`` in q's dtype, dense, in memory ``[B, T, H, V]`` or, from the triton backend
        where q is such a view, ``[T, B, H, V]``; final_state ``[N, H, K, V]`` fp32, or None.

    Raises:
        ValueError: any shape, dtype, device or value outside of the above. The values of log_decay and cu_seqlens are read
            once per tensor (one wait for the GPU for a new tensor; none while a CUDA graph is being captured).
    """
    check_shapes(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    implementation = choose_implementation(backend, q)
    check_values(log_decay, cu_seqlens, q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    # the kernels read along the head dim with stride 1; every other stride is free
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    log_decay = log_decay.detach().contiguous()
    return _LightningAttention.apply(
        implementation, q, k, v, log_decay, scale, initial_state, output_final_state, cu_seqlens
    )


class _LightningAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, implementation, q, k, v, log_decay, scale, initial_state, need_final, cu_seqlens):
        with torch.cuda.device_of(q):  # Triton launches on the current device; autograd sees to it in the backward
            o, final, saved, plan = implementation.forward(
                q, k, v, log_decay, scale, initial_state, cu_seqlens, need_final
            )
        ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens, *saved)
        ctx.implementation, ctx.scale, ctx.plan = implementation, scale, plan
        ctx.set_materialize_grads(False)
        return o, final if need_final else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, log_decay, initial_state, cu_seqlens, *saved = ctx.saved_tensors
        if do is None:  # only the final state was used
            do = q.new_zeros(*q.shape[:3], v.shape[3])
        do = do if do.stride(-1) == 1 else do.contiguous()
        dq, dk, dv, dinitial = ctx.implementation.backward(
            q, k, v, log_decay, ctx.scale, initial_state, cu_seqlens, saved, ctx.plan, do, dfinal
        )
        return None, dq, dk, dv, None, None, dinitial if initial_state is not None else None, None, None


@functools.cache
def _triton_interpreted() -> bool:
    import triton

    knobs = getattr(triton, "knobs", None)  # since Triton 3.4
    return bool(knobs.runtime.interpret) if knobs else os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _auto_backend(device_type: str) -> str:
    if device_type != "cuda":
        return "torch"
    if importlib.util.find_spec("triton") is None:
        logger.warning(
            "triton is not installed: lightning_attn uses its slower torch backend on the GPU; pip install triton"
        )
        return "torch"
    return "triton"


def choose_implementation(backend: str | None, q: torch.Tensor) -> ModuleType:
    if backend in (None, "auto"):
        backend = _auto_backend(q.device.type)
    if backend == "torch":
        return torch_backend
    if backend != "triton":
        raise ValueError(f"backend={backend!r} is unknown; choose 'triton', 'torch', or None to choose by device")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend='triton' needs the triton package, which is not installed; use backend='torch'")
    if q.device.type != "cuda" and not _triton_interpreted():
        raise ValueError(
            f"backend='triton' needs CUDA tensors, but q is on {q.device}; use backend='torch' or leave backend out"
        )
    if q.dtype == torch.float64:
        raise ValueError("q is float64, which the triton backend does not compute; use backend='torch', or fp32 inputs")
    from . import triton_backend

    return triton_backend


def check_shapes(q, k, v, log_decay, scale, initial_state, cu_seqlens) -> None:
    for name, x, axes in (("q", q, "B,T,H,K"), ("k", k, "B,T,Hkv,K"), ("v", v, "B,T,Hkv,V")):
        if x.dim() != 4:
            raise ValueError(f"{name} must have the 4 dimensions [{axes}], but has shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device: q is {q.dtype} on {q.device}, {name} is {x.dtype} on {x.device}"
            )
    if q.dtype not in (*_DTYPES, torch.float64):
        raise ValueError(f"q has dtype {q.dtype}; lightning_attn computes bfloat16, float16 and float32")
    B, T, H, K = q.shape
    Hkv, V = v.shape[2:]
    if k.shape != (B, T, Hkv, K) or v.shape[:2] != (B, T):
        raise ValueError(
            f"shapes do not fit: q {list(q.shape)} is [B,T,H,K], so k must be [{B},{T},Hkv,{K}] and v [{B},{T},Hkv,V], "
            f"but k is {list(k.shape)} and v is {list(v.shape)}"
        )
    if Hkv == 0 or H == 0 or H % Hkv:
        raise ValueError(f"{H} query heads cannot share {Hkv} key/value heads: the second must divide the first")
    for name, dim in (("K", K), ("V", V)):
        if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM or dim % HEAD_DIM_STEP:
            raise ValueError(
                f"head dim {name}={dim} is not supported: it must be a multiple of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} to "
                f"{MAX_HEAD_DIM}; pad q and k (or v) with zeros, which changes nothing but the default scale"
            )
    state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if log_decay.shape != (H,) or log_decay.dtype != state_dtype or log_decay.device != q.device:
        raise ValueError(
            f"log_decay must be [{H}] (one entry per query head), {state_dtype} on {q.device}, but is "
            f"{list(log_decay.shape)}, {log_decay.dtype} on {log_decay.device}"
        )
    if log_decay.requires_grad:
        raise ValueError("log_decay requires grad, but lightning attention has fixed decays; pass log_decay.detach()")
    if scale is not None and not (isinstance(scale, (int, float)) and abs(scale) < float("inf")):
        raise ValueError(f"scale={scale!r} must be a finite number, or None for K ** -0.5 = {K**-0.5:.4g}")
    sequences = B
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(
                f"cu_seqlens packs documents along T and needs B = 1, but q has B = {B}; reshape to [1, B*T, ...]"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be [N+1] int32 or int64 with N >= 1, but is {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, but q is on {q.device}; move it there")
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        if initial_state.shape != (sequences, H, K, V):
            raise ValueError(
                f"initial_state must be [N,H,K,V] = [{sequences},{H},{K},{V}] (N = "
                f"{'documents in cu_seqlens' if cu_seqlens is not None else 'batch size'}), but is {list(initial_state.shape)}"
            )
        if initial_state.dtype != state_dtype or initial_state.device != q.device:
            raise ValueError(
                f"initial_state must be {state_dtype} on {q.device} (states are not kept in low precision), but is "
                f"{initial_state.dtype} on {initial_state.device}"
            )


def check_values(log_decay: torch.Tensor, cu_seqlens: torch.Tensor | None, T: int) -> None:
    """Checks that must read tensors."""
    check_once(log_decay, _check_log_decay)
    if cu_seqlens is not None:
        check_once(cu_seqlens, _check_cu_seqlens, T)


def check_once(tensor: torch.Tensor, check: Callable, *arguments: int) -> None:
    """``check(tensor, *arguments)``, which waits for the GPU, once per tensor and version: marks on the tensor remember."""
    # tensors made in torch.inference_mode have no version and are checked every time
    mark = None if tensor.is_inference() else (tensor._version, check.__name__, arguments)
    marks = getattr(tensor, "_lightning_checked", ())
    if mark in marks:
        return
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # reading would break the capture; the warm-up before it has checked
    check(tensor, *arguments)
    if mark is not None:
        tensor._lightning_checked = {mark}.union(x for x in marks if x[0] == tensor._version)


def _check_log_decay(log_decay: torch.Tensor) -> None:
    bad = ~(torch.isfinite(log_decay) & (log_decay <= 0))
    if bool(bad.any()):
        head = int(bad.int().argmax())
        raise ValueError(
            f"log_decay[{head}] = {float(log_decay[head])}: every entry must be finite and <= 0 (0 keeps the whole state, "
            "-0.1 keeps exp(-0.1) = 90% of it per token); did you pass a slope, which is -log_decay, or a decay?"
        )


def _check_cu_seqlens(cu_seqlens: torch.Tensor, T: int) -> None:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(f"cu_seqlens must start at 0 and end at T = {T}, but goes from {bounds[0]} to {bounds[-1]}")
    for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if b < a:
            raise ValueError(f"cu_seqlens must never fall, but cu_seqlens[{n}] = {a} is followed by {b}")
