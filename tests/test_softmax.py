"""The softmax layers' core attention and the layer norm, each against plain formulas in fp64."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnBackend, AttnMaskType

from lightning_megatron.norm import TorchNorm
from lightning_megatron.softmax import SDPACoreAttention
from tests import layers
from tests.helpers.softmax import causal, softmax_attention
from tests.launch import spawn
from tests.layers import assert_close, transformer_config
from tests.tolerances import LAYERS as TOLERANCE
from tests.tolerances import WEIGHTS

BATCH, D = 3, 16


def core(mask_type=AttnMaskType.causal, scale=None, dropout=None, **config) -> SDPACoreAttention:
    return SDPACoreAttention(
        transformer_config(**config), 1, mask_type, "self", attention_dropout=dropout, softmax_scale=scale
    )


def draw(rng, *shapes, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(*shape, generator=rng).to(dtype).requires_grad_() for shape in shapes]


def check(got: torch.Tensor, inputs: list[torch.Tensor], want: torch.Tensor, doubles: list[torch.Tensor]) -> None:
    """Output and gradients, for a random gradient of the output."""
    assert got.dtype == inputs[0].dtype
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(got.dtype)
    names = [f"d {i}" for i in range(len(inputs))]
    got = {"output": got} | dict(zip(names, torch.autograd.grad(got, inputs, weight.to(got.device)), strict=True))
    got = {name: x.cpu() for name, x in got.items()}
    want = {"output": want} | dict(zip(names, torch.autograd.grad(want, doubles, weight.double()), strict=True))
    assert_close(got, want, TOLERANCE[inputs[0].dtype])


def doubled(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


# ---- core attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_causal(groups, scale, dtype, rng):
    inputs = draw(rng, (37, BATCH, 4, D), (37, BATCH, groups, D), (37, BATCH, groups, D), dtype=dtype)
    q, k, v = doubled(inputs)
    # the mask is not read in causal layers: it allows nothing
    got = core(scale=scale)(*inputs, torch.ones(BATCH, 1, 37, 37, dtype=torch.bool))
    check(got, inputs, softmax_attention(q, k, v, causal(37), scale), [q, k, v])


@pytest.mark.parametrize("groups", [4, 2])
def test_one_token_sees_all_keys(groups, rng):
    """Generation: Megatron turns the mask off."""
    inputs = draw(rng, (1, BATCH, 4, D), (23, BATCH, groups, D), (23, BATCH, groups, D))
    q, k, v = doubled(inputs)
    got = core()(*inputs, None, attn_mask_type=AttnMaskType.no_mask)
    check(got, inputs, softmax_attention(q, k, v, torch.ones(1, 1, 1, 23, dtype=torch.bool), None), [q, k, v])


@pytest.mark.parametrize("groups", [4, 2])
def test_several_new_tokens_do_not_see_each_others_future(groups, rng):
    """Generation in steps of more than one token: Megatron turns the mask off there, too."""
    inputs = draw(rng, (3, BATCH, 4, D), (23, BATCH, groups, D), (23, BATCH, groups, D))
    q, k, v = doubled(inputs)
    got = core()(*inputs, None, attn_mask_type=AttnMaskType.no_mask)
    check(got, inputs, softmax_attention(q, k, v, causal(23)[..., 20:, :], None), [q, k, v])


@pytest.mark.parametrize("mask_type", [AttnMaskType.arbitrary, AttnMaskType.padding])
def test_mask_is_true_where_forbidden(mask_type, rng):
    inputs = draw(rng, (9, BATCH, 4, D), (23, BATCH, 2, D), (23, BATCH, 2, D))
    q, k, v = doubled(inputs)
    allowed = torch.rand(BATCH, 1, 9, 23, generator=rng) < 0.5
    allowed[..., 0] = True  # no row without a key
    got = core(mask_type)(*inputs, ~allowed)
    check(got, inputs, softmax_attention(q, k, v, allowed, None), [q, k, v])
    got = core(mask_type)(*inputs, None)
    check(got, inputs, softmax_attention(q, k, v, torch.ones_like(allowed), None), [q, k, v])


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("documents", [(5, 0, 1, 17, 1, 0), (24,), (0, 24)])
def test_packed_documents(documents, groups, padded, rng):
    inputs = draw(rng, (24, 4, D), (24, groups, D), (24, groups, D))
    q, k, v = doubled(inputs)
    document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    allowed = causal(24) & (document[:, None] == document)
    want = softmax_attention(*(x[:, None] for x in (q, k, v)), allowed, 0.2)[:, 0]
    bounds = torch.tensor([0, *documents]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(documents), max_seqlen_kv=max(documents))
    if padded:  # documents lie at the padded bounds
        shorter = (bounds - 1).clamp(min=0)
        packed = dataclasses.replace(
            packed, cu_seqlens_q=shorter, cu_seqlens_kv=shorter, cu_seqlens_q_padded=bounds, cu_seqlens_kv_padded=bounds
        )
    got = core(scale=0.2)(*inputs, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=packed)
    check(got, inputs, want, [q, k, v])


@pytest.mark.parametrize(
    "config, message",
    [
        (
            dict(context_parallel_size=2),
            "context_parallel_size is 2, but pg_collection has no cp; give the process groups",
        ),
        (
            dict(window_size=(8, 0)),
            r"--window-size \(8, 0\) is not supported .*; leave it out, or install TransformerEngine",
        ),
        (dict(softmax_type="off-by-one"), "--softmax-type off-by-one is not supported .*; use vanilla, or install"),
        (dict(qk_clip=True), r"--qk-clip .*is not supported .*; leave it out, or install"),
        (dict(log_max_attention_logit=True), r"--qk-clip \(or --log-max-attention-logit\) is not supported"),
    ],
)
def test_refusals_of_the_config(config, message):
    changed = transformer_config()
    for name, value in config.items():  # after Megatron's own checks, which ask for more
        setattr(changed, name, value)
    with pytest.raises(ValueError, match=message):
        SDPACoreAttention(changed, 1, AttnMaskType.causal, "self")


def test_window_of_other_layers_is_none_of_ours():
    config = transformer_config()
    config.window_size, config.window_attn_skip_freq = (8, 0), 2
    SDPACoreAttention(config, 2, AttnMaskType.causal, "self")
    with pytest.raises(ValueError, match="--window-size"):
        SDPACoreAttention(config, 1, AttnMaskType.causal, "self")


def test_refusals_of_a_call(rng):
    q, k, v = draw(rng, (3, 1, 4, D), (5, 1, 4, D), (5, 1, 4, D))
    with pytest.raises(ValueError, match="causal attention needs as many queries as keys, got 3 and 5"):
        core()(q, k, v, None)
    with pytest.raises(ValueError, match="attention_bias is not supported .*; use TransformerEngine"):
        core()(q, q, q, None, attention_bias=q)


ON_CPU = {"flash": "flash_attention_for_cpu", "unfused": "attention_math", "auto": "flash_attention_for_cpu"}
ON_GPU = {"flash": "flash_attention", "fused": "cudnn_attention", "unfused": "attention_math"}


def kernels_of(attention: SDPACoreAttention, inputs: list[torch.Tensor], bounds: tuple[int, ...]) -> set[str]:
    """Which of SDPA's operators ran, for documents with these bounds, after comparison with the formula."""
    doubles, options = [x.cpu() for x in doubled(inputs)], {}
    document = torch.bucketize(torch.arange(bounds[-1]), torch.tensor(bounds[1:]), right=True)
    if inputs[0].dim() == 3:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        options["packed_seq_params"] = PackedSeqParams("thd", cu_seqlens, cu_seqlens)
    want = softmax_attention(
        *(x if x.dim() == 4 else x[:, None] for x in doubles),
        causal(bounds[-1]) & (document[:, None] == document),
        None,
    )
    with torch.profiler.profile() as profiler:
        got = attention(*inputs, None, **options)
    check(got, inputs, want if inputs[0].dim() == 4 else want[:, 0], doubles)
    start = "aten::_scaled_dot_product_"
    return {x.key.removeprefix(start) for x in profiler.key_averages() if x.key.startswith(start)}


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("name", ON_CPU)
def test_attention_backend(name, packed, rng):
    shape, bounds = ((24, 4, D), (0, 7, 24)) if packed else ((24, 2, 4, D), (0, 24))
    assert kernels_of(core(attention_backend=AttnBackend[name]), draw(rng, *[shape] * 3), bounds) == {ON_CPU[name]}


