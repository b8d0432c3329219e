"""Released models in HybridModel: the same function, the same tensors there and back, and what is refused."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from safetensors.torch import load_file

from lightning_megatron.convert import ConvertError, export_checkpoint, import_checkpoint, model, roundtrip
from lightning_megatron.convert.comparing import compare
from lightning_megatron.convert.dist_read import Checkpoint
from lightning_megatron.convert.folder import Folder
from lightning_megatron.hybrid_model import LETTER
from lightning_megatron.models import hybrid
from lightning_megatron.models.family import command_line, family_of
from lightning_megatron.models.presets import preset_config
from lightning_megatron.record import ATTRIBUTE
from lightning_megatron.training.models import differences_of_function, family_of_args, kinds_of_layers, saved_args
from tests.helpers import random_models
from tests.helpers.model_cases import difference, draw_case, write_released
from tests.helpers.released import args_of
from tests.launch import run_pretrain, spawn

QUIET = dict(say=lambda text: None)
NEW = dict(hybrid_model=True, prediction=False, **QUIET)
RUN = (
    "--use-checkpoint-args --seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --mock-data "
    "--vocab-size 90 --log-interval 1 --eval-iters 0 --num-workers 0 --save-interval 1 --no-save-optim --no-save-rng "
    "--moe-router-bias-update-rate 0 --optimizer sgd --sgd-momentum 0 --weight-decay 0 --lr-decay-style constant"
).split()
STEP = 1e-5  # relative RMS of a tensor after a step: sums of fp32 over ranks in another order
LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "ep2": "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    return write_released(folder, config, tensors)


def without_prediction(folder: Path, layers: int) -> Path:
    """A folder beside it, without layers of multi-token prediction; by hand."""
    config = json.loads((folder / "config.json").read_text()) | dict(num_nextn_predict_layers=0)
    tensors = load_file(folder / "model.safetensors")
    number = re.compile(r"model\.layers\.(\d+)\.")
    ahead = [name for name in tensors if (found := number.match(name)) and int(found[1]) >= layers]
    return write(folder.with_name("less"), config, {name: tensors[name] for name in tensors if name not in ahead})


# ---- the same function -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def computed(rank: int, world: int, folders: list[Path], tokens: torch.Tensor, words: int) -> list[Any]:
    """(name of the model's class, logits) of each checkpoint."""
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint

    found = []
    for folder in folders:
        with loaded_model(read_checkpoint(folder), vocab_size=words, dtype=torch.float32) as model:
            places = torch.arange(tokens.shape[1])[None].expand_as(tokens)
            found.append((type(model).__name__, model(tokens, places, None)[..., :words].clone()))
    return found


@pytest.mark.parametrize("kind", ["bailing latent experts", "bailing latent", "bailing experts", "minimax", "tnl"])
def test_computes_and_holds_the_same(kind, tmp_path, rng):
    """As GPTModel does, as the reference in fp64 does; and its export has the tensors bit for bit."""
    case = draw_case(kind, rng.initial_seed())
    config = case["config"]
    folder = write(tmp_path / "released", config, case["tensors"])
    import_checkpoint(folder, tmp_path / "gpt", **QUIET)
    flags = import_checkpoint(folder, tmp_path / "hybrid", **NEW)
    assert flags[0] == "--hybrid-layer-pattern" and "--num-layers" not in flags
    ((gpt, ours),) = (
        spawn(computed, 1, [tmp_path / "gpt", tmp_path / "hybrid"], case["tokens"], config["vocab_size"]),
    )[0]
    assert (gpt[0], ours[0]) == ("GPTModel", "HybridModel")
    assert torch.equal(ours[1], gpt[1])
    assert difference(ours[1], case["logits"]) < 1e-5
    export_checkpoint(tmp_path / "hybrid", tmp_path / "exported", **QUIET)
    if ahead := config.get("num_nextn_predict_layers"):
        folder = without_prediction(folder, config["num_hidden_layers"])
        assert len(Folder(folder).tensors) < len(case["tensors"]) and ahead
    said: list[str] = []
    assert compare(Folder(folder), Folder(tmp_path / "exported"), said.append), said
    assert Folder(folder).tensors.keys() == Folder(tmp_path / "exported").tensors.keys()


@torch.inference_mode()
def last_logits(rank: int, world: int, folder: Path, tokens: list[int], words: int) -> torch.Tensor | None:
    """Of two pipeline stages, from caches."""
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.reader import Reader

    flags = LAYOUTS["pp2"].split()
    with loaded_model(read_checkpoint(folder), vocab_size=words, flags=flags, dtype=torch.float32) as found:
        logits = Reader(found, len(tokens)).read(tokens)
        return None if logits is None else logits[0, :words].clone()


def test_layers_of_multi_token_prediction_are_not_loaded(tmp_path, rng, monkeypatch):
    """A checkpoint that has them, behind / in its pattern, computes what one without them does, on one or two stages.

    Only TransformerEngine trains such a model: here its tensors are added to an import, under GPTModel's names.
    """
    config = preset_config("ling-2.6-flash@tiny") | dict(dtype="float32")
    tensors = random_models.draw(family_of(config).units(args_of(config), config), rng)
    folder = write(tmp_path / "released", config, tensors)
    import_checkpoint(folder, tmp_path / "less", **NEW)
    real = model.model_of_config

    def with_prediction(config: dict[str, Any], hybrid_model: bool) -> model.Model:
        ahead = [unit for unit in real(config).units if any(x.key.startswith("mtp.") for x in unit.megatron)]
        found = real(config | dict(num_nextn_predict_layers=0), hybrid_model)
        return found._replace(units=found.units + ahead)

    monkeypatch.setattr(model, "model_of_config", with_prediction)
    import_checkpoint(folder, tmp_path / "more", hybrid_model=True, **QUIET)
    state = dist_checkpointing.load_common_state_dict(str(tmp_path / "more/release"))
    state["args"].hybrid_layer_pattern += "/*E"
    state["args"].mtp_num_layers = getattr(state["args"], ATTRIBUTE)["values"]["mtp_num_layers"] = 1
    torch.save(state, tmp_path / "more/release/common.pt")
    assert any("mtp.layers.0" in key for key in Checkpoint(tmp_path / "more/release").tensors)
    tokens, words = torch.randint(0, config["vocab_size"], (1, 20), generator=rng), config["vocab_size"]
    ((less, more),) = spawn(computed, 1, [tmp_path / "less", tmp_path / "more"], tokens, words)
    assert less[0] == more[0] == "HybridModel" and torch.equal(less[1], more[1])
    last = [row for row in spawn(last_logits, 2, tmp_path / "more", tokens[0].tolist(), words) if row is not None]
    assert last and all(difference(row, more[1][0, -1]) < 1e-5 for row in last)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path, rng):
    """Write the folder of a preset at test size, in fp32."""

    def make(name: str) -> Path:
        config = preset_config(f"{name}@tiny") | dict(dtype="float32")
        tensors = random_models.draw(family_of(config).units(args_of(config), config), rng)
        return write(tmp_path / "released", config, tensors)

    return make


