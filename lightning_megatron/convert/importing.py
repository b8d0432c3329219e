"""Hugging Face folder -> Megatron torch_dist checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.units import Unit
from . import dist_write, model
from .dist_read import TRACKER
from .errors import ConvertError, cannot
from .folder import Folder, small_files
from .partial import Partial, check_target, sync
from .plan import Task, fingerprint, plan_import
from .work import PART_BYTES, Memory, Part, split, write_parts

BESIDE = "huggingface"  # folder in the checkpoint for config.json, tokenizer and the like
_OURS = {"release", TRACKER, BESIDE}


def import_checkpoint(
    source: Path,
    target: Path,
    *,
    hybrid_model: bool = False,
    prediction: bool = True,
    overwrite: bool = False,
    jobs: int = 2,
    part_bytes: int = PART_BYTES,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Make a checkpoint that Megatron loads with ``--load TARGET``, at any parallel size.

    Args:
        source: folder with config.json and *.safetensors.
        target: new folder; until it is complete it is called TARGET.partial.
        hybrid_model: for Megatron's HybridModel, in the place of GPTModel.
        prediction: False leaves out layers of multi-token prediction.
        overwrite: replace a target that an import made.
        jobs: threads.
        part_bytes: how much is written between two records for resuming.
        say: told what was done.

    Returns:
        Megatron's flags of the model.

    Raises:
        ConvertError: what does not fit, is damaged, or cannot be written, by file and tensor.

    Example:
        >>> flags = import_checkpoint(Path("Ring-mini-linear-2.0"), Path("ring-mini"))  # doctest: +SKIP
    """
    start = time.monotonic()
    folder = Folder(source)
    target = check_target(folder.path, target, overwrite, lambda path: {p.name for p in path.iterdir()} <= _OURS)
    config_file = folder.path / "config.json"
    try:
        if not prediction:
            model.leave_out_prediction(folder, say)
        flags, args, _, units = model.model_of_config(folder.config, hybrid_model)
    except ValueError as error:
        raise ConvertError(f"{config_file}: {str(error).removeprefix('config.json: ')}") from error
    _check_prediction(units, folder)
    tasks = plan_import(units, folder.tensors, f"{folder.path} against its config.json")
    parts = split(tasks, part_bytes)
    plan: dict[str, Any] = {"import": str(folder.path), "version": __version__, "state": folder.state(), "flags": flags}
    plan |= {"part_bytes": part_bytes}
    plan |= {"parts": fingerprint([task.unit.megatron for task in tasks], [task.gives for task in tasks])}
    with Partial(target, plan, say, overwrite) as partial:
        out = partial.out / "release"
        records = _write_parts(folder, out, partial, parts, jobs, say)
        try:
            dist_write.finish(out, tasks, [result for record in records for result in record], args, len(parts))
            beside = partial.out / BESIDE
            beside.mkdir(exist_ok=True)
            for path in small_files(folder.path):
                shutil.copyfile(path, beside / path.name)
            (partial.out / TRACKER).write_text("release")
            for path in [*out.iterdir(), *beside.iterdir(), partial.out / TRACKER]:
                sync(path)
        except OSError as error:
            raise cannot("write", partial.out, error) from error
        partial.check_unchanged(folder.path, folder.state)
        partial.commit()
    _report(say, folder, tasks, target, time.monotonic() - start)
    return flags


def _check_prediction(units: Sequence[Unit], folder: Folder) -> None:
    """Say what to do where all tensors of multi-token prediction are missing, as they may lie in a file of their own,
    and where there are more than config.json says.
    """
    pieces = {unit: [piece.key.startswith("mtp.") for piece in unit.megatron] for unit in units}
    names = [named.name for unit, ahead in pieces.items() if ahead and all(ahead) for named in unit.hf]
    if names and not folder.tensors.keys() & set(names):
        raise ConvertError(
            f"{folder.path / 'config.json'} has multi-token prediction layers (num_nextn_predict_layers), but none of "
            f"their {len(names)} tensors is there, such as {names[-1]}: download the file with them, too (of Ling 2.6 "
            "flash model-mtp-layer.safetensors); or go on without, with --no-prediction"
        )
    known = {named.name for unit in units for named in unit.hf}
    unknown = sorted(name for name in folder.tensors if name.endswith(".eh_proj.weight") and name not in known)
    if unknown:
        raise ConvertError(
            f"{folder.path} has {unknown[0]}, of one multi-token prediction layer more than num_nextn_predict_layers "
            f"of {folder.path / 'config.json'} says ({folder.config.get('num_nextn_predict_layers', 0)}): correct that "
            "field, or move the file with the layer's tensors away"
        )


def _write_parts(
    folder: Folder, out: Path, partial: Partial, parts: list[Part], jobs: int, say: Callable[[str], None]
) -> list[list[Any]]:
    out.mkdir(exist_ok=True)
    memory = Memory()

    def write(part: Part, before: Callable[[Task], None]) -> list[Any]:
        file = dist_write.PartFile(out, part.number)
        results = []
        name = ""
        try:
            for task in part.tasks:
                before(task)
                name = task.unit.hf[0].name if task.unit.hf else ""
                with memory.hold(task.nbytes):
                    results += _write_task(folder, file, task)
            if file.path.exists():
                sync(file.path)
        except OSError as error:
            raise cannot("write", file.path, error, name) from error
        return results

    with dist_write.without_checksums():
        return write_parts("import", partial, parts, jobs, write, say)


def _write_task(folder: Folder, file: dist_write.PartFile, task: Task) -> list[Any]:
    """Convert a unit, and write its pieces."""
    if not task.unit.megatron:
        return []
    inputs = [folder.read(named.name) if named.name in folder.tensors else None for named in task.unit.hf]
    outputs = task.unit.to_megatron(inputs)  # type: ignore[arg-type] # None for a missing optional tensor
    results = []
    for number, item in dist_write.items_of(task):
        piece, data = task.unit.megatron[number], item.tensor_data
        assert data is not None
        box = outputs[number]
        for dim, (first, size) in enumerate(zip(data.chunk.offsets, data.chunk.sizes, strict=True)):
            box = box.narrow(dim, first - piece.offset[dim], size)

        def resolve(box: torch.Tensor = box) -> torch.Tensor:
            return box.contiguous()

        results += file.write(item, resolve)
    return results


def _report(say: Callable[[str], None], folder: Folder, tasks: list[Task], target: Path, seconds: float) -> None:
    left_out = [
        named.name for task in tasks if not task.unit.megatron for named in task.unit.hf if named.name in folder.tensors
    ]
    if scaled := sum(stored.scaled for stored in folder.tensors.values()):
        say(f"dequantized {scaled} fp8 tensors to bf16")
    if left_out:
        say(f"left out {len(left_out)} tensors that Megatron computes, such as {left_out[0]}; export writes them again")
    count, read = len(folder.tensors), sum(stored.nbytes for stored in folder.tensors.values())
    say(
        f"imported {count} tensors, {read / 1e9:.1f} GB, in {seconds:.1f} s ({read / 1e6 / seconds:.0f} MB/s): {target}"
    )
