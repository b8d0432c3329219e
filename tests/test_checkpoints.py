"""Real runs that load checkpoints: one of another function is refused with all differences, the same function goes on.

In both ways of starting: `own` is lightning_megatron.pretrain, `gpt` is pretrain_gpt.py, with --spec or as plain
Megatron. A run saves after 2 of 4 iterations; a run that goes on must give the other two losses of one that was never
stopped.
"""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from tests.launch import ROOT, Run, run_pretrain

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--vocab-size 255 --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 --swiglu "
    "--disable-bias-linear --mock-data --micro-batch-size 1 --global-batch-size 4 --lr 2e-3 --lr-decay-style constant "
    "--log-interval 1 --eval-iters 0 --num-workers 0"
)
GPT = (
    "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion "
    "--eval-interval 100"
)
SPEC = f"{GPT} --no-create-attention-mask-in-dataloader --spec lightning_megatron.spec lightning_spec"
BARE = "--lightning-gate none --lightning-norm none"
HYBRID = "--linear-attention-freq 4 --attention-output-gate"  # all layers have projections of the same shapes
LEGACY = "--ckpt-format torch"
MUP = "--use-mup --mup-output-mult 0.4 --lightning-scale 0.2"  # no part of the function follows the base
TRACKER = "latest_checkpointed_iteration.txt"
# The checkpoints that are loaded: way of starting, flags.
SAVED = {
    "own": ("own", HYBRID),
    "own-bare": ("own", f"--linear-attention-freq 4 {BARE}"),
    "own-legacy": ("own", f"{HYBRID} {LEGACY}"),
    "own-minimax": ("own", f"{HYBRID} --lightning-decay minimax"),
    "own-wsd": (
        "own", f"{HYBRID} --lr-decay-style WSD --lr-wsd-decay-iters 2 --lr-warmup-iters 1 --decoupled-lr 1e-3 "
        "--untie-embeddings-and-output-weights",
    ),
    "own-mup": ("own", f"{HYBRID} {MUP} --mup-base-hidden-size 32"),
    "gpt": ("gpt", f"{HYBRID} {SPEC}"),
    "gpt-minimax": (
        "gpt", f"{HYBRID} {SPEC.replace('lightning_megatron.spec lightning_spec', 'tests.specs minimax_spec')}",
    ),
    "plain": ("gpt", GPT),
}  # fmt: skip
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
    "schedule": (
        "own", "own", f"{HYBRID} --train-iters 6",
        "--train-iters or --global-batch-size: 16 samples (4 iterations) in the checkpoint, "
        "24 samples (6 iterations) in this run",
    ),
    "schedule-optimizer": (
        "own", "own", f"{HYBRID} --adam-beta2 0.5 --adam-eps 1e-2",
        "  --adam-beta2: 0.999 in the checkpoint, 0.5 in this run\n"
        "  --adam-eps: 1e-08 in the checkpoint, 0.01 in this run",
    ),
    "schedule-optimizer-spec": (
        "gpt", "gpt", f"{HYBRID} {SPEC} --adam-beta1 0.5", "--adam-beta1: 0.9 in the checkpoint, 0.5 in this run",
    ),
    "schedule-wsd": (
        "own-wsd", "own", f"{HYBRID} --lr-decay-style WSD --lr-wsd-decay-iters 1 --lr-wsd-decay-style linear "
        "--lr-warmup-iters 1 --lr-warmup-init 1e-3 --decoupled-lr 1e-4 --untie-embeddings-and-output-weights",
        "  --lr-warmup-init: 0.0 in the checkpoint, 0.001 in this run\n"
        "  --lr-wsd-decay-iters, --lr-wsd-decay-samples or --global-batch-size: 8 samples (2 iterations) in the "
        "checkpoint, 4 samples (1 iterations) in this run\n"
        "  --lr-wsd-decay-style: exponential in the checkpoint, linear in this run\n"
        "  --decoupled-lr: 0.001 in the checkpoint, 0.0001 in this run",
    ),
    "schedule-mup": (
        "own-mup", "own", f"{HYBRID} {MUP} --mup-base-hidden-size 16",
        "  --mup-base-hidden-size: 32 in the checkpoint, 16 in this run",
    ),
    "schedule-mup-default": (
        "own-mup", "own", f"{HYBRID} {MUP}", "  --mup-base-hidden-size: 32 in the checkpoint, 64 in this run",
    ),
    "schedule-spec": (
        "gpt", "gpt", f"{HYBRID} {SPEC} --lr 1e-3 --lr-decay-style linear",
        "  --lr: 0.002 in the checkpoint, 0.001 in this run\n"
        "  --lr-decay-style: constant in the checkpoint, linear in this run",
    ),
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


