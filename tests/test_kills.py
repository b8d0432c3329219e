"""SIGKILL at random moments of training on two ranks, saves included: the next start goes on bit for bit.

LIGHTNING_TEST_KILLS=20 kills so often (default: 1). A run that was killed and started again until it ended must print
the losses of one that was never stopped, and its last checkpoint must hold the same bits.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from examples import megatron_log
from tests.launch import run_pretrain

KILLS = int(os.environ.get("LIGHTNING_TEST_KILLS", "1"))
SEED = int(os.environ.get("LIGHTNING_TEST_SEED", "20261129"))
EVERY = 2  # iterations between saves
ITERATIONS = EVERY * (KILLS + 4)
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--vocab-size 255 --position-embedding-type rope --hidden-dropout 0.1 --attention-dropout 0 --swiglu "
    "--disable-bias-linear --linear-attention-freq 4 --mock-data --micro-batch-size 1 --global-batch-size 4 "
    "--lr 2e-3 --lr-decay-style cosine --log-interval 1 --eval-iters 0 --num-workers 0 --deterministic-mode "
    f"--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --train-iters {ITERATIONS} "
    f"--save-interval {EVERY}"
)


def tensors(folder: Path) -> dict:
    """All tensors of the last checkpoint of a run: weights, and both moments and fp32 weights of the optimizer."""
    reader = FileSystemReader(folder / f"iter_{ITERATIONS:07d}")
    held = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in held.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    assert any("exp_avg" in name for name in state) and any("linear_proj" in name for name in state), list(state)
    return state


def lines(log: str) -> dict[int, str]:
    """The printed loss and gradient norm by iteration. The second line of a start has the mean of two losses."""
    return {
        step.iteration: f"{step.grad_norm}" if index == 1 else f"{step.loss} {step.grad_norm}"
        for index, step in enumerate(megatron_log.steps(log))
    }


def test_killed_runs_go_on_bit_for_bit(tmp_path):
    flags = ["--save", tmp_path / "whole", "--load", tmp_path / "whole", *MODEL.split()]
    whole = run_pretrain(flags, 2)
    wanted = lines(whole.log)
    assert sorted(wanted) == list(range(1, ITERATIONS + 1))

    folder, rng = tmp_path / "killed", random.Random(SEED)
    flags[1] = flags[3] = folder
    kills, starts, during_saves = 0, 0, 0
    seen: dict[int, set[str]] = {}
    while True:
        tracker = folder / "latest_checkpointed_iteration.txt"
        last = int(tracker.read_text()) if tracker.is_file() else 0
        env, module = {}, "lightning_megatron.pretrain"
        if kills < KILLS:
            event = "save" if kills % 2 else "step"
            room = 2 * EVERY if last < ITERATIONS - 3 * EVERY else EVERY  # else it could end before the moment comes
            iteration = last + rng.randrange(0, room, EVERY if event == "save" else 1)
            delay = rng.uniform(0, 0.4 if event == "save" else 0.25)
            moment = [rng.choice([[0], [1], [0, 1]]), iteration, event, delay]
            env, module = {"LIGHTNING_TESTS_KILL": json.dumps(moment)}, "tests.helpers.killed_pretrain"
            print(f"kill {kills + 1} (seed {SEED}): {moment} after iteration {last}")
        run = run_pretrain(flags, 2, module=module, env=env, check=False)
        starts += 1
        for number, line in lines(run.log).items():
            seen.setdefault(number, set()).add(line)
        if not env:
            assert run.ok, run.log[-3000:]
            break
        if run.ok:  # it ended before the moment came
            assert "dies" not in run.log
            break
        assert "dies" in run.log, run.log[-3000:]
        kills += 1
        saved = sorted(path.name for path in folder.glob("iter_*"))
        after = int(tracker.read_text()) if tracker.is_file() else 0
        during_saves += bool(saved) and saved[-1] != f"iter_{after:07d}"
    print(f"{kills} kills in {starts} starts, {during_saves} while a checkpoint was written (seed {SEED})")
    assert kills == KILLS
    assert during_saves >= KILLS // 10, "hardly a kill falls into a save: the delays after a save's folder are too long"
    for number, texts in seen.items():
        loss_and_norm = wanted[number].split()
        assert all(text.split()[-1] == loss_and_norm[-1] for text in texts), (number, texts, wanted[number])
        complete = {text for text in texts if " " in text}
        assert complete <= {wanted[number]} or len(loss_and_norm) == 1, (number, texts, wanted[number])
    assert sorted(seen) == sorted(wanted)
    first, second = tensors(tmp_path / "whole"), tensors(folder)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
