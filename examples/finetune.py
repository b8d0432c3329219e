"""Fine-tune a released model on conversations: from a Hugging Face folder to a Hugging Face folder.

    python examples/finetune.py --model Ring-mini-linear-2.0 --data chat.jsonl --out ring-chat      with GPUs
    python examples/finetune.py --out finetune_out                                  a tiny model, without: some minutes

Every step is a command that is shown before it runs, and can be given by hand:

1. model       --model, or a tiny one with random weights, and questions on Python's standard library to train it on
2. data        conversations share sequences; the model's own chat template, and only answers count in the loss
3. import      lightning-convert: to Megatron's format
4. training    Megatron's training loop, with tensor and context parallelism (--tp, --cp), from the imported weights
5. export      lightning-convert: to a folder that transformers, vLLM or SGLang load
6. generation  one question, from Megatron's checkpoint, and with transformers where they have the model

The same command again goes on where it stopped. Flags of Megatron after -- are added to the training:

    python examples/finetune.py --model ... --data ... --out ... -- --recompute-granularity full ...
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import demo
import prepare_chat
import stoppable
from plot_loss import read_losses

MARKER = ".lightning_finetune"  # options of the run whose results a folder holds
CONTENT = "content of --data"  # there: else a training that goes on would go on with other conversations
PREPARE = "examples/prepare_chat.py"
TINY_QUESTIONS, TINY_VOCABULARY = 24, 512
MINIMAX = """
import sys, torch
from transformers import AutoTokenizer, MiniMaxConfig, MiniMaxForCausalLM
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = MiniMaxConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=48, num_hidden_layers=4, head_dim=16,
    layer_types=3 * ["linear_attention"] + ["full_attention"], num_attention_heads=4, num_key_value_heads=2,
    num_local_experts=4, max_position_embeddings=2048,
    bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
)
torch.manual_seed(0)
MiniMaxForCausalLM(config).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""
ASK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ask = [{"role": "user", "content": sys.argv[2]}]
prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = model.generate(**prompt, max_new_tokens=int(sys.argv[3]), do_sample=False)[0]
print(tokenizer.decode(tokens))
"""


@dataclass
class Step:
    """A command, and what there is of it on the screen."""

    title: str
    command: list[str]
    show: Callable[[str], str | None] = demo.everything
    done: Path | None = None  # what is there once it is complete


def steps(options: argparse.Namespace, gpus: int) -> Iterator[Step]:
    """All steps; each is made when those before it have run."""
    out, bin = options.out, demo.short(Path(sys.executable).parent)
    python = str(bin / "python")
    convert = [python, "-m", "lightning_megatron.convert"]  # lightning-convert, where the package is not installed, too
    alone = [python] if gpus else [python, "examples/cpu_shim.py"]
    ranks = gpus or options.tp * options.cp
    launch = [str(bin / "torchrun"), "--standalone", "--nproc-per-node"]
    pretrain = [*([] if gpus else ["examples/cpu_shim.py"]), "-m", "lightning_megatron.pretrain"]

    model, data = options.model, options.data
    if not data:
        data = [out / "chat.jsonl"]
        count = [] if model else ["--count", str(TINY_QUESTIONS)]
        made = [python, PREPARE, "questions", *count, "--out", str(data[0])]
        yield Step("questions and answers", made, done=data[0])
    if not model:
        model, words = out / "model", out / "tokenizer"
        size = ["--vocab-size", str(TINY_VOCABULARY)]
        made = [python, PREPARE, "tokenizer", *map(str, data), *size, "--out", str(words)]
        yield Step("tokenizer", made, done=words / "tokenizer.json")  # which is written last
        complete = model / "tokenizer_config.json"
        if options.tiny == "minimax":
            yield Step("a tiny MiniMax", [python, "-c", MINIMAX, str(words), str(model)], done=complete)
        else:
            untrained = out / "untrained"
            command = [*launch, "1", *pretrain, "--lightning-model", "ring-mini-linear-2.0@tiny", *size, "--mock-data"]
            command += "--seq-length 64 --micro-batch-size 1 --train-iters 1 --lr 1e-3 --eval-iters 0".split()
            command += ["--num-workers", "0", "--save-interval", "1", "--save", str(untrained)]
            yield Step("a tiny Ring", command, demo.Progress(1), untrained / "latest_checkpointed_iteration.txt")
            yield Step("a Hugging Face folder of it", [*convert, "export", str(untrained), str(model)], done=model)
            copy = ["cp", *(str(words / name) for name in sorted(os.listdir(words))), str(model)]
            yield Step("its tokenizer", copy, done=complete)

    pack = [python, PREPARE, "pack", *map(str, data), "--tokenizer", str(model), "--out", str(out / "data")]
    pack += ["--seq-length", str(options.seq_length), "--context-parallel-size", str(options.cp)]
    yield Step("conversations that share sequences", [*pack, "--held-out", str(options.held_out)])

    imported, tuned, exported = out / "imported", out / "tuned", out / "exported"
    yield Step("import", [*convert, "import", str(model), str(imported)], done=imported)

    last = tuned / "latest_checkpointed_iteration.txt"
    trained = last.is_file() and last.read_text().strip() == str(options.iterations)
    command = [*launch, str(ranks), *pretrain]
    command += ["--pretrained-checkpoint", str(imported), "--use-checkpoint-args"]
    command += ["--load", str(tuned), "--save", str(tuned), "--save-interval", str(options.save_interval)]
    command += ["--sft", "--tokenizer-type", "SFTTokenizer", "--tokenizer-model", str(model)]
    command += ["--sft-tokenizer-prompt-format", "default", "--lightning-sft-answers-only"]
    command += ["--train-data-path", str(out / "data" / "train.jsonl")]
    if (out / "data" / "valid.jsonl").is_file():
        command += ["--valid-data-path", str(out / "data" / "valid.jsonl"), "--eval-iters", "4"]
    command += ["--calculate-per-token-loss", "--seq-length", str(options.seq_length)]
    command += ["--tensor-model-parallel-size", str(options.tp), *["--sequence-parallel"] * (options.tp > 1)]
    command += ["--context-parallel-size", str(options.cp)]
    command += ["--micro-batch-size", str(1 if gpus else options.batch), "--global-batch-size", str(options.batch)]
    command += ["--train-iters", str(options.iterations), "--lr", str(options.lr), "--lr-decay-style", "cosine"]
    command += ["--lr-warmup-iters", str(options.iterations // 20), "--clip-grad", "1.0", "--weight-decay", "0"]
    command += ["--log-interval", "1", "--num-workers", "0" if not gpus else "2"]
    command += ["--bf16", "--use-distributed-optimizer"] if gpus else []
    yield Step("training", command + options.flags, demo.Progress(10), last if trained else None)

    yield Step("export", [*convert, "export", str(tuned), str(exported), "--like", str(model)], done=exported)

    asked = (x["content"] for row in prepare_chat.read(data) for x in row if x["role"] == "user" and x["content"])
    prompt = options.prompt or next(asked, "Hello")  # tools may have asked all there is
    ask = [*alone, "examples/generate.py", "--load", str(tuned), "--chat", "--prompt", prompt]
    ask += ["--tokens", str(options.tokens), "--temperature", "0"]
    yield Step("generation by Megatron", ask)
    if json.loads((model / "config.json").read_text("utf-8"))["model_type"] == "minimax":
        ask = [python, "-c", ASK, str(exported), prompt, str(options.tokens)]
        yield Step("generation by transformers, from the exported folder", ask)


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, checked; SystemExit names the option and what to do."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: a tiny model)")
    parser.add_argument("--tiny", choices=("minimax", "ring"), default="minimax", help="the tiny model's family")
    parser.add_argument("--data", type=Path, nargs="+", help="conversations, see prepare_chat.py (default: questions)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size (2)")
    parser.add_argument("--cp", type=int, default=2, help="context-parallel size (2)")
    parser.add_argument("--seq-length", type=int, help="tokens of a sequence (4096; tiny model: 256)")
    parser.add_argument("--batch", type=int, help="sequences of a step (32; tiny model: 8)")
    parser.add_argument("--iterations", type=int, help="steps (500; tiny model: 80)")
    parser.add_argument("--save-interval", type=int, default=50, help="steps between checkpoints (50)")
    parser.add_argument("--lr", type=float, help="learning rate (1e-5; tiny model: 1e-2)")
    parser.add_argument("--held-out", type=float, help="fraction of the conversations (0.02; tiny model: 0)")
    parser.add_argument("--prompt", help="question to ask at the end (default: the first one of --data)")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of the answer (64)")
    options = parser.parse_args(argv[:cut])
    options.flags = argv[cut + 1 :]
    large = dict(seq_length=4096, batch=32, lr=1e-5, held_out=0.02, iterations=500)
    small = dict(seq_length=256, batch=8, lr=1e-2, held_out=0, iterations=80)
    for name, value in (large if options.model else small).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.model and not (options.model / "config.json").is_file():
        parser.error(
            f"--model {options.model}: no config.json there; `hf download ORG/NAME --local-dir FOLDER` gets one"
        )
    for path in options.data or ():
        if not path.is_file():
            parser.error(f"--data {path}: no such file")
    chunk = 2 * options.cp * options.tp
    if min(options.tp, options.cp) < 1 or options.seq_length % chunk:
        parser.error(f"--seq-length {options.seq_length} must divide by 2 x --cp x --tp = {chunk}")
    return options


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None, run: Callable[..., None] = demo.run) -> None:
    options = arguments(sys.argv[1:] if argv is None else argv)
    missing = [
        name for name in ("torch", "safetensors", "transformers", "jinja2") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise SystemExit(f"finetune: missing packages; pip install {' '.join(missing)}")
    import torch

    gpus = torch.cuda.device_count()
    out = options.out = options.out.resolve()
    given = {f"--{k.replace('_', '-')}": str(v) for k, v in vars(options).items() if k not in ("prompt", "tokens")}
    given[CONTENT] = " ".join(digest(path) for path in options.data or ())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARKER).is_file():
            raise SystemExit(f"finetune: {out} holds files that are not of this script; give another --out")
        held = json.loads((out / MARKER).read_text())
        other = [
            f"{name} {held.get(name)}, and not {value}"
            for name, value in given.items()
            if name != CONTENT and held.get(name) != value
        ]
        if (out / "tuned").exists() and held.get(CONTENT) != given[CONTENT]:
            other.append("other conversations in the files of --data")
        if other:
            raise SystemExit(f"finetune: {out} is of a run with {'; '.join(other)}: give another --out, or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"finetune: --out {out} cannot be written ({error.strerror}); give another folder") from error
    marker = out / f"{MARKER}.partial"
    marker.write_text(json.dumps(given))
    marker.replace(out / MARKER)
    for name in ("model", "data"):
        paths = getattr(options, name)
        setattr(options, name, [x.resolve() for x in paths] if isinstance(paths, list) else paths and paths.resolve())
    os.chdir(demo.ROOT)
    options.out = demo.short(out)
    start, logs = time.time(), options.out / "logs"
    logs.mkdir(exist_ok=True)
    ranks = options.tp * options.cp
    if gpus % ranks:
        raise SystemExit(f"finetune: --tp {options.tp} x --cp {options.cp} does not divide {gpus} GPUs; give others")
    print(f"Training on {f'{gpus} GPUs' if gpus else f'{ranks} processes without a GPU'}")
    for number, step in enumerate(steps(options, gpus), 1):
        if step.done is not None and step.done.exists():
            print(f"\n==> {step.title}: there already, {step.done}", flush=True)
        else:
            run(step.title, step.command, logs / f"{number}.log", step.show)
    losses = [read_losses(path.read_text(errors="replace"))[0] for path in sorted(logs.iterdir())]
    train = max(losses, key=len)
    print(f"\n==> done in {time.time() - start:.0f} s")
    print(f"  loss of the answers   {train[min(train)]:.3f} at step {min(train)}, {train[max(train)]:.3f} at the end")
    print(f"  Hugging Face folder   {options.out / 'exported'}")
    print(f"  Megatron checkpoint   {options.out / 'tuned'}")
    print(f"  full logs             {logs}")


if __name__ == "__main__":
    stoppable.run(main, "the same command goes on from here")
