"""The commands of inference on an imported model, whose args name no tokenizer."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_megatron.convert.importing import import_checkpoint
from lightning_megatron.models.family import family_of
from tests.helpers import random_models
from tests.helpers.generate import greedy
from tests.helpers.released import args_of
from tests.launch import run_pretrain, spawn

TEXT = "w4 w7 w9 w2 w30"


def write(folder: Path) -> int:
    """A random model of the Bailing family, and a tokenizer of words; returns how many."""
    config = random_models.bailing_config(random.Random(5), latent=False, experts=True)
    args = args_of(config)
    tensors = random_models.draw(family_of(config).units(args, config), torch.Generator().manual_seed(5))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = config["vocab_size"] - 3  # rows that are no tokens
    ids = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return words


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> tuple[Path, int]:
    place = tmp_path_factory.mktemp("imported")
    words = write(place / "hf")
    import_checkpoint(place / "hf", place / "megatron", say=lambda text: None)
    return place / "megatron", words


def test_generation_brings_the_tokenizer_of_the_import(imported):
    folder, words = imported
    ids = [int(word[1:]) for word in TEXT.split()]
    ((_, wanted),) = spawn(greedy, 1, folder, ids, 8, words)
    flags = ["--load", folder, "--prompt", TEXT, "--tokens", "8", "--temperature", "0", "--json"]
    run = run_pretrain(flags, module="lightning_megatron.inference.generate")
    found = json.loads(run.log.splitlines()[-1])
    assert found["tokens"] == wanted and min(wanted) > 1, "only words"
    assert found["text"].split() == [f"w{i}" for i in wanted]


def test_perplexity_of_a_text(imported, tmp_path):
    folder, words = imported
    draw = random.Random(9)
    ids = [draw.randrange(2, words) for _ in range(60)]
    (tmp_path / "text").write_text("\n".join(f"w{i}" for i in ids))
    ((logits, _),) = spawn(greedy, 1, folder, ids, 1, words)
    wanted = float(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:])))
    flags = ["--load", folder, "--text", tmp_path / "text", "--json"]
    found = json.loads(run_pretrain(flags, module="lightning_megatron.inference.perplexity").log.splitlines()[-1])
    assert found["tokens"] == 59 and math.isclose(found["nll"], wanted, rel_tol=1e-5)
