"""prepare_data.py and odd inputs: nothing is read as something else unsaid, and a failure leaves results alone."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

import prepare_data

WORDS = [f"the {i} words of document {i}, and {'some more ' * (i % 7)}text\n" for i in range(300)]
OTHER = " ".join("".join(random.Random(i).choices("abcdefgh", k=6)) for i in range(500))  # enough for 300 pieces
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(WORDS))


def run(out: Path, *arguments: object) -> None:
    prepare_data.main(["--out", str(out), *map(str, arguments)])


def error_of(out: Path, *arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        run(out, *arguments)
    assert isinstance(error.value.code, str), "argparse's own error"
    return error.value.code


def documents_in(out: Path) -> list[str]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    sets = [IndexedDataset(str(out / f"{part}_text_document")) for part in ("train", "valid")]
    return sorted(processor.decode(ids[:-1].tolist()) for dataset in sets for ids in dataset)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.jsonl").write_text(LINES)
    run(folder / "out", "--text", folder / "text.jsonl", "--vocab-size", 300)
    return folder / "out"


@pytest.mark.parametrize("name", ["text.json", "text.ndjson", "text", "text.txt"])
def test_json_lines_are_found_by_content(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / name).write_text(LINES)
    run(tmp_path / "out", "--text", tmp_path / name, "--vocab-size", 300)
    assert documents_in(tmp_path / "out") == sorted(WORDS)
    if not name.endswith(".ndjson"):
        assert f"read as JSON lines, because every line is an object: {tmp_path / name}" in capsys.readouterr().out


def test_json_that_is_no_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    array, log, prose = tmp_path / "array.json", tmp_path / "log.txt", tmp_path / "prose.txt"
    array.write_text(json.dumps([{"text": "a"}], indent=1))
    assert "array.json is JSON, but not JSON lines" in error_of(tmp_path / "out", "--text", array)
    log.write_text('{"level": 1}\n{"level": 2}\n')
    prose.write_text("{ a set }\n" + OTHER)
    run(tmp_path / "out", "--text", log, prose, "--vocab-size", 300)
    said = capsys.readouterr().out
    assert f"read as plain text: {log} looks like JSON lines" in said and "prose.txt" not in said
    assert documents_in(tmp_path / "out") == sorted([log.read_text(), prose.read_text()])


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (12345, '"text" is 12345, but must be a string'),
        (None, '"text" is null, but must be a string'),
        (["a", "b"], '"text" is ["a", "b"], but must be a string'),
        ("\ud800", "half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("name", ["text.jsonl", "text.txt"])
def test_text_that_is_no_string(name: str, value: object, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(LINES + "\n" + json.dumps({"text": value}) + "\n")
    message = error_of(tmp_path / "out", "--text", tmp_path / name)
    assert f"{name}, line {len(WORDS) + 2}" in message and complaint in message


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_tokenizer(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "text.txt").write_text("some words " * 100)
    monkeypatch.setattr(prepare_data, "train_tokenizer", None)
    message = error_of(Path("/proc/nowhere"), "--text", tmp_path / "text.txt")
    assert "--out /proc/nowhere cannot be written to (" in message


def test_a_line_without_text_among_others(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(LINES + '{"txt": "b"}\n')
    assert f"line {len(WORDS) + 1} is no JSON object with" in error_of(tmp_path, "--text", tmp_path / "text.txt")


@pytest.mark.parametrize("value", ["9" * 10_000, "[" * 100_000 + "]" * 100_000], ids=["long", "deep"])
def test_json_that_python_does_not_take(value: str, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(LINES + f'{{"text": {value}}}\n')
    message = error_of(tmp_path / "out", "--text", tmp_path / "text.jsonl")
    assert f"text.jsonl, line {len(WORDS) + 1} is no JSON object with" in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_byte_order_marks_are_not_text(encoding: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [f"é 漢字 {word}" for word in WORDS]
    text = "".join(words) if name == "text.txt" else "".join(json.dumps({"text": word}) + "\n" for word in words)
    mark = "\ufeff" if encoding.endswith("-be") else ""  # Python writes the others' itself
    (tmp_path / name).write_bytes((mark + text).encode(encoding))
    (tmp_path / "more.txt").write_text(OTHER)
    run(tmp_path / "out", "--text", tmp_path / name, tmp_path / "more.txt", "--vocab-size", 300)
    expected = [text] if name == "text.txt" else words
    assert documents_in(tmp_path / "out") == sorted([*expected, OTHER])
    named = f"decoded as {encoding.upper()}" in capsys.readouterr().out
    assert named == (encoding != "utf-8-sig")


def test_a_mark_that_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff\xfea")
    assert "no text in 1 files" in error_of(tmp_path / "out", "--text", tmp_path / "text.txt")
    assert "text.txt is not UTF-16-LE (byte 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-bytes", "0"], "--max-bytes 0.0 must be above 0"),
        (["--max-bytes=-1e6"], "--max-bytes -1000000.0 must be above 0"),
        (["--max-bytes", "nan"], "--max-bytes nan must be above 0"),
        (["--vocab-size", "0"], "--vocab-size 0 must be at least 1"),
        (["--vocab-size=-5"], "--vocab-size -5 must be at least 1"),
        (["--vocab-size", "1"], "--vocab-size 1 does not fit"),
        (["--sample-bytes", "0"], "--sample-bytes 0 must be at least 1"),
        (["--held-out", "nan"], "--held-out nan must be"),
        (["--tokenizer-model", __file__], "is no SentencePiece model"),
        (["--tokenizer-model", "/dev/null"], "--tokenizer-model /dev/null does not exist"),
        (["--tokenizer-model", __file__, "--vocab-size", "300"], "--vocab-size 300 is for a new tokenizer"),
    ],
    ids=lambda value: "_".join(map(str, value))[:30] if isinstance(value, list) else "",
)
def test_refused_before_anything_is_written(arguments: list[str], message: str, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(LINES)
    before = contents(prepared)
    assert message in error_of(prepared, "--text", tmp_path / "text.jsonl", *arguments)
    assert contents(prepared) == before
    assert message in error_of(tmp_path / "new", "--text", tmp_path / "text.jsonl", *arguments)
    assert not (tmp_path / "new").exists()


def test_an_empty_tokenizer_model(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.model").touch()
    (tmp_path / "text.jsonl").write_text(LINES)
    arguments = ["--text", tmp_path / "text.jsonl", "--tokenizer-model", tmp_path / "empty.model"]
    before = contents(prepared)
    assert "empty.model is no SentencePiece model" in error_of(prepared, *arguments)
    assert contents(prepared) == before


def test_a_step_that_fails_late_leaves_the_old_dataset(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk does: the second dataset cannot be written."""
    (tmp_path / "text.jsonl").write_text(LINES.replace("words", "other words"))
    write, done = prepare_data.write_dataset, []

    def full(documents, processor, prefix):
        if done:
            raise OSError(28, "No space left on device", str(prefix))
        done.append(prefix)
        return write(documents, processor, prefix)

    monkeypatch.setattr(prepare_data, "write_dataset", full)
    before = contents(prepared)
    assert "No space left on device" in error_of(prepared, "--text", tmp_path / "text.jsonl", "--vocab-size", 300)
    assert done and contents(prepared) == before
    assert not [path for path in prepared.iterdir() if path.is_dir()]


