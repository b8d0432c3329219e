"""Generation from a checkpoint, and the script that does it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch import ROOT, run_pretrain, spawn

SCRIPT = ROOT / "examples" / "generate.py"
SIZE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 "
    "--position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.3 "  # to vary tokens
    "--micro-batch-size 1 --global-batch-size 4 --lr 2e-3 --lr-decay-style constant --train-iters 2 --save-interval 2 "
    "--eval-iters 0 --num-workers 0 --log-interval 1 --mock-data"
).split()
VOCAB = 255  # the table has 256 rows
NUMBERS = f"--tokenizer-type NullTokenizer --vocab-size {VOCAB}"
EVERYTHING = (
    "--linear-attention-freq 4 --normalization RMSNorm --swiglu --disable-bias-linear --lightning-norm all "
    "--lightning-qk-norm --lightning-rope --lightning-num-kv-heads 2 --lightning-decay minimax"
)
PATTERN = "--hybrid-layer-pattern L-L-L-*-"  # of HybridModel
HYBRID = EVERYTHING.replace("--linear-attention-freq 4", PATTERN)
DEVICES = [pytest.param(False, id="cpu"), pytest.param(True, id="gpu", marks=pytest.mark.gpu)]
"""Values of ``gpus``, for tests that run on either."""
LOCAL = "--transformer-impl local --no-rope-fusion".split()  # whether TransformerEngine is installed or not
MOE = "--num-experts 4 --moe-ffn-hidden-size 64 --moe-router-load-balancing-type none --disable-bias-linear"


class Numbers:
    """A tokenizer of a vocabulary of ``vocab_size``."""

    eod = -1

    def __init__(self, vocab_size: int = VOCAB):
        self.vocab_size = vocab_size

    def detokenize(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


@torch.inference_mode()
def greedy(rank: int, world: int, folder: Path, prompt: list[int], count: int, vocabulary: int):
    """Logits of the prompt, and tokens that follow, by Megatron's static engine."""
    from lightning_megatron.inference import loading

    with loading.loaded_model(loading.read_checkpoint(folder), vocab_size=vocabulary) as model:
        logits = model(torch.tensor([prompt]), torch.arange(len(prompt))[None], None)[0, :, :vocabulary].float()
        return logits, loading.greedy(model, prompt, count, vocabulary)


# ---- in bf16, on CPU or GPU ------------------------------------------------------------------------------------------


def save_bf16(folder: Path, gpus: bool, *flags: str) -> None:
    """A checkpoint in bf16, of a training on the device on which it will be used."""
    run_pretrain([*SIZE, *NUMBERS.split(), *flags, "--bf16", *LOCAL, "--save", folder], gpus=gpus)


@torch.inference_mode()
def _logits(rank: int, world: int, folder: Path, texts: list[list[int]], vocabulary: int, dtype) -> list[torch.Tensor]:
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint

    with loaded_model(read_checkpoint(folder), vocab_size=vocabulary, flags=LOCAL, dtype=dtype) as model:
        found = []
        for text in texts:
            tokens, places = torch.tensor([text], device="cuda"), torch.arange(len(text), device="cuda")[None]
            found.append(model(tokens, places, None)[0, :, :vocabulary].float().cpu())
        return found


def logits_of(folder: Path, texts: list[list[int]], gpus: bool, vocabulary: int = VOCAB, dtype=None):
    """Logits [tokens, vocabulary] by a pass without caches over each text, in the checkpoint's dtype or another."""
    return spawn(_logits, 1, folder, texts, vocabulary, dtype, gpus=gpus)[0]


def decided(logits: torch.Tensor, prompt: list[int], tokens: list[int], noise: float) -> int:
    """How many of the tokens after a prompt are the largest logit of a pass over all of them.

    Args:
        logits: of that pass, ``[tokens, vocabulary]``.
        noise: by how much two logits may differ that are equal but for rounding, relative to the largest.

    Raises:
        AssertionError: another token is larger by more than that.
    """
    rows = logits[len(prompt) - 1 : len(prompt) + len(tokens) - 1]
    gaps = (rows.amax(-1) - rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]) / rows.abs().amax(-1)
    assert len(gaps) == len(tokens) and gaps.max() < noise, gaps
    return int((gaps == 0).sum())
