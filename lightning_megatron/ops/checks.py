"""What the operator is given: checks of shapes, dtypes, devices and values."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable

import torch

MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 16, 256, 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_shapes(q, k, v, log_decay, scale, initial_state, cu_seqlens, *, part: bool = False) -> None:
    """``part``: cu_seqlens must be there, and one state enters, of the document that goes on."""
    given = dict(q=q, k=k, v=v, log_decay=log_decay)
    given |= {} if initial_state is None else dict(initial_state=initial_state)
    given |= {} if cu_seqlens is None and not part else dict(cu_seqlens=cu_seqlens)
    check_tensors(**given)
    check_heads(q, k, v, log_decay, scale)
    B, T, H, K = q.shape
    V, state_dtype = v.shape[-1], state_dtype_of(q)
    sequences = B
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(
                f"cu_seqlens packs documents along T and needs B = 1, but q has B = {B}; reshape to [1, B*T, ...]"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be [N+1] int32 or int64 with N >= 1, but is {list(cu_seqlens.shape)} "
                f"{cu_seqlens.dtype}"
            )
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, but q is on {q.device}; move it there")
        sequences = 1 if part else cu_seqlens.numel() - 1
    if initial_state is not None:
        if initial_state.shape != (sequences, H, K, V):
            counted = "the document that goes on" if part else "documents in cu_seqlens"
            raise ValueError(
                f"initial_state must be [N,H,K,V] = [{sequences},{H},{K},{V}] (N = "
                f"{counted if cu_seqlens is not None else 'batch size'}), but is {list(initial_state.shape)}"
            )
        if initial_state.dtype != state_dtype or initial_state.device != q.device:
            raise ValueError(
                f"initial_state must be {state_dtype} on {q.device} (states are not kept in low precision), but is "
                f"{initial_state.dtype} on {initial_state.device}"
            )


def check_part(start: int, total: int, T: int, initial_state: torch.Tensor | None) -> None:
    """Of packed documents: T tokens from ``start`` on, of ``total`` ones."""
    for name, x in (("start", start), ("total", total)):
        if not isinstance(x, int) or isinstance(x, bool):
            raise ValueError(f"{name} must be an int, a number of tokens, but is {x!r:.40} ({type(x).__name__})")
    if T == 0:
        raise ValueError(
            "a part of packed documents has at least one token, but q has T = 0; leave it out, and give the next "
            "one the state of the one before"
        )
    if not 0 <= start <= total - T:
        raise ValueError(
            f"tokens {start} to {start + T} (start = {start}, and q has T = {T}) do not lie in the {total} of all "
            f"documents: start must be from 0 to {total - T}"
            if T <= total
            else f"q has T = {T}, but all documents have {total} tokens: total must be the last of cu_seqlens"
        )
    if start and initial_state is None:
        raise ValueError(
            f"the part begins at token {start} and has no initial_state; give the state that the part before it "
            "returned, or zeros"
        )
    if initial_state is not None and not start:
        raise ValueError(
            "no document goes on at start = 0, so that initial_state would count nowhere; give None, or the start of "
            "this part"
        )


def check_tensors(**given) -> None:
    """All are tensors; the first says on which device they should be."""
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(
                f"{name} must be a torch.Tensor, but is a {type(x).__name__}; make it one on {next(iter(given))}'s "
                "device"
            )


def check_heads(q, k, v, log_decay, scale, rows: str = "B,T") -> None:
    """q, k, v and what belongs to their heads; ``rows`` names their first two dimensions."""
    for name, x, axes in (("q", q, "H,K"), ("k", k, "Hkv,K"), ("v", v, "Hkv,V")):
        if x.dim() != 4:
            raise ValueError(f"{name} must have the 4 dimensions [{rows},{axes}], but has shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device: q is {q.dtype} on {q.device}, {name} is {x.dtype} on "
                f"{x.device}"
            )
    if q.dtype not in (*_DTYPES, torch.float64):
        raise ValueError(f"q has dtype {q.dtype}; the operator computes bfloat16, float16 and float32")
    B, T, H, K = q.shape
    Hkv, V = v.shape[2:]
    if k.shape != (B, T, Hkv, K) or v.shape[:2] != (B, T):
        raise ValueError(
            f"shapes do not fit: q {list(q.shape)} is [{rows},H,K], so k must be [{B},{T},Hkv,{K}] and v "
            f"[{B},{T},Hkv,V], but k is {list(k.shape)} and v is {list(v.shape)}"
        )
    check_sizes(H, Hkv, K, V)
    check_decay_and_scale(log_decay, scale, H, K, q)


def check_sizes(H: int, Hkv: int, K: int, V: int) -> None:
    if Hkv == 0 or H == 0 or H % Hkv:
        raise ValueError(f"{H} query heads cannot share {Hkv} key/value heads: the second must divide the first")
    for name, dim in (("K", K), ("V", V)):
        if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM or dim % HEAD_DIM_STEP:
            raise ValueError(
                f"head dim {name}={dim} is not supported: it must be a multiple of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} "
                f"to {MAX_HEAD_DIM}; pad q and k (or v) with zeros, which changes nothing but the default scale"
            )


def state_dtype_of(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check_decay_and_scale(log_decay: torch.Tensor, scale, H: int, K: int, q: torch.Tensor) -> None:
    state_dtype = state_dtype_of(q)
    if log_decay.shape != (H,) or log_decay.dtype != state_dtype or log_decay.device != q.device:
        raise ValueError(
            f"log_decay must be [{H}] (one entry per query head), {state_dtype} on {q.device}, but is "
            f"{list(log_decay.shape)}, {log_decay.dtype} on {log_decay.device}"
        )
    if log_decay.requires_grad:
        raise ValueError("log_decay requires grad, but lightning attention has fixed decays; pass log_decay.detach()")
    if scale is not None and not (isinstance(scale, (int, float)) and abs(scale) <= torch.finfo(state_dtype).max):
        raise ValueError(f"scale={scale!r:.40} must be a finite number in fp32, or None for K ** -0.5 = {K**-0.5:.4g}")


class Seen:
    """Tensors whose values have been looked at, and at which version. This saves a look, and never a result.

    To look at a tensor on a GPU is to wait for it, so that it is done once for every tensor and version. What changes a
    tensor without raising its version (a collective, a graph replay, a kernel of one's own) is then not noticed. On a
    CPU there is nothing to wait for, and tensors are looked at every time.
    """

    def __init__(self) -> None:
        self._versions: dict[int, tuple[weakref.ref, dict[Hashable, int]]] = {}  # id of a tensor -> it, {key: version}

    def is_new(self, tensor: torch.Tensor, key: Hashable = None) -> bool:
        if not _waits(tensor):
            return True
        found = self._versions.get(id(tensor))
        if found is not None and found[0]() is tensor and found[1].get(key) == tensor._version:
            return False
        # reading would break the capture of a CUDA graph; the warm-up before it has looked
        return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())

    def remember(self, tensor: torch.Tensor, key: Hashable = None) -> None:
        if not _waits(tensor) or tensor.is_inference():  # those have no version and are looked at every time
            return
        found = self._versions.get(id(tensor))
        if found is None or found[0]() is not tensor:
            forget = functools.partial(self._versions.pop, id(tensor))  # called with the reference, as the default
            found = self._versions[id(tensor)] = weakref.ref(tensor, forget), {}
        found[1][key] = tensor._version


def _waits(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


_seen = Seen()


def check_once(check: Callable[..., None], tensor: torch.Tensor, *arguments: int | str) -> None:
    """``check(values, *arguments)`` of the tensor's values on the host, if these have not been looked at."""
    key = check, arguments
    if _seen.is_new(tensor, key):
        check(tensor.detach().cpu(), *arguments)
        _seen.remember(tensor, key)


def check_values(log_decay: torch.Tensor, cu_seqlens: torch.Tensor | None, T: int, name: str = "T") -> None:
    """Checks that must read tensors; the caller calls the number of tokens ``name``."""
    check_once(check_log_decay, log_decay)
    if cu_seqlens is not None:
        check_once(check_cu_seqlens, cu_seqlens, T, name)


def check_log_decay(log_decay: torch.Tensor) -> None:
    bad = ~(torch.isfinite(log_decay) & (log_decay <= 0))
    if bool(bad.any()):
        head = int(bad.int().argmax())
        raise ValueError(
            f"log_decay[{head}] = {float(log_decay[head])}: every entry must be finite and <= 0 (0 keeps the whole "
            "state, -0.1 keeps exp(-0.1) = 90% of it per token); did you pass a slope, which is -log_decay, or a decay?"
        )


def check_cu_seqlens(cu_seqlens: torch.Tensor, T: int, name: str = "T") -> None:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at {name} = {T}, but goes from {bounds[0]} to {bounds[-1]}"
        )
    for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if b < a:
            raise ValueError(f"cu_seqlens must never fall, but cu_seqlens[{n}] = {a} is followed by {b}")
