"""Decoding: one token, or a few, of many requests, whose states are updated in place. One launch each, no wait.

Shapes are static and nothing but the output is allocated, so that a CUDA graph can hold these calls. The torch
functions below state the formulas and compute on the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import pointwise, torch_backend
from .backend import choose, device_of
from .checks import MAX_HEAD_DIM, check_log_decay
from .step_checks import check_decode, check_slots, check_step

Norm = tuple[torch.Tensor | None, float]  # weight and epsilon


def lightning_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    *,
    scale: float | None = None,
    intermediate: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The next S tokens of R requests; their states are changed in place.

    For every request r with slot n = slots[r], token by token, as ``lightning_attn`` does with an initial state::

        states[n, h] <- exp(log_decay[h]) states[n, h] + k^T v        o = scale q states[n, h]

    Args:
        q: ``[R, S, H, K]``, bf16, fp16 or fp32 (fp64 too with the torch backend), S from 1 to 16. Any strides.
        k: ``[R, S, Hkv, K]``, dtype of q. Hkv divides H: query head h uses key/value head ``h // (H / Hkv)``.
        v: ``[R, S, Hkv, V]``, dtype of q.
        log_decay: ``[H]`` fp32 (fp64 with fp64 inputs), finite and <= 0; natural logarithm of the decay per token.
        states: ``[N, H, K, V]`` fp32 (fp64 with fp64 inputs), contiguous in its last three dimensions: it may be one
            layer of a larger buffer.
        slots: ``[R]`` int32 or int64, each request's row of states. -1 is padding: its output is zeros and no state is
            touched. No two rows may have the same slot.
        scale: factor on q k^T; default ``K ** -0.5``.
        intermediate: ``[N, >= S, H, K, V]`` as states; row ``[slots[r], s]`` becomes the state behind token s, from
            which speculative decoding goes on when it rejects what follows.
        backend: as of ``lightning_attn``.

    Returns:
        o ``[R, S, H, V]`` in q's dtype, contiguous.

    Raises:
        ValueError: any shape, dtype, device or value outside of the above. Values are read on a CPU only, where nothing
            waits for them; on a GPU a slot that states do not have gives NaN, and the same slot twice any of the two.
    """
    check_step(q, k, v, log_decay, states, slots, scale, intermediate)
    computing = choose(backend, q)
    if not q.is_cuda:
        check_log_decay(log_decay)
        check_slots(slots, states)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if computing is torch_backend:
        return _step(q, k, v, log_decay, states, slots, scale, intermediate)
    from .triton import step as kernels

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    o = q.new_empty(*q.shape[:3], v.shape[3])
    with device_of(q):
        kernels.step(
            q, k, v, o, log_decay.contiguous(), slots.contiguous(), states, states, scale, between=intermediate
        )
    return o


