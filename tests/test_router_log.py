"""Losses of routers in the log: those of one process, where pipeline stages without experts write them, too."""

from __future__ import annotations

import re

import pytest

from tests.helpers.training import SIZE, TRAIN
from tests.launch import Run, run_pretrain

EXPERTS = (
    "--num-experts 4 --moe-ffn-hidden-size 64 --swiglu --normalization RMSNorm --disable-bias-linear --mock-data "
    "--moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss --moe-aux-loss-coeff 0.1 0.1 0.1 "
    "--moe-z-loss-coeff 0.01 --lr 0 --train-iters 2"
)
STAGES = "--pipeline-model-parallel-size 2"
NAMES = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss", "z_loss")
MODELS = {
    "gpt": "--num-layers 4 --linear-attention-freq 4 --moe-layer-freq [1,1,0,0]",
    "hybrid": "--num-layers 8 --hybrid-layer-pattern LELEL-*-",
}
LAYOUTS = {
    "cp2": "--context-parallel-size 2",
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
}


def logged(run: Run) -> dict[str, list[float]]:
    return {name: [float(x) for x in re.findall(rf" {name}: (\S+)", run.log)] for name in NAMES}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_last_stage_without_experts(model, layout, tmp_path):
    size = [*SIZE[SIZE.index("--hidden-size") :], *TRAIN, *EXPERTS.split(), *MODELS[model].split()]
    initial = ["--save", tmp_path, "--save-interval", 2, "--no-save-optim"]
    one = logged(run_pretrain([*size, *initial]))
    run = [*STAGES.split(), *LAYOUTS[layout].split(), "--load", tmp_path, "--finetune", "--no-load-optim"]
    found = logged(run_pretrain([*size, *run, "--no-load-rng"], 4))
    assert set(map(len, one.values())) == {2} and one["load_balancing_loss"][0] > 0.9
    for name in NAMES:
        assert found[name] == pytest.approx(one[name], rel=1e-5), name