def trained(folder: Path, name: str, lr: float, nproc: int = 1, flags: Sequence[str] = RUN) -> dict[str, torch.Tensor]:
    """Tensors of the export of a step."""
    place = folder.parent
    run = run_pretrain([*flags, "--lr", lr, "--load", place / name, "--save", place / f"{name}-saved"], nproc)
    assert len(run.losses) == 1
    export_checkpoint(place / f"{name}-saved", place / f"{name}-exported", like=folder, **QUIET)
    return load_file(place / f"{name}-exported/model.safetensors")


@pytest.mark.parametrize(
    "model, layout",
    [("minimax-m1", "tp2"), ("ling-2.6-flash", "pp2"), ("ring-mini-linear-2.0", "ep2"), ("tnl-1b", "tp2")],
)
def test_a_step_is_that_of_gpt_model(model, layout, released, tmp_path):
    """Imported, trained and saved in another layout, and exported: moved as GPTModel on one rank moves it."""
    folder = released(model)
    before = load_file(folder / "model.safetensors")
    import_checkpoint(folder, tmp_path / "gpt", prediction=False, **QUIET)
    import_checkpoint(folder, tmp_path / "hybrid", **NEW)
    wanted, found = trained(folder, "gpt", 0.1), trained(folder, "hybrid", 0.1, 2, [*RUN, *LAYOUTS[layout].split()])
    assert found.keys() == wanted.keys() <= before.keys() and len(found) > 10
    for name, x in wanted.items():
        assert difference(found[name], x) < STEP, name
    moved = [name for name, x in found.items() if not torch.equal(x, before[name])]
    assert len(moved) > len(found) / 2
    config = json.loads((tmp_path / "hybrid-exported/config.json").read_text())
    assert not config.get("num_nextn_predict_layers")


def test_another_layout_changes_no_bit(released, tmp_path):
    """Two stages, and the flags that the import prints in place of --use-checkpoint-args; a step of length 0."""
    folder = released("ring-mini-linear-2.0")
    flags = import_checkpoint(folder, tmp_path / "hybrid", **NEW)
    assert flags[1] == "L-LELELE*E"
    stages = f"{LAYOUTS['pp2']} --hybrid-layer-pattern L-L|ELELE*E"
    found = trained(folder, "hybrid", 0, 2, [*RUN[1:], *flags, *stages.split()])
    before = load_file(folder / "model.safetensors")
    assert found.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in found.items())


