"""lightning-generate --batch: samples at once have the tokens that each has alone, and one that ends makes room."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest
import torch

from examples.mortal import mortal
from tests.helpers.generate import (
    DEVICES,
    EVERYTHING,
    HYBRID,
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
)  # fmt: skip
from tests.launch import ENV, GPU_ENV, ROOT, Run, run_pretrain, spawn
from tests.tolerances import LOGITS

CHECKPOINTS = {
    "lightning": "--normalization RMSNorm --lightning-decay minimax --lightning-num-kv-heads 2 --lightning-rope",
    "hybrid": f"{EVERYTHING} --group-query-attention --num-query-groups 2",
    "experts": f"--linear-attention-freq 4 {MOE}",
    "hybrid-model": f"{HYBRID} --group-query-attention --num-query-groups 2",
    "hybrid-model-lightning": HYBRID.replace("L-L-L-*-", "L-L-"),
    "hybrid-model-experts": f"--hybrid-layer-pattern LEL-L-*E {MOE}",
}
TP2, PP2, EP2 = (f"--{name}-model-parallel-size 2" for name in ("tensor", "pipeline", "expert"))
ALLTOALL = "--moe-token-dispatcher-type alltoall"
LAYOUTS = {
    "lightning": ("lightning", 1, ""),
    "hybrid": ("hybrid", 1, ""),
    "experts": ("experts", 1, ""),
    "tp2": ("hybrid", 2, TP2),
    "pp2": ("hybrid", 2, PP2),
    "tp2-pp2": ("lightning", 4, f"{TP2} {PP2}"),
    "ep2": ("experts", 2, f"{EP2} {ALLTOALL}"),
    "hybrid-model": ("hybrid-model", 1, ""),
    "hybrid-model-lightning": ("hybrid-model-lightning", 1, ""),
    "hybrid-model-tp2": ("hybrid-model", 2, TP2),
    "hybrid-model-pp2": ("hybrid-model", 2, f"{PP2} --hybrid-layer-pattern L-L-L|-*-"),
    "hybrid-model-ep2": ("hybrid-model-experts", 2, f"{EP2} {ALLTOALL}"),
    "ep2-tp2": ("experts", 2, f"{EP2} {TP2} --expert-tensor-parallel-size 1 {ALLTOALL}"),
}
MANY, TOKENS = 3, 20  # samples at once: no multiple of two ranks


def prompts() -> list[list[int]]:
    """The fourth one is read in several steps of 512 tokens."""
    draw = random.Random(1)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in (9, 1, 40, 1200, 3, 64, 65)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        run_pretrain([*SIZE, *NUMBERS.split(), *LOCAL, *CHECKPOINTS[name].split(), "--save", folder])
        return folder

    return write


class Ends(Numbers):
    def __init__(self, eod: int):
        super().__init__()
        self.eod = eod


def by_sample(pieces) -> dict[tuple[int, int], list[tuple]]:
    """Everything but the time; a piece of a finished sample is an error."""
    found: dict[tuple[int, int], list[tuple]] = {}
    for piece in pieces:
        mine = found.setdefault((piece.request, piece.sample), [])
        assert not mine or mine[-1][2] is None
        mine.append((piece.token, piece.text, piece.finish, piece.cache))
        assert (piece.seconds is None) == (piece.finish is None)
    assert all(mine[-1][2] for mine in found.values())
    return dict(sorted(found.items()))


def alone_and_at_once(rank: int, world: int, folder: Path, flags: list[str]) -> list[tuple[dict, dict]]:
    from megatron.core.inference.utils import InferenceMode

    from lightning_megatron import cpu
    from lightning_megatron.inference.generate import generate
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.sampling import Sampling

    cpu.enable_inference()  # as the command does it
    found = []
    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB, flags=flags) as model:

        def both(tokenizer, **how) -> dict:
            sampling = Sampling(tokens=TOKENS, **how)
            pair = tuple(by_sample(generate(model, tokenizer, prompts(), sampling, n)) for n in (1, MANY))
            assert not InferenceMode.is_active(), "a training step would fail"
            found.append(pair)
            return pair[0]

        greedy = both(Numbers(), temperature=0)
        eod = greedy[2, 0][4][0]
        both(Ends(eod), temperature=0, stop_at_eod=True)
        both(Numbers(), temperature=0.8, top_p=0.95, seed=5, samples=2, stop=("9 1", "00"))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_at_once_have_the_tokens_of_each_alone(layout, checkpoint):
    """Greedy ones, drawn ones, with stop words and ends of documents; texts and sizes of caches, too."""
    name, world, flags = LAYOUTS[layout]
    ranks = spawn(alone_and_at_once, world, checkpoint(name), flags.split(), timeout=300)
    for found in ranks:
        for alone, at_once in found:
            assert at_once == alone
    tokens = [{key: [x[:3] for x in mine] for key, mine in alone.items()} for alone, _ in ranks[0]]
    for found in ranks[1:]:
        assert [{key: [x[:3] for x in mine] for key, mine in alone.items()} for alone, _ in found] == tokens
    assert len({token for each in tokens for mine in each.values() for token, *_ in mine}) > 30
    ends = [{mine[-1][2] for mine in each.values()} for each in tokens]
    assert ends == [{"length"}, {"length", "eod"}, {"length", "stop"}]


@pytest.mark.parametrize("gpus", DEVICES)
def test_in_bf16(gpus, tmp_path):
    """By the command, as a process of its own: tokens of passes without caches, but where rounding decides."""
    save_bf16(tmp_path, gpus, *EVERYTHING.split())
    asked = ["--load", str(tmp_path), *ask(tmp_path)[:2], "--tokens", "40", "--temperature", "0", "--json", *LOCAL]
    line = mortal("-m", "lightning_megatron.inference.generate", *asked, "--batch", str(MANY))
    env = os.environ | (GPU_ENV if gpus else ENV)
    run = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    pairs = [([int(x) for x in each["prompt"].split()], each["tokens"]) for each in found]
    logits = logits_of(tmp_path, [prompt + tokens for prompt, tokens in pairs], gpus)
    counts = [decided(x, *pair, 2 * LOGITS[torch.bfloat16]) for x, pair in zip(logits, pairs, strict=True)]
    print("tokens that rounding does not decide", counts)
    assert len(counts) == len(prompts()) and sum(counts) > 20 * len(counts)


# ---- the engine ------------------------------------------------------------------------------------------------------


def schedule(rank: int, world: int, folder: Path, buffer_gb: float | None, size: int) -> tuple:
    """Lengths of samples in tokens, steps, how often one lost its place, and whether tokens are those of each alone."""
    from lightning_megatron.inference import together
    from lightning_megatron.inference.generate import generate
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.sampling import Sampling

    asked, made = [p[:60] for p in prompts()], []
    if buffer_gb is not None:
        together.build_engine = functools.partial(together.build_engine, buffer_gb=buffer_gb)
    build = together.build_engine
    together.build_engine = lambda *args, **how: made.append(build(*args, **how)) or made[-1]
    sampling = Sampling(tokens=120, temperature=1.0, samples=2, stop=("9 1",))
    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB, flags=LOCAL) as model:
        alone = by_sample(generate(model, Numbers(), asked, sampling))
        same = by_sample(generate(model, Numbers(), asked, sampling, size)) == alone
        lengths = [len(mine) for mine in alone.values()]
        return lengths, made[0].context.step_count, made[0].evicted_request_count, same


def test_a_sample_that_ends_makes_room_at_once(checkpoint):
    ((lengths, steps, evicted, same),) = spawn(schedule, 1, checkpoint("lightning"), None, 4)
    places = [0] * 4
    for length in lengths:
        places[places.index(min(places))] += length
    in_turns = sum(max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))
    print(lengths, steps, in_turns)
    assert same and not evicted and steps == max(places) < in_turns


def test_samples_that_have_no_room_wait_and_go_on(checkpoint):
    """Keys and values of all at once do not fit: Megatron evicts requests, and reads their prompts and tokens again."""
    ((lengths, _, evicted, same),) = spawn(schedule, 1, checkpoint("hybrid"), 2.1e-4, 8)
    print(lengths, evicted)
    assert evicted and same and max(lengths) > 64


def speed(rank: int, world: int, folder: Path) -> list[float]:
    from lightning_megatron.inference.generate import generate
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.sampling import Sampling

    asked, seconds = [p[:40] for p in prompts() + prompts() + prompts()][:16], []
    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model:
        for batch in (1, 16):
            began = time.perf_counter()
            assert sum(1 for _ in generate(model, Numbers(), asked, Sampling(tokens=32), batch)) == 16 * 32
            seconds.append(time.perf_counter() - began)
    return seconds


def test_sixteen_at_once_are_faster(checkpoint):
    ((alone, at_once),) = spawn(speed, 1, checkpoint("hybrid"))
    print(f"{alone:.2f} s one after the other, {at_once:.2f} s at once: {alone / at_once:.1f} times as fast")
    assert at_once < alone / 2


# ---- the command -----------------------------------------------------------------------------------------------------


def command(folder: Path, *flags: str, nproc: int = 1) -> Run:
    return run_pretrain(["--load", folder, *flags], nproc, script=SCRIPT, check=False)


def ask(folder: Path) -> list[str]:
    (folder / "prompts").write_text("".join(" ".join(map(str, p[:30])) + "\n" for p in prompts()))
    words = ("--temperature", "1", "--samples", "2", "--tokens", "30", "--stop", "9 1", "--stop", "00")
    return ["--prompts-file", str(folder / "prompts"), *words]


def lines(run: Run) -> list[dict]:
    assert run.ok, run.log
    found = [json.loads(line) for line in run.log.splitlines() if line.startswith("{")]
    for each in found:
        assert each.pop("seconds") > 0 and each.pop("tokens_per_second") > 0
    return found


def test_json_is_that_of_samples_one_after_the_other(checkpoint, tmp_path):
    """In the order of prompts and samples, over two ranks, too."""
    folder, asked = checkpoint("hybrid"), [*ask(tmp_path), "--json"]
    want = lines(command(folder, *asked))
    assert [(x["request"], x["sample"]) for x in want] == [(i, j) for i in range(7) for j in range(2)]
    assert {x["finish"] for x in want} == {"stop", "length"}
    assert lines(command(folder, *asked, "--batch", "5")) == want
    run = command(folder, *asked, "--batch", "5", *TP2.split(), nproc=2)
    keep = lambda found: [{key: x for key, x in each.items() if key != "cache_bytes"} for each in found]
    assert keep(lines(run)) == keep(want)
    assert run.log.count("[14 samples, ") == 1


def test_the_screen_shows_whole_samples(checkpoint, tmp_path):
    folder, asked = checkpoint("hybrid"), ask(tmp_path)
    run, alone = command(folder, *asked, "--batch", "5"), command(folder, *asked)
    assert run.ok and alone.ok, run.log + alone.log

    def shown(log: str) -> list[str]:
        parts = log[log.index("==> ") :].partition("\n[14 samples")[0].split("==> ")[1:]
        return [part[: part.index(" tokens/s")].rpartition(",")[0].strip() for part in parts]

    assert sorted(shown(run.log)) == sorted(shown(alone.log)) and len(shown(run.log)) == 14
    assert shown(run.log) != shown(alone.log), "in the order in which they end"


def test_what_the_engine_has_no_room_for(checkpoint):
    run = command(checkpoint("hybrid"), "--prompt", "1 2", "--prompt", "3", "--tokens", "9000000", "--batch", "2")
    assert not run.ok and "Traceback" not in run.log, run.log
    assert "the longest sample has 9000002 tokens, and keys and values of" in run.log and "(--batch 2)" in run.log


def test_experts_of_two_ranks(checkpoint):
    """Trained with the dispatcher that the engine does not take; it is another one unless the user says so."""
    flags = ("--prompt", "1 2", "--prompt", "3", "--temperature", "0", "--tokens", "6", "--json", *EP2.split())
    folder = checkpoint("experts")
    want = lines(command(folder, *flags, nproc=2))
    assert lines(command(folder, *flags, "--batch", "2", nproc=2)) == want
    run = command(folder, *flags, "--batch", "2", "--moe-token-dispatcher-type", "allgather", nproc=2)
    assert not run.ok and "use alltoall (--batch 2)" in run.log and "Traceback" not in run.log, run.log
