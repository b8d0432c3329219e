"""The optimizer's state goes on in any layout, and another optimizer, rate or schedule is refused or settled."""

from __future__ import annotations

import re

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from lightning_megatron.patches.bucket_padding import is_mended, is_rounded
from tests.helpers.checkpoints import HYBRID, LEGACY, MUP, SAVED, SPEC, refusal, refused, start

# Loaded checkpoint, way of starting, flags, and what is said.
REFUSED = {
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


@pytest.mark.parametrize("name", REFUSED)
def test_other_schedule_is_refused(name, saved):
    checkpoint, *run = REFUSED[name]
    assert "--override-opt-param-scheduler" in refused(saved(checkpoint), *run)


@pytest.mark.parametrize("flags, count", [
    pytest.param("--train-samples 18", 4, id="samples"),
    pytest.param("--train-samples 18 --lr-warmup-samples 3 --lr-decay-style cosine", 4, id="warmup"),
    pytest.param("--train-samples 18 --lr-warmup-fraction 0.1 --lr-decay-samples 20 --lr-decay-style linear", 4,
                 id="fraction"),
    pytest.param("--train-samples 12 --step-batch-size-schedule 0:2,256:4", 4, id="steps"),
])  # fmt: skip
def test_a_length_in_samples_goes_on(flags, count, tmp_path):
    """It is no whole number of iterations, or of batches of one size."""
    losses = start("own", f"{HYBRID} {flags}").losses
    assert len(losses) == count
    start("own", f"{HYBRID} {flags}", save=tmp_path)
    assert start("own", f"{HYBRID} {flags}", load=tmp_path).losses == pytest.approx(losses[2:], abs=2e-6)


@pytest.mark.parametrize("before, now, sizes", [
    ("--global-batch-size 4", "--global-batch-size 8", [8, 8]),
    ("--global-batch-size 4", "--global-batch-size 2", [2] * 8),
    ("--global-batch-size 4", "--step-batch-size-schedule 0:2,768:4", [2, 2, 4, 4, 4]),
    ("--step-batch-size-schedule 0:4,768:8", "--global-batch-size 8", [8, 8]),
])  # fmt: skip
def test_another_batch_reads_the_rest_of_the_samples(before, now, sizes, tmp_path):
    """Megatron would end at the iteration at which a training of this batch alone has read all of them."""
    start("own", f"{HYBRID} --train-samples 24 {before}", save=tmp_path)
    run = start("own", f"{HYBRID} --train-samples 24 {now}", load=tmp_path)
    batches = [int(size) for size in re.findall(r"global batch size: +(\d+) \|", run.log)]
    assert batches == sizes and "consumed samples:           24" in run.log
    assert f"and so ends at iteration {2 + len(sizes)}" in run.log


def test_nothing_is_left_to_train(saved):
    flags = "--train-iters 1 --override-opt-param-scheduler"
    run = start("own", f"{HYBRID} {flags}", load=saved("own"))
    assert not run.losses and "is at iteration 2, and --train-iters is 1: nothing is left to train" in run.log


@pytest.mark.parametrize("form", ["", LEGACY, "--use-distributed-optimizer"])
def test_a_checkpoint_without_the_state_of_the_optimizer(form, tmp_path):
    start("own", f"{HYBRID} {form} --no-save-optim", save=tmp_path)
    log = refusal(start("own", f"{HYBRID} {form}", load=tmp_path, check=False))
    assert "holds no state of the optimizer (--no-save-optim)" in log and "give --no-load-optim" in log
    assert "Traceback" not in log
    assert len(start("own", f"{HYBRID} {form} --no-load-optim", load=tmp_path).losses) == 2


def test_a_checkpoint_without_random_states(tmp_path):
    """Of --ckpt-format torch Megatron would end with status 0, and of the other go on without a word."""
    for form in ("", LEGACY):
        folder = tmp_path / (form.split() or ["torch_dist"])[-1]
        start("own", f"{HYBRID} {form} --no-save-rng", save=folder)
        log = refusal(start("own", f"{HYBRID} {form}", load=folder, check=False))
        assert "holds no states of random numbers (--no-save-rng)" in log and "give --no-load-rng" in log
        assert "Traceback" not in log
        assert len(start("own", f"{HYBRID} {form} --no-load-rng", load=folder).losses) == 2


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


BUCKETS = "--overlap-grad-reduce --ddp-bucket-size 20000 --qk-layernorm"


@pytest.mark.parametrize("way", ["own", "gpt"])
@pytest.mark.parametrize("flags", [
    pytest.param(BUCKETS, id="buckets"),
    pytest.param("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", id="tied-embeddings"),
])  # fmt: skip
def test_padding_between_buckets(way, flags, tmp_path):
    """Buckets end at multiples of 128 numbers; Megatron saved states behind such an end from the wrong place."""
    flags = f"{SHARDED} {flags} --dist-ckpt-optim-fully-reshardable"
    log = start(way, flags + (f" {SPEC}" if way == "gpt" else ""), save=tmp_path).log
    losses = start("own", flags, load=tmp_path).losses  # pretrain_gpt.py does not load it without TransformerEngine
    assert losses == pytest.approx(start("own", flags).losses[2:], abs=5e-6)
    assert "data corruption" not in log


PP2 = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
SHIFTED = f"{SHARDED} {BUCKETS}"


@pytest.mark.skipif(
    is_mended(DistributedOptimizer.sharded_param_state_fully_reshardable), reason="this Megatron saves no such states"
)
@pytest.mark.parametrize("precision", ["", "--bf16", "--fp16 --initial-loss-scale 1024"])
@pytest.mark.parametrize("before, now, tensor", [
    pytest.param(SHIFTED, SHIFTED, "decoder.layers.", id="buckets"),
    pytest.param(SHIFTED, f"{SHARDED} --qk-layernorm {TP2} --no-dist-ckpt-optim-fully-reshardable", "decoder.layers.",
                 id="buckets-tp"),
    pytest.param(SHIFTED, f"{SHARDED} --qk-layernorm --num-distributed-optimizer-instances 1 --context-parallel-size 2",
                 "decoder.layers.", id="buckets-dp"),
    pytest.param(f"{SHARDED} {PP2}", f"{SHARDED} {PP2}", "embedding.word_embeddings.weight", id="tied-embeddings"),
])  # fmt: skip
def test_main_parameters_from_the_wrong_place_are_refused(before, now, tensor, precision, tmp_path):
    """They loaded without a word, and took the place of the weights with the first step."""
    assert "data corruption" in start("unpatched", f"{before} {precision}", save=tmp_path).log
    log = refusal(start("own", f"{now} {precision}", load=tmp_path, check=False))
    said = re.search(
        r"holds main parameters of the optimizer that are not its weights: (\S+) .*\((\d+) of (\d+) parts", log
    )
    assert said and said[1].startswith(tensor) and 0 < int(said[2]) < int(said[3])
    assert "give --no-load-optim for this start" in log and "Traceback" not in log
    assert len(start("own", f"{now} {precision} --no-load-optim", load=tmp_path).losses) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_taken_for_rounded(dtype, rng):
    """Also values that were rounded twice, as by --qk-clip and by going on in another precision; no others."""
    main = torch.cat([torch.randn(4096, generator=rng) * 10.0**-i for i in range(9)])
    factor = torch.rand(main.shape, generator=rng)
    for weight in (main.to(dtype), main.bfloat16().to(dtype), main.half().to(dtype)):
        assert is_rounded(weight, main)
    twice = (main.to(dtype) * factor).to(dtype)
    assert is_rounded(twice, main * factor)
    assert not is_rounded(main.to(dtype), main.roll(1)) and not is_rounded(main.to(dtype), main * 1.05)
    one = main.clone()
    one[7] += 0.1
    assert not is_rounded(main.to(dtype), one)
    one[7] = float("nan")
    assert not is_rounded(main.to(dtype), one) and is_rounded(one.to(dtype), one)


UNTIED = "--untie-embeddings-and-output-weights --decoupled-lr 1e-3"
OFFSET = "--no-dist-ckpt-optim-fully-reshardable"
ROWS = "--make-vocab-size-divisible-by 7 --bf16"  # 259 with TP 1, 266 with TP 2: rows that are added are zeros, in both


@pytest.mark.parametrize("before, now", [
    ("--bf16", f"--bf16 {TP2}"), (f"--bf16 {TP2}", f"--bf16 {PP2}"), (f"--bf16 {PP2}", "--bf16"),
    ("--bf16", f"--bf16 {BUCKETS.replace(' --qk-layernorm', '')}"), (ROWS, f"{ROWS} {TP2}"), (f"{ROWS} {TP2}", ROWS),
    ("--bf16", "--bf16 --context-parallel-size 2 --overlap-grad-reduce --overlap-param-gather"),
    ("--bf16", ""), ("--bf16", "--fp16 --initial-loss-scale 1024"), ("", "--bf16"),
    ("--bf16 --optimizer lion", "--bf16 --optimizer lion"),
    (f"--bf16 {UNTIED}", f"--bf16 {UNTIED} {TP2}"), (f"--bf16 {OFFSET}", f"--bf16 {OFFSET}"),
])  # fmt: skip
def test_main_parameters_of_the_weights_are_loaded(before, now, tmp_path):
    """Weights are main parameters rounded to the precision of the training that saved them, and then to this one's."""
    start("own", f"{SHARDED} {before}", save=tmp_path)
    assert len(start("own", f"{SHARDED} {now}", load=tmp_path).losses) == 2


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
