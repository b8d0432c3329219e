"""lightning-generate: where it stops, what it reads and prints, over ranks, and what it refuses."""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples.mortal import mortal
from tests.helpers.generate import (
    DEVICES,
    EVERYTHING,
    LOCAL,
    MOE,
    NUMBERS,
    SCRIPT,
    SIZE,
    VOCAB,
    Numbers,
    decided,
    logits_of,
    save_bf16,
)
from tests.launch import ENV, GPU_ENV, ROOT, Run, run_pretrain, spawn
from tests.tolerances import LOGITS

PROMPT = "7 1 200 33 33 5 90 18 2"
CHECKPOINTS = {
    "hybrid": (1, EVERYTHING),
    "learned": (1, "--linear-attention-freq 2 --position-embedding-type learned_absolute"),
    "experts": (1, f"--linear-attention-freq 4 {MOE}"),
    "mtp": (
        1,
        "--linear-attention-freq 2 --mtp-num-layers 1 --lightning-mtp-attention lightning "
        "--untie-embeddings-and-output-weights",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @functools.cache
    def write(name: str) -> Path:
        folder, (nproc, flags) = tmp_path_factory.mktemp(name), CHECKPOINTS[name]
        run_pretrain([*SIZE, *NUMBERS.split(), *flags.split(), "--save", folder], nproc)
        return folder

    return write


def generate(folder: Path, *flags: str, nproc: int = 1) -> Run:
    return run_pretrain(["--load", folder, *flags], nproc, script=SCRIPT, check=False)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def tokens_of(rank: int, world: int, folder: Path, flags: list[str]) -> list[tuple[int, int, int]]:
    from lightning_megatron.inference.generate import generate as continued
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.sampling import Sampling

    prompts = [[int(x) for x in PROMPT.split()], [3], list(range(40))]
    found = []
    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB, flags=flags) as model:
        for how in (dict(temperature=0), dict(temperature=0.8, top_p=0.95, seed=5, samples=2)):
            pieces = continued(model, Numbers(), prompts, Sampling(tokens=12, **how))
            found += [(piece.request, piece.sample, piece.token) for piece in pieces]
    return found


TP2, PP2, EP2 = (f"--{name}-model-parallel-size 2" for name in ("tensor", "pipeline", "expert"))
LAYOUTS = {
    "tp2": ("hybrid", 2, TP2),
    "pp2": ("hybrid", 2, PP2),
    "tp2-pp2": ("hybrid", 4, f"{TP2} {PP2}"),
    "pp2-mtp": ("mtp", 2, PP2),
    "ep2": ("experts", 2, EP2),
    "ep2-tp2": ("experts", 2, f"{EP2} {TP2} --expert-tensor-parallel-size 1"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_draw_the_same_tokens(layout, checkpoint):
    name, nproc, flags = LAYOUTS[layout]
    (want,) = spawn(tokens_of, 1, checkpoint(name), [])
    assert len(want) == 3 * 12 * 3 and len({token for *_, token in want}) > 10
    for rank, got in enumerate(spawn(tokens_of, nproc, checkpoint(name), flags.split())):
        assert got == want, f"{rank=}"


def test_one_rank_prints(checkpoint):
    flags = ("--prompt", PROMPT, "--tokens", "5", "--temperature", "0", *TP2.split())
    run, alone = generate(checkpoint("hybrid"), *flags, nproc=2), generate(checkpoint("hybrid"), *flags[:-2])
    assert run.ok and alone.ok, run.log
    (line,) = (x for x in run.log.splitlines() if x.startswith(PROMPT))
    assert line in alone.log.splitlines() and run.log.count("5 generated") == 1
    assert "lightning layers 6 KiB" in run.log and "lightning layers 12 KiB" in alone.log


def test_started_by_torchrun_as_a_user_does(checkpoint):
    """Without the shim: the command itself turns to the CPU. Rank 0 alone reads standard input."""
    flags = ("--load", str(checkpoint("hybrid")), "--tokens", "5", "--temperature", "0", "--json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "lightning_megatron.inference.generate", *flags, "--prompt", "-", *TP2.split()]
    run = subprocess.run(command, input=PROMPT, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENV)
    assert run.returncode == 0, run.stderr
    assert "[lightning-generate: no GPU, so it runs on the CPU]" in run.stderr and "Warning" not in run.stderr
    found = json.loads(run.stdout)
    alone = generate(checkpoint("hybrid"), *flags[2:], "--prompt", PROMPT)
    assert found["tokens"] == json.loads(alone.log.splitlines()[-1])["tokens"] and found["prompt"] == PROMPT


# ---- a pipe ----------------------------------------------------------------------------------------------------------

MODULE = "lightning_megatron.inference.generate"


def read_as_it_comes(command: list[str], env: dict[str, str]) -> list[tuple[str, bool]]:
    """What each read of a command's standard output finds, and whether the command still ran then."""
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, start_new_session=True) as process:
        found = []
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            found.append((piece.decode(), process.poll() is None))
    assert process.returncode == 0
    return found


def assert_streams(found: list[tuple[str, bool]], prompt: str, tokens: int) -> list[int]:
    """The first tokens arrive before half of all are there, and the others in many parts; returns the tokens."""
    text = "".join(piece for piece, _ in found)
    assert text.startswith(prompt), text[:200]
    numbers = [int(x) for x in text.removeprefix(prompt).partition("\n")[0].split()]
    assert len(numbers) == tokens
    arrived, first, parts = "", None, 0
    for piece, running in found:
        arrived += piece
        count = len(arrived.removeprefix(prompt).partition("\n")[0].split())
        if arrived.startswith(prompt) and count:
            first, parts = first or (count, running), parts + 1
    assert first is not None and first[1] and first[0] < tokens / 2 and parts > 5, (first, parts, tokens)
    return numbers


@pytest.mark.parametrize("gpus", DEVICES)
def test_text_arrives_before_the_end(gpus, tmp_path):
    """Through a pipe, which Python fills in blocks of 8 KiB unless it is told; in bf16, with the tokens of passes
    without caches.
    """
    prompt, count = [int(x) for x in PROMPT.split()], 100
    save_bf16(tmp_path, gpus, *EVERYTHING.split())
    env = os.environ | (GPU_ENV if gpus else ENV)
    env.pop("PYTHONUNBUFFERED")
    ask = ("--load", str(tmp_path), "--prompt", PROMPT, "--tokens", str(count), "--temperature", "0", *LOCAL)
    tokens = assert_streams(read_as_it_comes(mortal("-m", MODULE, *ask), env), PROMPT, count)
    (logits,) = logits_of(tmp_path, [prompt + tokens], gpus)
    assert decided(logits, prompt, tokens, 2 * LOGITS[torch.bfloat16]) >= 64


def test_text_of_ranks_arrives_before_the_end(checkpoint):
    """Through torchrun, too."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ask = ("--load", str(checkpoint("hybrid")), "--prompt", PROMPT, "--tokens", "100", "--temperature", "0")
    env = os.environ | ENV
    env.pop("PYTHONUNBUFFERED")
    assert_streams(read_as_it_comes([*torchrun, "-m", MODULE, *ask, *TP2.split()], env), PROMPT, 100)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_stop_word_ends_a_sample(checkpoint):
    ask = ("--prompt", PROMPT, "--tokens", "12", "--temperature", "0", "--json")
    run = generate(checkpoint("hybrid"), *ask)
    whole = json.loads(run.log.splitlines()[-1])
    assert whole["finish"] == "length" and whole["generated_tokens"] == 12 == len(whole["tokens"])
    assert whole["text"].split() == [str(x) for x in whole["tokens"]]
    stop = f"{whole['tokens'][5]} {whole['tokens'][6]}"
    found = json.loads(generate(checkpoint("hybrid"), *ask, "--stop", stop).log.splitlines()[-1])
    assert found["finish"] == "stop" and found["text"] == whole["text"][: whole["text"].index(stop)]


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_files_samples_and_seeds(checkpoint, tmp_path):
    (tmp_path / "whole").write_text(PROMPT)
    (tmp_path / "lines.jsonl").write_text('"5 6"\n\n{"prompt": "8 9", "other": 1}\n')
    ask = ("--prompt", "3 4", "--prompt-file", f"{tmp_path}/whole", "--prompts-file", f"{tmp_path}/lines.jsonl")
    more = ("--samples", "2", "--tokens", "6", "--temperature", "1", "--top-k", "50", "--json")

    def run(*flags):
        log = generate(checkpoint("hybrid"), *ask, *more, *flags).log
        return [json.loads(line) for line in log.splitlines() if line.startswith("{")]

    first, again, other = run(), run(), run("--seed", "9")
    assert [(x["prompt"], x["sample"]) for x in first] == [
        (p, i) for p in ("3 4", PROMPT, "5 6", "8 9") for i in (0, 1)
    ]
    assert [x["tokens"] for x in again] == [x["tokens"] for x in first] != [x["tokens"] for x in other]
    assert first[0]["tokens"] != first[1]["tokens"]
    alone = json.loads(generate(checkpoint("hybrid"), *ask[:2], *more).log.splitlines()[-1])
    assert alone["tokens"] == first[1]["tokens"], "a sample depends on its number, not on what else is asked"


def prompts(monkeypatch, stdin: bytes = b"", **given):
    from lightning_megatron.inference.generate import read_prompts

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
    return read_prompts(argparse.Namespace(**dict(prompt=[], prompt_file=[], prompts_file=[]) | given))


def test_stdin(monkeypatch):
    assert prompts(monkeypatch, "zwölf\n".encode(), prompt=["-"]) == [("--prompt -", "zwölf\n")]
    assert prompts(monkeypatch, b"a\nb", prompts_file=["-"]) == [
        ("line 1 of --prompts-file -", "a"),
        ("line 2 of --prompts-file -", "b"),
    ]


WRONG_FILES = {
    "none": (None, "No such file or directory; give a file with text"),
    "empty": (b"", "is empty; give some text to continue"),
    "latin": ("für".encode("latin1"), "is no UTF-8 text (byte 1): convert it to UTF-8"),
    "blank": (b"\n \n", "has no lines with text: give one prompt a line"),
    "a.jsonl": (b'"x"\nno', "line 2 of --prompts-file .*a.jsonl is no JSON"),
    "b.jsonl": (b'{"text": 1}', "line 1 of .* must be a JSON string, or an object such as"),
    "c.jsonl": (b'""', "line 1 of .* has no tokens; give some text"),
    "d.jsonl": (rb'"a\ud800"', "line 1 of .* is no UTF-8 text .character 1.: convert it to UTF-8"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files(name, monkeypatch, tmp_path):
    import re

    data, message = WRONG_FILES[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern):
        prompts(monkeypatch, prompts_file=[f"{tmp_path}/{name}"])


def test_bytes_of_the_command_line(monkeypatch):
    with pytest.raises(ValueError, match=r"--prompt 'f.*' is no UTF-8 text .character 1.: convert it to UTF-8"):
        prompts(monkeypatch, prompt=["für".encode("latin1").decode("utf-8", "surrogateescape")])


# ---- refusals --------------------------------------------------------------------------------------------------------


def assert_ends_with(run: Run, message: str) -> None:
    assert not run.ok and message in run.log and "Traceback" not in run.log, run.log
    said = [line for line in run.log.splitlines() if message in line]
    assert len(said) == 1, run.log


WRONG = {
    "tokens": ("--tokens 0", "--tokens 0 must be at least 1"),
    "many-tokens": (f"--tokens {10**21}", f"--tokens {10**21} must be at most 2147483647"),
    "seed": (f"--seed {10**21}", f"--seed {10**21} must be from -{2**62} to {2**62}"),
    "batch": ("--batch 0", "--batch 0 must be at least 1"),
    "samples": ("--samples 0", "--samples 0 must be at least 1"),
    "temperature": ("--temperature -1", "--temperature -1.0 must be at least 0"),
    "top-k": ("--top-k 0", "--top-k 0 must be at least 1 token"),
    "top-p-0": ("--top-p 0", "--top-p 0.0 must be above 0 and at most 1"),
    "top-p-2": ("--top-p 1.5", "--top-p 1.5 must be above 0 and at most 1"),
    "two": ("--top-k 3 --top-p 0.5", "--top-k 3 and --top-p 0.5: Megatron takes one of the two; leave one out"),
    "cold-k": ("--temperature 0 --top-k 3", "--top-k 3 with --temperature 0, which takes the likeliest token: leave"),
    "cold-p": ("--temperature 0 --top-p 0.5", "--top-p 0.5 with --temperature 0, which takes the likeliest"),
    "unknown": ("--temprature 1", "unrecognized arguments: --temprature 1"),
    "cp": ("--context-parallel-size 2", "--context-parallel-size 2: states are carried from token to token by one"),
    "sp": ("--sequence-parallel", "--sequence-parallel: single tokens cannot be split over ranks; leave it out"),
    "engine": (
        "--inference-dynamic-batching-max-requests 8",
        "--inference-dynamic-batching-max-requests is of Megatron's own engines and servers, and is not read here",
    ),
    "ranks": (TP2, "1 process for a model over 2 (--tensor-model-parallel-size 2, --pipeline-model-parallel-size 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_senseless_options(name, tmp_path):
    """Before anything of the checkpoint is read: there is none."""
    flags, message = WRONG[name]
    assert_ends_with(generate(tmp_path, "--prompt", PROMPT, *flags.split()), message)


def test_every_rank_ends(tmp_path):
    run = generate(tmp_path, "--prompt", PROMPT, nproc=2)
    assert_ends_with(run, "2 processes for a model over 1 (--tensor-model-parallel-size 1")
    assert run.seconds < 60
    run = generate(tmp_path, "--prompt-file", f"{tmp_path}/none", *TP2.split(), nproc=2)
    assert not run.ok and "no latest_checkpointed_iteration.txt there" in run.log


def test_flags_that_do_not_fit_the_checkpoint(checkpoint):
    """Ours are compared with what it says of itself, Megatron's with the shapes of its tensors."""
    folder = checkpoint("hybrid")
    run = generate(folder, "--prompt", PROMPT, "--lightning-decay", "alibi")
    assert_ends_with(
        run, f"lightning-generate: Megatron does not load {folder}: the checkpoint in {folder} was trained"
    )
    assert "minimax with offset 0" in run.log and "  | " not in run.log
    run = generate(folder, "--prompt", PROMPT, "--hidden-size", "32")
    assert_ends_with(run, "has the shape [64] there, and [32] in this run. Leave out the flags that give other sizes")


def test_what_the_model_does_not_have(checkpoint):
    folder = checkpoint("learned")
    assert_ends_with(generate(folder), "nothing to continue: give --prompt TEXT, --prompt-file FILE")
    assert_ends_with(
        generate(folder, "--prompt", "1 2", "--top-k", "256"), "--top-k 256 is more than the 255 tokens of"
    )
    assert_ends_with(
        generate(folder, "--prompt", "1 300"), "--prompt '1 300' has token 300, but the vocabulary ends at"
    )
    assert_ends_with(
        generate(folder, "--prompt", "1 2", "--tokens", "127"),
        "--prompt '1 2' has 2 tokens, and --tokens 127 more make 129, but the model has learned 128 positions",
    )
    assert generate(folder, "--prompt", "1 2", "--tokens", "126").ok
    run = generate(folder, "--prompt-file", "none", *TP2.split(), nproc=2)
    assert_ends_with(run, "--prompt-file none: No such file or directory; give a file with text")
