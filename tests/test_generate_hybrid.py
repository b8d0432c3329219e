"""Checkpoints of HybridModel in the commands of inference: what is refused, and how a run cuts the pattern into stages.

That they generate is in test_generate.py, test_generate_batch.py, test_perplexity.py and test_dynamic_inference.py.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from lightning_megatron.inference.hybrid import pattern_flags, refuse_unserved
from tests.helpers.generate import EVERYTHING, HYBRID, NUMBERS, PATTERN, SIZE, VOCAB
from tests.launch import ROOT, run_pretrain, spawn

PP2 = "--pipeline-model-parallel-size 2"
FLAG, LETTERS = PATTERN.split()


@pytest.mark.parametrize("pattern, message", [
    ("L-M-*-", r"has layers M, and a HybridModel generates here with L \(lightning\), \* \(softmax\), - \(MLP\), E"),
    ("LGD+-", r"has layers \+, D, G, .* use Megatron's own inference, or train a model of these letters"),
    ("*-*-", r"has no lightning layer \(L\): use Megatron's own inference, or train a model with some"),
    ("*-*-/L-", r"has no lightning layer \(L\): use Megatron's own inference"),
    ("L-|*-", r"holds no record of its lightning options; resume it once with this version, and save it"),
])  # fmt: skip
def test_what_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message) as error:
        refuse_unserved(Namespace(hybrid_layer_pattern=pattern, num_layers=4))
    assert str(error.value).startswith(f"{FLAG} {pattern}")


@pytest.mark.parametrize("saved, flags, pattern", [
    ("L-|L-|L-|*-", "", "L-L-L-*-"),
    ("L-|L-|L-|*-", PP2, "L-L-L-*-"),  # not two stages on each rank
    ("L-L|-L-*-", PP2, "L-L|-L-*-"),
    ("L-L|-L-*-", f"{PP2} --decoder-first-pipeline-num-layers 1", "L-L-L-*-"),
    ("L-L|-L-*-", f"{PP2} {FLAG} L|-L-L-*-", "L|-L-L-*-"),
    ("L-L|-L-*-", f"{PP2} {FLAG} L-L-L-*-", "L-L-L-*-"),
    ("L-L|-L-*-/*-/*-", PP2, "L-L|-L-*-"),  # multi-token prediction is left out
    ("L-L|-L-*-/*-", f"{PP2} {FLAG} L|-L-L-*-", "L|-L-L-*-"),
    (None, PP2, None),
])  # fmt: skip
def test_stages_of_a_run(saved, flags, pattern):
    wanted = [] if pattern is None else [FLAG, pattern]
    assert pattern_flags(Namespace(hybrid_layer_pattern=saved), flags.split()) == wanted


@pytest.mark.parametrize("saved, flags, message", [
    ("L-L-L-*-", f"{FLAG} L-L-L-L-", r"L-L-L-L-: the checkpoint has L-L-L-\*-; give the same letters with | between"),
    ("L-L-L-*-", f"{FLAG} L-L|-L-*-", "has 2 pipeline stages, and --pipeline-model-parallel-size is 1: give as many"),
    ("L-L-*-", "--pipeline-model-parallel-size 4", r"4 does not divide the 6 layers of .* with 3 | in it"),
    (None, f"{FLAG} L-L-", "the checkpoint is of a GPTModel, whose layers have no letters; leave it out"),
])  # fmt: skip
def test_stages_that_cannot_be(saved, flags, message):
    with pytest.raises(ValueError, match=message):
        pattern_flags(Namespace(hybrid_layer_pattern=saved), flags.split())


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    run_pretrain([*SIZE, *NUMBERS.split(), *HYBRID.split(), "--save", folder])
    return folder


def test_every_command_says_what_it_does_not_take(checkpoint, tmp_path):
    """Before a weight is read: there is none any more."""
    shutil.copytree(checkpoint, tmp_path / "run")
    (iteration,) = (tmp_path / "run").glob("iter_*")
    state = dist_checkpointing.load_common_state_dict(iteration)
    state["args"].hybrid_layer_pattern = other = LETTERS.replace("*", "M")
    torch.save(state, iteration / "common.pt")
    for weights in iteration.glob("__*.distcp"):
        weights.unlink()
    (tmp_path / "text").write_text("1 2 3")
    for module, flags in (
        ("generate", ["--prompt", "1 2"]), ("perplexity", ["--text", tmp_path / "text"]), ("serve", ["--port", "0"]),
    ):  # fmt: skip
        module = f"lightning_megatron.inference.{module}"
        run = run_pretrain(["--load", tmp_path / "run", *flags], module=module, check=False)
        assert not run.ok and "Traceback" not in run.log, run.log
        message = f"{FLAG} {other} has layers M, and a HybridModel generates here with L (lightning), *"
        assert run.log.count(message) == 1, run.log


def test_the_converter_says_what_to_do(checkpoint, tmp_path):
    ask = ["export", checkpoint, tmp_path / "out"]
    run = run_pretrain(ask, module="lightning_megatron.convert", check=False)
    assert not run.ok and "Traceback" not in run.log, run.log
    assert "no family of released models has this function" in run.log and "--lightning-feature-map: silu in" in run.log
    assert not (tmp_path / "out").exists()


def logits(rank: int, world: int, folder: Path) -> torch.Tensor:
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.reader import Reader

    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model, torch.inference_mode():
        reader = Reader(model, 60)
        return torch.stack([reader.read([i])[0] for i in range(60)])


def test_a_script_of_megatron_under_the_launcher(tmp_path):
    """It holds no lightning flags, but a record of the options, which are those of its stack."""
    script = ROOT / "tests" / "pretrain_gpt.py"
    local = "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion"
    flags = f"{PATTERN} {local} --no-create-attention-mask-in-dataloader --eval-interval 100"
    for name, module, first, more in (
        ("stock", "lightning_megatron.run", [script], flags), ("own", "lightning_megatron.pretrain", [], PATTERN),
    ):  # fmt: skip
        line = [*first, *SIZE, *NUMBERS.split(), *more.split(), "--save", tmp_path / name]
        run_pretrain(line, module=module)
    ((want,), (got,)) = (spawn(logits, 1, tmp_path / name) for name in ("own", "stock"))
    assert torch.equal(got, want)


def test_it_generates_as_the_same_gpt_model(checkpoint, tmp_path):
    """Trained from the same first values; one token at a time."""
    run_pretrain([*SIZE, *NUMBERS.split(), *EVERYTHING.split(), "--save", tmp_path])
    ((want,), (got,)) = (spawn(logits, 1, folder) for folder in (tmp_path, checkpoint))
    assert torch.equal(got, want) and len(set(want.argmax(-1).tolist())) > 10
