"""The web endpoints of Megatron 0.19.2 around its engine, on the same model: what docs/inference.md says of them.

They are started as Megatron's own ``MegatronAsyncLLM.serve`` does: the engine's loop in a thread, the coordinator and
the web server in processes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from megatron.core.package_info import __version__

from tests.helpers.serve import CHAT, LIMIT, NAME, PLAIN
from tests.launch import spawn

PATIENCE = 0.5  # seconds, after which a request hangs: then, too, the engine's loop must have ended
NUMBERS = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
ENDING = {  # requests after which the engine's loop has ended, and what lightning-serve answers
    "top_k": ({"prompt": [1, 2, 3], "top_k": 5}, 200),
    "token": ({**NUMBERS, "prompt": [300]}, 400),
    "empty": ({**NUMBERS, "prompt": [[]]}, 400),
    "stop": ({**NUMBERS, "stop": "none"}, 200),
    "echo": ({**NUMBERS, "echo": True, "logprobs": 1}, 400),
}
IGNORED = {  # requests that are answered as without the field, and what lightning-serve answers
    "stream": ({**NUMBERS, "stream": True}, 200),
    "n": ({**NUMBERS, "n": 3}, 200),
    "unknown": ({**NUMBERS, "tempreature": 1}, 400),
    "model": ({**NUMBERS, "model": "gpt"}, 404),
}
REFUSED = {  # requests with status 400, and a part of the text
    "malformed": (b'{"prompt"', "<h1>Bad Request</h1>"),
    "hot": ({**NUMBERS, "temperature": "hot"}, "Invalid sampling parameter: could not convert string to float"),
    "no-prompt": ({**NUMBERS, "prompt": ""}, "Missing 'prompt' field"),
}
LONG = {**NUMBERS, "max_tokens": 10 * LIMIT}
TALK = {"messages": [{"role": "user", "content": "1 2"}], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
ANSWERED = {
    "plain": (PLAIN, NUMBERS),
    **{name: (PLAIN, body) for name, (body, _) in (IGNORED | REFUSED).items()},
    "long": (PLAIN, LONG),
    "chat": (CHAT, TALK),
    "chat-n": (CHAT, {**TALK, "n": 2, "stream": True}),
    "chat-text": (CHAT, {**TALK, "messages": [{"role": "user", "content": "one"}]}),
}
measured = pytest.mark.skipif(not __version__.startswith("0.19.2"), reason="of megatron-core 0.19.2")
Answer = tuple[int, str, str] | None
"""Status, type and text; None for a request that hangs."""


@contextlib.contextmanager
def endpoints(model, tokenizer) -> Iterator[tuple[str, Any]]:
    """Address, and Megatron's object that serves there."""
    from megatron.core.inference.apis.async_llm import MegatronAsyncLLM
    from megatron.core.inference.apis.serve_config import ServeConfig
    from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
    from megatron.core.inference.text_generation_server.dynamic_text_gen_server import stop_text_gen_server

    states = MambaInferenceStateConfig.from_model(model)
    config = InferenceConfig(
        max_sequence_length=LIMIT, max_requests=4, max_tokens=64, buffer_size_gb=0.1, block_size_tokens=32,
        enable_chunked_prefill=True, mamba_inference_state_config=states,
    )  # fmt: skip
    # The coordinator is forked: a process that imports Megatron anew takes as long as all the rest of this test.
    fork = multiprocessing.get_context("fork")
    with mock.patch.object(multiprocessing, "get_context", lambda method: fork):
        llm = MegatronAsyncLLM(model=model, tokenizer=tokenizer, inference_config=config, coordinator_host="127.0.0.1")
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    try:
        asyncio.run(llm.serve(ServeConfig("127.0.0.1", port, frontend_replicas=1), blocking=False))
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", llm
        if llm._loop_manager._thread.is_alive():
            asyncio.run(llm.shutdown())
    finally:
        stop_text_gen_server()
        llm.engine.inference_coordinator_process.kill()


