"""Decay factors of a call: what is left of states between bounds of chunks, for forward and backward from one
launch.
"""

from __future__ import annotations

import torch

from .group import integers, state_of
from .plan import ParallelPlan

Pairs = tuple[tuple[int, int], ...]  # from one bound of chunks to another; 0 is left where the second comes first


class Factors:
    """Owned by the call: made anew from log_decay and cu_seqlens, which may have changed without a trace."""

    def __init__(self, values: torch.Tensor, slices: dict[tuple[str, bool], slice]) -> None:
        self._values, self._slices = values, slices

    def __call__(self, name: str, reverse: bool) -> torch.Tensor:
        """``[pairs, R or 1, H]`` of the pairs that the exchange has named so; R: rows, or documents that are cut one
        by one.
        """
        return self._values[self._slices[name, reverse]]


def decay_factors(plan: ParallelPlan, needed, log_decay: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Factors:
    """Factors of ``needed(plan, reverse)``, pairs by name, both ways.

    Which pairs these are depends on layout, exchange and rank only: they stay on the device.
    """
    state, device = state_of(plan.group), log_decay.device

    def structure(captured: bool) -> tuple[torch.Tensor, dict[tuple[str, bool], slice]]:
        pairs: list[tuple[int, int]] = []
        slices = {}
        for reverse in (False, True):
            for name, found in needed(plan, reverse).items():
                slices[name, reverse] = slice(len(pairs), len(pairs) + len(found))
                pairs += found
        return integers(pairs, device, captured, torch.int32), slices

    pairs, slices = state.constant(("pairs", plan.layout, plan.exchange, plan.states, device), structure)
    cut, bounds = plan.layout == "zigzag-documents", None
    if not cut and not plan.equal:  # filled in, for these may be other lengths in every call
        bounds = integers(list(plan.bounds), device, True, torch.int64)
    values = plan.backend.decay_factors(
        log_decay,
        pairs,
        length=plan.length,
        bounds=bounds,
        cu_seqlens=cu_seqlens,
        per_document=plan.count if cut else 0,
    )
    return Factors(values, slices)


def left(factors: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """``factors [..., R or 1, H] * states [..., R, H, K, V]``; where the factor is 0, also of a NaN."""
    factors = factors[..., None, None]
    return (factors * states).masked_fill_(factors == 0, 0.0)
