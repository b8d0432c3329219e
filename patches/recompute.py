"""What full recompute keeps: states over context-parallel ranks and between chunks, and inputs on the host.

Symbol:   megatron.core.tensor_parallel.checkpoint; with fp8 and fp4, which Megatron recomputes by TransformerEngine's
          checkpoint, megatron.core.extensions.transformer_engine.te_checkpoint, also by its name in
          megatron.core.recompute
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

SYMBOLS = (
    "megatron.core.tensor_parallel.checkpoint",
    "megatron.core.extensions.transformer_engine.te_checkpoint",
    "megatron.core.recompute.te_checkpoint",  # None without TransformerEngine
)
PARAMETERS = ("function", "distribute_saved_activations", "args")
TE_PARAMETERS = (
    "forward_func", "distribute_saved_activations", "get_rng_state_tracker", "tp_group", "args", "kwargs",
)  # fmt: skip

_keep_states = False
_offloader: Offloader | None = None


def _wrap(original: Callable, settings: int) -> Callable:
    """``settings``: how many arguments stand between the function and those that it is called with."""

    def checkpoint(function, *args, **kwargs):
        run = partial(original, exchange_once(function) if _keep_states else function, *args[:settings], **kwargs)
        return run(*args[settings:]) if _offloader is None else _offloader.checkpoint(run, *args[settings:])

    return checkpoint


def apply(keep_states: bool = True, offload: bool = False, quantized: bool = False) -> None:
    """Apply the patch where one of both is asked for; a second call, for another model, only adds to that.

    Args:
        keep_states, offload: what is asked for.
        quantized: layers are in fp8 or fp4.
    """
    global _keep_states, _offloader
    _keep_states = _keep_states or keep_states
    if offload and _offloader is None:
        _offloader = Offloader()
    effects = ["a recomputed layer reuses the states of its first forward"] * keep_states
    effects += ["inputs of recomputed layers wait in host memory"] * offload
    if effects and quantized:
        for symbol in SYMBOLS[1:]:
            replace(symbol, TE_PARAMETERS, partial(_wrap, settings=3), "; ".join(effects))
    if effects:
        replace(SYMBOLS[0], PARAMETERS, partial(_wrap, settings=1), "; ".join(effects))
