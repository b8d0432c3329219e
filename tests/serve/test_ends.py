"""lightning-serve: what cannot start says why; all ranks end together, also when the engine fails."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import openai
import pytest

from tests.helpers.generate import MOE, PATTERN
from tests.helpers.serve import (
    COUNT,
    GREEDY,
    LIMIT,
    NAME,
    SERVE,
    VOCAB,
    flags,
    follow,
    prompts,
    save_served,
    text_of,
)
from tests.launch import run_pretrain, spawn


def test_what_cannot_start_says_why(checkpoint, server):
    port = server.url.rsplit(":", 1)[1]
    cases = {
        f"cannot listen at 127.0.0.1, port {port}: Address already in use": ("--port", port),
        "--max-requests 0 must be above 0": ("--max-requests", "0"),
        "states of 4096 requests take": ("--max-requests", "4096", "--max-tokens", "4096", "--buffer-gb", "0.01"),
        "--max-sequence-length 100000000000000000000 must be below 2147483648": (
            "--max-sequence-length",
            "1" + 20 * "0",
        ),
        "--buffer-gb nan must be below": ("--buffer-gb", "nan"),
        "--port 99999 must be from 0, for any that is free, to 65535": ("--port", "99999"),
        "states of 1073741824 requests take": ("--max-requests", "1073741824", "--max-tokens", "1073741824"),
        "max_tokens=100 must be a multiple of 64": ("--max-tokens", "100"),
        "no latest_checkpointed_iteration.txt there": ("--load", str(checkpoint)),
        "start it with torchrun --nproc-per-node 2": ("--tensor-model-parallel-size", "2"),
    }
    for message, more in cases.items():
        run = run_pretrain([*flags(checkpoint), *more], module=SERVE, check=False)
        assert not run.ok and message in run.log and "Traceback" not in run.log, f"{more}: {run.log}"


def served(rank: int, world: int, folder: Path, more: list[str], act) -> tuple[int, object]:
    """The command on every rank; ``act(url)`` runs beside it on rank 0, once it is ready. (exit status, its result)."""
    import io
    from contextlib import redirect_stdout

    from lightning_megatron.inference import serve

    out, result = io.StringIO(), []

    def beside() -> None:
        while (found := re.search(r"at (http://\S+)/v1", out.getvalue())) is None:
            time.sleep(0.05)
        try:
            result.append(act(found[1]))
        except Exception as error:
            result.append(repr(error))
            os.kill(os.getpid(), signal.SIGTERM)

    if rank == 0:
        threading.Thread(target=beside, daemon=True).start()
    status = 0
    try:
        with redirect_stdout(out):
            serve.main([*flags(folder), *more])
    except SystemExit as end:
        status = end.code
    return status, result


def ask_two_ranks(url: str) -> list[str]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(prompt="w1", max_tokens=LIMIT - 1, timeout=0.05, **GREEDY)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(prompt=[VOCAB], **GREEDY)
        made = client.completions.create(prompt=prompts()[:6], max_tokens=COUNT, **GREEDY)
    os.kill(os.getpid(), signal.SIGTERM)
    return [choice.text for choice in made.choices]


def test_expert_ranks_serve_as_one(tmp_path):
    """Each reads prompts of its own, by the dispatcher that takes them, which nobody has to name."""
    save_served(tmp_path, *MOE.split())
    ((*alone,),) = spawn(follow, 1, tmp_path / NAME, prompts()[:6])
    more = ["--expert-model-parallel-size", "2", "--max-requests", "4", "--max-tokens", "64"]
    (status, (texts,)), other = spawn(served, 2, tmp_path, more, ask_two_ranks)
    assert texts == [text_of(tokens) for tokens, _ in alone]
    assert status == 0 and other == (0, [])


def test_a_hybrid_model_is_served(tmp_path):
    """On two pipeline stages, of which one has no lightning layer."""
    save_served(tmp_path, *PATTERN.split(), "--group-query-attention", "--num-query-groups", "2")
    ((*alone,),) = spawn(follow, 1, tmp_path / NAME, prompts()[:6])
    stages = ["--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern", "L-L-L|-*-"]
    (status, (texts,)), other = spawn(served, 2, tmp_path, [*stages, "--max-requests", "4"], ask_two_ranks)
    assert texts == [text_of(tokens) for tokens, _ in alone]
    assert status == 0 and other == (0, [])


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_ranks_serve_as_one_and_end_together(checkpoint, alone, parallel):
    more = [f"--{parallel}-model-parallel-size", "2", "--max-requests", "4", "--max-tokens", "64"]
    (status, (texts,)), other = spawn(served, 2, checkpoint, more, ask_two_ranks)
    assert texts == [text_of(tokens) for tokens, _ in alone[:6]]
    assert status == 0 and other == (0, [])


def break_engine(url: str) -> list[str]:
    from lightning_megatron.inference.engine import Engine

    def broken(self):
        raise RuntimeError("broken on purpose")

    Engine.schedule_waiting_requests = broken
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(prompt="w1", **GREEDY)
    return [raised.value.status_code, raised.value.code]


def break_engine_slowly(url: str) -> list[str]:
    """Its thread is alive for a while when its event loop has ended, as on a busy machine."""
    alive = threading.Thread.is_alive
    threading.Thread.is_alive = lambda self: self.name == "engine" or alive(self)
    return break_engine(url)


@pytest.mark.parametrize("fail", [break_engine, break_engine_slowly])
def test_an_engine_that_fails_ends_the_server(checkpoint, fail):
    """The request that is open gets an answer, and the command fails."""
    ((status, (answer,)),) = spawn(served, 1, checkpoint, ["--max-requests", "2"], fail)
    assert status == 1 and answer == [503, "unavailable"]
