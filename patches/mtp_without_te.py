"""Multi-token prediction without TransformerEngine.

Symbol:   megatron.core.transformer.multi_token_prediction.is_inference_column_parallel_linear
Why:      it asks whether a layer is of one of two classes that derive from TransformerEngine's. Where that is not
          installed the names hold no classes, ``isinstance`` raises TypeError, and no model with ``--mtp-num-layers``
          is built. The answer is no: there are no such layers.
Versions: megatron-core 0.20; 0.19 does not ask, and nothing is replaced
Can go:   when a model with ``--mtp-num-layers`` is built without TransformerEngine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._replace import replace

SYMBOLS = ("megatron.core.transformer.multi_token_prediction.is_inference_column_parallel_linear",)
PARAMETERS = ("module",)


def _wrap(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_inference_column_parallel_linear(module: Any) -> bool:
        return False

    return is_inference_column_parallel_linear


def apply() -> None:
    """Apply the patch where Megatron asks, and cannot answer; a second call does nothing."""
    from megatron.core.transformer import multi_token_prediction

    if not hasattr(multi_token_prediction, SYMBOLS[0].rpartition(".")[2]):
        return
    from megatron.core.tensor_parallel import inference_layers

    if not isinstance(inference_layers.InferenceColumnParallelLinear, type):
        replace(SYMBOLS[0], PARAMETERS, _wrap, "models with multi-token prediction are built without TransformerEngine")
