"""A checkpoint of another function is refused with all differences, and the same function goes on.

A run that goes on must give the other two losses of one that was never stopped.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from tests.helpers.checkpoints import BARE, HYBRID, LEGACY, MODEL, SPEC, refusal, refused, start
from tests.launch import run_pretrain

LAYERS = "--linear-attention-freq: LLLs in the checkpoint, LsLs in this run"
DECAY = "--lightning-decay, --lightning-decay-offset: {} with offset 0 (values "
# Loaded checkpoint, way of starting, flags, and what is said.
REFUSED = {
    "freq": ("own", "own", "--linear-attention-freq 2 --attention-output-gate", LAYERS),
    "freq-bare": ("own-bare", "own", f"--linear-attention-freq 2 {BARE}", LAYERS),
    "freq-spec": ("gpt", "gpt", f"--linear-attention-freq 2 --attention-output-gate {SPEC}", LAYERS),
    "softmax": ("plain", "own", BARE, "has 4 softmax layers where this run has 4 lightning layers (LLLL)"),
    "softmax-spec": (
        "plain",
        "gpt",
        SPEC.replace("lightning_megatron.spec lightning_spec", "tests.specs bare_spec"),
        "has 4 softmax layers where this run has 4 lightning layers (LLLL)",
    ),
    "decay-own-to-spec": ("own-minimax", "gpt", f"{HYBRID} {SPEC}", DECAY.format("minimax")),
    "decay-spec-to-own": ("gpt-minimax", "own", HYBRID, DECAY.format("minimax")),
    "epsilon-base-percent": (
        "own", "own", f"{HYBRID} --norm-epsilon 1e-6 --rotary-base 500000 --rotary-percent 0.5",
        "  --norm-epsilon: 1e-05 in the checkpoint, 1e-06 in this run\n"
        "  --rotary-base: 10000 in the checkpoint, 500000 in this run\n"
        "  --rotary-percent: 1.0 in the checkpoint, 0.5 in this run",
    ),
    "position": (
        "gpt", "gpt", f"{HYBRID} {SPEC} --position-embedding-type none",
        "--position-embedding-type: rope in the checkpoint, none in this run",
    ),
    "vocabulary": ("own", "own", f"{HYBRID} --vocab-size 1000", "size): 256 in the checkpoint, 1024 in this run"),
    "padding-spec": (
        "own", "gpt", f"{HYBRID} {SPEC} --make-vocab-size-divisible-by 384",
        "size): 256 in the checkpoint, 384 in this run",
    ),
    "legacy-format": ("own-legacy", "own", f"{LEGACY} --linear-attention-freq 2 --attention-output-gate", LAYERS),
}  # fmt: skip
GOES_ON = {
    "own": ("own", "own", HYBRID),
    "gpt": ("gpt", "gpt", f"{HYBRID} {SPEC}"),
    "legacy-format": ("own-legacy", "own", f"{HYBRID} {LEGACY}"),
    "own-to-spec": ("own", "gpt", f"{HYBRID} {SPEC}"),
    "spec-to-own": ("gpt", "own", HYBRID),
    "own-to-layer-spec": ("own", "gpt", f"{HYBRID} {SPEC.replace('lightning_spec', 'lightning_layer_spec')}"),
    "backend": ("own", "own", f"{HYBRID} --lightning-backend torch"),
    "exchange": (
        "own", "own",
        f"{HYBRID} --lightning-cp-exchange ring --no-lightning-cp-keep-states --context-parallel-size 2",
    ),
    "vocabulary": (
        "own", "own", f"{HYBRID} --make-vocab-size-divisible-by 384 --padded-vocab-size 256",
    ),
    "list": ("own", "own", "--linear-attention-freq ([1,1,1,0]) --attention-output-gate"),
    "checkpoint-args": ("own-minimax", "own", "--use-checkpoint-args"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_function_is_refused(name, saved):
    checkpoint, *run = REFUSED[name]
    assert "--finetune" in refused(saved(checkpoint), *run)


@pytest.mark.parametrize("name", GOES_ON)
def test_same_function_goes_on(name, saved, whole):
    checkpoint, way, flags = GOES_ON[name]
    run = start(way, flags, load=saved(checkpoint))
    assert run.losses == pytest.approx(whole(checkpoint)[2:], abs=5e-6)
    assert run.log.count("the checkpoint computes the same function as this run") == 1


def test_all_differences_at_once(saved):
    flags = (
        "--linear-attention-freq 2 --attention-output-gate --rotary-base 500 --lightning-scale 1 "
        "--lightning-gate linear"
    )
    log = refusal(start("own", flags, load=saved("own"), check=False))
    for flag in ("linear-attention-freq", "rotary-base", "lightning-scale", "lightning-gate"):
        assert log.count(f"\n  --{flag}: ") == 1
    assert "lightning-decay" not in log.partition("lightning-pretrain: ")[2]


def test_flag_wins_over_checkpoint_args(saved):
    run = start("own", "--use-checkpoint-args --lightning-decay tnl", load=saved("own-minimax"), check=False)
    assert DECAY.format("minimax") in refusal(run)


def test_flags_that_checkpoint_args_would_drop_are_refused(saved):
    """Megatron sets these to the checkpoint's values, whatever is given."""
    flags = "--use-checkpoint-args --rotary-base 500 --normalization RMSNorm --hidden-dropout 0.5"
    log = refusal(start("own", flags, load=saved("own"), check=False))
    assert "  --rotary-base: 10000 in the checkpoint, 500 in this run\n" in log and "Traceback" not in log
    assert "  --normalization: LayerNorm in " in log and "  --hidden-dropout: 0.0 in the checkpoint, 0.5 in " in log


