"""The comparison of qualities: stretches, sessions and deadlines, and the whole pipeline at the smallest size."""

import argparse
import functools
import json
import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from examples.quality import evaluate, exact, fidelity, report, results, session, smoke, tokens, train
from examples.quality.variants import SIZES, VARIANTS
from lightning_megatron import parallel
from lightning_megatron.training.refusals import refuse as refuse_flags

from .helpers.arguments import parse_flags, pretend_without
from .launch import ROOT, run_pretrain

# ---- training --------------------------------------------------------------------------------------------------------

LINE = (
    " iteration {:8d}/ 9 | consumed samples: 1 | elapsed time per iteration (ms): 50.0 | learning rate: 1.0E-03 |"
    " global batch size: 4 |{} loss scale: 1.0 | grad norm: 1.5 |"
)

# What Megatron does, as far as ``train`` sees it: steps from the last checkpoint on, a save at the end or at SIGTERM.
PRETEND = """
import os, signal, sys, time
from pathlib import Path
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
folder, last = Path(value("--save")), int(value("--train-iters"))
tracker = folder / "latest_checkpointed_iteration.txt"
step = int(tracker.read_text()) if tracker.exists() else 0
print(" > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 1000", flush=True)
while step < last and not stop:
    step += 1
    loss = "" if step == int(os.environ.get("NAN", 0)) else f" lm loss: {5 - step / 1000} |"
    if step == 1 or "QUIET" not in os.environ:
        print(LINE.format(step, loss), flush=True)
    time.sleep(0.01)
folder.mkdir(exist_ok=True)
tracker.write_text(str(step))
print(f" validation loss at iteration {step} | lm loss value: 4.5 |", flush=True)
""".replace("LINE", repr(LINE))


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    """Options of a training whose Megatron is PRETEND: ``pretend(steps, *words)``."""
    (tmp_path / "pretended_megatron.py").write_text(PRETEND)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(train, "MODULE", "pretended_megatron")
    for name in tokens.FILES:
        (tmp_path / name).touch()
    (tmp_path / "stats.json").write_text(json.dumps({"sha256": {"train_text_document.bin": "0"}}))
    words = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--size", "tiny", "--reserve", "3"]

    def options(steps: int, *more: str) -> argparse.Namespace:
        size = SIZES["tiny"]
        words_now = [*words, "--variant", "7:1", "--tokens", str(steps * size.batch * size.seq_length), *more]
        return train.parser().parse_args(words_now)

    return options


def pretended(words: list[str], log: Path, gpu: bool, seconds: float) -> Iterator[str]:
    return train.launch(words, log, True, seconds)  # True: without the shim, which imports Megatron


def rows_of(folder: Path) -> list[int]:
    return [row["iteration"] for row in train.read_lines(folder / "losses.jsonl")]


def test_stretch_ends_within_its_limit_and_the_next_goes_on(pretend):
    start = time.monotonic()
    folder = train.train(pretend(10_000, "--seconds", "5"), pretended)
    assert time.monotonic() - start < 5
    saved = train.done(folder)
    assert 0 < saved < 1000 and rows_of(folder) == list(range(1, saved + 1))
    train.train(pretend(10_000, "--seconds", "4.2"), pretended)
    assert train.done(folder) > saved and rows_of(folder) == list(range(1, train.done(folder) + 1))
    run = json.loads((folder / "run.json").read_text())
    assert [x["from"] for x in run["stretches"]] == [0, saved] and run["parameters"] == 1000
    assert results.Run("x", results.one_file(folder)).state == f"stopped at {train.done(folder)} of 10000"