def test_attention_backend_without_kernels(rng):
    inputs = draw(rng, *[(24, 2, 4, D)] * 3)
    with pytest.raises(ValueError, match="--attention-backend fused is cuDNN, which needs a GPU: use auto, or move"):
        core(attention_backend=AttnBackend.fused)(*inputs, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ON_GPU)
def test_attention_backend_on_a_gpu(name, rng):
    half = draw(rng, *[(256, 2, 4, 64)] * 3, dtype=torch.bfloat16)
    half = [x.detach().cuda().requires_grad_() for x in half]
    assert kernels_of(core(attention_backend=AttnBackend[name]), half, (0, 256)) == {ON_GPU[name]}
    if name != "unfused":
        with pytest.raises(
            ValueError, match=f"--attention-backend {name} has no kernels for fp32: use auto or unfused"
        ):
            core(attention_backend=AttnBackend[name])(*(x.detach().float() for x in half), None)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def dropout_pattern(rank: int, world: int, packed: bool, sp: bool) -> tuple[torch.Tensor, ...]:
    """Attention weights times 64 of 64 equal keys, which v = 1 lays bare: evaluated, and trained twice."""
    layers.start(tp=world)
    attention = core(AttnMaskType.no_mask, dropout=0.25, **layers.layout(world, sp))
    q, k = torch.zeros(64, 1, 2, 64), torch.zeros(64, 1, 2, 64)
    v = torch.eye(64)[:, None, None].expand(64, 1, 2, 64) * 64
    extra = {}
    if packed:
        q, k, v = (x[:, 0] for x in (q, k, v))
        bounds = torch.tensor([0, 64], dtype=torch.int32)
        extra["packed_seq_params"] = PackedSeqParams("thd", bounds, bounds)

    def run(training: bool) -> torch.Tensor:
        # under SP Megatron's attention module runs in the rank's own generator already
        with get_cuda_rng_tracker().fork() if sp else contextlib.nullcontext():
            return attention.train(training)(q, k, v, None, **extra)

    return run(False), run(True), run(True)


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
def test_dropout_in_training_only_and_apart_on_each_rank(sp):
    patterns = spawn(dropout_pattern, 2, False, sp)
    for evaluated, first, second in patterns:
        assert torch.allclose(evaluated, torch.ones_like(evaluated))
        for trained in (first, second):
            assert ((trained.abs() < WEIGHTS) | ((trained - 1 / 0.75).abs() < WEIGHTS)).all()
            assert abs(float((trained == 0).float().mean()) - 0.25) < 0.03  # 8192 draws: 6 standard deviations
        assert not torch.equal(first, second)
    assert not torch.equal(patterns[0][1], patterns[1][1])


