"""Training in Megatron's CUDA graphs, on one GPU: as exact as eager, over several steps with other tokens each.

Judge is fp32 without graphs. A gradient that a graph leaves out, or reads from a step before, is no rounding error.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.full_cuda_graph import FullCudaGraphWrapper, get_shared_capture_stream
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.module import Float16Module
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from lightning_megatron.compat import importable
from lightning_megatron.config import LightningOptions
from lightning_megatron.runtime import prepare
from lightning_megatron.spec import get_hybrid_block_spec
from tests import layers
from tests.launch import spawn

STEPS, WARMUP, MICROBATCHES, ROWS, VOCABULARY = 6, 2, 2, 2, 128
RATE = 1e-2
MORE = 1.2  # the error of a run with graphs, in errors of one without
EVERYTHING = dict(qk_norm=True, rope=True, norm="group", norm_groups=2, num_kv_heads=2)
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
EXPERTS = dict(
    num_moe_experts=4, moe_ffn_hidden_size=256, moe_layer_freq=[0, 1, 0, 1], moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="alltoall",
)  # fmt: skip
PADDED = EXPERTS | dict(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is captured of which model."""

    impl: str
    modules: tuple[str, ...] = ()  # none: the whole layer
    hybrid: bool = False
    options: dict = dataclasses.field(default_factory=dict)
    config: dict = dataclasses.field(default_factory=dict)


CASES = {
    "local": Case("local"),
    "local-attn": Case("local", ("attn",), options=EVERYTHING),
    "local-attn-mlp": Case("local", ("attn", "mlp")),
    "local-hybrid": Case("local", hybrid=True, options=EVERYTHING),
    "local-recompute": Case("local", options=EVERYTHING | dict(recompute_qkv=True), config=SELECTIVE),
    "full": Case("full_iteration", options=EVERYTHING),
    "full-hybrid": Case("full_iteration", hybrid=True),
    "full-recompute": Case("full_iteration", options=dict(recompute_qkv=True), config=SELECTIVE),
    "full-recompute-all": Case("full_iteration", hybrid=True, config=FULL),
    "te": Case("transformer_engine", options=EVERYTHING),
    "te-hybrid-attn": Case("transformer_engine", ("attn",), hybrid=True),
    "local-moe": Case("local", ("attn", "moe"), hybrid=True, config=PADDED),
    "te-router": Case("transformer_engine", ("attn", "moe_router"), hybrid=True, config=EXPERTS),
    "te-router-preprocess": Case(
        "transformer_engine", ("attn", "moe_router", "moe_preprocess"), options=EVERYTHING, config=EXPERTS
    ),
    "te-moe": Case("transformer_engine", ("attn", "moe"), options=EVERYTHING, config=PADDED),
}


def build(case: Case, impl: str, dtype: torch.dtype, length: int, weights: dict | None) -> DistributedDataParallel:
    """The model as Megatron's training wraps it."""
    bf16 = dtype == torch.bfloat16
    config = layers.transformer_config(
        **dict(hidden_size=256, num_attention_heads=4, kv_channels=64, num_layers=4, gated_linear_unit=True),
        **dict(activation_func=torch.nn.functional.silu, bias_activation_fusion=False, params_dtype=dtype, bf16=bf16),
        **dict(linear_attention_freq=2 if case.hybrid else None, cuda_graph_impl=impl),
        **dict(cuda_graph_warmup_steps=WARMUP, cuda_graph_modules=list(case.modules) if impl != "none" else []),
        **case.config,
    )
    options = LightningOptions(**case.options)
    layout = prepare(config, options)
    whole = GPTModelConfig(
        transformer=config, transformer_layer_spec=get_hybrid_block_spec(config, options, layout=layout),
        vocab_size=VOCABULARY, seq_length=length, position_embedding_type="rope",
    )  # fmt: skip
    model = GPTModelBuilder(whole).build_model(ProcessGroupCollection.use_mpu_process_groups())
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    if torch.cuda.is_available():
        model.cuda()
    module = Float16Module(config, model) if bf16 else model
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module)


def forward_step(iterator, model):
    batch = next(iterator)
    losses = model(batch["tokens"], batch["positions"], None, labels=batch["labels"])
    return losses, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})


