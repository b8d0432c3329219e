"""Rotary angles of the tokens that are read, and not of all positions up to the longest context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding


class Angles:
    """In place of the angles ``[positions, 1, 1, dim]``: a slice of positions is computed when it is taken.

    Bit for bit what a slice of Megatron's tensor is: both count positions in fp32 from 0, exactly up to 2^24.
    """

    def __init__(self, embedding: RotaryEmbedding, dim: int, positions: int):
        self._embedding, self.shape = embedding, torch.Size((positions, 1, 1, dim))

    def __getitem__(self, key: Any) -> torch.Tensor:
        key, *others = key if isinstance(key, tuple) else (key,)
        if not isinstance(key, slice) or key.step not in (None, 1) or any(x != slice(None) for x in others):
            raise TypeError(f"angles are taken as a slice of positions, not [{key}]")
        start, stop, _ = key.indices(self.shape[0])
        found = self._embedding.get_emb(max(0, stop - start), offset=start)
        return found[0] if isinstance(found, tuple) else found


@contextlib.contextmanager
def angles_on_demand(model: torch.nn.Module) -> Iterator[None]:
    """While it is open, the model's rotary embeddings return ``Angles``: memory does not grow with the context."""
    embeddings = [module for module in model.modules() if isinstance(module, RotaryEmbedding)]
    for embedding in embeddings:
        embedding.forward = _forward(embedding)
    try:
        yield
    finally:
        for embedding in embeddings:
            del embedding.forward


def _forward(embedding: RotaryEmbedding) -> Any:
    first = embedding.get_emb(1)
    dim = (first[0] if isinstance(first, tuple) else first).shape[-1]

    def forward(max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Any:
        assert offset == 0 and not packed_seq, "one sequence, from its beginning"
        angles = Angles(embedding, dim, max_seq_len)
        return (angles, first[1]) if isinstance(embedding, YarnRotaryEmbedding) else angles

    return forward