@pytest.mark.parametrize("flags, message", [
    ("--lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters N"),
    ("--expert-model-parallel-size 2", "--expert-model-parallel-size 2 spreads experts, and this model has none"),
])  # fmt: skip
def test_contradictions_with_checkpoint_args_are_refused(saved, flags, message):
    """What the checkpoint brings counts: whether it has experts is not on the command line."""
    log = refusal(start("own", f"--use-checkpoint-args {flags}", load=saved("own"), check=False))
    assert message in log and "Traceback" not in log


def test_vocabulary_that_checkpoint_args_do_not_fit(saved):
    log = refusal(start("own", "--use-checkpoint-args --vocab-size 1000", load=saved("own"), check=False))
    assert "--padded-vocab-size 256 (of the checkpoint, by --use-checkpoint-args) is below the 1000 tokens" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("way", ["own", "gpt"])
def test_data_read_otherwise_is_named(way, saved):
    flags = f"{HYBRID} {SPEC if way == 'gpt' else ''} --dataloader-inter-document-masking --eod-mask-loss"
    log = start(way, flags, load=saved("own"), check=False).log
    for flag in ("dataloader-inter-document-masking", "eod-mask-loss"):
        assert f"--{flag}: off in the checkpoint, on in this run" in log


def test_checkpoint_args_of_a_pretrained_checkpoint(saved, tmp_path):
    """The layers and options of another run, whose weights begin this one."""
    flags = f"--use-checkpoint-args --pretrained-checkpoint {saved('own-minimax')}"
    for loading in (None, tmp_path):
        log = start("own", f"{flags} --save {tmp_path} --save-interval 9" if loading else flags, load=loading).log
        assert "the checkpoint computes the same function as this run" in log and "--finetune: " not in log


def test_a_list_of_one_is_its_value(tmp_path):
    """Megatron parses some flags as lists, and saves a list of one as its value."""
    experts = "--num-experts 4 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
    start("own", f"{HYBRID} {experts}", save=tmp_path)
    experts = experts.replace("--num-experts 4 ", "--use-checkpoint-args ")
    assert len(start("own", f"{HYBRID} {experts}", load=tmp_path).losses) == 2


def test_options_of_a_spec_are_no_flags(saved):
    log = refusal(start("gpt", f"{HYBRID} {SPEC}", load=saved("own-minimax"), check=False))
    assert "--lightning-x is make_spec(x=...)" in log


@pytest.mark.parametrize(
    "checkpoint, flags, words",
    [
        ("own", "--linear-attention-freq 2 --attention-output-gate", [LAYERS]),
        ("plain", BARE, ["--finetune: the checkpoint in", "4 softmax layers"]),
    ],
)
def test_finetune_logs_the_differences(checkpoint, flags, words, saved):
    run = start("own", f"{flags} --finetune", load=saved(checkpoint))
    assert len(run.losses) == 4
    (line,) = [line for line in run.log.splitlines() if "--finetune: " in line]
    assert all(word in line for word in words)


@pytest.fixture
def older(saved, tmp_path):
    """older(name): the checkpoint as a version would have written it that saved no record."""

    def write(name: str, **more) -> Path:
        folder = tmp_path / name
        shutil.copytree(saved(name), folder)
        (iteration,) = folder.glob("iter_*")
        state = dist_checkpointing.load_common_state_dict(iteration)
        vars(state["args"]).pop("lightning_function", None)
        vars(state["args"]).update(more)
        for option in ("lightning_cp_keep_states", "lightning_norm_affine"):  # that did not exist yet
            vars(state["args"]).pop(option, None)
        torch.save(state, iteration / "common.pt")  # which is read first, where there is one
        return folder

    return write


