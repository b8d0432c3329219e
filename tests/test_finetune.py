"""examples/finetune.py, whole, for both families: the loss of its first step, and tokens after it, by references."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import finetune
import prepare_chat
from lightning_megatron.convert import cli, reference
from tests.helpers.generate import SCRIPT, greedy
from tests.helpers.model_cases import load_minimax
from tests.launch import ROOT, run_pretrain, spawn

FROZEN = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")  # buffers of MiniMax
BATCH, LENGTH, STEPS, TOKENS = 4, 256, 6, 24


class Steps:
    """Runs the example's commands in processes that need not import everything anew; keeps what they print."""

    def __init__(self) -> None:
        self.printed: dict[str, str] = {}

    def __call__(self, title: str, command: list[str], log: Path, show) -> None:
        out = io.StringIO()
        program, *words = command
        with contextlib.redirect_stdout(out), mock.patch.object(sys, "argv", words):
            if Path(program).name == "torchrun":
                assert words[:2] == ["--standalone", "--nproc-per-node"] and words[3:5] == [
                    "examples/cpu_shim.py",
                    "-m",
                ]
                out.write(run_pretrain(words[6:], int(words[2]), module=words[5]).log)
            elif words[:2] == ["-m", "lightning_megatron.convert"]:
                assert cli.main(words[2:]) == 0
            elif program == "cp":
                subprocess.run(command, check=True)
            elif words[0] == "-c":
                sys.argv = words[:1] + words[2:]
                exec(compile(words[1], title, "exec"), {"__name__": "__main__"})
            elif words[:2] == ["examples/cpu_shim.py", "examples/generate.py"]:
                out.write(run_pretrain(words[2:], script=SCRIPT).log)
            else:
                assert words[0] == "examples/prepare_chat.py"
                prepare_chat.main(words[1:])
        log.write_text(out.getvalue())
        self.printed[title] = out.getvalue()
        assert all(shown is None or "\n" not in shown for shown in map(show, out.getvalue().splitlines(True)))


def tokens_and_answers(tokenizer, conversation) -> tuple[list[int], list[bool]]:
    """ChatML, piece by piece: what an assistant says, and what ends it, is an answer."""
    pieces = []
    for message in conversation:
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>\n", message["role"] == "assistant"))
    ids = [(token, answer) for text, answer in pieces for token in tokenizer.encode(text, add_special_tokens=False)]
    return [token for token, _ in ids], [answer for _, answer in ids]


