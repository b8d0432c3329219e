"""Documents packed along T (cu_seqlens): each must be as if it were alone."""

import pytest
import torch

from .cases import EVERYTHING, Case, assert_same_bits, check, evaluate, make_case, pick

DOCUMENTS = {
    "one": (70,),
    "two": (33, 37),
    "one-token": (1, 1, 1, 60, 1, 1),
    "only one-token": (1,) * 20,
    "empty": (0, 5, 0, 0, 30, 0),
    "only empty": (0, 0, 0),
    "on chunk edges": (32, 32, 64, 16, 48),
    "on segment edges": (64, 64, 64),
    "empty on a segment edge": (64, 0, 0, 65, 0),
    "past segment edges": (63, 2, 63, 65),
    "over many segments": (10, 250, 5),
    "whole segments and a bit": (1, 191),
}


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents(impl, rng, cut, documents, index):
    cut(64)
    check(impl, make_case(rng, impl, documents=documents, index=index, initial=index == torch.int32))


def random_documents(rng: torch.Generator, T: int) -> list[int]:
    """Lengths that sum to T: ragged, with empty and one-token documents among them."""
    lengths = []
    while sum(lengths) < T:
        length = pick(rng, (0, 1, 1, pick(rng, range(2, 20)), pick(rng, (16, 32, 64)), pick(rng, range(1, T + 1))))
        lengths.append(min(length, T - sum(lengths)))
    return lengths + [0] * pick(rng, (0, 0, 1, 2))


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("repeat", range(3))
def test_random_documents(impl, rng, cut, tokens, repeat):
    cut(tokens)
    T = pick(rng, range(1, 230))
    check(impl, make_case(rng, impl, documents=random_documents(rng, T), Hkv=1, initial=pick(rng, (True, False))))


@pytest.mark.parametrize("uses", [EVERYTHING, ("o",), ("final_state",)])
def test_gradient_through_each_output(impl, rng, cut, uses):
    cut(64)
    check(impl, make_case(rng, impl, documents=(20, 0, 1, 100, 7), V=32), uses)


def test_documents_do_not_see_each_other(impl, rng, cut):
    """Bit for bit: what lies in other documents, be it NaN, changes nothing in this one."""
    cut(64)
    documents = (40, 70, 0, 30)
    case = make_case(rng, impl, documents=documents)
    first, last = slice(0, 40), slice(110, 140)

    def spoiled(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 40:110] = x[:, 40:110] * 1e3 + 7
        return x

    names = ("q", "k", "v", "do")
    other = case.replace(**{name: spoiled(getattr(case, name)) for name in names})
    a, b = evaluate(impl.attn, case), evaluate(impl.attn, other)
    assert not torch.equal(a["o"], b["o"])
    for name in a:
        parts = (first, last) if "state" not in name else ([0, 2, 3],)
        for part in parts:
            x, y = (r[name][part] if "state" in name else r[name][:, part] for r in (a, b))
            assert torch.equal(x, y), f"{name} of a document changes with its neighbour"


def test_packed_is_separate(impl, rng, cut):
    """Each document alone gives what it gave in the pack, to the tolerance: the chunks lie elsewhere."""
    cut(64)
    documents = (50, 1, 90)
    case = make_case(rng, impl, documents=documents)
    packed = check(impl, case)
    start = 0
    for n, length in enumerate(documents):
        part, state = slice(start, start + length), slice(n, n + 1)
        tokens = {name: getattr(case, name)[:, part] for name in ("q", "k", "v", "do")}
        states = {name: getattr(case, name)[state] for name in ("initial_state", "dfinal")}
        alone = check(impl, Case(log_decay=case.log_decay, scale=None, cu_seqlens=None, **tokens, **states))
        for name, x in alone.items():
            y = packed[name][state] if "state" in name else packed[name][:, part]
            torch.testing.assert_close(x, y, rtol=3e-2, atol=3e-2)
        start += length


def test_index_dtypes_agree(impl, rng):
    case = make_case(rng, impl, documents=(20, 0, 25), index=torch.int32)
    other = case.replace(cu_seqlens=case.cu_seqlens.long())
    assert_same_bits(evaluate(impl.attn, case), evaluate(impl.attn, other))


def test_bounds_need_not_be_contiguous(impl, rng):
    case = make_case(rng, impl, documents=(20, 0, 25))
    bounds = torch.stack([case.cu_seqlens, case.cu_seqlens * 0 + 99], dim=1)[:, 0]
    assert not bounds.is_contiguous()
    check(impl, case.replace(cu_seqlens=bounds))
