"""lightning-perplexity: chunks change no loss, over ranks and windows, and memory does not grow with the context."""

from __future__ import annotations

import functools
import json
import math
import random
from pathlib import Path

import pytest
import torch

from tests.helpers.generate import EVERYTHING, NUMBERS, SIZE, VOCAB
from tests.helpers.training import LATENT
from tests.launch import Run, run_pretrain, spawn

MODULE = "lightning_megatron.inference.perplexity"
LENGTH = 300  # tokens, in chunks that do not divide it
CHECKPOINTS = {
    "lightning": EVERYTHING.replace("--linear-attention-freq 4", "--linear-attention-freq [1]*4"),
    "hybrid": EVERYTHING,
    "bf16": f"{EVERYTHING} --bf16",
    "latent": f"{EVERYTHING} {LATENT}",
    "yarn": f"{EVERYTHING} --position-embedding-type yarn --yarn-rotary-scaling-factor 4 "
    "--yarn-original-max-position-embeddings 32",
    "tnl": "--lightning-model tnl-1b@tiny --num-layers 3 --untie-embeddings-and-output-weights",
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
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.perplexity import perplexity

    text = ids()
    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model:
        if double:
            model = model.double()
        found = perplexity(model, iter(text), vocab_size=VOCAB, context=context, chunk=chunk)
        losses = []
        for begin in range(0, LENGTH - 1, context or LENGTH):
            window = text[begin : begin + (context or LENGTH) + 1]
            tokens, targets = window[:-1], torch.tensor(window[1:])
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, :, :VOCAB]
            losses += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none").tolist()
    return found, losses


@pytest.mark.parametrize("context", [None, 70])
@pytest.mark.parametrize("name", ["lightning", "hybrid", "latent", "yarn", "tnl", "bf16"])
def test_chunks_change_no_loss(name, context, checkpoint):
    double = name in ("lightning", "tnl")
    ((found, losses),) = spawn(compare, 1, checkpoint(name), context, 37, double)
    assert found.tokens == len(losses) == LENGTH - 1
    tolerance = 1e-2 if name == "bf16" else 1e-6 if double else 1e-5
    assert found.nll == pytest.approx(sum(losses) / len(losses), abs=tolerance)
    assert found.perplexity == math.exp(found.nll)
