"""Writes *.safetensors tensor by tensor, in any order; the library's own writer needs all tensors of a file at once.

The format: length of the header (8 bytes, little endian), header (JSON: name -> dtype, shape, begin and end), data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from .errors import ConvertError, cannot
from .partial import start_writing
from .plan import Spec

INDEX = "model.safetensors.index.json"
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One file of an export: its name, the bytes before the data, and where each tensor begins and ends in the file."""

    file: str
    head: bytes
    places: dict[str, tuple[int, int]]

    @property
    def size(self) -> int:
        return max((end for _, end in self.places.values()), default=len(self.head))


def lay_out(tensors: Sequence[tuple[str, Spec]], limit: int) -> list[Shard]:
    """Divide tensors, in order, among files of at most ``limit`` bytes of data; a larger tensor has its own.

    Example:
        >>> [shard.file for shard in lay_out([("a", Spec((4,), torch.int8)), ("b", Spec((4,), torch.int8))], 5)]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    groups: list[list[tuple[str, Spec]]] = [[]]
    held = 0
    for name, spec in tensors:
        if groups[-1] and held + spec.nbytes > limit:
            groups.append([])
            held = 0
        groups[-1].append((name, spec))
        held += spec.nbytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0])]
    return [_shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _shard(file: str, tensors: list[tuple[str, Spec]]) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, spec in sorted(tensors, key=lambda item: -item[1].dtype.itemsize):  # stable; keeps all data aligned
        if spec.dtype not in _NAMES:
            raise ConvertError(f"tensor {name} is {spec.dtype}, which safetensors cannot hold")
        begins[name], end = (end, end + spec.nbytes), end + spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": list(begins[name])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return Shard(file, head, {name: (len(head) + begin, len(head) + end) for name, (begin, end) in begins.items()})


class Writer:
    """Writes tensors into the files of a layout; threads may share it."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder = folder
        self._shard = {name: shard for shard in shards for name in shard.places}
        for shard in shards:
            path = folder / shard.file
            try:
                with open(path, "r+b" if path.exists() else "wb") as file:  # what an earlier run wrote stays
                    file.write(shard.head)
                    file.truncate(shard.size)
            except OSError as error:
                raise cannot("write", path, error) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor where the layout says."""
        shard = self._shard[name]
        begin, end = shard.places[name]
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        assert len(data) == end - begin, name
        path = self._folder / shard.file
        try:
            descriptor = os.open(path, os.O_WRONLY)
            try:
                while data:
                    written = os.pwrite(descriptor, data, begin)
                    begin, data = begin + written, data[written:]
            finally:
                os.close(descriptor)
            start_writing(path)
        except OSError as error:
            raise cannot("write", path, error, name) from error

    def files_of(self, names: Sequence[str]) -> list[Path]:
        """The files that hold these tensors."""
        return sorted({self._folder / self._shard[name].file for name in names})


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index, where there are several files."""
    if len(shards) > 1:
        files = {name: shard.file for shard in shards for name in shard.places}
        total = sum(shard.size - len(shard.head) for shard in shards)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2)
        (folder / INDEX).write_text(text + "\n", "utf-8")


def check(folder: Path, shards: Sequence[Shard]) -> None:
    """Open every file with the library, which refuses one that is not whole."""
    for shard in shards:
        with safe_open(folder / shard.file, "pt") as file:
            assert set(file.keys()) == set(shard.places), shard.file
