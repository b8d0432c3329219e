"""Reads Megatron's torch_dist checkpoints by the classes of torch.distributed.checkpoint; Megatron is not imported.

    DIR/latest_checkpointed_iteration.txt    "release", or the last iteration
    DIR/release/, DIR/iter_0000100/          .metadata, metadata.json, *.distcp

The args of the training are an object in it, "common_state"; Megatron before 0.19 wrote them to common.pt.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..models.units import Piece
from .errors import ConvertError, cannot
from .plan import Spec

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common_state/shard_0_1"  # Megatron's ShardedObject("common_state", ..., (1,), (0,)).unique_key


def step_folder(path: Path, step: int | None = None) -> Path:
    """The folder that holds the tensors: ``path`` itself, or the newest or chosen iteration in it.

    Raises:
        ConvertError: no such iteration, or no torch_dist checkpoint.
    """
    folder = path
    if not (path / "metadata.json").exists():
        try:
            name = (path / TRACKER).read_text("utf-8").strip()
        except OSError:
            raise ConvertError(
                f"{path} is no Megatron checkpoint: it has neither {TRACKER} nor metadata.json; "
                "export takes the folder of --save, saved with --ckpt-format torch_dist"
            ) from None
        if step is not None:
            name = str(step)
        folder = path / (f"iter_{int(name):07d}" if name.isdecimal() else name)
    elif step is not None and folder.name != f"iter_{step:07d}":
        raise ConvertError(f"--step {step}: {path} is one checkpoint; name the folder that holds all of them")
    if not (folder / "metadata.json").exists() or not (folder / ".metadata").exists():
        there = ", ".join(sorted(p.name for p in path.iterdir() if (p / ".metadata").exists())) or "none"
        raise ConvertError(f"{folder} is no torch_dist checkpoint (of those there are: {there}); choose with --step")
    try:
        backend = json.loads((folder / "metadata.json").read_text("utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConvertError(f"{folder / 'metadata.json'} names no sharded_backend ({error}); save once more") from error
    if backend != "torch_dist":
        raise ConvertError(f"{folder} has format {backend!r}; save once more with --ckpt-format torch_dist")
    return folder


class _Receiver:
    """Stands for the box that is read: what the reader copies into it is kept without a copy if it is all."""

    def __init__(self, boxes: _Boxes, item: ReadItem) -> None:
        self._boxes, self._item = boxes, item

    def detach(self) -> _Receiver:
        return self

    def size(self) -> torch.Size:
        return self._item.lengths

    def copy_(self, tensor: torch.Tensor) -> None:
        self._boxes.put(tensor, self._item)


class _Boxes(LoadPlanner):
    """Puts what is read into one tensor, or one buffer of bytes."""

    def __init__(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.uint8) -> None:
        self._shape, self._dtype = torch.Size(shape), dtype
        self.tensor: torch.Tensor | None = None
        self.bytes = io.BytesIO()

    def put(self, tensor: torch.Tensor, item: ReadItem) -> None:
        if item.lengths == self._shape:
            self.tensor = tensor
            return
        if self.tensor is None:
            self.tensor = torch.empty(self._shape, dtype=self._dtype)
        box = self.tensor
        for dim, (first, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            box = box.narrow(dim, first, length)
        box.copy_(tensor)

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """No state dict: the items say all."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.bytes = value

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return cast(torch.Tensor, _Receiver(self, read_item))

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: ``put`` did it."""


class Checkpoint:
    """The tensors of one torch_dist checkpoint, read box by box.

    Args:
        folder: from ``step_folder``.

    Attributes:
        tensors: shape and dtype of every tensor but those of the optimizer.
        optimizer: how many tensors of the optimizer there are.

    Raises:
        ConvertError: .metadata cannot be read, or a file is missing or shorter than .metadata says, naming a tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except OSError as error:
            raise cannot("read", folder / ".metadata", error) from error
        except Exception as error:  # a pickle fails in any way
            raise ConvertError(f"{folder / '.metadata'} is damaged: {error}; save or import once more") from error
        self._reader.set_up_storage_reader(self._metadata, True)
        self._check_files()
        self._chunks: dict[str, tuple[list[int], list[ChunkStorageMetadata], int]] = {}
        every = self._metadata.state_dict_metadata.items()
        stored = {key: what for key, what in every if isinstance(what, TensorStorageMetadata)}
        found = {key: Spec(tuple(what.size), what.properties.dtype) for key, what in stored.items()}
        self.tensors = {key: spec for key, spec in found.items() if not _of_optimizer(key)}
        self.optimizer = len(found) - len(self.tensors)
        for key in self.tensors:
            chunks = sorted(stored[key].chunks, key=lambda chunk: tuple(chunk.offsets))
            longest = max((chunk.sizes[0] for chunk in chunks if chunk.sizes), default=0)
            self._chunks[key] = [chunk.offsets[0] if chunk.offsets else 0 for chunk in chunks], chunks, longest

    def read(self, piece: Piece) -> torch.Tensor:
        """The box of a tensor, [*piece.shape]."""
        whole = self.tensors[piece.key]
        starts, chunks, longest = self._chunks[piece.key]
        if piece.shape:  # only chunks that can meet the box along the first dimension: there may be thousands
            first, last = piece.offset[0], piece.offset[0] + piece.shape[0]
            chunks = chunks[bisect_left(starts, first - longest + 1) : bisect_left(starts, last)]
        there = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), torch.Size(whole.shape), chunks)
        box = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))
        items = create_read_items_for_chunk_list(piece.key, there, [box])
        read = sum(torch.Size(item.lengths).numel() for item in items)
        if read != (needed := torch.Size(piece.shape).numel()):
            raise ConvertError(f"{self.folder} holds {read} of {needed} values of tensor {piece.key}")
        boxes = _Boxes(piece.shape, whole.dtype)
        try:
            self._reader.read_data(LoadPlan(items), boxes).wait()
        except OSError as error:
            raise cannot("read", self.folder, error, piece.key) from error
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            names = sorted({self._metadata.storage_data[item.storage_index].relative_path for item in items})
            where = f"{self.folder}/{', '.join(names)}"
            raise ConvertError(f"{where} is damaged in tensor {piece.key}: {_reason(error)}") from error
        return torch.empty(piece.shape, dtype=whole.dtype) if boxes.tensor is None else boxes.tensor

    def common(self) -> dict[str, Any]:
        """The state that is no tensor: args, iteration and more.

        Raises:
            ConvertError: it cannot be read, or has no args.
        """
        legacy = self.folder / "common.pt"
        try:
            content = legacy.read_bytes() if legacy.exists() else self._common_object()
            state = _load_safely(content)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConvertError(f"cannot read the args of {self.folder}: {_reason(error)}") from error
        state = state[0] if isinstance(state, list) else state
        if not isinstance(state, dict) or not isinstance(state.get("args"), Namespace):
            raise ConvertError(
                f"{self.folder} holds no args of a training; only what Megatron's training saved is read"
            )
        return state

    def _common_object(self) -> bytes:
        if COMMON not in self._metadata.state_dict_metadata:
            raise ConvertError(f"{self.folder} has neither common.pt nor {COMMON}: it holds no args of a training")
        planner, index = _Boxes(), MetadataIndex(COMMON)
        size = torch.Size((0,))
        item = ReadItem(LoadItemType.BYTE_IO, index, size, index, size, size)
        self._reader.read_data(LoadPlan([item]), planner).wait()
        return planner.bytes.getvalue()

    def state(self) -> dict[str, list[int]]:
        """Size and modification time of each file: tells whether a checkpoint has changed."""
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return {path.name: [(stat := path.stat()).st_size, stat.st_mtime_ns] for path in files}

    def _check_files(self) -> None:
        ends: dict[str, tuple[int, str]] = {}
        for index, where in self._metadata.storage_data.items():
            end = where.offset + where.length
            ends[where.relative_path] = max(ends.get(where.relative_path, (0, "")), (end, index.fqn))
        for name, (end, key) in sorted(ends.items()):
            path = self.folder / name
            if not path.exists():
                raise ConvertError(f"{path} is missing; it holds tensor {key}, among others")
            if (size := path.stat().st_size) < end:
                raise ConvertError(f"{path} is truncated in tensor {key}: it has {size} of {end} bytes")


def _of_optimizer(key: str) -> bool:
    """Whether a tensor is one of the optimizer: optimizer.state.exp_avg.X, chained_0.optimizer.state..., and so on."""
    first = key.split(".")
    return "optimizer" in first[:2]


def _reason(error: Exception) -> str:
    """One line of what torch says at length."""
    found = re.search(r"Unsupported \w+: .*?(?= was not|$)", str(error), re.MULTILINE)
    return found[0] if found else (str(error).splitlines() or [type(error).__name__])[0]


def _load_safely(content: bytes) -> Any:
    """Unpickle plain values and Namespaces; Megatron's own classes only where the args hold some."""
    try:
        with _allowing([Namespace, SimpleNamespace, PosixPath, io.BytesIO]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        from megatron.core.safe_globals import SAFE_GLOBALS

        with _allowing(SAFE_GLOBALS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _allowing(classes: Sequence[Any]) -> contextlib.AbstractContextManager:
    """torch's own context forgets, when it ends, also those that Megatron allowed for the whole process."""
    before = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([item for item in classes if item not in before])