def test_killed_stretch_leaves_no_step_twice(pretend):
    def cut(*args) -> Iterator[str]:
        for line in (lines := pretended(*args)):
            yield line
            if "iteration       15/" in line:
                lines.close()
                raise RuntimeError("killed")

    folder = train.train(pretend(8), pretended)
    tracker = folder / "checkpoint" / train.TRACKER
    assert rows_of(folder) == list(range(1, 9)) and tracker.read_text() == "8"
    folder = folder.rename(folder.with_name(train.folder_of(pretend(30)).name))  # as if 30 had been asked for
    run = json.loads((folder / "run.json").read_text())
    what = train.about(pretend(30), torch.cuda.is_available())
    (folder / "run.json").write_text(json.dumps(run | what))
    with pytest.raises(RuntimeError, match="killed"):
        train.train(pretend(30), cut)
    assert rows_of(folder)[-1] == 15 and train.done(folder) == 8
    run = json.loads((folder / "run.json").read_text())
    run["stretches"][-1] |= {"to": None, "began": time.time() - 100}  # as a kill of this program, too, would leave it
    del run["stretches"][-1]["wall_seconds"]
    (folder / "run.json").write_text(json.dumps(run))
    with (folder / "losses.jsonl").open("a") as file:
        file.write('{"iteration": 16, "lo')  # a machine that is cut may leave half a line
    train.train(pretend(30), pretended)
    assert rows_of(folder) == list(range(1, 31)) and train.state(folder) == "complete"
    stretches = json.loads((folder / "run.json").read_text())["stretches"]
    assert [(x["from"], x["to"]) for x in stretches] == [(0, 8), (8, None), (8, 30)]
    assert 95 < stretches[1]["wall_seconds"] < 110
    (folder / "losses.jsonl").write_text("".join(f'{{"iteration": {i}}}\n' for i in (1, 2, 2, 3)))
    with pytest.raises(ValueError, match="does not hold the steps 1 to 4, each once"):
        results.one_file(folder)


def test_a_run_goes_on_whoever_shares_the_gpu(pretend):
    """Also one of before there was the option; its speed counts only where no stretch was shared."""
    folder = train.train(pretend(8), pretended)
    run = json.loads((folder / "run.json").read_text())
    assert run["shared"] is False and run["transformer_impl"] == "local"
    run |= train.about(pretend(30), torch.cuda.is_available())
    del run["shared"], run["transformer_impl"]
    (folder / "run.json").write_text(json.dumps(run))
    folder = folder.rename(folder.with_name(train.folder_of(pretend(30)).name))
    assert train.train(pretend(30, "--shared"), pretended) == folder and train.state(folder) == "complete"
    assert json.loads((folder / "run.json").read_text())["shared"]
    assert train.train(pretend(30), pretended) == folder
    words = ["train", "--data", "data", "--runs", "runs"]
    side_by_side, alone = (fidelity.parser().parse_args([*words, *x]) for x in ([], ["--together", "1"]))
    path = fidelity.ON_CPU[0]
    assert fidelity.options_of(path, side_by_side).shared and not fidelity.options_of(path, alone).shared


def test_megatron_ends_with_its_driver(pretend, tmp_path, monkeypatch):
    """A driver that is killed leaves no training behind, also where that prints nothing for long."""
    monkeypatch.setenv("QUIET", "1")
    options = pretend(100_000)
    code = (
        "import sys; from pathlib import Path; from examples.quality import train\n"
        "for line in train.launch(sys.argv[2:], Path(sys.argv[1]), True, 60): pass"
    )
    words = train.command(options, tmp_path, gpu=True)
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log"), *words], cwd=ROOT)
    log = tmp_path / "log"
    while not (log.is_file() and log.stat().st_size):
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    time.sleep(0.5)
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_folders_and_names_that_are_not_there(tmp_path):
    """A message, and nothing is made."""
    where = ["--data", str(tmp_path / "none"), "--runs", str(tmp_path / "runs")]
    for main, words in (
        (train.main, [*where, "--variant", "7:1"]),
        (session.main, [*where, "7:1", "--results", str(tmp_path / "out")]),
    ):
        with pytest.raises(SystemExit, match=r"--data .*none: no stats.json there; give the folder that"):
            main(words)
    with pytest.raises(SystemExit, match="variant 'none' is unknown"):
        train.main([*where, "--variant", "none"])
    assert not (tmp_path / "runs").exists()
    command = [sys.executable, "-m", "examples.quality.evaluate", str(tmp_path), "--data", str(tmp_path / "none")]
    (tmp_path / "stats.json").write_text(json.dumps({"sha256": {"train_text_document.bin": "0"}}))
    for words, message in (
        (command, "evaluate: --data "),
        ([*command[:-1], str(tmp_path)], f"evaluate: --load {tmp_path}/checkpoint: no latest_checkpointed"),
    ):
        ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 1 and message in ended.stderr and "Traceback" not in ended.stderr