def reference_of(folder: Path):
    """Tokens [1, t] -> logits [1, t, vocabulary], of a Hugging Face folder."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "minimax":
        from transformers import MiniMaxForCausalLM

        model = load_minimax(folder, MiniMaxForCausalLM).eval()
        return lambda tokens: model(tokens, use_cache=False).logits
    tensors = load_file(folder / "model.safetensors")
    return lambda tokens: reference.bailing(config, tensors, tokens)[1]


@pytest.mark.parametrize("family", ["minimax", "ring"])
@torch.inference_mode()
def test_from_folder_to_folder(family, tmp_path, monkeypatch, capsys):
    from transformers import AutoTokenizer

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)  # whose relative paths count
    run, command = Steps(), ["--tiny", family, "--out", "out", "--seq-length", str(LENGTH), "--batch", str(BATCH)]
    command += [
        "--iterations",
        str(STEPS),
        "--tokens",
        str(TOKENS),
        "--held-out",
        "0.1" if family == "minimax" else "0",
        "--lr",
        "1e-2",
    ]
    finetune.main([*command, "--prompt", "What does bisect.insort_left do?"], run)
    out = tmp_path / "out"
    training = run.printed["training"]

    # the loss: packed conversations, of which only answers count, over TP2 x CP2
    tokenizer = AutoTokenizer.from_pretrained(out / "exported")
    lines = [json.loads(line)["messages"] for line in (out / "data/train.jsonl").read_text().splitlines()]
    assert max(map(len, lines)) > 1
    logits_of, losses = reference_of(out / "model"), []
    for conversation in (x for line in lines[:BATCH] for x in line):
        ids, answers = tokens_and_answers(tokenizer, conversation)
        wanted = torch.where(torch.tensor(answers), torch.tensor(ids), -100)
        if len(ids) > LENGTH:  # alone in its sequence, and cut off
            ids, wanted = ids[:LENGTH], wanted[:LENGTH]
        logits = logits_of(torch.tensor([ids]))[0, :-1].float()
        losses += F.cross_entropy(logits, wanted[1:], reduction="none", ignore_index=-100)[wanted[1:] >= 0].tolist()
    found = finetune.read_losses(training)[0]
    assert found[1] == pytest.approx(sum(losses) / len(losses), rel=2e-5)
    assert found[STEPS] < found[1] - 0.5
    assert f"{found[STEPS]:.3f} at the end" in capsys.readouterr().out

    # the weights
    before, after = (load_file(out / name / "model.safetensors") for name in ("model", "exported"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.endswith(FROZEN)}

    # the answer
    question = [{"role": "user", "content": "What does bisect.insort_left do?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    ((_, tokens),) = spawn(greedy, 1, out / "tuned", prompt, TOKENS, len(tokenizer))
    logits_of, wanted = reference_of(out / "exported"), list(prompt)
    for _ in range(TOKENS):
        wanted.append(int(logits_of(torch.tensor([wanted]))[0, -1].argmax()))
    assert tokens == wanted[len(prompt) :]
    answer = tokens[: tokens.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in tokens else tokens
    assert tokenizer.decode(prompt + answer) in run.printed["generation by Megatron"]
    if family == "minimax":
        printed = run.printed["generation by transformers, from the exported folder"]
        assert tokenizer.decode(prompt + answer) in printed

    # once more: nothing is done twice; with other options, nothing at all
    again = Steps()
    monkeypatch.chdir(tmp_path)
    finetune.main(command, again)
    assert not {"import", "training", "export"} & set(again.printed)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="is of a run with --lr 0.01, and not 0.001: give another --out"):
        finetune.main([*command, "--lr", "1e-3"], again)


def test_conversations_that_cannot_be_written():
    with pytest.raises(SystemExit, match=r"prepare_chat: --out /proc/x cannot be written \(.+\); give another"):
        prepare_chat.main(["questions", "--count", "1", "--out", "/proc/x"])


@pytest.mark.parametrize("script", ["finetune", "demo"])
def test_a_folder_that_cannot_be_written(script):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{script}.py", "--out", "/proc/x"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{script}: --out /proc/x cannot be written (No such file or directory); give another folder" in done.stderr


CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


@pytest.fixture
def chat(tmp_path, capsys):
    """Files of 20 conversations and a tokenizer."""
    (tmp_path / "chat.jsonl").write_text(20 * (json.dumps({"messages": CHAT}) + "\n"))
    prepare_chat.main(["tokenizer", str(tmp_path / "chat.jsonl"), "--out", str(tmp_path / "words")])
    return tmp_path


def pack_into(folder, *words, length=64):
    command = ["pack", folder / "chat.jsonl", "--tokenizer", folder / "words", "--out", folder / "data"]
    prepare_chat.main([str(x) for x in [*command, "--seq-length", length, *words]])
    return {path.name: path.read_text().count("That.") for path in (folder / "data").iterdir()}


def test_no_held_out_file_of_an_earlier_run_stays(chat):
    assert pack_into(chat, "--held-out", 0.2) == {"train.jsonl": 16, "valid.jsonl": 4}
    assert pack_into(chat, "--held-out", 0) == {"train.jsonl": 20}


def test_a_disk_that_is_full_leaves_both_files_as_they_are(chat, monkeypatch):
    was = pack_into(chat, "--held-out", 0.2)
    write = Path.write_text

    def full(path, *words):
        if path.name.startswith("valid"):
            raise OSError(28, "No space left on device")
        return write(path, *words)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        pack_into(chat, "--held-out", 0.4)
    monkeypatch.undo()
    assert {path.name: path.read_text().count("That.") for path in (chat / "data").iterdir()} == was


def test_sequences_are_filled_to_the_last_token(chat):
    """A length that is odd, without context parallelism: as in training, conversations are padded to nothing."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(chat / "words").apply_chat_template(CHAT, return_dict=True)["input_ids"]
    length = 3 * len(ids)
    for more, held in ((0, 3), (-1, 2)):
        pack_into(chat, "--held-out", 0, length=length + more)
        rows = [json.loads(line)["messages"] for line in (chat / "data" / "train.jsonl").open()]
        assert max(map(len, rows)) == held and sum(map(len, rows)) == 20


