"""Names for profilers around exchanges, by whichever functions the program marks its ranges with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Mark = Callable[[str], None]
_marks: tuple[Mark, Mark] | None = None  # begin and end of a range


def mark_by(begin: Mark, end: Mark) -> None:
    """Mark ranges by these, such as ``torch.cuda.nvtx``'s; each gets the name. Until then none is marked."""
    global _marks
    _marks = begin, end


@contextlib.contextmanager
def marked(name: str) -> Iterator[None]:
    """A range of this name."""
    marks = _marks
    if marks is None:
        yield
        return
    begin, end = marks
    begin(name)
    try:
        yield
    finally:
        end(name)
