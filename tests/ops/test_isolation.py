"""A value that is not finite stays in its document and in its row of a batch, and is not hidden there."""

import pytest
import torch

from lightning_megatron.ops import backend as backends

from .cases import Impl, assert_same_bits, make_case, pick
from .isolation import POISON, Document, check_isolated, check_pieces, everything, packed, without_states

# With segments of 64 tokens of two splits (128 of four for dk and dv); chunks are 32 tokens.
DOCUMENTS = {
    "inside chunks": (20, 50, 0, 15),
    "many in a chunk": (3, 1, 5, 7, 2, 14, 0, 30, 2, 1, 29),
    "on chunk edges": (32, 64, 16, 16, 32),
    "over segments": (10, 140, 5, 40),
    "on segment edges": (64, 63, 65),
}


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents(impl, rng, cut, lengths):
    cut(64)
    case = make_case(rng, impl, documents=lengths, H=1, log_decay=(pick(rng, (-0.02, 0.0)),))
    check_isolated(impl, everything(impl), case, packed(lengths), rng)


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_without_states(impl, rng, cut, lengths):
    """The kernels of training, in which no state enters or leaves; the gradients are those through o."""
    cut(64)
    case = make_case(rng, impl, documents=lengths, H=1, K=16, V=32, log_decay=(-0.02,))
    documents = [d._replace(enters=None, leaves=None) for d in packed(lengths)]
    check_isolated(impl, without_states(impl), case, documents, rng)


def test_rows_of_a_batch(impl, rng, cut):
    cut(64)
    case = make_case(rng, impl, B=2, T=70, H=1, log_decay=(-0.02,))
    check_isolated(impl, everything(impl), case, [Document(70 * b, 70 * (b + 1), b, b) for b in range(2)], rng)


def test_one_token(impl, rng):
    """Decoding."""
    case = make_case(rng, impl, B=4, T=1, log_decay=(-0.02, 0.0))
    check_isolated(impl, everything(impl), case, [Document(b, b + 1, b, b) for b in range(4)], rng)


@pytest.mark.parametrize("split", [False, True], ids=["", "states apart"])
def test_pieces(impl, rng, cut, split):
    cut(64)
    check_pieces(impl, rng, [[0, 20, 20, 70, 100], [0, 0, 32, 96, 100], [0, 100, 100, 100, 100]], split)


def test_states_of_other_ranks(impl, rng):
    """A state of weight 0 belongs to another document."""
    module = backends.choose(impl.backend, torch.empty(0, dtype=impl.dtype, device=impl.device))
    states = torch.randn(3, 2, 2, 16, 32, generator=rng, dtype=torch.float64).to(impl.device, impl.wide)
    weights = torch.rand(2, 3, 2, 2, generator=rng, dtype=torch.float64).to(impl.device, impl.wide)
    weights[0, 1] = 0
    clean = module.combine(states, weights)
    for value in POISON:
        spoiled = states.clone()
        spoiled[1, :, :, 0, 0] = value
        got = module.combine(spoiled, weights)
        assert_same_bits({"sum": got[0]}, {"sum": clean[0]})
        assert not got[1, :, :, 0, 0].isfinite().any()


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1024, 0, 1000, 24, 1, 2951), (5, 700, 30, 8, 21, 3000, 64, 10)])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_documents(rng, dtype, D, lengths):
    """Real splits, copy engine and tensor cores."""
    impl = Impl("triton", dtype, "cuda")
    case = make_case(rng, impl, documents=lengths, H=4, Hkv=2, K=D, V=D, log_decay=(-0.0005, -0.02, 0.0))
    check_isolated(impl, everything(impl), case, packed(lengths), rng)
    documents = [d._replace(enters=None, leaves=None) for d in packed(lengths)]
    check_isolated(impl, without_states(impl), case, documents, rng)
