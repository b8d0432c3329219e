"""A checkpoint with a file that is missing, cut off or altered ends every rank with a message that names the file."""

from __future__ import annotations

import contextlib
import io
import random
import re
import shutil
import struct
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest

from lightning_megatron.checkpoint_folder import CheckpointError, refuse_broken
from lightning_megatron.integrity import BrokenFile, complete_iterations, verify
from tests.launch import ROOT, run_pretrain

TRACKER = "latest_checkpointed_iteration.txt"
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 128 --position-embedding-type rope --linear-attention-freq 2 --swiglu --disable-bias-linear "
    "--mock-data --micro-batch-size 1 --global-batch-size 2 --lr 2e-3 --lr-decay-style constant --train-iters 4 "
    "--log-interval 1 --eval-iters 0 --num-workers 0"
)
GPT = (
    "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion "
    "--eval-interval 100 --no-create-attention-mask-in-dataloader --spec lightning_megatron.spec lightning_spec"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with iterations 1 and 2, of the distributed and of the old format."""

    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        format = f"--ckpt-format {name}"
        run_pretrain(f"{FLAGS} {format} --save {folder} --save-interval 1 --exit-interval 2".split())
        return folder

    return {name: save(name) for name in ("torch_dist", "torch")}


@pytest.fixture
def copied(saved, tmp_path):
    def copy(name: str = "torch_dist") -> Path:
        return shutil.copytree(saved[name], tmp_path / name)

    return copy


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x10
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# What breaks: the file, by a pattern in the folder of the iteration, and how.
BREAKS = {
    "cut-off": ("__0_0.distcp", lambda path: path.write_bytes(path.read_bytes()[:-2000])),
    "empty": ("__0_0.distcp", lambda path: path.write_bytes(b"")),
    "gone": ("__0_0.distcp", Path.unlink),
    "flipped": ("__0_0.distcp", lambda path: flip(path, 0.5)),
    "metadata-gone": (".metadata", Path.unlink),
    "metadata-cut-off": (".metadata", lambda path: path.write_bytes(path.read_bytes()[:100])),
    "json-gone": ("metadata.json", Path.unlink),
    "json-wrong": ("metadata.json", lambda path: path.write_text("{")),
    "common-wrong": ("common.pt", lambda path: path.write_bytes(b"nothing")),  # of checkpoints of before 0.19
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file_is_named(name, copied):
    folder = copied()
    pattern, spoil = BREAKS[name]
    path = folder / "iter_0000002" / pattern
    spoil(path)
    with pytest.raises(BrokenFile, match=re.escape(str(path))):
        verify(path.parent)
    assert complete_iterations(folder)[-1] == "iter_0000001"
    verify(folder / "iter_0000001")


@pytest.mark.parametrize("format", ["torch_dist", "torch"])
def test_no_flipped_bit_of_data_is_missed(format, copied):
    """Bits between the parts, which nothing reads, may flip; every other flip is seen."""
    folder = copied(format) / "iter_0000002"
    path, seed = largest(folder), 20261129
    whole, rng, seen = path.read_bytes(), random.Random(seed), 0
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            verify(folder)
        except BrokenFile as error:
            assert str(path) in str(error)
            seen += 1
    share = weights(whole)
    assert seen >= 60 * share * 0.8, f"{seen} of 60 seen, {share:.0%} of the bytes are data (seed {seed})"
    path.write_bytes(whole)
    verify(folder)


SHORT = dict(ckpt_format="torch_dist", use_mp_args_from_checkpoint_args=False, non_persistent_ckpt_type="global")


def with_short_lived(folder: Path, persistent: int, short: int, elsewhere: Path | None = None) -> Path:
    """Moves iteration ``short`` to where Megatron keeps short-lived checkpoints."""
    there = elsewhere or folder / "non_persistent"
    there.mkdir(exist_ok=True)
    shutil.move(folder / f"iter_{short:07d}", there / f"iter_{short:07d}")
    (there / TRACKER).write_text(str(short))
    (folder / TRACKER).write_text(str(persistent))
    return there / f"iter_{short:07d}" / "__0_0.distcp"


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("step", [None, 1])
def test_the_newest_of_short_lived_and_persistent_checkpoints_is_checked(given, step, copied, tmp_path):
    folder, elsewhere = copied(), tmp_path / "elsewhere"
    path = with_short_lived(folder, 1, 2, elsewhere if given else None)
    args = Namespace(**SHORT, ckpt_step=step, non_persistent_global_ckpt_dir=str(elsewhere) if given else None)
    refuse_broken(str(folder), args)
    BREAKS["cut-off"][1](folder / "iter_0000001" / path.name)
    refuse_broken(str(folder), args)  # which nobody reads
    BREAKS["cut-off"][1](path)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} is cut off")):
        refuse_broken(str(folder), args)


def test_an_older_short_lived_checkpoint_is_not_checked(copied):
    folder = copied()
    path = with_short_lived(folder, 2, 1)
    args = Namespace(**SHORT, ckpt_step=None, non_persistent_global_ckpt_dir=None)
    BREAKS["cut-off"][1](path)
    refuse_broken(str(folder), args)
    BREAKS["cut-off"][1](folder / "iter_0000002" / path.name)
    with pytest.raises(CheckpointError, match="iter_0000002.*is cut off"):
        refuse_broken(str(folder), args)


def middle_of_data(data: bytes) -> float:
    """Where in the bytes the middle of the largest record of an archive is, as a part of their number."""
    found, at = [], data.find(b"PK\x03\x04")
    while at >= 0:
        end = data.find(b"PK\x05\x06", at) + 22
        with zipfile.ZipFile(io.BytesIO(data[at:end])) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        names = sum(struct.unpack_from("<HH", data, at + largest.header_offset + 26))  # behind a header of 30 bytes
        found.append((largest.file_size, at + largest.header_offset + 30 + names))
        at = data.find(b"PK\x03\x04", end)
    size, start = max(found)
    return (start + size // 2) / len(data)


def weights(data: bytes) -> float:
    """The part of the bytes that archives hold as data, by their own headers; the rest is alignment and names."""
    inside, at = 0, data.find(b"PK\x03\x04")
    while at >= 0:
        end = data.find(b"PK\x05\x06", at) + 22
        with zipfile.ZipFile(io.BytesIO(data[at:end])) as archive:
            inside += sum(entry.file_size for entry in archive.infolist())
        at = data.find(b"PK\x03\x04", end)
    return inside / len(data)


@pytest.mark.parametrize(
    "way, name, nproc",
    [("own", "flipped", 2), ("gpt", "flipped", 1), ("own", "cut-off", 1), ("gpt", "json-gone", 1)],
)
def test_runs_end(way, name, nproc, copied):
    folder = copied()
    pattern, spoil = BREAKS[name]
    path = folder / "iter_0000002" / pattern
    spoil(path)
    script = ROOT / "tests" / "pretrain_gpt.py" if way == "gpt" else None
    run = run_pretrain(
        f"{FLAGS} {GPT if way == 'gpt' else ''} --load {folder}".split(), nproc, script=script, check=False
    )
    assert not run.ok and not run.losses, run.log
    assert f"{path} is " in run.log or f"{path} cannot be read" in run.log
    assert f"write its number into {folder / TRACKER} (complete: " in run.log and "iter_0000001" in run.log
    if way == "own":
        assert "lightning-pretrain: " in run.log and "Traceback" not in run.log


@pytest.mark.parametrize("way", ["own", "gpt"])
def test_checksums_are_left_out_where_that_is_asked_for(way, copied):
    """Altered bytes load, and a line says that nobody looked; what is cut off is refused all the same."""
    folder = copied()
    path = folder / "iter_0000002" / "__0_0.distcp"
    flip(path, middle_of_data(path.read_bytes()))
    with pytest.raises(BrokenFile, match="is altered"):
        verify(path.parent)
    verify(path.parent, contents=False)
    script, flags = None, f"{FLAGS} --no-lightning-checksums"
    if way == "gpt":
        spec = GPT.replace("lightning_megatron.spec lightning_spec", "tests.specs without_checksums")
        script, flags = ROOT / "tests" / "pretrain_gpt.py", f"{FLAGS} {spec}"
    run = run_pretrain(f"{flags} --load {folder}".split(), script=script)
    assert len(run.losses) == 2
    assert run.log.count("checksums are not compared (--no-lightning-checksums)") == 1
    assert "all files are whole" not in run.log
    if way == "own":
        path.write_bytes(path.read_bytes()[:-2000])
        run = run_pretrain(f"{flags} --load {folder}".split(), check=False)
        assert not run.ok and f"{path} is cut off" in run.log


def test_a_run_ends_where_a_short_lived_checkpoint_is_altered(copied):
    folder = copied()
    path = with_short_lived(folder, 1, 2)
    flags = f"{FLAGS} --load {folder} --non-persistent-ckpt-type global --non-persistent-save-interval 9".split()
    run = run_pretrain(flags, 2)
    assert len(run.losses) == 2, "it goes on behind the short-lived checkpoint, which is the newest"
    BREAKS["cut-off"][1](folder / "iter_0000001" / path.name)
    assert run_pretrain(flags, 2).losses == run.losses, "nobody reads the older one"
    flip(path, 0.5)
    run = run_pretrain(flags, 2, check=False)
    assert not run.ok and str(path) in run.log and not run.losses


def test_old_format_and_a_tracker_without_a_number(copied):
    folder = copied("torch")
    flip(largest(folder / "iter_0000002"), 0.5)
    run = run_pretrain(f"{FLAGS} --ckpt-format torch --load {folder}".split(), check=False)
    assert not run.ok and "model_optim_rng.pt is altered" in run.log and "Traceback" not in run.log
    (folder / TRACKER).write_bytes(b"\xff\x00")
    run = run_pretrain(f"{FLAGS} --ckpt-format torch --load {folder}".split(), check=False)
    assert not run.ok and f"{folder / TRACKER} says " in run.log


def test_old_format_is_read_by_the_sizes_that_saved_it(saved):
    """With more ranks a file is missing, and with fewer there would be parts of tensors."""
    flags = f"{FLAGS} --load {saved['torch']} --tensor-model-parallel-size 2 --padded-vocab-size 128"
    run = run_pretrain(flags.split(), 2, check=False)
    assert not run.ok and "Traceback" not in run.log
    assert "mp_rank_00 are there, mp_rank_00, mp_rank_01 would be read. Give --tensor-model-parallel-size 1;" in run.log
    assert len(run_pretrain(f"{FLAGS} --load {saved['torch']}".split()).losses) == 2


T, P, E = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))


@pytest.mark.parametrize(
    "there, sizes, given",
    [
        ("00 01 02", {}, "--tensor-model-parallel-size 3;"),
        ("00", {P: 2}, "--tensor-model-parallel-size 1;"),
        ("00_000 00_001", {}, "--pipeline-model-parallel-size or --expert-model-parallel-size 2;"),
        ("00_000 00_001", {T: 2, E: 2}, "--tensor-model-parallel-size 1 --pipeline-model-parallel-size or"),
        ("00_000_000 00_000_001 00_001_000 00_001_001", {P: 2}, "--pipeline-model-parallel-size 2 --expert-model-par"),
        ("00_000 00_001", {P: 2}, None),
        ("00_000 00_001", {E: 2}, None),
        ("00 01", {T: 2}, None),
    ],
)
def test_sizes_by_the_names_of_the_old_format(there, sizes, given, tmp_path):
    (tmp_path / TRACKER).write_text("2")
    for name in there.split():
        folder = tmp_path / "iter_0000002" / f"mp_rank_{name}"
        folder.mkdir(parents=True)
        (folder / "model_optim_rng.pt").write_bytes(b"PK")
    more = dict(ckpt_step=None, ckpt_format="torch", use_mp_args_from_checkpoint_args=False)
    args = Namespace(**({T: 1, P: 1, E: 1} | sizes | more))
    refused = contextlib.nullcontext() if given is None else pytest.raises(CheckpointError, match=re.escape(given))
    with refused:
        refuse_broken(str(tmp_path), args)
    args.use_mp_args_from_checkpoint_args = True
    refuse_broken(str(tmp_path), args)


def test_files_of_two_checkpoints(copied):
    """Each of them is whole; bytes are read where the other one has its tensors."""
    folder = copied()
    path = folder / "iter_0000002" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[1:] + bytes(2))
    run = run_pretrain(f"{FLAGS} --load {folder} --no-lightning-checksums".split(), check=False)
    assert not run.ok and not run.losses and "Traceback" not in run.log
    assert f"a file of the checkpoint in {folder} does not hold what .metadata says" in run.log
