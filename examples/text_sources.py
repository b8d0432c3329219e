"""Where prepare_data.py's documents come from: files, folders, JSON lines, the standard library.

Every file that is left out, or read as something else than its name says, has a line on the screen.
"""

from __future__ import annotations

import codecs
import collections
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

# Folders of the standard library that are tests, generated tables, or not part of it.
STDLIB_SKIP = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "turtledemo",
}  # fmt: skip
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".txt", ".md", ".rst", ".py", *JSON_LINES)  # what is read in a folder
NOT_JSON = (ValueError, RecursionError)  # of json.loads: no JSON, a number too long for Python, lists nested too deep
MARKS = (  # byte-order marks; that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip


def stdlib_files() -> list[Path]:
    """Sources of the running Python's standard library, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if not STDLIB_SKIP.intersection(path.parts)]


def text_files(sources: Iterable[Path]) -> list[Path]:
    """The given files, and all files with an ending of SUFFIXES in the given folders, sorted, each of them once. Counts
    the others aloud.

    Raises:
        ValueError: a path that does not exist, a folder without such files, or one that cannot be read.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_file():
            files.append(source)
            continue
        if source.exists() and not source.is_dir():
            raise ValueError(f"--text {source} is neither a file nor a folder; write what it holds into a file")
        if not source.is_dir():
            raise ValueError(f"--text {source} does not exist; give a text file, or a folder of such files")
        inside = sorted(_inside(source))
        found = [path for path in inside if path.suffix in SUFFIXES]
        if not found:
            raise ValueError(
                f"--text {source} holds no file ending in {', '.join(SUFFIXES)}; name files of other endings one by one"
            )
        others = collections.Counter(path.suffix or "no ending" for path in inside if path.suffix not in SUFFIXES)
        if others:
            counts = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(5))
            print(f"  left out of {source}: {others.total()} files of other endings ({counts}); name them to read them")
        files += found
    once = {}
    for path in files:
        if (first := once.setdefault(path.resolve(), path)) is not path:
            print(f"  left out: {path}, the same file as {first}")
    return list(once.values())


def _inside(folder: Path) -> Iterator[Path]:
    """All files below a folder. Links to folders are named, not followed: they may lead back."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        for path in (Path(root, name) for name in [*folders, *names]):
            if path.is_file():
                yield path
            elif path.is_symlink():
                print(f"  left out: {path} is a link to {'a folder' if path.is_dir() else 'nothing'}")


def read_text(path: Path) -> str | None:
    """The text of a file without its byte-order mark; None, and a line that says why, where it cannot be decoded.

    Raises:
        ValueError: a file that cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    mark, encoding = next((pair for pair in MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        print(f"  left out: {path} is not {encoding.upper()} (byte {error.start + len(mark)})")
        return None
    if text.count("\0") > len(text) // 4:  # English in UTF-16 has one beside every letter, which UTF-8 reads, too
        print(
            f"  left out: {path} is U+0000 every few characters, as UTF-16 without a byte-order mark; save it as UTF-8"
        )
        return None
    if encoding != "utf-8":
        print(f"  decoded as {encoding.upper()}, by its byte-order mark: {path}")
    return text


def json_objects(text: str) -> dict[int, dict] | None:
    """Line number -> object, if all lines are JSON objects or blank, and one of them is an object; else None."""
    objects = {}
    if text.lstrip()[:1] == "{":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except NOT_JSON:
                    return None
                if not isinstance(value, dict):
                    return None
                objects[number] = value
    return objects or None


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except NOT_JSON:
        return False
    return True


def read_json_lines(path: Path, text: str) -> Iterator[str]:
    """The "text" of every line that is not blank.

    Raises:
        ValueError: a line that is no JSON object with a string as "text", named by file and line.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (*NOT_JSON, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number} is no JSON object with a "text": {error!r}') from error
        if not isinstance(document, str):
            raise ValueError(f'{path}, line {number}: "text" is {json.dumps(document)[:80]}, but must be a string')
        try:
            document.encode()
        except UnicodeEncodeError as error:
            half = document[error.start]
            raise ValueError(f'{path}, line {number}: "text" holds {half!a}, half of a surrogate pair') from error
        yield document


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents of the files, newlines as they are. What is left out, or read by its content, is named.

    Raises:
        ValueError: a file that cannot be read, a line without a "text", or one JSON value in place of JSON lines.
    """
    for path in files:
        text = read_text(path)
        if text is None:
            continue
        if path.suffix in JSON_LINES:
            yield from read_json_lines(path, text)
        elif (objects := json_objects(text)) and any("text" in value for value in objects.values()):
            print(f"  read as JSON lines, because every line is an object: {path}")
            yield from read_json_lines(path, text)
        elif path.suffix == ".json" and is_json(text):
            raise ValueError(f'{path} is JSON, but not JSON lines: write one object with a "text" on every line')
        else:
            if objects:
                print(f'  read as plain text: {path} looks like JSON lines, but no line has a "text"')
            yield text
