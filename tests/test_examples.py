"""What a user runs before and after training: the data pipeline, the plot, the scripts, and the search for a Python."""

import argparse
import collections
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import demo
import plot_loss
import prepare_data
import text_sources

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

TEXTS = [  # what a tokenizer likes to change
    "def f(x):\n\tif x:\n\t\treturn x  # two  spaces\n\n\n    return None   \n",
    "    indented\n        more\n   odd\n\tx\t\ty\n",
    "line\r\nline\rline\x0b\x0c\x00end",
    "naïve \ufeff café 漢字 🙂 e\u0301 \u00a0\u2003\u3000\u2028 ﬁ Å \u200b",
    "<s></s><unk><pad><0x0A> @@ ##",
    " ",
    "\n",
    "",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A few hundred kilobytes of documents."""
    files = text_sources.stdlib_files()[:20]
    return [text for text in TEXTS if text] + [path.read_text("utf-8") for path in files if path.stat().st_size]


@pytest.fixture(scope="module")
def prepared(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prepare_data's results for that corpus, half of it in files of a folder, half in one .jsonl file."""
    folder = tmp_path_factory.mktemp("text")
    half = len(corpus) // 2
    for number, text in enumerate(corpus[:half]):
        (folder / f"{number}.txt").write_bytes(text.encode())
    lines = tmp_path_factory.mktemp("more") / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus[half:]))
    out = tmp_path_factory.mktemp("prepared")
    prepare_data.main(
        ["--out", str(out), "--text", str(folder), str(lines), "--vocab-size", "600", "--held-out", "0.2"]
    )
    return out


@pytest.fixture(scope="module")
def processor(prepared: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))


def read_back(prefix: Path) -> list[np.ndarray]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert len(dataset.document_indices) == len(dataset) + 1  # one sequence a document
    return [dataset[i].copy() for i in range(len(dataset))]  # the dataset unmaps its memory when it goes


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_tokenizer_round_trip(processor: sentencepiece.SentencePieceProcessor, text: str) -> None:
    assert processor.decode(processor.encode(text)) == text


def test_tokenizer_round_trip_of_any_text(processor: sentencepiece.SentencePieceProcessor) -> None:
    chance = random.Random(0)
    alphabet = [*map(chr, range(256)), *(chr(chance.randrange(256, 0xD800)) for _ in range(500)), *"\n\n\t\t        "]
    alphabet = [c for c in alphabet if c != "\u2581"]  # SentencePiece's own sign for a space
    for _ in range(200):
        text = "".join(chance.choices(alphabet, k=200))
        assert processor.decode(processor.encode(text)) == text


def test_tokenizer_of_megatron(prepared: Path, processor: sentencepiece.SentencePieceProcessor) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = argparse.Namespace(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(prepared / "tokenizer.model"),
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,  # Megatron's defaults
        tokenizer_sentencepiece_legacy=False,
        **dict.fromkeys(("chat_template", "special_tokens", "metadata_path", "pad_vocab_size")),
    )
    tokenizer = build_tokenizer(args)
    assert tokenizer.eod == processor.eos_id() == 2
    assert tokenizer.vocab_size == 600
    for text in TEXTS:
        assert tokenizer.tokenize(text) == processor.encode(text)
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_datasets_hold_the_documents(
    prepared: Path, processor: sentencepiece.SentencePieceProcessor, corpus: list
) -> None:
    train, valid = (read_back(prepared / f"{name}_text_document") for name in ("train", "valid"))
    assert train and valid
    for ids in train + valid:
        assert ids.dtype == np.uint16
        assert ids[-1] == processor.eos_id()
        assert processor.eos_id() not in ids[:-1]
    texts = [processor.decode(ids[:-1].tolist()) for ids in train + valid]
    assert sorted(texts) == sorted(corpus)
    encoded = {text: processor.encode(text) for text in corpus}
    assert all(ids[:-1].tolist() == encoded[text] for ids, text in zip(train + valid, texts, strict=True))


