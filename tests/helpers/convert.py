"""A small family of models for tests and benchmarks of conversion, and folders of such models."""

from __future__ import annotations

import functools
import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_megatron.convert import model
from lightning_megatron.models.units import Named, Piece, Unit, same, whole

CONFIG = {
    "model_type": "toy", "hidden_size": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "num_experts": 4,
    "expert_size": 24, "tied": False, "torch_dtype": "bfloat16", "of_no_use_to_megatron": [1, 2],
}  # fmt: skip
PADDED = 64  # the vocabulary is padded to a multiple


class Toy:
    """Attention and experts; every kind of unit."""

    fields = ("hidden_size", "num_layers", "num_heads", "vocab_size", "num_experts", "expert_size", "tied")

    def flags(self, config: dict[str, Any]) -> dict[str, int]:
        if config.get("sliding_window"):
            raise ValueError(f"sliding_window is {config['sliding_window']}; Megatron has no such layers")
        return {name: int(config[name]) for name in self.fields}

    def config(self, args: Namespace) -> dict[str, Any]:
        return {"model_type": "toy"} | {name: getattr(args, name) for name in self.fields} | {"tied": bool(args.tied)}

    def units(self, args: Namespace, config: dict[str, Any] | None = None) -> list[Unit]:
        hidden, vocab = args.hidden_size, args.vocab_size
        padded = -(-vocab // PADDED) * PADDED
        head = Named("lm_head.weight", (vocab, hidden), optional=bool(args.tied))
        embedding = Named("model.embed_tokens.weight", (vocab, hidden))
        pad, cut = functools.partial(_pad, padded), functools.partial(_cut, vocab)
        word = whole("embedding.word_embeddings.weight", padded, hidden)
        if args.tied:
            units = [Unit((embedding, head), (word,), lambda x: pad(x[:1]), lambda x: cut([x[0], x[0]]))]
        else:
            units = [Unit((embedding,), (word,), pad, cut)]
            units += [Unit((head,), (whole("output_layer.weight", padded, hidden),), pad, cut)]
        units += [same("model.norm.weight", whole("decoder.final_layernorm.weight", hidden))]
        return units + [unit for layer in range(args.num_layers) for unit in self._layer(layer, args)]

    def _layer(self, layer: int, args: Namespace) -> Iterator[Unit]:
        hidden, heads, experts, size = args.hidden_size, args.num_heads, args.num_experts, args.expert_size
        hf, mega = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        yield same(hf + "norm.weight", whole(mega + "input_layernorm.weight", hidden))
        yield Unit(
            tuple(Named(f"{hf}attn.{x}_proj.weight", (hidden, hidden)) for x in "qkv"),
            (whole(mega + "self_attention.linear_qkv.weight", 3 * hidden, hidden),),
            functools.partial(_join_heads, heads),
            functools.partial(_split_heads, heads),
        )
        yield same(hf + "attn.o_proj.weight", whole(mega + "self_attention.linear_proj.weight", hidden, hidden))
        yield Unit((Named(hf + "attn.slope_rate", (heads, 1, 1), optional=True),), (), lambda _: [], _slopes(heads))
        yield same(hf + "mlp.gate.weight", whole(mega + "mlp.router.weight", experts, hidden))
        for e in range(experts):
            name, key = f"{hf}mlp.experts.{e}.", mega + "mlp.experts.experts.linear_"
            yield Unit(
                (Named(name + "gate_proj.weight", (size, hidden)), Named(name + "up_proj.weight", (size, hidden))),
                (Piece(key + "fc1.weight", (1, 2 * size, hidden), (experts, 2 * size, hidden), (e, 0, 0)),),
                lambda x: [torch.cat(list(x)).unsqueeze(0)],
                lambda x: list(x[0].squeeze(0).chunk(2)),
            )
            yield Unit(
                (Named(name + "down_proj.weight", (hidden, size)),),
                (Piece(key + "fc2.weight", (1, hidden, size), (experts, hidden, size), (e, 0, 0)),),
                lambda x: [x[0].unsqueeze(0)],
                lambda x: [x[0].squeeze(0)],
            )


def _pad(rows: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat([x, x.new_zeros(rows - x.shape[0], x.shape[1])]) for x in tensors]


def _cut(rows: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x[:rows] for x in tensors]


def _join_heads(heads: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.stack([x.unflatten(0, (heads, -1)) for x in tensors], 1).flatten(0, 2)]


def _split_heads(heads: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x.flatten(0, 1) for x in tensors[0].unflatten(0, (heads, 3, -1)).unbind(1)]


def _slopes(heads: int) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
    return lambda _: [torch.arange(1.0, heads + 1).view(heads, 1, 1)]


def toy_of(config: dict[str, Any]) -> Toy:
    if config.get("model_type") != "toy":
        raise ValueError(f"model_type {config.get('model_type')!r} is not supported; supported are: toy")
    return Toy()


def toy_args(flags: dict[str, int]) -> Namespace:
    return Namespace(**flags, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, dtype=torch.bfloat16)


def _saved_args(words: list[str]) -> Namespace:
    names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    return toy_args(dict(zip(names, map(int, words[1::2]), strict=True)))


def _toy_of_args(args: Namespace, family: Toy | None) -> tuple[Toy, dict[str, Any]]:
    return Toy(), Toy().config(args)


_KNOWN = {
    "family_of": toy_of,
    "saved_args": _saved_args,
    "family_of_args": _toy_of_args,
    "differences_of_function": lambda args, config: [],
}


def register() -> None:
    """Make the converter know this family, and no other."""
    for name, function in _KNOWN.items():
        setattr(model, name, function)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter knows this family, for one test."""
    for name, function in _KNOWN.items():
        monkeypatch.setattr(model, name, function)


def tensors_of(config: dict[str, Any], seed: int = 0, optional: bool = True) -> dict[str, torch.Tensor]:
    """Random tensors of a model: bf16, with norms and routers in fp32."""
    family = Toy()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for unit in family.units(toy_args(family.flags(config))):
        for named in unit.hf:
            dtype = torch.float32 if "norm" in named.name or "gate.weight" in named.name else torch.bfloat16
            if not named.optional or optional:
                tensors[named.name] = torch.randn(named.shape, generator=generator).to(dtype)
        if not unit.megatron and optional:
            tensors |= dict(zip([named.name for named in unit.hf], unit.to_hf([]), strict=True))
    if config["tied"] and optional:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return tensors


def write_model(
    folder: Path, config: dict[str, Any] = CONFIG, tensors: dict[str, torch.Tensor] | None = None, files: int = 2
) -> dict[str, torch.Tensor]:
    """A Hugging Face folder with tokenizer and index; returns its tensors."""
    tensors = tensors_of(config) if tensors is None else tensors
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "modeling_toy.py").write_text("raise SystemExit('remote code was executed')\n")
    names = list(tensors)
    index = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        part = {name: tensors[name] for name in names[i::files]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tensors
