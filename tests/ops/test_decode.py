"""lightning_decode against formulas in fp64, column by column, and against the operations that it fuses."""

import pytest
import torch

from lightning_megatron.ops import lightning_decode, lightning_step, norm_gate, split_heads, unfusable
from lightning_megatron.ops.triton import step as kernels

from ..tolerances import DECODING
from .cases import assert_same_bits, pick
from .decoding import BACKENDS, BF16, EPS, FEATURE_MAPS, GATES, HEAD_DIMS, SIZES, check_decode, decode_case, graph


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("sizes", SIZES)
def test_decode(every_impl, rng, sizes, feature_map, gate):
    """Each feature map and gate, with random norms and rotations."""
    K = sizes[2]
    norms = [name for name in EPS if pick(rng, (True, False))]
    turned, gated, weight = pick(rng, (0, K // 2, K)), gate != "none" or pick(rng, (True, False)), pick(rng, (0, 1))
    case, about = decode_case(rng, every_impl, sizes, gated=gated, norms=norms, out_weight=weight, turned=turned)
    options = dict(interleaved=pick(rng, (True, False)), scale=pick(rng, (None, 0.7)))
    print(f"{norms=} {turned=} {gated=} {weight=} {options}")
    check_decode(every_impl, case, about, feature_map=feature_map, gate=gate, **options)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of a head where there is a norm over it, of several programs where there is none."""
    for name, size in (("TILE", 16 * 32), ("MIN_COLUMNS", 16)):
        monkeypatch.setattr(kernels, name, size)
    kernels.step_tiles.cache_clear()
    assert kernels.step_tiles(48, 32, whole=True)[:3] == (16, 32, 3)
    assert kernels.step_tiles(48, 32, whole=False)[:3] == (64, 16, 1)
    yield
    kernels.step_tiles.cache_clear()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("turned", [0, 2, 16, 48])
@pytest.mark.parametrize("norms", [(), ("out_norm",), ("q_norm", "k_norm"), tuple(EPS)], ids="-".join)
def test_norms_and_angles(triton_impl, rng, small_tiles, norms, turned, interleaved):
    case, about = decode_case(rng, triton_impl, (4, 2, 48, 32), gated=True, norms=norms, out_weight=True, turned=turned)
    check_decode(triton_impl, case, about, gate="sigmoid", interleaved=interleaved, turn_scale=1.25)


@pytest.mark.parametrize("gate", GATES)
def test_equals_the_operations_after_each_other(triton_impl, rng, gate):
    """As a layer would launch them one by one."""
    case, about = decode_case(rng, triton_impl, (4, 2, 48, 32), gated=True, norms=tuple(EPS), out_weight=True, turned=0)
    want_states, backend = case["states"].clone(), triton_impl.backend
    q, g, k, v = split_heads(case["mixed"][:, None], case["group_dims"], feature_map="silu-qkv", backend=backend)
    q, k = (torch.nn.functional.rms_norm(x, (48,), *case[name]) for x, name in ((q, "q_norm"), (k, "k_norm")))
    o = lightning_step(q, k, v, case["log_decay"], want_states, case["slots"], backend=backend)
    weight, eps = case["out_norm"]
    want = norm_gate(o, g, weight, kind=gate, width=32, eps=eps, backend=backend)[:, 0]
    got = check_decode(triton_impl, case, about, feature_map="silu-qkv", gate=gate)
    for name, x in (("y", want), ("states", want_states)):
        difference = (got[name].double() - x.double()).norm() / x.double().norm()
        assert difference <= (1e-6 if triton_impl.dtype == torch.float32 else DECODING[triton_impl.dtype]), name


def test_strides_of_the_projection(impl, rng):
    case, about = decode_case(rng, impl, (4, 2, 16, 32), gated=True, norms=tuple(EPS), out_weight=True, turned=16)
    want = check_decode(impl, case, about, gate="linear")
    for mixed in (torch.cat((case["mixed"],) * 2, 1)[:, : case["mixed"].shape[1]], case["mixed"].t().contiguous().t()):
        assert_same_bits(check_decode(impl, case | {"mixed": mixed}, about, gate="linear"), want)


@pytest.mark.parametrize("K, V", [(128, 128), (64, 64), (192, 128), (256, 256), (96, 96), (16, 16), (128, 256)])
def test_tiles(K, V):
    """A head of at most 32 KiB is one tile; a state never fills the registers; all of K and V is covered once."""
    for whole in (True, False):
        BK, BV, tiles, warps = kernels.step_tiles(K, V, whole)
        assert BK * tiles >= K > BK * (tiles - 1) and (tiles == 1 or whole)
        assert BV >= V or not whole and BV % 16 == 0
        assert BK * BV / (32 * warps) <= 128
        assert tiles == 1 or K * V > 128 * 64


def test_unfusable():
    dims = (256, 128, 128, 64)
    assert unfusable(dims) is unfusable(dims, norm_width=64, turned=128) is None
    assert "128 channels" in unfusable(dims, norm_width=128)
    assert "LRPE" in unfusable(dims, lrpe=True)
    assert "turns 130" in unfusable(dims, turned=130) and "turns 3" in unfusable(dims, turned=3)
    assert "512" in unfusable((512, 128, 512, 64))


# ---- GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("norms", [(), tuple(EPS)], ids="-".join)
@pytest.mark.parametrize("K", HEAD_DIMS)
@pytest.mark.parametrize("V", HEAD_DIMS)
def test_decode_of_head_dims(rng, K, V, norms):
    case, about = decode_case(rng, BF16, (2, 1, K, V), gated=True, norms=norms, out_weight=True, turned=K // 2)
    check_decode(BF16, case, about, gate="sigmoid")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", BACKENDS, ids=str)
def test_decode_in_a_cuda_graph(rng, impl):
    options = dict(gated=True, norms=tuple(EPS), out_weight=True, turned=32)
    case, about = decode_case(rng, impl, (4, 2, 64, 64), **options)
    angles = torch.zeros(8, 32, device="cuda")
    replay, y = graph(lambda: lightning_decode(**case, angles=angles, gate="sigmoid"))
    for _ in range(3):
        fresh, about = decode_case(rng, impl, (4, 2, 64, 64), **options)
        want = check_decode(impl, fresh, about, gate="sigmoid")
        for name, x in fresh.items():
            if isinstance(x, torch.Tensor):
                case[name].copy_(x)
            elif name in EPS:
                case[name][0].copy_(x[0])
        angles.copy_(torch.cat((about["angles"],) * 2, 1))
        replay.replay()
        assert_same_bits({"y": y, "states": case["states"]}, want)
