"""Families of released models: what a Hugging Face config.json means in Megatron's flags, and the other way round."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterable
from typing import Any, Protocol

from ..config import flag_of
from .kinds import check_kind, check_kinds
from .units import Unit

logger = logging.getLogger("lightning_megatron")

Config = dict[str, Any]
Flags = dict[
    str, Any
]  # attribute of Megatron's args -> value; None, and Megatron's switches that are off, are left out


class Family(Protocol):
    """What every family of models tells."""

    NAME: str

    def claims(self, config: Config) -> bool:
        """Whether a config.json is of this family.

        Raises:
            ValueError: it looks like it and is not.
        """

    def flags(self, config: Config) -> Flags:
        """Megatron's flags of a config.json.

        Raises:
            ValueError: a field that cannot be represented, by name and value.
        """

    def config(self, args: Namespace) -> Config:
        """The config.json of a model that ``args`` describe, as far as they decide it."""

    def units(self, args: Namespace, config: Config) -> list[Unit]:
        """All tensors of both checkpoints, of which Megatron's has ``args`` and the other ``config``."""

    def tiny(self, config: Config) -> Config:
        """The same shape of architecture at test size."""


# Models that people may take for one of these.
_KNOWN = {
    "minicpm_sala": "8 of its 32 layers are InfLLM-v2 sparse attention",
    "kimi_linear": "Kimi Delta Attention has a decay that depends on the data",
    "qwen3_next": "gated delta net has a decay that depends on the data",
    "gated_linear_attention": "its decay depends on the data",
    "mamba2": "its decay depends on the data",
}


def families() -> tuple[Family, ...]:
    """All of them."""
    from . import bailing, minimax, tnl

    return bailing, minimax, tnl


def family_of(config: Config) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: none of them, or a model that is known not to be one of them; or a value that a field cannot have.
    """
    for name in ("model_type", "architectures"):
        check_kind(name, config.get(name))
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    for family in families():
        if family.claims(config):
            check_kinds(config)
            return family
    if kind in _KNOWN:
        raise ValueError(f"config.json: model_type {kind!r}: {_KNOWN[kind]}; it is not supported")
    names = ", ".join(family.NAME for family in families())
    raise ValueError(
        f"config.json: model_type {kind!r}, architectures {', '.join(architectures) or 'none'} is no model that is "
        f"known here; known are {names}"
    )


def command_line(flags: Flags) -> list[str]:
    """Flags as they are written on a command line."""
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            if value is False and name.startswith("lightning_"):  # our switches have both directions
                words.append(flag_of("no_" + name))
            continue
        words.append(flag_of(name))
        if value is not True:
            words.append(str(value))
    return words


def pattern(values: Iterable[Any]) -> str:
    """A list with one entry a layer as Megatron's flags take it: ``([1]*3+[0])``."""
    runs: list[list[Any]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return "(" + "+".join(f"[{value}]*{count}" if count > 1 else f"[{value}]" for value, count in runs) + ")"


# What every model of these families has.
COMMON: Flags = dict(
    normalization="RMSNorm", swiglu=True, disable_bias_linear=True, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


class Fields:
    """The fields of a config.json, each of which must be read, refused, or known to change no function."""

    def __init__(self, config: Config, free: Iterable[str]):
        self.config, self.seen = config, {*free, *FREE}

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or ``default`` where the field is missing or null."""
        self.seen.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ValueError(f"config.json: {name} is missing")
        return value

    def only(self, name: str, *allowed: Any, why: str = "which this package does not have") -> None:
        """Refuse other values than these, of which the first is that of a missing field."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"config.json: {name} is {value!r}, {why}; it may be {' or '.join(map(repr, allowed))}")

    def warn_of_others(self) -> None:
        others = sorted(self.config.keys() - self.seen)
        if others:
            logger.warning(
                "config.json has fields that are not known here and that are ignored: %s; if one of them changes what "
                "the model computes, the conversion is wrong",
                ", ".join(others),
            )


def rotary(fields: Fields) -> tuple[int, float | None]:
    """The base of the angles, and the part of the head dim that turns, None where no field says it.

    ``rope_parameters`` is where transformers 5 keeps both; ``rope_scaling``, which was there before, has neither.

    Raises:
        ValueError: scaled angles, further entries, or two fields that contradict each other.
    """
    said: dict[str, dict[str, Any]] = {"rope_theta": {}, "partial_rotary_factor": {}}
    for name in said:
        said[name] = {name: fields.get(name)}
    for name in ("rope_parameters", "rope_scaling"):
        given = {key: value for key, value in fields.get(name, {}).items() if value is not None}
        kinds = [given.pop(key, "default") for key in ("rope_type", "type")]
        check_kinds(given)
        if name == "rope_parameters":
            for key in said:
                said[key][f"{name}.{key}"] = given.pop(key, None)
        if kinds != ["default"] * 2 or given:
            raise ValueError(
                f"config.json: {name} is {fields.get(name)!r}: scaled rotary embeddings are not supported here, only "
                "rope_type default"
            )
    found = {}
    for name, values in said.items():
        values = {where: value for where, value in values.items() if value is not None}
        if len(set(values.values())) > 1:
            both = " and ".join(f"{where} {value!r}" for where, value in values.items())
            raise ValueError(f"config.json: {both} contradict each other; give one of them")
        found[name] = next(iter(values.values()), None)
    return int(found["rope_theta"] or 10000), found["partial_rotary_factor"]


def check_divides(part: str, size: int, whole: str, of: int) -> None:
    """Refuse a number, of the field ``part``, that does not divide that of the field ``whole``."""
    if of % size:
        raise ValueError(f"config.json: {part} is {size}, which does not divide {whole} {of}; correct one of them")


def groups_of(fields: Fields, heads: int) -> int:
    """``num_key_value_heads``: heads of k and v of the softmax layers.

    Raises:
        ValueError: they do not divide the heads of q.
    """
    groups: int = fields.get("num_key_value_heads", heads)
    check_divides("num_key_value_heads", groups, "num_attention_heads", heads)
    return groups


def check_rotated(said: str, channels: int, dim: int) -> None:
    """Refuse rotary embeddings of channels that are not there, or that have no second one to turn with."""
    if channels % 2 or not 2 <= channels <= dim:
        raise ValueError(
            f"config.json: {said} rotates {channels} of the {dim} channels of a head, and pairs of channels turn: an "
            f"even number from 2 to {dim} is possible; correct it, or head_dim"
        )


def check_chosen(chosen: int, experts: int, said: str) -> None:
    """Refuse more chosen experts than there are; ``said`` is the field of their number."""
    if chosen > experts:
        raise ValueError(
            f"config.json: num_experts_per_tok is {chosen}, and {said} is {experts}; it may be at most that: correct "
            "one of them"
        )


def check_lightning(layers: list[bool], said: str) -> None:
    """Refuse a model without lightning layers; ``said`` are the fields that place them, for the message."""
    if True not in layers:
        raise ValueError(
            f"config.json: {said} leave no lightning layer among {len(layers)} layers, and every model here has some; "
            "correct these fields"
        )


# Of every config.json: names, sizes of vocabularies' special tokens, generation, storage.
FREE = tuple(
    """architectures model_type auto_map torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id
    pad_token_id initializer_range attention_dropout output_router_logits quantization_config _name_or_path
    router_aux_loss_coef output_dropout embedding_dropout return_dict chunk_size_feed_forward id2label label2id
    is_encoder_decoder output_attentions output_hidden_states problem_type""".split()
)
