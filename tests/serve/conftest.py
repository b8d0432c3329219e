"""One checkpoint, one server on the CPU and what the model says alone, for all tests of this folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import openai
import pytest

from tests.helpers.serve import NAME, SLOTS, WAITING, Server, follow, prompts, save_served
from tests.launch import spawn


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_served(folder)
    return folder


@pytest.fixture(scope="package")
def server(checkpoint):
    """It ends by SIGINT, soon, with status 0, without a word, and leaves no process."""
    made = Server(checkpoint, f"--max-requests={SLOTS}", "--max-tokens=64", f"--max-waiting={WAITING}")
    try:
        yield made
        assert made.process.poll() is None, made.log.read_text()
        made.process.send_signal(signal.SIGINT)
        assert made.process.wait(20) == 0, made.log.read_text()
        log = made.log.read_text()
        assert "Traceback" not in log and "error" not in log, log
        with pytest.raises(ProcessLookupError):
            os.killpg(made.process.pid, 0)
    finally:
        if made.process.poll() is None:
            os.killpg(made.process.pid, signal.SIGKILL)


@pytest.fixture(scope="package")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="package")
def alone(checkpoint) -> list[tuple[list[int], list[float]]]:
    return spawn(follow, 1, checkpoint / NAME, prompts())[0]
