"""Full recompute over context-parallel ranks without exchanging states twice.

Symbol:   megatron.core.tensor_parallel.checkpoint
Why:      with ``--recompute-granularity full`` every layer's forward runs twice, and so would the exchange of states
          between context-parallel ranks and the pass over k and v before it. ``parallel.exchange_once`` keeps the
          incoming states of the first run instead. Megatron's checkpoint is not told which layer and batch it serves,
          so the layer itself cannot keep them.
Versions: megatron-core 0.19
Can go:   when a layer can keep something from a forward for its own recomputation.
"""

from __future__ import annotations

from collections.abc import Callable

from ..parallel import exchange_once
from ._replace import replace

SYMBOLS = ("megatron.core.tensor_parallel.checkpoint",)
PARAMETERS = ("function", "distribute_saved_activations", "args")


def _wrap(original: Callable) -> Callable:
    def checkpoint(function, distribute_saved_activations, *args):
        return original(exchange_once(function), distribute_saved_activations, *args)

    return checkpoint


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(
        SYMBOLS[0],
        PARAMETERS,
        _wrap,
        "a recomputed layer reuses the incoming states of its first forward instead of exchanging them again",
    )
