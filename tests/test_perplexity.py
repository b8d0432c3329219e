"""lightning-perplexity: chunks change no loss, over ranks and windows, and memory does not grow with the context."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from examples.mortal import mortal
from lightning_megatron.mixer import LightningAttention
from tests.helpers.generate import (
    DEVICES,
    EVERYTHING,
    HYBRID,
    LOCAL,
    NUMBERS,
    PATTERN,
    SIZE,
    VOCAB,
    logits_of,
    save_bf16,
)
from tests.helpers.training import LATENT
from tests.launch import ENV, GPU_ENV, ROOT, Run, run_pretrain, spawn

MODULE = "lightning_megatron.inference.perplexity"
LENGTH = 300  # tokens, in chunks that do not divide it
CHECKPOINTS = {
    "lightning": EVERYTHING.replace("--linear-attention-freq 4", "--linear-attention-freq [1]*4"),
    "hybrid": EVERYTHING,
    "bf16": f"{EVERYTHING} --bf16",
    "latent": f"{EVERYTHING} {LATENT}",
    "yarn": f"{EVERYTHING} --position-embedding-type yarn --rotary-scaling-factor 4 "
    "--yarn-original-max-position-embeddings 32",
    "tnl": "--lightning-model tnl-1b@tiny --num-layers 3 --untie-embeddings-and-output-weights",
    "hybrid-model": HYBRID,
    "hybrid-model-lightning": HYBRID.replace("L-L-L-*-", "L-L-"),
    "hybrid-model-latent": f"{HYBRID} {LATENT}",
    "hybrid-model-tied": f"{PATTERN} --use-mup --mup-output-mult 2",
    "learned": "--linear-attention-freq 2 --position-embedding-type learned_absolute",
}


def ids(length: int = LENGTH, seed: int = 7) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(length)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        run_pretrain([*SIZE, *NUMBERS.split(), *CHECKPOINTS[name].split(), "--save", folder])
        return folder

    return write


@torch.inference_mode()
def compare(rank: int, world: int, folder: Path, context: int | None, chunk: int, double: bool):
    """What perplexity() returns, and the losses of one pass without caches over each window."""
    from lightning_megatron.config import has_softmax_layers
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.perplexity import perplexity

    text = ids()
    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model:
        if double:
            model = model.double()
            for layer in model.modules():
                if isinstance(layer, LightningAttention):  # no parameter, so double() leaves it alone
                    layer.log_decay = layer.log_decay.double()
        told = []
        found = perplexity(model, iter(text), vocab_size=VOCAB, context=context, chunk=chunk, tell=told.append)
        assert len(told) == (rank == 0 and has_softmax_layers(model.config))
        losses = []
        for begin in range(0, LENGTH - 1, context or LENGTH):
            window = text[begin : begin + (context or LENGTH) + 1]
            tokens, targets = window[:-1], torch.tensor(window[1:])
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, :, :VOCAB]
            losses += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none").tolist()
    return found, losses


@pytest.mark.parametrize("context", [None, 70])
@pytest.mark.parametrize("name", [x for x in CHECKPOINTS if x != "learned"])
def test_chunks_change_no_loss(name, context, checkpoint):
    double = name in ("lightning", "hybrid-model-lightning", "hybrid-model-latent")
    ((found, losses),) = spawn(compare, 1, checkpoint(name), context, 37, double)
    assert found.tokens == len(losses) == LENGTH - 1
    tolerance = 1e-2 if name == "bf16" else 1e-6 if double else 1e-5
    assert found.nll == pytest.approx(sum(losses) / len(losses), abs=tolerance)
    assert found.perplexity == math.exp(found.nll)


# ---- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest storage that anything returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self.size = max(self.size, x.untyped_storage().nbytes())
        return result


def jump(context, offset: int) -> None:
    """As if ``offset`` tokens had been read; also where a layer keeps their number as a size of an empty tensor."""
    context.sequence_len_offset = offset
    for number, (state, *known) in context.key_value_memory_dict.items():
        known = [x.new_empty(*x.shape[:3], offset, *x.shape[4:]) for x in known]
        context.key_value_memory_dict[number] = (state, *known)


def largest_at(rank: int, world: int, folder: Path, offset: int) -> list[tuple[int, int]]:
    """Largest storage of a step, and bytes that are kept, for the second chunk, and for one at ``offset``."""
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.losses import LossReader

    found, text = [], ids(33)
    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model:
        with LossReader.opened(model, VOCAB, None, chunk=32) as reader:
            reader.losses(text[:-1], text[1:])
            for at in (32, offset):
                jump(reader.context, at)
                with Largest() as largest:
                    losses = reader.losses(text[:-1], text[1:])
                assert losses.isfinite().all() and losses.shape == (32,)
                found.append((largest.size, sum(reader.cache_sizes().values())))
    return found


@pytest.mark.parametrize("name", ["lightning", "tnl", "hybrid-model-lightning"])
def test_memory_does_not_grow_with_the_context(name, checkpoint):
    """Measured at ten million tokens, where angles of all positions alone would be 640 MB."""
    ((first, later),) = spawn(largest_at, 1, checkpoint(name), 10_000_000)
    assert later == first and first[0] < 1 << 20, (first, later)


def kept(rank: int, world: int, folder: Path, context: int | None):
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.losses import LossReader

    text, rooms = ids(), []
    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model:
        with LossReader.opened(model, VOCAB, context, chunk=32) as reader:
            for begin in range(0, 200, 32):
                reader.losses(text[begin : begin + 32], text[begin + 1 : begin + 33])
                rooms.append(reader.context.max_sequence_length)
            return rooms, reader.softmax_bytes(), reader.cache_sizes()


def test_softmax_layers_keep_what_was_read(checkpoint):
    """Room grows to twice as much, and not beyond the context."""
    one = 2 * 4 * 16 * 4  # keys and values of one layer of 4 heads, in fp32
    for name, context, last in (("hybrid", None, 256), ("hybrid", 230, 230), ("hybrid-model", None, 256)):
        ((rooms, size, sizes),) = spawn(kept, 1, checkpoint(name), context)
        assert rooms == [32, 64, 128, 128, last, last, last] and size == one
        assert sizes == {"lightning": 3 * 4 * 16 * 16 * 4, "softmax": 7 * 32 * one}


# ---- ranks -----------------------------------------------------------------------------------------------------------


def over_ranks(rank: int, world: int, folder: Path, flags: list[str]):
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.perplexity import perplexity

    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB, flags=flags) as model:
        return perplexity(model, ids(), vocab_size=VOCAB, context=150, chunk=64)


LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "pp3": (3, "--pipeline-model-parallel-size 3 --hybrid-layer-pattern L-L|-|L-*-"),
}


@pytest.mark.parametrize("name, layout", [
    *(("hybrid", x) for x in LAYOUTS if x != "pp3"), *(("hybrid-model", x) for x in LAYOUTS),
])  # fmt: skip
def test_ranks_change_no_loss(name, layout, checkpoint):
    (want,) = spawn(over_ranks, 1, checkpoint(name), [])
    nproc, flags = LAYOUTS[layout]
    every = spawn(over_ranks, nproc, checkpoint(name), flags.split())
    assert all(found == every[0] for found in every)
    assert every[0].nll == pytest.approx(want.nll, abs=1e-6) and every[0].tokens == want.tokens


# ---- the command -----------------------------------------------------------------------------------------------------


def command(folder: Path, text: Path, *flags: str, nproc: int = 1) -> Run:
    return run_pretrain(["--load", folder, "--text", text, *flags], nproc, module=MODULE, check=False)


def test_buckets_of_positions(checkpoint, tmp_path):
    (tmp_path / "text").write_text("\n".join(map(str, ids(2500))))
    run = command(checkpoint("lightning"), tmp_path / "text", "--chunk", "999", "--json")
    assert run.ok, run.log
    found = json.loads(run.log.splitlines()[-1])
    assert [(b["begin"], b["end"], b["tokens"]) for b in found["buckets"]] == [
        (0, 1024, 1024),
        (1024, 2048, 1024),
        (2048, 4096, 451),
    ]
    assert found["tokens"] == 2499 and found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert sum(b["nll"] * b["tokens"] for b in found["buckets"]) / 2499 == pytest.approx(found["nll"])


@pytest.mark.parametrize("gpus", DEVICES)
def test_a_process_in_bf16(gpus, tmp_path):
    """As a user starts it: what passes without caches lose, up to rounding, and no further from fp32 than they are."""
    text = ids(500)
    (tmp_path / "text").write_text(" ".join(map(str, text)))
    save_bf16(tmp_path / "run", gpus, *EVERYTHING.split())
    ask = ("--load", str(tmp_path / "run"), "--text", str(tmp_path / "text"), "--chunk", "37", "--json", *LOCAL)
    env = os.environ | (GPU_ENV if gpus else ENV)
    run = subprocess.run(mortal("-m", MODULE, *ask), cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert ("no GPU, so it runs on the CPU" in run.stderr) != gpus
    found = json.loads(run.stdout)
    rough, exact = (
        float(torch.nn.functional.cross_entropy(logits_of(tmp_path / "run", [text[:-1]], gpus, dtype=dtype)[0].double(),
                                                torch.tensor(text[1:])))
        for dtype in (None, torch.float32)
    )  # fmt: skip
    print(found["nll"], rough, exact)
    assert found["tokens"] == len(text) - 1
    assert abs(found["nll"] - rough) < 1e-2 and abs(found["nll"] - exact) < 1e-2


@pytest.mark.parametrize("name", ["hybrid", "hybrid-model"])
def test_command_says_what_is_kept_and_has_a_limit(name, checkpoint, tmp_path):
    (tmp_path / "text").write_text(" ".join(map(str, ids())))
    run = command(checkpoint(name), tmp_path / "text", "--chunk", "100", "--max-sequence-length", "250")
    kept = "[softmax layers keep keys and values: 0.5 KiB for each token of the context on this rank]"
    assert run.log.count(kept) == 1
    assert_ends_with(run, "keep keys and values of 299 tokens, and max_sequence_length is 250: allow more, or give a")
    limited = ("--chunk", "100", "--max-sequence-length", "250", "--context", "250")
    run = command(checkpoint(name), tmp_path / "text", *limited)
    assert run.ok and "299 tokens of" in run.log and "in windows of 250 tokens" in run.log, run.log


def test_one_rank_prints(checkpoint, tmp_path):
    (tmp_path / "text").write_text(" ".join(map(str, ids())))
    run = command(checkpoint("hybrid"), tmp_path / "text", "--tensor-model-parallel-size", "2", nproc=2)
    assert run.ok and run.log.count("nats per token") == run.log.count("[softmax layers keep") == 1, run.log


def assert_ends_with(run: Run, message: str) -> None:
    assert not run.ok and message in run.log and "Traceback" not in run.log, run.log


def test_errors_come_before_the_model(checkpoint, tmp_path):
    folder = checkpoint("learned")
    (tmp_path / "one").write_text("7")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "text").write_text("1 2 3")
    assert_ends_with(command(folder, tmp_path / "text"), "--context unlimited: the model has learned 128 positions")
    few = ("--context", "64")
    assert_ends_with(command(folder, tmp_path / "none", *few), "none: No such file or directory; give a file with text")
    assert_ends_with(command(folder, tmp_path / "one", *few), "has 1 tokens: give a text of 2 or more")
    assert_ends_with(command(folder, tmp_path / "bytes", *few), "is no UTF-8 text")
    assert_ends_with(command(folder, tmp_path / "text", "--chunk", "0"), "--chunk 0 must be at least 1 token")
    huge = command(folder, tmp_path / "text", "--chunk", str(10**20))
    assert_ends_with(huge, f"--chunk {10**20} must be at most {2**63 - 1} tokens")
    assert_ends_with(command(folder, tmp_path / "text", "--context", "some"), "some is neither a number of tokens nor")
    run = command(folder, tmp_path / "text", *few)
    assert run.ok and "2 tokens of" in run.log, run.log


def test_blocks_are_the_text_and_begin_with_lines(tmp_path):
    from lightning_megatron.inference.perplexity import blocks_of

    draw, path = random.Random(3), tmp_path / "text"
    for letters in ("ab \n", "ab ", "ab", "é\n\t "):
        text = "".join(draw.choice(letters) for _ in range(5000))
        path.write_text(text, "utf-8", newline="")
        blocks = list(blocks_of(path, 64))
        assert "".join(blocks) == text and max(map(len, blocks)) <= 256 and len(blocks) > 10
        if letters == "ab \n":
            assert all(block.endswith("\n") and not after[0].isspace() for block, after in pairwise(blocks))
