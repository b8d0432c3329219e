"""Megatron's binary dataset of equal documents, for trainings in which the order of documents does not matter."""

from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

DOCUMENT = 32  # tokens, the end of document included


def write_equal_documents(folder: Path) -> str:
    """One document over and over; returns the flags that read it."""
    prefix = folder / "text"
    tokens = torch.randint(254, (DOCUMENT,), generator=torch.Generator().manual_seed(1))
    tokens[-1] = 254  # NullTokenizer's end of document
    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    for _ in range(64):
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return f"--data-path {prefix} --split 1,0,0 --eod-mask-loss --tokenizer-type NullTokenizer"
