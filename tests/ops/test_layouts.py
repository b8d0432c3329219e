"""Memory layouts of inputs and gradients: the same numbers, wherever they lie."""

import pytest
import torch

from lightning_megatron.ops.triton import attention as triton_backend

from .cases import Case, Impl, assert_same_bits, check, evaluate, make_case

BF16 = Impl("triton", torch.bfloat16, "cuda")


def time_first(case: Case) -> Case:
    """[T, B, ...] in memory, as Megatron has it; the gradient of o as well."""
    names = ("q", "k", "v", "do")
    return case.replace(**{n: getattr(case, n).transpose(0, 1).contiguous().transpose(0, 1) for n in names})


def fused(case: Case) -> Case:
    """Slices [Q | K | V] of one projection."""
    parts = (case.q, case.k, case.v)
    slices = torch.cat([x.flatten(2) for x in parts], dim=2).split([x.shape[2] * x.shape[3] for x in parts], dim=2)
    q, k, v = (part.unflatten(2, x.shape[2:]) for part, x in zip(slices, parts, strict=True))
    return case.replace(q=q, k=k, v=v)


def inside(case: Case) -> Case:
    """Slices of larger tensors along every axis, from an odd offset, with NaN around them."""

    def slice_of_larger(x: torch.Tensor) -> torch.Tensor:
        larger = x.new_full([n + 3 for n in x.shape], float("nan"))
        return larger[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)

    return case.replace(**{name: slice_of_larger(x) for name, x in vars(case).items() if getattr(x, "ndim", 0) == 4})


def head_dim_not_last(case: Case) -> Case:
    names = ("q", "k", "v", "do", "initial_state", "dfinal")
    return case.replace(**{n: getattr(case, n).transpose(1, 3).contiguous().transpose(1, 3) for n in names})


def expand(case: Case, **parts: torch.Tensor) -> Case:
    return case.replace(**{name: part.expand_as(getattr(case, name)) for name, part in parts.items()})


def expanded(case: Case) -> Case:
    """Inputs of stride 0: one q for all heads, one k for all tokens, one v for all rows."""
    return expand(case, q=case.q[:, :, :1], k=case.k[:, :1], v=case.v[:1], initial_state=case.initial_state[:1])


def summed(case: Case) -> Case:
    """Gradients of stride 0, as from ``.sum()``.

    A head's dv is then one draw a token: by itself, and not with short random documents, where all draws may be almost 0 and
    the error of the head what was rounded off them.
    """
    return expand(case, do=case.do[:1, :1, :1, :1], dfinal=case.dfinal[:1, :1, :1, :1])


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
    monkeypatch.setattr(triton_backend, "_descriptors", lambda *tensors: True)
    cut(64)
    impl = Impl("triton", torch.float32)
    check(impl, make_case(rng, impl, B=2, T=141, K=48, V=16, Hkv=1, documents=documents))


@pytest.mark.gpu
def test_addresses_that_descriptors_cannot_have(rng):
    """Odd offsets take the other path, and give the same bits."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor descriptors here")
    case = make_case(rng, BF16, B=1, T=5000, H=4, K=64, V=64)
    odd = inside(case)
    assert triton_backend._descriptors(case.q) and not triton_backend._descriptors(odd.q)
    assert_same_bits(evaluate(BF16.attn, case), evaluate(BF16.attn, odd))


def test_inputs_are_left_alone(impl, rng, cut):
    cut(32)
    case = make_case(rng, impl, T=35)
    before = {name: x.clone() for name, x in vars(case).items() if isinstance(x, torch.Tensor)}
    check(impl, case)
    assert all(torch.equal(getattr(case, name), x) for name, x in before.items())
