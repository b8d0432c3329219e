"""What full recompute keeps: states over context-parallel ranks and between chunks, and inputs on the host.

Symbol:   megatron.core.tensor_parallel.checkpoint
Why:      with ``--recompute-granularity full`` every layer's forward runs twice, and so would the exchange of states
          between context-parallel ranks and the pass over k and v before it. ``parallel.exchange_once`` keeps the
          incoming states of the first run instead, and those between chunks (``--lightning-recompute-chunk``).
          Megatron's checkpoint is not told which layer and batch it serves, so the layer itself cannot keep them.
          With ``--lightning-offload-activations`` the inputs of layers, which it saves, go to the host. Megatron's
          ``cpu_offloading`` is TransformerEngine's and refuses recompute; ``--fine-grained-activation-offloading``
          moves what single modules save, which full recompute never keeps.
Versions: megatron-core 0.19, 0.20
Can go:   when a layer can keep something from a forward for its own recomputation, and when one of Megatron's two ways
          of offloading takes the inputs of recomputed layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..offload import Offloader
from ..parallel import exchange_once
from ._replace import replace

SYMBOLS = ("megatron.core.tensor_parallel.checkpoint",)
PARAMETERS = ("function", "distribute_saved_activations", "args")

_keep_states = False
_offloader: Offloader | None = None


def _wrap(original: Callable) -> Callable:
    def checkpoint(function, distribute_saved_activations, *args):
        run = partial(original, exchange_once(function) if _keep_states else function, distribute_saved_activations)
        return run(*args) if _offloader is None else _offloader.checkpoint(run, *args)

    return checkpoint


def apply(keep_states: bool = True, offload: bool = False) -> None:
    """Apply the patch where one of both is asked for; a second call, for another model, only adds to that."""
    global _keep_states, _offloader
    _keep_states = _keep_states or keep_states
    if offload and _offloader is None:
        _offloader = Offloader()
    effects = ["a recomputed layer reuses the states of its first forward"] * keep_states
    effects += ["inputs of recomputed layers wait in host memory"] * offload
    if effects:
        replace(SYMBOLS[0], PARAMETERS, _wrap, "; ".join(effects))
