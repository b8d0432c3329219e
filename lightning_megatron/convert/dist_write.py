"""Writes Megatron's torch_dist checkpoints; the format is in ``dist_read``."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ..models.hybrid import pattern_of
from ..models.units import Piece
from .dist_read import COMMON
from .partial import start_writing
from .plan import Spec, Task

_CHUNK = 24 << 20  # bytes that are copied, and read by an export, at a time; cli keeps blocks below 32 MB for reuse


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
            yield cast(io.IOBase, stream)


@contextmanager
def without_checksums() -> Iterator[None]:
    """torch.save without the checksums of its records, which nothing reads and which take a third of an import."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


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
        return self.write_all([item], resolve)

    def write_all(self, items: list[WriteItem], resolve: Callable[[], torch.Tensor | io.BytesIO]) -> list[WriteResult]:
        """Append items that all have the same data.

        Raises:
            OSError: the disk does not take them.
        """
        planner = _Planner(items, lambda _: resolve())
        plan = self._writer.prepare_local_plan(planner.create_local_plan())
        try:
            results: list[WriteResult] = self._writer.write_data(planner.finish_plan(plan), planner).value()
        except RuntimeError as error:  # of closing the archive, when writing a tensor had failed in its middle
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        start_writing(self.path)
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
    data, nothing = io.BytesIO(), io.BytesIO()
    torch.save([common], data)
    torch.save([None], nothing)
    item = WriteItem(MetadataIndex(COMMON), WriteItemType.BYTE_IO)
    states = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in extra_states(tasks, args)]
    file = PartFile(folder, number)
    results = [*results, *file.write(item, lambda: data)]
    results += file.write_all(states, lambda: nothing) if states else []
    items = [item, *states, *(item for task in tasks for _, item in items_of(task))]
    _, metadata = _Planner(items, lambda _: data).create_global_plan([SavePlan(items)])
    FileSystemWriter(folder).finish(metadata, [results])
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def extra_states(tasks: Sequence[Task], args: Namespace) -> list[str]:
    """Keys of the extra states that Megatron's layers look for, and that hold nothing without fp8.

    Local layers have one for each projection, TransformerEngine's also for norms and the core of softmax attention;
    HybridModel has one for its output layer, tied or not, which GPTModel leaves out. What a model does not look for
    stays unread.
    """
    keys: dict[str, None] = {"output_layer._extra_state/shard_0_1": None} if pattern_of(args) else {}
    for task in tasks:
        for piece in task.unit.megatron:
            module, _, name = piece.key.rpartition(".")
            if not name.endswith("weight") or not any(part in module for part in ("linear_", "norm", "eh_proj")):
                continue
            offset, whole = piece.offset[: piece.boxed] or (0,), piece.whole[: piece.boxed] or (1,)
            shard = f"shard_{'.'.join(map(str, offset))}_{'.'.join(map(str, whole))}"
            keys[f"{module}._extra_state/{shard}"] = None
            if module.endswith("self_attention.linear_proj"):
                keys[f"{module.removesuffix('linear_proj')}core_attention._extra_state/{shard}"] = None
    return list(keys)
