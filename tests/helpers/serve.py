"""A served checkpoint, the server as a command, and what a model says without one."""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
from pathlib import Path

import httpx
import openai
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.mortal import mortal
from tests.checkout import python_path
from tests.helpers.generate import NUMBERS, SIZE
from tests.launch import ENV, GPU_ENV, ROOT, run_pretrain

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
GREEDY = dict(model=NAME, temperature=0, extra_body={"ignore_eos": True})
COUNT = 12
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


def save_served(folder: Path, *more: str, gpus: bool = False) -> None:
    """A small model and its tokenizer, which has a chat template; ``more`` flags of the training."""
    run_pretrain([*SIZE, *NUMBERS.split(), *MODEL.split(), *more, "--save", folder / NAME], gpus=gpus)
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


def flags(folder: Path) -> list[str]:
    return [
        *("--load", str(folder / NAME), "--port", "0"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")),
    ]


class Server:
    """The command, as a user starts it."""

    def __init__(self, folder: Path, *more: str, gpus: bool = False):
        command = mortal("-m", SERVE, *flags(folder), *more)
        self.log = folder / "log"
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, **(GPU_ENV if gpus else ENV), "PYTHONPATH": python_path()},
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


def later(server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


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


ALL_WORDS = ["<|im_start|>", "<|im_end|>", "user", "<unk>", *WORDS]


def text_of(tokens: list[int]) -> str:
    """As the tokenizer has it: one word a token, and no spaces."""
    return "".join(ALL_WORDS[token] for token in tokens)


def tokens_of(text: str) -> list[int]:
    words = re.findall(r"<\|im_start\|>|<\|im_end\|>|user|<unk>|w\d+", text)
    assert "".join(words) == text, text
    return [ALL_WORDS.index(word) for word in words]
