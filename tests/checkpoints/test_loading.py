"""What a run finds to load: another format, other tensors or no folder are named; a first start finds nothing."""

from __future__ import annotations

import pytest

from tests.helpers.checkpoints import HYBRID, LEGACY, MODEL, SPEC, TRACKER, refusal, start
from tests.launch import run_pretrain


@pytest.mark.parametrize("flags, message", [
    ("--finetune --mtp-num-layers 1", "mtp.layers.0.enorm.weight is not in it. Give the sizes and layers"),
    ("--ffn-hidden-size 512", "mlp.linear_fc1.weight has the shape [256, 64] there, and [1024, 64] in this run. Give"),
    ("--tensor-model-parallel-size 2 --finetune --mtp-num-layers 1", "mtp.layers.0.enorm.weight is not in it. Give"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(flags, message, saved):
    log = refusal(start("own", f"{HYBRID} {flags}", load=saved("own"), check=False))
    assert f"the checkpoint in {saved('own')} does not fit this run: " in log and message in log
    assert "Traceback" not in log


@pytest.mark.parametrize("flags", [LEGACY, f"{LEGACY} --auto-detect-ckpt-format"])
def test_the_other_format_does_not_load_this_one(flags, saved):
    log = refusal(start("own", f"{HYBRID} {flags}", load=saved("own"), check=False))
    assert "was saved with --ckpt-format torch_dist, which a run with --ckpt-format torch does not load: leave" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("finetune", ["", "--finetune"])
def test_the_other_model_is_refused(finetune, saved, tmp_path):
    """GPTModel and HybridModel compute the same of the same layers, and name their tensors differently."""
    pattern = "--hybrid-layer-pattern L-L-L-*-"
    pieces = MODEL.replace("--num-layers 4 ", "")
    hybrid = f"{pieces} {pattern} --attention-output-gate --train-iters 4"
    run_pretrain(f"{hybrid} --save {tmp_path} --save-interval 2 --exit-interval 2".split())
    log = refusal(start("own", f"{HYBRID} {finetune}", load=tmp_path, check=False))
    assert f"is of a HybridModel ({pattern})" in log and f"give {pattern}" in log and "Traceback" not in log
    log = refusal(run_pretrain(f"{hybrid} --load {saved('own')} {finetune}".split(), check=False))
    assert "is of a GPTModel" in log and "leave --hybrid-layer-pattern out" in log and "Traceback" not in log


@pytest.mark.parametrize("way, flags", [("own", HYBRID), ("gpt", f"{HYBRID} {SPEC}")])
def test_unreadable_tracker_file(way, flags, tmp_path):
    (tmp_path / TRACKER).write_text("not a number")
    log = refusal(start(way, flags, load=tmp_path, check=False))
    assert f"{tmp_path / TRACKER} says 'not a number', where the number of an iteration" in log


def test_folder_that_is_not_there(tmp_path):
    log = refusal(start("own", HYBRID, load=tmp_path / "typo", check=False))
    assert f"--load {tmp_path}/typo: no {TRACKER} there" in log and "Traceback" not in log


def test_first_start_of_a_run(tmp_path):
    run = start("own", f"{HYBRID} --load {tmp_path}", save=tmp_path)
    assert len(run.losses) == 2
    assert len(start("own", HYBRID, load=tmp_path).losses) == 2
