"""``--lightning-model``: the flags of released models, and the args that Megatron saves with such a model."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser

from ..flags import flag_of
from ..models.presets import preset_config

LIST = "list"
# Megatron's switches that models set, which have only one direction: --no-... of each takes them back.
_SWITCHES = (
    "swiglu", "disable_bias_linear", "untie_embeddings_and_output_weights", "group_query_attention", "qk_layernorm",
    "multi_latent_attention", "moe_router_enable_expert_bias", "apply_residual_connection_post_layernorm",
)  # fmt: skip


class _Model(argparse.Action):
    """A name that is known, or ``list``."""

    def __call__(self, parser, namespace, value, option_string=None):
        if value != LIST:
            try:
                preset_config(value)
            except ValueError as error:
                parser.error(str(error))
        setattr(namespace, self.dest, value)


def add_model_arguments(parser: ArgumentParser, group: argparse._ArgumentGroup) -> None:
    """``--lightning-model``, and ``--no-...`` of switches that it sets."""
    group.add_argument(
        "--lightning-model",
        dest="released_model",
        action=_Model,
        metavar="NAME",
        help="the flags of a released model, which the log prints and any flag overrides; NAME@tiny: the same shape of "
        "architecture at test size; list: all names with their sizes",
    )
    for flag in map(flag_of, _SWITCHES):
        switch = parser._option_string_actions.get(flag)
        if switch is None:  # a parser without Megatron's flags
            continue
        text = f"opposite of {flag}, where --lightning-model or --use-checkpoint-args sets it"
        off = dict(dest=switch.dest, action="store_const", const=not switch.const, help=text)
        group.add_argument(f"--no-{flag[2:]}", **off)
