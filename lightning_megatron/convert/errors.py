"""What went wrong, for users: the message alone tells what was given, what is allowed, and what to do."""

from __future__ import annotations

import errno
from pathlib import Path


class ConvertError(Exception):
    """A conversion that failed; the command line tool ends with ``status``."""

    status = 1


class UsageError(ConvertError):
    """A conversion that was asked for wrongly."""

    status = 2


def cannot(action: str, path: Path | str, error: OSError, tensor: str | None = None) -> ConvertError:
    """The error of a file operation that failed; ``action`` such as "write"."""
    what = f"tensor {tensor} of {path}" if tensor else f"{path}"
    remedy = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "; free some space, and run the same command again: it goes on where it stopped"
    return ConvertError(f"cannot {action} {what}: {error.strerror or error}{remedy}")
