"""Random tiny models of the released families with what their references compute: states, logits, gradients."""

from __future__ import annotations

import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightning_megatron.convert import reference as formulas
from lightning_megatron.convert.independent import note_margins_of
from lightning_megatron.models.family import family_of
from tests.helpers import random_models
from tests.helpers.released import args_of

LENGTH = 32
DOCUMENTS = [0, 5, 6, 21, 32]  # cross the chunks of ranks, and one has one token
KINDS = ("bailing latent experts", "bailing latent", "bailing experts", "bailing", "minimax", "tnl")
# Of the tokens drawn: by how much the last expert chosen must beat the next, since rounding in fp32 may choose others;
# and what rounding may do to a gradient of the reference itself, which is much where a norm divides by almost nothing:
# another order of sums can do several times as much. LITTLE ends the search.
MARGIN, NOISE, LITTLE, DRAWS, MODELS = 2e-5, 2e-5, 3e-6, 20, 5
# Flags of Megatron for the loss of the references: sums over tokens, and no term for the balance of experts.
MEGATRON = "--moe-router-load-balancing-type none --calculate-per-token-loss"
Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def draw_case(kind: str, seed: int, *, packed: bool = False, tied: bool = True) -> Case:
    """A model, tokens, and the reference's results in fp64; other tokens, then other models, where rounding decides."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(MODELS):
        case = _draw(kind, rng, generator, packed, tied)
        if case["noise"] < NOISE:
            return case | dict(kind=kind, seed=seed, packed=packed)
        print(f"{kind}, seed {seed}: rounding decides in this model whatever the tokens; another one")
    raise AssertionError(f"{kind}, seed {seed}: no model and no tokens for which fp32 is enough")


def _draw(kind: str, rng: random.Random, generator: torch.Generator, packed: bool, tied: bool) -> Case:
    """A model, and of all tokens those of the least ``noise``, infinite if experts are chosen by rounding for all."""
    if kind == "tnl":
        config = random_models.tnl_config(rng)
    elif kind == "minimax":
        config = random_models.minimax_config(rng)
    else:
        config = random_models.bailing_config(rng, latent="latent" in kind, experts="experts" in kind)
    config["tie_word_embeddings"] &= tied
    args = args_of(config)
    tensors = random_models.draw(family_of(config).units(args, config), generator)
    shape = (1 if packed else 2, LENGTH)
    weight = torch.randn(*shape, config["vocab_size"], generator=generator)
    mask = loss_mask(shape, packed, config.get("num_nextn_predict_layers", 0))
    factor = args.mtp_loss_scaling_factor
    reference = _minimax if kind == "minimax" else _formulas
    best: Case = dict(noise=math.inf)
    for number in range(DRAWS):
        tokens = torch.randint(0, config["vocab_size"], shape, generator=generator)
        with formulas.choice_margins() as margins:
            results = reference(config, tensors, tokens, weight, packed, torch.float64, mask, factor)
        rounded = reference(config, tensors, tokens, weight, packed, torch.float32, mask, factor)["grads"]
        held = {name: grad for name, grad in results["grads"].items() if grad is not None}  # others: never chosen
        noise = max(1.0 if rounded[name] is None else difference(rounded[name], grad) for name, grad in held.items())
        if min((float(x.min()) for x in margins), default=1.0) > MARGIN and noise < best["noise"]:
            best = results | dict(tokens=tokens, noise=noise)
        if best["noise"] < LITTLE or number >= 8 and best["noise"] < NOISE:
            break
    return best | dict(config=config, tensors=tensors, weight=weight, mask=mask)


def loss_mask(shape: tuple[int, int], packed: bool, ahead: int) -> torch.Tensor:
    """Of multi-token prediction, 0 where a document or a chunk of 2 context-parallel ranks begins: Megatron divides by
    numbers of tokens of a rank, before and after they move by ``ahead`` places and one, which are then equal.
    """
    mask, chunk = torch.ones(shape), shape[1] // 4
    for start in {*range(0, shape[1], chunk), *(DOCUMENTS[:-1] if packed else ())}:
        mask[:, start : start + ahead + 1] = 0
    return mask


def _ahead(state: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, places: int):
    """Sum of the losses of one layer of multi-token prediction over a document."""
    labels, mask = tokens[:, places:], mask[:, places:]
    logits = state[:, : labels.shape[1]] @ weight.T
    return (mask * torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")).sum()


def draw_bf16_case(config: dict[str, Any], seed: int, length: int = 200) -> Case:
    """Weights that bf16 holds, the reference's results in fp64, and its own largest errors in bf16, ``rounded``."""
    generator, args = torch.Generator().manual_seed(seed), args_of(config)
    drawn = random_models.draw(family_of(config).units(args, config), generator)
    tensors = {name: x if "expert_bias" in name else x.bfloat16().float() for name, x in drawn.items()}
    tokens = torch.randint(0, config["vocab_size"], (2, length), generator=generator)
    weight = torch.randn(2, length, config["vocab_size"], generator=generator).bfloat16()
    reference = _minimax if config["model_type"].startswith("minimax") else _formulas
    mask = loss_mask((2, length), False, config.get("num_nextn_predict_layers", 0))
    factor = args.mtp_loss_scaling_factor
    exact, rough = (
        reference(config, tensors, tokens, weight, False, dtype, mask, factor)
        for dtype in (torch.float64, torch.bfloat16)
    )
    rounded = {
        "states": max(map(difference, rough["states"], exact["states"])),
        "logits": difference(rough["logits"], exact["logits"]),
        "gradients": max(
            difference(rough["grads"][name], grad) for name, grad in exact["grads"].items() if grad is not None
        ),
    }
    nothing = {name: torch.zeros_like(x) for name, x in tensors.items()}
    return exact | dict(
        config=config, tensors=tensors, tokens=tokens, weight=weight, rounded=rounded, nothing=nothing, mask=mask
    )