def test_a_new_dataset_replaces_the_old_one_whole(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "text.jsonl").write_text(LINES)
    run(out, "--text", tmp_path / "text.jsonl", "--vocab-size", 320)
    assert contents(out) != contents(prepared)
    run(out, "--text", tmp_path / "text.jsonl", "--vocab-size", 300)
    assert contents(out) == contents(prepared)
    run(out, "--text", tmp_path / "text.jsonl", "--tokenizer-model", out / "tokenizer.model")  # its own
    assert contents(out) == contents(prepared)


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(LINES)
    (tmp_path / "out").write_text("thesis")
    assert "is a file; give a folder" in error_of(tmp_path / "out", "--text", tmp_path / "text.jsonl")
    below = tmp_path / "out" / "below"
    assert str(below) in error_of(below, "--text", tmp_path / "text.jsonl", "--vocab-size", 300)
    assert (tmp_path / "out").read_text() == "thesis"


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A permission that root has anyway: the operating system's answer is put in its place."""
    (tmp_path / "text.txt").write_text("text\n")

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert f"{tmp_path / 'text.txt'} cannot be read: Permission denied" in error_of(
        tmp_path / "out", "--text", tmp_path / "text.txt"
    )


def test_files_of_other_endings_in_a_folder_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(OTHER)
    (folder / "b.parquet").touch()
    (folder / "c.json").write_text(LINES)
    run(tmp_path / "out", "--text", folder, "--vocab-size", 300)
    assert f"left out of {folder}: 2 files of other endings (1 x .parquet, 1 x .json)" in capsys.readouterr().out


