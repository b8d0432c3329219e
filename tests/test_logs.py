"""Lines of level INFO, the map of layers among them, are there whatever set up the log before Megatron."""

import subprocess
import sys

import pytest

# As absl.logging does at its first line, which emerging-optimizers writes while it is imported.
PROGRAM = """
import logging, sys
{before}
import megatron.training
from lightning_megatron.logs import restore_settings
restore_settings({level})
root = logging.getLogger()
print("found", [type(x).__name__ for x in root.handlers], root.level)
"""


def settings(before: str, level: int | None = None) -> str:
    program = PROGRAM.format(before=before, level=level)
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    return next(line for line in ended.stdout.splitlines() if line.startswith("found"))


@pytest.mark.parametrize(
    "before, level, wanted",
    [
        ("import absl.logging; absl.logging.debug('')", None, "found ['CustomHandler'] 20"),
        ("import absl.logging; absl.logging.debug('')", 40, "found ['CustomHandler'] 40"),
        (
            "import absl.logging; logging.basicConfig(level=logging.ERROR)", None, "found ['StreamHandler'] 40",
        ),
    ],
    ids=["absl", "absl, --logging-level", "somebody's own"],
)  # fmt: skip
def test_settings(before, level, wanted):
    pytest.importorskip("absl.logging")
    assert settings(before, level) == wanted
