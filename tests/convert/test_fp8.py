"""Block-scaled fp8 weights are dequantized, with their scales accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_megatron.convert import ConvertError, export_checkpoint, import_checkpoint, roundtrip
from lightning_megatron.convert.folder import Folder
from lightning_megatron.convert.fp8 import dequantize
from tests.helpers.convert import CONFIG, tensors_of, write_model

BLOCK = (5, 7)
FP8 = CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)}}
NAME = "model.layers.0.mlp.experts.1.gate_proj.weight"


def quantized() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model with fp8 experts, and the same with what they stand for, value by value."""
    tensors = tensors_of(CONFIG)
    expected = dict(tensors)
    for name in [name for name in tensors if "experts" in name]:
        weight = tensors[name].to(torch.float8_e4m3fn)
        rows, columns = weight.shape
        scale = torch.rand(-(-rows // BLOCK[0]), -(-columns // BLOCK[1])) + 0.5
        tensors |= {name: weight, name + "_scale_inv": scale}
        values = [
            [weight[r, c].float() * scale[r // BLOCK[0], c // BLOCK[1]] for c in range(columns)] for r in range(rows)
        ]
        expected[name] = torch.tensor(values).bfloat16()
    return tensors, expected


def test_import(tmp_path: Path) -> None:
    tensors, expected = quantized()
    write_model(tmp_path / "hf", FP8, tensors, files=3)
    said: list[str] = []
    import_checkpoint(tmp_path / "hf", tmp_path / "m", say=said.append)
    assert any("dequantized 24 fp8 tensors to bf16" in text for text in said)
    export_checkpoint(tmp_path / "m", tmp_path / "out", say=said.append)
    out = Folder(tmp_path / "out")
    assert "quantization_config" not in out.config and out.tensors.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(out.read(name), x), name
    assert roundtrip(tmp_path / "hf", say=said.append)
    assert "fields of config.json that differ: quantization_config" in said


@pytest.mark.parametrize("elements", [1, 40, 1 << 24])
@pytest.mark.parametrize("shape", [(1, 1), (11, 13), (3, 10, 14), (2, 2, 5, 7)])
def test_dequantize(shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_megatron.convert.fp8._ELEMENTS", elements)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], -(-shape[-2] // 5), -(-shape[-1] // 7))
    whole = scale.repeat_interleave(5, -2).repeat_interleave(7, -1)[..., : shape[-2], : shape[-1]]
    assert torch.equal(dequantize(weight, scale, BLOCK), (weight.float() * whole).bfloat16())


@pytest.mark.parametrize(
    "change, config, said",
    [
        ({NAME + "_scale_inv": None}, FP8, f"tensor {NAME} of "),
        ({NAME + "_scale_inv": torch.ones(4, 3)}, FP8, "has shape [4, 3]; with blocks of [5, 7] it must have [5, 3]"),
        ({NAME: torch.ones(24, 16)}, FP8, f"unexpected  {NAME}_scale_inv  found [5, 3]"),
        ({}, CONFIG, "config.json has no quantization_config.weight_block_size"),
        ({}, CONFIG | {"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method is 'awq'"),
        (
            {},
            CONFIG | {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config.weight_block_size is None; fp8 weights need [rows, columns]",
        ),
    ],
)
def test_refused(tmp_path: Path, change: dict, config: dict, said: str) -> None:
    tensors = {name: x for name, x in (quantized()[0] | change).items() if x is not None}
    write_model(tmp_path / "hf", config, tensors)
    with pytest.raises(ConvertError) as error:
        import_checkpoint(tmp_path / "hf", tmp_path / "m")
    assert said in str(error.value)
    assert not list(tmp_path.glob("m*"))
