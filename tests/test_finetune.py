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
