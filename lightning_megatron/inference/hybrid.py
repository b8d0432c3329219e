"""Checkpoints of HybridModel: which of them generate, and how a run cuts their pattern into pipeline stages."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from ..hybrid_model import FLAG, LETTER
from ..saved import saved_function
from ..training.models import parser

_SERVED = {LETTER: "lightning", Symbols.ATTENTION: "softmax", Symbols.MLP: "MLP", Symbols.MOE: "experts"}


def refuse_unserved(args: Namespace) -> None:
    """Refuse a checkpoint with layers that do not generate here.

    Args:
        args: as Megatron saved them.

    Raises:
        ValueError: what was given, what is allowed, and what to do.
    """
    pattern = args.hybrid_layer_pattern
    main = _main(pattern)
    allowed = ", ".join(f"{letter} ({kind})" for letter, kind in _SERVED.items())
    others = sorted(set(main) - set(_SERVED) - {Symbols.PIPE})
    if others:
        raise ValueError(
            f"{FLAG} {pattern} has layers {', '.join(others)}, and a HybridModel generates here with {allowed}; use "
            "Megatron's own inference, or train a model of these letters"
        )
    if LETTER not in main:
        raise ValueError(
            f"{FLAG} {pattern} has no lightning layer ({LETTER}): use Megatron's own inference, or train a model with "
            "some"
        )
    if saved_function(args).options is None:
        raise ValueError(
            f"{FLAG} {pattern}: it holds no record of its lightning options; resume it once with this version, and "
            "save it"
        )


def _main(pattern: str) -> str:
    """Without layers of multi-token prediction."""
    return pattern.partition(Symbols.MTP_SEPARATOR)[0]


def pattern_flags(saved: Namespace, flags: Sequence[str]) -> list[str]:
    """The pattern as this run reads it: with the stages that ``flags`` give, or those of the training where there are
    as many, or without any, so that Megatron makes them of equal size. Layers of multi-token prediction are left out:
    they only help training.

    Args:
        saved: args as Megatron saved them, of any model.
        flags: of this run.

    Returns:
        Flags to put behind ``flags``; none for GPTModel.

    Raises:
        ValueError: a pattern of another model, or one that does not make the stages of this run.
    """
    args = parser().parse_args(list(flags))
    given, trained = args.hybrid_layer_pattern, saved.hybrid_layer_pattern
    if not trained:
        if given is not None:
            raise ValueError(
                f"{FLAG} {given}: the checkpoint is of a GPTModel, whose layers have no letters; leave it out"
            )
        return []
    trained, given = _main(trained), None if given is None else _main(given)
    letters, stages = trained.replace(Symbols.PIPE, ""), args.pipeline_model_parallel_size
    if given is not None and given.replace(Symbols.PIPE, "") != letters:
        raise ValueError(
            f"{FLAG} {given}: the checkpoint has {letters}; give the same letters with {Symbols.PIPE} between pipeline "
            "stages, or leave it out"
        )
    uneven = args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers
    pattern = given or (trained if trained.count(Symbols.PIPE) == stages - 1 and not uneven else letters)
    cut = pattern.count(Symbols.PIPE) + 1
    if cut not in (1, stages):
        raise ValueError(
            f"{FLAG} {pattern} has {cut} pipeline stages, and --pipeline-model-parallel-size is {stages}: give as many"
        )
    if cut == 1 and len(letters) % stages and not uneven:
        raise ValueError(
            f"--pipeline-model-parallel-size {stages} does not divide the {len(letters)} layers of {FLAG} {letters}: "
            f"give {FLAG} with {stages - 1} {Symbols.PIPE} in it, between the stages, or another size"
        )
    return [FLAG, pattern]
