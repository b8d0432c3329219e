"""Where scripts of this folder write: asked before the work, not after it."""

import tempfile
from pathlib import Path


def unwritable(out: Path, *, folder: bool) -> str | None:
    """Why nothing can be written to ``out``, which need not exist yet; None if something can.

    Args:
        folder: ``out`` is to be a folder; else a file, which may be there already.
    """
    there = next(path for path in (out, *out.absolute().parents) if (path.exists() if folder else path.is_dir()))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return error.strerror
    return None
