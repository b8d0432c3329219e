"""Bit for bit: the same twice, the same in any batch. And a sequence cut into pieces, down to tokens, is the same."""

import pytest
import torch

from lightning_megatron.ops import lightning_attn

from ..tolerances import STATES, TOLERANCES, error
from .cases import Case, Impl, assert_same_bits, evaluate, judge, make_case, pick
from .conftest import runs_here


@pytest.mark.parametrize("documents", [None, (20, 0, 33, 17)])
def test_same_twice(every_impl, rng, cut, documents):
    cut(32)
    case = make_case(rng, every_impl, B=1, T=70, Hkv=1, documents=documents)
    assert_same_bits(evaluate(every_impl.attn, case), evaluate(every_impl.attn, case))


def rows(case: Case, part: slice) -> Case:
    names = ("q", "k", "v", "do", "initial_state", "dfinal")
    return case.replace(**{name: getattr(case, name)[part] for name in names})


@pytest.mark.parametrize("T", [10, 70])
def test_batch_invariance(triton_impl, rng, cut, T):
    """A sequence gets the same bits alone as among others. (The torch backend's matmuls do not promise that.)"""
    cut(32)
    case = make_case(rng, triton_impl, B=3, T=T, H=2, Hkv=1)
    together = evaluate(triton_impl.attn, case)
    for part in (slice(1, 2), slice(1, 3)):
        alone = evaluate(triton_impl.attn, rows(case, part))
        assert_same_bits(alone, {name: x[part] for name, x in together.items()})


def test_head_invariance(triton_impl, rng, cut):
    """Heads alone, as on a tensor-parallel rank, get the same bits as all together."""
    cut(32)
    case = make_case(rng, triton_impl, B=1, T=40, H=4)
    axes = dict(q=2, k=2, v=2, do=2, initial_state=1, dfinal=1, log_decay=0)
    part = case.replace(**{name: getattr(case, name).narrow(axis, 2, 2) for name, axis in axes.items()})
    together = evaluate(triton_impl.attn, case)
    want = {name: x.narrow(1 if "state" in name else 2, 2, 2) for name, x in together.items()}
    assert_same_bits(evaluate(triton_impl.attn, part), want)


def test_causal(every_impl, rng, cut):
    """Bit for bit: later tokens change nothing in o. And no gradient flows back from before them."""
    cut(32)
    case, t = make_case(rng, every_impl, B=1, T=70), int(torch.randint(1, 69, (), generator=rng))
    print("changed from token", t)
    changed = {}
    for name in ("q", "k", "v"):
        changed[name] = getattr(case, name).clone()
        changed[name][:, t:] *= -3
    a, b = (evaluate(every_impl.attn, x)["o"] for x in (case, case.replace(**changed)))
    assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t:], b[:, t:])
    do = case.do.clone()
    do[:, t:] = 0
    got = evaluate(every_impl.attn, case.replace(do=do), uses=("o",))
    assert not any(got[name][:, t:].any() for name in ("dq", "dk", "dv"))


# ---- a sequence in pieces ----

PAIRS = [  # who computes the first piece, and who goes on from its state
    (Impl("torch", torch.float64), Impl("torch", torch.float64)),
    (Impl("triton", torch.float32), Impl("triton", torch.float32)),
    (Impl("triton", torch.float32), Impl("torch", torch.float32)),
    (Impl("torch", torch.float32), Impl("triton", torch.float32)),
    (Impl("triton", torch.bfloat16, "cuda"), Impl("triton", torch.bfloat16, "cuda")),
    (Impl("triton", torch.float16, "cuda"), Impl("torch", torch.float16, "cuda")),
    (Impl("triton", torch.float32, "cuda"), Impl("torch", torch.float32, "cuda")),
]


def pairs() -> list:
    skip = {False: [pytest.mark.skip(reason="needs CUDA, or a machine without it")], True: []}
    return [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}", marks=skip[all(map(runs_here, pair))]) for pair in PAIRS]


def in_pieces(case: Case, bounds: list[int], impls: list[Impl]) -> tuple[torch.Tensor, torch.Tensor]:
    """o and final_state of a sequence computed piece by piece."""
    outputs, state = [], case.initial_state
    for start, end, impl in zip(bounds[:-1], bounds[1:], impls, strict=True):
        q, k, v = (x[:, start:end] for x in (case.q, case.k, case.v))
        o, state = lightning_attn(
            q, k, v, case.log_decay, initial_state=state, output_final_state=True, backend=impl.backend
        )
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("first, then", pairs())
@pytest.mark.parametrize("prefill", [0, 1, 21])
def test_decode(rng, first, then, prefill):
    """A prompt in one call and then token by token is the whole in one call."""
    T = prefill + 8
    case = make_case(rng, first, B=2, T=T, V=32)
    bounds = sorted({0, *range(prefill, T + 1)})
    impls = [first, *[then] * (len(bounds) - 2)] if prefill else [then] * T
    o, state = in_pieces(case, bounds, impls)
    want, tolerance = judge(case), TOLERANCES[first.backend, first.dtype]
    assert error("o", o, want["o"], smallest=0) < tolerance["o"]
    assert error("final_state", state, want["final_state"], smallest=0) < 2 * tolerance[STATES[0]]


@pytest.mark.parametrize("first, then", pairs())
def test_split(rng, cut, first, then):
    """Cut at random places, empty pieces among them; gradients pass through the states."""
    cut(32)
    T = 70
    case = make_case(rng, first, B=1, T=T)
    bounds = sorted([0, T, *torch.randint(T + 1, (3,), generator=rng).tolist()])
    print("pieces", bounds)
    impls = [pick(rng, (first, then)) for _ in bounds[1:]]

    def attn(q, k, v, initial_state, **_):
        return in_pieces(case.replace(q=q, k=k, v=v, initial_state=initial_state), bounds, impls)

    got, want, tolerance = evaluate(attn, case), judge(case), TOLERANCES[first.backend, first.dtype]
    for name, x in got.items():  # each piece rounds its state, or its gradient, once more
        assert error(name, x, want[name], smallest=0) < 2 * tolerance[name], name