def test_run_whose_loss_is_no_number_ends_and_is_not_continued(pretend, monkeypatch):
    monkeypatch.setenv("NAN", "12")
    folder = train.train(pretend(10_000), pretended)
    assert rows_of(folder) == list(range(1, 13)) and train.state(folder) == "diverged at step 12"
    found = results.one_file(folder)
    assert found["losses"][-1] is None and results.Run("x", found).state == "diverged at step 12"

    def never(*_):
        raise AssertionError("a run that diverged was started again")

    train.train(pretend(10_000), never)


def asked_for(tmp_path: Path, tokens: float, seconds: float, *words: str) -> argparse.Namespace:
    """Options of a session."""
    words = [*words, "--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--size", "tiny", "--reserve", "1.5"]
    made = session.parser().parse_args([*words, "--results", str(tmp_path / "out"), "--tokens", str(tokens)])
    made.seconds, made.questions = seconds, ["--cases", "3"]
    return made


def test_session_trains_evaluates_and_writes_after_every_stage(pretend, tmp_path, capsys):
    one, asked = pretend(30), []
    out = tmp_path / "out"

    def evaluates(module: str, words: list[str], seconds: float) -> None:
        folder = Path(words[0])
        held = json.loads((out / f"{folder.name}.json").read_text())
        assert len(held["losses"]) == 30 and not held["tasks"]  # written before
        asked.append((module, folder.name, words[1:]))
        if "softmax" in folder.name:
            raise RuntimeError("no memory")
        (folder / "evaluate.json").write_text(
            json.dumps({"tasks": {"loss": {"nll": 2.5, "by_package": {}, "seconds": 1.0}}})
        )

    options = lambda seconds, *jobs: asked_for(tmp_path, one.tokens, seconds, *jobs)
    found = session.session(options(60, "softmax", "7:1@2"), pretended, evaluates)
    assert found == {"softmax": "failed: no memory", "7:1@2": "complete, with loss"}
    assert [(x, name[:5], words[-2:]) for x, name, words in asked] == [
        ("examples.quality.evaluate", name, ["--cases", "3"]) for name in ("softm", "7to1_")
    ]
    runs = {run.name: run for run in results.load(out)}
    assert [(run.variant, run.about["seed"], results.loss_of(run)) for run in runs.values()] == [
        ("7:1", 2, 2.5), ("softmax", 1, None)
    ]  # fmt: skip
    assert session.session(options(1.0, "3:1"), pretended, evaluates) == {"3:1": "no time"}
    with pytest.raises(ValueError, match="variant 2:1 is unknown|variant '2:1' is unknown"):
        session.session(options(60, "2:1"), pretended, evaluates)
    for job in ("softmax@x", "softmax/fast"):
        with pytest.raises(ValueError, match=f"job '{job}' is not VARIANT.*such as softmax@2/1e-3"):
            session.session(options(60, job), pretended, evaluates)


def test_session_evaluates_beside_the_next_training(pretend, tmp_path):
    """The first evaluation ends behind the beginning of the second training, whose speed is none then."""
    asked, trains = threading.Event(), threading.Event()

    def run(words: list[str], *rest) -> Iterator[str]:
        if words[words.index("--lr") + 1] == "0.001":
            assert asked.wait(60)
            trains.set()
        yield from pretended(words, *rest)

    def evaluates(module: str, words: list[str], seconds: float) -> None:
        asked.set()
        assert trains.wait(60)
        loss = {"nll": 2.5, "by_package": {}, "seconds": 1.0}
        Path(words[0], "evaluate.json").write_text(json.dumps({"tasks": {"loss": loss}}))

    options = asked_for(tmp_path, pretend(30).tokens, 90, "7:1/2e-3", "softmax/1e-3", "--beside")
    found = session.session(options, run, evaluates)
    assert found == dict.fromkeys(("7:1/2e-3", "softmax/1e-3"), "complete, with loss")
    runs = {run.variant: run for run in results.load(tmp_path / "out")}
    assert [(run.about["lr"], results.loss_of(run), run.about["shared"]) for run in (runs["7:1"], runs["softmax"])] == [
        (2e-3, 2.5, False), (1e-3, 2.5, True),
    ]  # fmt: skip
    assert runs["7:1"].speed and runs["softmax"].speed is None


