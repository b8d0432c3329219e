"""Parts of about 1 GB, written by threads that together hold little memory, with progress on the terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .partial import Partial
from .plan import Task

PART_BYTES = 1 << 30
MEMORY = 512 << 20  # bytes of units that threads hold at a time, beside one larger unit
_REPORT_EVERY = 30.0  # seconds, where no terminal shows a bar


class Part(NamedTuple):
    """Tasks that are written, and on resuming written again, together."""

    number: int
    tasks: tuple[Task, ...]

    @property
    def nbytes(self) -> int:
        return sum(task.nbytes for task in self.tasks)


class Stopped(Exception):
    """Another part failed, or the user pressed Ctrl-C."""


def split(tasks: Sequence[Task], nbytes: int) -> list[Part]:
    """Tasks in order, cut where a part has at least so many bytes."""
    parts: list[Part] = []
    current: list[Task] = []
    held = 0
    for task in tasks:
        current.append(task)
        held += task.nbytes
        if held >= nbytes:
            parts.append(Part(len(parts), tuple(current)))
            current, held = [], 0
    return [*parts, Part(len(parts), tuple(current))] if current else parts


class Memory:
    """Bytes that threads may hold at a time: units of at most ``limit`` bytes together, and one that is larger."""

    def __init__(self, limit: int = MEMORY) -> None:
        self._limit = limit
        self._held = 0  # by small units
        self._changed = threading.Condition()
        self._large = threading.Lock()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Wait until so many bytes fit."""
        if nbytes > self._limit:
            with self._large:
                yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._held + nbytes <= self._limit)
            self._held += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, and of its control group where that has a limit."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # no control groups, or those of version 1
        return free
    cached = int(counts.get("active_file", 0)) + int(counts.get("inactive_file", 0))  # of files, given back on demand
    return free if limit == "max" else min(free, max(0, int(limit) - int(used) + cached))


class Progress:
    """A bar on a terminal, else a line now and then; on stderr."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done, self._first = what, total, done, done
        self._start = self._told = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=what, total=total, initial=done, unit="B", unit_scale=True)

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._bar is not None:
                self._bar.update(nbytes)
            elif (now := time.monotonic()) - self._told >= _REPORT_EVERY:
                self._told = now
                speed = (self._done - self._first) / (now - self._start)
                text = f"{self._what}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, {speed / 1e6:.0f} MB/s"
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def write_parts(
    what: str,
    partial: Partial,
    parts: Sequence[Part],
    jobs: int,
    write: Callable[[Part, Callable[[Task], None]], Any],
    say: Callable[[str], None],
) -> list[Any]:
    """Call ``write(part, before)`` for the parts that ``partial`` has no record of, and record what it returns.

    Returns:
        The record of each part, in order, those of an earlier run among them.

    Raises:
        ConvertError: the disk has no room for what is left.
        Exception: the first error of any part; what was recorded by then stays so.
    """
    records = {part.number: partial.record(part.number) for part in parts}
    left = [part for part in parts if records[part.number] is None]
    if len(left) < len(parts):
        say(f"going on: {len(parts) - len(left)} of {len(parts)} parts are in {partial.path}")
    to_write, total = sum(part.nbytes for part in left), sum(part.nbytes for part in parts)
    partial.check_space(to_write)

    def write_and_record(part: Part, before: Callable[[Task], None]) -> None:
        records[part.number] = record = write(part, before)
        partial.finish(part.number, record)

    run_parts(left, jobs, write_and_record, Progress(what, total, total - to_write))
    return [records[part.number] for part in parts]


def run_parts(
    parts: Sequence[Part], jobs: int, write: Callable[[Part, Callable[[Task], None]], None], progress: Progress
) -> None:
    """Call ``write(part, before)`` for all parts, in ``jobs`` threads.

    ``write`` calls ``before(task)`` before each task, which raises ``Stopped`` when the part need not go on, and counts
    the tasks of the part that are finished.

    Raises:
        Exception: the first error of any part; the others have stopped by then.
    """
    stop = threading.Event()

    def start(part: Part) -> None:
        last = 0

        def before(task: Task) -> None:
            nonlocal last
            progress.add(last)
            last = task.nbytes
            if stop.is_set():
                raise Stopped

        if stop.is_set():
            return
        try:
            write(part, before)
        except BaseException:
            stop.set()
            raise
        progress.add(last)

    with ThreadPoolExecutor(jobs, thread_name_prefix="convert") as pool:
        futures = [pool.submit(start, part) for part in parts]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            progress.close()
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
