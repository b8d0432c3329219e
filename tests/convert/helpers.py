"""Comparing folders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def assert_model(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """The folder holds these tensors, and no others, bit for bit."""
    found = read_all(folder)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), x.reshape(-1).view(torch.uint8)), name
