"""Start real multi-process runs from a test: Megatron's pretrain(), or a function on every rank.

    run = run_pretrain(FLAGS, nproc=2)       # losses, log and seconds of `lightning_megatron.pretrain FLAGS`
    results = spawn(fn, 2, *args)            # [fn(0, 2, *args), fn(1, 2, *args)], each in its own process

On CPUs with gloo; with `gpus=True` on as many GPUs with NCCL, or, where there is one only, all on that one: NCCL takes
them for ranks on hosts of one GPU each, and connects them through sockets.

Importing torch and Megatron costs 5 s of CPU time per process, a small run itself less than 1 s. So processes are
forked from a server (multiprocessing's forkserver) that has imported them once, and the package under test, in which
nothing happens at import.
Every process is new, runs one thing and ends: no state passes from one run to the next. What reads the
environment while torch, triton or Megatron is imported needs `torchrun=True`, which starts everything afresh.
"""

import contextlib
import faulthandler
import functools
import gc
import importlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from examples import megatron_log
from examples.mortal import end_with_parent, mortal
from tests.checkout import python_path

ROOT = Path(__file__).resolve().parents[1]
SHIM = ROOT / "examples" / "cpu_shim.py"
# A GPU, if there is one, is hidden: these runs are for the CPU. One thread, since ranks share the cores.
ENV = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
GPU_ENV = {name: value for name, value in ENV.items() if name != "CUDA_VISIBLE_DEVICES"}
PRELOAD = "LIGHTNING_TESTS_PRELOAD"
STARTING = threading.Lock()  # exec finds no environment (EFAULT) while another thread changes it, as _context() does
ERROR = r"(\[rank\d+\]: )?Traceback \(most|Fatal Python error|terminate called"  # how a line begins that tells of one
GRACE = 10.0  # seconds for the other ranks to end, and show why, once one has failed


@dataclass(frozen=True)
class Run:
    """What a run of pretrain() left behind."""

    losses: list[float]  # lm loss of each iteration, see examples/megatron_log.py
    log: str  # stdout and stderr of all ranks, as they came
    seconds: float
    ok: bool


