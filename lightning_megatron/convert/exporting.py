"""Megatron torch_dist checkpoint -> Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from . import model, shards
from .dist_read import Checkpoint, step_folder
from .errors import ConvertError, cannot
from .folder import local_folder, read_config, small_files
from .importing import BESIDE
from .partial import Partial, check_target, sync
from .plan import Task, fingerprint, plan_export
from .work import PART_BYTES, Memory, Part, split, write_parts

SHARD_BYTES = 5 * 10**9
_CONFIG = "config.json"


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    step: int | None = None,
    like: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    jobs: int = 2,
    part_bytes: int = PART_BYTES,
    say: Callable[[str], None] = print,
) -> None:
    """Make a folder that transformers, SGLang or vLLM load.

    Args:
        source: folder of Megatron's ``--save``, of an import, or of one iteration, in format torch_dist.
        target: new folder; until it is complete it is called TARGET.partial.
        step: iteration to take; the last one by default.
        like: Hugging Face folder to take config.json, tokenizer and other small files from; by default those that an
            import kept in SOURCE/huggingface.
        max_shard_bytes: of a file; a larger tensor has a file of its own.
        overwrite: replace a target that holds a Hugging Face model.
        jobs: threads.
        part_bytes: how much is written between two records for resuming.
        say: told what was done.

    Raises:
        ConvertError: what does not fit, is damaged, or cannot be written, by file and tensor.

    Example:
        >>> export_checkpoint(Path("checkpoints"), Path("ring-mini-tuned"), like=Path("Ring-mini"))  # doctest: +SKIP
    """
    start = time.monotonic()
    source = local_folder(source)
    target = check_target(source, target, overwrite, _is_model)
    checkpoint = Checkpoint(step_folder(source, step))
    beside = _beside(source, checkpoint, like)
    args = checkpoint.common()["args"]
    try:
        _, _, config, units = model.model_of_args(args, read_config(beside / _CONFIG) if beside else None)
    except ValueError as error:
        raise ConvertError(f"{checkpoint.folder}: {error}") from error
    tasks = plan_export(units, checkpoint.tensors, f"{checkpoint.folder} against the model that its args describe")
    outputs = [(named.name, spec) for task in tasks for named, spec in zip(task.unit.hf, task.gives, strict=True)]
    layout = shards.lay_out(outputs, max_shard_bytes)
    parts = split(tasks, part_bytes)
    plan: dict[str, Any] = {
        "export": str(checkpoint.folder),
        "version": __version__,
        "state": checkpoint.state(),
        "config": config,
    }
    plan |= {"part_bytes": part_bytes, "max_shard_bytes": max_shard_bytes, "tensors": fingerprint(outputs)}
    with Partial(target, plan, say, overwrite) as partial:
        _write_parts(checkpoint, partial, shards.Writer(partial.out, layout), parts, jobs, say)
        try:
            _write_rest(partial.out, layout, config, beside)
        except OSError as error:
            raise cannot("write", partial.out, error) from error
        partial.check_unchanged(checkpoint.folder, checkpoint.state)
        partial.commit()
    seconds, written = time.monotonic() - start, sum(task.nbytes for task in tasks)
    if checkpoint.optimizer:
        say(f"left out {checkpoint.optimizer} tensors of the optimizer")
    files = "1 file" if len(layout) == 1 else f"{len(layout)} files"
    say(
        f"exported {len(outputs)} tensors, {written / 1e9:.1f} GB, as {files}, in {seconds:.1f} s "
        f"({written / 1e6 / seconds:.0f} MB/s): {target}"
    )


def _is_model(path: Path) -> bool:
    """Whether a folder holds a Hugging Face model and nothing that looks like more."""
    return (path / _CONFIG).is_file() and all(p.is_file() or p.name.startswith(".") for p in path.iterdir())


def _beside(source: Path, checkpoint: Checkpoint, like: Path | None) -> Path | None:
    """The folder with config.json and tokenizer."""
    if like is not None:
        return local_folder(like)
    kept = [folder / BESIDE for folder in (source, checkpoint.folder.parent)]
    return next((folder for folder in kept if (folder / _CONFIG).exists()), None)


def _write_parts(
    checkpoint: Checkpoint,
    partial: Partial,
    writer: shards.Writer,
    parts: list[Part],
    jobs: int,
    say: Callable[[str], None],
) -> None:
    memory = Memory()

    def write(part: Part, before: Callable[[Task], None]) -> bool:
        for task in part.tasks:
            before(task)
            with memory.hold(task.nbytes):
                tensors = task.unit.to_hf([checkpoint.read(piece) for piece in task.unit.megatron])
                for named, tensor in zip(task.unit.hf, tensors, strict=True):
                    writer.write(named.name, tensor)
                del tensors
        for path in writer.files_of([named.name for task in part.tasks for named in task.unit.hf]):
            try:
                sync(path)
            except OSError as error:
                raise cannot("write", path, error) from error
        return True

    write_parts("export", partial, parts, jobs, write, say)


def _write_rest(out: Path, layout: list[shards.Shard], config: dict[str, Any], beside: Path | None) -> None:
    """Index, config.json and small files."""
    shards.check(out, layout)
    shards.write_index(out, layout)
    for path in small_files(beside) if beside else []:
        shutil.copyfile(path, out / path.name)
    if beside is None or read_config(beside / _CONFIG) != config:  # an equal one is copied byte by byte
        (out / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for path in out.iterdir():
        sync(path)
