"""torch.compile of a function around the operator: one graph, the bits of eager mode."""

import pytest
import torch
import torch._dynamo.testing

from lightning_megatron.ops import attention as operator
from lightning_megatron.ops import lightning_attn

from .cases import Impl, assert_same_bits, evaluate, make_case
from .layouts import time_first

# what the graph is compiled with does not matter here, and the interpreter's kernels are slow enough
IMPLS = [Impl("torch", torch.float32), Impl("triton", torch.float32)]


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=IMPLS, ids=str)
def impl(request):
    if torch.cuda.is_available() and request.param.backend == "triton":
        pytest.skip("interpreter only; on a GPU see below")
    return request.param


def compiled(function, counter, **options):
    return torch.compile(function, fullgraph=True, backend=counter, **options)


def around(impl: Impl):
    """The operator with something before and behind it."""

    def function(q, k, v, log_decay, **kwargs):
        o, final = impl.attn(2 * q, k, v.cos(), log_decay, **kwargs)
        return o.sin(), final + 1

    return function


@pytest.mark.parametrize("documents", [None, (12, 0, 21)])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("layout", [lambda case: case, time_first], ids=["", "time first"])
def test_one_graph_with_the_bits_of_eager(impl, rng, cut, documents, initial, layout):
    cut(32)
    case = layout(make_case(rng, impl, B=2, T=33, Hkv=1, V=32, documents=documents, initial=initial))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    got = evaluate(compiled(around(impl), counter), case)
    assert counter.frame_count == 1
    assert_same_bits(got, evaluate(around(impl), case))


def test_other_lengths_need_no_other_graph(impl, rng, cut):
    cut(32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = compiled(around(impl), counter, dynamic=True)
    for T in (35, 50):
        case = make_case(rng, impl, B=1, T=T, H=2)
        assert_same_bits(evaluate(function, case), evaluate(around(impl), case))
    assert counter.frame_count == 1


def test_without_gradients(impl, rng):
    case = make_case(rng, impl, B=1, T=40)
    arguments = dict(scale=0.3, backend=impl.backend)
    function = torch.compile(lightning_attn, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want, got = (f(case.q, case.k, case.v, case.log_decay, **arguments) for f in (lightning_attn, function))
    assert want[1] is None and got[1] is None
    assert torch.equal(got[0], want[0])


def test_wrong_inputs_are_refused_before_a_graph_and_by_it(impl, rng):
    """Shapes when the function is traced, values whenever the graph runs."""
    case = make_case(rng, impl, B=1, T=40)
    function = torch.compile(around(impl), backend="aot_eager")
    function(case.q, case.k, case.v, case.log_decay)
    with pytest.raises(ValueError, match=r"log_decay\[1\] = 0.5"):
        function(case.q, case.k, case.v, torch.tensor([-0.1, 0.5]))
    with pytest.raises(ValueError, match=r"k must be \[1,40"):
        function(case.q, case.k[:, :1], case.v, case.log_decay)


@pytest.mark.parametrize("documents", [None, (12, 0, 21)])
def test_what_torch_is_told_is_true(impl, rng, cut, documents):
    """Schema, shapes and strides, gradients: torch's own check of operations."""
    cut(32)
    case = make_case(rng, impl, B=1, T=33, Hkv=1, V=32, documents=documents)
    given = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    arguments = (*given, case.log_decay, case.initial_state, case.cu_seqlens, None, True, impl.backend)
    torch.library.opcheck(operator._attention, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [None, (700, 0, 1400)])
def test_on_a_gpu(rng, documents):
    """By inductor, with kernels of several segments."""
    impl = Impl("triton", torch.bfloat16, "cuda")
    case = make_case(rng, impl, B=1, T=2100, K=64, V=64, documents=documents)
    function = torch.compile(impl.attn, fullgraph=True)
    assert_same_bits(evaluate(function, case), evaluate(impl.attn, case))
