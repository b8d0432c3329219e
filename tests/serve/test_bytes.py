"""Tokens whose text depends on those before: parts of characters in byte-level tokenizers, and words with spaces."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.serve import NAME, Server

ASK: dict = dict(model=NAME, prompt="é", max_tokens=40, temperature=1.0, extra_body={"ignore_eos": True})


@contextlib.contextmanager
def served(checkpoint: Path, folder: Path, tokenizer: Tokenizer) -> Iterator[openai.OpenAI]:
    """A client of the checkpoint with another tokenizer of 250 or 256 tokens."""
    (folder / NAME).symlink_to(checkpoint / NAME)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokenizer.id_to_token(0))
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made.save_pretrained(folder / "tokenizer")
    server = Server(folder)
    try:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def test_offsets_of_tokens(checkpoint, tmp_path):
    """They are places in the text, where words have spaces between them that no single token tells."""
    words = Tokenizer(models.WordLevel({f"\u2581w{i}": i for i in range(250)}, unk_token="\u2581w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    with served(checkpoint, tmp_path, words) as client:
        made = client.completions.create(logprobs=0, **ASK | dict(prompt=[4, 5, 6])).choices[0]
    names, offsets = made.logprobs.tokens, made.logprobs.text_offset
    assert made.text == "".join(f" {name}" for name in names) and len(names) == len(offsets) == 40
    assert [made.text[at:].split()[0] for at in offsets] == names


def test_bytes_of_tokens(checkpoint, tmp_path):
    """A part of a character has a name that does not tell its bytes, and so none are told."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    single = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    single.pre_tokenizer, single.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ask = {name: value for name, value in ASK.items() if name != "prompt"}
    with served(checkpoint, tmp_path, single) as client:
        made = client.chat.completions.create(
            messages=[dict(role="user", content="é")], logprobs=True, top_logprobs=3, **ask
        ).choices[0]
        likeliest = client.completions.create(logprobs=20, **ASK).choices[0].logprobs.top_logprobs
        parts = [part.choices[0].text for part in client.completions.create(stream=True, **ASK | dict(temperature=0))]
        whole = client.completions.create(**ASK | dict(temperature=0)).choices[0].text
    assert "".join(parts) == whole
    assert all(len(token.top_logprobs) == 3 for token in made.logprobs.content)
    assert len(likeliest) == 40 and all(len(top) == 20 for top in likeliest)  # half of the tokens are cut characters
    assert any(name.startswith("token_id:") for top in likeliest for name in top)
    told = [one for token in made.logprobs.content for one in (token, *token.top_logprobs)]
    cut = [one for one in told if "\ufffd" in one.token]
    assert cut and all(one.bytes is None for one in cut)
    assert all(bytes(one.bytes).decode() == one.token for one in told if "\ufffd" not in one.token)