def test_stats(prepared: Path, processor: sentencepiece.SentencePieceProcessor) -> None:
    stats = json.loads((prepared / "stats.json").read_text())
    train, valid = (read_back(prepared / f"{name}_text_document") for name in ("train", "valid"))
    tokens = [int(i) for ids in train for i in ids]
    size = sum(len(processor.decode(ids[:-1].tolist()).encode()) for ids in train)
    entropy = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in collections.Counter(tokens).values())
    assert stats["train_documents"] == len(train) and stats["valid_documents"] == len(valid)
    assert stats["train_tokens"] == len(tokens) and stats["valid_tokens"] == sum(map(len, valid))
    assert stats["train_bytes"] == size
    assert stats["vocab_size"] == 600
    assert stats["unigram_entropy"] == pytest.approx(entropy, rel=1e-9)
    assert stats["unigram_bits_per_byte"] == pytest.approx(entropy * len(tokens) / size / math.log(2), rel=1e-9)


def test_same_text_gives_the_same_files(prepared: Path, corpus: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    results = []
    for out in (tmp_path / "a", tmp_path / "b"):
        stale = out / "train_text_document" / "cache"
        stale.mkdir(parents=True)
        model = ["--tokenizer-model", str(prepared / "tokenizer.model")]
        prepare_data.main(["--out", str(out), "--text", str(text), "--max-bytes", "1e5", *model])
        assert not stale.exists()  # Megatron's index of earlier data
        assert json.loads((out / "stats.json").read_text())["train_bytes"] < 1e5
        results.append([path.read_bytes() for path in sorted(out.glob("*.*"))])
    assert results[0] == results[1]
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()


def test_a_single_document_is_cut_at_a_line() -> None:
    train, valid = prepare_data.split(["one line\n" * 100], 0.1)
    assert train == ["one line\n" * 90] and valid == ["one line\n" * 10]


def test_stdlib_files() -> None:
    files = text_sources.stdlib_files()
    assert len(files) > 200
    assert {"argparse.py", "textwrap.py"} <= {path.name for path in files}
    assert not any({"test", "tests", "site-packages"} & set(path.parts) for path in files)


def test_folder_and_encoding(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "b.txt").write_bytes("é\r\n".encode("latin-1"))
    (tmp_path / "a.md").write_bytes(b"a\r\n")
    (tmp_path / "c.bin").write_bytes(b"c")
    assert list(text_sources.read_documents(text_sources.text_files([tmp_path]))) == ["a\r\n"]
    assert "b.txt is not UTF-8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "text.jsonl does not exist"),
        ('{"text": "a"}\n{"txt": "b"}\n', [], "line 2 is no JSON object"),
        ("", [], "no text in 1 files"),
        ('{"text": "a"}\n', [], "cannot be split"),
        ('{"text": "word "}\n' * 9, ["--vocab-size", "5000"], "--vocab-size 5000 does not fit"),
        ('{"text": "a"}\n', ["--held-out", "2"], "--held-out 2.0 must be"),
        ('{"text": "a"}\n', ["--tokenizer-model", "missing"], "--tokenizer-model missing does not exist"),
    ],
)
def test_errors(content: str | None, arguments: list[str], message: str, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    if content is not None:
        text.write_text(content)
    with pytest.raises(SystemExit, match=message):
        prepare_data.main(["--out", str(tmp_path / "out"), "--text", str(text), *arguments])


LOG = """
some other line | lm loss: 9
 [2026-01-01 00:00:00.000000] iteration       10/      20 | consumed samples:           80 | elapsed time per \
iteration (ms): 500.0 | learning rate: 1.0E-03 | global batch size:     8 | lm loss: 4.000000E+00 | loss scale: 1.0 |
 validation loss at iteration 10 | lm loss value: 4.500000E+00 | lm loss PPL: 9.0E+01 |
 [2026-01-01 00:00:05.000000] iteration       20/      20 | consumed samples:          160 | elapsed time per \
iteration (ms): 250.0 | learning rate: 1.0E-04 | global batch size:     8 | lm loss: 3.000000E+00 | loss scale: 1.0 |
 validation loss at iteration 20 on validation set | lm loss value: 3.500000E+00 | lm loss PPL: 3.0E+01 |
"""


def test_plot(prepared: Path, tmp_path: Path) -> None:
    log, picture = tmp_path / "log", tmp_path / "loss.png"
    log.write_text(LOG)
    assert plot_loss.read_losses(LOG) == ({10: 4.0, 20: 3.0}, {10: 4.5, 20: 3.5})
    plot_loss.main(["--log", str(log), "--out", str(picture), "--stats", str(prepared / "stats.json")])
    assert picture.read_bytes().startswith(b"\x89PNG")
    log.write_text("Traceback")
    with pytest.raises(SystemExit, match="has no line"):
        plot_loss.main(["--log", str(log), "--out", str(picture)])


def test_demo_shows_progress() -> None:
    shown = [line for line in map(demo.Progress(), LOG.splitlines()) if line]
    assert shown[0].split() == ["held-out", "documents", "at", "iteration", "10:", "loss", "4.500"]
    assert shown[1].split() == ["iteration", "20/20", "loss", "3.000", "250", "ms", "each", "0", "s", "left"]


def test_demo_leaves_foreign_folders_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="not the demo's"):
        demo.main()
    assert (tmp_path / "thesis.txt").exists()


