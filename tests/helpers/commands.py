"""Command lines of lightning_megatron.pretrain, up to where Megatron would start: what they end in, and how."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import launch

WENT_ON = 77  # exit status of a command line that is accepted
_LIMIT = 60.0


class Outcome(NamedTuple):
    """How a command line ended."""

    status: int  # WENT_ON: everything is checked, and Megatron would start
    out: str
    err: str


@contextlib.contextmanager
def checker() -> Iterator:
    """check(flags, world=1, **env): ``Outcome`` of ``lightning_megatron.pretrain flags`` as rank 0 of ``world``.

    One process imports everything once, and forks one for each line. It runs the program's ``main`` as it is, but for
    the last call: instead of Megatron's training loop, which reads data and builds the model, comes status ``WENT_ON``.
    """
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        log.touch()
        variables = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        process = launch._context().Process(target=launch._enter, args=(_serve, (theirs, folder), variables, log))
        process.start()
        theirs.close()

        def check(flags: list[str], world: int = 1, **env: str) -> Outcome:
            ours.send((flags, env | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}))
            if not ours.poll(_LIMIT):
                raise TimeoutError(f"no end of {flags} after {_LIMIT} s")
            return Outcome(*ours.recv())

        try:
            yield check
        finally:
            ours.close()
            process.join(10)
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)


def _serve(pipe, folder: str) -> None:
    import lightning_megatron.pretrain
    import lightning_megatron.training.run  # noqa: F401  heavy, and the same for all

    while True:
        try:
            flags, env = pipe.recv()
        except EOFError:
            return
        out, err = Path(folder, "out"), Path(folder, "err")
        child = os.fork()
        if not child:
            _one(flags, env, out, err)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        pipe.send((status, out.read_text(errors="replace"), err.read_text(errors="replace")))


def _one(flags: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    """What a rank does with the command line; never returns."""
    status = 1
    try:
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        from lightning_megatron import pretrain
        from lightning_megatron.training import run

        def went_on(*_) -> None:
            raise SystemExit(WENT_ON)

        run.run = went_on
        os.environ.update(env)
        sys.argv = ["pretrain", *flags]
        pretrain.main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
