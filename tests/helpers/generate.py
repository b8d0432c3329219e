"""Generation from a checkpoint, and the script that does it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.launch import ROOT

SCRIPT = ROOT / "examples" / "generate.py"


@torch.inference_mode()
def greedy(rank: int, world: int, folder: Path, prompt: list[int], count: int, vocabulary: int):
    """Logits of the prompt, and tokens that follow, by Megatron's static engine."""
    from lightning_megatron.inference import loading

    with loading.loaded_model(loading.read_checkpoint(folder), vocab_size=vocabulary) as model:
        logits = model(torch.tensor([prompt]), torch.arange(len(prompt))[None], None)[0, :, :vocabulary].float()
        return logits, loading.greedy(model, prompt, count, vocabulary)
