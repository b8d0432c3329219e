"""The launcher itself: results of every rank come back, and a rank that fails, dies or hangs fails the test, soon."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import launch
from tests.launch import ENV, ROOT, _fork, run_pretrain, spawn


def summed(rank, world, x):
    total = torch.full((2,), rank + x)
    dist.all_reduce(total)
    return rank, world, total.tolist()


def raises(rank, world):
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def dies(rank, world):
    if rank == 0:
        os.kill(os.getpid(), 11)
    dist.barrier()


def leaves(rank, world, file):
    if (pid := os.fork()) == 0:
        time.sleep(600)
    Path(file).write_text(str(pid))
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(rank, world):
    if rank == 1:
        time.sleep(100)
    dist.barrier()


def draws(rank, world):
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        forked = torch.rand(3)
    return forked.tolist(), torch.rand(3).tolist()


def test_results_of_every_rank():
    assert spawn(summed, 2, 1.0) == [(0, 2, [3.0, 3.0]), (1, 2, [3.0, 3.0])]


def test_failing_rank():
    with pytest.raises(AssertionError, match="rank 1 exited with 1(?s:.*)ValueError: the reason"):
        spawn(raises, 2)


def test_dying_rank():
    with pytest.raises(AssertionError, match="rank 0 exited with -11"):
        spawn(dies, 2)


def test_a_rank_that_dies_leaves_no_process(tmp_path):
    with pytest.raises(AssertionError, match="rank 0 exited with -9"):
        spawn(leaves, 1, tmp_path / "pid")
    deadline = time.monotonic() + 10
    while (left := running(int((tmp_path / "pid").read_text()))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_hanging_rank():
    start = time.monotonic()
    with pytest.raises(AssertionError, match="no end after 8 s(?s:.*)in hangs"):
        spawn(hangs, 2, timeout=8)  # long enough for a busy machine to start both ranks
    assert time.monotonic() - start < 60


def test_shim_keeps_the_random_streams_of_tensor_parallelism():
    """Ranks share the default stream, as replicated dropout needs, and fork streams of their own."""
    (forked0, default0), (forked1, default1) = spawn(draws, 2)
    assert forked0 != forked1 and default0 == default1


@pytest.mark.parametrize("torchrun", [False, True])
def test_failing_run(torchrun):
    with pytest.raises(AssertionError, match="unrecognized arguments: --nonsense"):
        run_pretrain(["--nonsense"], 1 if torchrun else 2, torchrun=torchrun)
    assert not run_pretrain(["--nonsense"], check=False).ok


def stays(folder, name):
    Path(folder, f"{name}-{os.getpid()}").touch()
    time.sleep(600)


def start_and_stay(folder: str) -> None:
    """Starts a process in each of the three ways, from three threads, waits for them, and tells of any that ends."""
    script = Path(folder, "script.py")
    script.write_text(f"import os, time; open({folder!r} + f'/torchrun-{{os.getpid()}}', 'w'); time.sleep(600)")
    log = Path(folder, "log")
    launch.PRELOAD = "NOTHING"  # the server need not import Megatron for this
    ways = [
        lambda: _fork(stays, (folder, "server"), 2, {}, log, 600),
        lambda: _fork(stays, (folder, "gpus"), 1, {}, log, 600, gpus=True),
        lambda: run_pretrain([], script=script, torchrun=True, timeout=600),
    ]
    for way in ways:
        threading.Thread(target=lambda way=way: print("ended:", way(), log.read_text(), flush=True)).start()


def test_processes_end_with_a_parent_that_is_killed():
    """All of them, forked by the server, started for a GPU, or by torchrun: SIGKILL leaves the parent no last word."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"from tests.test_launch import start_and_stay; start_and_stay({folder!r})"
        parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **ENV})
        pids, deadline = {}, time.monotonic() + 240
        try:
            while len(pids) < 4 and time.monotonic() < deadline:
                time.sleep(0.2)
                pids = {int(path.name.split("-")[1]): path.name for path in Path(folder).glob("*-*")}
            assert sorted(name.split("-")[0] for name in pids.values()) == ["gpus", "server", "server", "torchrun"]
            assert parent.poll() is None
        finally:
            parent.kill()
            parent.wait()
        deadline = time.monotonic() + 20
        while (left := [name for pid, name in pids.items() if running(pid)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in pids:
            if running(pid):
                os.kill(pid, signal.SIGKILL)
        assert not left


def running(pid: int) -> bool:
    """Not ended; what waits for a parent to ask for its exit status has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False
