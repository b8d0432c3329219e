"""Lets ``--experimental-attention-variant lightning`` name the layers of this package.

Symbol:   megatron.training.arguments.parse_args
Why:      the flag's values are a closed set. Here ``lightning`` is one more, and means what ``--spec
          lightning_megatron.spec lightning_spec`` means: that is what Megatron's args say afterwards, and checkpoints
          with them, so that one saved this way also resumes with ``--spec``, and the other way round.
Versions: megatron-core 0.19, 0.20
Can go:   when a package can register a variant of attention.

``python -m lightning_megatron.run pretrain_gpt.py ...`` applies it: the flag is parsed before anything that it names
could be imported. Without the patch Megatron's parser refuses the value, as it refuses a misspelt one.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from ._replace import replace

SYMBOLS = ("megatron.training.arguments.parse_args",)
PARAMETERS = ("extra_args_provider", "ignore_unknown_args")
FLAG, NAME = "--experimental-attention-variant", "lightning"
SPEC = ["lightning_megatron.spec", "lightning_spec"]


def add_choice(parser: ArgumentParser) -> None:
    """Let the flag take ``lightning``, too.

    Raises:
        RuntimeError: the parser has no such flag.
    """
    action = next((action for action in parser._actions if FLAG in action.option_strings), None)
    if action is None:
        raise RuntimeError(f"lightning_megatron names its layers by {FLAG}, and this Megatron has no such flag")
    action.choices = (*(action.choices or ()), NAME)


def _wrap(original: Callable[..., Namespace]) -> Callable[..., Namespace]:
    def parse_args(
        extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None, ignore_unknown_args: bool = False
    ) -> Namespace:
        parsers: list[ArgumentParser] = []

        def provider(parser: ArgumentParser) -> ArgumentParser:
            add_choice(parser)
            parsers.append(parser if extra_args_provider is None else extra_args_provider(parser))
            return parsers[-1]

        args = original(provider, ignore_unknown_args)
        if getattr(args, "experimental_attention_variant", None) == NAME:
            _name_spec(args, parsers[-1].error)
        return args

    return parse_args


def _name_spec(args: Namespace, refuse: Callable[[str], Any]) -> None:
    """The variant as the spec that it stands for. ``refuse`` ends the process with its message."""
    if args.spec is not None:
        refuse(
            f"{FLAG} {NAME} and --spec {' '.join(args.spec)} both name the layers: leave out one (for other options of "
            "lightning layers, give --spec alone)"
        )
    if args.hybrid_layer_pattern is not None or args.hybrid_override_pattern is not None:
        refuse(
            f"{FLAG} {NAME} is for GPTModel, and --hybrid-layer-pattern names the layers of HybridModel: leave the "
            "variant out, and write L for a lightning layer in the pattern"
        )
    args.experimental_attention_variant, args.spec = None, list(SPEC)


def apply() -> None:
    """Apply the patch, before the command line is parsed; a second call does nothing."""
    replace(SYMBOLS[0], PARAMETERS, _wrap, f"{FLAG} {NAME} stands for --spec {' '.join(SPEC)}")