def lightning_decode(
    mixed: torch.Tensor,
    log_decay: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    *,
    group_dims: tuple[int, int, int, int],
    feature_map: str = "silu",
    scale: float | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    angles: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    turn_scale: float = 1.0,
    interleaved: bool = False,
    gate: str = "none",
    out_norm: Norm | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Everything between the two projections of a layer for one token of R requests, in one launch.

    The same as ``split_heads``, RMS norm of q and k, rotary embedding, ``lightning_step`` and ``norm_gate`` after each
    other, but rounded once, at the end. ``unfusable`` says which layers need these instead.

    Args:
        mixed: ``[R, Hkv * sum(group_dims)]``, for every key/value head the columns ``q..., gate..., k, v``.
        log_decay, states, slots, scale: as of ``lightning_step``.
        group_dims: columns of q (of all query heads of one key/value head), gate (0: none), k and v in one such group.
        feature_map: as of ``split_heads``.
        q_norm: ``(weight [K], eps)`` of the RMS norm of each head's q after the feature map; None for no norm.
        k_norm: the same of k.
        angles: ``[P, n]`` fp32 (fp64 with fp64 inputs), of every position the angles by which the first n channels of q
            and k are turned, n even, each angle at both channels that it turns, as Megatron's are.
        positions: ``[R]`` int32 or int64, each request's row of angles.
        turn_scale: factor on what is turned, YaRN's.
        interleaved: an angle turns channels 2 i and 2 i + 1, and not i and i + n / 2.
        gate: as ``kind`` of ``norm_gate``.
        out_norm: ``(weight [H * V] or None, eps)`` of the RMS norm of each head's output; None for no norm.
        backend: as of ``lightning_attn``.

    Returns:
        ``[R, H * V]`` in the dtype of mixed.

    Raises:
        ValueError: as ``lightning_step``.
    """
    check_decode(
        mixed, log_decay, states, slots, group_dims, feature_map, scale, q_norm, k_norm, angles, positions, gate,
        out_norm,
    )  # fmt: skip
    computing = choose(backend, mixed)
    if not mixed.is_cuda:
        check_log_decay(log_decay)
        check_slots(slots, states)
    scale, dims = group_dims[2] ** -0.5 if scale is None else float(scale), tuple(group_dims)
    if computing is torch_backend:
        return _decode(
            mixed, log_decay, states, slots, dims, feature_map, scale, q_norm, k_norm, angles, positions, turn_scale,
            interleaved, gate, out_norm,
        )  # fmt: skip
    from .triton import step as kernels

    mixed = mixed if mixed.stride(-1) == 1 else mixed.contiguous()
    if angles is not None and angles.stride(-1) != 1:
        angles = angles.contiguous()
    with device_of(mixed):
        return kernels.decode(
            mixed, log_decay.contiguous(), states, slots.contiguous(), dims, pointwise.SILU[feature_map], scale,
            q_norm, k_norm, angles, positions, turn_scale, interleaved, gate, out_norm,
        )  # fmt: skip


def unfusable(
    group_dims: tuple[int, int, int, int], *, norm_width: int | None = None, turned: int = 0, lrpe: bool = False
) -> str | None:
    """Why ``lightning_decode`` does not compute a layer, or None if it does.

    Args:
        group_dims: as of ``lightning_decode``.
        norm_width: neighbouring channels that the output norm normalises together, over all ranks; None for no norm.
        turned: channels of q and k that the rotary embedding turns.
        lrpe: whether q and k are turned by learnt angles, which doubles K.
    """
    _, _, K, V = group_dims
    if lrpe:
        return "learnt angles (LRPE) double the key dim after the projection"
    if norm_width not in (None, V):
        return f"the output norm spans {norm_width} channels, more than one head of {V}"
    if turned > K or turned % 2:
        return f"the rotary embedding turns {turned} channels of {K}"
    if max(K, V) > MAX_HEAD_DIM:
        return f"head dims {K} and {V} exceed {MAX_HEAD_DIM}"
    return None


def _step(q, k, v, log_decay, states, slots, scale, intermediate) -> torch.Tensor:
    R, S, H, _ = q.shape
    o = q.new_zeros(R, S, H, v.shape[3])
    if R == 0 or states.shape[0] == 0:
        return o
    # With static shapes and without waiting: what padding would write is what a real request writes, to the same place.
    real, rows = slots >= 0, torch.arange(R, device=q.device)
    rows = torch.where(real, rows, real.int().argmax())
    places = slots[rows].clamp(min=0).long()
    before = states[places]
    state, decay = before, log_decay.exp()[:, None, None]
    q, k, v = (x[rows].to(states.dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    for s in range(S):
        state = decay * state + k[:, s, :, :, None] * v[:, s, :, None, :]
        output = scale * (q[:, s, :, :, None] * state).sum(2)
        o[:, s] = output.masked_fill(~real[:, None, None], 0.0).to(o.dtype)
        if intermediate is not None:
            intermediate[places, s] = torch.where(real.any(), state, intermediate[places, s])
    states[places] = torch.where(real.any(), state, before)
    return o


def _decode(
    mixed, log_decay, states, slots, dims, feature_map, scale, q_norm, k_norm, angles, positions, turn_scale,
    interleaved, kind, out_norm,
) -> torch.Tensor:  # fmt: skip
    q, gate, k, v = pointwise._split_heads(mixed[None], dims, pointwise.SILU[feature_map])
    q, k = (_head_norm(x, norm) for x, norm in ((q, q_norm), (k, k_norm)))
    if angles is not None:
        cos, sin = (turn_scale * f(angles[positions]) for f in (torch.cos, torch.sin))
        q, k = (_turn(x, cos, sin, interleaved) for x in (q, k))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    gate = None if kind == "none" or gate is None else gate.transpose(0, 1)
    o = _step(q, k, v, log_decay, states, slots, scale, None)
    weight, eps = out_norm or (None, 0.0)
    return pointwise._norm_gate(o, gate, weight, kind, None if out_norm is None else dims[3], eps)[:, 0]


def _head_norm(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return x if norm is None else F.rms_norm(x, x.shape[-1:], norm[0], norm[1])


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding of x ``[1, R, heads, K]``."""
    cos, sin = (y[:, None].to(x.dtype) for y in (cos, sin))
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        across = torch.stack((-b, a), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        across = torch.cat((-b, a), dim=-1)
    return torch.cat((turned * cos + across * sin, rest), dim=-1)
