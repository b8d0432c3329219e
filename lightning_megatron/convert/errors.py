"""What went wrong, for users: the message alone tells what was given, what is allowed, and what to do."""

from __future__ import annotations

import errno
import re
from pathlib import Path


class ConvertError(Exception):
    """A conversion that failed; the command line tool ends with ``status``."""

    status = 1


class UsageError(ConvertError):
    """A conversion that was asked for wrongly."""

    status = 2


def refuse_remote(path: Path | str) -> None:
    """Refuse a URL, which would be taken for a folder named ``s3:``.

    Raises:
        UsageError: it is one, or nothing at all.
    """
    if not str(path):
        raise UsageError("a path is empty; an empty variable of the shell?")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):
        raise UsageError(
            f"{path}: only local folders are taken: download a model first, for example with `hf download ORG/NAME "
            "--local-dir FOLDER`, and upload what was written afterwards"
        )


def cannot(action: str, path: Path | str, error: OSError, tensor: str | None = None) -> ConvertError:
    """The error of a file operation that failed; ``action`` such as "write"."""
    what = f"tensor {tensor} of {path}" if tensor else f"{path}"
    remedy = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "; free some space, and run the same command again: it goes on where it stopped"
    if error.errno == errno.EFBIG:
        remedy = "; allow larger files (ulimit -f), and run the same command again: it goes on where it stopped"
    return ConvertError(f"cannot {action} {what}: {error.strerror or error}{remedy}")
