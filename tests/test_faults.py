"""What a run says when its disk fills up, a rank hangs, or Ctrl-C stops it."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from lightning_megatron.integrity import complete_iterations, verify
from lightning_megatron.training import failures
from lightning_megatron.training.watch import Watch
from tests.launch import ROOT, SHIM, run_pretrain

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 128 --position-embedding-type rope --linear-attention-freq 2 --swiglu --disable-bias-linear "
    "--mock-data --micro-batch-size 1 --global-batch-size 2 --lr 2e-3 --lr-decay-style constant --train-iters 4 "
    "--log-interval 1 --eval-iters 0 --num-workers 0 --use-distributed-optimizer"
)
WORKERS = "--num-workers 2 --exit-signal-handler"  # workers that ignore SIGTERM, for which Python would wait at its end


@pytest.fixture
def disk(tmp_path):
    """A file system that holds one checkpoint and a part of the second; skipped where mounting is not allowed."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def check_failed_save(run, folder, cause):
    assert not run.ok
    last = [line for line in run.log.splitlines() if line.startswith("lightning-pretrain: ")]
    assert last and f"the checkpoint of iteration 2 was not saved: {cause}" in last[-1], last
    assert f"iter_0000001 in {folder} is whole: with --load {folder}, the same command goes on" in last[-1]
    assert complete_iterations(folder) == ["iter_0000001"]
    verify(folder / "iter_0000001")


def test_full_disk(disk):
    flags = f"{FLAGS} --save {disk} --save-interval 1".split()
    check_failed_save(run_pretrain(flags, 2, check=False), disk, "")
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    run = run_pretrain([*flags, "--load", disk, "--exit-interval", "2"])  # one rank: the checkpoint is resharded
    assert len(run.losses) == 1 and complete_iterations(disk) == ["iter_0000002", "iter_0000001"]


def test_file_size_limit(tmp_path):
    """Where mounting is not allowed, too: the second checkpoint meets a limit of its own on the size of files."""
    flags = f"{FLAGS} --save {tmp_path} --save-interval 1".split()
    run_pretrain([*flags, "--exit-interval", "1"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    command = [sys.executable, SHIM, "-m", "lightning_megatron.pretrain", *flags, *WORKERS.split(), "--load", tmp_path]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    limits = (200_000, hard)
    end = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )  # fmt: skip
    assert end.returncode == 1, end.stderr[-3000:]
    last = end.stderr.strip().splitlines()[-1]
    assert last.startswith("lightning-pretrain: the checkpoint of iteration 2 was not saved: "), last
    assert f"iter_0000001 in {tmp_path} is whole" in last
    verify(tmp_path / "iter_0000001")
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


# ---- ranks that hang -------------------------------------------------------------------------------------------------


class Rank(Watch):
    """Of a run with two ranks, in this process; both signs go into one store."""

    def __init__(self, rank, store, progress):
        super().__init__(rank, 2, 2.0, progress, lambda: store)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_without_signs_is_named(silent, caplog):
    store, steps = dist.HashStore(), iter(range(10**9))
    ranks = [Rank(rank, store, lambda: next(steps)) for rank in range(2)]
    with caplog.at_level(logging.WARNING, "lightning_megatron"):
        for rank in ranks:
            rank.start()
        time.sleep(0.6)
        assert not caplog.messages
        ranks[silent].stop()
        deadline = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.05)
    ranks[1 - silent].stop()
    (line,) = caplog.messages
    assert line.startswith(f"rank {silent} (host ") and f"process {os.getpid()}) has given no sign for " in line
    assert "--distributed-timeout-minutes" in line


def test_a_rank_that_stands_still_says_where(caplog):
    watch = Rank(0, dist.HashStore(), lambda: 5)
    other = Rank(1, watch.connect(), lambda: time.monotonic())
    with caplog.at_level(logging.WARNING, "lightning_megatron"):
        for rank in (watch, other):
            rank.start()
        deadline = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
    watch.stop(), other.stop()
    (line,) = caplog.messages
    assert line.startswith("rank 0 (host ") and "test_faults.py" in line and "stands_still_says_where" in line


