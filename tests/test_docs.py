"""What the documents say exists: flags, files, and Python that runs. `make docs` builds them, strictly."""

import re
from pathlib import Path

import pytest

from . import layers
from .launch import spawn

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "patches/README.md"])
SCRIPTS = sorted(ROOT.glob("examples/*.sh"))
SCRIPTS.remove(ROOT / "examples/find_python.sh")  # names flags of uv
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """All flags of the own entry point, Megatron's included, of the commands of inference and of examples/quality."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from examples.quality import evaluate, session, train
    from lightning_megatron.inference import generate, perplexity, serve
    from lightning_megatron.training.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    quality = (train.parser(), session.parser(), evaluate.parser())
    parsers = (parser, generate.parser(), perplexity.parser(), serve.parser(), *quality)
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


OTHERS = {  # of torchrun, pip, pytest, git, pre-commit, hf, lightning-convert, and of the scripts in examples/
    "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--standalone",
    "--out", "--text", "--local-dir", "--like", "--card", "--table", "--tolerance", "--hybrid-model", "--no-prediction",
    "--tensors-only", "--model", "--data", "--tiny", "--tp", "--cp",
    "--no-stream-ckpt-dequant",  # of Megatron 0.19 alone
}  # fmt: skip


@pytest.mark.parametrize("path", DOCUMENTS + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_exist(path: Path, flags: set[str]) -> None:
    if path.name == "CHANGELOG.md":
        pytest.skip("names flags of other versions")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w*-])", path.read_text("utf-8")))
    unknown = {flag for flag in named - flags - OTHERS if flag != "--lightning"}
    assert not unknown, f"{path.relative_to(ROOT)} names flags that do not exist: {unknown}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text("utf-8"))
    missing = [x for x in links if "://" not in x and not (path.parent / x).exists()]
    assert not missing


def run_code(rank: int, world: int, text: str) -> int:
    layers.start()
    blocks = CODE.findall(text)
    for block in blocks:
        exec(compile(block, "document", "exec"), {"__name__": "document"})
    return len(blocks)


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md", "docs/inference.md"])
def test_python_in_documents_runs(name: str) -> None:
    text = (ROOT / name).read_text("utf-8").replace("hidden_size=1024", "hidden_size=128")
    assert spawn(run_code, 1, text)[0] >= 1


def test_every_option_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses
    import importlib

    from lightning_megatron.config import LightningOptions

    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    rows = {row[0].split(",")[0]: row for row in importlib.import_module("options_table").rows()}
    names = {"--lightning-" + field.name.replace("_", "-") for field in dataclasses.fields(LightningOptions)}
    assert set(rows) == names | {"--lightning-loss-chunk", "--lightning-model", "--lightning-sft-answers-only"}
    assert rows["--lightning-gate"][1] == "sigmoid, none, linear" and rows["--lightning-rope"][1] == "off, on"
