"""A letter for lightning layers in the patterns of Megatron's HybridModel: ``--hybrid-layer-pattern L-L-L-*-``.

Symbol:   megatron.core.models.hybrid.hybrid_model.HybridModel.__init__
Why:      the letters are a closed set, in ``hybrid_layer_allocation.Symbols``, and the stack of layers knows how to
          build those alone. ``L`` is added to the set, where it must be free; a model whose pattern has it gets a stack
          that builds it (``lightning_megatron.hybrid_model``). Models of other patterns are Megatron's.
Versions: megatron-core 0.19, 0.20
Can go:   when a stack spec may bring letters of its own.

Without the patch Megatron refuses ``L``: the pattern is checked while the command line is, and wherever it is read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ._replace import replace

SYMBOLS = ("megatron.core.models.hybrid.hybrid_model.HybridModel.__init__",)
PARAMETERS = (
    "self", "config", "hybrid_stack_spec", "vocab_size", "max_sequence_length", "hybrid_layer_pattern",
    "hybrid_attention_ratio", "hybrid_mlp_ratio", "hybrid_override_pattern", "pre_process", "post_process",
    "fp16_lm_cross_entropy", "parallel_output", "share_embeddings_and_output_weights", "position_embedding_type",
    "rotary_percent", "rotary_base", "scatter_embedding_sequence_parallel", "seq_len_interpolation_factor",
    "pg_collection", "vp_stage",
)  # fmt: skip
_AT = PARAMETERS.index("parallel_output")
LATER = (*PARAMETERS[:_AT], "logit_dtype", *PARAMETERS[_AT:])  # 0.20
LETTER = "L"

# stack(config, stack spec that was given, pattern) -> stack spec that builds lightning layers, too
Stack = Callable[[Any, Any, str], Any]


def add_letter() -> None:
    """Let patterns have ``L``; a second call does nothing.

    Raises:
        RuntimeError: this Megatron gives the letter to another layer, or keeps its letters in another way.
    """
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    names = {value: name for name, value in vars(Symbols).items() if name.isupper() and isinstance(value, str)}
    letters = getattr(Symbols, "VALID_LAYERS", None)
    if names.get(LETTER, "LIGHTNING") != "LIGHTNING" or not isinstance(letters, set):
        found = f"is {names[LETTER]} here" if LETTER in names else f"cannot be added to VALID_LAYERS {letters!r}"
        raise RuntimeError(
            f"lightning_megatron names its layers {LETTER} in --hybrid-layer-pattern, but {LETTER} {found}"
        )
    Symbols.LIGHTNING = LETTER  # type: ignore[attr-defined]
    letters.add(LETTER)


def _wrap(original: Callable[..., None], stack: Stack) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        pattern = given.get("hybrid_layer_pattern") or given.get("hybrid_override_pattern") or ""
        if LETTER in pattern:
            given["hybrid_stack_spec"] = stack(given["config"], given["hybrid_stack_spec"], pattern)
        original(**given)

    return __init__


def apply(stack: Stack) -> None:
    """Apply the patch, before the command line is parsed; a second call does nothing."""
    add_letter()
    wrap = functools.partial(_wrap, stack=stack)
    replace(SYMBOLS[0], PARAMETERS, wrap, "L in a pattern is a lightning layer", later=LATER)
