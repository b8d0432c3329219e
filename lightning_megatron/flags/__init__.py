"""Megatron's flags that lightning layers cannot honour, in tables: refused, or named in a line of the log.

They hold in both ways of starting, lightning_megatron.pretrain and pretrain_gpt.py --spec: runtime.py reads them. What
matters to the own entry point alone is in training/refusals.py.
"""

from __future__ import annotations

from argparse import Namespace

from ..compat import importable
from ..config import LightningOptions, flag_of, lightning_pattern
from . import experts, fp8, latent, later, log, memory, mlp, optimizers, refused, warned
from .refused import REFUSED_ALWAYS
from .rules import TE, Rule, Run, shown
from .unread import OPTIMIZER_ONLY, ROTARY_ONLY, SOFTMAX_ONLY

__all__ = [
    "OPTIMIZER_ONLY", "REFUSED", "REFUSED_ALWAYS", "ROTARY_ONLY", "SOFTMAX_ONLY", "WARNED", "flag_of",
    "messages_of_refusal", "refuse_parts", "shown", "warnings_of",
]  # fmt: skip

REFUSED = (
    *refused.REFUSED,
    *fp8.REFUSED,
    *later.REFUSED,
    *latent.REFUSED,
    *memory.REFUSED,
    *experts.REFUSED,
    *mlp.REFUSED,
    *memory.GRAPHS,
    *optimizers.REFUSED,
    *log.REFUSED,
)
WARNED = (*latent.WARNED, *optimizers.WARNED, *memory.WARNED, *mlp.WARNED, *experts.WARNED, *warned.WARNED)


def refuse_parts(asked) -> None:
    """Refuse parts that no spec here builds, and what is refused whatever else is asked for.

    Args:
        asked: a config, or Megatron's flags, maybe before there is a config.

    Raises:
        ValueError: naming what was given, and the remedy.
    """
    implementation = getattr(asked, "transformer_impl", "local")
    if implementation not in ("local", "transformer_engine"):
        raise ValueError(
            f"--transformer-impl {implementation} is not supported by lightning specs; use local or transformer_engine"
        )
    if implementation == "transformer_engine" and not importable(TE):
        raise ValueError(
            "--transformer-impl transformer_engine needs TransformerEngine, but transformer_engine is not installed, "
            "or does not import; install transformer_engine[pytorch], or pass --transformer-impl local"
        )
    if getattr(asked, "multi_latent_attention", False) and getattr(asked, "attention_output_gate", False):
        raise ValueError(
            "--attention-output-gate is not an option of multi-latent attention; leave it out (lightning layers have "
            "--lightning-gate)"
        )
    for name, text in REFUSED_ALWAYS.items():
        value = getattr(asked, name, None)
        if value:
            raise ValueError(f"{flag_of(name)}{shown(value)} {text}")


def messages_of_refusal(config, options: LightningOptions, layout: str, args: Namespace | None = None) -> list[str]:
    """What is asked for and cannot be honoured, by the table."""
    return _messages(REFUSED, _run(config, options, layout, args))


def warnings_of(config, options: LightningOptions, layout: str, args: Namespace | None = None) -> list[str]:
    """Lines for the log: flags that change less than they seem to, or cost something and give nothing."""
    run = _run(config, options, layout, args)
    lines = _messages(WARNED, run)
    if not run.softmax:
        given = _given(SOFTMAX_ONLY, run)
        if config.num_query_groups != config.num_attention_heads:
            given.append(
                f"--num-query-groups {config.num_query_groups} (for lightning layers: --lightning-num-kv-heads)"
            )
        if given:
            besides = " besides its MTP layers" if run.attends else ""
            lines.append(", ".join(given) + f": act on softmax layers only; this model has none{besides}")
    if run.get("position_embedding_type") is not None and not run.rotates:
        if given := _given(ROTARY_ONLY, run):
            lines.append(", ".join(given) + ": act on rotary embeddings only; no layer of this model uses them")
    unread = [
        f"{flag_of(name)}{shown(value)} (needs {where})"
        for name, (defaults, read, where) in OPTIMIZER_ONLY.items()
        if (value := run.get(name)) is not None and value not in defaults and not read(run)
    ]
    if unread and not run.get("skip_train"):
        lines.append(", ".join(unread) + ": not read in this training")
    return lines


def _run(config, options: LightningOptions, layout: str, args: Namespace | None) -> Run:
    pattern = lightning_pattern(config.linear_attention_freq, config.num_layers)
    return Run(config, options, layout, Namespace() if args is None else args, pattern.count(False))


def _messages(table: tuple[Rule, ...], run: Run) -> list[str]:
    return [message for rule in table if (message := rule.message(run)) is not None]


def _given(table: dict[str, tuple], run: Run) -> list[str]:
    """Flags and values of a table that differ from what nobody gave."""
    values = {name: run.get(name) for name in table}
    return [
        flag_of(name) + shown(value)
        for name, value in values.items()
        if getattr(value, "name", value) not in table[name]
    ]
