"""Processes that end with the one that started them, also when that is killed and can end nothing itself.

end_with_parent()                                   # in a child, first
subprocess.Popen(mortal("-m", "some.module"))       # python -m some.module, as such a child
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)  # before a fork, after which a child of threads should load nothing


def end_with_parent(sign: int = signal.SIGKILL) -> None:
    """Have Linux send this signal when the thread ends that started this process, and with it any parent that dies.

    A thread that starts a process must therefore wait for its end.
    """
    if _LIBC.prctl(PR_SET_PDEATHSIG, sign, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def mortal(*words: str) -> list[str]:
    """The command ``python *words``, which gets SIGTERM when its parent dies, so that it can end its own children."""
    return [sys.executable, "-W", "ignore", __file__, str(os.getpid()), *words]


def _main(parent: int, words: list[str]) -> None:
    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit("the parent is dead")
    sys.path[0] = os.getcwd()  # as of `python -m`, in place of this file's folder
    assert words[0] == "-m", words
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
