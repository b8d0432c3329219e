"""Multi-latent attention of softmax layers: outputs and gradients against its formulas, and over ranks against one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection

from lightning_megatron.config import LightningOptions
from lightning_megatron.spec import get_hybrid_layer_specs
from tests import layers
from tests.helpers.context_parallel import tokens_of
from tests.helpers.softmax import causal
from tests.launch import spawn
from tests.layers import Variant, assert_close, latent_config, rms, rotate, with_gradients
from tests.tolerances import LAYERS

EXACT = 1e-12  # relative, in fp64
DOCUMENTS = {
    "plain": (None, "zigzag"),
    "packed": ([0, 5, 5, 6, 31, 48], "zigzag"),  # documents cross chunks, one is empty, one has one token
    "dynamic group": ([0, 11, 48], "zigzag"),
    "documents cut": ([0, 16, 24, 24, 48], "zigzag-documents"),
}
T = 48


def build(config, layout: str):
    """The softmax layer's attention, as the spec of a model has it."""
    spec = get_hybrid_layer_specs(config, LightningOptions(), layout=layout)[1].submodules.self_attention
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return spec.module(config, spec.submodules, layer_number=2, pg_collection=groups, **spec.params)


def judge(config, allowed: torch.Tensor):
    """x [s, b, hidden] -> output, from the formulas (DeepSeek-V2, section 2.1), with all heads and tokens."""
    n, dn, dr = config.num_attention_heads, config.qk_head_dim, config.qk_pos_emb_head_dim
    eps, positions = config.layernorm_epsilon, torch.arange(allowed.shape[-1])

    def attention(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if config.q_lora_rank is None:
            q = x @ p["linear_q_proj.weight"].T
        else:
            c = rms(x @ p["linear_q_down_proj.weight"].T, eps) * p["q_layernorm.weight"]
            q = c @ p["linear_q_up_proj.weight"].T
        c, r = (x @ p["linear_kv_down_proj.weight"].T).split((config.kv_lora_rank, dr), -1)
        c = rms(c, eps) * p["kv_layernorm.weight"]
        k, v = (c @ p["linear_kv_up_proj.weight"].T).unflatten(-1, (n, -1)).split((dn, config.v_head_dim), -1)
        q, r = q.unflatten(-1, (n, dn + dr)), r.unsqueeze(2)
        turned, r = (rotate(y, dr, True, positions) for y in (q[..., dn:], r))
        scores = torch.einsum("ibhd,jbhd->bhij", q[..., :dn], k)
        scores += torch.einsum("ibhd,jbod->bhij", turned, r)
        scores = (scores * (dn + dr) ** -0.5).masked_fill(~allowed, -torch.inf)
        o = torch.einsum("bhij,jbhd->ibhd", scores.softmax(-1), v)
        return o.flatten(2) @ p["linear_proj.weight"].T

    return attention


def allowed_pairs(documents: list[int] | None) -> torch.Tensor:
    if documents is None:
        return causal(T)
    bounds = torch.tensor(documents)
    document = torch.repeat_interleave(torch.arange(len(documents) - 1), bounds.diff())
    return causal(T) & (document[:, None] == document)


def over(attention, groups: ProcessGroupCollection) -> None:
    """Put the layer on other context-parallel ranks."""
    attention.pg_collection = groups
    attention.rotary_pos_emb.cp_group = attention.core_attention.cp_group = groups.cp


def run(attention, x, weight, packed, params) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    attention.zero_grad()
    output, _ = attention(x, None, packed_seq_params=packed)
    output.backward(weight)
    found = {name: p.grad.clone() for name, p in attention.named_parameters()}
    assert found.keys() == params.keys()
    return {"output": output.detach(), "d input": x.grad} | {f"d {name}": grad for name, grad in found.items()}


def check(rank: int, world: int, tp: int, changes: dict, seed: int, dtype: torch.dtype) -> dict[str, float]:
    """This rank's part of all tokens and heads, against the formulas; in fp64 against itself on one rank, because
    Megatron's angles are fp32. Returns the largest error of each kind of sequence.
    """
    cp, rng = world // tp, torch.Generator().manual_seed(seed)
    layers.start(tp=tp, cp=cp)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = [dist.new_group([r]) for r in range(world)][rank]
    config = latent_config(params_dtype=dtype, tensor_model_parallel_size=tp, context_parallel_size=cp, **changes)
    errors = {}
    for kind, (documents, layout) in DOCUMENTS.items():
        if layout == "zigzag-documents" and cp == 4:  # these documents are no multiples of 8
            continue
        attention = build(config, layout).to(dtype)
        groups = attention.pg_collection
        params = layers.draw_parameters(attention, tp, rng)
        layers.set_parameters(attention, params, groups.tp.rank(), tp)
        batch = 1 if documents else 2
        x, weight = (torch.randn(T, batch, 64, generator=rng, dtype=torch.float64).to(device, dtype) for _ in range(2))
        bounds = packed = None
        if documents is not None:
            bounds = torch.tensor(documents, dtype=torch.int32, device=device)
            longest = int(bounds.diff().max()) if kind != "packed" else None  # Megatron's fields may be empty
            packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
        if dtype == torch.float64:
            over(attention, ProcessGroupCollection(tp=groups.tp, cp=alone))
            want = run(attention, x, weight, packed, params)
            over(attention, groups)
        else:
            want = with_gradients(
                judge(config, allowed_pairs(documents)), params, x.cpu().double(), weight.cpu().double()
            )
        mine = tokens_of(rank // tp, cp, layout, [T // cp] * cp, None if bounds is None else bounds.cpu())
        if config.sequence_parallel:
            mine = layers.tokens_here(mine, groups.tp.rank(), tp)
        if kind == "dynamic group":  # the batch says which ranks share it
            over(attention, ProcessGroupCollection(tp=groups.tp, cp=alone))
            packed.local_cp_size, packed.cp_group = cp, groups.cp
        got = run(attention, x[mine], weight[mine], packed, params)
        for name in got:
            if name in ("output", "d input"):
                want[name] = want[name][mine]
                continue
            dist.all_reduce(got[name], group=groups.cp)  # as Megatron sums them
            if config.sequence_parallel and "norm" in name:
                dist.all_reduce(got[name], group=groups.tp)
            if dtype != torch.float64:
                want[name] = layers.slice_of(name, want[name], groups.tp.rank(), tp)
        got = {name: value.cpu() for name, value in got.items()}
        errors[kind] = assert_close(got, want, EXACT if dtype == torch.float64 else LAYERS[dtype])
    return errors


CASES = [
    (1, 1, {}),
    (1, 1, dict(q_lora_rank=None)),
    (2, 2, {}),
    (2, 2, dict(sequence_parallel=True)),
    (2, 1, {}),
    (4, 2, dict(sequence_parallel=True)),
    (4, 2, dict(q_lora_rank=None)),
    (4, 1, {}),
]


@pytest.mark.parametrize("world, tp, changes", CASES)
def test_equals_the_formulas(rng, world, tp, changes):
    errors = spawn(check, world, tp, changes, rng.initial_seed(), torch.float32)
    print("largest relative errors of the ranks:", errors)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{}, dict(q_lora_rank=None), dict(qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128, kv_lora_rank=64)],
)
def test_equals_the_formulas_in_bf16(rng, changes):
    errors = spawn(check, 1, 1, changes, rng.initial_seed(), torch.bfloat16, gpus=True)
    print("largest relative errors:", errors)