@pytest.mark.skipif("LIGHTNING_TEST_HANG" not in os.environ, reason="waits a minute; set LIGHTNING_TEST_HANG=1")
def test_a_stopped_rank_ends_all(tmp_path):
    flags = f"{FLAGS} --train-iters 100000 --distributed-timeout-minutes 1 --tensor-model-parallel-size 2"
    run = run_pretrain(flags.split(), 2, module="tests.helpers.hung_pretrain", check=False, timeout=400)
    print(f"ended after {run.seconds:.0f} s")
    assert not run.ok and "rank 1 stops" in run.log
    assert "rank 1 (host " in run.log and "has given no sign for 30 s" in run.log
    assert "lightning-pretrain: rank 0 waited for another rank" in run.log


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["demo", "finetune", "plot_loss", "prepare_chat", "prepare_data"])
def test_scripts_end_with_130(script, monkeypatch, capsys):
    import argparse

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupted)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / f"{script}.py"), run_name="__main__")
    assert end.value.code == 130
    assert capsys.readouterr().err.strip().startswith(f"{script}: stopped; ")


def test_training_ends_with_130(tmp_path):
    flags = f"{FLAGS} {WORKERS} --train-iters 100000 --save {tmp_path} --save-interval 1 --save-retain-interval 50000"
    command = [sys.executable, SHIM, "-m", "lightning_megatron.pretrain", *flags.split()]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    stop = threading.Timer(120, process.kill)
    stop.start()
    said = []
    for line in process.stdout:
        said.append(line)
        if "successfully saved checkpoint from iteration       2" in line:
            os.killpg(process.pid, signal.SIGINT)
    stop.cancel()
    assert process.wait() == 130, "".join(said[-30:])
    (line,) = [line for line in said if line.startswith("lightning-pretrain: ")]
    assert line.startswith("lightning-pretrain: stopped; iter_00000") and f"with --load {tmp_path}, the same" in line


def test_what_is_left_of_a_run_without_save():
    assert failures.how_to_go_on(None) == "nothing was saved"


def test_out_of_memory_names_what_needs_less():
    usual = {
        "rank": 3, "save": None, "micro_batch_size": 4, "data_parallel_size": 2, "use_distributed_optimizer": False,
        "loss_chunk": None, "recompute_granularity": None, "lightning_recompute_chunk": None,
        "lightning_offload_activations": False,
    }  # fmt: skip
    said = failures.explain(torch.OutOfMemoryError("CUDA out of memory"), argparse.Namespace(**usual))
    assert said.startswith("rank 3 has no GPU memory left")
    first = said.index("--micro-batch-size below 4; --use-distributed-optimizer; --lightning-loss-chunk 8192; --recom")
    assert first < said.index("--lightning-offload-activations with full recompute; more")
    used = {
        "micro_batch_size": 1, "data_parallel_size": 1, "loss_chunk": 64, "recompute_granularity": "full",
        "lightning_recompute_chunk": 64, "lightning_offload_activations": True,
    }  # fmt: skip
    said = failures.explain(torch.OutOfMemoryError("CUDA out of memory"), argparse.Namespace(**usual | used))
    assert "What needs less: more GPUs, by --tensor-model-parallel-size or --context-parallel-size. See" in said


@pytest.mark.gpu
def test_a_run_out_of_memory_ends():
    """A hundredth of a card and logits of 64K tokens; with data workers, which it must not wait for."""
    flags = f"{FLAGS} {WORKERS} --seq-length 65536 --max-position-embeddings 65536 --vocab-size 65536 --bf16"
    env = {"PYTORCH_ALLOC_CONF": "per_process_memory_fraction:0.01"}
    run = run_pretrain(flags.split(), gpus=True, env=env, check=False, timeout=120)
    assert not run.ok and run.seconds < 110
    (line,) = [line for line in run.log.splitlines() if "lightning-pretrain: rank 0 has no GPU memory left (" in line]
    assert "GiB are this rank's" in line and "--lightning-loss-chunk 8192" in line
