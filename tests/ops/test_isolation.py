"""A value that is not finite stays in its document and in its row of a batch, and is not hidden there."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from lightning_megatron.ops import backend as backends
from lightning_megatron.ops.backend import Documents

from ..tolerances import HEADS, SMALLEST, STATES, TOLERANCES, error
from .cases import Case, Impl, assert_same_bits, evaluate, make_case, pick

POISON = (float("nan"), float("inf"), -float("inf"))
INPUTS = ("q", "k", "v", "do", "initial_state", "dfinal")

# With segments of 64 tokens of two splits (128 of four for dk and dv); chunks are 32 tokens.
DOCUMENTS = {
    "inside chunks": (20, 50, 0, 15),
    "many in a chunk": (3, 1, 5, 7, 2, 14, 0, 30, 2, 1, 29),
    "on chunk edges": (32, 64, 16, 16, 32),
    "over segments": (10, 140, 5, 40),
    "on segment edges": (64, 63, 65),
}


class Document(NamedTuple):
    """Tokens of the flattened batch, and which states enter and leave the document, if any do."""

    start: int
    end: int
    enters: int | None
    leaves: int | None


# What a poisoned token spoils: results of this token, of it and all later ones, or of it and all earlier ones. What a
# poisoned state spoils: results of all tokens; and which states.
SPOILS = {
    "q": {"o": "here", "dk": "before", "dv": "before", "dinitial_state": "state", "starts": "state"},
    "k": {"o": "after", "dq": "after", "dv": "here", "final_state": "state", "ends": "state"},
    "v": {"o": "after", "dq": "after", "dk": "here", "final_state": "state", "ends": "state"},
    "do": {"dq": "here", "dk": "before", "dv": "before", "dinitial_state": "state", "starts": "state"},
    "initial_state": {"o": "all", "dq": "all", "final_state": "state"},
    "dfinal": {"dk": "all", "dv": "all", "dinitial_state": "state"},
}
ENTERING, LEAVING = ("dinitial_state", "starts"), ("final_state", "ends")


def flat(name: str, x: torch.Tensor) -> torch.Tensor:
    """Tokens ``[B * T, H, D]`` or states ``[N, H, K, V]``."""
    return x if name in (*ENTERING, *LEAVING) else x.flatten(0, 1)


def check_isolated(impl: Impl, run, case: Case, documents: Sequence[Document], rng: torch.Generator) -> None:
    """Poison a document, and compare with the results without.

    One input after another, in a document of its own; in the interpreter, which is slow, all inputs at once.
    """
    print(impl, case, documents)
    clean = {name: flat(name, x) for name, x in run(case).items()}
    assert all(x.isfinite().all() for x in clean.values())
    interpreted = impl.backend == "triton" and impl.device == "cpu"
    for names in [INPUTS] if interpreted else [(name,) for name in INPUTS]:
        among = [pick(rng, [d for d in documents if d.start < d.end])] if interpreted else documents
        poisoned, spoiled, own = {}, {}, {}  # of every result: where it must not be finite, and where it may not be
        for key, want in clean.items():
            spoiled[key], own[key] = torch.zeros(2, want.shape[0], dtype=torch.bool, device=want.device)
        for name in names:
            document, at, poisoned[name] = poison(name, case, among, rng)
            if document is not None:
                for key in clean:
                    mark(spoiled[key], own[key], document, at, key, SPOILS[name].get(key))
        got = {key: flat(key, y) for key, y in run(case.replace(**poisoned)).items()}
        for key, want in clean.items():
            others = got[key][~own[key]], want[~own[key]]
            assert others[0].isfinite().all(), f"{key} of other documents is spoiled"
            shape = (1,) * (HEADS.get(key, 1) - 1)  # as if all tokens were of one row
            table = TOLERANCES[impl.backend, impl.dtype]
            kind = key if key in table else "final_state"
            smallest = SMALLEST[impl.dtype]
            assert error(kind, *(y.view(*shape, *y.shape) for y in others), smallest=smallest) < table[kind], key
            finite = got[key][spoiled[key]].flatten(2).isfinite().all(2)
            assert not finite.any(), f"{key} of the poisoned document hides it"


def poison(
    name: str, case: Case, documents: Sequence[Document], rng: torch.Generator
) -> tuple[Document | None, int, torch.Tensor]:
    """A document, a token or state of it, and the input with something there that is not finite."""
    state = {"initial_state": "enters", "dfinal": "leaves"}.get(name)
    has = [d for d in documents if (d.start < d.end if state is None else getattr(d, state) is not None)]
    x = getattr(case, name)
    if not has:  # no state enters, or leaves
        return None, 0, x
    document, value, x = pick(rng, has), pick(rng, POISON), x.clone()
    if state is None:
        at = pick(rng, range(document.start, document.end))
        x.flatten(0, 1)[at, :, pick(rng, range(x.shape[-1]))] = value
    else:
        at = getattr(document, state)
        x[at, :, pick(rng, range(x.shape[-2])), pick(rng, range(x.shape[-1]))] = value
    print(f"{name} of {document} is {value} at {at}")
    return document, at, x


def mark(spoiled: torch.Tensor, own: torch.Tensor, document: Document, at: int, key: str, spoils: str | None) -> None:
    """Mark what belongs to a poisoned document in the result ``key``, and what of it cannot be finite."""
    if key in ENTERING or key in LEAVING:
        index = document.enters if key in ENTERING else document.leaves
        if index is not None:
            own[index] = True
            spoiled[index] |= spoils is not None
    else:
        own[document.start : document.end] = True
        first, end = {
            None: (0, 0), "all": (document.start, document.end), "here": (at, at + 1),
            "after": (at, document.end), "before": (document.start, at + 1),
        }[spoils]  # fmt: skip
        spoiled[first:end] = True


def packed(lengths: Sequence[int]) -> list[Document]:
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [Document(a, b, n, n) for n, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True))]


def everything(impl: Impl):
    return lambda case: evaluate(impl.attn, case)


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
    keep = ("o", "dq", "dk", "dv")

    def run(case: Case) -> dict[str, torch.Tensor]:
        results = evaluate(impl.attn, case.replace(initial_state=None), ("o",))
        return {name: results[name] for name in keep}

    documents = [d._replace(enters=None, leaves=None) for d in packed(lengths)]
    check_isolated(impl, run, case, documents, rng)


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
    """Documents in rows that are parts of longer sequences: states are those of rows."""
    cut(64)
    rows, T = 3, 100
    bounds = torch.tensor([[0, 20, 20, 70, 100], [0, 0, 32, 96, 100], [0, 100, 100, 100, 100]])
    documents = [
        Document(r * T + a, r * T + b, r if a == 0 else None, r if b == T else None)
        for r, ends in enumerate(bounds.tolist())
        for a, b in zip(ends[:-1], ends[1:], strict=True)
        if a < b
    ]
    case = make_case(rng, impl, B=1, T=rows * T, H=1, log_decay=(-0.02,))
    states = make_case(rng, impl, B=rows, T=1, H=1)
    case = case.replace(initial_state=states.initial_state, dfinal=states.dfinal)
    module, scale = backends.choose(impl.backend, case.q), 0.25
    bounds = bounds.to(impl.device, torch.int32)
    ids = torch.searchsorted(
        bounds[:, 1:].contiguous(), torch.arange(T, device=impl.device).expand(rows, T).contiguous().int(), right=True
    )
    packed = Documents(ids.int(), bounds, by_row=True)

    def run(case: Case) -> dict[str, torch.Tensor]:
        q, k, v, do, log_decay = case.q, case.k, case.v, case.do, case.log_decay
        own, own_grad, apart = None, None, {}
        if split:
            ends, own = module.local_states(k, v, log_decay, None, packed, pieces=rows)
            starts, own_grad = module.local_states(
                q, do, log_decay, None, packed, pieces=rows, reverse=True, scale=scale
            )
            apart = {"ends": ends, "starts": starts}
        o, final, saved, plan = module.forward(q, k, v, log_decay, scale, case.initial_state, packed, True, own, rows)
        *grads, dinitial = module.backward(
            q, k, v, log_decay, scale, case.initial_state, packed, saved, plan, do, case.dfinal, own_grad, rows
        )
        names = ("o", "final_state", "dq", "dk", "dv", "dinitial_state")
        return dict(zip(names, (o, final, *grads, dinitial), strict=True)) | apart

    check_isolated(impl, run, case, documents, rng)


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

    def run(case: Case) -> dict[str, torch.Tensor]:
        results = evaluate(impl.attn, case.replace(initial_state=None), ("o",))
        return {name: x for name, x in results.items() if name not in STATES}

    check_isolated(impl, run, case, documents, rng)