# ---- what is refused, and said ---------------------------------------------------------------------------------------


def test_multi_token_prediction(released, tmp_path, monkeypatch):
    """Refused for HybridModel before a tensor is read; or left out, which is said."""
    folder, said = released("ling-2.6-flash"), []
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", lambda *names: pytest.fail("a tensor is read"))
        with pytest.raises(ConvertError, match="num_nextn_predict_layers is 1: .* out with --no-prediction"):
            import_checkpoint(folder, tmp_path / "hybrid", hybrid_model=True, **QUIET)
    assert not list(tmp_path.glob("hybrid*"))
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    less = Folder(without_prediction(folder, layers))
    assert roundtrip(folder, hybrid_model=True, prediction=False, say=said.append), said
    count = len(Folder(folder).tensors) - len(less.tensors)
    assert any(text.startswith(f"left out {count} tensors of multi-token prediction") for text in said)
    assert said[-1] == f"{len(less.tensors)} of {len(less.tensors)} tensors are the same bit for bit"


def test_the_flags_of_the_other_model(released, tmp_path):
    """An import for HybridModel does not load into GPTModel, and the message names the pattern."""
    folder = released("tnl-1b")
    import_checkpoint(folder, tmp_path / "hybrid", **NEW)
    config = json.loads((folder / "config.json").read_text())
    flags = command_line(family_of(config).flags(config))
    run = run_pretrain([*RUN[1:], *flags, "--lr", "0", "--load", tmp_path / "hybrid"], check=False)
    assert not run.ok and "Traceback" not in run.log
    assert "is of a HybridModel (--hybrid-layer-pattern L-L-L-)" in run.log


@pytest.mark.parametrize("pattern", ["LL-*-", "L-L", "-L-L", "L--", "L-M-", "L-*-/*-", "L-+-"])
def test_patterns_that_no_released_model_has(pattern):
    with pytest.raises(ValueError, match=r"layers of released models are pairs: an attention, L .* train one of such"):
        hybrid.as_gpt(Namespace(hybrid_layer_pattern=pattern))


def test_another_function_is_named():
    """What config.json does not say is found in the record of a HybridModel, too."""
    config = preset_config("ring-mini-linear-2.0@tiny")
    flags = hybrid.as_hybrid(family_of(config).flags(config), args_of(config))
    args = saved_args(command_line(flags))
    assert not differences_of_function(args, config) and kinds_of_layers(args) == ["lightning"] * 4 + ["softmax"]
    family, again = family_of_args(args)
    assert family.NAME == "bailing" and again["layer_group_size"] == 5 and again["num_hidden_layers"] == 5
    other = saved_args([*command_line(flags), "--lightning-decay-offset", "1"])
    (line,) = differences_of_function(other, config)
    assert line.startswith("--lightning-decay") and "by config.json" in line
    args.hybrid_layer_pattern = "LLLL-EEE*E"  # the same letters
    for read in (family_of_args, lambda args: differences_of_function(args, config), kinds_of_layers):
        with pytest.raises(ValueError, match="layers of released models are pairs"):
            read(args)
    changed = saved_args(command_line(flags | dict(hybrid_layer_pattern="L-LELE*E*E")))
    lines = differences_of_function(changed, config)
    assert any(line.startswith("--linear-attention-freq: LLLss in the checkpoint, LLLLs by") for line in lines)


def test_letters_are_megatrons():
    """``models`` does not import Megatron."""
    ours = (hybrid.LIGHTNING, hybrid.SOFTMAX, hybrid.DENSE, hybrid.EXPERTS, hybrid.STAGES, hybrid.AHEAD)
    megatrons = (Symbols.ATTENTION, Symbols.MLP, Symbols.MOE, Symbols.PIPE, Symbols.MTP_SEPARATOR)
    assert ours == (LETTER, *megatrons)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",) * 2,
        ("decoder.layers.3.input_layernorm.weight", "decoder.layers.6.input_layernorm.weight"),
        ("decoder.layers.3.pre_mlp_layernorm.weight", "decoder.layers.7.pre_mlp_layernorm.weight"),
        ("decoder.layers.3.mlp.router.weight", "decoder.layers.7.mlp.router.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_norm.weight"),
        ("output_layer.weight", "output_layer.weight"),
    ],
)
def test_names(name, wanted):
    assert hybrid.key_of(name) == wanted


@pytest.mark.parametrize("name", ["mtp.layers.0.enorm.weight", "decoder.layers.2.other.weight", "decoder.layers.mlp.x"])
def test_a_name_without_a_place(name):
    with pytest.raises(ValueError, match=f"{re.escape(name)} of GPTModel has no place in HybridModel"):
        hybrid.key_of(name)
