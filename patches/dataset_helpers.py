"""Lets ``pretrain()`` run from the megatron-core wheel.

Symbol:   megatron.core.datasets.utils.compile_helpers
Why:      it runs ``make`` in megatron/core/datasets, but the wheel ships the compiled ``helpers_cpp`` without a
          Makefile, so ``pretrain()`` exits with status 1 while it initialises.
Versions: megatron-core 0.19
Can go:   when compile_helpers returns by itself where ``helpers_cpp`` imports, or the wheel carries the Makefile.

The only caller, ``megatron.training.initialize._compile_dependencies``, imports the symbol when it runs; no module
holds another reference. A Megatron-LM checkout has its Makefile, and there the original runs as before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from ._replace import replace

SYMBOLS = ("megatron.core.datasets.utils.compile_helpers",)


def _wrap(original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        import megatron.core.datasets as datasets

        has_makefile = (Path(datasets.__path__[0]) / "Makefile").exists()
        if has_makefile or not _compiled():
            original()

    return compile_helpers


def _compiled() -> bool:
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        return False
    return True


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], (), _wrap, "the helpers of the wheel are used as they are")
