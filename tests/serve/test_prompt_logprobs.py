"""What evaluations ask for: an echoed prompt with the log probabilities of its own tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import openai
import pytest
import torch

from tests.helpers.serve import COUNT, GREEDY, NAME, VOCAB, Server, later, prompts, text_of
from tests.launch import spawn


def follow_given(rank: int, world: int, folder: Path, asked: list[list[int]]) -> list[torch.Tensor]:
    """Log probabilities [t - 1, VOCAB] of what follows each token but the last, by one forward pass over a text."""
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint

    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model, torch.inference_mode():
        return [
            model(torch.tensor([text]), torch.arange(len(text))[None], None)[0, :-1, :VOCAB].float().log_softmax(-1)
            for text in asked
        ]


@pytest.fixture(scope="module")
def told(checkpoint, tmp_path_factory):
    """Choices of all prompts at once, some longer than a step; every third without an echo, or without logprobs."""
    folder = tmp_path_factory.mktemp("told")
    for name in (NAME, "tokenizer"):
        (folder / name).symlink_to(checkpoint / name)
    server = Server(folder, "--prompt-logprobs", "--max-requests=4", "--max-tokens=64")

    async def ask(client, i: int, prompt: list[int]):
        asked = dict(echo=i % 3 != 1, logprobs=None if i % 3 == 2 else 2, max_tokens=1 if i % 2 else COUNT)
        made = await client.completions.create(prompt=prompt, seed=1234, **asked, **GREEDY)
        return made.choices[0]

    async def all_at_once():
        async with later(server) as client:
            return await asyncio.gather(*(ask(client, i, prompt) for i, prompt in enumerate(prompts())))

    try:
        yield asyncio.run(all_at_once())
    finally:
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def test_logprobs_are_those_of_a_forward_pass(told, checkpoint, alone):
    texts = [prompt + tokens for prompt, (tokens, _) in zip(prompts(), alone, strict=True)]
    want = spawn(follow_given, 1, checkpoint / NAME, texts)[0]
    for i, (choice, text, logs) in enumerate(zip(told, texts, want, strict=True)):
        prompt, count = prompts()[i], 1 if i % 2 else COUNT
        text, logs, whole = text[: len(prompt) + count], logs[: len(prompt) + count - 1], i % 3 != 1
        assert choice.text == text_of(text if whole else text[len(prompt) :])
        if i % 3 == 2:
            assert choice.logprobs is None
            continue
        begin = 0 if whole else len(prompt)
        made = choice.logprobs
        assert made.tokens == [text_of([token]) for token in text[begin:]]
        assert all(choice.text.startswith(name, at) for at, name in zip(made.text_offset, made.tokens, strict=True))
        values, tops = made.token_logprobs, made.top_logprobs
        if whole:  # the first token follows nothing
            assert values[0] is None and tops[0] is None
            values, tops, begin = values[1:], tops[1:], 1
        logs, following = logs[begin - 1 :], torch.tensor(text[begin:])
        torch.testing.assert_close(
            torch.tensor(values), logs.gather(1, following[:, None])[:, 0], atol=1e-4, rtol=0, msg=str(i)
        )
        for top, row in zip(tops, logs, strict=True):
            torch.testing.assert_close(
                sorted(top.values(), reverse=True), row.topk(2).values.tolist(), atol=1e-4, rtol=0
            )


def test_a_seed_is_refused_where_something_is_drawn(client):
    assert client.completions.create(prompt="w1", max_tokens=1, seed=5, **GREEDY).choices
    with pytest.raises(openai.BadRequestError, match="seed is 5, which this server does not support"):
        client.completions.create(prompt="w1", max_tokens=1, seed=5, model=NAME)
    with pytest.raises(openai.BadRequestError, match="logprobs of an echoed prompt need .*--prompt-logprobs"):
        client.completions.create(prompt="w1", echo=True, logprobs=1, **GREEDY)
