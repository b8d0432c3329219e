"""``prepare`` for a second model of one process: a changed config, another layout."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer import attention

from lightning_megatron.config import LightningOptions
from lightning_megatron.runtime import prepare
from tests.helpers.context_parallel import tokens_of
from tests.launch import spawn
from tests.layers import transformer_config
from tests.ops.cases import randn


@pytest.mark.parametrize("copied", [False, True])
def test_a_config_changed_since_is_looked_at_again(copied, capsys):
    """A copy of a prepared config is marked as prepared, too."""
    config = transformer_config(linear_attention_freq=2)
    prepare(config)
    prepare(config)
    assert capsys.readouterr().out.count("lightning layers") == 1
    changed = copy.deepcopy(config) if copied else config
    changed.linear_attention_freq = [1] * (config.num_layers - 1) + [0]
    prepare(changed)
    assert f"{config.num_layers - 1} lightning layers" in capsys.readouterr().out
    changed.linear_attention_freq[-1] = 2  # the list of the model above, changed in place
    with pytest.raises(ValueError, match="may hold only 1"):
        prepare(changed)


def rotate_two_models(rank: int, world: int) -> list[float]:
    """Largest errors of Megatron's packed rope in softmax layers of two models, by the layout of each."""
    bounds, found = torch.tensor([0, 8, 24, 32]), []
    angles = torch.arange(64.0)[:, None, None, None] * torch.tensor([0.3, 0.3])  # [64, 1, 1, 2], of positions
    x = randn(torch.Generator().manual_seed(1), 32, 1, 2).float()
    configs = {}
    for layout in ("zigzag", "zigzag-documents"):
        configs[layout] = transformer_config(context_parallel_size=world, linear_attention_freq=2)
        prepare(configs[layout], LightningOptions(), layout=layout)
    for layout, config in configs.items():
        mine = tokens_of(rank, world, layout, [32 // world] * world, bounds)
        starts = bounds[torch.searchsorted(bounds, mine, right=True) - 1]
        turned = torch.view_as_complex(x[mine, 0].contiguous()) * torch.exp(0.3j * (mine - starts))
        got = attention.apply_rotary_pos_emb(
            x[mine], angles, config=config, cu_seqlens=bounds, cp_group=dist.group.WORLD
        )
        found.append(float((torch.view_as_complex(got[:, 0].contiguous()) - turned).abs().max()))
        if "inverse" in inspect.signature(attention.apply_rotary_pos_emb).parameters:  # in megatron-core 0.20
            got = attention.apply_rotary_pos_emb(
                got, angles, config=config, cu_seqlens=bounds, cp_group=dist.group.WORLD, inverse=True, max_seqlen=64
            )
            found.append(float((got - x[mine]).abs().max()))
    return found


def test_packed_rope_of_two_layouts_in_one_process():
    for errors in spawn(rotate_two_models, 2):
        assert len(errors) in (2, 4) and max(errors) < 1e-5, errors
