"""Conversations of random lengths, and a tokenizer of one token a word."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_conversations(folder: Path, template: str | None = None) -> list:
    """Flags that read them, packed; their lengths divide by nothing. The tokenizer may have a chat template."""
    draw = random.Random(5)
    words = ["<unk>", "<eos>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_233>", "System", "User", "Assistant"]
    words += [f"w{i}" for i in range(240)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    wrapped.add_special_tokens({"additional_special_tokens": words[2:5]})
    wrapped.chat_template = template
    wrapped.save_pretrained(folder / "tokenizer")

    def message(role: str, most: int) -> dict[str, str]:
        first = draw.randrange(200)
        return {"role": role, "content": " ".join(f"w{first + i}" for i in range(draw.randint(1, most)))}

    def conversation() -> list[dict[str, str]]:
        return [message("system", 4), message("user", 7), message("assistant", 11)]

    rows = [{"messages": sum((conversation() for _ in range(4)), [])} for _ in range(32)]
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [
        *("--sft", "--tokenizer-type", "SFTTokenizer", "--tokenizer-model", folder / "tokenizer"),
        *("--data-path", path, "--split", "100,0,0"),
        # else Megatron divides on every rank by the tokens there that count, which prompts and padding leave unequal
        "--calculate-per-token-loss",
    ]
