"""Eight ranks with NCCL, in bf16: as exact as one GPU, whole and in groups of three and five, and trained as on one.

On eight GPUs; or, with LIGHTNING_TEST_SHARED_GPU=1, on one that all ranks share, see launch.py, without
exchange="direct", which reads another GPU's memory.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.distributed as dist

from tests.conftest import SEED
from tests.helpers.context_parallel import EXCHANGES
from tests.helpers.gpus import CASES, assert_as_exact_as_one, compare, same
from tests.helpers.training import MODELS, RECOMPUTE, SIZE
from tests.launch import run_pretrain, spawn

EIGHT = 8
GPUS = torch.cuda.device_count()
SHARED = GPUS == 1 and os.environ.get("LIGHTNING_TEST_SHARED_GPU") == "1"
EXCHANGES_HERE = EXCHANGES if SHARED else (*EXCHANGES, "direct")
CASES_HERE = [case for case in CASES if case[2] in EXCHANGES_HERE]
PARTS = ((0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2), (3, 4, 5, 6, 7))  # context-parallel groups, the last two at a time
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        GPUS < EIGHT and not SHARED, reason="eight CUDA devices, or one and LIGHTNING_TEST_SHARED_GPU=1, are needed"
    ),
]


def measure(rank: int, world: int, seeds: dict[tuple, int]) -> dict[tuple, dict[tuple, dict] | dict[str, bool]]:
    """Errors of all cases, and whether bits are repeated by exchange, by the groups that this rank is in."""
    found = {}
    for ranks in PARTS:
        group = dist.new_group(ranks)
        if rank in ranks:
            errors = {case: compare(group, *case, seed) for case, seed in seeds.items()}
            found[ranks] = errors, {exchange: same(group, exchange) for exchange in EXCHANGES_HERE}
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple, tuple]]:
    seeds = {case: (SEED + i) % 2**31 for i, case in enumerate(CASES_HERE)}
    print(f"LIGHTNING_TEST_SEED={SEED}")
    return spawn(measure, EIGHT, seeds, gpus=True, timeout=400)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{len(part)} ranks")
@pytest.mark.parametrize("case", CASES_HERE, ids=str)
def test_as_exact_as_one_gpu(case, part, ranks):
    for rank in part:
        assert_as_exact_as_one(ranks[rank][part][0][case], case, rank)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{len(part)} ranks")
@pytest.mark.parametrize("exchange", EXCHANGES_HERE)
def test_same_bits_twice(exchange, part, ranks):
    assert [ranks[rank][part][1][exchange] for rank in part] == [True] * len(part)


# ---- training --------------------------------------------------------------------------------------------------------

MODEL = f"{MODELS['freq4']} --hidden-size 128 --num-attention-heads 8 --lightning-num-kv-heads 8"  # heads for 8 ranks
TRAIN = (
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 20 --lr 2e-3 --lr-decay-style constant --bf16 "
    "--log-interval 1 --eval-iters 0 --num-workers 0 --mock-data --transformer-impl local --no-rope-fusion "
    "--use-distributed-optimizer --make-vocab-size-divisible-by 32"  # one vocabulary for up to 8 tensor-parallel ranks
)
TP2, CP4 = "--tensor-model-parallel-size 2 --sequence-parallel", "--context-parallel-size 4"
LAYOUTS = {
    "tp2-cp4": f"{TP2} {CP4}",
    "tp4-cp2": "--tensor-model-parallel-size 4 --sequence-parallel --context-parallel-size 2",
    "pp2-cp4": f"--pipeline-model-parallel-size 2 {CP4}",
    "pp2-cp4-recompute": f"--pipeline-model-parallel-size 2 {CP4} {RECOMPUTE}",
    "cp8": "--context-parallel-size 8",
    "tp2-cp2-dp2": f"{TP2} --context-parallel-size 2",
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Of a number of ranks and flags, all from one checkpoint: tensor-parallel ranks share the same values."""
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    folder, flags = tmp_path_factory.mktemp("initial"), [*SIZE, *MODEL.split(), *TRAIN.split()]
    save = f"--lr 0 --train-iters 1 --save {folder} --save-interval 1 --no-save-optim --no-save-rng".split()
    run_pretrain([*flags, *save], gpus=True, env=env)
    begin = f"--load {folder} --finetune --no-load-optim --no-load-rng"

    @functools.cache
    def run(ranks: int, more: str) -> list[float]:
        load = "" if "--load" in more else begin
        return run_pretrain([*flags, *load.split(), *more.split()], ranks, gpus=True, env=env).losses

    return run


def assert_trained_alike(got: list[float], want: list[float], learnt: float) -> None:
    """bf16 rounds otherwise in each layout; a loss misses that of one GPU by less than 1% of what is learnt."""
    largest = max(abs(a - b) for a, b in zip(got, want, strict=True))
    print(f"largest difference of {len(want)} losses {largest:.1e}, learnt {learnt:.2f}")
    assert learnt > 0.3 and largest < 0.01 * learnt, f"{got} {want}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_as_one_gpu(layout, losses):
    got, want = losses(EIGHT, LAYOUTS[layout]), losses(1, "")
    assert len(want) == 20
    assert_trained_alike(got, want, want[0] - want[-1])


def test_goes_on_in_another_layout(losses, tmp_path):
    """Saved after ten steps of eight tensor-parallel ranks; the rest, optimizer and all, as TP 2 x CP 4."""
    want = losses(1, "")
    wide = "--tensor-model-parallel-size 8 --sequence-parallel"
    first = losses(EIGHT, f"{wide} --save {tmp_path} --save-interval 10 --exit-interval 10")
    second = losses(EIGHT, f"{LAYOUTS['tp2-cp4']} --load {tmp_path}")
    assert (len(first), len(second)) == (10, 10)
    assert_trained_alike(first + second, want, want[0] - want[-1])