@pytest.mark.parametrize("world, tp", [(2, 1), (4, 2), (4, 1)])
def test_context_parallelism_is_exact(rng, world, tp):
    errors = spawn(check, world, tp, {}, rng.initial_seed(), torch.float64)
    print("largest relative errors of the ranks:", errors)


def check_reduced(rank: int, world: int, changes: dict, seed: int) -> float:
    """Against the formulas, after all that Megatron sums between backward and optimizer."""
    rng = torch.Generator().manual_seed(seed)
    layers.start(tp=world)
    config = latent_config(tensor_model_parallel_size=world, **changes)
    attention = build(config, "zigzag")
    params = layers.draw_parameters(attention, world, rng)
    layers.set_parameters(attention, params, rank, world)
    x, weight = (torch.randn(T, 2, 64, generator=rng) for _ in range(2))
    want = with_gradients(judge(config, allowed_pairs(None)), params, x.double(), weight.double())
    if config.sequence_parallel:
        x, weight = (layers.tokens_here(y, rank, world) for y in (x, weight))
    model = layers.trainable(attention, config)
    output, _ = model(x, None)
    output.backward(weight)
    got = layers.reduce_gradients(model)
    wanted = {name: layers.slice_of(name, want[f"d {name}"], rank, world) for name in got}
    return assert_close(got, wanted, LAYERS[torch.float32])


