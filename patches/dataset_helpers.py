"""Lets ``pretrain()`` run from the megatron-core wheel, and use helpers that are built already.

Symbol:   megatron.core.datasets.utils.compile_helpers
Why:      it runs ``make`` in megatron/core/datasets, but the wheel ships the compiled ``helpers_cpp`` without a
          Makefile, so ``pretrain()`` exits with status 1 while it initialises. The Makefile of a checkout builds for
          the ``python3`` on PATH, which is another than the running one where a venv is not activated.
Versions: megatron-core 0.19, 0.20
Can go:   when compile_helpers returns by itself where ``helpers_cpp`` imports, or the wheel carries the Makefile.

The only caller, ``megatron.training.initialize._compile_dependencies``, imports the symbol when it runs; no module
holds another reference. In a Megatron-LM checkout, which has its Makefile, the original runs as before unless this
Python has helpers that are as new as their source, by which make decides, too.
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

        folder = Path(datasets.__path__[0])
        if not _compiled(folder / "helpers.cpp" if (folder / "Makefile").exists() else None):
            original()

    return compile_helpers


def _compiled(source: Path | None) -> bool:
    """Whether the helpers import, and are not older than ``source``."""
    try:
        helpers = importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        return False
    return source is None or Path(helpers.__file__).stat().st_mtime >= source.stat().st_mtime


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], (), _wrap, "helpers that are built already are used as they are")
