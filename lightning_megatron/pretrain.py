"""Own entry point: ``torchrun ... -m lightning_megatron.pretrain``, or the console script ``lightning-pretrain``.

Megatron's ``pretrain()`` from the wheel, with Megatron's flags plus ``--lightning-*``. No Megatron-LM checkout needed.
This module stays light, so that a wrong megatron-core is named before anything of it is imported.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from typing import NoReturn

from .compat import check_megatron

_PROGRAM_START = time.time()  # Megatron reports how long the imports take


def main() -> None:
    """Train. What cannot work ends every rank with status 2 and a message, before any of them waits for another."""
    _check_ranks()
    if int(os.environ.get("RANK", "0")):  # what is not installed is worth telling once
        warnings.simplefilter("ignore", UserWarning)
    if "WORLD_SIZE" not in os.environ:  # started without torchrun: one process, and any free port
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    try:
        check_megatron()
    except RuntimeError as error:
        _give_up(error)

    from . import cpu
    from .checkpoint_folder import CheckpointError
    from .runtime import training_args
    from .training import failures, run
    from .training.sources import DataError

    main_entry = time.time()
    try:
        container, options = run.configure()
    except (ValueError, AssertionError, OSError) as error:  # OSError: a folder without a tokenizer, by transformers
        _give_up(error)
    if not cpu.can_train():
        _give_up(
            "torch finds no CUDA device (see nvidia-smi and CUDA_VISIBLE_DEVICES); a small model trains on a CPU with "
            "python examples/cpu_shim.py -m lightning_megatron.pretrain and the same flags"
        )
    run.apply_patches(options)
    try:
        run.run(container, _PROGRAM_START, main_entry)
    except (CheckpointError, DataError) as error:  # on every rank: all read the same file
        _give_up(error)
    except KeyboardInterrupt:
        if not int(os.environ.get("RANK", "0")):
            print(f"lightning-pretrain: stopped; {failures.how_to_go_on(training_args())}", file=sys.stderr, flush=True)
        sys.exit(130)
    except failures.ERRORS as error:
        if line := failures.explain(error, training_args()):
            traceback.print_exc()
            print(f"lightning-pretrain: {line}", file=sys.stderr, flush=True)
            sys.exit(1)
        raise
    finally:
        failures.end_data_workers()


def _check_ranks() -> None:
    """Without torchrun's variables, or with half of them, ranks would wait for others that never come."""
    ranks = {name: os.environ.get(name, usual) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    for name, value in ranks.items():
        if not (value.isascii() and value.isdigit()):
            _give_up(f"the environment has {name}={value}, which is no number: unset it; torchrun sets it by itself")
    if int(ranks["RANK"]) >= int(ranks["WORLD_SIZE"]):
        _give_up(
            f"the environment has RANK={ranks['RANK']}, which is not below the number of processes (WORLD_SIZE, "
            f"{ranks['WORLD_SIZE']} here): start with torchrun, which sets both; or unset RANK for one process"
        )


def _give_up(error: Exception | str) -> NoReturn:
    message = str(error)
    if isinstance(error, Exception) and not message:
        # A check without a message, outside of what training/values.py rewords: show the check.
        message = traceback.extract_tb(error.__traceback__)[-1].line or ""
    print(f"lightning-pretrain: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
