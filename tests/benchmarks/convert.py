"""Converts a synthetic checkpoint there and back, beside copying the same files on the same disk: speed and memory.

    python -m tests.benchmarks.convert --gb 8 --folder /scratch --out result.json

Every step starts with the files that it reads on the disk only: posix_fadvise drops their pages from the cache, unless
--warm is given. All that is written is brought to the disk (fsync) within the time that is measured, for copies
too. Memory is the largest RssAnon of /proc/self/status, every 10 ms, less what it was before the conversion: pages of
mapped files do not count, because the kernel takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_megatron.convert.cli import main as convert
from tests.helpers import convert as helper

ROOT = Path(__file__).parents[2]
CONFIG = helper.CONFIG | {"hidden_size": 4096, "num_heads": 32, "num_experts": 16, "expert_size": 1536}
VOCABULARY = 150_000


def write(folder: Path, nbytes: float) -> tuple[dict, int]:
    """A model of about so many bytes, file by file; returns its config and the bytes of its largest tensor."""
    vocab = int(min(VOCABULARY, nbytes / 8e9 * VOCABULARY))
    layer = 2 * 4096 * (4 * 4096 + 3 * 1536 * 16)
    layers = max(1, round((nbytes - 4 * 4096 * vocab) / layer))
    config = CONFIG | {"num_layers": layers, "vocab_size": vocab}
    family = helper.Toy()
    names = [named for unit in family.units(helper.toy_args(family.flags(config))) for named in unit.hf]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    part: dict[str, torch.Tensor] = {}
    files, held, index = 0, 0, {}
    for i, named in enumerate(names):
        noise = torch.randint(-(2**15), 2**15, named.shape, dtype=torch.int16)
        part[named.name] = noise.view(torch.bfloat16)
        if named.name.endswith("slope_rate"):
            part[named.name] = torch.arange(1.0, config["num_heads"] + 1).view(named.shape)
        held += part[named.name].nbytes
        if held > 2e9 or i == len(names) - 1:
            files += 1
            save_file(part, folder / f"model-{files:05d}.safetensors", {"format": "pt"})
            index |= dict.fromkeys(part, f"model-{files:05d}.safetensors")
            part, held = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return config, 2 * 4096 * -(-vocab // helper.PADDED) * helper.PADDED


def settle(folder: Path, warm: bool) -> None:
    """Bring files to the disk, and out of memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            if not warm:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copy(source: Path, target: Path, jobs: int) -> float:
    """Seconds of copying a folder to the disk."""

    def one(path: Path) -> None:
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
        descriptor = os.open(to, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    start = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [path for path in sorted(source.rglob("*")) if path.is_file()]))
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def anonymous() -> int:
    """Bytes of memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


class Watch:
    """Measures how far the memory of this process grows while it is entered: ``growth``, in bytes."""

    def __enter__(self) -> Watch:
        self.before = self._peak = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth = self._peak - self.before

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, anonymous())


def child(arguments: list[str]) -> None:
    """Convert in this process, and print seconds and memory."""
    helper.register()
    from lightning_megatron.convert import comparing, exporting, importing  # noqa: F401 # not a part of what is measured

    start = time.monotonic()
    with Watch() as watch:
        status = convert(arguments)
    seconds = time.monotonic() - start
    print(json.dumps({"status": status, "seconds": seconds, "before": watch.before, "growth": watch.growth}))


def run(*arguments: str | Path) -> dict:
    command = [sys.executable, "-m", "tests.benchmarks.convert", "--child", *map(str, arguments)]
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(answer.stdout.splitlines()[-1])
    assert result["status"] == 0, answer.stdout
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=1, help="of copy, import, copy, export; medians count")
    parser.add_argument("--warm", action="store_true", help="leave files in the cache")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    needed = 4.2e9 * args.gb
    if (free := shutil.disk_usage(args.folder).free) < needed:
        parser.error(f"--folder {args.folder} has {free / 1e9:.0f} GB free, but {needed / 1e9:.0f} are needed")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        hf, megatron, back, copied = (folder / x for x in ("hf", "megatron", "back", "copied"))
        config, largest = write(hf, args.gb * 1e9)
        nbytes = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
        rounds: dict[str, list[float]] = {"copy_hf": [], "import": [], "copy_megatron": [], "export": []}
        growth = {"import": 0, "export": 0}
        jobs = ("--jobs", str(args.jobs))
        for _ in range(args.rounds):
            for made in (megatron, back):
                shutil.rmtree(made, ignore_errors=True)
            for step in rounds:
                source = hf if step in ("copy_hf", "import") else megatron
                settle(source, args.warm)
                if step.startswith("copy"):
                    rounds[step].append(copy(source, copied, args.jobs))
                    continue
                done = run(step, source, megatron if step == "import" else back, *jobs)
                rounds[step].append(done["seconds"])
                growth[step] = max(growth[step], done["growth"])
        same = subprocess.run(
            [sys.executable, "-c", COMPARE, str(hf), str(back)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()[-1]
    seconds = {step: statistics.median(times) for step, times in rounds.items()}
    copying, converting = seconds["copy_hf"] + seconds["copy_megatron"], seconds["import"] + seconds["export"]
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {platform.machine()}, {platform.release()}",
        "cache": "warm" if args.warm else "cold: pages of the files that a step reads were dropped before it",
        "jobs": args.jobs,
        "bytes": nbytes,
        "largest_tensor_bytes": largest,
        "seconds": rounds,
        "median_seconds": seconds,
        "MB_per_s": {
            "copy": 2 * nbytes / copying / 1e6,
            "import": nbytes / seconds["import"] / 1e6,
            "export": nbytes / seconds["export"] / 1e6,
            "there_and_back": 2 * nbytes / converting / 1e6,
        },
        "speed_of_copy": copying / converting,
        "anonymous_memory_growth_bytes": growth,
        "memory_beyond_largest_tensor_bytes": max(growth.values()) - largest,
        "compared": same,
        "hours_for_2_TB": 2e12 / 3600 / (2 * nbytes / converting),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


COMPARE = """
import sys
from pathlib import Path
from lightning_megatron.convert.folder import Folder
from lightning_megatron.convert.comparing import compare
sys.exit(not compare(Folder(Path(sys.argv[1])), Folder(Path(sys.argv[2])), print))
"""

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
