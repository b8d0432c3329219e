"""Documents of a packed batch are as good as alone, in whole models: over ranks, and over ranks that a batch brings."""

from __future__ import annotations

import functools
import re

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from lightning_megatron.config import LightningOptions
from lightning_megatron.runtime import prepare
from lightning_megatron.spec import get_hybrid_block_spec
from tests import layers
from tests.helpers.context_parallel import tokens_of
from tests.helpers.models import gpt
from tests.launch import spawn

LENGTHS = (8, 24, 0, 16, 40, 8)  # a dynamic batch is cut as a whole: documents may cross its chunks
MODELS = {
    "lightning": (dict(norm="group", norm_groups=2, rope=True), dict(add_bias_linear=True)),
    "hybrid": (
        dict(norm="all", qk_norm=True, rope=True, num_kv_heads=2),
        dict(linear_attention_freq=2, num_query_groups=2, qk_layernorm=True),
    ),
    "mla": (dict(norm="all", rope=True), dict(multi_latent_attention=True)),
}


def build(model: str, layout: str, tp: int = 1, sp: bool = False, cp: int = 1, pp: int = 1):
    """The same values in every layout of tensor-parallel ranks; of a pipeline stage ``fill`` sets them."""
    options, config = MODELS[model]
    make = layers.latent_config if config.get("multi_latent_attention") else layers.transformer_config
    stages = dict(pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32) if pp > 1 else {}
    config = make(**config, **layers.layout(tp, sp), **stages, context_parallel_size=cp)
    prepare(config, LightningOptions(**options), layout=layout)
    built = gpt(config, functools.partial(block, options=options, layout=layout))
    rank, rng = parallel_state.get_tensor_model_parallel_rank(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(built.named_parameters()):
            dim = 0 if name.startswith(("embedding.", "output_layer.")) else layers.sliced_dim(name)
            shape = list(parameter.shape)
            if dim is not None:
                shape[dim] *= tp
            whole = torch.randn(shape, generator=rng)
            whole = 1 + 0.3 * whole if "norm" in name else whole * 0.2
            parameter.copy_(whole if dim is None else whole.chunk(tp, dim)[rank])
    return built


def fill(built, values: dict[str, torch.Tensor]) -> None:
    """The values of this stage's parameters, of those of the whole model."""
    first = built.decoder.layers[0].layer_number - 1
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            whole = re.sub(r"(?<=decoder\.layers\.)\d+", lambda found: str(int(found[0]) + first), name)
            tied = "embedding.word_embeddings.weight" if whole == "output_layer.weight" else whole
            parameter.copy_(values[whole] if whole in values else values[tied])


def block(config, vp_stage=None, *, options: dict, layout: str):
    return get_hybrid_block_spec(config.transformer, LightningOptions(**options), vp_stage=vp_stage, layout=layout)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, labels = torch.randint(64, (2, 1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return tokens, labels, positions, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def values_of(rank: int, world: int, model: str) -> dict[str, torch.Tensor]:
    """All parameters of the whole model."""
    layers.start()
    return {name: parameter.detach() for name, parameter in build(model, "zigzag").named_parameters()}


def alone(rank: int, world: int, model: str) -> torch.Tensor:
    """Losses of all tokens, each document a sequence of its own."""
    layers.start()
    built = build(model, "zigzag")
    tokens, labels, positions, _ = batch()
    documents = zip(*(x.split(LENGTHS, 1) for x in (tokens, positions, labels)), strict=True)
    return torch.cat([built(t, p, None, labels=y) for t, p, y in documents if t.numel()], 1)[0].detach()


def packed_losses(built, mine: torch.Tensor, **groups) -> torch.Tensor:
    return packed_outputs(built, mine, **groups)[0]


def packed_outputs(built, mine: torch.Tensor, **groups) -> torch.Tensor:
    """Losses ``[1, tokens]``, or hidden states ``[tokens, 1, hidden]`` of a stage that is not the last."""
    tokens, labels, positions, bounds = batch()
    longest = max(LENGTHS)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest, **groups)
    return built(tokens[:, mine], positions[:, mine], None, labels=labels[:, mine], packed_seq_params=packed).detach()


def over_ranks(rank: int, world: int, model: str, tp: int, sp: bool, cp: int, wanted: torch.Tensor) -> float:
    """As --sft cuts: every document by itself."""
    layers.start(tp=tp, cp=cp)
    built = build(model, "zigzag-documents", tp, sp, cp)
    cp_rank, tokens = parallel_state.get_context_parallel_rank(), sum(LENGTHS)
    mine = tokens_of(cp_rank, cp, "zigzag-documents", [tokens // cp] * cp, batch()[3])
    return float((packed_losses(built, mine) - wanted[mine]).abs().max())


def over_stages(rank: int, world: int, model: str, cp: int, values: dict, wanted: torch.Tensor) -> float | None:
    """As --sft cuts, two layers on each of two pipeline stages; None on the first, which has no losses."""
    layers.start(pp=2, cp=cp)
    built = build(model, "zigzag-documents", cp=cp, pp=2)
    fill(built, values)
    cp_rank, tokens = parallel_state.get_context_parallel_rank(), sum(LENGTHS)
    mine = tokens_of(cp_rank, cp, "zigzag-documents", [tokens // cp] * cp, batch()[3])
    if parallel_state.is_pipeline_first_stage():
        dist.send(packed_outputs(built, mine).contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    hidden = torch.empty(len(mine), 1, 64)
    dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
    built.set_input_tensor(hidden)
    return float((packed_outputs(built, mine)[0] - wanted[mine]).abs().max())


def over_dynamic_groups(rank: int, world: int, model: str, layout: str, cp: int, wanted: torch.Tensor) -> list[float]:
    """Batch after batch over all ranks, over pairs, and on each rank alone; ``cp``: for how many ranks it was built."""
    layers.start(cp=cp)
    built, tokens, found = build(model, layout, cp=cp), sum(LENGTHS), []
    for size in (world, 2, 1):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        group = groups[rank // size]
        mine = tokens_of(rank % size, size, "zigzag", [tokens // size] * size, batch()[3])
        losses = packed_losses(built, mine, local_cp_size=size, cp_group=group)
        found.append(float((losses - wanted[mine]).abs().max()))
    return found


@pytest.fixture(scope="module")
def losses():
    return functools.cache(lambda model: spawn(alone, 1, model)[0])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "tp, sp, cp", [(1, False, 1), (2, True, 1), (1, False, 2), (2, True, 2)], ids=["one", "tp2-sp", "cp2", "tp2-sp-cp2"]
)
def test_documents_over_ranks(tp, sp, cp, model, losses):
    errors = spawn(over_ranks, tp * cp, model, tp, sp, cp, losses(model))
    print(errors)
    assert max(errors) < 5e-6


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cp", [1, 2], ids=["pp2", "pp2-cp2"])
def test_documents_over_stages(cp, model, losses):
    (values,) = spawn(values_of, 1, model)
    errors = spawn(over_stages, 2 * cp, model, cp, values, losses(model))
    print(errors)
    found = [error for error in errors if error is not None]
    assert len(found) == cp and max(found) < 5e-6


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout, cp", [("zigzag", 1), ("zigzag-documents", 1), ("zigzag", 4), ("zigzag-documents", 4)])
def test_dynamic_groups(layout, cp, model, losses):
    errors = spawn(over_dynamic_groups, 4, model, layout, cp, losses(model))
    print(errors)
    assert max(max(row) for row in errors) < 5e-6
