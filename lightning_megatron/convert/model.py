"""Which model a folder or a checkpoint holds: its args in Megatron, its config.json, its tensors."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

from ..models import hybrid
from ..models.family import Config, Family, command_line, family_of
from ..models.units import Unit
from .folder import Folder

_PREDICTION = "num_nextn_predict_layers"


class Model(NamedTuple):
    """A model in both formats."""

    flags: list[str]  # Megatron's, as on a command line
    args: Namespace
    config: Config
    units: list[Unit]


def model_of_config(config: Config, hybrid_model: bool = False) -> Model:
    """From a config.json.

    Args:
        hybrid_model: for Megatron's HybridModel, in the place of GPTModel.

    Raises:
        ValueError: what cannot be represented, by field.
    """
    family = family_of(config)
    flags = family.flags(config)
    args = saved_args(command_line(flags))
    if hybrid_model:
        flags = hybrid.as_hybrid(flags, args)
        args = saved_args(command_line(flags))
    return Model(command_line(flags), args, config, units_of(family, args, config))


def outputs_of_layers(args: Namespace, states: list[Any]) -> list[Any]:
    """Of the layers of the released model, from those of Megatron's; a HybridModel has two for each."""
    return states if hybrid.pattern_of(args) is None else states[1::2]


def leave_out_prediction(folder: Folder, say: Callable[[str], None]) -> None:
    """Take a folder for one without layers of multi-token prediction; says how many tensors they have.

    Raises:
        ValueError: as of ``model_of_config``.
    """
    if not folder.config.get(_PREDICTION):
        return
    units = model_of_config(folder.config).units
    ahead = [unit for unit in units if any(piece.key.startswith("mtp.") for piece in unit.megatron)]
    count = folder.leave_out({named.name for unit in ahead for named in unit.hf}, **{_PREDICTION: 0})
    say(f"left out {count} tensors of multi-token prediction (--no-prediction): exports have {_PREDICTION} 0")


def units_of(family: Family, args: Namespace, config: Config) -> list[Unit]:
    """All tensors of both checkpoints, of which Megatron's is of the GPTModel or the HybridModel of ``args``."""
    units = family.units(hybrid.as_gpt(args), config)
    return units if hybrid.pattern_of(args) is None else hybrid.renamed(units)


def model_of_args(args: Namespace, original: Config | None) -> Model:
    """From the args of a checkpoint.

    Args:
        args: what Megatron saved.
        original: a config.json whose further fields go into the new one, and whose family is taken.

    Raises:
        ValueError: no config.json describes the function of this checkpoint, with what differs.
    """
    family, config = family_of_args(args, family_of(original) if original else None)
    if original:
        config = _merged(original, config)
        _check_merged(family, args, config)
    return Model([], args, config, units_of(family, args, config))


def _merged(original: Config, config: Config) -> Config:
    """``config`` with the further fields of ``original``."""
    found = {**original, **config, "vocab_size": original.get("vocab_size", config["vocab_size"])}
    found.pop("quantization_config", None)  # weights are exported as they were trained
    # Two places for the base of the angles: where both are filled they say the same, also after it was changed.
    inner, old = config.get("rope_parameters"), original.get("rope_parameters")
    if inner and original.get("rope_theta") is not None:
        found["rope_theta"] = inner["rope_theta"]
    elif not inner and isinstance(old, dict) and old.get("rope_theta") is not None:
        found["rope_parameters"] = {**old, "rope_theta": config.get("rope_theta", old["rope_theta"])}
    return found


def _check_merged(family: Family, args: Namespace, config: Config) -> None:
    """Refuse further fields that make another model of the one that was trained.

    Raises:
        ValueError: in what it is another one.
    """
    words, kept = getattr(args, "vocab_size", None), config["vocab_size"]
    try:
        if words and kept < words:
            lines = [f"vocab_size: {words} tokens in the checkpoint (--vocab-size), {kept} there"]
        else:
            lines = differences_of_function(args, config) or _other_tensors(family, args, config)
    except ValueError as error:
        lines = [str(error)]
    if lines:
        first = (
            "config.json would be that of another model with the fields of the one that is given (--like, or "
            "SOURCE/huggingface); give --like the folder of the model that was trained, or correct these fields there:"
        )
        raise ValueError("\n  ".join([first, *lines]))


def _other_tensors(family: Family, args: Namespace, config: Config) -> list[str]:
    """Which tensors an export has in other shapes than a reader of ``config`` expects."""
    ours, theirs = _shapes(family.units(hybrid.as_gpt(args), config)), _shapes(model_of_config(config).units)
    return [
        f"{name}: {ours.get(name)} in the checkpoint, {theirs.get(name)} there"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _shapes(units: list[Unit]) -> dict[str, tuple[int, ...]]:
    return {named.name: tuple(named.shape) for unit in units for named in unit.hf}


# Megatron is imported for these alone, so that `lightning-convert --help` need not wait for it.


def saved_args(flags: list[str]) -> Namespace:
    """See ``training.models``."""
    from ..training import models

    return models.saved_args(flags)


def family_of_args(args: Namespace, family: Any) -> tuple[Any, Config]:
    """See ``training.models``."""
    from ..training import models

    return models.family_of_args(args, family)


def differences_of_function(args: Namespace, config: Config) -> list[str]:
    """See ``training.models``."""
    from ..training import models

    return models.differences_of_function(args, config)


def kinds_of_layers(args: Namespace) -> list[str]:
    """See ``training.models``."""
    from ..training import models

    return models.kinds_of_layers(args)
