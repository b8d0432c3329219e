"""Specs over several ranks: every pipeline stage gets its layers, and softmax layers agree under TP and SP."""

from __future__ import annotations

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from lightning_megatron.config import LightningOptions, prepared_with
from lightning_megatron.mixer import LightningAttention
from lightning_megatron.spec import get_hybrid_block_spec, lightning_layer_spec, lightning_spec
from tests import layers
from tests.launch import spawn
from tests.layers import assert_close, decay_of, transformer_config
from tests.tolerances import LAYERS as TOLERANCE
from tests.tolerances import ZERO_GRADIENT

KINDS = [1, 0, 1, 1]  # the uneven one: no two stages look alike

STAGES = {  # pipeline ranks, fields of the config, and the layers of each virtual stage of each rank
    "pp2": (2, dict(), [[[1, 2]], [[3, 4]]]),
    "pp4": (4, dict(), [[[1]], [[2]], [[3]], [[4]]]),
    "pp2-vp2": (2, dict(virtual_pipeline_model_parallel_size=2), [[[1], [3]], [[2], [4]]]),
    "uneven": (2, dict(num_layers_in_first_pipeline_stage=1), [[[1]], [[2, 3, 4]]]),
    "embedding-counts": (
        2, dict(account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True),
        [[[1, 2]], [[3, 4]]],
    ),
    "layout": (2, dict(pipeline_model_parallel_layout="Ettt|tL"), [[[1, 2, 3]], [[4]]]),
    "layout-vp2": (2, dict(pipeline_model_parallel_layout="E|tt|tt|L"), [[[], [3, 4]], [[1, 2], []]]),
}  # fmt: skip


def stage_layers(rank: int, world: int, config: dict, called: bool) -> list[list[tuple[int, int, list[float] | None]]]:
    """Number, kind and decays of the layers in each virtual stage of this rank."""
    config = transformer_config(
        pipeline_model_parallel_size=world, pipeline_dtype=torch.float32, linear_attention_freq=KINDS, **config
    )
    vpp = config.virtual_pipeline_model_parallel_size
    vpp = None if vpp == 1 else vpp
    layers.start(pp=world, vpp=vpp)
    model = GPTModelConfig(
        transformer=config,
        transformer_layer_spec=lightning_spec if called else lightning_layer_spec,
        vocab_size=64,
        seq_length=8,
    )
    stages = []
    for stage in range(vpp or 1):
        chunk = GPTModelBuilder(model).build_model(
            ProcessGroupCollection.use_mpu_process_groups(), vp_stage=None if vpp is None else stage
        )
        attention = [(layer.layer_number, layer.self_attention) for layer in chunk.decoder.layers]
        assert all(number == module.layer_number for number, module in attention)
        stages.append(
            [
                (number, 1, module.log_decay.tolist()) if isinstance(module, LightningAttention) else (number, 0, None)
                for number, module in attention
            ]
        )
    return stages


@pytest.mark.parametrize("called", [True, False], ids=["block", "layer"])
@pytest.mark.parametrize("world, config, wanted", STAGES.values(), ids=STAGES.keys())
def test_each_stage_holds_its_layers(world, config, wanted, called):
    stages = spawn(stage_layers, world, config, called)
    assert [[[number for number, *_ in stage] for stage in rank] for rank in stages] == wanted
    for number, kind, decays in (layer for rank in stages for stage in rank for layer in stage):
        assert kind == KINDS[number - 1]
        if kind:
            assert decays == decay_of(LightningOptions(), 4, number, 4).float().tolist()


@pytest.mark.parametrize("pp_rank", [0, 3])
def test_stage_without_layers_is_refused(pp_rank):
    config = transformer_config(
        num_layers=2, pipeline_model_parallel_size=4, pipeline_dtype=torch.float32,
        account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=rf"\(pp_rank={pp_rank}, vp_stage=None\) gets none of the 2 layers; use fewer stages, or say"
    ):
        get_hybrid_block_spec(config, pp_rank=pp_rank)
    assert len(get_hybrid_block_spec(config, pp_rank=1).layer_specs) == 1


