"""What a converter must know of a family of models; ``family_of`` finds the one of a Hugging Face config.json."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, Protocol

from .units import Unit


class Family(Protocol):
    """Models of one architecture, of any size."""

    def flags(self, config: dict[str, Any]) -> list[str]:
        """Megatron's command line flags of a config.json.

        Raises:
            ValueError: names the field that Megatron cannot represent, with its value.
        """

    def config(self, args: Namespace) -> dict[str, Any]:
        """Fields of config.json for the args of a Megatron checkpoint."""

    def units(self, args: Namespace) -> list[Unit]:
        """All tensors of both checkpoints, each in one unit."""


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json, by its model_type and architectures.

    Raises:
        ValueError: names the model_type that no family has.
    """
    raise ValueError(f"model_type {config.get('model_type')!r} is not supported")


def family_of_args(args: Namespace) -> Family:
    """The family of a Megatron checkpoint that was not made from a Hugging Face folder.

    Raises:
        ValueError: no family has such args.
    """
    raise ValueError("no family is known for the args of this checkpoint")


def saved_args(flags: list[str]) -> Namespace:
    """The args that Megatron, started with these flags, would save in a checkpoint."""
    raise NotImplementedError
