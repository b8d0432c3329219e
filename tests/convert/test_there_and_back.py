"""Import and export are inverse bit for bit, keep dtypes, and give back what lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lightning_megatron.convert import export_checkpoint, import_checkpoint, roundtrip
from lightning_megatron.convert.dist_read import Checkpoint
from lightning_megatron.models.units import Piece
from tests.convert.helpers import assert_model
from tests.helpers.convert import CONFIG, PADDED, Toy, tensors_of, toy_args, write_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit, files", [(10**9, 1), (8000, 4)])
def test_identity(tmp_path: Path, tied: bool, limit: int, files: int) -> None:
    tensors = write_model(tmp_path / "hf", CONFIG | {"tied": tied})
    tensors["model.norm.weight"][:2] = torch.tensor([float("nan"), -0.0])  # bits, not values
    (tmp_path / "hf").rename(tmp_path / "first")
    write_model(tmp_path / "hf", CONFIG | {"tied": tied}, tensors, files=3)
    import_checkpoint(tmp_path / "hf", tmp_path / "m", jobs=2, part_bytes=5000)
    export_checkpoint(tmp_path / "m", tmp_path / "out", jobs=2, part_bytes=7000, max_shard_bytes=limit)
    assert_model(tmp_path / "out", tensors)
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16, torch.float32}
    for name in ("config.json", "tokenizer.json", "modeling_toy.py"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "hf", "m", "out"]
    if files == 1:
        assert names == ["model.safetensors"]
        assert not (tmp_path / "out/model.safetensors.index.json").exists()
    else:
        assert len(names) >= files and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
        for name in names:
            with safe_open(tmp_path / "out" / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}
                assert set(file.keys()) == {x for x, at in index["weight_map"].items() if at == name}
                assert sum(tensors[x].nbytes for x in file.keys()) <= limit  # noqa: SIM118


def test_megatron_side(tmp_path: Path) -> None:
    """Pieces lie where the units say; the padding of the vocabulary is zero; large pieces are cut."""
    tensors = write_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "m", part_bytes=5000)
    checkpoint = Checkpoint(tmp_path / "m/release")
    family = Toy()
    units = family.units(toy_args(family.flags(CONFIG)))
    for unit in units:
        moved = unit.to_megatron([tensors[named.name] for named in unit.hf])
        for piece, x in zip(unit.megatron, moved, strict=True):
            assert torch.equal(checkpoint.read(piece), x) and checkpoint.tensors[piece.key].dtype == x.dtype
    key, shape = "embedding.word_embeddings.weight", (PADDED, 16)
    word = checkpoint.read(Piece(key, shape, shape, (0, 0)))
    assert not word[50:].any() and torch.equal(word[:50], tensors["model.embed_tokens.weight"])
    assert torch.equal(checkpoint.read(Piece(key, (7, 5), shape, (44, 3))), word[44:51, 3:8])
    assert not any("slope" in key for key in checkpoint.tensors)


def test_large_pieces_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_megatron.convert.dist_write._CHUNK", 300)
    tensors = write_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "m", part_bytes=5000)
    chunks = Checkpoint(tmp_path / "m/release")._chunks["decoder.layers.0.mlp.experts.experts.linear_fc1.weight"][1]
    assert len(chunks) > 4 and max(chunk.sizes.numel() for chunk in chunks) * 2 <= 300
    export_checkpoint(tmp_path / "m", tmp_path / "out")
    assert_model(tmp_path / "out", tensors)


def test_optional_tensors(tmp_path: Path) -> None:
    """May be missing on import, are written on export; roundtrip names them."""
    config, said = CONFIG | {"tied": True}, []
    few = tensors_of(config, optional=False)
    every = few | {"lm_head.weight": few["model.embed_tokens.weight"]}
    every |= {f"model.layers.{i}.attn.slope_rate": torch.arange(1.0, 5).view(4, 1, 1) for i in range(2)}
    write_model(tmp_path / "hf", config, few)
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    export_checkpoint(tmp_path / "m", tmp_path / "out")
    assert_model(tmp_path / "out", every)
    assert roundtrip(tmp_path / "hf", say=said.append)
    assert any("added 3 optional tensors" in text and "lm_head.weight" in text for text in said)
    assert said[-1] == f"{len(few)} of {len(few)} tensors are the same bit for bit"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m", "out"]  # no temporary folder


def test_roundtrip_finds_differences(tmp_path: Path) -> None:
    """A buffer that is not what the model says comes back as what it says."""
    tensors, said = tensors_of(CONFIG), []
    tensors["model.layers.1.attn.slope_rate"][2] = 7
    write_model(tmp_path / "hf", CONFIG, tensors)
    assert not roundtrip(tmp_path / "hf", work=tmp_path, say=said.append)
    assert any(text.startswith("different  model.layers.1.attn.slope_rate: ") for text in said)
    assert said[-1].endswith(f"{len(tensors) - 1} of {len(tensors)} tensors are the same bit for bit, 1 differ")


def test_config_of_the_checkpoint_wins(tmp_path: Path) -> None:
    """Fields that Megatron's args hold are theirs, the others those of --like or of the import."""
    write_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    kept = tmp_path / "m/huggingface/config.json"
    kept.write_text(json.dumps(CONFIG | {"num_heads": 99, "quantization_config": {"quant_method": "fp8"}}))
    export_checkpoint(tmp_path / "m", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG
    (tmp_path / "like").mkdir()
    (tmp_path / "like/config.json").write_text('{"model_type": "toy", "mine": 1}')
    export_checkpoint(tmp_path / "m", tmp_path / "like-this", like=tmp_path / "like")
    config = json.loads((tmp_path / "like-this/config.json").read_text())
    assert config["mine"] == 1 and config["num_heads"] == 4 and "of_no_use_to_megatron" not in config
    assert not (tmp_path / "like-this/tokenizer.json").exists()


def test_without_huggingface_folder(tmp_path: Path) -> None:
    """As a training saves it: the args alone say what model it is."""
    tensors = write_model(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "m")
    (tmp_path / "m/release").rename(tmp_path / "iter_0000020")
    export_checkpoint(tmp_path / "iter_0000020", tmp_path / "out")
    assert_model(tmp_path / "out", tensors)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_heads"] == 4
