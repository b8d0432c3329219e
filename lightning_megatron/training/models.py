"""Released models as Megatron's args: what it would save with one, which one args describe, and how large they are."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from argparse import ArgumentParser, Namespace
from typing import Any, NoReturn

from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments, validate_args

from ..config import lightning_pattern
from ..hybrid_model import add_letter, checked
from ..models import hybrid
from ..models.family import Config, Family, command_line, families, family_of
from ..models.presets import PRESETS, REFUSED, TINY, preset_flags
from ..record import ATTRIBUTE, ROWS_OF_VOCABULARY, differences, function_record, options_from_args
from .arguments import add_arguments, args_defaults


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Not an exit of the program: nobody typed these flags."""
        raise ValueError(message)


@functools.cache
def parser() -> ArgumentParser:
    """Megatron's flags and ours."""
    return add_arguments(add_megatron_arguments(_Parser(prog="lightning_megatron", allow_abbrev=False)))


def defaults_of_model(name: str) -> tuple[dict[str, Any], str]:
    """What ``--lightning-model`` stands for: defaults for the parser, so that a flag that the user gives wins, and a
    line for the log.
    """
    words = command_line(preset_flags(name))
    given, nothing = (vars(parser().parse_args(list(x))) for x in (words, ()))
    line = f"--lightning-model {name}: unless given as flags, {' '.join(words)}"
    return {dest: value for dest, value in given.items() if value != nothing[dest]}, line


def saved_args(words: list[str]) -> Namespace:
    """The args that Megatron would save in a checkpoint of a model with these flags, the record of its function too.

    Args:
        words: a command line, as ``command_line`` writes it; what it leaves out has Megatron's defaults.

    Raises:
        ValueError: Megatron has no such model.
    """
    try:
        return _saved_args(words)
    except (AssertionError, TypeError, ZeroDivisionError) as error:  # its checks, and what it does before them
        raise ValueError(f"Megatron refuses this model: {str(error) or repr(error)}\n  {' '.join(words)}") from error


def _saved_args(words: list[str]) -> Namespace:
    more = "--micro-batch-size 1 --tokenizer-type NullTokenizer --eval-iters 0".split()
    if "--seq-length" not in words:
        more += ["--seq-length", words[words.index("--max-position-embeddings") + 1]]
    given = parser().parse_args([*words, *more])
    if given.hybrid_layer_pattern is not None:
        add_letter()
    given.rank = given.local_rank = 0
    given.world_size = 1
    with contextlib.redirect_stdout(io.StringIO()):
        validate_args(given, args_defaults(given))
    every = given.make_vocab_size_divisible_by
    given.padded_vocab_size = (given.vocab_size + every - 1) // every * every
    config, options = core_transformer_config_from_args(given), options_from_args(given)
    if given.hybrid_layer_pattern is not None:
        config = checked(config, options, given.hybrid_layer_pattern)
    setattr(given, ATTRIBUTE, function_record(config, options, given))
    return given


def family_of_args(args: Namespace, wanted: Family | None = None) -> tuple[Family, Config]:
    """The family whose config.json describes exactly the function of a trained model, and that config.

    Args:
        args: as Megatron saved them, of a GPTModel or a HybridModel.
        wanted: the only family to look at; all by default.

    Raises:
        ValueError: none does; with what differs, for every family.
    """
    record, args = _record(args), hybrid.as_gpt(args)
    lines = []
    for family in families() if wanted is None else (wanted,):
        try:
            config = family.config(args)
            again = getattr(saved_args(command_line(family.flags(config))), ATTRIBUTE)
        except (ValueError, KeyError, AssertionError, TypeError) as error:
            lines.append(f"{family.NAME}: {error}")
            continue
        found = [row for row in differences(record, again) if row[0] != ROWS_OF_VOCABULARY]
        if not found:
            return family, config
        lines += [f"{family.NAME}: {flag}: {saved} in the checkpoint, {now} there" for flag, saved, now in found]
    what = "no family of released models has" if wanted is None else f"no config.json of {wanted.NAME} describes"
    raise ValueError("\n  ".join([f"{what} this function:", *lines]))


def differences_of_function(args: Namespace, config: Config) -> list[str]:
    """In what the function of a trained model differs from that of a config.json; nothing if they are the same.

    Args:
        args: as Megatron saved them.

    Raises:
        ValueError: the checkpoint has no record of its function, or a pattern of no released model, or config.json is
            of no model that is known here.
    """
    again = getattr(saved_args(command_line(family_of(config).flags(config))), ATTRIBUTE)
    found = [row for row in differences(_record(hybrid.as_gpt(args)), again) if row[0] != ROWS_OF_VOCABULARY]
    return [f"{flag}: {saved} in the checkpoint, {now} by config.json" for flag, saved, now in found]


def _record(args: Namespace) -> dict[str, Any]:
    record: dict[str, Any] | None = getattr(args, ATTRIBUTE, None)
    if record is None:
        raise ValueError("the checkpoint has no record of its function; resume it once with this version, and save it")
    return record


def kinds_of_layers(args: Namespace) -> list[str]:
    """Of every layer of the released model: lightning or softmax."""
    args = hybrid.as_gpt(args)
    pattern = lightning_pattern(args.linear_attention_freq, args.num_layers)
    return ["lightning" if lightning else "softmax" for lightning in pattern]


def sizes(config: Config) -> tuple[str, ...]:
    """layers, softmax layers, hidden size, heads, experts (chosen / all), parameters, those that a token uses."""
    family = family_of(config)
    args = saved_args(command_line(family.flags(config)))
    every = active = 0.0
    for unit in family.units(args, config):
        for piece in unit.megatron:
            count = math.prod(piece.shape)
            every += count
            if piece.key.startswith("mtp."):  # it only helps training
                continue
            active += count * args.moe_router_topk / args.num_experts if ".experts.experts." in piece.key else count
    softmax = args.num_layers - sum(lightning_pattern(args.linear_attention_freq, args.num_layers))
    experts = f"{args.moe_router_topk}/{args.num_experts}" if args.num_experts else "-"
    numbers = (args.num_layers, softmax, args.hidden_size, args.num_attention_heads)
    return (*map(str, numbers), experts, readable(every), readable(active))


def readable(count: float) -> str:
    """1234567890 -> 1.23B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def table() -> str:
    """All presets with their sizes, for ``--lightning-model list``."""
    head = ("name", "layers", "softmax", "hidden", "heads", "experts", "parameters", "active")
    rows = [head] + [(name, *sizes(preset.config)) for name, preset in PRESETS.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    assumed = [f"  {name}: {', '.join(preset.assumed)}" for name, preset in PRESETS.items() if preset.assumed]
    return "\n".join(
        (
            *lines,
            f"Each also as NAME{TINY}: the same shape of architecture at test size. softmax: layers with softmax "
            "attention.",
            "Assumed, because no config.json was at hand (lightning-convert reads the real one):",
            *assumed,
            *(f"Not supported: {name}: {why}" for name, why in REFUSED.items()),
        )
    )
