"""Released models through lightning-convert: import, training with the entry point, export, and what reads that."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_megatron.convert import ConvertError, export_checkpoint, import_checkpoint
from lightning_megatron.convert.comparing import compare
from lightning_megatron.convert.folder import Folder
from lightning_megatron.convert.verifying import verify
from lightning_megatron.models.family import family_of
from lightning_megatron.models.presets import preset_config
from tests.helpers import random_models
from tests.helpers.generate import greedy
from tests.helpers.model_cases import draw_case, load_minimax, write_minimax
from tests.helpers.released import args_of
from tests.launch import run_pretrain, spawn

MODELS = {"latent": "ling-2.6-flash@tiny", "tnl": "tnl-1b@tiny"}
QUIET = dict(say=lambda text: None)
RUN = (
    "--use-checkpoint-args --seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 0 "
    "--mock-data --vocab-size 90 --log-interval 1 --eval-iters 0 --num-workers 0 --save-interval 1 --no-save-optim "
    "--no-save-rng --moe-router-bias-update-rate 0"
).split()
LAYOUTS = {
    "one": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"),
}


@pytest.fixture
def released(tmp_path, rng):
    """Write the folder of a released model, in bf16 if ``name`` is a preset."""

    def write(name: str) -> Path:
        folder = tmp_path / "released"
        folder.mkdir()
        if name == "minimax":
            case = draw_case("minimax", rng.initial_seed(), tied=False)
            return write_minimax(folder, case["config"], case["tensors"])
        config = preset_config(MODELS[name]) | dict(dtype="bfloat16")
        units = family_of(config).units(args_of(config), config)
        tensors = {
            key: x if "expert_bias" in key else x.bfloat16() for key, x in random_models.draw(units, rng).items()
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text("{}")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.mark.parametrize("name, layout", [("minimax", "tp2"), ("latent", "pp2"), ("tnl", "one")])
def test_trained_and_exported(name, layout, released, tmp_path):
    """With a learning rate of 0, what is exported is what was imported, bit for bit, from any layout."""
    folder = released(name)
    import_checkpoint(folder, tmp_path / "megatron", **QUIET)
    nproc, flags = LAYOUTS[layout]
    flags += "" if name == "minimax" else " --bf16"
    run = run_pretrain([*RUN, *flags.split(), "--load", tmp_path / "megatron", "--save", tmp_path / "saved"], nproc)
    assert len(run.losses) == 1 and ("mtp_1 loss" in run.log) == (name == "latent")
    export_checkpoint(tmp_path / "saved", tmp_path / "exported", like=folder, **QUIET)
    said: list[str] = []
    assert compare(Folder(folder), Folder(tmp_path / "exported"), said.append), said
    assert not (tmp_path / "exported.partial").exists()
    export_checkpoint(tmp_path / "saved", tmp_path / "alone", **QUIET)  # the config.json comes from the args
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("exported", "alone"))
    assert before.keys() == after.keys()
    assert json.loads((tmp_path / "alone/config.json").read_text())["architectures"]


def test_an_import_brings_no_tokenizer(released, tmp_path):
    """So one must be given, and then it is the one (examples/finetune.py trains with it)."""
    import_checkpoint(released("tnl"), tmp_path / "megatron", **QUIET)
    flags = [*RUN[: RUN.index("--mock-data")], "--data-path", tmp_path, "--load", tmp_path / "megatron"]
    (tmp_path.with_suffix(".idx")).touch()
    run = run_pretrain(flags, check=False)
    assert not run.ok and "lightning-pretrain: no tokenizer: the checkpoint was made without one" in run.log
    run = run_pretrain(
        [*flags, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/no/such"], check=False
    )
    assert "lightning-pretrain: --tokenizer-model /no/such: no such file or directory" in run.log


def test_transformers_reads_an_export(released, tmp_path):
    """MiniMax: the same logits at every position, and the same 64 tokens."""
    from transformers import MiniMaxForCausalLM

    folder = released("minimax")
    config = json.loads((folder / "config.json").read_text())
    import_checkpoint(folder, tmp_path / "megatron", **QUIET)
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported", **QUIET)
    prompt, count = [5, 1, 44, 17, 88, 3, 3, 60], 64
    ((logits, tokens),) = spawn(greedy, 1, tmp_path / "megatron", prompt, count, config["vocab_size"])
    model = load_minimax(tmp_path / "exported", MiniMaxForCausalLM).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([prompt]), use_cache=False).logits[0]
        assert float((logits - wanted).norm() / wanted.norm()) < 1e-5
        found = list(prompt)
        for _ in range(count):
            found.append(int(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
    assert tokens == found[len(prompt) :]


def test_multi_token_prediction_in_its_own_file(released, tmp_path):
    """It may be missing in the index; a model without it is imported if its config.json says so, and trained."""
    folder = released("latent")
    tensors = load_file(folder / "model.safetensors")
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    ahead = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"model.layers.{layers}.")}
    assert len(ahead) > 60
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(num_nextn_predict_layers=0)))
    with pytest.raises(ConvertError, match=rf"has model.layers.{layers}.eh_proj.weight, .* says \(0\): correct"):
        import_checkpoint(folder, tmp_path / "megatron", **QUIET)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConvertError, match="none of their .* such as model.layers.8.eh_proj.weight: download .*--no-prediction"
    ):
        import_checkpoint(folder, tmp_path / "megatron", **QUIET)
    save_file(ahead, folder / "model-mtp-layer.safetensors", metadata={"format": "pt"})
    index = dict(metadata={}, weight_map=dict.fromkeys(tensors, "model.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    flags = import_checkpoint(folder, tmp_path / "megatron", **QUIET)
    assert flags[flags.index("--mtp-num-layers") + 1] == "1"

    none = [*RUN[1:], *flags_of(folder), "--mtp-num-layers", "0", "--finetune", "--bf16", "--lightning-loss-chunk", "8"]
    run = run_pretrain([*none, "--load", tmp_path / "megatron", "--save", tmp_path / "saved"])
    assert "this run computes another function" in run.log and "mtp_1 loss" not in run.log
    export_checkpoint(tmp_path / "saved", tmp_path / "exported", like=folder, **QUIET)
    assert json.loads((tmp_path / "exported/config.json").read_text())["num_nextn_predict_layers"] == 0
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert exported.keys() == tensors.keys() and all(torch.equal(exported[name], tensors[name]) for name in tensors)


def test_another_function_is_not_exported(released, tmp_path):
    """A model that was trained with what no config.json says is refused, with the flag."""
    folder = released("tnl")
    import_checkpoint(folder, tmp_path / "megatron", **QUIET)
    more = "--finetune --lightning-gate sigmoid --norm-epsilon 1e-3".split()
    run_pretrain([*RUN[1:], *flags_of(folder), *more, "--load", tmp_path / "megatron", "--save", tmp_path / "saved"])
    with pytest.raises(ConvertError) as error:
        export_checkpoint(tmp_path / "saved", tmp_path / "exported", like=folder, **QUIET)
    assert "no config.json of tnl describes this function" in str(error.value)
    assert "tnl: --lightning-gate: sigmoid in the checkpoint, linear there" in str(error.value)
    assert "--norm-epsilon: 0.001 in the checkpoint, 1e-06 there" in str(error.value)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16), "--multi-latent-attention: Fa"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=4)), "scaled rotary embeddings are not supported"),
        (dict(vocab_size=100), "vocab_size: 256 tokens in the checkpoint (--vocab-size), 100 there"),
        (dict(vocab_size=1000), "vocab_size is 1000, and the checkpoint has 256 rows of the vocabulary"),
    ],
)
def test_further_fields_of_another_model(fields, said, tmp_path, rng):
    """Refused: with them config.json would describe another model than the one that was trained."""
    config = preset_config("ring-mini-linear-2.0@tiny") | dict(dtype="float32")
    folder, like = tmp_path / "released", tmp_path / "like"
    for path, more in ((folder, {}), (like, fields)):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | more))
    tensors = random_models.draw(family_of(config).units(args_of(config), config), rng)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(folder, tmp_path / "megatron", **QUIET)
    with pytest.raises(ConvertError, match="would be that of another model .* give --like the folder") as error:
        export_checkpoint(tmp_path / "megatron", tmp_path / "exported", like=like, **QUIET)
    assert said in str(error.value) and not list(tmp_path.glob("exported*"))


def test_verify_with_more_words_than_rows(released, tmp_path):
    folder = released("tnl")
    import_checkpoint(folder, tmp_path / "megatron", **QUIET)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(vocab_size=1000)))
    with pytest.raises(ConvertError, match="vocab_size is 1000, and the checkpoint has 256 rows .*: give the folder"):
        verify(folder, tmp_path / "megatron", tensors_only=True, **QUIET)


@pytest.mark.parametrize("name", ["minimax", "ring"])
def test_a_base_of_angles_in_two_places(name, tmp_path, rng):
    """Of a model that was trained with another base, both places say that one."""
    model = {"minimax": "minimax-m1@tiny", "ring": "ring-mini-linear-2.0@tiny"}[name]
    config = preset_config(model) | dict(dtype="float32")
    folder, now = tmp_path / "released", tmp_path / "now"
    both, new = (
        config | dict(rope_theta=base, rope_parameters=dict(rope_type="default", rope_theta=float(base)))
        for base in (10000, 50000)
    )
    tensors = random_models.draw(family_of(config).units(args_of(config), config), rng)
    for path, fields in ((folder, both), (now, new)):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(fields))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(now, tmp_path / "megatron", **QUIET)
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported", like=folder, **QUIET)
    found = json.loads((tmp_path / "exported/config.json").read_text())
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 50000
    flags = import_checkpoint(tmp_path / "exported", tmp_path / "again", **QUIET)
    assert flags[flags.index("--rotary-base") + 1] == "50000"


def configured(rank: int, world: int, lines: list[list[str]]) -> list[dict[str, str]]:
    """Megatron's config of the model that each command line trains, by field."""
    from megatron.training import global_vars

    from lightning_megatron.training import run

    found = []
    for line in lines:
        with mock.patch.object(sys, "argv", ["pretrain", *line]):
            container, options = run.configure()
        found.append({name: str(x) for name, x in vars(container.model.transformer).items()} | {"lightning": options})
        global_vars.unset_global_variables()
    return found


