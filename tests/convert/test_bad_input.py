"""What is wrong is named, by file and tensor, before anything is written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_megatron.convert import ConvertError, export_checkpoint, import_checkpoint
from lightning_megatron.convert.errors import UsageError
from lightning_megatron.convert.partial import Partial
from lightning_megatron.convert.plan import plan_export, plan_import
from lightning_megatron.models.units import Piece, Unit, same, whole
from tests.convert.helpers import assert_model
from tests.helpers.convert import CONFIG, Toy, tensors_of, write_model

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


def refuse(folder: Path, target: Path, *said: str, kind: type[ConvertError] = ConvertError) -> str:
    with pytest.raises(kind) as error:
        import_checkpoint(folder, target)
    text = str(error.value)
    for part in said:
        assert part in text, text
    assert not target.exists() and not target.with_name(target.name + ".partial").exists()
    return text


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    del tensors[NORM], tensors["model.layers.1.attn.slope_rate"]  # the second is optional
    tensors |= {"new.a": torch.ones(2, 3), "model.layers.0.norm.weight": torch.ones(17)}
    write_model(tmp_path / "hf", CONFIG, tensors)
    text = refuse(tmp_path / "hf", tmp_path / "m", "3 tensors do not fit: ", "; take the files that belong ")
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["missing", NORM, "expected", "[16]"],
        ["misshapen", "model.layers.0.norm.weight", "expected", "[16],", "found", "[17]"],
        ["unexpected", "new.a", "found", "[2,", "3]"],
    ]


def test_every_megatron_tensor_is_accounted_for(tmp_path: Path) -> None:
    write_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    config = tmp_path / "m/huggingface/config.json"
    config.write_text(json.dumps(CONFIG))
    before = Toy.units
    shorter = [same("model.norm.weight", whole("decoder.final_layernorm.weight", 8)), same("x", whole("y.z", 3))]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConvertError) as error:
        others = lambda self, *given: [unit for unit in before(self, *given) if unit.hf[0].name != NORM]
        patch.setattr(Toy, "units", lambda self, *given: others(self, *given) + shorter)
        export_checkpoint(tmp_path / "m", tmp_path / "out")
    assert [line.split() for line in str(error.value).splitlines()[1:]] == [
        ["misshapen", "decoder.final_layernorm.weight", "expected", "[8],", "found", "[16]"],
        ["missing", "y.z", "expected", "[3]"],
    ]
    assert not (tmp_path / "out.partial").exists()


def lose_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def cut_data(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 5)


def cut_header(folder: Path) -> None:
    os.truncate(folder / SECOND, 100)


def cut_all(folder: Path) -> None:
    os.truncate(folder / SECOND, 3)


def break_header(folder: Path) -> None:
    (folder / SECOND).write_bytes(struct.pack("<Q", 8) + b"{{{{{{{{")


def duplicate(folder: Path) -> None:
    save_file({NORM: torch.ones(16)}, folder / "more.safetensors")


def misplace(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    text["weight_map"][NORM] = FIRST if text["weight_map"][NORM] == SECOND else SECOND
    index.write_text(json.dumps(text))


def name_more(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    text["weight_map"]["never.written"] = FIRST
    index.write_text(json.dumps(text))


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text)  # type: ignore[return-value]


FAULTS = {
    "shard": (lose_shard, (f"{SECOND} is missing; the index names it for 20 tensors, the first ",)),
    "data": (cut_data, (f"{SECOND} is truncated in tensor ", "; download it again")),
    "header": (cut_header, (f"{SECOND} is truncated in its header: it has 100 bytes",)),
    "nothing": (cut_all, (f"{SECOND} is truncated in its header: it has 3 bytes",)),
    "json": (break_header, (f"{SECOND} is damaged: ",)),
    "duplicate": (duplicate, (f"tensor {NORM} is in two files of ", " and more.safetensors")),
    "misplaced": (misplace, ("the index of ", f" for tensor {NORM}, which lies in model-")),
    "indexed": (name_more, (f"names {FIRST} for tensor never.written, which no file holds",)),
    "no-map": (empty_index, ("model.safetensors.index.json has no weight_map",)),
    "index": (break_index, ("model.safetensors.index.json is not JSON: ",)),
    "weights": (no_weights, ("holds no *.safetensors",)),
    "no-config": (no_config, ("holds no config.json", "hf download ORG/NAME --local-dir FOLDER")),
    "config": (config('{"model_type": "toy",'), ("config.json is not JSON: ", "line 1 column 22")),
    "list": (config("[]"), ("config.json must hold a JSON object, but holds a list",)),
    "family": (config('{"model_type": "kda"}'), ("config.json: model_type 'kda' is not supported",)),
    "field": (config(json.dumps(CONFIG | {"sliding_window": 7})), ("sliding_window is 7; Megatron has no such",)),
}


@pytest.mark.parametrize("fault, said", FAULTS.values(), ids=FAULTS)
def test_damaged_source(tmp_path: Path, fault: Callable[[Path], None], said: tuple[str, ...]) -> None:
    write_model(tmp_path / "hf")
    fault(tmp_path / "hf")
    assert "\n" not in refuse(tmp_path / "hf", tmp_path / "m", *said)


def test_one_dtype_for_what_is_joined(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    tensors["model.layers.0.attn.k_proj.weight"] = tensors["model.layers.0.attn.k_proj.weight"].float()
    write_model(tmp_path / "hf", CONFIG, tensors)
    refuse(tmp_path / "hf", tmp_path / "m", "must have one dtype", "attn.k_proj.weight is float32")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_weights_are_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    """What a quantization packs is no weight, even where the shape fits."""
    tensors = tensors_of(CONFIG)
    write_model(tmp_path / "hf", CONFIG, tensors | {NORM: tensors[NORM].to(dtype)})
    said = f"wrong dtype {NORM}  is {str(dtype)[6:]}, expected float32, bfloat16, float16 or float64"
    refuse(tmp_path / "hf", tmp_path / "m", "1 tensor does not fit: ", said)


def test_a_source_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    check = Partial.check_unchanged
    for convert, source, file in (
        (import_checkpoint, tmp_path / "hf", tmp_path / "hf" / FIRST),
        (export_checkpoint, tmp_path / "m", next((tmp_path / "m/release").glob("*.distcp"))),
    ):

        def late(self: Partial, *given: object, file: Path = file) -> None:
            os.utime(file)
            check(self, *given)  # type: ignore[arg-type]

        with monkeypatch.context() as patch, pytest.raises(ConvertError, match="has changed while it was read"):
            patch.setattr(Partial, "check_unchanged", late)
            convert(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        convert(source, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("source", ["inclusionAI/Ring", "https://huggingface.co/x", "s3://bucket/x", "config.json"])
def test_only_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refuse(Path(source), tmp_path / "m", "only local folders are taken: download", kind=UsageError)


@pytest.mark.parametrize("target", ["hf", "hf/m", "hf/../hf/x", "link/m", "."])
def test_target_and_source_apart(tmp_path: Path, target: str) -> None:
    write_model(tmp_path / "hf")
    (tmp_path / "link").symlink_to("hf")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="hold each other"):
        import_checkpoint(tmp_path / "hf", tmp_path / target, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


BIG = CONFIG | {"num_layers": 14}


@pytest.fixture
def unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is filled by others, or has a quota."""
    monkeypatch.setattr("lightning_megatron.convert.partial.Partial.check_space", lambda *_: None)


