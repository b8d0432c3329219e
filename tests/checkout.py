"""Runs pytest against a checkout of Megatron-LM in the place of the installed megatron-core, as make test-main does.

    python -m tests.checkout /path/to/Megatron-LM <arguments of pytest>

Nothing is installed and nothing in the checkout is changed: its folder comes first on PYTHONPATH.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ABOUT = """
import megatron.core, torch
from megatron.core.package_info import __shortversion__
print(megatron.core.__file__, __shortversion__, torch.__version__, sep="\\n")
import megatron.core.datasets.helpers_cpp
"""


def python_path(*folders: Path) -> str:
    """PYTHONPATH of what a test starts: this repository, ``folders``, then what is there, such as another Megatron."""
    return os.pathsep.join(filter(None, [str(ROOT), *map(str, folders), os.environ.get("PYTHONPATH")]))


def environment(checkout: Path) -> dict[str, str]:
    """In which Python finds this repository and Megatron of the checkout, and what it starts finds them, too."""
    return os.environ | {"PYTHONPATH": python_path(checkout)}


def checked(given: str) -> Path:
    """The checkout that was named, in which all that tests need imports.

    Raises:
        SystemExit: with the remedy, on stderr.
    """
    checkout = Path(given).resolve()
    if not (checkout / "megatron" / "core" / "package_info.py").is_file():
        sys.exit(f"MEGATRON={given} holds no megatron/core: name a checkout of Megatron-LM")
    if os.pathsep in str(checkout):
        sys.exit(f"MEGATRON={given} cannot stand in PYTHONPATH, because of its {os.pathsep!r}: rename a folder")
    answer = subprocess.run([sys.executable, "-c", ABOUT], env=environment(checkout), capture_output=True, text=True)
    place, *versions = answer.stdout.splitlines() or [""]
    if place and not Path(place).is_relative_to(checkout):
        sys.exit(f"MEGATRON={given}, but megatron.core is {place}: nothing may come before PYTHONPATH")
    if answer.returncode:
        sys.exit(
            f"{answer.stderr}Megatron of {checkout} does not import (see above). If its megatron/core/datasets has "
            "no compiled helpers_cpp: install the checkout in an environment of its own (VENV=), or copy the file from "
            "the installed wheel, where both have the same helpers.cpp"
        )
    git = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = git.stdout.strip() or "unknown"
    print(f"==> megatron-core {versions[0]} of {checkout}, commit {commit}; torch {versions[1]}", flush=True)
    return checkout


if __name__ == "__main__":
    os.chdir(ROOT)
    command = [sys.executable, "-m", "pytest", *sys.argv[2:]]
    os.execve(sys.executable, command, environment(checked(sys.argv[1])))
