"""lightning-serve: OpenAI's client gets what the model says alone."""

from __future__ import annotations

import asyncio
import math
import os
import signal

import openai
import pytest
import torch

from tests.helpers.generate import DEVICES, LOCAL, decided, logits_of
from tests.helpers.serve import (
    COUNT,
    GREEDY,
    LIMIT,
    NAME,
    VOCAB,
    WORDS,
    Server,
    later,
    prompts,
    save_served,
    text_of,
    tokens_of,
)
from tests.tolerances import LOGITS


def test_requests_at_once_get_what_each_gets_alone(server, alone):
    """More than have slots, of lengths below, at and above a step's tokens; half of them as streams."""

    async def ask(client, i: int, prompt: list[int]) -> str:
        if i % 2:
            made = await client.completions.create(prompt=prompt, max_tokens=COUNT, stream=True, **GREEDY)
            return "".join([part.choices[0].text async for part in made])
        made = await client.completions.create(prompt=prompt, max_tokens=COUNT, **GREEDY)
        assert made.choices[0].finish_reason == "length"
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(prompt), COUNT)
        return made.choices[0].text

    async def all_at_once() -> list[str]:
        async with later(server) as client:
            return await asyncio.gather(*(ask(client, i, prompt) for i, prompt in enumerate(prompts())))

    assert asyncio.run(all_at_once()) == [text_of(tokens) for tokens, _ in alone]
    assert len({token for tokens, _ in alone for token in tokens}) > 20


def test_completions(client, alone):
    asked = prompts()
    made = client.completions.create(prompt=asked[:3], n=2, echo=True, max_tokens=COUNT, **GREEDY)
    want = [text_of(prompt + tokens) for prompt, (tokens, _) in zip(asked[:3], alone, strict=False) for _ in range(2)]
    assert [choice.text for choice in made.choices] == want and [choice.index for choice in made.choices] == [*range(6)]
    assert made.usage.prompt_tokens == sum(map(len, asked[:3])) and made.usage.completion_tokens == 6 * COUNT
    words = " ".join(WORDS[token - 4] for token in asked[4])
    assert client.completions.create(prompt=words, max_tokens=COUNT, **GREEDY).choices[0].text == text_of(alone[4][0])
    assert client.models.list().data[0].id == client.models.retrieve(NAME).id == NAME


@pytest.mark.parametrize("prompt", [3, 12])  # the second is longer than a step
def test_logprobs(prompt, client, alone):
    ask = dict(prompt=prompts()[prompt], max_tokens=COUNT, **GREEDY)
    made = client.completions.create(logprobs=3, **ask).choices[0].logprobs
    tokens, logs = alone[prompt]
    assert made.tokens == [text_of([token]) for token in tokens]
    torch.testing.assert_close(made.token_logprobs, logs, atol=1e-4, rtol=0)
    for name, value, top in zip(made.tokens, made.token_logprobs, made.top_logprobs, strict=True):
        assert len(top) == 3 and top[name] == max(top.values()) == value
    # a stop word ends tokens and logprobs alike
    stop = client.completions.create(logprobs=0, stop=text_of(tokens[4:5]), **ask).choices[0]
    assert len(stop.logprobs.tokens) == 1 + tokens.index(tokens[4]) and stop.finish_reason == "stop"


def test_stop_words_end_answers_before_them(client, alone):
    tokens = alone[6][0]
    for stop in (text_of(tokens[5:7]), text_of(tokens[3:5])[1:-1], ["none", text_of(tokens[2:3])]):
        word = stop if isinstance(stop, str) else stop[1]
        want = text_of(tokens).partition(word)[0]
        asked = dict(prompt=prompts()[6], max_tokens=COUNT, stop=stop, **GREEDY)
        made = client.completions.create(**asked).choices[0]
        assert (made.text, made.finish_reason) == (want, "stop")
        parts = list(client.completions.create(stream=True, **asked))
        assert "".join(part.choices[0].text for part in parts) == want
        assert parts[-1].choices[0].finish_reason == "stop"


