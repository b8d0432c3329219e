"""How the tensors of a Hugging Face checkpoint and those of a Megatron checkpoint are made of each other.

A model is a list of units, and each tensor of either checkpoint belongs to exactly one of them. A unit is small, so
that a model of any size is converted in little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Move = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class Named(NamedTuple):
    """A tensor of the Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]
    optional: bool = False  # may be missing on import; written on export all the same


class Piece(NamedTuple):
    """A tensor of the Megatron checkpoint (torch_dist), or a box of one, such as one expert of all.

    ``offset`` is where the box begins in the whole tensor ``key``, whose shape is ``whole``. The tensor that is moved
    has the shape of the box, dimensions of 1 included.
    """

    key: str
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """Tensors that are made of each other, in both directions; exact, so that there and back is the identity.

    ``to_megatron`` is given the tensors of ``hf`` in order and returns those of ``megatron``, ``to_hf`` is its
    inverse. Both keep the dtype, and may return views. A missing optional tensor is given as None.
    """

    hf: tuple[Named, ...]
    megatron: tuple[Piece, ...]
    to_megatron: Move
    to_hf: Move


def whole(key: str, *shape: int) -> Piece:
    """A piece that is all of its tensor."""
    return Piece(key, shape, shape, (0,) * len(shape))


def same(name: str, key: str, *shape: int) -> Unit:
    """A tensor that is the same in both."""
    return Unit((Named(name, shape),), (whole(key, *shape),), list, list)