def test_a_session_ends_with_what_an_evaluation_beside_it_ends_with(pretend, tmp_path):
    def evaluates(*_) -> None:
        raise KeyError("rows")

    with pytest.raises(KeyError, match="rows"):
        session.session(asked_for(tmp_path, pretend(30).tokens, 60, "7:1", "--beside"), pretended, evaluates)


def test_flags_are_taken_by_the_entry_point_and_all_but_the_attention_is_equal(pretend, monkeypatch):
    """For every variant and size: parsed and checked as in a run, without the packages that the machine may lack."""
    pretend_without(monkeypatch, "transformer_engine", "apex")
    base = None
    for size, name in [*(("base", name) for name in VARIANTS), ("base-32k", "lightning"), ("fidelity", "lightning")]:
        options = pretend(1, "--variant", name, "--size", size, "--tokens", "60e6")
        words = train.command(options, Path("/folder"), gpu=True)
        assert words[:2] == ["-m", "lightning_megatron.pretrain"] or words[1] == "pretended_megatron"
        args = parse_flags(monkeypatch, " ".join(words[2:]), model="")
        refuse_flags(args)
        assert args.bf16 and args.cross_entropy_loss_fusion and args.exit_signal_handler
        assert not args.check_for_nan_in_loss_and_grad and args.dataloader_inter_document_masking
        shared = ("seq_length", "global_batch_size", "train_iters", "seed", "lr", "min_lr", "lr_warmup_iters")
        held = [getattr(args, key) for key in (*shared, "num_layers", "hidden_size", "weight_decay", "clip_grad")]
        base = held if name == "lightning" else base
        assert held == base, (size, name)
        assert args.global_batch_size * args.seq_length == SIZES[size].batch * SIZES[size].seq_length
    tokens_a_step = {SIZES[x].batch * SIZES[x].seq_length for x in ("base", "base-32k")}
    assert len(tokens_a_step) == 1


def curve(order: int, shift: float = 0.0, steps: int = 2000) -> list[float]:
    """Losses that fall, amid the noise of 0.1 nats that batches make in the data order ``order``, then ``shift``."""
    batches = random.Random(order)
    return [3 + 7 * math.exp(-i / 150) + batches.gauss(0, 0.1) + shift * (i >= 200) for i in range(steps)]


@pytest.mark.parametrize("shift, within", [(0.001, True), (0.03, False), (-0.03, False)])
def test_a_shifted_curve_is_told_from_the_noise_of_batches(shift, within):
    """The mean absolute difference of two data orders hides a shift of 0.03 nats; means of blocks do not."""
    curves = {"a": curve(1), "a-seed2": curve(2), "b": curve(1, shift)}
    found = fidelity.distances(curves, "a")["b"]
    seeds = fidelity.distances(curves, "a")["a-seed2"]
    assert found["mean"] < 0.3 * seeds["mean"]  # of no power
    assert found["largest"] == pytest.approx(abs(shift)) and found["largest_of_seeds"] == seeds["largest"]
    assert (found["largest"] <= found["largest_of_seeds"]) == within


def test_held_out_losses_are_compared_with_the_seeds_of_the_same_arithmetic():
    curves = {name: [4.0, 3.0] for name in ("a", "a-seed2", "b", "c", "c-seed2")}
    losses = {"a": 2.5, "a-seed2": 2.49, "b": 2.515, "c": 2.515, "c-seed2": 2.535}
    found = fidelity.distances(curves, "a", losses)
    assert {name: (row["to"], row["seeds"]) for name, row in found.items()} == {
        "a-seed2": ("a", "a-seed2"), "b": ("a", "a-seed2"), "c": ("a", "c-seed2"), "c-seed2": ("c", "c-seed2")
    }  # fmt: skip
    assert found["a-seed2"]["difference"] == pytest.approx(-0.01)
    assert found["b"]["difference"] == pytest.approx(0.015) and found["b"]["distance_of_seeds"] == pytest.approx(0.01)
    assert found["c"]["distance_of_seeds"] == pytest.approx(0.02)
    assert [row["within"] for row in found.values()] == [None, False, True, None]
    del losses["b"]
    row = fidelity.distances(curves, "a", losses)["b"]
    assert row["held_out"] is row["difference"] is row["within"] is None
    curves["b"] = [4.0, 3.1]
    assert fidelity.distances(curves, "a", losses)["b"]["within"] is False  # whatever its held-out loss will be
    alone = fidelity.distances({name: curves[name] for name in ("a", "a-seed2", "c-seed2")}, "a")
    assert (alone["c-seed2"]["to"], alone["c-seed2"]["seeds"]) == ("a", "a-seed2")