@pytest.mark.parametrize("hybrid", [False, True], ids=["gpt", "hybrid"])
@pytest.mark.parametrize("name", ["ling-2.6-flash", "ring-mini-linear-2.0", "minimax-m1", "tnl-1b"])
def test_the_flags_that_are_printed_are_those_of_the_checkpoint(name, hybrid, tmp_path, rng):
    """``import`` says: --use-checkpoint-args, or these flags; so both train the same, routers in fp32 too."""
    config = preset_config(f"{name}@tiny") | dict(dtype="float32", router_aux_loss_coef=0.25)
    tensors = random_models.draw(family_of(config).units(args_of(config), config), rng)
    (tmp_path / "released").mkdir()
    (tmp_path / "released/config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "released/model.safetensors", metadata={"format": "pt"})
    flags = import_checkpoint(
        tmp_path / "released", tmp_path / "megatron", hybrid_model=hybrid, prediction=not hybrid, **QUIET
    )
    run = [*RUN[1:], "--bf16", "--load", str(tmp_path / "megatron")]
    ((brought, given),) = spawn(configured, 1, [[*run, "--use-checkpoint-args"], [*run, *flags]])
    assert {key: (x, given[key]) for key, x in brought.items() if x != given[key]} == {}
    assert brought["num_moe_experts"] == "None" or brought["moe_router_dtype"] == "fp32"
    assert brought["moe_aux_loss_coeff"] == ("0.25" if name == "minimax-m1" else "0.0")


@functools.cache
def flags_of(folder: Path) -> list[str]:
    from lightning_megatron.models.family import command_line

    config = json.loads((folder / "config.json").read_text())
    return command_line(family_of(config).flags(config))