def test_a_long_document_is_not_held_out_whole() -> None:
    book, notes = "page of a book\n" * 10_000, [f"note {i}\n" for i in range(9)]
    for documents in ([book, *notes], [notes[0], book, *notes[1:]], [*notes, book]):
        train, valid = prepare_data.split(documents, 0.02)
        assert 0.01 < sum(map(len, valid)) / sum(map(len, documents)) < 0.04
        whole = sorted(document for document in documents if document != book)
        parts = [part for part in train + valid if part not in whole]
        assert sorted(part for part in train + valid if part in whole) == whole
        assert "".join(parts) == book and all(part.endswith("\n") for part in parts)


@pytest.mark.parametrize("text", ["Title\n" + "words " * 10_000, "words " * 10_000, "Title\nwords"])
def test_the_end_of_a_single_document_is_held_out_wherever_its_lines_end(text: str) -> None:
    (train,), (valid,) = prepare_data.split([text], 0.1)
    assert train + valid == text and 0.05 * len(text) < len(valid) < 0.25 * len(text)


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "notes"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").symlink_to(folder / "a.txt")
    (folder / "again").symlink_to(folder)
    files = prepare_data.text_files([folder, folder / "a.txt", folder / "more" / ".." / "a.txt"])
    assert files == [folder / "a.txt"]
    printed = capsys.readouterr().out
    assert printed.count("the same file as") == 3 and f"{folder / 'again'} is a link to a folder" in printed


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path.rglob() leaves it out without a word."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="closed cannot be read: Permission denied"):
        prepare_data.text_files([tmp_path])


def test_utf_16_without_a_mark_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As UTF-8 it is a NUL between any two letters."""
    (tmp_path / "a.txt").write_text("words of a document", "utf-16-le")
    (tmp_path / "b.txt").write_text("words\0")
    files = prepare_data.text_files([tmp_path])
    assert list(prepare_data.read_documents(files)) == ["words\0"]
    assert "a.txt is U+0000 every few characters, as UTF-16 without" in capsys.readouterr().out


def test_a_pipe_is_neither_a_file_nor_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a file nor a folder" in error_of(tmp_path / "out", "--text", tmp_path / "pipe")


def test_a_run_that_is_ended_leaves_nothing_behind(prepared: Path, tmp_path: Path) -> None:
    """By SIGTERM; that of a run that was killed is named."""
    out, held = tmp_path / "out", "import os, signal, sys; import prepare_data, stoppable\n"
    held += "prepare_data.entropy = lambda counts: os.kill(os.getpid(), signal.{})\n"
    held += "stoppable.run(prepare_data.main, 'again')"
    words = ["--out", out, "--text", prepared.parent / "text.jsonl", "--tokenizer-model", prepared / "tokenizer.model"]
    env = os.environ | {"PYTHONPATH": str(Path(prepare_data.__file__).parent)}
    for name, status, left in (("SIGTERM", 143, 0), ("SIGKILL", -9, 1)):
        command = [sys.executable, "-c", held.format(name), *map(str, words)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == status and len(list(out.iterdir())) == left, done.stderr
        assert status < 0 or "stopped; again" in done.stderr
    done = subprocess.run([sys.executable, prepare_data.__file__, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0 and "is of a run that was killed, or that still runs" in done.stdout
