"""How a script of this folder ends after Ctrl-C: in one line, with the status that shells and make know."""

import sys
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[], None], more: str) -> None:
    """main(); Ctrl-C ends it with status 130 and a line that goes on with ``more``, how to go on."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).stem}: stopped; {more}", file=sys.stderr)
        sys.exit(130)
