"""Which model a folder or a checkpoint holds: its args in Megatron, its config.json, its tensors."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NamedTuple

from ..models.family import Config, command_line, family_of
from ..models.units import Unit


class Model(NamedTuple):
    """A model in both formats."""

    flags: list[str]  # Megatron's, as on a command line
    args: Namespace
    config: Config
    units: list[Unit]


def model_of_config(config: Config) -> Model:
    """From a config.json.

    Raises:
        ValueError: what cannot be represented, by field.
    """
    family = family_of(config)
    flags = command_line(family.flags(config))
    args = saved_args(flags)
    return Model(flags, args, config, family.units(args, config))


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
        config = {**original, **config, "vocab_size": original.get("vocab_size", config["vocab_size"])}
        config.pop("quantization_config", None)  # weights are exported as they were trained
    return Model([], args, config, family.units(args, config))


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
