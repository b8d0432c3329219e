"""The released families in bf16 on a GPU: as exact as their references are in bf16, for every layer and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.module import Float16Module

from lightning_megatron.models.presets import preset_config
from tests import layers
from tests.helpers import released
from tests.helpers.model_cases import MEGATRON, difference, draw_bf16_case
from tests.helpers.released import LARGER
from tests.launch import spawn

# Of the reference's own error in bf16, which rounds as often as Megatron's layers or more often.
MORE = 1.5


def check(rank: int, world: int, file: Path, device: str) -> list[str]:
    layers.start()
    case = torch.load(file)
    config = case["config"]
    args = released.args_of(config, f"--bf16 {MEGATRON}")
    model = released.build(args)
    whole = released.to_megatron(config, args, case["tensors"])
    released.load(model, {key: x.float() for key, x in whole.items()})
    model = Float16Module(model.config, model.to(device))
    tokens, mask = case["tokens"].to(device), case["mask"].to(device)
    forward = lambda: model(tokens, torch.arange(tokens.shape[1], device=device)[None], None, loss_mask=mask)
    states, logits = released.hidden_states(model.module, forward)
    vocabulary = config["vocab_size"]
    (logits[..., :vocabulary].float() * case["weight"].to(device)).sum().backward()
    grads = {key: case["nothing"][key] if x is None else x for key, x in case["grads"].items()}
    wanted = released.slices(model.module, released.to_megatron(config, args, grads))
    errors = {
        "states": max(difference(x.cpu().transpose(0, 1), case["states"][number]) for number, x in states.items()),
        "logits": difference(logits.detach().cpu()[..., :vocabulary], case["logits"]),
    }
    each = {key: difference(p.grad.cpu(), wanted[key]) for key, p in model.module.named_parameters()}
    worst = max(each, key=each.get)
    errors["gradients"] = each[worst]
    lines = [f"{what}: {error:.1e}, reference in bf16 {case['rounded'][what]:.1e}" for what, error in errors.items()]
    lines.append(f"the gradient of {worst}")
    for what, error in errors.items():
        assert error <= MORE * case["rounded"][what], "\n".join(lines)
    return lines


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGER)
def test_as_exact_as_the_reference_in_bf16(rng, name, tmp_path):
    case = draw_bf16_case(preset_config(f"{name}@tiny") | LARGER[name], rng.initial_seed() % 2**31)
    torch.save(case, tmp_path / "case.pt")
    for lines in spawn(check, 1, tmp_path / "case.pt", "cuda", gpus=True, timeout=300):
        print("\n".join(lines))
