"""lightning-serve: bodies that are wrong are refused, and say why."""

from __future__ import annotations

import json
import random

import httpx
import openai
import pytest

from lightning_megatron.inference.asked import Asked, Bodies, Refused
from tests.helpers.serve import CHAT, GREEDY, LIMIT, NAME, PLAIN, VOCAB

REFUSED = {  # path, body, status, param, part of the message
    "no-json": (PLAIN, b'{"prompt": "w1"', 400, None, "the body is no JSON"),
    "no-body": (PLAIN, b"", 400, None, "the body is no JSON"),
    "no-utf8": (PLAIN, b'{"prompt": "\xff"}', 400, None, "not UTF-8"),
    "no-object": (PLAIN, [1], 400, None, "must be a JSON object"),
    "deep": (PLAIN, b"[" * 200000, 400, None, "no JSON"),
    "nan": (PLAIN, b'{"prompt": "w1", "temperature": NaN}', 400, None, "NaN is no number"),
    "huge": (PLAIN, b" " * 2**21, 413, None, "more than any prompt that fits"),
    "path": ("/v1/answers", {}, 404, None, "see /v1/completions"),
    "model": (PLAIN, {"prompt": "w1", "model": "gpt"}, 404, "model", f"this server has '{NAME}'"),
    "no-prompt": (PLAIN, {}, 400, "prompt", "prompt is missing"),
    "empty": (PLAIN, {"prompt": ""}, 400, "prompt", "prompt is empty"),
    "blank": (PLAIN, {"prompt": "  "}, 400, "prompt", "has no tokens"),
    "empty-list": (PLAIN, {"prompt": []}, 400, "prompt", "must be a string"),
    "empty-ids": (PLAIN, {"prompt": [[5], []]}, 400, "prompt", "prompt[1] has no tokens"),
    "mixed": (PLAIN, {"prompt": [1, "w1"]}, 400, "prompt", "must be a string"),
    "padded": (PLAIN, {"prompt": [VOCAB]}, 400, "prompt", f"the vocabulary is 0 to {VOCAB - 1}"),
    "negative": (PLAIN, {"prompt": [-1]}, 400, "prompt", "has token -1"),
    "64-bit": (PLAIN, {"prompt": [2**80]}, 400, "prompt", "has token 1208925819614629174706176"),
    "long": (PLAIN, {"prompt": [9] * LIMIT, "max_tokens": 1}, 400, "prompt", f"maximum context length is {LIMIT}"),
    "longer": (PLAIN, {"prompt": [9] * 5000}, 400, "prompt", "the prompt has 5000"),
    "max-tokens": (PLAIN, {"prompt": "w1", "max_tokens": LIMIT}, 400, "prompt", f"{LIMIT} to generate"),
    "no-tokens": (PLAIN, {"prompt": "w1", "max_tokens": 0}, 400, "max_tokens", "at least 1"),
    "minus": (PLAIN, {"prompt": "w1", "max_tokens": -3}, 400, "max_tokens", "at least 1"),
    "fraction": (PLAIN, {"prompt": "w1", "max_tokens": 1.5}, 400, "max_tokens", "a whole number"),
    "hot": (PLAIN, {"prompt": "w1", "temperature": 2.1}, 400, "temperature", "from 0.01 to 2"),
    "cold": (PLAIN, {"prompt": "w1", "temperature": 1e-9}, 400, "temperature", "from 0.01 to 2"),
    "below": (PLAIN, {"prompt": "w1", "temperature": -1}, 400, "temperature", "from 0.01 to 2"),
    "text": (PLAIN, {"prompt": "w1", "temperature": "hot"}, 400, "temperature", '"hot"'),
    "infinite": (PLAIN, b'{"prompt": "w1", "top_p": 1e999}', 400, "top_p", "at most 1"),
    "top-p": (PLAIN, {"prompt": "w1", "top_p": 0}, 400, "top_p", "above 0"),
    "top-k": (PLAIN, {"prompt": "w1", "top_k": VOCAB}, 400, "top_k", "give less"),
    "top-k-p": (PLAIN, {"prompt": "w1", "top_k": 5, "top_p": 0.5}, 400, "top_k", "leave one out"),
    "n": (PLAIN, {"prompt": "w1", "n": 0}, 400, "n", "at least 1"),
    "many": (PLAIN, {"prompt": ["w1"] * 65, "n": 2}, 400, "n", "more than 128"),
    "more-than-wait": (PLAIN, {"prompt": ["w1"] * 65}, 400, "n", "more than the 64 that this server takes at once"),
    "stop": (PLAIN, {"prompt": "w1", "stop": [""]}, 400, "stop", "must be some text"),
    "stop-ids": (PLAIN, {"prompt": "w1", "stop": [5]}, 400, "stop", "must be some text"),
    "logprobs": (PLAIN, {"prompt": "w1", "logprobs": 21}, 400, "logprobs", "at most 20"),
    "echo": (PLAIN, {"prompt": "w1", "logprobs": 1, "echo": True}, 400, "echo", "leave out"),
    "stream": (PLAIN, {"prompt": "w1", "stream": 1}, 400, "stream", "true or false"),
    "stream-logprobs": (PLAIN, {"prompt": "w1", "stream": True, "logprobs": 1}, 400, "logprobs", "not supported"),
    "unknown": (PLAIN, {"prompt": "w1", "tempreature": 1}, 400, "tempreature", "not a field"),
    "best-of": (PLAIN, {"prompt": "w1", "best_of": 3}, 400, "best_of", "does not support"),
    "seed": (PLAIN, {"prompt": "w1", "seed": 1}, 400, "seed", "does not support"),
    "no-messages": (CHAT, {}, 400, "messages", "at least one message"),
    "role": (CHAT, {"messages": [{"role": "god", "content": "w1"}]}, 400, "messages", "system, user, assistant, tool"),
    "content": (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages", "must be text"),
    "image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "be text"),
    "tools": (CHAT, {"messages": [{"role": "user", "content": "w1"}], "tools": [{}]}, 400, "tools", "does not support"),
    "top-logprobs": (
        CHAT,
        {"messages": [{"role": "user", "content": "w1"}], "top_logprobs": 1},
        400,
        "top_logprobs",
        "",
    ),
    "chat-long": (CHAT, {"messages": [{"role": "user", "content": "w1 " * LIMIT}]}, 400, "messages", "maximum context"),
}


def test_what_is_wrong_is_refused(server, client):
    with httpx.Client(base_url=server.url) as http:
        for name, (path, body, status, param, message) in REFUSED.items():
            print(name)  # pytest shows the last one, should the server not answer
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = http.post(path, content=data)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, param), f"{name}: {answer.text}"
            assert message in error["message"] and error["type"] == "invalid_request_error", f"{name}: {answer.text}"
        assert http.get(PLAIN).status_code == 405
    with pytest.raises(openai.NotFoundError, match="this server has"):
        client.completions.create(model="gpt", prompt="w1")
    with pytest.raises(openai.BadRequestError, match="maximum context length") as raised:
        client.completions.create(model=NAME, prompt=[9] * LIMIT, stream=True)
    assert raised.value.code == "context_length_exceeded"
    assert server.held()["active"] == 0, "nothing of it came to the engine"
    assert client.completions.create(prompt=[9] * (LIMIT - 1), max_tokens=1, **GREEDY).usage.total_tokens == LIMIT


