"""lightning-convert: help, exit status, one line for an error, no traceback; memory and progress."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_megatron.convert import cli, export_checkpoint, import_checkpoint, work
from lightning_megatron.convert.cli import main, parse_size
from lightning_megatron.convert.plan import Task
from lightning_megatron.models.units import Unit
from tests.convert.helpers import assert_model
from tests.helpers.convert import CONFIG, tensors_of, write_model
from tests.launch import spawn


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write_model(tmp_path / "hf")
    hf, m, out = (str(tmp_path / name) for name in ("hf", "a model", "out"))
    assert main(["import", hf, m]) == 0
    said = capsys.readouterr().out
    assert f"train with --load '{m}' --use-checkpoint-args, or with the flags:\n  --hidden-size 16 " in said
    assert re.search(r"imported 41 tensors, 0\.0 GB, in [\d.]+ s \(\d+ MB/s\): .*/a model\n", said)
    assert main(["export", m, out, "--max-shard-size", "8KB", "--jobs", "2"]) == 0
    assert re.search(r"exported 41 tensors, 0\.0 GB, as \d files, ", capsys.readouterr().out)
    assert_model(tmp_path / "out", tensors)
    assert main(["roundtrip", hf]) == 0
    assert "41 of 41 tensors are the same bit for bit\n" in capsys.readouterr().out
    changed = tensors | {"model.layers.0.attn.slope_rate": tensors["model.layers.0.attn.slope_rate"] + 1}
    write_model(tmp_path / "other", CONFIG, changed)
    assert main(["roundtrip", str(tmp_path / "other"), "--work", str(tmp_path)]) == 1


@pytest.mark.parametrize("package", ["safetensors", "megatron.training"])
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["roundtrip", "."]) == 1
    said = capsys.readouterr().err
    assert f"{package} is not installed: pip install 'lightning-megatron[convert]'" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (["import", "no/where", "m"], 2, "no/where: there is no such folder; only local folders are taken"),
        (["import", "bad", "m"], 1, "config.json is not JSON"),
        (["import", "."], 2, "the following arguments are required: TARGET"),
        (["import", "bad", "m", "--jobs", "0"], 2, "argument --jobs: '0' must be a whole number of at least 1"),
        (["import", "bad", "s3://bucket/m"], 2, "argument TARGET: s3://bucket/m: only local folders are taken"),
        (["import", "bad", ""], 2, "argument TARGET: a path is empty"),
        (["export", "bad", "m", "--like", ""], 2, "argument --like: a path is empty"),
        (["export", "bad", "m", "--step", "-1"], 2, "'-1' must be the number of an iteration, as 500"),
        (["export", "bad", "m", "--max-shard-size", "many"], 2, "'many' is no size; write for example 5GB"),
        (["export", "bad", "m"], 1, "it has neither latest_checkpointed_iteration.txt nor metadata.json"),
        (["verify", "bad"], 2, "the following arguments are required: MEGATRON_CHECKPOINT"),
        (["verify", "bad", "m", "--tolerance", "0"], 2, "argument --tolerance: '0' must be a number above 0, as 1e-5"),
        (["verify", "bad", "m", "--tensors-only", "--prompt", "x"], 2, "--tensors-only runs no model; leave one"),
        (["verify", "bad", "m", "--tensors-only"], 1, "config.json is not JSON"),
        ([], 2, "the following arguments are required: import | export | roundtrip | verify"),
    ],
)
def test_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text("{")
    try:
        found: Any = main(arguments)
    except SystemExit as error:
        found = error.code
    assert found == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lightning-convert: error: ") and said in last
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "hf")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "wait", interrupt)
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "m")]) == 130
    assert capsys.readouterr().err.endswith("lightning-convert: stopped; the same command goes on from here\n")
    assert not (tmp_path / "m").exists() and (tmp_path / "m.partial").exists()
    assert main(["roundtrip", str(tmp_path / "hf")]) == 130  # begins anew
    assert capsys.readouterr().err.endswith("lightning-convert: stopped\n")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "m.partial"}


@pytest.mark.parametrize("command", [[], ["import"], ["export"], ["roundtrip"], ["verify"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(len(line) <= 120 for line in text.splitlines())
    if not command:  # the examples are commands that there are
        examples = re.findall(r"^  (lightning-convert .*?) *(?:#.*)?$", text, re.MULTILINE)
        assert len(examples) == 5
        for example in examples:
            assert cli.parser().parse_args(example.split()[1:]).source


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("1.5 MB", 1500000), ("2GiB", 2**31), ("7", 7), ("3kb", 3000), ("1T", 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "5 apples", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines now and then, a bar on a terminal; both end at the whole."""
    write_model(tmp_path / "hf")
    monkeypatch.setattr(work, "_REPORT_EVERY", 0.0)
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"import: 0\.0 of 0\.0 GB, \d+ MB/s", last)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    import_checkpoint(tmp_path / "hf", tmp_path / "m2")
    assert re.search(r"import: 100%\|", capsys.readouterr().err)


