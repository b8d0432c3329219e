"""Command lines that Megatron parses."""

import sys

import pytest
from megatron.training import arguments as megatron_arguments

from lightning_megatron import flags as tables
from lightning_megatron.training import arguments, refusals
from lightning_megatron.training.arguments import add_arguments
from tests.helpers.parser import read_help_once

read_help_once()

# Modules that ask which packages import.
ASKING = (arguments, refusals, tables, tables.refused, tables.memory, tables.mlp, tables.optimizers)
MODEL = (
    "--num-layers 3 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --vocab-size 128"
)


def parse_flags(monkeypatch: pytest.MonkeyPatch, flags: str = "", model: str = MODEL):
    """The arguments that Megatron makes of ``model`` and more flags."""
    monkeypatch.setattr(sys, "argv", ["pretrain", *model.split(), *flags.split()])
    return megatron_arguments.parse_args(add_arguments)


def pretend_without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """No module whose name starts with one of ``names`` imports for the checks of flags, and all others do."""
    for module in ASKING:
        monkeypatch.setattr(module, "importable", lambda name: not name.startswith(names) if names else True)