def ask(url: str, path: str, body, limit: float) -> Answer:
    how = dict(content=body) if isinstance(body, bytes) else dict(json=body)
    try:
        answer = httpx.post(url + path, timeout=limit, headers={"Content-Type": "application/json"}, **how)
    except httpx.ReadTimeout:
        return None
    return answer.status_code, answer.headers["Content-Type"], answer.text


def choices(answer: Answer) -> list[dict]:
    assert answer is not None and answer[:2] == (200, "application/json"), answer
    return json.loads(answer[2])["choices"]


def answers(rank: int, world: int, folder: Path) -> tuple[dict[str, Answer], dict[str, tuple]]:
    """To each request of ANSWERED; to each of ENDING and one that follows, and whether the engine's loop goes on."""
    from lightning_megatron.inference.command import build_tokenizer
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint

    multiprocessing.set_start_method("fork", force=True)  # Linux's default, of which Megatron's web server makes use
    saved = read_checkpoint(folder)
    tokenizer = build_tokenizer(saved.args)
    ended, kept = {}, []
    with loaded_model(saved, vocab_size=tokenizer.vocab_size) as model:
        with endpoints(model, tokenizer) as (url, _):
            answered = {name: ask(url, *request, 20) for name, request in ANSWERED.items()}
        for name, (body, _) in ENDING.items():
            with endpoints(model, tokenizer) as (url, llm):
                kept.append(llm)  # its client's socket is open, for whose end garbage collection would wait
                first, loop = ask(url, PLAIN, body, PATIENCE), llm._loop_manager._thread
                loop.join(5)
                ended[name] = (first, ask(url, PLAIN, NUMBERS, PATIENCE), loop.is_alive())
    return answered, ended


@pytest.fixture(scope="module")
def found(checkpoint) -> tuple[dict[str, Answer], dict[str, tuple]]:
    return spawn(answers, 1, checkpoint / NAME)[0]


@measured
@pytest.mark.parametrize("name", ENDING)
def test_the_engines_loop_ends(name, found):
    """This request and the next one, which is a good one, hang."""
    assert found[1][name] == (None, None, False)


@measured
@pytest.mark.parametrize("name", IGNORED)
def test_fields_are_ignored(name, found):
    (want,) = choices(found[0]["plain"])
    (choice,) = choices(found[0][name])
    assert choice == want and len(choice["generation_token_ids"]) == 4


@measured
@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_html_or_text(name, found):
    status, kind, text = found[0][name]
    assert status == 400 and kind.startswith("text/html") and REFUSED[name][1] in text, text


@measured
def test_more_tokens_than_fit(found):
    (choice,) = choices(found[0]["long"])
    assert len(choice["generation_token_ids"]) == LIMIT - 3 and choice["finish_reason"] == "length"


@measured
def test_chat_without_a_template(found):
    """Texts without roles are continued, and `n` counts; what the tokenizer cannot read is an error of the server."""
    assert found[0]["chat-text"][0] == 500
    (choice,), several = choices(found[0]["chat"]), choices(found[0]["chat-n"])
    assert choice["message"]["prompt_token_ids"] == [1, 2] and choice["message"]["content"] and len(several) == 2
    assert {x["message"]["content"] for x in several} == {choice["message"]["content"]}


def test_what_lightning_serve_answers(server):
    """To the same requests, and then it goes on; chat without a template is in test_refusals.py."""
    bodies = ENDING | IGNORED | {name: (body, 400) for name, (body, _) in REFUSED.items()} | {"long": (LONG, 400)}
    for name, (body, want) in bodies.items():
        status, kind, text = ask(server.url, PLAIN, body, 20)
        assert status == want and ("event-stream" in kind) == (name == "stream"), f"{name}: {text}"
        assert status == 200 or json.loads(text)["error"]["message"], f"{name}: {text}"
    assert len(choices(ask(server.url, PLAIN, IGNORED["n"][0], 20))) == 3
