"""Released models as Megatron's HybridModel, in which an attention is a layer, and what follows it another one.

Families describe GPTModel, whose layer is an attention with its MLP or experts. HybridModel has the same tensors under
other names: layer l of GPTModel is layer 2 l, the attention with the norm before it, and layer 2 l + 1, the MLP or the
experts with theirs. So flags, args and units of a family are translated here, and no family knows of HybridModel.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from argparse import Namespace
from collections.abc import Iterable

from ..config import expert_pattern, lightning_pattern
from .family import Flags
from .units import Piece, Unit

FLAG = "--hybrid-layer-pattern"
# Letters of Megatron's patterns, and what separates pipeline stages, and layers of multi-token prediction.
LIGHTNING, SOFTMAX, DENSE, EXPERTS, STAGES, AHEAD = "L", "*", "-", "E", "|", "/"
_PAIRS = re.compile(f"([{LIGHTNING}{SOFTMAX}][{DENSE}{EXPERTS}])+")
_PLACES = ("num_layers", "linear_attention_freq", "moe_layer_freq")  # flags for which a pattern stands
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_OF_ATTENTION = ("input_layernorm.", "self_attention.")
_OF_MLP = ("pre_mlp_layernorm.", "mlp.")
_FINAL_NORM = "decoder.final_layernorm.", "decoder.final_norm."  # in GPTModel and in HybridModel
_OUTSIDE = ("embedding.", "output_layer.")  # of the layers; both models name them so


def pattern_of(args: Namespace) -> str | None:
    """The pattern of a HybridModel without its pipeline stages, None for GPTModel.

    Args:
        args: as Megatron saved them.
    """
    pattern = getattr(args, "hybrid_layer_pattern", None)
    return pattern.replace(STAGES, "") if pattern else None


def as_hybrid(flags: Flags, args: Namespace) -> Flags:
    """The flags of the HybridModel that computes what GPTModel does with ``flags``.

    Args:
        args: what Megatron makes of ``flags``.

    Raises:
        ValueError: HybridModel has no such model.
    """
    if args.mtp_num_layers:
        raise ValueError(
            f"config.json: num_nextn_predict_layers is {args.mtp_num_layers}: layers of multi-token prediction are not "
            f"converted for HybridModel, in which they stand behind {AHEAD} of {FLAG} and are made of parts of "
            "TransformerEngine alone; convert the model for GPTModel (without --hybrid-model), or leave these layers "
            "out with --no-prediction"
        )
    lightning = lightning_pattern(args.linear_attention_freq, args.num_layers)
    experts = expert_pattern(args.moe_layer_freq, args.num_layers, args.num_experts)
    pairs = zip(lightning, experts, strict=True)
    letters = "".join((LIGHTNING if a else SOFTMAX) + (EXPERTS if b else DENSE) for a, b in pairs)
    rest = {name: value for name, value in flags.items() if name not in _PLACES}
    return {"hybrid_layer_pattern": letters, **rest}


def as_gpt(args: Namespace) -> Namespace:
    """The args of the GPTModel with the same layers; of a GPTModel, the args themselves.

    Raises:
        ValueError: a pattern that is not of whole layers of GPTModel.
    """
    letters = pattern_of(args)
    if letters is None:
        return args
    if not _PAIRS.fullmatch(letters):
        raise ValueError(
            f"the checkpoint is of a HybridModel ({FLAG} {args.hybrid_layer_pattern}), and the layers of released "
            f"models are pairs: an attention, {LIGHTNING} (lightning) or {SOFTMAX} (softmax), and behind it {DENSE} "
            f"(MLP) or {EXPERTS} (experts), as in L-L-*E, with nothing behind {AHEAD}; no config.json describes "
            "another pattern: train one of such pairs to convert the model"
        )
    view = copy.copy(args)
    view.hybrid_layer_pattern, view.num_layers = None, len(letters) // 2
    view.linear_attention_freq = [int(letter == LIGHTNING) for letter in letters[::2]]
    view.moe_layer_freq = [int(letter == EXPERTS) for letter in letters[1::2]]
    return view


def renamed(units: Iterable[Unit]) -> list[Unit]:
    """Units of a family, by GPTModel's names, with those of HybridModel."""
    return [dataclasses.replace(unit, megatron=tuple(map(_renamed, unit.megatron))) for unit in units]


def _renamed(piece: Piece) -> Piece:
    return piece._replace(key=key_of(piece.key))


def key_of(key: str) -> str:
    """HybridModel's name of a tensor of GPTModel.

    Raises:
        ValueError: it has none.

    Example:
        >>> key_of("decoder.layers.3.mlp.router.weight")
        'decoder.layers.7.mlp.router.weight'
    """
    before, now = _FINAL_NORM
    if key.startswith(before):
        return now + key.removeprefix(before)
    if key.startswith(_OUTSIDE):
        return key
    layer = _LAYER.fullmatch(key)
    if layer and layer[2].startswith(_OF_ATTENTION + _OF_MLP):
        number = 2 * int(layer[1]) + layer[2].startswith(_OF_MLP)
        return f"decoder.layers.{number}.{layer[2]}"
    raise ValueError(f"{key} of GPTModel has no place in HybridModel")
