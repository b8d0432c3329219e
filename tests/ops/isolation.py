"""Inputs of which one document holds a value that is not finite, and who may not notice."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightning_megatron.ops import backend as backends
from lightning_megatron.ops import lightning_attn
from lightning_megatron.ops.backend import Documents

from ..tolerances import HEADS, SMALLEST, TOLERANCES, error
from .cases import Case, Impl, evaluate, make_case, pick

POISON = (float("nan"), float("inf"), -float("inf"))
INPUTS = ("q", "k", "v", "do", "initial_state", "dfinal")


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


def without_states(impl: Impl):
    """As in training: no state enters or leaves, and gradients are those through o."""

    def run(case: Case) -> dict[str, torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
        o, _ = lightning_attn(
            *leaves, case.log_decay, scale=case.scale, cu_seqlens=case.cu_seqlens, backend=impl.backend
        )
        gradients = torch.autograd.grad(o, leaves, case.do)
        return {"o": o.detach()} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    return run


def check_pieces(
    impl: Impl, rng: torch.Generator, bounds: Sequence[Sequence[int]], split: bool, K: int = 16, V: int = 16
) -> None:
    """Documents in rows that are parts of longer sequences: states are those of rows."""
    rows, T = len(bounds), bounds[0][-1]
    documents = [
        Document(r * T + a, r * T + b, r if a == 0 else None, r if b == T else None)
        for r, ends in enumerate(bounds)
        for a, b in zip(ends[:-1], ends[1:], strict=True)
        if a < b
    ]
    case = make_case(rng, impl, B=1, T=rows * T, H=1, K=K, V=V, log_decay=(-0.02,))
    states = make_case(rng, impl, B=rows, T=1, H=1, K=K, V=V)
    case = case.replace(initial_state=states.initial_state, dfinal=states.dfinal)
    module, scale = backends.choose(impl.backend, case.q), 0.25
    edges = torch.tensor(bounds, device=impl.device, dtype=torch.int32)
    ids = torch.searchsorted(
        edges[:, 1:].contiguous(), torch.arange(T, device=impl.device).expand(rows, T).contiguous().int(), right=True
    )
    packed = Documents(ids.int(), edges, by_row=True)

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
