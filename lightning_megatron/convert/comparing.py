"""Import and export again, and compare every tensor bit for bit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from . import model
from .errors import ConvertError, cannot
from .exporting import SHARD_BYTES, export_checkpoint
from .folder import Folder, local_folder
from .importing import import_checkpoint
from .work import PART_BYTES

_LISTED = 50


def roundtrip(
    source: Path,
    *,
    work: Path | None = None,
    hybrid_model: bool = False,
    prediction: bool = True,
    max_shard_bytes: int = SHARD_BYTES,
    jobs: int = 2,
    part_bytes: int = PART_BYTES,
    say: Callable[[str], None] = print,
) -> bool:
    """Convert a Hugging Face folder there and back.

    Fp8 weights are compared with their dequantized values. Tensors that were not in the source are named: optional
    ones, which an export always writes.

    Args:
        source: folder with config.json and *.safetensors.
        work: existing folder with space for twice the source; what is written there is removed in the end. By default
            that of the source, and where that is read-only the one for temporary files.
        hybrid_model, prediction, max_shard_bytes, jobs, part_bytes, say: as for import and export.

    Returns:
        Whether all tensors are the same.

    Raises:
        ConvertError: as import and export.
    """
    source = local_folder(source)
    if work is not None:
        work = local_folder(work)
        if source == work or source in work.parents:
            raise ConvertError(f"--work {work} is inside of the source {source}; choose another folder")
    temporary = _temporary(source.parent if work is None else work, given=work is not None)
    try:
        import_checkpoint(
            source,
            temporary / "megatron",
            hybrid_model=hybrid_model,
            prediction=prediction,
            jobs=jobs,
            part_bytes=part_bytes,
            say=say,
        )
        export_checkpoint(
            temporary / "megatron",
            temporary / "huggingface",
            max_shard_bytes=max_shard_bytes,
            jobs=jobs,
            part_bytes=part_bytes,
            say=say,
        )
        before = Folder(source)
        if not prediction:
            model.leave_out_prediction(before, lambda text: None)  # the import has said it
        return compare(before, Folder(temporary / "huggingface"), say)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def compare(before: Folder, after: Folder, say: Callable[[str], None]) -> bool:
    """Whether all tensors of ``before`` are in ``after``, bit for bit; says which are not, and what else differs."""
    wrong = [text for name in before.tensors if (text := _difference(before, after, name))]
    added = sorted(after.tensors.keys() - before.tensors.keys())
    fields = {
        key for key in before.config.keys() | after.config.keys() if before.config.get(key) != after.config.get(key)
    }
    if added:
        say(f"added {len(added)} optional tensors: {', '.join(added[:_LISTED])}{', ...' if added[_LISTED:] else ''}")
    if fields:
        say(f"fields of config.json that differ: {', '.join(sorted(fields))}")
    for text in wrong[:_LISTED]:
        say(text)
    same = len(before.tensors) - len(wrong)
    say(
        f"{same} of {len(before.tensors)} tensors are the same bit for bit"
        + (f", {len(wrong)} differ" if wrong else "")
    )
    return not wrong


def _difference(before: Folder, after: Folder, name: str) -> str | None:
    if name not in after.tensors:
        return f"dropped    {name}"
    old, new = before.tensors[name], after.tensors[name]
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"different  {name}: {old.dtype} {list(old.shape)} became {new.dtype} {list(new.shape)}"
    first, second = (folder.read(name).reshape(-1).view(torch.uint8) for folder in (before, after))
    if torch.equal(first, second):
        return None
    return f"different  {name}: {int((first != second).sum())} of {first.numel()} bytes"


def _temporary(folder: Path, given: bool) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="lightning-convert-", dir=folder))
    except OSError as error:
        if given:
            raise cannot("write", folder, error) from error
        return Path(tempfile.mkdtemp(prefix="lightning-convert-"))