def start(way: str, flags: str, *, save: Path | None = None, load: Path | None = None, check: bool = True) -> Run:
    """Four iterations, or with ``save`` the first two of them."""
    stopping = f"--save {save} --save-interval 2 --exit-interval 2" if save else ""
    nproc = 2 if "parallel-size 2" in flags else 1
    script = ROOT / "tests" / "pretrain_gpt.py" if way == "gpt" else None
    loading = f"--load {load}" if load else ""
    arguments = f"{MODEL} --train-iters 4 {flags} {stopping} {loading}".split()  # the later of two flags counts
    return run_pretrain(arguments, nproc, script=script, check=check)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(name): a folder with the checkpoint of that name, after two iterations."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        start(*SAVED[name], save=folder)
        return folder

    return write


@pytest.fixture(scope="module")
def whole():
    """whole(name): all losses of a checkpoint's run. pretrain_gpt.py and other formats give the own entry point's."""
    run = functools.cache(lambda name: start(*SAVED[name]).losses)
    return lambda name: run("own-minimax" if "minimax" in name else "own")


def refusal(run: Run) -> str:
    assert not run.ok and not run.losses, f"it went on with losses {run.losses}"
    return run.log


# ---- another function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_other_function_or_schedule_is_refused(name, saved):
    checkpoint, way, flags, message = REFUSED[name]
    log = refusal(start(way, flags, load=saved(checkpoint), check=False))
    assert message in log
    remedy = "--override-opt-param-scheduler" if name.startswith("schedule") else "--finetune"
    assert remedy in log
    if way == "own":  # the message alone, and status 2
        assert "\nlightning-pretrain: " in log and "Traceback" not in log


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


# ---- checkpoints of earlier versions ---------------------------------------------------------------------------------


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


# ---- optimizer and schedule ------------------------------------------------------------------------------------------

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
SHARDED = f"{HYBRID} --use-distributed-optimizer"


def test_sharded_optimizer_moves_to_another_layout(tmp_path, whole):
    """What examples/pretrain_1gpu.sh and then pretrain_tp2_sp.sh do, and back."""
    start("own", SHARDED, save=tmp_path / "one")
    run = start("own", f"{SHARDED} {TP2}", load=tmp_path / "one")
    assert run.losses == pytest.approx(whole("own")[2:], abs=5e-6)


def test_optimizer_of_one_layout_is_refused_in_another(tmp_path):
    start("own", f"{SHARDED} --no-dist-ckpt-optim-fully-reshardable", save=tmp_path)
    log = refusal(start("own", f"{SHARDED} {TP2}", load=tmp_path, check=False))
    assert "was saved for TP 1, PP 1 only, and this run has TP 2, PP 1" in log and "Traceback" not in log
    for words in ("--dist-ckpt-optim-fully-reshardable", "--no-load-optim --no-load-rng", "--finetune"):
        assert words in log
    assert len(start("own", f"{SHARDED} {TP2} --no-load-optim --no-load-rng", load=tmp_path).losses) == 2


EXPERTS = f"{HYBRID} --use-distributed-optimizer --num-experts 4 --moe-ffn-hidden-size 32 --ffn-hidden-size 64"
EP2 = "--expert-model-parallel-size 2"


