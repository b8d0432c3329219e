"""Compares every tensor of a Hugging Face folder with those of a Megatron checkpoint, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .dist_read import Checkpoint
from .folder import Folder
from .plan import Task
from .work import Memory, Part, Progress, run_parts, split

Row = dict[str, Any]  # name, shape, dtype, megatron, megatron_dtype, status, difference, relative, finite
_PART_BYTES = 64 << 20
_WORST = 5


def compare_tensors(
    folder: Folder, checkpoint: Checkpoint, tasks: Sequence[Task], tolerance: float, jobs: int
) -> list[Row]:
    """A row for every tensor of the model, by name.

    ``status`` is "same" (all values, whatever the dtypes), "close" (differs by at most ``tolerance`` times the largest
    value), "different", or "absent" for an optional tensor that the folder does not hold; ``finite`` is whether
    neither side has NaN or infinity.

    Args:
        tasks: of an export of the checkpoint.
        jobs: threads.
    """
    parts = split(tasks, _PART_BYTES)
    found: list[list[Row]] = [[] for _ in parts]
    memory = Memory()

    def compare(part: Part, before: Callable[[Task], None]) -> None:
        for task in part.tasks:
            before(task)
            with memory.hold(4 * task.nbytes):  # both, and their difference
                found[part.number] += _rows(folder, checkpoint, task, tolerance)

    run_parts(parts, jobs, compare, Progress("compare", sum(part.nbytes for part in parts)))
    return sorted((row for rows in found for row in rows), key=lambda row: str(row["name"]))


def _rows(folder: Folder, checkpoint: Checkpoint, task: Task, tolerance: float) -> list[Row]:
    unit = task.unit
    tensors = unit.to_hf([checkpoint.read(piece) for piece in unit.megatron])
    rows = []
    for named, ours in zip(unit.hf, tensors, strict=True):
        row: Row = {
            "name": named.name,
            "shape": list(named.shape),
            "dtype": None,
            "megatron": [piece.key for piece in unit.megatron] or "computed",
            "megatron_dtype": _name(ours.dtype),
            "status": "absent",
            "difference": None,
            "relative": None,
            "finite": bool(ours.isfinite().all()),
        }
        if named.name in folder.tensors:
            theirs = folder.read(named.name)
            difference, relative = differences(ours, theirs)
            status = "same" if difference == 0 else "close" if relative <= tolerance else "different"
            row |= {"dtype": _name(theirs.dtype), "status": status, "difference": difference, "relative": relative}
            row["finite"] = row["finite"] and bool(theirs.isfinite().all())
        rows.append(row)
    return rows


def differences(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and that difference by the largest value of ``theirs``; NaN where only one is NaN."""
    if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
        return 0.0, 0.0
    a, b = ours.double(), theirs.double()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities, too
    if bool(same.all()):
        return 0.0, 0.0
    difference = float((a - b).masked_fill(same, 0).abs().max())
    largest = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
    return difference, difference / largest if largest else math.inf if difference == difference else difference


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts by status, the largest differences, and the rows that differ most."""
    counts = {
        status: sum(row["status"] == status for row in rows) for status in ("same", "close", "different", "absent")
    }
    differing = [row for row in rows if row["status"] in ("close", "different")]
    worst = sorted(differing, key=lambda row: (row["relative"] == row["relative"], -row["relative"]))  # NaN first
    other = sorted({f"{row['megatron_dtype']} for {row['dtype']}" for row in rows if row["dtype"]} - _equal(rows))
    return {
        "compared": len(rows) - counts["absent"],
        **counts,
        "largest_difference": worst[0]["difference"] if worst else 0.0,
        "largest_relative_difference": worst[0]["relative"] if worst else 0.0,
        "worst": [
            {key: row[key] for key in ("name", "shape", "status", "difference", "relative")} for row in worst[:_WORST]
        ],
        "other_dtypes": other,
        "not_finite": [row["name"] for row in rows if not row["finite"]],
    }


def _equal(rows: Sequence[Row]) -> set[str]:
    return {f"{row['dtype']} for {row['dtype']}" for row in rows}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
