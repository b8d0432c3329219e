"""What a checkpointed forward keeps for its recomputation: states that entered chunks, so that none is made twice."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Kept(NamedTuple):
    """A value, and what it belongs to, which must be equal in the recomputation."""

    key: Any
    value: Any


class _Run(threading.local):  # recomputation happens in autograd's thread
    kept: deque[Kept] | None = None  # of the innermost function that ``exchange_once`` returned; None outside of all
    first: bool = False


_run = _Run()


def exchange_once[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """``function`` for activation checkpointing, with states exchanged in its first run and not again in the
    recomputation.

    For every checkpoint anew, as in ``torch.utils.checkpoint.checkpoint(exchange_once(layer), x, use_reentrant=True)``:
    without gradients the function keeps what enters the chunks in each call of ``lightning_attn`` over a group, with
    gradients it takes that, in the same order, as the recomputation makes the same calls. Without reentry the first run
    has gradients too, and states are exchanged again. Results have the same bits. It costs ``H K V`` fp32 for each
    chunk, row and call until the recomputation, 2 K / n of the hidden states kept with n tokens in a chunk. (LASP keeps
    states for its backward in the same way: Sun et al. 2024, arXiv:2404.02882, "state caching".)

    Raises:
        RuntimeError: what was returned is used for two checkpoints at a time; or the recomputation calls lightning_attn
            with other shapes, group or options than the first run.
    """
    kept: deque[Kept] = deque()

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        before, first = (_run.kept, _run.first), not torch.is_grad_enabled()
        if first and kept:
            raise RuntimeError(
                "a function that exchange_once returned ran forward twice before it was recomputed, and the states of "
                "the two would be mixed up; call exchange_once for every checkpoint: "
                "checkpoint(exchange_once(layer), x, use_reentrant=True)"
            )
        _run.kept, _run.first = kept, first
        try:
            return function(*args, **kwargs)
        finally:
            _run.kept, _run.first = before

    return run


def recomputing() -> bool:
    """Whether this is the second run of a function that ``exchange_once`` returned, the one for the backward."""
    return _run.kept is not None and not _run.first


def put(key: Any, value: Any) -> None:
    """Keep a value if the caller is the first run of a checkpointed function."""
    if _run.kept is not None and _run.first:
        _run.kept.append(Kept(key, value))


def take(key: Any) -> Any:
    """What the first run kept, if this is the recomputation; None where there was no first run."""
    if not _run.kept or _run.first:
        return None
    found = _run.kept.popleft()
    if found.key != key:
        raise RuntimeError(
            f"a recomputation calls lightning_attn with {key}, but the forward with {found.key}: a checkpointed "
            "function must make the same calls each time; or let it exchange again (--no-lightning-cp-keep-states)"
        )
    return found.value
