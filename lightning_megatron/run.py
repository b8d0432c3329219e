"""Starts an unchanged script of Megatron-LM whose flags may name lightning layers.

    torchrun --nproc-per-node 8 -m lightning_megatron.run pretrain_gpt.py <flags> \\
        --experimental-attention-variant lightning --linear-attention-freq 8
    torchrun --nproc-per-node 8 -m lightning_megatron.run pretrain_hybrid.py <flags> --hybrid-layer-pattern L-L-L-*-

Megatron parses its flags before a ``--spec`` module is imported, so that no spec can add a name. This module applies
the two patches that do (``patches.attention_variant``, ``patches.hybrid_symbol``), and then runs the script as python
itself would. With ``--spec lightning_megatron.spec lightning_spec`` it is not needed.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .compat import check_megatron

USAGE = "usage: [torchrun ...] python -m lightning_megatron.run SCRIPT.py [flags of the script]"


def main() -> None:
    """Patch, then run the script that the first argument names, with the others. Without one, exit with status 2."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        _give_up(f"no script is given\n{USAGE}")
    script = Path(sys.argv[1])
    if not script.is_file():
        _give_up(f"{script}: no such file (from {Path.cwd()})\n{USAGE}")
    try:
        check_megatron()
        from . import hybrid_model
        from .patches import attention_variant

        attention_variant.apply()
        hybrid_model.apply()
    except (RuntimeError, ImportError) as error:
        _give_up(str(error))
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


def _give_up(message: str) -> None:
    print(f"lightning_megatron.run: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
