"""Multi-token prediction layers of the parts that the model's other layers have.

Symbol:   megatron.training.models.gpt.mtp_block_spec
Why:      it ignores ``--spec``: whatever the decoder's layers are, the layers of ``--mtp-num-layers`` are Megatron's
          stock ones. Without TransformerEngine these refuse context and sequence parallelism, packed documents and
          multi-latent attention; with residual factors, norms without weights, a bilinear GLU or scaled embeddings they
          compute another function than the model's layers.
Versions: megatron-core 0.19, 0.20
Can go:   when a block spec can say which multi-token prediction layers belong to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._replace import replace

SYMBOLS = ("megatron.training.models.gpt.mtp_block_spec",)
PARAMETERS = ("config", "transformer_layer_spec", "vp_stage")


def _wrap(original: Callable) -> Callable:
    def mtp_block_spec(config: Any, transformer_layer_spec: Any, vp_stage: int | None = None) -> Any:
        ours = getattr(transformer_layer_spec, "mtp_block_spec", None)  # of spec.HybridBlockSubmodules alone
        if ours is None or config.transformer.mtp_num_layers is None:
            return original(config, transformer_layer_spec, vp_stage)
        return ours(vp_stage=vp_stage)

    return mtp_block_spec


def apply() -> None:
    """Apply the patch; a second call does nothing. Models of other specs keep Megatron's layers."""
    replace(SYMBOLS[0], PARAMETERS, _wrap, "multi-token prediction layers have the parts of the model's other layers")
