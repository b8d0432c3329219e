"""One softmax of attention to several groups of keys, each with its log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import torch_backend
from .backend import choose, device_of


def merge_parts(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, int]], *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """o = sum over parts of exp(lse_i - lse) o_i, with lse = log(sum over parts of exp(lse_i)).

    Dao et al. 2022, FlashAttention (arXiv 2205.14135), section 3.1. Without gradients: a backward takes the lse of the
    whole.

    Args:
        parts: two or three of (o_i ``[b, h, t_i, d]``, lse_i ``[b, h, t_i]``, start_i): attention of the t_i queries
            from ``start_i`` to the last one. The first part is of all of them.
        backend: as of ``lightning_attn``.

    Returns:
        o ``[t, b, h, d]`` in the dtype of the parts, contiguous, and lse ``[b, h, t]`` in fp32 (fp64 for fp64).

    Example::

        o, lse = merge_parts([(near, near_lse, 0), (far, far_lse, 512)])  # the first 512 queries see no far keys
    """
    assert 2 <= len(parts) <= 3 and parts[0][2] == 0, f"{len(parts)} parts, of which the first begins at {parts[0][2]}"
    t = parts[0][0].shape[2]
    assert all(x.shape[2] == lse.shape[2] == t - start for x, lse, start in parts)
    first = parts[0][0]
    if choose(backend, first) is not torch_backend:
        from .triton.merge import merge

        with device_of(first):
            return merge(parts)
    wide = torch.promote_types(first.dtype, torch.float32)
    total = parts[0][1].to(wide, copy=True)
    for _, lse, start in parts[1:]:
        total[..., start:] = torch.logaddexp(total[..., start:], lse.to(wide))
    o = torch.zeros(first.shape, dtype=wide, device=first.device)
    for x, lse, start in parts:
        o[:, :, start:] += x.to(wide) * (lse.to(wide) - total[..., start:]).exp().unsqueeze(-1)
    return o.permute(2, 0, 1, 3).to(first.dtype).contiguous(), total
