"""From text to a trained model in a few minutes: the whole path on this machine, with the commands a user would give.

    make demo                                     (or: .venv/bin/python examples/demo.py --out demo_out)

1. corpus      the sources of Python's standard library, a tokenizer trained on them, Megatron's indexed datasets
2. training    Megatron's own pretrain(), 3 lightning layers to 1 softmax layer; saves a checkpoint
3. plot        the loss against the unigram entropy of the text
4. generation  continues a prompt from the checkpoint

Runs on a GPU where there is one. Else cpu_shim.py maps it to the CPU, data parallel on up to 4 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
ROOT = EXAMPLES.parent
sys.path.insert(0, str(EXAMPLES))

import megatron_log  # noqa: E402
import stoppable  # noqa: E402
from plot_loss import final_loss, read_losses  # noqa: E402

MARKER = ".lightning_demo"  # this folder is ours to overwrite
PROMPT = "    def read_line(self, "

VOCABULARY, ITERATIONS, BATCH, SHOW_INTERVAL = 1024, 900, 4, 50
MODEL = """
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 352 --linear-attention-freq 4
    --seq-length 256 --max-position-embeddings 256 --position-embedding-type rope --untie-embeddings-and-output-weights
    --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --init-method-std 0.06
"""
TRAINING = f"""
    --global-batch-size {BATCH} --train-iters {ITERATIONS} --num-workers 0
    --lr 8e-3 --min-lr 2e-4 --lr-warmup-iters 50 --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95
    --eval-interval {ITERATIONS // 2} --eval-iters 32 --log-interval 10 --save-interval {ITERATIONS}
"""


def cores() -> int:
    """Cores this process may use; os.cpu_count() counts those of the machine, also in a container that has fewer."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no limit there ("max")
        return count


def folded(command: list[str]) -> str:
    """The command as one would type it, a line for every few options."""
    lines = [""]
    for word in map(shlex.quote, command):
        if word.startswith("-") and len(lines[-1]) > 80:
            lines.append("     ")
        lines[-1] += f" {word}"
    return "$" + " \\\n".join(lines)


def run(title: str, command: list[str], log: Path, show: Callable[[str], str | None]) -> None:
    """Run one step. All that it writes goes to the log, and to the screen what `show` makes of its standard output."""
    print(f"\n==> {title}\n{folded(command)}", flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}  # waiting threads spin: slow on a busy machine
    start = time.time()
    log.unlink(missing_ok=True)
    with log.open("a", buffering=1) as file:  # appending: the step itself writes there, too
        process = subprocess.Popen(command, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=file)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if (shown := show(line)) is not None:
                    print(shown, flush=True)
        except BaseException:
            process.terminate()
            raise
    if process.wait():
        lines = log.read_text(errors="replace").splitlines()
        said = [line for line in lines if re.match(r"[\w-]+: error: |lightning-pretrain: ", line)]  # torchrun talks on
        end = "\n".join(dict.fromkeys(said) if said else lines[-30:])
        raise SystemExit(f"{end}\n\n{Path(sys.argv[0]).stem}: the step `{title}` failed; all that it wrote is in {log}")
    print(f"    took {time.time() - start:.0f} s", flush=True)


def short(path: Path) -> Path:
    """Relative to the repository's root, if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def everything(line: str) -> str:
    return line.rstrip("\n")


class Progress:
    """Makes Megatron's log readable: which layers are lightning, then a line every few iterations."""

    def __init__(self, every: int = SHOW_INTERVAL) -> None:
        self.in_summary, self.every = False, every
        self.read = megatron_log.Reader()
        self.first: tuple[float, float] | None = None  # iteration and time of the first line
        self.validated = 0  # after the last step Megatron validates twice

    def __call__(self, line: str) -> str | None:
        row = self.read(line)
        if isinstance(row, megatron_log.Step):
            iteration, last = row.iteration, row.last
            self.first = self.first or (iteration, time.time())
            if (iteration % self.every and iteration != last) or row.loss is None:
                return None
            left = (last - iteration) * (time.time() - self.first[1]) / max(1, iteration - self.first[0])
            speed = f"{1e3 * row.seconds:4.0f} ms each   {left:3.0f} s left"
            return f"  iteration {iteration:4d}/{last}   loss {row.loss:.3f}   {speed}"
        if isinstance(row, megatron_log.Validation):
            shown, self.validated = self.validated == row.iteration, row.iteration
            return None if shown else f"  held-out documents at iteration {row.iteration}: loss {row.loss:.3f}"
        if isinstance(row, megatron_log.Parameters):
            return f"  {row.count:,} parameters"
        self.in_summary = line.startswith("lightning_megatron ") or (self.in_summary and line.startswith("  "))
        if self.in_summary:
            return "  " + line.rstrip()
        return "  checkpoint saved" if "successfully saved checkpoint" in line else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo_out", help="folder for the results (demo_out)")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue at the end")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if out.exists() and not out.is_dir():
        raise SystemExit(f"demo: {out} is a file; give a folder with --out")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise SystemExit(f"demo: {out} holds files that are not the demo's; give another folder, or an empty one")
    if ROOT.is_relative_to(out):
        raise SystemExit(f"demo: {out} holds this checkout and would be emptied; give another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise SystemExit(f"demo: --out {out} cannot be written ({error.strerror}); give another folder") from error
    (out / MARKER).touch()
    os.chdir(ROOT)
    out, bin = short(out), Path(sys.executable).parent
    python, torchrun = str(short(bin / "python")), str(short(bin / "torchrun"))
    start = time.time()

    import torch

    gpu = torch.cuda.is_available()
    processes = 1 if gpu else max(n for n in (1, 2, 4) if n <= cores())
    where = torch.cuda.get_device_name() if gpu else f"{processes} of {cores()} CPU cores"
    print(f"Training on {where}; everything goes to {out}/")

    data, log, checkpoint, picture = out / "data", out / "train.log", out / "checkpoint", out / "loss.png"
    run(
        "corpus, tokenizer and datasets",
        [python, "examples/prepare_data.py", "--out", str(data), "--vocab-size", str(VOCABULARY)],
        out / "prepare.log",
        everything,
    )

    command = [torchrun, "--standalone", "--nproc-per-node", str(processes)]
    command += (
        ["-m", "lightning_megatron.pretrain"] if gpu else ["examples/cpu_shim.py", "-m", "lightning_megatron.pretrain"]
    )
    command += [*MODEL.split(), "--micro-batch-size", str(BATCH // processes), *TRAINING.split()]
    command += ["--bf16"] if gpu else []
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(data / "tokenizer.model")]
    command += ["--train-data-path", str(data / "train_text_document")]
    command += ["--valid-data-path", str(data / "valid_text_document"), "--save", str(checkpoint)]
    run("training: 3 lightning layers, 1 softmax layer", command, log, Progress())

    run(
        "plot",
        [python, "examples/plot_loss.py", "--log", str(log), "--stats", str(data / "stats.json"), "--out", str(picture)]
        + ["--title", "Lightning hybrid on the sources of the Python standard library"],
        out / "plot.log",
        everything,
    )

    launcher = [python] if gpu else [python, "examples/cpu_shim.py"]
    generate = [*launcher, "examples/generate.py", "--load", str(checkpoint), "--prompt", options.prompt]
    generate += ["--tokenizer-model", str(data / "tokenizer.model"), "--tokens", "150"]
    run("generation", generate, out / "generate.log", everything)

    train, valid = read_losses(log.read_text())
    loss, unigram = final_loss(train), json.loads((data / "stats.json").read_text())["unigram_entropy"]
    print(f"\n==> done in {time.time() - start:.0f} s")
    print(f"  final loss        {loss:.3f} nats per token, {loss / unigram:.0%} of the unigram entropy {unigram:.3f}")
    print(f"  held-out loss     {valid[max(valid)]:.3f}")
    print(f"  loss curve        {picture}")
    print(f"  checkpoint        {checkpoint}")
    print(f"  full log          {log}")
    print(f"  another prompt    {shlex.join(generate[: generate.index('--prompt')])} --prompt 'def main('")


if __name__ == "__main__":
    stoppable.run(main, "the same command starts from the beginning")
