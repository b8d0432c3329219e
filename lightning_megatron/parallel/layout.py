"""Where in the whole sequence the tokens of a rank are."""

from __future__ import annotations

import torch
import torch.distributed as dist

LAYOUTS = ("contiguous", "zigzag", "zigzag-documents")


def token_positions(
    tokens: int,
    *,
    group: dist.ProcessGroup | None,
    layout: str = "zigzag",
    cu_seqlens: torch.Tensor | None = None,
    device=None,
) -> torch.Tensor:
    """Where in the whole sequence this rank's ``tokens`` tokens are, ``[tokens]`` int64, by ``layout`` as of
    ``lightning_attn``.

    contiguous: all ranks have as many tokens. ``group`` is None for one rank.
    """
    P, r = (1, 0) if group is None else (group.size(), group.rank())
    device = device if cu_seqlens is None else cu_seqlens.device
    i = torch.arange(tokens, device=device)
    if layout == "contiguous":
        return i + r * tokens
    if layout == "zigzag":
        half = tokens // 2
        return torch.where(i < half, i + r * half, i - half + (2 * P - 1 - r) * half)
    assert cu_seqlens is not None
    starts = cu_seqlens.long() // P  # of the documents on this rank
    document = torch.searchsorted(starts, i, right=True) - 1
    halves = (starts.diff() // 2)[document]
    offset = i - starts[document]
    offset = torch.where(offset < halves, offset + r * halves, offset - halves + (2 * P - 1 - r) * halves)
    return cu_seqlens.long()[document] + offset