def test_too_small_disk(tmp_path: Path, small_disk: Path) -> None:
    write_model(tmp_path / "hf", BIG)
    with pytest.raises(ConvertError, match=r"m\.partial needs 0\.\d+ GB more, but its disk has 0\.\d+ GB free"):
        import_checkpoint(tmp_path / "hf", small_disk / "m")
    assert not list(small_disk.rglob("*.distcp"))


def test_full_disk(tmp_path: Path, small_disk: Path, unforeseen: None) -> None:
    write_model(tmp_path / "hf", BIG)
    remedy = ": No space left on device; free some space, and run the same command again"
    with pytest.raises(ConvertError, match=f"cannot write tensor model.* of .*distcp{remedy}"):
        import_checkpoint(tmp_path / "hf", small_disk / "m", part_bytes=10**9)
    assert [path.name for path in small_disk.iterdir()] == ["m.partial"]
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    shutil.rmtree(small_disk / "m.partial")
    with pytest.raises(ConvertError, match=f"cannot write tensor model.* of .*safetensors{remedy}"):
        export_checkpoint(tmp_path / "m", small_disk / "out", part_bytes=10**9)
    assert not (small_disk / "out").exists()


@pytest.fixture
def small_files() -> Iterator[None]:
    """``ulimit -f``: no file may have more than 64 KB. As of a full disk, writing a tensor fails in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_tensors_larger_than_a_buffer(tmp_path: Path) -> None:
    """What torch.save says then is about a position in the file."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    large = CONFIG | {"hidden_size": 128, "vocab_size": 500}
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    write_model(tmp_path / "hf", large)
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    remedy = "File too large; allow larger files .ulimit -f., and run the same command again: it goes on where it"
    with pytest.raises(ConvertError, match=f"cannot write tensor model.* of .*distcp: {remedy}"):
        import_checkpoint(tmp_path / "hf", tmp_path / "again")
    with pytest.raises(ConvertError, match=f"cannot write .*safetensors: {remedy}"):
        export_checkpoint(tmp_path / "m", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "m", "again.partial", "out.partial"}
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    import_checkpoint(tmp_path / "hf", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "out")
    assert_model(tmp_path / "out", tensors_of(large))