def train(case: Case, impl: str, dtype: torch.dtype, length: int, seed: int, weights: dict | None):
    """Losses and gradients of all steps, with plain gradient descent; and the first weights."""
    capturing = impl == "full_iteration"
    # What gradients are added up on: on the default stream, TransformerEngine's graphs could not be captured.
    stream = None
    if torch.cuda.is_available():
        stream = get_shared_capture_stream() if capturing else torch.cuda.Stream()
    with torch.cuda.stream(stream):  # as megatron.training builds it
        model = build(case, impl, dtype, length, weights)
    config, rng = model.config, torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    first = {name: x.detach().float().cpu().clone() for name, x in plain(model).state_dict().items() if x is not None}
    schedule = get_forward_backward_func()
    if capturing:
        schedule = FullCudaGraphWrapper(schedule, cuda_graph_warmup_steps=WARMUP)
    helper = None
    if impl == "transformer_engine":
        helper = TECudaGraphHelper([model], config, length, ROWS, [])
    found = []
    for step in range(STEPS):
        if helper is not None and step == WARMUP:
            helper.create_cudagraphs()
        draw = lambda: torch.randint(VOCABULARY, (ROWS, length), generator=rng).to(device)
        positions = torch.arange(length, device=device).expand(ROWS, length).contiguous()
        batches = [dict(tokens=draw(), labels=draw(), positions=positions) for _ in range(MICROBATCHES)]
        model.zero_grad_buffer()
        losses = schedule(
            forward_step_func=forward_step, data_iterator=[iter(batches)] if capturing else iter(batches),
            model=[model], num_microbatches=MICROBATCHES, seq_length=length, micro_batch_size=ROWS, forward_only=False,
        )  # fmt: skip
        named = list(plain(model).named_parameters())
        grads = {f"d {name}": p.main_grad.detach().double().cpu() for name, p in named}
        found.append({"loss": sum(x["loss"] for x in losses).double().cpu().reshape(1)} | grads)
        with torch.no_grad():
            for _, p in named:
                p -= (RATE * p.main_grad).to(p.dtype)
    return found, first


def plain(model: torch.nn.Module) -> torch.nn.Module:
    while hasattr(model, "module"):
        model = model.module
    return model


def compare(rank: int, world: int, case: Case, impl: str, length: int, seed: int) -> tuple[dict[str, float], bool]:
    """The largest error of every quantity in errors of eager, and whether all bits are eager's."""
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(
        1234, te_rng_tracker=impl == "transformer_engine", use_cudagraphable_rng=torch.cuda.is_available()
    )
    init_num_microbatches_calculator(0, None, ROWS * MICROBATCHES, ROWS, 1)
    low = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    train_with = partial(train, case, length=length, seed=seed)
    eager, weights = train_with("none", low, weights=None)
    judge, _ = train_with("none", torch.float32, weights=weights)
    graphs, _ = train_with(impl, low, weights=weights)
    worst: dict[str, float] = {}
    for step, (want, one, got) in enumerate(zip(judge, eager, graphs, strict=True)):
        for name, x in want.items():
            assert x.norm() > 0, f"{name} of step {step} is 0: this test cannot fail"
            error, usual = (float((y[name] - x).norm() / x.norm()) for y in (got, one))
            # a loss is a mean over many tokens: its error is luck, and may be almost 0
            worst[name] = max(worst.get(name, 0.0), error / max(usual, 1e-4 if name == "loss" else 1e-6))
    equal = all(torch.equal(x, b[name]) for a, b in zip(eager, graphs, strict=True) for name, x in a.items())
    return worst, equal


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_graphs_train_as_eager_does(name, rng):
    case = CASES[name]
    if case.impl == "transformer_engine" and not importable("transformer_engine.pytorch"):
        pytest.skip("needs TransformerEngine")
    seed = int(torch.randint(2**31, (), generator=rng))
    ((worst, equal),) = spawn(compare, 1, case, case.impl, 1024, seed, gpus=True, timeout=240)
    most = max(worst, key=worst.__getitem__)
    print(f"graphs {name}: {'the bits of eager' if equal else f'{most} has {worst[most]:.2f} errors of eager'}")
    wrong = {key: round(ratio, 2) for key, ratio in worst.items() if not ratio <= MORE}
    assert not wrong, f"{name} {seed=}, in errors of eager: {wrong}"


def test_harness_without_graphs(rng):
    """On a CPU, in fp32: the comparison runs, and equal runs are equal."""
    seed = int(torch.randint(2**31, (), generator=rng))
    for case in ("local-recompute", "local-moe"):
        ((worst, equal),) = spawn(compare, 1, CASES[case], "none", 32, seed)
        assert equal and set(worst.values()) == {0.0} and len(worst) > 20
