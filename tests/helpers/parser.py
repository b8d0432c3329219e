"""Megatron's parser, in a tenth of the time."""

from __future__ import annotations

import argparse
import functools

from megatron.training import arguments
from megatron.training.argument_utils import ArgumentGroupFactory


@functools.cache
def read_help_once() -> None:
    """Megatron makes its parser several times in a run, and each time reads help texts from the source of its classes:
    a quarter of a small run. They are read here, once.
    """
    read = functools.partial(ArgumentGroupFactory._get_field_docstrings, ArgumentGroupFactory)
    ArgumentGroupFactory._get_field_docstrings = staticmethod(functools.cache(read))
    arguments.add_megatron_arguments(argparse.ArgumentParser())
