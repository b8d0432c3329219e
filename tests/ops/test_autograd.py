"""What autograd asks of the operator: any subset of gradients, none, twice, recomputed; inputs changed in between."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ..tolerances import ADDED, error
from .cases import assert_same_bits, evaluate, make_case

INPUTS = ("q", "k", "v", "initial_state")


def small(rng, impl, **options):
    return make_case(rng, impl, B=1, T=40, **options)


def call(impl, case, **inputs):
    """The operator on the case's inputs, some of them replaced."""
    inputs = {name: getattr(case, name) for name in INPUTS} | inputs
    return impl.attn(**inputs, log_decay=case.log_decay, scale=case.scale, cu_seqlens=case.cu_seqlens)


@pytest.mark.parametrize("documents", [None, (10, 0, 30)])
@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("initial_state",), ("q", "v"), ("k", "initial_state")])
def test_some_gradients(impl, rng, wanted, documents):
    """Only what requires a gradient gets one, and the same as if all did."""
    case = small(rng, impl, documents=documents)
    leaves = {name: getattr(case, name).detach().requires_grad_(name in wanted) for name in INPUTS}
    torch.autograd.backward(call(impl, case, **leaves), (case.do, case.dfinal))
    every = evaluate(impl.attn, case)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name not in wanted else torch.equal(leaf.grad, every[f"d{name}"]), name


@pytest.mark.parametrize("documents", [None, (10, 0, 30)])
def test_results_may_be_changed_in_place(impl, rng, documents):
    """As those of torch's own operations: gated or added to without a copy, before the backward."""
    case = small(rng, impl, documents=documents)
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in INPUTS}
    results = call(impl, case, **leaves)
    for result in results:
        result.mul_(2)
    torch.autograd.backward(results, (case.do / 2, case.dfinal / 2))
    every = evaluate(impl.attn, case)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, every[f"d{name}"]), name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("documents", [None, (10, 0, 30)])
def test_without_gradients(impl, rng, context, documents):
    want = evaluate(impl.attn, small(rng, impl, documents=documents))
    with context():  # the inputs too are made inside
        case = small(rng.manual_seed(rng.initial_seed()), impl, documents=documents)
        o, final = call(impl, case)
        assert torch.equal(call(impl, case)[0], o)
    assert not o.requires_grad and not final.requires_grad
    assert_same_bits({"o": o, "final_state": final}, {name: want[name] for name in ("o", "final_state")})


def test_final_state_only_on_demand(impl, rng):
    from lightning_megatron.ops import lightning_attn

    case = small(rng, impl)
    o, final = lightning_attn(case.q, case.k, case.v, case.log_decay, backend=impl.backend)
    assert final is None
    assert torch.equal(o, call(impl, case, initial_state=None)[0])


def test_used_twice(impl, rng):
    """A tensor that is q and k, and in two calls, gets the sum of its gradients; a graph may be walked twice."""
    case = small(rng, impl)
    parts = evaluate(impl.attn, case.replace(k=case.q))
    x = case.q.detach().requires_grad_()
    outputs = [y for _ in range(2) for y in call(impl, case, q=x, k=x)]
    for times in (1, 2):
        torch.autograd.backward(outputs, (case.do, case.dfinal) * 2, retain_graph=True)
        want = 2 * times * (parts["dq"].double() + parts["dk"].double())
        assert error("dq", x.grad, want, smallest=0) < ADDED[impl.dtype]


def test_recomputed(impl, rng):
    """torch.utils.checkpoint: the same bits."""
    case = small(rng, impl)

    def attn(**kwargs):
        return checkpoint(impl.attn, use_reentrant=False, **kwargs)

    assert_same_bits(evaluate(attn, case), evaluate(impl.attn, case))


@pytest.mark.parametrize("loss", [lambda o: o.square().sum(), lambda o: o.sum()], ids=["square", "constant-gradient"])
def test_second_derivatives_are_refused(impl, rng, loss):
    """Also where the gradient of the output is a constant, of which torch's once_differentiable makes constants."""
    case = small(rng, impl)
    q, k = (x.detach().requires_grad_() for x in (case.q, case.k))
    (dq,) = torch.autograd.grad(loss(call(impl, case, q=q, k=k)[0]), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (dq.sum() + k.sum()).backward()


@pytest.mark.parametrize("name", INPUTS)
def test_changed_before_backward(impl, rng, name):
    """An input overwritten between forward and backward is noticed, not silently used."""
    case = small(rng, impl)
    leaf = getattr(case, name).detach().requires_grad_()
    changed = leaf * 1
    o, _ = call(impl, case, **{name: changed})
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_layer_in_a_graph(impl, rng):
    """Inputs that are not leaves, an output used in part: only the last token's."""
    case = small(rng, impl)
    x = case.q.detach().requires_grad_()
    o, _ = call(impl, case, q=x.tanh(), v=(x * x)[..., :16])
    o[:, -1].sum().backward()
    do = torch.zeros_like(case.do)
    do[:, -1] = 1
    want = evaluate(impl.attn, case.replace(q=x.tanh().detach(), v=(x * x).detach(), do=do), uses=("o",))
    with torch.no_grad():
        want = want["dq"] * (1 - x.tanh() ** 2) + want["dv"] * 2 * x
    assert error("dq", x.grad, want, smallest=0) < ADDED[impl.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(every_impl, rng, dtype):
    """fp32 inputs mean fp32 results, whatever matmul's autocast dtype is: the same bits."""
    case = small(rng, every_impl)
    with torch.autocast(every_impl.device, dtype=dtype):
        got = evaluate(every_impl.attn, case)
    assert_same_bits(got, evaluate(every_impl.attn, case))
