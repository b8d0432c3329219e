"""Run Megatron's own training loop on a machine without a GPU.

    python examples/cpu_shim.py -m some.module --its --flags
    python examples/cpu_shim.py script.py --its --flags
    torchrun --nproc-per-node 2 examples/cpu_shim.py -m some.module --its --flags

Patches torch and Megatron in this process (``lightning_megatron.cpu`` says how), and runs the module or script. For
tests and demos, never for a machine with a GPU.
"""

import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run `-m module` or a script, as python itself would, after cpu.enable_pretrain()."""
    if len(sys.argv) < 2 or sys.argv[1:] == ["-m"]:
        sys.exit(__doc__)
    _cpu().enable_pretrain()
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")


def _cpu():
    """lightning_megatron.cpu of this checkout, installed or not."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    try:
        from lightning_megatron import cpu
    finally:
        del sys.path[0]
    return cpu


if __name__ == "__main__":
    del sys.path[0]  # this folder, which python put there
    main()
