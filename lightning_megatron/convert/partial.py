"""TARGET.partial, where a conversion writes until it is complete, and which the next run goes on with.

TARGET.partial/plan.json      what is converted into what: source with sizes and times, options, parts
TARGET.partial/lock           held by the run that writes
TARGET.partial/done/00012     record of a finished part
TARGET.partial/out/           becomes TARGET when all parts are there
TARGET.partial/old/           TARGET that --overwrite replaces, between two renames
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from .errors import ConvertError, UsageError, cannot, refuse_remote

_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)


def check_target(source: Path, target: Path, overwrite: bool, ours: Callable[[Path], bool]) -> Path:
    """Where to write, absolute and without links.

    Args:
        ours: whether a folder is what this command writes, so that ``overwrite`` may replace it.

    Raises:
        UsageError: the target is there already, is not local, or source and target hold each other.
    """
    refuse_remote(target)
    target, source = target.resolve(), source.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise UsageError(f"the target {target} and the source {source} hold each other; choose a target elsewhere")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            raise UsageError(f"{target} is there already; choose another target, or replace it with --overwrite")
        if not (target.is_dir() and ours(target)):
            raise UsageError(f"--overwrite would remove {target}, which holds other files than this command writes")
    return target


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writing(path: Path) -> None:
    """Let the system bring what was written to the disk from now on, not only at ``sync``: the disk is never idle.

    A hint, of Linux's C library; Python has no name for it.
    """
    if _SYNC_FILE_RANGE is not None:
        descriptor = os.open(path, os.O_RDONLY)
        _SYNC_FILE_RANGE(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), 2)  # all of the file, SYNC_FILE_RANGE_WRITE
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


class Partial:
    """The partial folder of one run; a context manager that holds its lock.

    Args:
        target: complete path of what will be there in the end, from ``check_target``.
        plan: plain values that decide the bytes of every part; parts of another plan are thrown away.
        say: told what the user should know.
        overwrite: the target may be replaced.

    Raises:
        ConvertError: the folder cannot be made, another run holds it, or it is not of a conversion.
    """

    def __init__(self, target: Path, plan: dict[str, Any], say: Callable[[str], None], overwrite: bool) -> None:
        self.target, self.overwrite, self._state = target, overwrite, plan.get("state")
        self.path = target.with_name(target.name + ".partial")
        self.out, self._old, self._done = (self.path / name for name in ("out", "old", "done"))
        self._lock: IO[str] | None = None
        try:
            self._open(json.dumps(plan, sort_keys=True), say)
        except OSError as error:
            self._unlock()
            raise cannot("write", self.path, error) from error
        except ConvertError:
            self._unlock()
            raise

    def _open(self, plan: str, say: Callable[[str], None]) -> None:
        plan_file = self.path / "plan.json"
        if self.path.exists() and not (self.path / "lock").exists() and any(self.path.iterdir()):
            raise UsageError(f"{self.path} is not of a conversion; move it away, or choose another target")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConvertError(f"another run writes {self.path}; wait for it, or choose another target") from None
        if self._old.exists() and not self.target.exists():  # a run that was killed between two renames
            self._old.rename(self.target)
        before = plan_file.read_text("utf-8") if plan_file.exists() else None
        if before != plan or not self.out.is_dir():
            if before not in (None, plan):
                say(f"{self.path} is of another source, version or options: starting from the beginning")
            for path in (self.out, self._done):
                shutil.rmtree(path, ignore_errors=True)
            plan_file.unlink(missing_ok=True)
            self.out.mkdir()
            self._done.mkdir()
            write_file(plan_file, plan.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def record(self, part: int) -> Any | None:
        """What ``finish`` was told of a part, None if it must be written."""
        with contextlib.suppress(FileNotFoundError):
            return pickle.loads((self._done / f"{part:05d}").read_bytes())
        return None

    def finish(self, part: int, record: Any) -> None:
        """Remember that all bytes of a part are on the disk."""
        path = self._done / f"{part:05d}"
        try:
            write_file(path, pickle.dumps(record))
        except OSError as error:
            raise cannot("write", path, error) from error

    def check_space(self, nbytes: int) -> None:
        """Refuse to start what cannot end.

        Raises:
            ConvertError: the disk has less free space than so many bytes.
        """
        free = shutil.disk_usage(self.path).free
        if free < nbytes:
            raise ConvertError(
                f"{self.path} needs {nbytes / 1e9:.3f} GB more, but its disk has {free / 1e9:.3f} GB free; free some "
                "space, or choose another target"
            )

    def check_unchanged(self, source: Path, state: Callable[[], Any]) -> None:
        """Refuse what was read while somebody wrote it: parts may be of two versions.

        Args:
            state: what ``plan["state"]`` of this run was made by.

        Raises:
            ConvertError: it gives something else now.
        """
        try:
            same = state() == self._state
        except OSError:
            same = False
        if not same:
            raise ConvertError(
                f"{source} has changed while it was read, so nothing is put in place; wait until it is complete, and "
                "run the same command again"
            )

    def commit(self) -> None:
        """Put the result in place of the target, which is replaced only now.

        Raises:
            ConvertError: the disk does not take it; or somebody else has made the target since ``check_target``.
        """
        try:
            for path in sorted(self.out.rglob("*"), reverse=True):
                if path.is_dir():
                    sync(path)
            sync(self.out)
            shutil.rmtree(self._old, ignore_errors=True)
            if self.target.exists() and not (self.target.is_dir() and not any(self.target.iterdir())):
                if not self.overwrite:
                    raise ConvertError(
                        f"{self.target} has come from elsewhere while this run wrote {self.path}, which is complete: "
                        "move one of them away, and run the same command again; or replace the target with --overwrite"
                    )
                self.target.rename(self._old)
            self.out.rename(self.target)
            sync(self.target.parent)
            shutil.rmtree(self.path)
        except OSError as error:
            raise cannot("put in place", self.target, error) from error
