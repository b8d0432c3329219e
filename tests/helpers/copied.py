"""One set of weights, by the names of checkpoints, in models whose modules have other names."""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def tensors_of(model: torch.nn.Module) -> dict[tuple, str]:
    """The names of a model's tensors, by what tells them apart in a checkpoint."""
    found = {}
    for name, held in model.sharded_state_dict(metadata={}).items():
        if isinstance(held, ShardedTensorFactory):
            held = _first(held.build())
        if isinstance(held, ShardedTensor):
            found[held.key, tuple(held.global_offset)] = name
    return found


def _first(held):
    while not isinstance(held, ShardedTensor):
        held = next(iter(held.values() if isinstance(held, dict) else held))
    return held


def draw(model: torch.nn.Module, rng: torch.Generator) -> None:
    """Weights that bf16 holds: norms and biases around their first values, projections that keep the size."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=rng).to(p.device)
            if p.dim() == 1:
                p.copy_((p + 0.3 * x).bfloat16())
            elif "theta" not in name:
                p.copy_((x if "embedding" in name else x * p.shape[-1] ** -0.5).bfloat16())


def copy(source: torch.nn.Module, target: torch.nn.Module) -> dict[str, str]:
    """All weights; returns the name in ``source`` of each tensor of ``target``."""
    theirs, ours, values = tensors_of(source), tensors_of(target), source.state_dict()
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    names = {name: theirs[key] for key, name in ours.items()}
    missing, unexpected = target.load_state_dict({a: values[b] for a, b in names.items()}, strict=False)
    assert not unexpected and not [name for name in missing if "_extra_state" not in name], (missing, unexpected)
    return names
