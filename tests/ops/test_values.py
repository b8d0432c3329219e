"""Every implementation against the recurrence: sizes, segments, shared heads, decays, scales, memory layouts."""

import pytest
import torch

from .cases import EVERYTHING, Impl, check, judge, make_case, randn

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 200)
HEAD_DIMS = ((16, 16), (16, 48), (32, 16), (48, 96), (64, 128), (96, 64), (128, 32), (192, 16), (16, 192), (256, 64), (32, 256))
SLOW = (256, 256)


@pytest.mark.parametrize("T", LENGTHS)
def test_length(impl, rng, T):
    check(impl, make_case(rng, impl, B=4 if T <= 2 else 2, T=T))


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("T, tokens", [(64, 64), (65, 64), (127, 64), (200, 64), (129, 128), (1025, 1024)])
def test_segments(triton_impl, rng, cut, T, tokens, initial):
    cut(tokens)
    check(triton_impl, make_case(rng, triton_impl, B=1 if T > 1000 else 2, T=T, H=4 if T < 1000 else 1, initial=initial))


@pytest.mark.parametrize("K, V", HEAD_DIMS)
def test_head_dims(impl, rng, cut, K, V):
    cut(64)
    check(impl, make_case(rng, impl, B=1, T=81, K=K, V=V))


def test_largest_head_dims(impl, rng):
    check(impl, make_case(rng, impl, B=1, H=1, T=35, K=256, V=256))


@pytest.mark.parametrize("H, Hkv", [(4, 2), (6, 2), (3, 1)])
def test_shared_heads(impl, rng, cut, H, Hkv):
    cut(64)
    check(impl, make_case(rng, impl, T=70, H=H, Hkv=Hkv, V=32))


@pytest.mark.parametrize("uses", [EVERYTHING, ("o",), ("final_state",)])
@pytest.mark.parametrize("initial", [True, False])
def test_gradient_through_each_output(impl, rng, cut, initial, uses):
    cut(64)
    got = check(impl, make_case(rng, impl, T=70, initial=initial), uses)
    assert ("dinitial_state" in got) == initial
    if uses == ("final_state",):
        assert not got["dq"].any()


def test_no_tokens(impl, rng):
    got = check(impl, case := make_case(rng, impl, T=0))
    assert torch.equal(got["final_state"], case.initial_state)
    assert torch.equal(got["dinitial_state"], case.dfinal)
    assert not check(impl, make_case(rng, impl, T=0, initial=False))["final_state"].any()


def test_no_sequences(impl, rng):
    check(impl, make_case(rng, impl, B=0, T=3))


@pytest.mark.parametrize("scale", [None, 1, 0.0, -2.5])
def test_scale(impl, rng, scale):
    case = make_case(rng, impl, T=40, scale=scale)
    got = check(impl, case)
    if scale is None:  # the reference has its own default: K^-0.5 = 1/4
        assert torch.equal(got["o"], check(impl, case.replace(scale=0.25))["o"])


@pytest.mark.parametrize(
    "log_decay", [(0.0,), (-1e-9, -1e-30), (-5.0, -50.0), (-1e4, -3e38), (0.0, -1e4, -1e-3, -5.0)], ids=str
)
def test_decay(impl, rng, cut, log_decay):
    """Nothing may overflow; and a head that forgets everything is a product with the token itself."""
    cut(64)
    case = make_case(rng, impl, T=130, H=len(log_decay), log_decay=log_decay)
    got = check(impl, case)
    assert all(x.isfinite().all() for x in got.values())
    for h in (h for h, value in enumerate(log_decay) if value <= -1e4):
        want = 0.25 * (case.q * case.k).double().sum(3, keepdim=True) * case.v
        torch.testing.assert_close(got["o"][:, :, h].double(), want[:, :, h], rtol=1e-2, atol=1e-2)


def test_long_without_decay(impl, rng, cut):
    """Nothing is forgotten over 2000 tokens: errors must not pile up."""
    cut(512)
    check(impl, make_case(rng, impl, B=1, H=1, T=2000, log_decay=(0.0,)))


def test_zeros(impl, rng):
    case = make_case(rng, impl, T=20)
    got = check(impl, case.replace(k=torch.zeros_like(case.k), initial_state=None))
    assert not got["o"].any() and not got["final_state"].any()


# ---- memory layouts: the same numbers, wherever they lie ----


def _time_first(case):
    """[T, B, ...] in memory, as Megatron has it; the gradient of o as well."""
    names = ("q", "k", "v", "do")
    return case.replace(**{n: getattr(case, n).transpose(0, 1).contiguous().transpose(0, 1) for n in names})


def _fused(case):
    """Slices of one projection, per head [q | k | v]."""
    dims = [case.q.shape[3], case.k.shape[3], case.v.shape[3]]
    q, k, v = torch.cat([case.q, case.k, case.v], dim=3).split(dims, dim=3)
    return case.replace(q=q, k=k, v=v)


def _padded(case):
    """Slices of larger tensors along every axis, from an odd offset."""

    def inside(x):
        outer = x.new_full([n + 3 for n in x.shape], float("nan"))
        inner = outer[tuple(slice(1, n + 1) for n in x.shape)]
        return inner.copy_(x)

    return case.replace(**{n: inside(x) for n, x in vars(case).items() if getattr(x, "ndim", 0) == 4})


def _head_dim_not_last(case):
    names = ("q", "k", "v", "do", "initial_state", "dfinal")
    return case.replace(**{n: getattr(case, n).transpose(1, 3).contiguous().transpose(1, 3) for n in names})


def _expanded(case):
    """Stride 0: one k for all rows, one v for all tokens, one q for all heads; gradients as from ``.sum()``."""
    q, k, v, s = case.q[:, :, :1], case.k[:1], case.v[:, :1], case.initial_state[:1]
    one = case.do[:1, :1, :1, :1]
    return case.replace(
        q=q.expand_as(case.q), k=k.expand_as(case.k), v=v.expand_as(case.v), do=one.expand_as(case.do),
        initial_state=s.expand_as(case.initial_state), dfinal=case.dfinal[:1, :1, :1, :1].expand_as(case.dfinal),
    )  # fmt: skip


@pytest.mark.parametrize("layout", [_time_first, _fused, _padded, _head_dim_not_last, _expanded])
@pytest.mark.parametrize("documents", [None, (30, 0, 40)])
def test_layout(impl, rng, cut, layout, documents):
    cut(64)
    case = layout(make_case(rng, impl, B=3, T=70, V=32, documents=documents))
    assert not (case.q.is_contiguous() and case.do.is_contiguous()), "the layout changes nothing"
    check(impl, case)


def test_inputs_are_left_alone(impl, rng, cut):
    cut(64)
    case = make_case(rng, impl, T=70)
    before = {name: x.clone() for name, x in vars(case).items() if isinstance(x, torch.Tensor)}
    check(impl, case)
    assert all(torch.equal(getattr(case, name), x) for name, x in before.items())


def test_reference_rejects_another_convention(rng):
    """An off-by-one in the decay, the usual mistake, is far outside of every tolerance here."""
    case = make_case(rng, Impl("torch", torch.float64), T=30)
    shifted = judge(case.replace(initial_state=case.initial_state * case.log_decay.exp()[:, None, None]))
    assert (shifted["o"] - judge(case)["o"]).norm() > 0.01 * shifted["o"].norm()
