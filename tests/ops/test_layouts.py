"""Memory layouts of inputs and gradients: the same numbers, wherever they lie."""

import pytest
import torch

from lightning_megatron.ops.triton import tiling

from .cases import Impl, assert_same_bits, check, evaluate, make_case
from .layouts import expanded, fused, head_dim_not_last, inside, summed, time_first


@pytest.mark.parametrize("layout", [time_first, fused, inside, head_dim_not_last, expanded, summed])
@pytest.mark.parametrize("documents", [None, (17, 0, 18)])
def test_layout(impl, rng, cut, layout, documents):
    cut(32)
    case = layout(make_case(rng, impl, B=2, T=35, V=32, documents=documents))
    if documents is None:
        assert not (case.do if layout is summed else case.q).is_contiguous(), "the layout changes nothing"
    check(impl, case)


def test_nothing_is_read_beyond_the_head_dims(impl, rng, cut):
    """Tiles are powers of two: here of 64 columns for K = 48, of 16 too many."""
    cut(32)
    check(impl, inside(make_case(rng, impl, B=1, T=35, K=48, V=16)))
    check(impl, inside(make_case(rng, impl, B=1, T=35, K=16, V=48)))


@pytest.mark.parametrize("documents", [None, (40, 0, 1, 100)])
def test_tensor_descriptors(rng, cut, monkeypatch, documents):
    """What Hopper and later GPUs do, in the interpreter: tiles moved by descriptors, beyond T and the head dims too."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter needs a machine without CUDA")
    monkeypatch.setattr(tiling, "has_descriptors", lambda *tensors: True)
    cut(64)
    impl = Impl("triton", torch.float32)
    check(impl, make_case(rng, impl, B=2, T=141, K=48, V=16, Hkv=1, documents=documents))


@pytest.mark.gpu
def test_addresses_that_descriptors_cannot_have(rng):
    """Odd offsets take the other path, and give the same bits; in bf16 on Hopper GPUs they take Triton's walks."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor descriptors here")
    for dtype in (torch.float16, torch.bfloat16):
        impl = Impl("triton", dtype, "cuda")
        case = make_case(rng, impl, B=1, T=5000, H=4, K=64, V=64)
        odd = inside(case)
        assert tiling.has_descriptors(case.q) and not tiling.has_descriptors(odd.q)
        if tiling.overlaps(case.q, K=64, V=64, segments=(64,)):
            check(impl, odd)
        else:
            assert_same_bits(evaluate(impl.attn, case), evaluate(impl.attn, odd))


def test_inputs_are_left_alone(impl, rng, cut):
    cut(32)
    case = make_case(rng, impl, T=35)
    before = {name: x.clone() for name, x in vars(case).items() if isinstance(x, torch.Tensor)}
    check(impl, case)
    assert all(torch.equal(getattr(case, name), x) for name, x in before.items())
