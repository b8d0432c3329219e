"""Every implementation against the recurrence: sizes, segments, shared heads, decays, scales."""

import pytest
import torch

from ..tolerances import ONE_TOKEN
from .cases import EVERYTHING, check, make_case

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 200)
HEAD_DIMS = (
    (16, 16),
    (16, 48),
    (32, 16),
    (48, 96),
    (64, 128),
    (96, 64),
    (128, 32),
    (192, 16),
    (16, 192),
    (256, 16),
    (32, 256),
)


@pytest.mark.parametrize("T", LENGTHS)
def test_length(every_impl, rng, T):
    check(every_impl, make_case(rng, every_impl, B=4 if T <= 2 else 1, T=T))


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("T, tokens", [(64, 64), (65, 64), (128, 64), (129, 64), (130, 128)])
def test_segments(triton_impl, rng, cut, T, tokens, initial):
    cut(tokens)
    check(triton_impl, make_case(rng, triton_impl, B=2 if T == 65 else 1, T=T, initial=initial))


def test_real_segments(triton_impl, rng):
    check(triton_impl, make_case(rng, triton_impl, B=1, H=1, T=1030))


@pytest.mark.parametrize("documents", [None, (90, 0, 30, 200)])
def test_parts_out_of_reach(triton_impl, rng, cut, documents):
    """Decays from none to so strong that earlier parts and chunks are skipped: -1 reaches 50 tokens back."""
    cut(128)
    decays = (0.0, -0.001, -0.3, -1.0, -5.0, -1e9)
    check(triton_impl, make_case(rng, triton_impl, B=1, T=320, H=6, log_decay=decays, documents=documents))


@pytest.mark.parametrize("K, V", HEAD_DIMS)
def test_head_dims(impl, rng, cut, K, V):
    scale = 1 if impl.device == "cpu" else 4  # the walks of Hopper have segments of whole chunks of 64
    cut(32 * scale)
    check(impl, make_case(rng, impl, B=1, T=35 * scale, K=K, V=V, H=1))


@pytest.mark.parametrize("K, V", [(48, 80), (256, 256)])
def test_head_dims_in_every_dtype(every_impl, rng, K, V):
    check(every_impl, make_case(rng, every_impl, B=1, H=1, T=18, K=K, V=V))


@pytest.mark.parametrize("H, Hkv", [(4, 2), (6, 2), (3, 1)])
def test_shared_heads(every_impl, rng, cut, H, Hkv):
    cut(32)
    check(every_impl, make_case(rng, every_impl, B=1, T=40, H=H, Hkv=Hkv, V=32))


@pytest.mark.parametrize("uses", [EVERYTHING, ("o",), ("final_state",)])
@pytest.mark.parametrize("initial", [True, False])
def test_gradient_through_each_output(impl, rng, cut, initial, uses):
    cut(64)
    got = check(impl, make_case(rng, impl, B=1, T=70, initial=initial), uses)
    assert ("dinitial_state" in got) == initial
    if uses == ("final_state",):
        assert not got["dq"].any()


def test_no_tokens(impl, rng):
    got = check(impl, case := make_case(rng, impl, T=0))
    assert torch.equal(got["final_state"], case.initial_state)
    assert torch.equal(got["dinitial_state"], case.dfinal)
    assert not check(impl, make_case(rng, impl, T=0, initial=False))["final_state"].any()


def test_no_sequences(impl):
    """B = 0, as the last rank of an uneven batch may have; the recurrence cannot stack nothing."""
    q, log_decay = torch.zeros(0, 3, 2, 16, dtype=impl.dtype, device=impl.device, requires_grad=True), (-0.1, -0.2)
    o, final = impl.attn(q, q, q, torch.tensor(log_decay, dtype=impl.wide, device=impl.device))
    (o.sum() + final.sum()).backward()
    assert o.shape == q.shape == q.grad.shape and final.shape == (0, 2, 16, 16)


@pytest.mark.parametrize("scale", [None, 1, 0.0, -2.5])
def test_scale(impl, rng, scale):
    case = make_case(rng, impl, B=1, T=40, scale=scale)
    got = check(impl, case)
    if scale is None:  # the default is K^-0.5 = 1/4
        assert torch.equal(got["o"], check(impl, case.replace(scale=0.25))["o"])


@pytest.mark.parametrize(
    "log_decay", [(0.0,), (-1e-9, -1e-30), (-5.0, -50.0), (-1e4, -3e38), (0.0, -1e4, -1e-3, -5.0)], ids=str
)
def test_decay(impl, rng, cut, log_decay):
    """Nothing may overflow; and of a head that forgets everything a token's product with itself remains."""
    cut(64)
    case = make_case(rng, impl, B=1, T=70, H=len(log_decay), log_decay=log_decay)
    got = check(impl, case)
    assert all(x.isfinite().all() for x in got.values())
    for h in (h for h, value in enumerate(log_decay) if value <= -1e4):
        want = 0.25 * (case.q.double() * case.k.double()).sum(3, keepdim=True) * case.v.double()
        torch.testing.assert_close(
            got["o"][:, :, h].double(),
            want[:, :, h],
            rtol=0,
            atol=ONE_TOKEN[impl.dtype] * float(want[:, :, h].abs().max()),
        )


def test_long_without_decay(impl, rng, cut):
    """Nothing is forgotten over 1200 tokens: errors must not pile up."""
    cut(512)
    check(impl, make_case(rng, impl, B=1, H=1, T=1200, log_decay=(0.0,)))


def test_zeros(impl, rng):
    case = make_case(rng, impl, B=1, T=20)
    got = check(impl, case.replace(k=torch.zeros_like(case.k), initial_state=None))
    assert not got["o"].any() and not got["final_state"].any()