def test_curves_are_written_then_all_paths_are_evaluated_at_once(pretend, tmp_path):
    one, asked, paths = pretend(6), [], fidelity.ON_CPU[:2]
    words = ["train", "--data", str(one.data), "--runs", str(one.runs), "--size", "tiny", "--steps", "6"]
    options = fidelity.parser().parse_args(words)
    options.questions = ["--loss-tokens", "9"]

    def evaluates(module: str, words: list[str], seconds: float) -> None:
        assert list(fidelity.held(one.runs)["curves"]["steps"].values()) == [6, 6] and seconds < options.seconds
        asked.append((module, words[2:]))
        for folder, nll in zip(words[:2], (2.5, 2.25), strict=True):
            (Path(folder) / "evaluate.json").write_text(json.dumps({"tasks": {"loss": {"nll": nll}}}))

    fidelity.train_paths(options, paths, pretended, evaluates)
    more = ["--data", str(tmp_path), "--tasks", "loss", "--loss-tokens", "9"]
    assert asked == [("examples.quality.evaluate", more)]
    found = fidelity.held(one.runs)["curves"]
    (row,) = found["distances"].values()
    assert found["held_out"] == dict(zip(paths, (2.5, 2.25), strict=True)) and row["difference"] == -0.25
    text = "\n".join(report.fidelity({"curves": found}))
    assert "| `torch-fp32` | 6 | - | - | 2.50000 | - | - | - |" in text
    assert "| `torch-fp32-seed2` | 6 | 0.00000 | 0.00000 | 2.25000 | -0.25000 | 0.25000 | - |" in text
    options.steps, options.seconds = 100_000, 33
    fidelity.train_paths(options, paths, pretended, evaluates)
    assert len(asked) == 1 and set(fidelity.held(one.runs)["curves"]["held_out"]) == set()  # not complete


@pytest.mark.parametrize("start", [False, True])
def test_exact_path_computes_in_fp64(rng, start):
    """Outputs, states and gradients are those of fp64, rounded once; those of fp32 are others."""

    def evaluate(attn, dtype, kind=None):
        given = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, state)]
        how = dict(group=None, output_final_state=True, initial_state=given[3] if start else None, backend=kind)
        o, last = attn(*given[:3], decay.to(dtype), **how)
        grads = torch.autograd.grad((o, last), given[: 3 + start], (do.to(dtype), dlast.to(dtype)))
        return [x.to(torch.float32) for x in (o, last, *grads)]

    draw = functools.partial(torch.randn, generator=rng, dtype=torch.float32)
    q, k, v, do = (draw(2, 150, 3, 16) for _ in range(4))
    state, dlast = draw(2, 3, 16, 16), draw(2, 3, 16, 16)
    decay = torch.tensor([-0.3, -0.01, 0.0])
    want = evaluate(parallel.lightning_attn, torch.float64, "torch")
    found = evaluate(exact.exactly(parallel.lightning_attn), torch.float32, "auto")
    rough = evaluate(parallel.lightning_attn, torch.float32, "torch")
    for x, y, other in zip(want, found, rough, strict=True):
        assert torch.equal(x, y) and not torch.equal(x, other)


def test_a_path_that_diverged_is_told(tmp_path):
    folders = {}
    for name, losses in {"a": [4.0, 3.0], "a-seed2": [4.0, 3.1], "b": [4.0, math.nan]}.items():
        folders[name] = folder = tmp_path / name
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "checkpoint" / train.TRACKER).write_text("2")
        diverged = {"diverged": 2} if name == "b" else {}
        (folder / "run.json").write_text(json.dumps({"steps": 2} | diverged))
        (folder / "losses.jsonl").write_text("".join(json.dumps({"loss": x}) + "\n" for x in losses))
    found = fidelity.compare(folders, "tiny")
    assert set(found["distances"]) == {"a-seed2"} and found["distances"]["a-seed2"]["largest"] == pytest.approx(0.1)
    lines = report.fidelity({"curves": found})
    assert "| `b` | 2 | - | - | diverged at step 2 | - | - | - |" in lines
    assert "| `a-seed2` | 2 | 0.10000 | 0.10000 | missing | missing | missing | - |" in lines
    (folders["a-seed2"] / "run.json").write_text(json.dumps({"steps": 2, "diverged": 2}))
    with pytest.raises(RuntimeError, match="a-seed2 diverged at step 2, so nothing can be compared"):
        fidelity.compare(folders, "tiny")


