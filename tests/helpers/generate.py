"""Generation from a checkpoint, and the script that does it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.launch import ROOT

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