def test_older_checkpoints_go_on(older, whole):
    run = start("own", HYBRID, load=older("own", lightning_cp_layout="zigzag"))
    assert run.losses == pytest.approx(whole("own")[2:], abs=5e-6)
    assert "as far as the flags saved with it, by a version that saved no record tells" in run.log
    run = start("gpt", f"{HYBRID} {SPEC}", load=older("gpt"))
    assert run.losses == pytest.approx(whole("gpt")[2:], abs=5e-6)


@pytest.mark.parametrize(
    "checkpoint, way, flags, message",
    [
        ("own", "own", "--linear-attention-freq 2 --attention-output-gate", LAYERS),
        ("own-minimax", "gpt", f"{HYBRID} {SPEC}", DECAY.format("minimax")),
        ("gpt", "own", f"{HYBRID} --lightning-decay minimax", DECAY.format("tnl")),
        ("gpt-minimax", "own", f"{HYBRID} --norm-epsilon 1e-6", "--norm-epsilon: 1e-05 in the checkpoint"),
    ],
)
def test_older_checkpoints_are_refused(checkpoint, way, flags, message, older):
    assert message in refusal(start(way, flags, load=older(checkpoint), check=False))


def test_older_checkpoint_of_another_spec_is_said_to_be_unknown(older):
    run = start("own", HYBRID, load=older("gpt-minimax"))
    assert "was trained with --spec tests.specs minimax_spec" in run.log and "Not compared: which layers" in run.log


@pytest.mark.parametrize("way, flags", [("own", HYBRID), ("gpt", f"{HYBRID} {SPEC}")])
def test_other_samples_are_named(way, flags, saved):
    run = start(way, f"{flags} --seed 7 --seq-length 32 --clip-grad 0.5", load=saved(way))
    assert run.log.count("was trained: --clip-grad: 1.0 in the checkpoint, 0.5 in this run") == 1
    line = "--seed: 1234 in the checkpoint, 7 in this run; --seq-length: 64 in the checkpoint, 32 in this run"
    assert run.log.count(line) == 1
    assert line not in start(way, f"{flags} --seed 7 --seq-length 32 --finetune", load=saved(way)).log


CYCLIC = f"{HYBRID} --dataloader-type cyclic"


def test_the_order_of_cyclic_data(tmp_path):
    """Megatron shuffles the shares of ranks and microbatches, so that their sizes decide which samples come next."""
    start("own", CYCLIC, save=tmp_path)
    for nproc, flags, line in (
        (1, "", ""),
        (1, "--micro-batch-size 2", "--micro-batch-size: 1 in the checkpoint, 2 in this run"),
        (1, "--no-data-sharding", "data in shares of ranks (off: --no-data-sharding): on in the checkpoint, off in"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel", ""),
        (2, "", "data-parallel ranks: 1 in the checkpoint, 2 in this run"),
    ):
        run = run_pretrain(f"{MODEL} --train-iters 4 {CYCLIC} --load {tmp_path} {flags}".split(), nproc)
        assert len(run.losses) == 2
        assert ("read twice or left out: " in run.log) == bool(line) and line in run.log, flags


def test_cyclic_data_that_cannot_go_on(tmp_path):
    """A bare assertion in the first step."""
    start("own", f"{CYCLIC} --global-batch-size 3 --train-samples 24", save=tmp_path)
    flags = f"{CYCLIC} --global-batch-size 4 --micro-batch-size 4 --train-samples 24"
    log = refusal(start("own", flags, load=tmp_path, check=False))
    assert "--dataloader-type cyclic goes on behind 6 samples only where --micro-batch-size 4 x 1 " in log
    assert "Traceback" not in log


def test_other_tokens_that_count_are_named(saved):
    run = start("own", f"{HYBRID} --calculate-per-token-loss --null-tokenizer-eod-id 3", load=saved("own"))
    assert run.log.count("--null-tokenizer-eod-id: none in the checkpoint, 3 in this run") == 1
    assert run.log.count("was trained: --calculate-per-token-loss: off in the checkpoint, on in this run") == 1
    assert "samples in all" not in run.log


def test_what_megatron_asserts_is_told_with_a_remedy(saved, tmp_path):
    (tmp_path / "vocab").touch()
    for flags, words in (
        ("--data-parallel-random-init", "--data-parallel-random-init: off in the checkpoint, on in this run"),
        (
            f"--vocab-file {tmp_path}/vocab --max-position-embeddings 128",
            "with --vocab-file .*--max-position-embeddings: 64 in the checkpoint, 128 in this run",
        ),
    ):
        log = refusal(start("own", f"{HYBRID} {flags}", load=saved("own"), check=False))
        assert re.search(f"{words}. Give the checkpoint's; or load only its weights with --finetune", log)
        assert "Traceback" not in log
