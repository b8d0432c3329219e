"""Documents packed along T (cu_seqlens): each must be as if it were alone."""

from itertools import pairwise

import pytest
import torch

from lightning_megatron.ops import packed_part
from lightning_megatron.ops.reference import recurrent_lightning_attn

from ..tolerances import SMALLEST, TOLERANCES, assert_close, error
from .cases import EVERYTHING, Case, assert_same_bits, check, evaluate, make_case, pick, random_documents

# with segments of 64 tokens, which are one or two chunks
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


@pytest.mark.parametrize("initial, index", [(True, torch.int32), (False, torch.int64)])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents(impl, rng, cut, documents, initial, index):
    cut(64)
    case = make_case(rng, impl, documents=documents, H=1, log_decay=(-0.02,), initial=initial, index=index)
    check(impl, case)


@pytest.mark.parametrize("tokens", [32, 64, 128])
def test_random_documents(every_impl, rng, cut, tokens):
    cut(tokens)
    documents = random_documents(rng, pick(rng, range(1, 200)))
    check(every_impl, make_case(rng, every_impl, documents=documents, Hkv=1, initial=pick(rng, (True, False))))


@pytest.mark.parametrize("uses", [EVERYTHING, ("o",), ("final_state",)])
def test_gradient_through_each_output(impl, rng, cut, uses):
    cut(32)
    check(impl, make_case(rng, impl, documents=(20, 0, 1, 70, 7), H=1, V=32), uses)


def test_documents_do_not_see_each_other(impl, rng, cut):
    """Bit for bit: what lies in another document, infinity too, changes nothing in this one."""
    cut(32)
    case = make_case(rng, impl, documents=(20, 50, 0, 15))
    first, last, states = slice(0, 20), slice(70, 85), [0, 2, 3]

    def spoiled(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 20:70] = 7 - 30 * x[:, 20:70]
        return x

    other = case.replace(**{name: spoiled(getattr(case, name)) for name in ("q", "k", "v", "do")})
    a, b = evaluate(impl.attn, case), evaluate(impl.attn, other)
    assert not torch.equal(a["o"], b["o"])
    for name in a:
        for part in (states,) if "state" in name else ((slice(None), first), (slice(None), last)):
            assert torch.equal(a[name][part], b[name][part]), f"{name} of a document changes with its neighbour"


def test_packed_is_separate(impl, rng, cut):
    """Each document alone is right too (``check``), and nearly what it is in the pack, where chunks lie elsewhere."""
    cut(32)
    documents = (30, 1, 40)
    case = make_case(rng, impl, documents=documents)
    packed, start = check(impl, case), 0
    for n, length in enumerate(documents):
        part, state = slice(start, start + length), slice(n, n + 1)
        tokens = {name: getattr(case, name)[:, part] for name in ("q", "k", "v", "do")}
        states = {name: getattr(case, name)[state] for name in ("initial_state", "dfinal")}
        alone = check(impl, Case(log_decay=case.log_decay, scale=None, cu_seqlens=None, **tokens, **states))
        for name, x in alone.items():
            y = packed[name][state] if "state" in name else packed[name][:, part]
            assert error(name, x, y, smallest=SMALLEST[impl.dtype]) < 2 * TOLERANCES[impl.backend, impl.dtype][name], (
                name
            )
        start += length


def test_bounds_of_any_kind(impl, rng):
    """int32 or int64, contiguous or not: the same bits."""
    case = make_case(rng, impl, documents=(20, 0, 25), index=torch.int32)
    want = evaluate(impl.attn, case)
    wide = case.cu_seqlens.long()
    strided = torch.stack([wide, torch.full_like(wide, 99)], dim=1)[:, 0]
    assert not strided.is_contiguous()
    for bounds in (wide, strided):
        assert_same_bits(evaluate(impl.attn, case.replace(cu_seqlens=bounds)), want)


@pytest.mark.parametrize("cuts", [(), (32, 64, 128), "random"], ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_parts_are_the_whole(impl, rng, cut, documents, cuts):
    """Part after part with the state of the one before: outputs, the last state and every gradient of the whole."""
    cut(64)
    T = sum(documents)
    if not T:
        pytest.skip("no token, no part")
    if cuts == "random":
        cuts = sorted({pick(rng, range(1, max(T, 2))) for _ in range(3)})
    edges = [0, *(x for x in cuts if x < T), T]
    last = max(n for n, length in enumerate(documents) if length)
    case = make_case(rng, impl, documents=documents, Hkv=1, initial=False)
    case = case.replace(dfinal=case.dfinal[:1])
    print(impl, edges, case)

    def in_parts(q, k, v, log_decay, scale, cu_seqlens):
        outputs, state = [], None
        for a, b in pairwise(edges):
            o, state = packed_part(
                *(x[:, a:b] for x in (q, k, v)), log_decay, start=a, total=T, cu_seqlens=cu_seqlens,
                initial_state=state, scale=scale, backend=impl.backend,
            )  # fmt: skip
            outputs.append(o)
        return torch.cat(outputs, 1), state

    def whole(**given):
        o, final = recurrent_lightning_attn(**given)
        return o, final[last : last + 1]

    assert_close(evaluate(in_parts, case), evaluate(whole, case.to(device="cpu")), impl.backend, impl.dtype)