# ---- all of it -------------------------------------------------------------------------------------------------------


def lines_of(words: list[str], log: Path, gpu: bool, seconds: float) -> list[str]:
    """``train.launch``, from the server that has imported Megatron."""
    _, module, *flags = words
    text = run_pretrain(flags, module=module).log
    log.write_text(text)
    return text.splitlines()


def cut_at(step: int) -> train.Run:
    """``smoke.cut_at``, likewise."""

    def cut(words: list[str], log: Path, gpu: bool, seconds: float) -> Iterator[str]:
        env = {"LIGHTNING_TESTS_KILL": json.dumps([[0], step, "step", 0])}
        run = run_pretrain(words[2:], module="tests.helpers.killed_pretrain", env=env, check=False)
        assert not run.ok
        yield from run.log.splitlines()
        raise RuntimeError("killed")

    return cut


def begin(module: str, words: list[str], seconds: float) -> None:
    run_pretrain(words, module=module)


TINY = smoke.Scale(
    "tiny", 18, 12, 200_000, 4,
    ("--loss-tokens", "1300", "--context-tokens", "1100", "--pairs", "4", "--cases", "1", "--depths", "0.5",
     "--multiples", "1", "4"),
)  # fmt: skip


def test_pipeline(tmp_path: Path):
    """What ``make quality-smoke`` runs and checks, smaller: but for the time limit, which is tested above."""
    pytest.importorskip("datasketch")
    smoke.pipeline(smoke.Pipeline(tmp_path, TINY, lines_of, begin, cut_at))
    (folder,) = (tmp_path / "runs").glob("softmax_*")
    tasks = lambda: json.loads((folder / "evaluate.json").read_text())["tasks"]
    before, words = tasks(), ["--data", str(tmp_path / "data"), "--loss-tokens", "200"]
    begin("examples.quality.evaluate", [str(folder), *words, "--tasks", "loss", "--again"], 600)
    assert tasks()["loss"]["windows"] == 1 < before["loss"]["windows"]
    assert {**tasks(), "loss": None} == {**before, "loss": None}  # the other tasks are kept
    # a task that was cut after the needles of the first length goes on with the second
    path = folder / "evaluate.json"
    found = json.loads(path.read_text())
    first = [
        row | {"gain": 7.0} for row in found["tasks"]["needle"]["rows"] if row["length"] == SIZES["tiny"].seq_length
    ]
    found["tasks"]["needle"] |= {"rows": first, evaluate.UNFINISHED: 1}
    path.write_text(json.dumps(found))
    questions = [str(folder), "--data", str(tmp_path / "data"), *TINY.questions]
    ask = lambda *words: evaluate.evaluate(folder, evaluate.parser().parse_args([*questions, *words]))
    with pytest.raises(ValueError, match=r"task needle was begun with --cases 1, not 2: give those, or --again"):
        ask("--cases", "2")
    begin("examples.quality.evaluate", questions, 600)
    needle, rest = tasks()["needle"], before["needle"]["rows"][len(first) :]
    assert needle["rows"][: len(first)] == first and rest
    for row, wanted in zip(needle["rows"][len(first) :], rest, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert evaluate.UNFINISHED not in needle
    stats = tmp_path / "data" / "stats.json"
    stats.write_text(stats.read_text().replace('"train_text_document.bin": "', '"train_text_document.bin": "0'))
    with pytest.raises(ValueError, match="was trained on data of SHA-256 .*: give the folder of the training"):
        ask()
    words = ["--variant", "3:1", "--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--size", "tiny"]
    words += ["--tokens", str(18 * 2 * 128), "--lr", "3e-3"]
    with pytest.raises(ValueError, match="is of a run with other data"):
        train.train(train.parser().parse_args(words), lines_of)
