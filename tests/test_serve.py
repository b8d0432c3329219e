"""lightning-serve: OpenAI's client against a server on the CPU; what it answers, refuses, survives, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_megatron.inference.asked import Asked, Bodies, Refused
from tests.helpers.generate import NUMBERS, SIZE
from tests.launch import ENV, ROOT, run_pretrain, spawn

SERVE = "lightning_megatron.inference.serve"
WORDS = [f"w{i}" for i in range(246)]  # the table has 256 rows
VOCAB = len(WORDS) + 4
LIMIT, SLOTS, WAITING, NAME = 128, 4, 60, "tiny"
MODEL = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --lightning-norm all --lightning-qk-norm --lightning-rope "
    "--lightning-num-kv-heads 2 --lightning-decay minimax"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> user ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    run_pretrain([*SIZE, *NUMBERS.split(), *MODEL.split(), "--save", folder / NAME])
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(["<|im_start|>", "<|im_end|>", "user", "<unk>", *WORDS])},
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
    made.chat_template = CHATML
    made.save_pretrained(folder / "tokenizer")
    return folder


def flags(folder: Path) -> list[str]:
    return [
        *("--load", str(folder / NAME), "--port", "0"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")),
    ]


class Server:
    """The command, as a user starts it."""

    def __init__(self, folder: Path, *more: str):
        command = [sys.executable, "-W", "ignore", "-m", SERVE, *flags(folder), *more]
        self.log = folder / "log"
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **ENV, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while (found := re.search(r"at (http://127\.0\.0\.1:\d+)/v1", self.log.read_text())) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(self.log.read_text())
            time.sleep(0.1)
        self.url = found[1]

    def held(self) -> dict:
        return httpx.get(f"{self.url}/health").json()

    def idle(self, seconds: float = 10.0) -> dict:
        """What is held once nothing generates."""
        deadline = time.monotonic() + seconds
        while self.held()["known"] and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)  # the end of the step
        return self.held()

    def memory(self) -> int:
        """KiB that the process holds."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1])


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def later(server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


GREEDY = dict(model=NAME, temperature=0, extra_body={"ignore_eos": True})
COUNT = 12


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    lengths = [1, 2, 5, 15, 63, 64, 65, 66, 32, 33, 40, 112, 90, 100, 3, 7]
    return [[draw.randrange(4, VOCAB) for _ in range(length)] for length in lengths]


def follow(rank: int, world: int, folder: Path, asked: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """The likeliest tokens after each prompt, by whole forward passes over all tokens, and their log probabilities."""
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint

    found = []
    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model, torch.inference_mode():
        for prompt in asked:
            tokens, logs = list(prompt), []
            for _ in range(COUNT):
                logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, -1, :VOCAB].float()
                tokens.append(int(logits.argmax()))
                logs.append(float(logits.log_softmax(0)[tokens[-1]]))
            found.append((tokens[len(prompt) :], logs))
    return found


@pytest.fixture(scope="module")
def alone(checkpoint) -> list[tuple[list[int], list[float]]]:
    return spawn(follow, 1, checkpoint / NAME, prompts())[0]


def text_of(tokens: list[int]) -> str:
    """As the tokenizer has it: one word a token, and no spaces."""
    return "".join(["<|im_start|>", "<|im_end|>", "user", "<unk>", *WORDS][token] for token in tokens)


# ---- answers ---------------------------------------------------------------------------------------------------------


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


def test_logprobs(client, alone):
    made = client.completions.create(prompt=prompts()[3], max_tokens=COUNT, logprobs=3, **GREEDY).choices[0].logprobs
    tokens, logs = alone[3]
    assert made.tokens == [text_of([token]) for token in tokens]
    torch.testing.assert_close(made.token_logprobs, logs, atol=1e-4, rtol=0)
    for name, value, top in zip(made.tokens, made.token_logprobs, made.top_logprobs, strict=True):
        assert len(top) == 3 and top[name] == max(top.values()) == value
    # a stop word ends tokens and logprobs alike
    stop = client.completions.create(
        prompt=prompts()[3], max_tokens=COUNT, logprobs=0, stop=text_of(tokens[4:5]), **GREEDY
    ).choices[0]
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


# ---- refusals --------------------------------------------------------------------------------------------------------

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
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


# ---- clients that misbehave ------------------------------------------------------------------------------------------


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
    async def ask(client) -> str:
        try:
            made = await client.completions.create(model=NAME, prompt="w1", max_tokens=8, temperature=0)
        except openai.RateLimitError as error:
            assert error.code == "rate_limit_exceeded" and error.response.headers["retry-after"] == "1"
            return "full"
        return made.choices[0].text

    async def run() -> list[str]:
        async with later(server) as client:
            return await asyncio.gather(*(ask(client) for _ in range(100)))

    answers = asyncio.run(run())
    assert len(set(answers) - {"full"}) == 1 and 0 < answers.count("full") <= 100 - SLOTS - WAITING, answers


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


# ---- starting and ending ---------------------------------------------------------------------------------------------


def test_what_cannot_start_says_why(checkpoint, server):
    port = server.url.rsplit(":", 1)[1]
    cases = {
        f"cannot listen at 127.0.0.1, port {port}: Address already in use": ("--port", port),
        "--max-requests 0 must be above 0": ("--max-requests", "0"),
        "states of 4096 requests take": ("--max-requests", "4096", "--max-tokens", "4096", "--buffer-gb", "0.01"),
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


def test_an_engine_that_fails_ends_the_server(checkpoint):
    """The request that is open gets an answer, and the command fails."""
    ((status, (answer,)),) = spawn(served, 1, checkpoint, ["--max-requests", "2"], break_engine)
    assert status == 1 and answer == [503, "unavailable"]
