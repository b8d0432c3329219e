"""Configuration of Sphinx: `make docs`."""

import logging
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

import lightning_megatron  # noqa: E402

with warnings.catch_warnings(action="ignore"):  # what Megatron and torch tell about packages that are not installed
    logging.disable(logging.WARNING)
    import lightning_megatron.spec  # noqa: F401
logging.disable(logging.NOTSET)

project = "lightning_megatron"
author = "lightning_megatron contributors"
copyright = "lightning_megatron contributors"
release = version = lightning_megatron.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "options_table"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

smartquotes = False  # would make a dash of the two hyphens of a flag

html_theme = "furo"
html_title = f"lightning_megatron {release}"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# Nothing outside of this package is linked: building needs no network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|dist|collections|typing|types|megatron|argparse|dataclasses)\b.*"),
    ("py:.*", r"(LightningOptions|Any|Callable|Sequence|ModuleSpec|TransformerBlockSubmodules|optional|default.*)"),
]
