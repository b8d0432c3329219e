"""How the tensors of a Hugging Face checkpoint and those of a Megatron checkpoint are made of each other.

A model is a list of units, and each tensor of either checkpoint belongs to exactly one of them. A unit is small, so
that a model of any size is converted in little memory.
"""

from __future__ import annotations

from argparse import Namespace
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
    has the shape of the box, dimensions of 1 included: the first ``boxed`` ones, which number layers or experts.
    """

    key: str
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    boxed: int = 0

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape without the dimensions that number layers or experts."""
        return self.shape[self.boxed :]


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


@dataclass(frozen=True)
class Keys:
    """Keys of a Megatron checkpoint, which holds each layer under its own number, or all layers in one tensor.

    ``block`` and ``inner`` stand before and behind the number of a layer, if it has one.
    """

    layers: int
    stacked: bool = False
    block: str = "decoder.layers."
    inner: str = ""

    def layer(self, number: int, name: str, *shape: int) -> Piece:
        """All of a layer's tensor ``name``."""
        return self._piece(number, name, shape, shape, (0,) * len(shape), 0)

    def expert(self, number: int, name: str, expert: int, experts: int, *shape: int) -> Piece:
        """One expert's part of ``name``, which holds those of all experts of a layer."""
        return self._piece(number, name, (1, *shape), (experts, *shape), (expert, *(0 for _ in shape)), 1)

    def _piece(self, number: int, name: str, shape, whole, offset, boxed: int) -> Piece:
        if self.stacked:
            where = (self.layers, *whole), (number, *offset)
            return Piece(f"{self.block}{self.inner}{name}", (1, *shape), *where, boxed + 1)
        return Piece(f"{self.block}{number}.{self.inner}{name}", shape, whole, offset, boxed)


def whole(key: str, *shape: int) -> Piece:
    """A piece that is all of its tensor."""
    return Piece(key, shape, shape, (0,) * len(shape))


def same(name: str, piece: Piece, shape: tuple[int, ...] | None = None) -> Unit:
    """A tensor that is the same in both, but for dimensions of 1; ``shape`` is that of Hugging Face."""
    shape = piece.inner if shape is None else shape
    return Unit((Named(name, shape),), (piece,), lambda x: [x[0].view(piece.shape)], lambda x: [x[0].view(shape)])


def padded(name: str, piece: Piece, rows: int) -> Unit:
    """Rows of a vocabulary, of which Megatron has more: zeros, which nothing reads."""
    shape = (rows, *piece.shape[1:])

    def pad(x: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        more = piece.shape[0] - rows
        return [torch.cat([x[0], x[0].new_zeros(more, *piece.shape[1:])]) if more else x[0]]

    return Unit((Named(name, shape),), (piece,), pad, lambda x: [x[0][:rows]])


def vocabulary(args: Namespace, embedding: str, size: int, final_norm: str | None = "model.norm.weight") -> list[Unit]:
    """Embedding, last norm, and the output layer where it has a weight of its own, of ``size`` tokens.

    Raises:
        ValueError: there are fewer rows.
    """
    rows, hidden = args.padded_vocab_size, args.hidden_size
    if size > rows:
        raise ValueError(
            f"config.json: vocab_size is {size}, and the checkpoint has {rows} rows of the vocabulary "
            "(--padded-vocab-size): give the folder of the model that was trained, whose vocab_size is at most that"
        )
    found = [padded(embedding, whole("embedding.word_embeddings.weight", rows, hidden), size)]
    if final_norm:
        found.append(same(final_norm, whole("decoder.final_layernorm.weight", hidden)))
    if args.untie_embeddings_and_output_weights:
        found.append(padded("lm_head.weight", whole("output_layer.weight", rows, hidden), size))
    return found


def layer_norms(keys: Keys, layer: int, names: str, hidden: int, *, before_qkv: bool, dense: bool) -> list[Unit]:
    """``input_layernorm`` and ``post_attention_layernorm`` of a layer, under the keys of ``spec.py``.

    ``before_qkv``: the attention has one projection of q, k and v; ``dense``: no experts.
    """
    ours = "self_attention.linear_qkv.layer_norm_weight" if before_qkv else "input_layernorm.weight"
    mlp = "mlp.linear_fc1.layer_norm_weight" if dense else "pre_mlp_layernorm.weight"
    return [
        same(f"{names}input_layernorm.weight", keys.layer(layer, ours, hidden)),
        same(f"{names}post_attention_layernorm.weight", keys.layer(layer, mlp, hidden)),
    ]


def joined(names: Sequence[str], piece: Piece, rows: Sequence[int]) -> Unit:
    """Tensors one below the other, such as the gate and the up projection of an MLP."""
    return grouped([Part(name, (n,)) for name, n in zip(names, rows, strict=True)], piece, 1, range(len(names)))


class Part(NamedTuple):
    """A Hugging Face tensor whose rows belong to ``groups`` heads, or groups of heads.

    ``rows``: of one group, of each of its parts (q, k, v, ...). The tensor holds one part after the other, each with
    all groups; or ``by_group``, one group after the other, each with all parts.
    """

    name: str
    rows: tuple[int, ...]
    by_group: bool = False


def grouped(parts: Sequence[Part], piece: Piece, groups: int, order: Sequence[int]) -> Unit:
    """Projections that Megatron holds as one, group after group, so that a tensor-parallel slice is whole groups.

    ``order``: of one group in Megatron, the parts of all tensors as counted through. ``piece`` has one row per channel,
    and maybe columns.
    """
    shape = piece.inner
    columns = shape[1:]
    assert sorted(order) == list(range(sum(len(part.rows) for part in parts)))
    rows = [n for part in parts for n in part.rows]
    assert shape[0] == groups * sum(rows), f"{piece.key} has {shape[0]} rows, not {groups} times {rows}"

    def split(x: torch.Tensor, part: Part) -> list[torch.Tensor]:
        """``[groups, rows, ...]`` of each part."""
        if part.by_group:
            return list(x.view(groups, sum(part.rows), *columns).split(part.rows, 1))
        return [y.view(groups, -1, *columns) for y in x.split([groups * n for n in part.rows])]

    def unsplit(xs: Sequence[torch.Tensor], part: Part) -> torch.Tensor:
        if part.by_group:
            return torch.cat(list(xs), 1).flatten(0, 1)
        return torch.cat([x.flatten(0, 1) for x in xs])

    def to_megatron(x: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = [y for tensor, part in zip(x, parts, strict=True) for y in split(tensor, part)]
        return [torch.cat([found[i] for i in order], 1).view(piece.shape)]

    def to_hf(x: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        ordered = x[0].view(groups, sum(rows), *columns).split([rows[i] for i in order], 1)
        found = [ordered[list(order).index(i)] for i in range(len(rows))]
        return [unsplit([found.pop(0) for _ in part.rows], part) for part in parts]

    named = tuple(Named(part.name, (groups * sum(part.rows), *columns)) for part in parts)
    return Unit(named, (piece,), to_megatron, to_hf)