@pytest.mark.parametrize("before, now", [(EP2, ""), ("", EP2)])
def test_experts_move_to_another_expert_parallel_size(before, now, tmp_path):
    """With EP 2 experts have an optimizer of their own. Gradients of the last step tell what the optimizer did."""
    start("own", f"{EXPERTS} {before}", save=tmp_path)
    moved, same = (start("own", f"{EXPERTS} {flags}", load=tmp_path) for flags in (now, before))
    norms = [[float(norm) for norm in re.findall(r"grad norm: ([0-9.]+)", run.log)] for run in (moved, same)]
    assert len(moved.losses) == len(norms[0]) == 2
    assert moved.losses == pytest.approx(same.losses, abs=2e-5) and norms[0] == pytest.approx(norms[1], abs=2e-3)


@pytest.mark.parametrize("before, now", [("--use-distributed-optimizer", ""), ("", "--use-distributed-optimizer")])
def test_distributed_optimizer_or_not(before, now, tmp_path):
    start("own", f"{HYBRID} {before}", save=tmp_path)
    log = refusal(start("own", f"{HYBRID} {now}", load=tmp_path, check=False))
    assert "has another form. Go on with" in log and "--no-load-optim" in log and "Traceback" not in log


@pytest.mark.parametrize("flags, was, now", [
    ("--optimizer muon", "adam, fp32", "muon, --muon-scalar-optimizer adam, fp32"),
    ("--optimizer sgd --sgd-momentum 0", "adam, fp32", "sgd, --sgd-momentum 0, fp32"),
    ("--bf16", "adam, fp32", "adam, --bf16 or --fp16"),
    ("--decoupled-lr 1e-3", "adam, fp32", "adam, --decoupled-lr, fp32"),
])  # fmt: skip
def test_another_optimizer_is_refused(flags, was, now, saved):
    """Its tensors are others; Megatron lists all names of the checkpoint on every rank, and no flag."""
    log = refusal(start("own", f"{HYBRID} {flags}", load=saved("own"), check=False))
    assert f"is that of --optimizer {was}, and this run has --optimizer {now}. Go on with" in log
    assert "--no-load-optim" in log and "Traceback" not in log


@pytest.mark.parametrize("flags", ["", "--sgd-momentum 0", "--bf16"])
def test_sgd_goes_on(flags, tmp_path):
    flags = f"{HYBRID} --optimizer sgd --lr 0.1 {flags}"
    losses = [*start("own", flags, save=tmp_path).losses, *start("own", flags, load=tmp_path).losses]
    assert losses == pytest.approx(start("own", flags).losses, abs=2e-5)  # without its momentum off by 1e-2


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


@pytest.mark.parametrize("way, flags", [("own", HYBRID), ("gpt", f"{HYBRID} {SPEC}")])
def test_other_samples_are_named(way, flags, saved):
    run = start(way, f"{flags} --seed 7 --seq-length 32 --clip-grad 0.5", load=saved(way))
    assert run.log.count("was trained: --clip-grad: 1.0 in the checkpoint, 0.5 in this run") == 1
    line = "--seed: 1234 in the checkpoint, 7 in this run; --seq-length: 64 in the checkpoint, 32 in this run"
    assert run.log.count(line) == 1
    assert line not in start(way, f"{flags} --seed 7 --seq-length 32 --finetune", load=saved(way)).log


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


def test_a_list_of_one_is_its_value(tmp_path):
    """Megatron parses some flags as lists, and saves a list of one as its value."""
    experts = "--num-experts 4 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
    start("own", f"{HYBRID} {experts}", save=tmp_path)
    experts = experts.replace("--num-experts 4 ", "--use-checkpoint-args ")
    assert len(start("own", f"{HYBRID} {experts}", load=tmp_path).losses) == 2


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


@pytest.mark.parametrize("flag, rate", [("override", "1.000000E-03"), ("use-checkpoint", "2.000000E-03")])
def test_schedule_can_be_settled(flag, rate, saved):
    run = start("own", f"{HYBRID} --train-iters 6 --lr 1e-3 --{flag}-opt-param-scheduler", load=saved("own"))
    assert re.findall(r"learning rate: (\S+)", run.log) == [rate] * 4
    # data are shuffled for as many samples as a run reads
    assert run.log.count("reads 24 samples in all, and the one that saved the checkpoint in") == 1
    assert run.log.count("was to read 16 (--train-iters, --train-samples, --global-batch-size)") == 1


