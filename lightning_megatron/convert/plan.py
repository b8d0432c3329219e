"""What a conversion will read and write, known before anything is written: every tensor of both sides accounted for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..models.units import Move, Named, Piece, Unit
from .errors import ConvertError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # others are codes, of a quantization
_LISTED = 200  # problems, of the first kind and all others


class Spec(NamedTuple):
    """Shape and dtype of a tensor that a unit gives."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Found(Protocol):
    """A tensor that is there."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Task:
    """A unit with what it gives, in the order of its pieces (import) or names (export)."""

    unit: Unit
    gives: tuple[Spec, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.gives)


def plan_import(units: Sequence[Unit], found: Mapping[str, Found], where: str) -> list[Task]:
    """Tasks of all units, from the tensors of a Hugging Face folder.

    Args:
        units: all units of the model.
        found: name -> tensor that is there.
        where: the folder and what it was compared with, for messages.

    Raises:
        ConvertError: lists missing, unexpected and misshapen tensors, with both shapes, and those of no float dtype.
    """
    expected = _by_name(units)
    problems = _differences({name: (named.shape, named.optional) for name, named in expected.items()}, found)
    problems += [
        ("wrong dtype", f"{name}  is {_name(found[name].dtype)}, expected float32, bfloat16, float16 or float64")
        for unit in units
        if unit.megatron
        for name, *_ in unit.hf
        if name in found and found[name].dtype not in _FLOATS
    ]
    _refuse(problems, where)
    tasks = []
    for unit in units:
        inputs = [found.get(named.name) for named in unit.hf]
        _same_dtype(unit, [(named.name, what) for named, what in zip(unit.hf, inputs, strict=True) if what is not None])
        shapes = [(piece.key, piece.shape) for piece in unit.megatron]
        tasks.append(Task(unit, _specs(unit.to_megatron, inputs, shapes) if unit.megatron else ()))
    _check_tiling(units)
    return tasks


def plan_export(units: Sequence[Unit], found: Mapping[str, Found], where: str) -> list[Task]:
    """Tasks of all units, from the tensors of a Megatron checkpoint; as ``plan_import``."""
    _by_name(units)
    wholes = _check_tiling(units)
    _refuse(_differences({key: (shape, False) for key, shape in wholes.items()}, found), where)
    tasks = []
    for unit in units:
        inputs = [(piece.key, Spec(piece.shape, found[piece.key].dtype)) for piece in unit.megatron]
        _same_dtype(unit, inputs)
        shapes = [(named.name, named.shape) for named in unit.hf]
        tasks.append(Task(unit, _specs(unit.to_hf, [spec for _, spec in inputs], shapes)))
    return tasks


def fingerprint(*values: object) -> str:
    """A short name of plain values: tells whether two plans are the same."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _by_name(units: Sequence[Unit]) -> dict[str, Named]:
    names: dict[str, Named] = {}
    for unit in units:
        for named in unit.hf:
            if named.name in names:
                raise ValueError(f"two units hold tensor {named.name}")
            names[named.name] = named
    return names


def _check_tiling(units: Sequence[Unit]) -> dict[str, tuple[int, ...]]:
    """The whole shape of each Megatron tensor; the family's pieces of it must fill it."""
    pieces: dict[str, list[Piece]] = {}
    for unit in units:
        for piece in unit.megatron:
            pieces.setdefault(piece.key, []).append(piece)
    for key, boxes in pieces.items():
        volume = sum(torch.Size(box.shape).numel() for box in boxes)
        inside = all(
            o + n <= all_ for box in boxes for o, n, all_ in zip(box.offset, box.shape, box.whole, strict=True)
        )
        places = {(box.whole, box.offset) for box in boxes}
        if volume != torch.Size(boxes[0].whole).numel() or not inside or len(places) != len(boxes):
            raise ValueError(f"the {len(boxes)} pieces of {key} do not fill its shape {list(boxes[0].whole)} once")
    return {key: boxes[0].whole for key, boxes in pieces.items()}


def _differences(
    expected: Mapping[str, tuple[tuple[int, ...], bool]], found: Mapping[str, Found]
) -> list[tuple[str, str]]:
    """(kind, description) of each tensor that does not fit; expected: name -> shape, optional."""
    problems = []
    for name, (shape, optional) in expected.items():
        if name not in found:
            if not optional:
                problems.append(("missing", f"{name}  expected {list(shape)}"))
        elif tuple(found[name].shape) != tuple(shape):
            problems.append(("misshapen", f"{name}  expected {list(shape)}, found {list(found[name].shape)}"))
    problems += [
        ("unexpected", f"{name}  found {list(what.shape)}") for name, what in found.items() if name not in expected
    ]
    return problems


def _refuse(problems: list[tuple[str, str]], where: str) -> None:
    if problems:
        lines = [f"\n  {kind:<11} {text}" for kind, text in problems[:_LISTED]]
        more = f"\n  ... and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        count = "1 tensor does" if len(problems) == 1 else f"{len(problems)} tensors do"
        remedy = "take the files that belong together, all of them, or correct config.json"
        raise ConvertError(f"{count} not fit: {where}; {remedy}:{''.join(lines)}{more}")


def _same_dtype(unit: Unit, inputs: Iterable[tuple[str, Found]]) -> None:
    """A tensor joined of several has one dtype: refuse what would change a value."""
    dtypes = {name: what.dtype for name, what in inputs}
    if unit.megatron and len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} is {_name(dtype)}" for name, dtype in dtypes.items())
        raise ConvertError(f"tensors that belong together must have one dtype: {listed}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _specs(
    move: Move, inputs: Sequence[Found | None], shapes: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[Spec, ...]:
    """What a unit gives, from a run on tensors without data."""
    meta = [None if what is None else torch.empty(what.shape, dtype=what.dtype, device="meta") for what in inputs]
    outputs = move(meta)  # type: ignore[arg-type] # None for a missing optional tensor
    given = tuple(Spec(tuple(out.shape), out.dtype) for out in outputs)
    if [spec.shape for spec in given] != [shape for _, shape in shapes]:
        raise ValueError(f"a unit gives {[spec.shape for spec in given]} where its table says {shapes}")
    return given
