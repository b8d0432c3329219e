"""What the operators of decoding are given: checks of shapes, dtypes, devices and, on a CPU, of slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import checks, pointwise

MAX_TOKENS = 16  # of a request in one step
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_step(q, k, v, log_decay, states, slots, scale, intermediate) -> None:
    checks.check_tensors(q=q, k=k, v=v, log_decay=log_decay, states=states, slots=slots)
    checks.check_heads(q, k, v, log_decay, scale, "R,S")
    (R, S, H, K), V = q.shape, v.shape[3]
    if not 1 <= S <= MAX_TOKENS:
        raise ValueError(
            f"q {list(q.shape)} has S = {S} tokens of each request, but a step takes 1 to {MAX_TOKENS}; use "
            "lightning_attn for more"
        )
    _check_no_gradient(q, k, v, states)
    _check_states("states", states, "N,H,K,V", (H, K, V), q)
    _check_slots_shape(slots, R, q)
    if intermediate is not None:
        checks.check_tensors(q=q, intermediate=intermediate)
        _check_states("intermediate", intermediate, "N,S,H,K,V", (H, K, V), q)
        if intermediate.shape[0] != states.shape[0] or intermediate.shape[1] < S:
            raise ValueError(
                f"intermediate must be [N,S,H,K,V] with N = {states.shape[0]}, as states, and S >= {S}, as q, but is "
                f"{list(intermediate.shape)}"
            )


def check_decode(
    mixed, log_decay, states, slots, group_dims, feature_map, scale, q_norm, k_norm, angles, positions, gate, out_norm
) -> None:
    checks.check_tensors(mixed=mixed, log_decay=log_decay, states=states, slots=slots)
    if mixed.dtype not in _DTYPES:
        raise ValueError(f"mixed has dtype {mixed.dtype}; lightning_decode computes bfloat16, float16 and float32")
    if len(group_dims) != 4 or min(group_dims[0], *group_dims[2:]) <= 0 or group_dims[0] % group_dims[2]:
        raise ValueError(f"group_dims={group_dims} must be columns of q, gate, k and v, those of q a multiple of k's")
    columns, gated, K, V = group_dims
    group = columns // K
    if gated not in (0, group * V):
        raise ValueError(f"group_dims={group_dims} has {gated} columns of gate, but must have 0 or {group} * {V}")
    if mixed.dim() != 2 or mixed.shape[1] % sum(group_dims):
        raise ValueError(
            f"mixed must be [R, Hkv * {sum(group_dims)}], of whole groups of {group_dims}, but is {list(mixed.shape)}"
        )
    R, Hkv = mixed.shape[0], mixed.shape[1] // sum(group_dims)
    H = Hkv * group
    checks.check_sizes(H, Hkv, K, V)
    checks.check_decay_and_scale(log_decay, scale, H, K, mixed)
    _check_no_gradient(mixed, states)
    _check_states("states", states, "N,H,K,V", (H, K, V), mixed)
    _check_slots_shape(slots, R, mixed)
    for name, value, choices in (("feature_map", feature_map, pointwise.SILU), ("gate", gate, pointwise.GATES)):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
    if gate != "none" and not gated:
        raise ValueError(f"gate={gate!r} needs columns of gate, but group_dims={group_dims} has none; use gate='none'")
    for name, norm, size in (("q_norm", q_norm, K), ("k_norm", k_norm, K), ("out_norm", out_norm, H * V)):
        if norm is not None:
            _check_norm(name, norm, size, mixed, optional=name == "out_norm")
    if (angles is None) != (positions is None):
        raise ValueError("angles and positions belong together: pass both, or none of them for no rotary embedding")
    if angles is not None:
        checks.check_tensors(mixed=mixed, angles=angles, positions=positions)
        _check_angles(angles, positions, R, K, mixed)


def _check_angles(angles: torch.Tensor, positions: torch.Tensor, R: int, K: int, mixed: torch.Tensor) -> None:
    if angles.dim() != 2 or not 0 < angles.shape[1] <= K or angles.shape[1] % 2:
        raise ValueError(
            f"angles must be [P, n], of every position, n even and at most K = {K}, but is {list(angles.shape)}"
        )
    dtype = checks.state_dtype_of(mixed)
    if angles.dtype != dtype or angles.device != mixed.device:
        raise ValueError(
            f"angles must be {dtype} on {mixed.device} (of large positions nothing else holds them), but is "
            f"{angles.dtype} on {angles.device}"
        )
    integral = positions.dtype in (torch.int32, torch.int64)
    if positions.shape != (R,) or not integral or positions.device != mixed.device:
        raise ValueError(
            f"positions must be [{R}] (one per request), int32 or int64 on {mixed.device}, but is "
            f"{list(positions.shape)}, {positions.dtype} on {positions.device}"
        )
    if not positions.is_cuda and positions.numel() and not 0 <= positions.min() <= positions.max() < len(angles):
        raise ValueError(f"positions {positions.tolist()} are not all rows of angles, which has {len(angles)}")


def _check_norm(name: str, norm, size: int, mixed: torch.Tensor, optional: bool) -> None:
    if not isinstance(norm, tuple) or len(norm) != 2 or not isinstance(norm[1], (int, float)):
        raise ValueError(f"{name} must be a pair (weight, eps) or None, but is {norm!r:.60}")
    weight = norm[0]
    if weight is None and optional:
        return
    checks.check_tensors(mixed=mixed, **{f"the weight of {name}": weight})
    if weight.shape != (size,) or not weight.is_contiguous() or weight.device != mixed.device:
        raise ValueError(
            f"the weight of {name} must be [{size}], contiguous, on {mixed.device}, but is {list(weight.shape)} on "
            f"{weight.device}"
        )


def _check_no_gradient(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "an input requires grad, but a step changes states in place and has no backward; call it under "
            "torch.no_grad(), or use lightning_attn"
        )


def _check_states(name: str, x: torch.Tensor, axes: str, last: Sequence[int], q: torch.Tensor) -> None:
    H, K, V = last
    if x.dim() != axes.count(",") + 1 or x.shape[-3:] != (H, K, V):
        raise ValueError(f"{name} must be [{axes}] with H,K,V = {H},{K},{V}, but is {list(x.shape)}")
    dtype = checks.state_dtype_of(q)
    if x.dtype != dtype or x.device != q.device:
        raise ValueError(
            f"{name} must be {dtype} on {q.device} (states are not kept in low precision), but is {x.dtype} on "
            f"{x.device}"
        )
    dense = all(n == 1 or a == b for n, a, b in zip(last, x.stride()[-3:], (K * V, V, 1), strict=True))
    apart = all(n <= 1 or stride >= H * K * V for n, stride in zip(x.shape[:-3], x.stride()[:-3], strict=True))
    if not dense or not apart:
        raise ValueError(
            f"{name} {list(x.shape)} has strides {x.stride()}, but its last three dimensions must be contiguous, and "
            "rows must not overlap: they are changed in place; pass a slice of a contiguous buffer"
        )


def _check_slots_shape(slots: torch.Tensor, R: int, q: torch.Tensor) -> None:
    if slots.shape != (R,) or slots.dtype not in (torch.int32, torch.int64) or slots.device != q.device:
        raise ValueError(
            f"slots must be [{R}] (one per request), int32 or int64 on {q.device}, but is {list(slots.shape)}, "
            f"{slots.dtype} on {slots.device}"
        )


def check_slots(slots: torch.Tensor, states: torch.Tensor) -> None:
    """Values of slots; reads them."""
    used, N = slots[slots != -1], states.shape[0]
    outside = used[(used < 0) | (used >= N)]
    if outside.numel():
        raise ValueError(f"slot {int(outside[0])} is none of the {N} rows of states, nor -1 for padding")
    if used.unique().numel() != used.numel():
        raise ValueError(f"slots {used.tolist()} name the same row of states twice; each request needs its own")