@pytest.mark.parametrize("changes", [{}, dict(sequence_parallel=True)], ids=str)
def test_gradients_that_megatron_sums_over_tensor_parallel_ranks(rng, changes):
    """Megatron sums what has q_layernorm in its name: right for norms of heads, and not for that of a latent."""
    print("largest relative errors of the ranks:", spawn(check_reduced, 2, changes, rng.initial_seed()))


def check_sent(rank: int, world: int, tp: int) -> None:
    """Of the latents: what each rank sends forward, in numbers, and sums backward."""
    layers.start(tp=tp, cp=world // tp)
    config = latent_config(tensor_model_parallel_size=tp, context_parallel_size=world // tp, sequence_parallel=tp > 1)
    attention = build(config, "zigzag")
    tokens, cp = 8, attention.pg_collection.cp
    sent = {"all_gather_into_tensor": 0, "reduce_scatter_tensor": 0}
    for name in sent:
        function = getattr(dist, name)

        def counted(output, given, *args, name=name, function=function, group=None, **kwargs):
            if group is cp:
                sent[name] += min(output.numel(), given.numel())
            return function(output, given, *args, group=group, **kwargs)

        setattr(dist, name, counted)
    x = torch.randn(tokens // tp, 1, 64, requires_grad=True)
    output, _ = attention(x, None)
    latents = tokens // tp * config.kv_lora_rank + tokens * config.qk_pos_emb_head_dim
    assert sent == {"all_gather_into_tensor": latents, "reduce_scatter_tensor": 0}
    output.sum().backward()
    assert sent == {"all_gather_into_tensor": latents, "reduce_scatter_tensor": latents}
    expanded = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
    assert latents < tokens * config.num_attention_heads // tp * expanded


@pytest.mark.parametrize("world, tp", [(2, 1), (4, 2)])
def test_ranks_exchange_latents(world, tp):
    spawn(check_sent, world, tp)


def check_angles(rank: int, world: int, seed: int) -> float:
    """Of a lightning layer, which GPTModel passes none beside multi-latent attention."""
    rng = torch.Generator().manual_seed(seed)
    layers.start(cp=world)
    variant = Variant(dict(rope=True, qk_norm=True, num_kv_heads=2), layer=1, rotary_percent=0.5)
    config = latent_config(context_parallel_size=world)
    options = dataclasses.replace(variant.values, rotary_percent=0.5)
    spec = get_hybrid_layer_specs(config, options)[0].submodules.self_attention
    groups = ProcessGroupCollection.use_mpu_process_groups()
    mixer = spec.module(config, spec.submodules, layer_number=1, pg_collection=groups, **spec.params)
    params = layers.draw_parameters(mixer, 1, rng)
    layers.set_parameters(mixer, params, 0, 1)
    x, weight = (torch.randn(T, 2, 64, generator=rng) for _ in range(2))
    want = with_gradients(lambda p, x: layers.reference(variant, p, x)[0], params, x, weight.double())
    mine = tokens_of(rank, world, "zigzag", [T // world] * world, None)
    got = run(mixer, x[mine], weight[mine], None, params)
    for name in got:
        if name in ("output", "d input"):
            want[name] = want[name][mine]
        else:
            dist.all_reduce(got[name])
    return assert_close(got, want, LAYERS[torch.float32])


@pytest.mark.parametrize("world", [1, 2])
def test_lightning_layers_have_their_own_angles(rng, world):
    print("largest relative errors of the ranks:", spawn(check_angles, world, rng.initial_seed()))