def build_without_layers(rank: int, world: int, name: str) -> tuple[bool, str]:
    """Whether this rank's config is prepared after the build, and what the build was refused with."""
    layout = "E|tttt|L"  # the ranks that print the map and the FLOPs have no layer
    config = transformer_config(
        pipeline_model_parallel_size=world, pipeline_dtype=torch.float32, pipeline_model_parallel_layout=layout
    )
    layers.start(pp=world)
    spec = {"block": lightning_spec, "layer": lightning_layer_spec}[name]
    model = GPTModelConfig(transformer=config, transformer_layer_spec=spec, vocab_size=64, seq_length=8)
    try:
        GPTModelBuilder(model).build_model(ProcessGroupCollection.use_mpu_process_groups())
    except ValueError as error:
        return prepared_with(config) is not None, str(error)
    return prepared_with(config) is not None, ""


def test_a_rank_without_layers_is_prepared_too_or_the_spec_refused():
    """Where Megatron asks only layers, a rank without them would not be: no map, record and patches there."""
    assert spawn(build_without_layers, 3, "block") == [(True, "")] * 3
    (_, first), (_, message), (_, last) = spawn(build_without_layers, 3, "layer")
    assert first == last == "" and "pipeline rank 0 has no layer" in message and "use lightning_spec" in message


# ---- softmax layers --------------------------------------------------------------------------------------------------

BLOCKS = {
    "qk-layernorm": dict(qk_layernorm=True, num_query_groups=2),
    "qk-layernorm-bias": dict(qk_layernorm=True, normalization="LayerNorm", add_bias_linear=True),
    "plain": dict(num_query_groups=2),
}


def run_block(rank: int, world: int, config: dict, sp: bool, seed: int) -> dict[str, torch.Tensor]:
    """Output and gradients of a hybrid TransformerBlock on this rank."""
    layers.start(tp=world)
    rng = torch.Generator().manual_seed(seed)
    config = transformer_config(num_layers=2, linear_attention_freq=2, **layers.layout(world, sp), **config)
    block = TransformerBlock(config, lightning_spec(config))
    whole = layers.draw_parameters(block, world, rng)
    layers.set_parameters(block, whole, rank, world)
    x, weight = (torch.randn(40, 2, 64, generator=rng) for _ in range(2))
    if sp:
        x, weight = (layers.tokens_here(y, rank, world).clone() for y in (x, weight))
    model = layers.trainable(block, config)
    x.requires_grad_()
    output = model(x, None)
    output.backward(weight)
    result = {"output": output.detach(), "d input": x.grad}
    result |= {f"d {name}": g for name, g in layers.reduce_gradients(model).items()}
    # softmax does not change if one vector is added to all keys of a head: this gradient is 0, without relative error
    shift = result.pop("d layers.1.self_attention.k_layernorm.bias", torch.zeros(()))
    assert float(shift.abs().max()) < ZERO_GRADIENT
    return result


@pytest.mark.parametrize("sp", [False, True], ids=["tp2", "tp2-sp"])
@pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS.keys())
def test_hybrid_block_is_the_same_on_two_ranks(config, sp, rng):
    """Its lightning layers and softmax cores are judged elsewhere; here norms and reductions of the softmax layers."""
    (whole,) = spawn(run_block, 1, config, False, rng.initial_seed())
    assert any("q_layernorm" in name for name in whole) == ("qk_layernorm" in config)
    for rank, got in enumerate(spawn(run_block, 2, config, sp, rng.initial_seed())):
        want = {name: layers.slice_of(name, x, rank, 2) for name, x in whole.items()}
        if sp:
            want |= {name: layers.tokens_here(want[name], rank, 2) for name in ("output", "d input")}
        assert_close(got, want, TOLERANCE[torch.float32])


def check_uncalled_under_sp(rank: int, world: int) -> None:
    layers.start(tp=world)
    config = transformer_config(**layers.layout(world, True))
    with pytest.raises(AssertionError, match="not supported"):
        TransformerBlock(config, lightning_layer_spec)


def test_uncalled_spec_under_sp_fails_in_megatron():
    """Without TransformerEngine and apex, Megatron ends such a block with its torch norm, which asserts against SP."""
    spawn(check_uncalled_under_sp, 2)