def test_demo_does_not_take_a_file_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "thesis.txt")])
    with pytest.raises(SystemExit, match="is a file"):
        demo.main()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.fixture
def words_of(tmp_path: Path):
    """``words_of(script, *arguments, **variables)``: what a script gives to torchrun."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    torchrun.chmod(0o755)

    def words(script: str, *arguments: str, **variables: str) -> list[str]:
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        command = ["bash", str(EXAMPLES / script), *arguments]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]

    return words


@pytest.fixture
def started(words_of, monkeypatch: pytest.MonkeyPatch):
    """``started(script, **variables)``: torchrun's own arguments, and what Megatron parses from the others."""
    from megatron.training.arguments import parse_args

    from lightning_megatron.training.arguments import add_arguments

    def start(script: str, **variables: str):
        words = words_of(script, "--lr", "0.5", **{"SAVE": "here and there"} | variables)
        module = words.index("-m")
        monkeypatch.setattr(sys, "argv", words[module + 1 :])
        args = parse_args(add_arguments)
        assert (args.num_layers, args.lr, args.save) == (24, 0.5, "here and there")
        assert args.use_distributed_optimizer and args.dist_ckpt_optim_fully_reshardable
        return words[:module], args

    return start


SMALL = (
    "--num-layers 2 --linear-attention-freq 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 "
    "--seq-length 32 --max-position-embeddings 32 "
    "--lr-warmup-iters 1 --num-workers 0 --log-interval 1 --eval-iters 1 --save-interval 2"
).split()


