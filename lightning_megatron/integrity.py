"""Is a checkpoint whole? Every file it needs is there, long enough, and holds the bytes that were written.

``torch.save`` puts a CRC-32 beside everything it writes, and ``torch.load`` does not look at it (torch 2.11): a flipped
bit in a weight loads without a word. ``patches.checkpoint_args`` calls ``verify`` before a checkpoint is loaded, in
both ways of starting; each rank reads its share of the files, which are then in the page cache for the load itself
where they fit. ``--no-lightning-checksums`` leaves this reading out, and names and sizes are still checked.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"  # how files begin that torch.save wrote before 1.6
_CHUNK = 1 << 24  # bytes read at once


class BrokenFile(ValueError):
    """A file of a checkpoint that is missing, too short, or altered; the message names it and the cause."""


def verify(folder: Path, rank: int = 0, world: int = 1, *, contents: bool = True, of_megatron: bool = True) -> None:
    """Check the files of one iteration.

    Args:
        folder: of the iteration, as ``iter_0000100``.
        rank, world: which share of the files to read; what all of them need is read by all.
        contents: also compare checksums, which reads everything.
        of_megatron: written as torch_dist, with a metadata.json, and not as torch_dcp or fsdp_dtensor.

    Raises:
        BrokenFile: naming the file.
    """
    spans = _spans(folder) if is_distributed(folder) else {path: [(0, None)] for path in folder.glob("*/*.pt")}
    if is_distributed(folder) and of_megatron:
        _read(folder / "metadata.json", lambda path: json.loads(path.read_text("utf-8"))["sharded_backend"])
    if not spans:
        raise BrokenFile(f"{folder} holds no weights")
    extra = {path: [(0, None)] for path in (folder / "common.pt",) if path.is_file()}
    for number, (path, parts) in enumerate(sorted((spans | extra).items())):
        size = _read(path, lambda path: path.stat().st_size)
        end = max((start + length for start, length in parts if length is not None), default=0)
        if size < end or not size:
            raise BrokenFile(f"{path} is cut off: it has {size} of {end} bytes" if end else f"{path} is empty")
        if contents and number % world == rank:
            _compare(path, parts)


def is_distributed(folder: Path) -> bool:
    """Whether the folder holds a distributed checkpoint, whole or not; else it is one of ``--ckpt-format torch``."""
    return (folder / "metadata.json").exists() or (folder / ".metadata").exists() or any(folder.glob("*.distcp"))


def format_of(folder: Path) -> str:
    """The ``--ckpt-format`` that saved it. Without metadata.json, .metadata tells: what torch_dist keeps elsewhere is
    among the tensors of the others.
    """
    if not is_distributed(folder):
        return "torch"
    if (folder / "metadata.json").exists() or not (folder / ".metadata").exists():
        return "torch_dist"
    try:
        with open(folder / ".metadata", "rb") as file:
            names = pickle.load(file).state_dict_metadata
    except Exception:  # unpickling altered bytes can raise anything; ``verify`` says so
        return "torch_dist"
    if "checkpoint_version" not in names:
        return "torch_dist"
    return "fsdp_dtensor" if any(name.startswith("model.module.") for name in names) else "torch_dcp"


def _read(path: Path, read: Any) -> Any:
    try:
        return read(path)
    except FileNotFoundError:
        raise BrokenFile(f"{path} is missing") from None
    except Exception as error:  # unpickling altered bytes can raise anything
        raise BrokenFile(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _spans(folder: Path) -> dict[Path, list[tuple[int, int | None]]]:
    """Where in which file the tensors and objects of a checkpoint are, by its ``.metadata``."""

    def storage(path: Path) -> dict:
        with open(path, "rb") as file:
            return pickle.load(file).storage_data  # as torch itself reads it

    found: dict[Path, list[tuple[int, int | None]]] = {}
    for entry in _read(folder / ".metadata", storage).values():
        found.setdefault(folder / entry.relative_path, []).append((entry.offset, entry.length))
    return found


def _compare(path: Path, parts: list[tuple[int, int | None]]) -> None:
    for part in parts:
        try:
            with open(path, "rb") as file:
                view = io.BufferedReader(_View(file, *part), _CHUNK)
                begin = view.peek(4)[:4]
                if part[1] is None and begin[:1] not in (b"P", _PICKLE):
                    raise BrokenFile(f"{path} is altered: torch.save wrote no such file")
                if begin != _ZIP:  # nothing that has checksums: loading will tell
                    continue
                for name in _wrong(view):
                    raise BrokenFile(f"{path} is altered: the checksum of {name} at byte {part[0]} is another")
        except (BrokenFile, OSError) as error:
            raise error if isinstance(error, BrokenFile) else BrokenFile(f"{path} cannot be read ({error})") from error
        except Exception as error:  # reading an altered archive can raise anything
            raise BrokenFile(
                f"{path} is altered: no archive at byte {part[0]} ({type(error).__name__}: {error})"
            ) from error


def _wrong(view: io.BufferedReader) -> Iterator[str]:
    with zipfile.ZipFile(view) as archive:
        if not any(entry.CRC for entry in archive.infolist()):
            return  # written without checksums (torch.serialization.set_crc32_options), as by lightning-convert
        for entry in archive.infolist():
            try:
                with archive.open(entry) as member:
                    while member.read(_CHUNK):
                        pass
            except zipfile.BadZipFile:
                yield entry.filename


class _View(io.RawIOBase):
    """Bytes ``start`` to ``start + length`` of a file, as a file; length None: to its end."""

    def __init__(self, file: io.BufferedReader, start: int, length: int | None) -> None:
        self.file, self.start, self.at = file, start, 0
        self.length = file.seek(0, io.SEEK_END) - start if length is None else length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        read = self.file.readinto(memoryview(buffer)[: max(self.length - self.at, 0)])
        self.at += read
        return read


def complete_iterations(load_dir: Path) -> list[str]:
    """Folders of iterations whose files are all there and long enough, the last one first."""
    whole = []
    for folder in sorted(load_dir.glob("iter_*"), reverse=True):
        try:
            verify(folder, contents=False, of_megatron=format_of(folder) == "torch_dist")
        except BrokenFile:
            continue
        whole.append(folder.name)
    return whole
