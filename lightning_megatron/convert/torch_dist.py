"""Megatron's torch_dist checkpoints, through the classes of torch.distributed.checkpoint; Megatron is not imported.

    DIR/latest_checkpointed_iteration.txt    "release", or the last iteration
    DIR/release/, DIR/iter_0000100/          .metadata, metadata.json, *.distcp

The args of the training are an object in it, "common_state"; Megatron before 0.19 wrote them to common.pt.
"""

from __future__ import annotations

import io
import json
import pickle
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint import (
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from ..models.units import Piece
from .errors import ConvertError, cannot
from .plan import Spec, Task

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common_state/shard_0_1"  # Megatron's ShardedObject("common_state", ..., (1,), (0,)).unique_key
_CHUNK = 256 << 20  # bytes of a tensor that are read, and copied, at a time


# ---- writing ---------------------------------------------------------------------------------------------------------


def items_of(task: Task) -> list[tuple[int, WriteItem]]:
    """(number of the piece, what to write of it); a large piece is cut along its first dimension longer than 1."""
    return [
        (number, _item(piece, spec.dtype, chunk))
        for number, (piece, spec) in enumerate(zip(task.unit.megatron, task.gives, strict=True))
        for chunk in _cut(piece, spec)
    ]


def _cut(piece: Piece, spec: Spec) -> Iterator[ChunkStorageMetadata]:
    dim = next((i for i, size in enumerate(piece.shape) if size > 1), None)
    if dim is None or spec.nbytes <= _CHUNK:
        yield ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))
        return
    size = piece.shape[dim]
    step = max(1, _CHUNK // (spec.nbytes // size))
    for first in range(0, size, step):
        offset, shape = list(piece.offset), list(piece.shape)
        offset[dim] += first
        shape[dim] = min(step, size - first)
        yield ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))


def _item(piece: Piece, dtype: torch.dtype, chunk: ChunkStorageMetadata) -> WriteItem:
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(piece.whole))
    return WriteItem(MetadataIndex(piece.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _Planner(SavePlanner):
    """Gives the writer each item's data when it is written, and not before."""

    def __init__(self, items: list[WriteItem], resolve: Callable[[WriteItem], torch.Tensor | io.BytesIO]) -> None:
        self._items, self._resolve = items, resolve

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """No state dict: the items say all."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self._resolve(write_item)


class _Appending(FileSystem):
    """Lets calls of the writer follow each other in one file."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with open(path, "ab" if mode == "wb" else mode) as stream:
            yield stream


class PartFile:
    """One .distcp file, written item by item.

    FileSystemWriter keeps all tensors of a call until its end: here, each item is a call.

    Args:
        folder: of the checkpoint.
        number: of the file, unique in the folder.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"__{number}_0.distcp"
        self.path.unlink(missing_ok=True)
        self._writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
        self._writer.fs = _Appending()
        self._writer.set_up_storage_writer(True, rank=number, use_collectives=False)  # the number names the file

    def write(self, item: WriteItem, resolve: Callable[[], torch.Tensor | io.BytesIO]) -> list[WriteResult]:
        """Append an item, whose data ``resolve`` gives; the results are for ``finish``."""
        planner = _Planner([item], lambda _: resolve())
        plan = self._writer.prepare_local_plan(planner.create_local_plan())
        results: list[WriteResult] = self._writer.write_data(planner.finish_plan(plan), planner).value()
        return results


def finish(folder: Path, tasks: Sequence[Task], results: list[WriteResult], args: Namespace, number: int) -> None:
    """Write what makes part files a checkpoint: the args as file ``number``, .metadata and metadata.json."""
    # As generate_state_dict and save_checkpoint of megatron/training/checkpointing.py have it for a release.
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    data = io.BytesIO()
    torch.save([common], data)
    item = WriteItem(MetadataIndex(COMMON), WriteItemType.BYTE_IO)
    file = PartFile(folder, number)
    results = [*results, *file.write(item, lambda: data)]
    items = [item for task in tasks for _, item in items_of(task)]
    _, metadata = _Planner([*items, item], lambda _: data).create_global_plan([SavePlan([*items, item])])
    FileSystemWriter(folder).finish(metadata, [results])
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


# ---- reading ---------------------------------------------------------------------------------------------------------


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


class _Boxes(LoadPlanner):
    """Puts what is read into one tensor, or one buffer of bytes."""

    def __init__(self, target: torch.Tensor | None = None) -> None:
        self.target, self.bytes = target, io.BytesIO()

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
        assert self.target is not None
        box = self.target
        for dim, (first, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            box = box.narrow(dim, first, length)
        return box

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: the box is a view of the target."""


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
        found: dict[str, Spec] = {}
        self._chunks: dict[str, tuple[list[int], list[ChunkStorageMetadata], int]] = {}
        for key, what in self._metadata.state_dict_metadata.items():
            if isinstance(what, TensorStorageMetadata):
                found[key] = Spec(tuple(what.size), what.properties.dtype)
        self.tensors = {key: spec for key, spec in found.items() if not _of_optimizer(key)}
        self.optimizer = len(found) - len(self.tensors)
        for key in self.tensors:
            chunks = sorted(self._metadata.state_dict_metadata[key].chunks, key=lambda chunk: tuple(chunk.offsets))
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
        target = torch.empty(piece.shape, dtype=whole.dtype)
        if read != target.numel():
            raise ConvertError(f"{self.folder} holds {read} of {target.numel()} values of tensor {piece.key}")
        try:
            self._reader.read_data(LoadPlan(items), _Boxes(target)).wait()
        except OSError as error:
            raise cannot("read", self.folder, error, piece.key) from error
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            names = sorted({self._metadata.storage_data[item.storage_index].relative_path for item in items})
            reason = str(error).splitlines()[0]
            raise ConvertError(
                f"{self.folder}/{', '.join(names)} is damaged in tensor {piece.key}: {reason}"
            ) from error
        return target

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
            raise ConvertError(f"cannot read the args of {self.folder}: {error}") from error
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


def _load_safely(content: bytes) -> Any:
    """Unpickle plain values and Namespaces; Megatron's own classes only where the args hold some."""
    try:
        with torch.serialization.safe_globals([Namespace, SimpleNamespace, PosixPath, io.BytesIO]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        from megatron.core.safe_globals import SAFE_GLOBALS

        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
