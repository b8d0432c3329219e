"""Each checkpoint, and its run that was never stopped, once for all tests of this folder."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.helpers.checkpoints import SAVED, start


@pytest.fixture(scope="package")
def saved(tmp_path_factory):
    """saved(name): a folder with the checkpoint of that name, after two iterations."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        start(*SAVED[name], save=folder)
        return folder

    return write


@pytest.fixture(scope="package")
def whole():
    """whole(name): all losses of a checkpoint's run. pretrain_gpt.py and other formats give the own entry point's."""
    run = functools.cache(lambda name: start(*SAVED[name]).losses)
    return lambda name: run("own-minimax" if "minimax" in name else "own")
