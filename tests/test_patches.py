"""Patches of Megatron: what they are applied to, and what they refuse."""

import importlib
import os
import re
import subprocess
import sys
import types

import pytest
from megatron.core import package_info
from megatron.core.datasets import utils as dataset_utils
from megatron.training import training as megatron_training

from lightning_megatron import compat, patches, pretrain
from lightning_megatron.config import LightningOptions
from lightning_megatron.patches import _replace, packed_rope, recompute
from tests.checkout import python_path


def test_patches_are_idempotent_and_logged(unpatched, caplog):
    before = dataset_utils.compile_helpers, megatron_training.num_floating_point_operations
    with caplog.at_level("INFO", logger="lightning_megatron.patches"):
        patches.apply_all(LightningOptions())
        after = dataset_utils.compile_helpers, megatron_training.num_floating_point_operations
        patches.apply_all(LightningOptions(gate="none"))
    assert (dataset_utils.compile_helpers, megatron_training.num_floating_point_operations) == after
    assert tuple(function.__wrapped__ for function in after) == before
    symbols = [symbol for patch in patches.PATCHES for symbol in patch.SYMBOLS]
    for symbol, record in zip(symbols, caplog.records, strict=True):
        assert f"patched {symbol}: " in record.getMessage()
    for patch in (*patches.PATCHES, packed_rope, recompute):
        owner = patch.SYMBOLS[0] if len(patch.SYMBOLS) == 1 else patch.SYMBOLS[0].rpartition(".")[0]
        assert all(word in patch.__doc__ for word in ("Symbol", "Why:", "Versions:", "Can go:", owner))


def test_patch_of_a_missing_symbol(unpatched, monkeypatch):
    monkeypatch.delattr(megatron_training, "num_floating_point_operations")
    with pytest.raises(
        ImportError, match=r"megatron\.training\.training\.num_floating_point_operations.*>=0\.19,<0\.21"
    ):
        patches.flops.apply(LightningOptions())


def test_patch_of_another_signature(unpatched, monkeypatch):
    monkeypatch.setattr(dataset_utils, "compile_helpers", lambda jobs: None)
    with pytest.raises(RuntimeError, match=r"utils\.compile_helpers.*>=0\.19,<0\.21.*'jobs'"):
        patches.dataset_helpers.apply()


def test_other_megatron_versions_are_refused(unpatched, monkeypatch, capsys):
    compat.check_megatron()
    monkeypatch.setattr(package_info, "VERSION", (0, 21, 0, "rc1"))
    monkeypatch.setattr(package_info, "__shortversion__", "0.21.0")
    for check in (compat.check_megatron, patches.dataset_helpers.apply):
        with pytest.raises(RuntimeError, match=r">=0\.19,<0\.21.*0\.21\.0"):
            check()
    with pytest.raises(SystemExit) as exit:
        pretrain.main()
    assert exit.value.code == 2 and "found 0.21.0" in capsys.readouterr().err


@pytest.mark.parametrize("known", [False, True], ids=["no-version", "an-old-version"])
def test_packages_that_keep_megatron_from_being_imported(known, tmp_path):
    """Megatron takes nvidia-resiliency-ext from 0.6.0 on, and asks while it is imported; 0.4 names no version."""
    folder = tmp_path / "nvidia_resiliency_ext"
    modules = "core", "cached_metadata_filesystem_reader", "filesystem_async", "state_dict_saver"
    for part in ("", "checkpointing", *(f"checkpointing/async_ckpt/{name}" for name in ("", *modules))):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "__init__.py").write_text("__version__ = '0.5.0'" if known and not part else "")
    command = [sys.executable, "-m", "lightning_megatron.pretrain", "--num-layers", "1"]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": python_path(tmp_path)}
    )
    *_, last = run.stderr.splitlines()
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert re.search(r"importing megatron\.core failed .*resiliency.*update the package", last)


def test_parameters_of_later_versions(monkeypatch):
    """A patch gets those that it was written for, none or all, and is not applied to others."""

    def wrap(original):
        return lambda jobs, **added: original(2 * jobs, **added)

    symbol, known = "megatron.core.datasets.utils.compile_helpers", (("jobs",), wrap, "")
    for original, found in ((lambda jobs: (jobs,), {}), (lambda jobs, a, b: (jobs, a, b), dict(b=4, a=3))):
        monkeypatch.setattr(dataset_utils, "compile_helpers", original)
        assert _replace.replace(symbol, *known, later=("jobs", "a", "b"))
        assert dataset_utils.compile_helpers(1, **found) == (2, 3, 4)[: 1 + len(found)]
    for original in (lambda jobs, a: 0, lambda jobs, b, a: 0, lambda jobs, a, b, c: 0):
        monkeypatch.setattr(dataset_utils, "compile_helpers", original)
        with pytest.raises(RuntimeError, match=r"\('jobs',\) or \('jobs', 'a', 'b'\), but here .* is tested with"):
            _replace.replace(symbol, *known, later=("jobs", "a", "b"))


@pytest.mark.parametrize("checkout", [False, True])
def test_compiled_helpers_are_used(unpatched, monkeypatch, tmp_path, checkout):
    """Those of the wheel, and in a checkout, which has a Makefile, those that are as new as their source."""
    calls = []
    monkeypatch.setattr(dataset_utils, "compile_helpers", lambda: calls.append("make"))
    patches.dataset_helpers.apply()
    source, built = tmp_path / "helpers.cpp", tmp_path / "helpers_cpp.so"
    for path in (source, built, *([tmp_path / "Makefile"] if checkout else [])):
        path.touch()
    helpers = types.ModuleType("megatron.core.datasets.helpers_cpp")
    helpers.__file__ = str(built)
    monkeypatch.setattr(importlib.import_module("megatron.core.datasets"), "__path__", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, helpers.__name__, helpers)
    os.utime(source, (100, 100))
    os.utime(built, (100, 100))
    dataset_utils.compile_helpers()
    assert not calls
    os.utime(source, (101, 101))
    dataset_utils.compile_helpers()
    assert calls == ["make"] * checkout
    monkeypatch.setitem(sys.modules, helpers.__name__, None)  # as if not built
    dataset_utils.compile_helpers()
    assert calls == ["make"] * (1 + checkout)