@pytest.mark.parametrize("kind", ["", "--use-distributed-optimizer"])
@pytest.mark.parametrize("lr", ["1e-3", "4e-3"])
def test_rates_of_mup_are_those_of_their_weights(lr, kind, tmp_path):
    """At half the rate, other weights have the one that hidden ones have in the checkpoint; at twice, the reverse."""
    flags = f"{HYBRID} {MUP} --mup-base-hidden-size 32 {kind}"
    start("own", flags, save=tmp_path)
    run = start("own", f"{flags} --lr {lr} --use-checkpoint-opt-param-scheduler", load=tmp_path)
    assert run.losses == pytest.approx(start("own", flags).losses[2:], abs=2e-5)


@pytest.mark.parametrize("flag", ["override", "use-checkpoint"])
def test_base_of_mup_can_be_settled(flag, saved):
    """Rates are those of the base that the flag chooses."""
    flags = f"{HYBRID} {MUP} --mup-base-hidden-size"
    run = start("own", f"{flags} 16 --{flag}-opt-param-scheduler", load=saved("own-mup"))
    same = run.losses == pytest.approx(start("own", f"{flags} 32", load=saved("own-mup")).losses, abs=2e-5)
    assert same == (flag == "use-checkpoint")


ADAM = "--adam-beta1 0.5 --adam-beta2 0.6 --adam-eps 1e-2"


@pytest.mark.parametrize("flags, values", [
    ("--override-opt-param-scheduler", (0.5, 0.6, 1e-2)), ("--use-checkpoint-opt-param-scheduler", (0.9, 0.999, 1e-8)),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["", "--use-distributed-optimizer", LEGACY])
def test_betas_and_epsilon_can_be_settled(kind, flags, values, tmp_path):
    """The next checkpoint has, in its groups of parameters, those that the flag chooses."""
    first, second = tmp_path / "first", tmp_path / "second"
    start("own", f"{HYBRID} {LEGACY} {kind}", save=first)
    start("own", f"{HYBRID} {LEGACY} {kind} {ADAM} {flags} --save {second} --save-interval 4", load=first)
    [file] = second.glob("iter_*/mp_rank_00*/model_optim_rng.pt")
    optimizer = torch.load(file, weights_only=False)["optimizer"]
    groups = optimizer.get("optimizer", optimizer)["param_groups"]
    assert groups and {(*group["betas"], group["eps"]) for group in groups} == {values}


def test_checkpoints_hold_no_shape_of_the_schedule(saved):
    """What Megatron's scheduler does not save is not taken from the checkpoint."""
    flags = f"{SAVED['own-wsd'][1]} --lr-wsd-decay-iters 1 --use-checkpoint-opt-param-scheduler"
    log = refusal(start("own", flags, load=saved("own-wsd"), check=False))
    assert (
        "--use-checkpoint-opt-param-scheduler does not take these from the checkpoint:\n  --lr-wsd-decay-iters" in log
    )
    flags = flags.replace("--use-checkpoint", "--override")
    assert len(start("own", flags, load=saved("own-wsd")).losses) == 2


def test_other_betas_under_a_spec_are_refused(saved):
    flags = f"{HYBRID} {SPEC} --adam-beta2 0.5 --override-opt-param-scheduler"
    log = refusal(start("gpt", flags, load=saved("gpt"), check=False))
    assert "--adam-beta2: 0.999 in the checkpoint, 0.5 in this run" in log and "--no-load-optim" in log


def test_another_rate_under_a_spec_is_refused(saved):
    flags = f"{HYBRID} {SPEC} --lr 1e-3 --override-opt-param-scheduler"
    log = refusal(start("gpt", flags, load=saved("gpt"), check=False))
    assert "--lr: 0.002 in the checkpoint, 0.001 in this run" in log and "--no-load-optim" in log


# ---- what cannot be found or read ------------------------------------------------------------------------------------


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