REFUSED = {
    "nan": (["--held-out", "nan"], "--held-out nan must be a fraction"),
    "below": (["--held-out", "-1"], "--held-out -1.0 must be a fraction"),
    "above": (["--held-out", "1.5"], "--held-out 1.5 must be a fraction"),
    "no-rank": (["--context-parallel-size", "0"], "--context-parallel-size 0 must be at least 1"),
    "negative": (["--seq-length", "-5"], "--seq-length -5 must be at least 2"),
    "chunks": (["--seq-length", "62", "--context-parallel-size", "2"], "--seq-length 62 must be .*divide by 2 x"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_sizes_that_cannot_pack(words, message, chat):
    with pytest.raises(SystemExit, match=f"prepare_chat: {message}"):
        pack_into(chat, *words)
    assert not (chat / "data").exists()


def test_a_place_of_the_wrong_kind(chat):
    """transformers logs an error and writes nothing where a folder should be."""
    file = str(chat / "chat.jsonl")
    with pytest.raises(SystemExit, match="chat.jsonl is a file; give a folder"):
        prepare_chat.main(["tokenizer", file, "--out", file])
    with pytest.raises(SystemExit, match="words is a folder; give a file"):
        prepare_chat.main(["questions", "--count", "1", "--out", str(chat / "words")])
    with pytest.raises(SystemExit, match="--count -3 must be at least 1"):
        prepare_chat.main(["questions", "--count", "-3", "--out", str(chat / "new.jsonl")])
    with pytest.raises(SystemExit, match="--vocab-size 10 must be at least 259"):
        prepare_chat.main(["tokenizer", file, "--vocab-size", "10", "--out", str(chat / "new")])


def test_a_training_does_not_go_on_with_other_conversations(chat, monkeypatch):
    """Before it began, data may be mended; a question is found where tools alone have asked."""
    tools = [{"role": "tool", "content": "x"}, CHAT[1]]
    titles: list[str] = []

    def step(title, command, log, show):
        titles.append(title)
        if "prepare_chat.py" in command[1] and "--count" not in command:
            with contextlib.redirect_stdout(io.StringIO()):
                prepare_chat.main(command[2:])
        if title == "training":
            (out / "tuned").mkdir(exist_ok=True)
        log.write_text(" iteration 1/ 1 | lm loss: 1.0E+00 |")

    data, out, model = chat / "chat.jsonl", chat / "out", chat / "words"
    (model / "config.json").write_text('{"model_type": "ring"}')
    monkeypatch.setattr(finetune, "read_losses", lambda text: ({1: 1.0}, {}))
    command = ["--model", str(model), "--data", str(data), "--out", str(out), "--tp", "1", "--cp", "1"]
    monkeypatch.setattr(finetune, "steps", steps_until(finetune.steps, "import"))
    finetune.main(command, step)
    data.write_text(json.dumps({"messages": tools}) + "\n" + 20 * (json.dumps({"messages": CHAT}) + "\n"))
    monkeypatch.undo()
    monkeypatch.setattr(finetune, "read_losses", lambda text: ({1: 1.0}, {}))
    finetune.main(command, step)
    assert titles.count("training") == 1
    finetune.main(command, step)
    data.write_text(21 * (json.dumps({"messages": CHAT}) + "\n"))
    with pytest.raises(SystemExit, match="is of a run with other conversations in the files of --data: give another"):
        finetune.main(command, step)


def steps_until(steps, title):
    def some(*given):
        for step in steps(*given):
            if step.title == title:
                return
            yield step

    return some
