"""Of which code, and when: what a file of measurements says of itself."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path


def output(*command: str) -> str:
    """The first line that a program prints."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def when() -> dict[str, str]:
    """Commit and date."""
    return {
        "commit": output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }
