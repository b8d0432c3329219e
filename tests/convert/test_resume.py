"""A run that was killed leaves nothing that looks complete, and the next one goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_megatron.convert import ConvertError, export_checkpoint, import_checkpoint, work
from lightning_megatron.convert.cli import main
from lightning_megatron.convert.errors import UsageError
from lightning_megatron.convert.partial import Partial
from tests.convert.helpers import assert_model
from tests.helpers.convert import CONFIG, tensors_of, write_model

SIZES = {"part_bytes": 5000, "jobs": 1}


def killed(what: Callable[..., object], *args: object, at: str, after: int = 0, **options: object) -> None:
    """Run in a process of its own, which is killed when it calls ``at`` of Partial for the (after + 1)th time."""

    def body() -> None:
        calls = 0
        before = getattr(Partial, at)

        def die(self: Partial, *args: object) -> object:
            nonlocal calls
            calls += 1
            if calls > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(self, *args)

        setattr(Partial, at, die)
        what(*args, **options)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("at, after", [("finish", 0), ("finish", 2), ("commit", 0)])
def test_killed(tmp_path: Path, at: str, after: int) -> None:
    tensors = write_model(tmp_path / "hf")
    for command, source, target in (
        (import_checkpoint, tmp_path / "hf", tmp_path / "m"),
        (export_checkpoint, tmp_path / "m", tmp_path / "out"),
    ):
        killed(command, source, target, at=at, after=after, **SIZES)
        assert not target.exists() and target.with_name(f"{target.name}.partial").exists()
        said: list[str] = []
        command(source, target, say=said.append, **SIZES)  # type: ignore[operator]
        if at == "finish" and after:
            assert said[0].startswith(f"going on: {after} of ")
        else:
            assert said[0].startswith("going on: ") == (at == "commit")
        assert not target.with_name(f"{target.name}.partial").exists()
    assert_model(tmp_path / "out", tensors)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_terminated(tmp_path: Path) -> None:
    """As a scheduler stops a job: a roundtrip removes what it wrote, twice the model, as with Ctrl-C."""
    write_model(tmp_path / "hf")

    def body() -> None:
        work.wait = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
        sys.exit(main(["roundtrip", str(tmp_path / "hf")]))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM and [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_finished_parts_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "hf")
    killed(import_checkpoint, tmp_path / "hf", tmp_path / "m", at="commit", **SIZES)
    monkeypatch.setattr("lightning_megatron.convert.folder.Folder.read", None)
    import_checkpoint(tmp_path / "hf", tmp_path / "m", **SIZES)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("change", ["source", "options"])
def test_parts_of_another_run_are_not_used(tmp_path: Path, change: str) -> None:
    tensors = write_model(tmp_path / "hf")
    killed(import_checkpoint, tmp_path / "hf", tmp_path / "m", at="finish", after=3, **SIZES)
    options = SIZES | ({"part_bytes": 3000} if change == "options" else {})
    if change == "source":
        (tmp_path / "hf").rename(tmp_path / "before")
        tensors = write_model(tmp_path / "hf", CONFIG, tensors_of(CONFIG, seed=1))
    said: list[str] = []
    import_checkpoint(tmp_path / "hf", tmp_path / "m", say=said.append, **options)
    assert said[0].endswith("is of another source, version or options: starting from the beginning")
    assert not any(text.startswith("going on") for text in said)
    export_checkpoint(tmp_path / "m", tmp_path / "out")
    assert_model(tmp_path / "out", tensors)


def test_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is there until the new one is complete; what is not ours is never removed."""
    first = write_model(tmp_path / "hf")
    second = write_model(tmp_path / "other", CONFIG, tensors_of(CONFIG, seed=1))
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    export_checkpoint(tmp_path / "m", tmp_path / "out")
    for command, source, target in (
        (import_checkpoint, tmp_path / "other", tmp_path / "m"),
        (export_checkpoint, tmp_path / "m", tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match="is there already; choose another target, or replace it with --overwrite"):
            command(source, target)  # type: ignore[operator]
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(Partial, "finish", lambda *_: 1 / 0)
            command(source, target, overwrite=True)  # type: ignore[operator]
        assert_model(tmp_path / "out", first)
        command(source, target, overwrite=True)  # type: ignore[operator]
        assert not list(tmp_path.glob("*.partial"))
    assert_model(tmp_path / "out", second)
    (tmp_path / "m/iter_0000100").mkdir()
    (tmp_path / "out/notes").mkdir()
    for command, source, target in (
        (import_checkpoint, tmp_path / "other", tmp_path / "m"),
        (export_checkpoint, tmp_path / "m", tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match="holds other files than this command writes"):
            command(source, target, overwrite=True)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_killed_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one lies in the partial folder, and comes back even if the next run starts from the beginning."""
    tensors = write_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        rename = Path.rename

        def once(self: Path, target: Path) -> Path:
            if self.name == "out":
                raise RuntimeError("killed")
            return rename(self, target)

        patch.setattr(Path, "rename", once)
        import_checkpoint(tmp_path / "hf", tmp_path / "m", overwrite=True)
    assert not (tmp_path / "m").exists() and (tmp_path / "m.partial/old").exists()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Partial, "finish", lambda *_: 1 / 0)
        import_checkpoint(tmp_path / "hf", tmp_path / "m", overwrite=True, **SIZES)
    export_checkpoint(tmp_path / "m", tmp_path / "out")
    assert_model(tmp_path / "out", tensors)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    with (
        Partial(tmp_path / "m", {}, print, False),
        pytest.raises(ConvertError, match=r"another run writes .*m\.partial; wait for it"),
    ):
        import_checkpoint(tmp_path / "hf", tmp_path / "m")


def test_a_target_that_comes_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another run, or from a person: without --overwrite nothing is removed."""
    tensors = write_model(tmp_path / "hf")
    commit, thesis = Partial.commit, tmp_path / "m/thesis.tex"

    def late(self: Partial) -> None:
        thesis.parent.mkdir()
        thesis.write_text("x")
        commit(self)

    with monkeypatch.context() as patch, pytest.raises(ConvertError, match="m has come from elsewhere while this run"):
        patch.setattr(Partial, "commit", late)
        import_checkpoint(tmp_path / "hf", tmp_path / "m")
    assert thesis.read_text() == "x"
    thesis.rename(tmp_path / "thesis.tex")
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    export_checkpoint(tmp_path / "m", tmp_path / "out")
    assert_model(tmp_path / "out", tensors)


def test_partial_folder_of_the_user(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial/thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"m\.partial is not of a conversion"):
        import_checkpoint(tmp_path / "hf", tmp_path / "m")
    assert (tmp_path / "m.partial/thesis.tex").read_text() == "x"


def test_error_in_one_thread_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "hf")
    read = []

    def fail(self: object, name: str) -> torch.Tensor:
        read.append(name)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("lightning_megatron.convert.folder.Folder.read", fail)
    with pytest.raises(ConvertError, match="tensor .* of .*: Input/output error") as error:
        import_checkpoint(tmp_path / "hf", tmp_path / "m", part_bytes=1000, jobs=2)
    assert len(read) <= 2 and any(f"tensor {name} of " in str(error.value) for name in read)  # whichever comes first


def test_an_empty_target_is_used(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    (tmp_path / "m").mkdir()
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {"huggingface", "latest_checkpointed_iteration.txt", "release"}
