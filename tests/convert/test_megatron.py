"""Megatron's own dist_checkpointing reads what an import writes, and an export reads what Megatron saves."""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.enums import AttnBackend

from lightning_megatron.convert import ConvertError, export_checkpoint, import_checkpoint
from lightning_megatron.flags.refused import strides_saved
from tests.helpers.convert import CONFIG, PADDED, Toy, tensors_of, toy_args, write_model
from tests.launch import spawn

HIDDEN, EXPERTS, SIZE = 16, 4, 24
LAYER = "decoder.layers.1."


def shards(rank: int, world: int, tensors: dict[str, torch.Tensor] | None = None) -> dict[str, ShardedTensor]:
    """The state dict of a model of tensor parallel size ``world``, experts divided too; with values, or without."""
    family = Toy()
    state = {}
    for unit in family.units(toy_args(family.flags(CONFIG))):
        moved = unit.to_megatron([tensors[named.name] for named in unit.hf]) if tensors else [None] * len(unit.megatron)
        dtype = torch.float32 if "norm" in unit.hf[0].name or "gate.weight" in unit.hf[0].name else torch.bfloat16
        for piece, x in zip(unit.megatron, moved, strict=True):
            boxed = len(piece.shape) == 3  # one expert: the first dimension is the expert
            shape, prepended = (piece.shape[1:], 1) if boxed else (piece.shape, 0)
            offsets = [(0, piece.offset[0], EXPERTS)] if boxed else []
            axis = 1 if "linear_proj" in piece.key or "fc2" in piece.key else 0
            local = torch.zeros(shape, dtype=dtype) if x is None else x.reshape(shape)
            if len(shape) == 2 and "router" not in piece.key:
                local = local.chunk(world, axis)[rank].contiguous()
                offsets.append((axis + prepended, rank, world))
                replica = 0
            else:
                replica = rank
            name = f"{piece.key}{piece.offset[0] if boxed else ''}"
            state[name] = ShardedTensor.from_rank_offsets(
                piece.key, local, *offsets, replica_id=replica, prepend_axis_num=prepended
            )
    return state


def load(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    from megatron.training import checkpointing

    args = Namespace(non_persistent_global_ckpt_dir=None, non_persistent_ckpt_type=None, ckpt_step=None)
    state, name, release, kind = checkpointing._load_base_checkpoint(folder, args, rank0=True)
    assert release and name == f"{folder}/release" and kind == checkpointing.CheckpointType.GLOBAL
    assert state["args"].num_heads == 4 and state["iteration"] == 0 and state["checkpoint_version"] == 3.0
    assert not dist_checkpointing.load_content_metadata(name)["singleton_local_shards"]
    wanted = shards(rank, world)
    expected = {key: tuple(x.local_shape) for key, x in wanted.items()}
    if strides_saved():  # Megatron compares the keys no more, but what is wanted must be there
        loaded = dist_checkpointing.load(wanted, name)
    else:
        loaded, unread, missing = dist_checkpointing.load(wanted, name, strict="return_all")
        assert not missing and all(key.endswith("._extra_state") for key in unread), (missing, unread)
    assert {key: tuple(loaded[key].shape) for key in expected} == expected
    return {key: loaded[key] for key in expected}


def save(rank: int, world: int, folder: str, tensors: dict[str, torch.Tensor]) -> None:
    """As Megatron's training does, with a tensor of the optimizer and its own classes among the args."""
    args = toy_args(Toy().flags(CONFIG))
    args.attention_backend, args.nested = AttnBackend.auto, SimpleNamespace(x=1)
    state = {"model": shards(rank, world, tensors), "args": args, "iteration": 30, "checkpoint_version": 3.0}
    moment = torch.zeros(4)
    state["optimizer"] = ShardedTensor.from_rank_offsets(
        "optimizer.state.exp_avg.x", moment, (0, rank, world), replica_id=0
    )
    dist_checkpointing.save(state, folder, content_metadata={})


@pytest.mark.parametrize("world", [1, 2])
def test_megatron_loads_an_import(tmp_path: Path, world: int) -> None:
    tensors = write_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "m", part_bytes=5000)
    ranks = spawn(load, world, str(tmp_path / "m"))
    whole = {}
    for key in ranks[0]:
        axis = 1 if "linear_proj" in key or "fc2" in key else 0
        split = ranks[0][key].dim() == 2 and "router" not in key
        whole[key] = torch.cat([rank[key] for rank in ranks], axis) if split else ranks[0][key]
    word = tensors["model.embed_tokens.weight"]
    assert whole["embedding.word_embeddings.weight"].shape == (PADDED, HIDDEN)
    assert torch.equal(whole["embedding.word_embeddings.weight"][: len(word)], word)
    for e in range(EXPERTS):
        name = f"model.layers.1.mlp.experts.{e}."
        gate, up = whole[f"{LAYER}mlp.experts.experts.linear_fc1.weight{e}"].split(SIZE)
        assert torch.equal(gate, tensors[name + "gate_proj.weight"]) and torch.equal(
            up, tensors[name + "up_proj.weight"]
        )
        down = whole[f"{LAYER}mlp.experts.experts.linear_fc2.weight{e}"]
        assert torch.equal(down, tensors[name + "down_proj.weight"])
    heads = whole[LAYER + "self_attention.linear_qkv.weight"].unflatten(0, (4, 3, -1))
    for i, x in enumerate("qkv"):
        assert torch.equal(heads[:, i].flatten(0, 1), tensors[f"model.layers.1.attn.{x}_proj.weight"])
    router = whole[LAYER + "mlp.router.weight"]
    assert router.dtype == torch.float32 and torch.equal(router, tensors["model.layers.1.mlp.gate.weight"])


@pytest.mark.parametrize("legacy", [False, True])
def test_export_of_what_megatron_saved(tmp_path: Path, legacy: bool) -> None:
    """Tensors in shards of two ranks, args with Megatron's classes; or in common.pt, as before 0.19."""
    tensors = tensors_of(CONFIG)
    folder = tmp_path / "saved/iter_0000030"
    folder.mkdir(parents=True)
    (tmp_path / "saved/latest_checkpointed_iteration.txt").write_text("30")
    spawn(save, 2, str(folder), tensors)
    if legacy:
        common = dist_checkpointing.load_common_state_dict(str(folder))
        torch.save(common, folder / "common.pt")
    said: list[str] = []
    allowed = torch.serialization.get_safe_globals()
    assert Namespace in allowed, "by Megatron, for its own loader"
    export_checkpoint(tmp_path / "saved", tmp_path / "out", part_bytes=5000, say=said.append)
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], x) for name, x in tensors.items())
    assert "left out 1 tensors of the optimizer" in said
    export_checkpoint(tmp_path / "saved", tmp_path / "same", step=30, say=said.append)
    with pytest.raises(ConvertError, match=r"iter_0000040 is no torch_dist checkpoint .*iter_0000030"):
        export_checkpoint(tmp_path / "saved", tmp_path / "other", step=40)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    """Args are unpickled by a list of what may be in them."""
    write_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    torch.save({"args": Namespace(x=io.StringIO)}, tmp_path / "m/release/common.pt")
    with pytest.raises(ConvertError, match="cannot read the args of .*StringIO"):
        export_checkpoint(tmp_path / "m", tmp_path / "out")