def test_disk_that_becomes_larger(tmp_path: Path, small_disk: Path, unforeseen: None) -> None:
    """The same command goes on with the parts that are there."""
    write_model(tmp_path / "hf", BIG)
    with pytest.raises(ConvertError):
        import_checkpoint(tmp_path / "hf", small_disk / "m", part_bytes=5000, jobs=1)
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    said: list[str] = []
    import_checkpoint(tmp_path / "hf", small_disk / "m", part_bytes=5000, jobs=1, say=said.append)
    assert said[0].startswith("going on: ") and not said[0].startswith("going on: 0")
    export_checkpoint(small_disk / "m", tmp_path / "out")
    assert_model(tmp_path / "out", tensors_of(BIG))


def test_read_only_target(tmp_path: Path, small_disk: Path) -> None:
    write_model(tmp_path / "hf")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ConvertError, match=r"cannot write .*m\.partial: Read-only file system"):
        import_checkpoint(tmp_path / "hf", small_disk / "m")


# ---- faults of a family ----------------------------------------------------------------------------------------------


def test_faults_of_units() -> None:
    """Tables of units that contradict themselves are found before they do harm."""
    x = {"a": torch.ones(4, 2), "b": torch.ones(4, 2)}
    with pytest.raises(ValueError, match="two units hold tensor a"):
        plan_import([same("a", whole("A", 4, 2)), same("a", whole("B", 4, 2))], x, "here")
    half = Unit(same("a", whole("A", 4, 2)).hf, (Piece("A", (2, 2), (4, 2), (0, 0)),), lambda t: [t[0][:2]], list)
    with pytest.raises(ValueError, match=r"the 1 pieces of A do not fill its shape \[4, 2\]"):
        plan_import([half], {"a": x["a"]}, "here")
    turned = Unit(same("a", whole("A", 4, 2)).hf, (whole("A", 2, 4),), list, list)
    with pytest.raises(ValueError, match="a unit gives"):
        plan_import([turned], {"a": x["a"]}, "here")
    with pytest.raises(ValueError, match="a unit gives"):
        plan_export([turned], {"A": torch.ones(2, 4)}, "here")