def test_dropout_of_packed_documents():
    ((evaluated, trained, _),) = spawn(dropout_pattern, 1, True, False)
    causal_weights = 64 / torch.arange(1, 65)[:, None] * torch.ones(64, 64).tril()
    assert torch.allclose(evaluated.unflatten(1, (2, 64)), causal_weights[:, None].expand(64, 2, 64), rtol=WEIGHTS)
    kept = (
        trained.unflatten(1, (2, 64)).movedim(1, 0)[:, causal_weights > 0] * 0.75 / causal_weights[causal_weights > 0]
    )
    assert ((kept.abs() < WEIGHTS) | ((kept - 1).abs() < WEIGHTS)).all()
    assert abs(float((kept < 0.5).float().mean()) - 0.25) < 0.04


# ---- layer norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, inputs", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("zero_centered", [False, True], ids=["", "1p"])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norm(normalization, zero_centered, parameters, inputs, rng):
    config = transformer_config(normalization=normalization, layernorm_zero_centered_gamma=zero_centered)
    norm = TorchNorm(config, 48, eps=0.05)
    fresh = 0.0 if zero_centered else 1.0
    assert torch.equal(norm.weight, torch.full((48,), fresh))
    assert norm.bias is None if normalization == "RMSNorm" else torch.equal(norm.bias, torch.zeros(48))
    norm.to(getattr(torch, parameters))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(48, generator=rng))
    (x,) = draw(rng, (5, BATCH, 48), dtype=getattr(torch, inputs))
    with torch.no_grad():
        x += 0.5

    y, weight, *bias = doubled([x, *norm.parameters()])
    centered = y if normalization == "RMSNorm" else y - y.mean(-1, keepdim=True)
    want = centered / (centered.square().mean(-1, keepdim=True) + 0.05).sqrt() * (weight + zero_centered)
    want = want + bias[0] if bias else want
    got = norm(x)
    assert got.dtype == norm.weight.dtype
    upstream = torch.randn(5, BATCH, 48, generator=rng).to(got.dtype)
    leaves = ["x", *dict(norm.named_parameters())]
    got = {"y": got} | dict(zip(leaves, torch.autograd.grad(got, [x, *norm.parameters()], upstream), strict=True))
    want = {"y": want} | dict(
        zip(leaves, torch.autograd.grad(want, [y, weight, *bias], upstream.double()), strict=True)
    )
    for name in want:  # torch's bf16 kernels may round inside; of fp32 inputs only results are rounded, by at most 2^-8
        rounded = (inputs if name == "x" else parameters) == "bfloat16"
        once = TOLERANCE[torch.bfloat16] if inputs == "bfloat16" else 2**-8
        assert_close({name: got[name]}, {name: want[name]}, once if rounded else TOLERANCE[torch.float32])


@pytest.mark.parametrize("normalization, names", [("RMSNorm", {"weight"}), ("LayerNorm", {"weight", "bias"})])
@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
def test_norm_parameters_are_marked_for_the_sum_over_ranks(normalization, names, sp):
    norm = TorchNorm(transformer_config(normalization=normalization, **layers.layout(2, sp)), 8)
    assert {name: p.sequence_parallel for name, p in norm.named_parameters()} == dict.fromkeys(names, sp)
