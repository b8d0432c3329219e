"""examples/generate.py as a module."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.launch import ROOT

SCRIPT = ROOT / "examples" / "generate.py"


def example() -> ModuleType:
    """The script as a module; examples/ is no package."""
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
