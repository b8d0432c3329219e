"""Imports go one way: ops <- parallel <- mixer <- runtime <- spec <- training <- inference; each knows what it must."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_megatron"

# A part (module, or folder) may import those of the layers above its own in this list.
LAYERS = [
    {"__init__", "config", "compat", "packed", "ops", "peak", "layer_log", "logs", "integrity", "optimizers"},
    {"router_log"},
    {"models"},
    {"cpu"},
    {"parallel"},
    {"caches"},
    {"decay", "mlp", "norm", "residual", "rope", "offload", "selective"},
    {"softmax"},
    {"record"},
    {"saved"},
    {"checkpoint_folder"},
    {"resume"},
    {"patches"},
    {"mixer", "summary", "flags"},
    {"runtime", "layer"},
    {"spec"},
    {"hybrid_model"},
    {"run"},
    {"training"},
    {"inference"},
    {"convert"},
    {"pretrain"},
]
# ... and these parts less than that.
ONLY = {
    "decay": {"config"},
    "flags": {"config", "compat", "optimizers"},
    "layer_log": set(),
    "logs": set(),
    "optimizers": set(),
    "peak": set(),
    "router_log": set(),
    "models": {"config"},
    "caches": {"config", "ops"},
    "cpu": set(),
    "convert": {"models", "training", "inference", "cpu", "compat"},
    "parallel": {"ops"},
    "record": {"config", "decay"},
    "saved": {"config", "record"},
    "checkpoint_folder": {"record", "integrity"},
    "resume": {"checkpoint_folder", "config", "optimizers", "record", "saved"},
    "patches": {
        *{"config", "compat", "ops", "packed", "parallel", "rope", "softmax"},
        *{"checkpoint_folder", "record", "resume", "offload", "layer_log"},
    },
    "layer": {"mixer", "parallel"},
    "offload": set(),
    "selective": set(),
}
# Distributions a part may import; the others torch and megatron.
OUTSIDE = {
    "__init__": set(),
    "config": set(),
    "compat": {"megatron"},
    "convert": {"torch", "safetensors", "tqdm", "megatron", "tokenizers", "transformers"},
    "flags": {"torch"},
    "inference": {"torch", "megatron", "quart", "hypercorn", "werkzeug", "msgpack"},
    "optimizers": set(),
    "peak": set(),
    "layer_log": {"torch"},
    "router_log": {"megatron"},
    "logs": {"megatron"},
    "integrity": set(),
    "ops": {"torch", "triton"},
    "decay": {"torch"},
    "models": {"torch"},
    "parallel": {"torch"},
    "offload": {"torch"},
    "pretrain": {"megatron"},
    "training": {"torch", "megatron", "numpy"},  # in which Megatron's datasets have their dtypes
}


def sources() -> dict[str, list[Path]]:
    """Files of each part; patches/ is installed as lightning_megatron.patches."""
    parts = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts.setdefault(path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0], []).append(path)
    parts["patches"] = sorted((ROOT / "patches").rglob("*.py"))
    return parts


def imports(text: str, package: str) -> set[str]:
    """Full names of what a module of this package imports, ``from a import b`` as a.b, inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names |= {".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def complaints(part: str, names: set[str]) -> list[str]:
    """What a part imports but must not."""
    layer = next(i for i, parts in enumerate(LAYERS) if part in parts)
    below = set().union(*LAYERS[:layer], {part})
    local = ONLY.get(part, below) & below | {part, "__version__"}
    outside = OUTSIDE.get(part, {"torch", "megatron"}) | set(sys.stdlib_module_names)
    wrong = []
    for name in sorted(names):
        first, *rest = name.split(".")
        if first == PACKAGE:
            wrong += [name] if not rest or rest[0] not in local else []
        elif first not in outside:
            wrong.append(name)
    return wrong


def package_of(path: Path) -> str:
    folders = path.parent.relative_to(ROOT).parts
    return ".".join(folders if folders[0] == PACKAGE else (PACKAGE, *folders))


def test_every_part_has_a_layer():
    placed = [part for parts in LAYERS for part in parts]
    assert len(placed) == len(set(placed))
    unplaced = sources().keys() - placed
    assert not unplaced, f"{unplaced}: give each a place in LAYERS, and in OUTSIDE if it needs less than megatron"


@pytest.mark.parametrize("part", sources())
def test_layers(part):
    for path in sources()[part]:
        wrong = complaints(part, imports(path.read_text("utf-8"), package_of(path)))
        assert not wrong, f"{path.relative_to(ROOT)} must not import {', '.join(wrong)}"


def test_wrong_imports_are_found():
    """The test above can fail."""
    text = """
import torch.nn as nn, triton
from . import kernels, api
from .torch_backend import forward
from ..config import LightningOptions
def f():
    from megatron.core import parallel_state
    from lightning_megatron.mixer import LightningAttention
    import tests.launch, examples
"""
    found = imports(text, f"{PACKAGE}.ops")
    assert {f"{PACKAGE}.ops.kernels", f"{PACKAGE}.ops.torch_backend.forward", "torch.nn", "triton"} <= found
    assert complaints("ops", found) == [
        "examples",
        f"{PACKAGE}.config.LightningOptions",
        f"{PACKAGE}.mixer.LightningAttention",
        "megatron.core.parallel_state",
        "tests.launch",
    ]
    assert complaints("mixer", found) == ["examples", "tests.launch", "triton"]
    assert complaints("decay", imports("from .spec import x\nfrom .config import y", PACKAGE)) == [f"{PACKAGE}.spec.x"]
    assert complaints("spec", imports("from . import training, mixer", PACKAGE)) == [f"{PACKAGE}.training"]
    assert complaints("patches", imports("from ..spec import x", f"{PACKAGE}.patches")) == [f"{PACKAGE}.spec.x"]


CHEAP = [  # a part, and what importing it loads not; those without torch come first
    ("", ["torch", "megatron"]),
    (".config", ["torch", "megatron"]),
    (".inference.generate", ["torch", "megatron"]),
    (".inference.perplexity", ["torch", "megatron"]),
    (".inference.serve", ["torch", "megatron", "quart"]),
    (".inference.asked", ["torch", "megatron", "quart"]),
    (".convert.cli", ["torch", "megatron"]),
    (".ops", ["megatron", "triton"]),
    (".decay", ["megatron"]),
    (".cpu", ["megatron"]),
    (".convert.comparing", ["megatron"]),
]
IMPORT_EACH = f"""
import importlib, sys
for module, absent in {CHEAP}:
    for name in [x for x in sys.modules if x.partition(".")[0] == {PACKAGE!r}]:
        del sys.modules[name]
    importlib.import_module({PACKAGE!r} + module)
    if loaded := [x for x in absent if x in sys.modules]:
        sys.exit(f"importing {PACKAGE}{{module}} loads {{', '.join(loaded)}}")
"""


def test_imports_are_cheap():
    """Not only by the source: in a fresh process, importing each part anew loads none of these."""
    run = subprocess.run([sys.executable, "-c", IMPORT_EACH], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


# ---- tests -----------------------------------------------------------------------------------------------------------


def other_tests(text: str, package: str) -> list[str]:
    """Test modules among what a module of the package imports."""
    return sorted(name for name in imports(text, package) if any(part.startswith("test_") for part in name.split(".")))


def test_no_test_module_imports_another():
    """What tests share is in tests/helpers; a test module can be changed, or run alone, without reading others."""
    wrong = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        found = other_tests(path.read_text("utf-8"), ".".join(path.parent.relative_to(ROOT).parts))
        wrong |= {str(path.relative_to(ROOT)): found} if found else {}
    assert not wrong, f"move what is shared into tests/helpers: {wrong}"


def test_imports_of_test_modules_are_found():
    """The test above can fail."""
    text = "from .test_loss import f\nfrom tests.ops import test_rows\nfrom .cases import pick\nimport tests.test_spec"
    assert other_tests(text, "tests.ops") == ["tests.ops.test_loss.f", "tests.ops.test_rows", "tests.test_spec"]


# ---- examples --------------------------------------------------------------------------------------------------------


def test_examples_do_not_import_tests():
    """Tests and benchmarks may import examples: what both need is there."""
    wrong = {}
    for path in sorted((ROOT / "examples").rglob("*.py")):
        found = imports(path.read_text("utf-8"), ".".join(path.parent.relative_to(ROOT).parts))
        wrong |= {path.name: tests} if (tests := sorted(x for x in found if x.partition(".")[0] == "tests")) else {}
    assert not wrong
