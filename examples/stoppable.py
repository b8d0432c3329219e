"""How a script of this folder ends after Ctrl-C or SIGTERM: in one line, with the status that shells and make know."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[], None], more: str) -> None:
    """main(); Ctrl-C ends it with status 130, SIGTERM with 143, and a line that goes on with ``more``, how to go on.

    SIGTERM is an exception like Ctrl-C, so that what is not complete is removed and commands that run are ended, too.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except KeyboardInterrupt as error:
        print(f"\n{Path(sys.argv[0]).stem}: stopped; {more}", file=sys.stderr)
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))
