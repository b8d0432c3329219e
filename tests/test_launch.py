"""The launcher itself: results of every rank come back, and a rank that fails, dies or hangs fails the test, soon."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.launch import run_pretrain, spawn


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