def test_what_changes_nothing_is_taken(client):
    made = client.completions.create(
        model=NAME, prompt="w1", max_tokens=2, best_of=1, presence_penalty=0.0, frequency_penalty=0, logit_bias={},
        user="me", suffix=None, top_p=1, n=1, stop=None, stream=False, extra_body={"top_k": 3},
    )  # fmt: skip
    assert made.usage.completion_tokens <= 2


def test_chat_without_a_template_says_what_to_do():
    bodies = Bodies(NAME, VOCAB, LIMIT, lambda text: [1], lambda tokens: "", None)
    with pytest.raises(Refused, match="no chat template: use /v1/completions, or serve .* --sft") as raised:
        bodies.conversation(b'{"messages": [{"role": "user", "content": "w1"}]}')
    assert raised.value.status == 400 and raised.value.body["error"]["code"] == "no_chat_template"


def test_any_body_is_refused_or_is_safe():
    """What passes is within what Megatron's engine takes; anything else is refused, and nothing raises."""
    draw = random.Random(3)
    names = "prompt messages model max_tokens max_completion_tokens temperature top_p top_k n stop stream logprobs"
    names = [*names.split(), *"echo seed top_logprobs stream_options best_of tools ignore_eos x".split()]
    values = [
        None,
        True,
        False,
        0,
        1,
        2,
        7,
        -1,
        10**30,
        0.5,
        1e-300,
        1e300,
        "",
        "w1",
        "\ud800",
        [],
        [1],
        [[1], [2]],
        ["a"],
    ]
    values += [{}, {"include_usage": 1}, {"include_usage": True}, [{"role": "user", "content": "w1"}], [None], [[None]]]

    def tokenize(text) -> list[int]:
        text.encode()
        return [5] * len(text)

    bodies = Bodies("m", VOCAB, LIMIT, tokenize, str, lambda messages: [1, 2])
    passed = 0
    for _ in range(20000):
        body = {name: draw.choice(values) for name in draw.sample(names, draw.randrange(1, 5))}
        body |= {"prompt": "w1", "messages": [{"role": "user", "content": "w1"}]} if draw.random() < 0.3 else {}
        read = draw.choice([bodies.completion, bodies.conversation])
        body.pop("messages" if read == bodies.completion else "prompt", None)
        try:
            asked = read(json.dumps(body).encode())
        except Refused as error:
            json.dumps(error.body)
            continue
        passed += 1
        assert isinstance(asked, Asked) and asked.prompts and all(asked.prompts), body
        assert all(type(x) is int and 0 <= x < VOCAB for prompt in asked.prompts for x in prompt), body
        assert asked.temperature == 0 or 0.01 <= asked.temperature <= 2, body
        assert 0 < asked.top_p <= 1 and 0 <= asked.top_k < VOCAB and not (asked.top_k and asked.top_p < 1), body
        assert all(len(prompt) + (asked.max_tokens or 1) <= LIMIT for prompt in asked.prompts), body
        assert asked.max_tokens is None or asked.max_tokens >= 1, body
        assert 1 <= len(asked.prompts) * asked.n <= 128 and asked.logprobs in (None, *range(21)), body
    assert passed > 300
