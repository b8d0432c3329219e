"""The own entry point under Megatron's real pretrain(), on the CPU."""

import re

import pytest

from tests.helpers.documents import write_equal_documents
from tests.launch import run_pretrain
from tests.tolerances import TRAINED_LOSSES

FLAGS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--train-iters 6 --micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --adam-eps 1e-3 --lr-decay-style constant "
    "--mock-data --vocab-size 128 "
    "--make-vocab-size-divisible-by 8 --position-embedding-type none --normalization RMSNorm --swiglu "
    "--disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --linear-attention-freq 4 --log-interval 1 "
    "--eval-iters 0 --num-workers 0 --log-throughput"
).split()
RESUME = ["--no-save-rng", "--no-load-rng", "--dataloader-inter-document-masking"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint after 2 iterations on packed documents, and the losses of the next 4 in the same layout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    run_pretrain([*FLAGS, *RESUME, "--save", folder, "--save-interval", 2, "--exit-interval", 2])
    return folder, run_pretrain([*FLAGS, *RESUME, "--load", folder]).losses


def test_loss_falls_and_log_says_what_runs():
    run = run_pretrain(FLAGS)
    assert len(run.losses) == 6
    assert run.losses[-1] < run.losses[0] - 0.5
    for line in (
        "3 lightning layers (L), 1 softmax layers (s)",
        "LLLs",
        "lightning: parts in use: linear layers megatron-core local; layer norms TorchNorm",
        "lightning: patched megatron.core.datasets.utils.compile_helpers",
        "lightning: patched megatron.training.training.num_floating_point_operations",
        "lightning: patched megatron.training.checkpointing._load_base_checkpoint",
        "lightning: patched megatron.core.models.common.language_module.language_module."
        "fused_vocab_parallel_cross_entropy",
    ):
        assert run.log.count(line) == 1, line
    assert "throughput per GPU (TFLOP/s/GPU)" in run.log


@pytest.mark.parametrize("length", ["--train-iters 9", "--train-samples 37"])
def test_data_last_as_long_as_a_schedule_of_batches(length, tmp_path):
    """4 batches of 1, until 256 tokens, then of 8. Blended data have no sample more than they are asked for."""
    write_equal_documents(tmp_path)
    data = f"--tokenizer-type NullTokenizer --train-data-path 1 {tmp_path}/text 1 {tmp_path}/text --vocab-size 255"
    flags = " ".join(FLAGS).replace("--global-batch-size 4 ", "").replace("--mock-data --vocab-size 128", data)
    flags = flags.replace("--train-iters 6", length)
    run = run_pretrain([*flags.split(), "--step-batch-size-schedule", "0:1,256:8"])
    assert len(run.losses) == 9 and re.findall(r"consumed samples: +(\d+)", run.log)[-1] == "44"


def test_a_split_without_documents(tmp_path):
    """Of 64 documents, 1 in 1000 is none: Megatron looks for their tokens forever. Without evaluation none is read."""
    write_equal_documents(tmp_path)
    flags = [x for x in FLAGS if x not in ("--mock-data", "--vocab-size", "128")] + ["--vocab-size", 255]
    flags += f"--tokenizer-type NullTokenizer --data-path {tmp_path}/text --data-cache-path {tmp_path}/cache".split()
    run = run_pretrain([*flags, "--eval-iters", 1], check=False, timeout=60)
    (line,) = [line for line in run.log.splitlines() if "lightning-pretrain" in line]
    assert not run.ok and f"the test part of {tmp_path}/text holds no token, as that has 64 documents; give a" in line
    assert len(run_pretrain([*flags, "--eval-iters", 0], timeout=60).losses) == 6
    assert len(run_pretrain([*flags, "--eval-iters", 1, "--split", "90,5,5"], timeout=60).losses) == 6


def test_evaluation_needs_no_length_of_training():
    """--skip-train alone evaluates as it does with --train-iters 0."""
    flags = " ".join(FLAGS).replace("--lr 1e-2 ", "").replace("--eval-iters 0", "--eval-iters 2 --skip-train")
    assert "--train-iters 6 " in flags
    logs = [run_pretrain(flags.replace("--train-iters 6 ", given).split()).log for given in ("", "--train-iters 0 ")]
    losses = [re.findall(r"validation loss .* on (\w+) set \| lm loss value: (\S+)", log) for log in logs]
    assert losses[0] == losses[1] and [name for name, _ in losses[0]] == ["validation", "test"]


@pytest.mark.parametrize(
    "nproc, flags",
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
        (4, "--pipeline-model-parallel-size 4"),  # two stages in the middle, which read nothing but boundaries
        (2, "--context-parallel-size 2"),
        (4, "--tensor-model-parallel-size 2 --context-parallel-size 2"),
    ],
    ids=["tp2-sp", "pp2-vp2", "pp4", "cp2", "tp2-cp2"],
)
def test_packed_documents_reach_every_stage(checkpoint, nproc, flags):
    folder, losses = checkpoint
    run = run_pretrain([*FLAGS, *RESUME, "--load", folder, *flags.split()], nproc=nproc)
    assert run.losses == pytest.approx(losses, abs=TRAINED_LOSSES)


def test_resuming_with_another_decay_is_refused(checkpoint):
    folder, _ = checkpoint
    run = run_pretrain([*FLAGS, *RESUME, "--load", folder, "--lightning-decay", "minimax"], check=False)
    assert not run.ok and not run.losses
    assert "--lightning-decay, --lightning-decay-offset: tnl with offset 0" in run.log


def test_user_errors_end_every_rank():
    run = run_pretrain([*FLAGS, "--reset-attention-mask"], nproc=2, check=False, timeout=60)
    assert not run.ok
    assert run.log.count("lightning-pretrain: --reset-attention-mask has no effect on lightning layers") == 2
    assert "Traceback" not in run.log