def _documents(tokens: torch.Tensor, packed: bool) -> list[torch.Tensor]:
    bounds = DOCUMENTS if packed else [0, tokens.shape[1]]
    return [tokens[:, a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _formulas(config, tensors: Tensors, tokens, weight, packed: bool, dtype: torch.dtype, mask, factor) -> Case:
    p = {name: x.detach().to(dtype).requires_grad_("expert_bias" not in name) for name, x in tensors.items()}
    model = formulas.model_of(config)
    parts = [model(config, p, document) for document in _documents(tokens, packed)]
    logits = torch.cat([logits for _, logits in parts], 1)
    loss, ahead = (logits * weight).sum(), config.get("num_nextn_predict_layers", 0)
    losses = [torch.zeros((), dtype=dtype) for _ in range(ahead)]
    for (states, _), document, counts in zip(parts, _documents(tokens, packed), _documents(mask, packed), strict=True):
        for k in range(ahead):
            head = p[formulas.output_weight(config)]
            losses[k] = losses[k] + _ahead(states[k - ahead], head, document, counts, k + 2)
    (loss + factor / max(ahead, 1) * sum(losses)).backward()
    states = [torch.cat(x, 1).detach() for x in zip(*(states for states, _ in parts), strict=True)]
    grads = {name: x.grad for name, x in p.items()}
    return dict(states=states, logits=logits.detach(), grads=grads, losses=[x.detach() for x in losses])


def _minimax(config, tensors: Tensors, tokens, weight, packed: bool, dtype: torch.dtype, *_) -> Case:
    """By transformers."""
    from transformers import MiniMaxForCausalLM

    with tempfile.TemporaryDirectory() as name:
        model = load_minimax(write_minimax(Path(name), config, tensors), MiniMaxForCausalLM).to(dtype)
    model.eval()
    note_margins_of(model)
    states: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, found in zip(model.model.layers, states, strict=True):
        layer.register_forward_hook(lambda module, inputs, output, found=found: found.append(output.detach()))
    logits = torch.cat([model(x, use_cache=False).logits for x in _documents(tokens, packed)], 1)
    (logits * weight).sum().backward()
    return dict(states=[torch.cat(x, 1) for x in states], logits=logits.detach(), grads=_minimax_grads(model, tensors))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found.double() - wanted).norm() / wanted.double().norm().clamp(min=1e-12))


def write_released(folder: Path, config, tensors: Tensors) -> Path:
    """An existing folder as released models have it, of any family."""
    if config["model_type"] == "minimax":
        return write_minimax(folder, config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_minimax(folder: Path, config, tensors: Tensors) -> Path:
    """A checkpoint as transformers writes it; the buffers are those of its model."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    held = MiniMaxConfig(**config)
    buffers = {}
    for layer, kind in enumerate(config["layer_types"]):
        if kind == "linear_attention":
            module = MiniMaxLightningAttention(held, layer)
            buffers |= {f"model.layers.{layer}.self_attn.{name}": x.clone() for name, x in module.named_buffers()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | buffers, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_minimax(folder: Path, model_class):
    model, report = model_class.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, experts_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return model


def _minimax_grads(model, tensors: Tensors) -> Tensors:
    """By the names of the checkpoint, in which experts are one by one."""
    held, found = dict(model.named_parameters()), {}
    for name in tensors:
        parts = name.split(".")
        if "experts" in parts:
            layer, expert, which = parts[2], int(parts[5]), parts[6]
            stack = "down_proj" if which == "w2" else "gate_up_proj"
            grad = held[f"model.layers.{layer}.mlp.experts.{stack}"].grad[expert]
            found[name] = grad if which == "w2" else grad.chunk(2)[which == "w3"]
        else:
            found[name] = held[name.replace("block_sparse_moe", "mlp")].grad
    return found