def test_scripts_go_on_from_the_checkpoints_of_each_other(prepared: Path, words_of, tmp_path: Path) -> None:
    """What they promise: one GPU, then tensor parallelism, then one again, for longer; a small model, on the CPU."""
    from .launch import run_pretrain

    variables = {"SAVE": str(tmp_path / "a save"), "GLOBAL_BATCH": "2", "MICRO_BATCH": "1"}
    variables |= {"DATA": str(prepared / "train_text_document"), "VALID": str(prepared / "valid_text_document")}
    variables |= {"TOKENIZER": str(prepared / "tokenizer.model")}

    def run(script: str, ranks: int, iterations: int, *arguments: str) -> str:
        words = words_of(script, *SMALL, *arguments, ITERATIONS=str(iterations), **variables)
        return run_pretrain(words[words.index("lightning_megatron.pretrain") + 1 :], ranks).log

    run("pretrain_1gpu.sh", 1, 4, "--exit-interval", "2")
    log = run("pretrain_tp2_sp.sh", 2, 4)
    assert "loaded checkpoint" in log and "at iteration 2" in log
    assert "tensor-parallel size 2 pads the vocabulary to 768 rows, 1 padded it to 640" in log
    log = run("pretrain_1gpu.sh", 1, 6, "--override-opt-param-scheduler")
    assert "at iteration 4" in log and " iteration        6/       6 |" in log

    # ... and long_context.sh from their weights, as it says; the second time from its own checkpoint
    variables |= {"SAVE": str(tmp_path / "long"), "SEQUENCE": "64", "GPUS": "2"}
    started = ["--linear-attention-freq", "2", "--pretrained-checkpoint", str(tmp_path / "a save")]
    started += ["--seq-length", "64", "--max-position-embeddings", "64"]
    log = run("long_context.sh", 2, 2, *started)
    assert "attempting to finetune with checkpoint in" in log and " iteration        2/       2 |" in log
    log = run("long_context.sh", 2, 4, *started, "--override-opt-param-scheduler")
    assert "at iteration 2" in log and " iteration        4/       4 |" in log


@pytest.mark.parametrize(("script", "gpus"), [("pretrain_1gpu.sh", "1"), ("pretrain_tp2_sp.sh", "2")])
def test_scripts_give_flags_that_exist(script: str, gpus: str, started) -> None:
    launcher, args = started(script)
    assert launcher == ["--standalone", "--nproc-per-node", gpus]
    assert args.linear_attention_freq == 8
    assert args.tensor_model_parallel_size == int(gpus) and args.sequence_parallel == (gpus == "2")


def test_long_context_script(started) -> None:
    launcher, args = started("long_context.sh", NODES="4", NODE_RANK="3", MASTER_ADDR="10.0.0.1")
    assert " ".join(launcher) == (
        "--nnodes 4 --node-rank 3 --master-addr 10.0.0.1 --master-port 29500 --nproc-per-node 8"
    )
    assert (args.seq_length, args.context_parallel_size, args.global_batch_size) == (2**20, 32, 1)
    assert args.loss_chunk == 8192 and args.recompute_granularity == "full"


def find_python(**environment: str) -> subprocess.CompletedProcess:
    script = str(EXAMPLES / "find_python.sh")
    return subprocess.run(["/bin/sh", script], env=environment, capture_output=True, text=True)


def test_find_python(tmp_path: Path) -> None:
    answer = find_python(PATH=os.environ["PATH"], HOME=os.environ.get("HOME", ""), PYTHON=sys.executable)
    assert answer.returncode == 0 and answer.stderr == ""
    version = subprocess.run([answer.stdout.strip(), "--version"], capture_output=True, text=True).stdout
    assert version.startswith(("Python 3.12", "Python 3.13"))

    pyenv = tmp_path / ".pyenv" / "versions" / "3.12.9" / "bin"
    pyenv.mkdir(parents=True)
    (pyenv / "python").symlink_to(answer.stdout.strip())
    answer = find_python(PATH="", HOME=str(tmp_path))
    assert answer.returncode == 0 and Path(answer.stdout.strip()).exists()


def test_find_python_says_what_to_do(tmp_path: Path) -> None:
    answer = find_python(PATH="", HOME=str(tmp_path))
    assert answer.returncode == 1 and answer.stdout == ""
    assert "No Python 3.12 or 3.13" in answer.stderr and "uv python install 3.12" in answer.stderr

    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho it is Python 3.9\nexit 1\n")
    old.chmod(0o755)
    answer = find_python(PATH=str(tmp_path), HOME=str(tmp_path))
    assert answer.returncode == 1 and "python3: it is Python 3.9" in answer.stderr

    answer = find_python(PATH=os.environ["PATH"], PYTHON=str(tmp_path / "nothing"))
    assert answer.returncode == 1 and "nothing: no such program" in answer.stderr