def test_a_failed_part_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and not when the main thread gets to it: here that wakes up only after all parts have ended."""
    everything = work.wait
    monkeypatch.setattr(work, "wait", lambda futures, return_when: everything(futures))
    task = Task(Unit((), (), lambda x: [], lambda x: []), ())
    began, failed, ends = threading.Event(), threading.Event(), {}

    def write(part: work.Part, before: Callable[[Task], None]) -> None:
        if part.number == 0:
            assert began.wait(10)
            failed.set()
            raise OSError("no space left")
        began.set()
        assert failed.wait(10)
        try:
            for _ in range(200):
                before(task)
                time.sleep(0.01)
            ends[part.number] = "went on"
        except work.Stopped:
            ends[part.number] = "stopped"
            raise

    with pytest.raises(OSError, match="no space left"):
        work.run_parts([work.Part(i, (task,)) for i in range(3)], 2, write, work.Progress("test", 0))
    assert ends == {1: "stopped"}  # and the third never began


# ---- memory ----------------------------------------------------------------------------------------------------------

LARGE = CONFIG | {"hidden_size": 1024, "expert_size": 2048, "num_experts": 10, "num_layers": 1, "vocab_size": 8000}


def measure(rank: int, world: int, folder: str) -> list[int]:
    """Import and export in a new process; the growth of its memory in bytes."""
    from tests.benchmarks.convert import Watch
    from tests.helpers.convert import register

    register()
    growths = []
    for command, source, target in ((import_checkpoint, "hf", "m"), (export_checkpoint, "m", "out")):
        with Watch() as watch:
            command(Path(folder, source), Path(folder, target), jobs=1)
        growths.append(watch.growth)
    return growths


def test_memory_is_of_a_unit(tmp_path: Path) -> None:
    """Not of the model, nor of a part, which holds all of it."""
    tensors = write_model(tmp_path / "hf", LARGE)
    total, largest = sum(x.nbytes for x in tensors.values()), max(x.nbytes for x in tensors.values())
    (growths,) = spawn(measure, 1, str(tmp_path))
    assert total > 8 * largest
    assert all(0 < growth < 4 * largest for growth in growths), (growths, largest)
    assert_model(tmp_path / "out", tensors)


def test_memory_of_threads() -> None:
    """Small units hold at most the limit together; a larger one is held beside them, but no two of these."""
    memory = work.Memory(10)
    order: list[str] = []

    def take(name: str, nbytes: int) -> None:
        with memory.hold(nbytes):
            order.append(name)

    with memory.hold(6), memory.hold(100):
        threads = [threading.Thread(target=take, args=x) for x in (("small", 6), ("large", 11))]
        for thread in threads:
            thread.start()
        take("fits", 4)
        assert not threads[0].join(0.05) and not threads[1].join(0.05)  # both wait
        assert order == ["fits"]
    for thread in threads:
        thread.join(5)
    assert sorted(order[1:]) == ["large", "small"] and memory._held == 0


def test_parts_are_of_the_size_asked_for() -> None:
    from lightning_megatron.convert.plan import plan_import
    from tests.helpers.convert import Toy, toy_args

    tensors = tensors_of(CONFIG)
    family = Toy()
    tasks = plan_import(family.units(toy_args(family.flags(CONFIG))), tensors, "here")
    parts = work.split(tasks, 5000)
    assert [task for part in parts for task in part.tasks] == tasks
    assert [part.number for part in parts] == list(range(len(parts)))
    assert all(5000 <= part.nbytes < 5000 + max(task.nbytes for task in tasks) for part in parts[:-1])