def run_pretrain(
    module_args: Sequence[str],
    nproc: int = 1,
    *,
    module: str = "lightning_megatron.pretrain",
    script: str | os.PathLike | None = None,
    timeout: float = 300.0,
    env: dict[str, str] | None = None,
    check: bool = True,
    torchrun: bool = False,
    gpus: bool = False,
) -> Run:
    """Run `python -m module *module_args` (or the script) on nproc ranks under the CPU shim, in the repository root.

    Args:
        gpus: without the shim, rank r on GPU r; on one GPU, if there is only one.
        env: variables added to the environment of every rank.
        check: raise AssertionError, with the end of the log, if a rank fails or the timeout (seconds) passes.
        torchrun: start through torchrun, as a user would, and not from the preloaded server.
    """
    argv = [*(["-m", module] if script is None else [os.fspath(script)]), *map(str, module_args)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        if torchrun:
            error = _torchrun(argv, nproc, env or {}, log, timeout)
        else:
            error = _fork(_run_main, (argv, gpus), nproc, env or {}, log, timeout, gpus)
        text = log.read_text(errors="replace")
    if error and check:
        raise AssertionError(f"{nproc} x cpu_shim.py {' '.join(argv)}: {error}\n{excerpt(text)}")
    losses = [step.loss for step in megatron_log.steps(text) if step.loss is not None]
    return Run(losses, text, time.monotonic() - start, ok=not error)


def spawn(fn: Callable[..., Any], nproc: int, *args: Any, timeout: float = 120.0, gpus: bool = False) -> list[Any]:
    """Return [fn(rank, nproc, *args) for each rank], run in nproc processes that form the default group.

    fn must be importable (a module-level function); args and results must pickle. AssertionError carries the
    traceback of the first rank that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        error = _fork(_run_function, (fn, args, folder, gpus), nproc, {}, log, timeout, gpus)
        if error:
            name = getattr(fn, "__qualname__", fn)
            raise AssertionError(f"{name} on {nproc} ranks: {error}\n{excerpt(log.read_text(errors='replace'))}")
        # Not pickle: megatron/core/safe_globals.py makes tensors pickle in a way that imports Megatron here.
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(nproc)]


def excerpt(log: str, lines: int = 60) -> str:
    """The first error of a log with what was said before it, and the end: between them ranks report others as gone."""
    every = log.splitlines()
    first = next((i for i, line in enumerate(every) if re.match(ERROR, line)), 0)
    first = max(first - 10, 0)
    head, rest = every[first : first + lines], every[first + lines :]
    return "\n".join(head + (["[...]"] if len(rest) > lines else []) + rest[-lines:])


# ---- starting processes ----------------------------------------------------------------------------------------


def _torchrun(argv: list[str], nproc: int, env: dict[str, str], log: Path, timeout: float) -> str | None:
    """Run the shim under torchrun; return what went wrong, None for nothing."""
    command = mortal("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", str(SHIM), *argv)
    with open(log, "wb") as out:
        with STARTING:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **ENV, **env}, stdout=out, stderr=out, start_new_session=True
            )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"no end after {timeout} s"
        finally:
            if process.poll() is None:
                _kill(process.pid)
                process.wait()
    return f"torchrun exited with {code}" if code else None


def _fork(
    target: Callable, args: tuple, nproc: int, env: dict[str, str], log: Path, timeout: float, gpus: bool = False
) -> str | None:
    """Run target(*args) in nproc processes with torchrun's variables; return what went wrong, None for nothing."""
    # A store of our own, as torchrun's agent has: rank 0 need not find a port that is still free when it starts.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {
        **env,
        **{"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)},
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
    }
    log.touch()
    ranks = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]
    if gpus and torch.cuda.device_count() == 1 < nproc:
        hosts = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NCCL_SOCKET_IFNAME": "lo"}
        ranks = [{**variables, **hosts, "NCCL_HOSTID": f"host{rank}"} for rank, variables in enumerate(ranks)]
    with STARTING:
        context = multiprocessing.get_context("spawn") if gpus else _context()  # the server's processes are for CPUs
    processes = [context.Process(target=_enter, args=(target, args, variables, log)) for variables in ranks]
    error, deadline = None, time.monotonic() + timeout
    try:
        for process in processes:
            with STARTING:
                process.start()
        running = list(processes)
        while running:
            multiprocessing.connection.wait([p.sentinel for p in running], max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline and all(p.is_alive() for p in running):
                error = error or f"no end after {timeout} s; the log ends with every rank's stack"
                for process in running:
                    os.kill(process.pid, signal.SIGUSR1)
                    time.sleep(0.5)  # one after the other, or the stacks mix
                break
            ended = [p for p in running if not p.is_alive()]
            running = [p for p in running if p not in ended]
            failed = [f"rank {processes.index(p)} exited with {p.exitcode}" for p in ended if p.exitcode]
            if failed and not error:  # of several none is known to be the first
                error, deadline = ", ".join(failed), min(deadline, time.monotonic() + GRACE)
    finally:
        for process in [p for p in processes if p.pid is not None and p.is_alive()]:
            _kill(process.pid)
            process.kill()  # where it was not yet a group of its own
            process.join()
        for process in [p for p in processes if p.exitcode]:
            _kill(process.pid)  # a rank that died leaves what it had forked, such as writers of a checkpoint
    return error


def _kill(group: int) -> None:
    """Kill a process group with all that is left of it, such as data loader workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    """The forkserver, which imports this module and with it, see below, torch and Megatron under the shim."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, {**ENV, "PYTHONPATH": python_path(Path(__file__).parent), PRELOAD: "1"}):
        multiprocessing.forkserver.ensure_running()
    return context


# ---- in the server and its children ----------------------------------------------------------------------------


def _shim():
    """examples/cpu_shim.py by the name that scripts use, which find each other in their folder."""
    if "cpu_shim" not in sys.modules:
        spec = importlib.util.spec_from_file_location("cpu_shim", SHIM)
        sys.modules["cpu_shim"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["cpu_shim"])
    return sys.modules["cpu_shim"]


def _preload() -> None:
    """Import what a run of pretrain() or a test's function would import, and not the programs themselves."""
    with warnings.catch_warnings(action="ignore"):  # only of the imports: TransformerEngine and apex are missing
        importlib.import_module("lightning_megatron.cpu").enable_pretrain()
        importlib.import_module("torch._dynamo")  # a first step of torch.optim imports it
        importlib.import_module("megatron.core.tokenizers.text")  # any tokenizer does; it brings transformers
        importlib.import_module("tests.helpers.parser").read_help_once()
    for name in ("training.run", "inference.engine", "hybrid_model"):  # these import all others that a run needs
        importlib.import_module(f"lightning_megatron.{name}")
    importlib.import_module("pytest")  # of test modules, whose functions spawn() runs
    # Shuffling six million samples of mock data, of which tests read a few, takes longer than their training.
    importlib.import_module("megatron.core.datasets.gpt_dataset").MockGPTLowLevelDataset.size = 1000
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("tests.helpers.interpreter").set_up()
    gc.freeze()  # so that no process looks through a million objects again, or copies their pages


def _enter(target: Callable, args: tuple, env: dict[str, str], log: Path) -> None:
    """First function of every process: become its own group, write to the log, take the environment.

    It ends with its parent: the server, which ends when this module's process does, or (with GPUs) that process itself,
    in whose thread _fork waits for it.
    """
    end_with_parent()
    if not multiprocessing.parent_process().is_alive():
        return
    server = multiprocessing.forkserver._forkserver
    if server._forkserver_alive_fd is not None:  # the server lives as long as anyone holds this end of a pipe
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    os.setsid()
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ.update(env)
    os.chdir(ROOT)
    faulthandler.register(signal.SIGUSR1)
    target(*args)


def _run_main(argv: list[str], gpus: bool) -> None:
    sys.argv = argv if gpus else [str(SHIM), *argv]
    if not gpus:
        _shim().main()
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def _run_function(fn: Callable, args: tuple, folder: str, gpus: bool) -> None:
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    result = fn(rank, world, *args)
    torch.save(result, Path(folder, f"result{rank}"))
    if dist.is_initialized():
        dist.barrier()  # no rank takes its connections away while another still uses them
        dist.destroy_process_group()


if os.environ.pop(PRELOAD, None):
    _preload()