def test_chat(client):
    """The template's text, as a completion, has the same answer; then as a stream."""
    messages = [
        {"role": "user", "content": "w3 w44"},
        {"role": "assistant", "content": [{"type": "text", "text": "w5"}]},
    ]
    text = "<|im_start|> user w3 w44 <|im_end|> <|im_start|> assistant w5 <|im_end|> <|im_start|> user"
    plain = client.completions.create(prompt=text, max_tokens=COUNT, **GREEDY)
    made = client.chat.completions.create(messages=messages, max_completion_tokens=COUNT, **GREEDY)
    assert made.choices[0].message.content == plain.choices[0].text and made.choices[0].message.role == "assistant"
    assert made.usage == plain.usage
    parts = list(
        client.chat.completions.create(
            messages=messages, max_tokens=COUNT, n=2, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert parts[-1].usage.completion_tokens == 2 * COUNT and parts[-1].choices == []
    for index in range(2):
        mine = [part.choices[0] for part in parts[:-1] if part.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == "length"
        assert "".join(part.delta.content or "" for part in mine) == plain.choices[0].text
    whole = client.chat.completions.create(messages=messages[:1], model=NAME, logprobs=True, top_logprobs=2)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens <= LIMIT and len(content[0].top_logprobs) == 2
    assert math.isclose(content[0].logprob, client.chat.completions.create(
        messages=messages[:1], max_tokens=1, logprobs=True, top_logprobs=20, **GREEDY
    ).choices[0].logprobs.content[0].logprob, abs_tol=9)  # fmt: skip


def test_padded_rows_are_never_drawn(client):
    """Of 256 rows 6 are no tokens: hot answers of 760 tokens would hold about 18 of them."""
    made = client.completions.create(
        prompt="w1", n=6, max_tokens=LIMIT - 1, temperature=2, logprobs=0, model=NAME, extra_body={"ignore_eos": True}
    )
    tokens = [token for choice in made.choices for token in choice.logprobs.tokens]
    assert len(tokens) == 6 * (LIMIT - 1) and "" not in tokens and len(set(tokens)) > 150


@pytest.mark.parametrize("gpus", DEVICES)
def test_in_bf16(gpus, tmp_path):
    """Requests at once, half of them as streams, have tokens of passes without caches; on a GPU from CUDA graphs."""
    save_served(tmp_path, "--bf16", *LOCAL, gpus=gpus)
    made = Server(tmp_path, *LOCAL, "--max-requests=4", *["--cuda-graphs=3"] * gpus, gpus=gpus)

    async def ask(client, i: int, prompt: list[int]) -> list[str]:
        asked = dict(prompt=prompt, max_tokens=COUNT, logprobs=None if i % 2 else 0, **GREEDY)
        if i % 2:
            return [part.choices[0].text async for part in await client.completions.create(stream=True, **asked)]
        return (await client.completions.create(**asked)).choices[0].logprobs.tokens

    async def all_at_once() -> list[list[str]]:
        async with later(made) as client:
            found = await asyncio.gather(*(ask(client, i, prompt) for i, prompt in enumerate(prompts())))
            chat = await client.chat.completions.create(
                messages=[{"role": "user", "content": "w3"}], max_tokens=COUNT, **GREEDY
            )
            assert chat.usage.completion_tokens == COUNT
            with pytest.raises(openai.BadRequestError, match="maximum context length is 128 tokens"):
                await client.completions.create(prompt=[5] * 128, **GREEDY)
            return found

    try:
        texts = ["".join(parts) for parts in asyncio.run(all_at_once())]
        assert ("no GPU, so it runs on the CPU" in made.log.read_text()) != gpus
        assert made.idle()["known"] == 0
        made.process.send_signal(signal.SIGINT)
        assert made.process.wait(30) == 0, made.log.read_text()
    finally:
        if made.process.poll() is None:
            os.killpg(made.process.pid, signal.SIGKILL)
    answers = [tokens_of(text) for text in texts]
    assert [len(answer) for answer in answers] == [COUNT] * len(prompts())
    every = logits_of(tmp_path / NAME, [p + a for p, a in zip(prompts(), answers, strict=True)], gpus, VOCAB)
    right = [
        decided(logits, prompt, answer, 2 * LOGITS[torch.bfloat16])
        for logits, prompt, answer in zip(every, prompts(), answers, strict=True)
    ]
    assert sum(right) >= 0.8 * COUNT * len(answers), right
