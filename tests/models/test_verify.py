"""lightning-convert verify: what it finds, what it says, and the card, on random tiny models of each family."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_megatron.convert import card, import_checkpoint, model, reference, verifying
from lightning_megatron.convert.table import differences
from lightning_megatron.convert.verifying import _judged
from lightning_megatron.models.family import family_of
from tests.helpers import random_models
from tests.helpers.model_cases import draw_case, write_released
from tests.helpers.released import args_of
from tests.launch import spawn

QUIET = dict(say=lambda text: None)
FEW = ("--tokens", "5")
PERTURBED = "model.layers.1.attention.query_key_value.weight"


def write(folder: Path, config: dict[str, Any], seed: int) -> Path:
    """A Hugging Face folder with random weights; norms, too, are not 1."""
    args = args_of(config)
    tensors = random_models.draw(family_of(config).units(args, config), torch.Generator().manual_seed(seed))
    folder.mkdir()
    return write_released(folder, config, tensors)


def write_tokenizer(folder: Path, words: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME (Hugging Face) and NAME-megatron (an import of it); and some that do not belong together."""
    place, rng = tmp_path_factory.mktemp("verify"), random.Random(7)
    configs = {
        "latent": random_models.bailing_config(rng, latent=True, experts=True),
        "grouped": random_models.bailing_config(rng, latent=False, experts=False),
        "minimax": random_models.minimax_config(rng),
        "half": random_models.minimax_config(rng) | dict(rotary_dim=8),
        "tnl": random_models.tnl_config(rng),
    }
    for seed, (name, config) in enumerate(configs.items()):
        import_checkpoint(write(place / name, config, seed), place / f"{name}-megatron", **QUIET)
    shutil.copytree(place / "latent", place / "hybrid")
    import_checkpoint(place / "hybrid", place / "hybrid-megatron", hybrid_model=True, prediction=False, **QUIET)
    grouped, file = place / "grouped", "model.safetensors"
    write_tokenizer(grouped, configs["grouped"]["vocab_size"])
    shutil.copytree(grouped, place / "perturbed")
    tensors = load_file(grouped / file)
    tensors[PERTURBED][7, 3] += 0.01
    save_file(tensors, place / "perturbed" / file, metadata={"format": "pt"})
    shutil.copytree(grouped, place / "nan")
    tensors[PERTURBED][7, 3] = torch.nan
    save_file(tensors, place / "nan" / file, metadata={"format": "pt"})
    import_checkpoint(place / "nan", place / "nan-megatron", **QUIET)
    shutil.copytree(grouped, place / "words")
    write_tokenizer(place / "words", 1000)
    # the same tensors, and another decay
    saved_args = model.saved_args
    with mock.patch.object(model, "saved_args", lambda flags: saved_args([*flags, "--lightning-decay-offset", "1"])):
        import_checkpoint(grouped, place / "offset-megatron", **QUIET)
    shutil.copytree(place / "grouped-megatron", place / "short-megatron")
    largest = max((place / "short-megatron/release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as stream:
        stream.truncate(largest.stat().st_size - 5000)
    shutil.copytree(place / "grouped-megatron/release", place / "renamed-megatron")
    shutil.copytree(place / "grouped-megatron/release", place / "saved/iter_0000012")
    return place


def names_of(place: Path, *names: str) -> list[str]:
    return [str(place / name) for name in names]


def commands(rank: int, world: int, place: Path, given: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status of each, and what it printed; a first word NAME= changes the process for one command."""
    from lightning_megatron.convert import cli

    torch.distributed.destroy_process_group()  # of spawn; verify makes its own, as in a new process
    changes = {
        "without-transformers=": lambda: mock.patch.dict(sys.modules, {"transformers": None}),
        "little-memory=": lambda: mock.patch.object(verifying, "free_memory", lambda: 10**9),
        "swapped=": swapped_norms,
    }
    found = []
    for command in given:
        printed = io.StringIO()
        change = changes.get(command[0], contextlib.nullcontext)
        with change(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = [cli.main(x) for x in split(command)][-1]
        found.append((status, printed.getvalue()))
    return found


def split(command: list[str]) -> list[list[str]]:
    """Words up to "then", and so on, without the first one if it is a change."""
    words = [[]]
    for word in command[command[0].endswith("=") :]:
        words.append([]) if word == "then" else words[-1].append(word)
    return words


def swapped_norms():
    """The converter takes the norms of q and k for each other, in both directions."""
    from lightning_megatron.models import bailing

    right = bailing._head_norms
    return mock.patch.object(bailing, "_head_norms", lambda a, b, c, ours, d: right(a, b, c, ours[::-1], d))


@pytest.fixture(scope="module")
def results(place: Path) -> dict[str, tuple[int, str]]:
    """All commands, in one process."""

    def verify(source: str, checkpoint: str, *more: str) -> list[str]:
        out = ["--table", f"{place}/tables/{source}-{Path(checkpoint).name}.json", "--card", f"{place}/cards"]
        return ["verify", *names_of(place, source, checkpoint), *FEW, *out, *more]

    given = {name: verify(name, f"{name}-megatron") for name in ("latent", "minimax", "half", "tnl")}
    given |= {
        "hybrid": verify("hybrid", "hybrid-megatron", "--no-prediction"),
        "with-prediction": verify("hybrid", "hybrid-megatron", "--name", "with-prediction"),
        "grouped": verify("grouped", "grouped-megatron", "--prompt", "w5 w17 w3", "--note", "Random.", "--name", "G"),
        "perturbed": verify("perturbed", "grouped-megatron", "--prompt", "w5 w17"),
        "nan": verify("nan", "nan-megatron", "--prompt", "w5 w17"),
        "offset": verify("grouped", "offset-megatron", "--revision", "abc", "--name", "offset"),
        "only": verify("grouped", "offset-megatron", "--tensors-only", "--name", "only"),
        "swapped": [
            *("swapped=", "import", *names_of(place, "grouped", "swapped-megatron"), "then"),
            *verify("grouped", "swapped-megatron", "--name", "swapped"),
        ],
        "another": verify("tnl", "grouped-megatron"),
        "name": verify("tnl", "tnl-megatron", "--name", "a/b"),
        "short": verify("grouped", "short-megatron"),
        "step": verify("grouped", "grouped-megatron", "--step", "4"),
        "renamed": verify("grouped", "renamed-megatron"),
        "iteration": verify("grouped", "saved/iter_0000012", "--name", "iteration"),
        "tokenizer": verify("tnl", "tnl-megatron", "--prompt", "some text"),
        "words": verify("words", "grouped-megatron", "--prompt", "w999"),
        "long": verify("grouped", "grouped-megatron", "--tokens", "5000"),
        "without": ["without-transformers=", *verify("minimax", "minimax-megatron")],
        "without-only": [
            *("without-transformers=", *verify("minimax", "minimax-megatron", "--tensors-only", "--name", "mo"))
        ],
        "memory": ["little-memory=", *verify("latent", "latent-megatron")],
    }
    (found,) = spawn(commands, 1, place, list(given.values()), timeout=200)
    return dict(zip(given, found, strict=True))


@pytest.mark.parametrize("name", ["latent", "grouped", "minimax", "half", "tnl", "hybrid"])
def test_a_good_import(name: str, results: dict[str, tuple[int, str]], place: Path) -> None:
    status, said = results[name]
    assert status == 0, said
    card = json.loads((place / f"cards/{'G' if name == 'grouped' else name}.json").read_text())
    config = json.loads((place / name / "config.json").read_text())
    assert card["status"] == "passed" and card["tolerance"] == 1e-5 and card["checkpoint"] == "release"
    assert card["command"].startswith("lightning-convert verify ") and f"{name}-megatron" in card["command"]
    assert card["tensors"]["same"] == card["tensors"]["compared"] > 10 and card["tensors"]["different"] == 0
    kinds = [row["kind"] for row in card["layers"]]
    assert len(kinds) == config.get("num_hidden_layers", config.get("decoder_layers")) and "lightning" in kinds
    assert ("softmax" in kinds) == (name != "tnl")
    assert all(0 < row["difference"] < 1e-5 for row in [*card["layers"], card["logits"]])
    experts = name in ("latent", "half", "minimax", "hybrid")
    assert (card["expert_margin"] or 0) > 0 if experts else card["expert_margin"] is None
    assert card["greedy"]["agree"] and card["greedy"]["megatron"] == card["greedy"]["reference"]
    assert len(card["greedy"]["megatron"].split()) == 5
    assert card["reference"].startswith("transformers" if name == "minimax" else "formulas")
    assert {"lightning-megatron", "torch", "megatron-core", "transformers", "Python", "CPU"} <= card["versions"].keys()
    assert card["revision"]["kind"].startswith("sha256 of config.json") and len(card["revision"]["value"]) == 64
    text = (place / f"cards/{card['model']}.md").read_text()
    for value in (card["date"], card["command"], card["revision"]["value"], card["reference"], "**passed**"):
        assert value in text
    prompt = "'w5 w17 w3'" if name == "grouped" else "96 random token ids, seed "
    assert card["tokens"]["prompt"].startswith(prompt) and card["tokens"]["prompt"] in text
    assert ("Random." in text) == (name == "grouped")


def test_a_card_of_hybrid_model(results: dict[str, tuple[int, str]], place: Path) -> None:
    """It has the layers of config.json, and the pattern that they have in Megatron."""
    card = json.loads((place / "cards/hybrid.json").read_text())
    letters = card["hybrid_layer_pattern"]
    assert "".join({"lightning": "L", "softmax": "*"}[row["kind"]] for row in card["layers"]) == letters[::2]
    text = (place / "cards/hybrid.md").read_text()
    assert f"| `release`, of HybridModel (`--hybrid-layer-pattern {letters}`) |" in text
    assert "tensors of multi-token prediction (--no-prediction)" in results["hybrid"][1]
    assert json.loads((place / "cards/latent.json").read_text())["hybrid_layer_pattern"] is None
    status, said = results["with-prediction"]
    assert status == 1 and "--mtp-num-layers: None in the checkpoint, 1 by config.json" in said, said
    assert "compare an import without them with --no-prediction" in said
    assert "is another model than" in said and "give the folder that the checkpoint was" in results["another"][1]


def test_one_iteration(results: dict[str, tuple[int, str]], place: Path) -> None:
    """Given by its folder, with no tracker file beside it."""
    status, said = results["iteration"]
    assert status == 0, said
    card = json.loads((place / "cards/iteration.json").read_text())
    assert card["checkpoint"] == "iter_0000012" and card["tokens"]["prompt"].startswith("'Linear attention keeps")


def test_one_value_of_a_tensor(results: dict[str, tuple[int, str]], place: Path) -> None:
    status, said = results["perturbed"]
    assert status == 1 and f"1 tensor differs, most of all {PERTURBED}; from layer 1 (" in said.splitlines()[-1], said
    rows = json.loads((place / "tables/perturbed-grouped-megatron.json").read_text())
    wrong = [row for row in rows if row["status"] != "same"]
    assert [row["name"] for row in wrong] == [PERTURBED]
    assert wrong[0]["difference"] == pytest.approx(0.01, rel=1e-4)
    assert wrong[0]["dtype"] == wrong[0]["megatron_dtype"] == "float32" and len(wrong[0]["shape"]) == 2
    assert json.loads((place / "cards/perturbed.json").read_text())["status"] == "failed"


def test_nan_agrees_with_nothing(results: dict[str, tuple[int, str]], place: Path) -> None:
    """Both sides hold the same NaN, and both compute NaN from it: no reason to pass."""
    status, said = results["nan"]
    last = said.splitlines()[-1]
    assert status == 1 and f"failed: 1 tensor has NaN or infinity, the first {PERTURBED}; from layer 1 (" in last, said
    card = json.loads((place / "cards/nan.json").read_text())
    assert card["tensors"]["not_finite"] == [PERTURBED] and card["tensors"]["different"] == 0
    assert card["logits"]["difference"] == "nan"


def test_another_function_with_the_same_tensors(results: dict[str, tuple[int, str]], place: Path) -> None:
    status, said = results["offset"]
    card = json.loads((place / "cards/offset.json").read_text())
    assert status == 1 and card["status"] == "failed" and card["tensors"]["different"] == 0
    assert "from layer 0 (lightning) on outputs differ" in said.splitlines()[-1]
    assert card["layers"][0]["difference"] > 1e-3 and card["revision"] == {"kind": "given", "value": "abc"}
    assert any("--lightning-decay-offset" in line for line in card["other_function"])


def test_only_tensors(results: dict[str, tuple[int, str]], place: Path) -> None:
    """The record of the function tells another decay all the same."""
    status, said = results["only"]
    card = json.loads((place / "cards/only.json").read_text())
    assert status == 1 and "config.json describes another function than the checkpoint has" in said
    assert card["reference"].startswith("no reference") and "layers" not in card
    status, said = results["without-only"]
    assert status == 0 and "tensors; no model was run" in said
    assert "no reference: only tensors were compared" in (place / "cards/mo.md").read_text()


def test_a_wrong_table_of_tensors(results: dict[str, tuple[int, str]], place: Path) -> None:
    """What maps tensors wrongly in both directions finds them equal; the reference reads their names itself."""
    status, said = results["swapped"]
    card = json.loads((place / "cards/swapped.json").read_text())
    assert status == 1 and card["tensors"]["different"] == 0 and not card["other_function"]
    assert "from layer 0 (lightning) on outputs differ" in said.splitlines()[-1], said


@pytest.mark.parametrize(
    "name, status, said",
    [
        ("another", 1, "tnl is another model than "),
        ("name", 2, "--name 'a/b' must be the name of a file, without folders"),
        ("short", 1, ".distcp is truncated in tensor "),
        ("step", 1, "iter_0000004 is no torch_dist checkpoint (of those there are: release)"),
        ("renamed", 1, "renamed-megatron: Megatron finds a checkpoint by the name iter_0000123 of its folder, or by "),
        ("tokenizer", 2, "--prompt: {place}/tnl has no tokenizer.json; leave it out for random token ids"),
        ("words", 1, "tokenizer.json gives token 999, but vocab_size of config.json is "),
        ("long", 2, "--tokens 5000 are more than max_position_embeddings 512 of config.json; ask for fewer"),
        ("without", 1, "is transformers, which is not installed: pip install transformers; or compare only tensors"),
        ("memory", 1, "but 1.0 GB of memory are free. Use a larger machine, or compare only tensors"),
    ],
)
def test_errors(name: str, status: int, said: str, results: dict[str, tuple[int, str]], place: Path) -> None:
    found, text = results[name]
    lines = [line for line in text.splitlines() if line.startswith("lightning-convert: error: ")]
    assert found == status and len(lines) == 1 and said.format(place=place) in lines[0], text


def test_formulas_of_minimax_against_transformers() -> None:
    case = draw_case("minimax", 11)
    tensors = {name: x.double() for name, x in case["tensors"].items()}
    states, logits = reference.minimax(case["config"], tensors, case["tokens"])
    for found, wanted in zip([*states, logits], [*case["states"], case["logits"]], strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-6  # some of transformers is fp32 all the same


def test_experts_that_rounding_chooses() -> None:
    """Tokens before a close choice are judged, if what differs comes behind it."""
    theirs, margins = torch.ones(20, 4), torch.ones(20)
    ours = theirs.clone()
    judged = lambda: _judged([(theirs, theirs), (ours, theirs)], margins, 1e-5)
    margins[9] = 1e-7
    assert judged() == 20, "nothing differs"
    ours[12:, 1] += 1
    assert judged() == 9
    margins[9], margins[13] = 1, 1e-7
    assert judged() == 20, "what differs before a close choice has another reason"
    margins[12] = 1e-7
    assert judged() == 12
    assert _judged([(ours, theirs)], None, 1e-5) == 20
    ours[0, 0] = torch.nan
    assert judged() == 20, "NaN differs"
    report = dict(
        tensors=dict(different=0, compared=9, not_finite=[]), layers=[], tolerance=1e-5, other_function=[],
        within=dict(tokens=False), tokens=dict(judged=3),
    )  # fmt: skip
    assert card.verdict(report).startswith("only the first 3 tokens can be judged")


def test_differences() -> None:
    x = torch.tensor([1.0, -4.0, 2.0])
    assert differences(x, x.clone()) == (0, 0) and differences(x, x.bfloat16()) == (0, 0)
    assert differences(x + torch.tensor([0, 0, 0.5]), x) == (0.5, 0.125)
    hole = torch.tensor([1.0, torch.nan, 2.0])
    assert differences(hole, hole.double()) == (0, 0)
    for relative in (differences(hole, x)[1], differences(x, hole)[1]):
        assert not relative <= 1e30  # NaN: beyond every tolerance
    assert differences(x, torch.zeros(3)) == (4.0, torch.inf)


def test_revision(place: Path, tmp_path: Path) -> None:
    """A digest that changes with the header, and not with where the folder lies; or what the download noted."""
    folder = shutil.copytree(place / "tnl", tmp_path / "a")
    before = card.revision_of(folder)
    assert before == card.revision_of(place / "tnl") and before != card.revision_of(place / "half")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"one more": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert card.revision_of(folder) != before
    for name in ("config.json", "model.safetensors"):
        note = folder / f".cache/huggingface/download/{name}.metadata"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("0123abc\netag\n1.5\n")
    assert card.revision_of(folder) == {"kind": "commit of the download", "value": "0123abc"}


def test_free_memory() -> None:
    text = Path("/proc/meminfo").read_text()
    total = int(text.split("MemTotal:")[1].split()[0]) * 1024
    assert 0 < verifying.free_memory() < total
