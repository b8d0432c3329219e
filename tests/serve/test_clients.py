"""lightning-serve survives clients that leave, crowd, or break their connections."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import time
from pathlib import Path

import openai
import pytest

from tests.helpers.serve import COUNT, GREEDY, LIMIT, NAME, PLAIN, SLOTS, VOCAB, WAITING, later, prompts, text_of
from tests.launch import spawn


def test_clients_that_leave_free_their_slots(server, alone):
    """50 leave, in their prompts, while they wait, and in streams; one that stays is served right all the while."""
    long = dict(model=NAME, temperature=1, extra_body={"ignore_eos": True})

    async def leave(client, i: int) -> None:
        size = (1, 60, 100)[i % 3]
        asked = dict(prompt=[5 + i] * size, max_tokens=LIMIT - size, **long)
        if i % 2:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.completions.create(**asked), 0.02 + 0.01 * (i % 7))
        else:
            stream = await client.completions.create(stream=True, **asked)
            async for _ in stream:
                break
            await stream.close()

    async def stay(client, i: int) -> str:
        return (await client.completions.create(prompt=prompts()[i], max_tokens=COUNT, **GREEDY)).choices[0].text

    async def run() -> list[str]:
        async with later(server) as client:
            stays = [asyncio.create_task(stay(client, i)) for i in range(4)]
            await asyncio.gather(*(leave(client, i) for i in range(50)))
            stays += [asyncio.create_task(stay(client, i)) for i in range(4, 8)]
            return await asyncio.gather(*stays)

    asyncio.run(run())
    before, free = server.memory(), server.idle()
    begun = free.pop("steps")
    assert free == {"status": "ok", "active": 0, "waiting": 0, "known": 0, "free_slots": SLOTS}
    assert asyncio.run(run()) == [text_of(tokens) for tokens, _ in alone[:8]]
    after = server.idle()
    # 60 here; 560 where the answers that nobody waits for are completed
    steps = after.pop("steps") - begun
    assert steps < 250 and after == free
    assert server.memory() - before < 32 * 1024, "KiB"


def abort(rank: int, world: int, folder: Path, asked: list[list[int]]) -> dict:
    """Ends a request of whose prompt a part was read, one that waits, and one that generates; others go on."""
    from megatron.core.inference.sampling_params import SamplingParams

    from lightning_megatron.inference.engine import KEY, build_engine
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from tests.helpers.generate import Numbers

    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model:
        engine = build_engine(model, Numbers(VOCAB), max_requests=4, max_tokens=64)
        engine.use_coordinator = engine.is_mp_coordinator = False
        futures = {}

        def add(key: str, prompt: list[int]) -> None:
            params = SamplingParams(num_tokens_to_generate=COUNT, top_k=1, termination_id=-1)
            setattr(params, KEY, key)
            futures[key] = engine.add_request(len(futures), prompt, params)

        add("stays", asked[3])
        add("generates", asked[2])
        add("reads", [9] * 110)
        add("waits", [9] * 20)
        engine.step_modern()
        reading = engine.context.chunked_prefill_request_id
        engine._abort(["generates", "reads", "waits"])
        steps = 0
        while engine.has_unfinished_requests():
            engine.step_modern()
            steps += 1
        add("later", asked[11])  # is read in parts, in a slot that was used
        while engine.has_unfinished_requests():
            engine.step_modern()
        counts = {key: future.result().merge().generated_tokens for key, future in futures.items()}
        free = engine.context.mamba_metadata.mamba_state_free_slot_count
        return {"reading": reading, "steps": steps, "free": free, "known": len(engine.requests), "tokens": counts}


def test_requests_end_in_whatever_they_do(checkpoint, alone):
    (found,) = spawn(abort, 1, checkpoint / NAME, prompts())
    tokens = found.pop("tokens")
    assert found == {"reading": 2, "steps": COUNT - 1, "free": 4, "known": 0}
    assert (tokens["stays"], tokens["later"]) == (alone[3][0], alone[11][0])
    assert {key: len(tokens[key]) for key in ("generates", "reads", "waits")} == {
        "generates": 1,
        "reads": 1,
        "waits": 0,
    }


def test_more_requests_than_can_wait(server):
    """As many as fit are taken, and go on; those beyond them are told to come again."""
    full = SLOTS + WAITING

    async def ask(client) -> str:
        try:
            made = await client.completions.create(model=NAME, prompt="w1", max_tokens=8, temperature=0)
        except openai.RateLimitError as error:
            assert error.code == "rate_limit_exceeded" and error.response.headers["retry-after"] == "1"
            return "full"
        return made.choices[0].text

    async def run() -> list[str]:
        long = dict(model=NAME, prompt="w1", max_tokens=LIMIT - 1, extra_body={"ignore_eos": True})
        async with later(server) as client:
            first = []
            while (await asyncio.to_thread(server.held))["known"] < full:
                missing = full - sum(not task.done() for task in first)
                first += [asyncio.create_task(client.completions.create(**long)) for _ in range(missing)]
                await asyncio.sleep(0.01)
            answers = await asyncio.gather(*(ask(client) for _ in range(20)))
            for task in first:
                task.cancel()
            ended = await asyncio.gather(*first, return_exceptions=True)
            assert all(isinstance(x, asyncio.CancelledError) or x.usage.completion_tokens == LIMIT - 1 for x in ended)
            return answers

    answers = asyncio.run(run())
    assert "full" in answers and len(set(answers) - {"full"}) <= 1, answers  # a long one may end meanwhile
    assert server.idle()["free_slots"] == SLOTS


def test_broken_connections(server, client):
    port = int(server.url.rsplit(":", 1)[1])
    for data in (b"", b"\x16\x03\x01\x02\x00", b"GET", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)
    assert client.completions.create(prompt="w1", max_tokens=1, **GREEDY).usage.completion_tokens == 1


@pytest.mark.parametrize("path", ["/v1/nothing", PLAIN])
def test_an_answer_without_its_body_keeps_the_connection(server, path):
    """A body that comes late, of a path or method that needs none, is no part of the next request."""
    place = server.url.removeprefix("http://").split(":")
    with contextlib.closing(http.client.HTTPConnection(place[0], int(place[1]), timeout=30)) as connection:
        for late in (0.3, 0.0):
            connection.putrequest("PUT", path)
            connection.putheader("Content-Length", "5")
            connection.endheaders()
            time.sleep(late)
            connection.send(b"12345")
            answer = connection.getresponse()
            assert answer.status in (404, 405) and json.loads(answer.read())["error"]
        assert not answer.will_close
