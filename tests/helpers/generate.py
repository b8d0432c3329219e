"""examples/generate.py as a module."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from tests.launch import ROOT

SCRIPT = ROOT / "examples" / "generate.py"


def example() -> ModuleType:
    """The script as a module; examples/ is no package."""
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.inference_mode()
def greedy(rank: int, world: int, folder: Path, prompt: list[int], count: int, vocabulary: int):
    """Logits of the prompt, and tokens that follow, by Megatron's static engine."""
    torch.distributed.destroy_process_group()  # of spawn; the script makes its own
    script = example()
    model, _ = script.load_model(folder)
    positions = torch.arange(len(prompt))[None]
    logits = model(torch.tensor([prompt]), positions, None)[0, :, :vocabulary].float()
    how = dict(temperature=0, length=len(prompt) + count, vocab_size=vocabulary)
    return logits, [token for token, _ in script.generate(model, prompt, count, **how)]
