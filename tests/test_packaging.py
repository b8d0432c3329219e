"""What a wheel holds, made from the checkout and by way of a source distribution, in a folder of its own."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launch import spawn

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("lightning_megatron", "patches", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BACKEND = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def run(*command: str, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    return answer.stdout.splitlines()[-1] if answer.stdout else ""


def build(what: str, source: Path, out: Path) -> Path:
    return out / run(sys.executable, "-c", BACKEND, f"build_{what}", str(out), cwd=source)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One from a copy of the checkout, one from the source distribution of that copy."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    archive = build("sdist", copy, folder)
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    for name in ("direct", "by_sdist"):
        (folder / name).mkdir()
    return [build("wheel", copy, folder / "direct"), build("wheel", unpacked, folder / "by_sdist")]


def test_wheels_hold_the_package_and_nothing_else(wheels: list[Path]) -> None:
    files = {
        f"lightning_megatron/{place}{path.relative_to(ROOT / top)}"
        for top, place in (("lightning_megatron", ""), ("patches", "patches/"))
        for path in (ROOT / top).rglob("*.py")
        if "patches" not in path.relative_to(ROOT / top).parts[:1]
    }
    assert {"lightning_megatron/patches/__init__.py", "lightning_megatron/patches/flops.py"} <= files
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
            about = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
            licenses = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert names == files | {"lightning_megatron/py.typed"}
        assert len(licenses) == 1 and "License-Expression: Apache-2.0" in about
        assert "Author: lightning_megatron contributors" in about and "Requires-Dist: torch>=2.11" in about


def imported(rank: int, world: int, place: str, elsewhere: str) -> tuple[str, str, bool]:
    """Name and file of lightning_megatron.patches, imported from this folder alone, and whether `patches` is found."""
    os.chdir(elsewhere)
    known = {"", str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")}
    sys.path[:] = [place, *(path for path in sys.path if path not in known)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_megatron"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    patches = importlib.import_module("lightning_megatron.patches")
    return patches.__name__, patches.__file__, importlib.util.find_spec("patches") is not None


def test_a_wheel_imports_without_the_checkout(wheels: list[Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels[-1]) as archive:  # the other holds the same files
        archive.extractall(tmp_path / "wheel")
    ((name, file, found),) = spawn(imported, 1, str(tmp_path / "wheel"), str(tmp_path))
    assert name == "lightning_megatron.patches" and not found
    assert Path(file) == tmp_path / "wheel/lightning_megatron/patches/__init__.py"


def test_a_checkout_on_the_path_imports(tmp_path: Path) -> None:
    ((_, file, _),) = spawn(imported, 1, str(ROOT), str(tmp_path))
    assert Path(file) == ROOT / "lightning_megatron" / "patches" / "__init__.py"
