"""Equal parts of packed sequences, as context-parallel ranks hold them: states are those of parts, not of documents."""

from itertools import pairwise

import torch

from lightning_megatron.ops import backend as backends
from lightning_megatron.ops.backend import Documents

from ..tolerances import assert_close
from .cases import Case, Impl, judge, make_case, pick, random_documents


def draw(rng: torch.Generator, impl: Impl, rows: int, T: int, K: int, V: int) -> tuple[Case, torch.Tensor]:
    """Tokens of ``rows`` parts one after the other with their states, and their documents ``[rows, N + 1]``."""
    ends = torch.tensor([0, *random_documents(rng, (rows + 2) * T)]).cumsum(0)
    starts = torch.randperm(rows + 2, generator=rng)[:rows, None] * T  # parts need not be neighbours
    bounds = torch.minimum(torch.maximum(ends, starts), starts + T) - starts
    case = make_case(rng, impl, B=1, T=rows * T, H=2, Hkv=pick(rng, (1, 2)), K=K, V=V, log_decay=(-0.02, 0.0))
    states = make_case(rng, impl, B=rows, T=1, H=2, K=K, V=V)
    return case.replace(initial_state=states.initial_state, dfinal=states.dfinal), bounds.to(impl.device)


def documents_of(bounds: torch.Tensor, T: int) -> Documents:
    """Of parts that need not be neighbours: written down from the definition."""
    tokens = torch.arange(T, device=bounds.device)
    ids = (bounds[:, None, 1:] <= tokens[:, None]).sum(-1, dtype=torch.int32)
    return Documents(ids, bounds.to(torch.int32), by_row=True)


def judge_rows(case: Case, bounds: torch.Tensor) -> dict[str, torch.Tensor]:
    """From the recurrence: each piece of a document is one, and only those at the edges of a part have a state."""
    rows, T = bounds.shape[0], case.q.shape[1] // bounds.shape[0]
    pieces = [(r, a, b) for r, row in enumerate(bounds.tolist()) for a, b in pairwise(row) if a < b]
    first = [n for n, (_, a, _) in enumerate(pieces) if a == 0]
    last = [n for n, (_, _, b) in enumerate(pieces) if b == T]
    assert len(first) == len(last) == rows
    initial, dfinal = (x.cpu() for x in (case.initial_state, case.dfinal))
    initial, dfinal = (
        x.new_zeros(len(pieces), *x.shape[1:]).index_copy(0, torch.tensor(at), x)
        for x, at in ((initial, first), (dfinal, last))
    )
    ends = torch.tensor([0] + [r * T + b for r, _, b in pieces])
    want = judge(case.to(device="cpu").replace(initial_state=initial, dfinal=dfinal, cu_seqlens=ends))
    return want | {"final_state": want["final_state"][last], "dinitial_state": want["dinitial_state"][first]}


def check_parts(impl: Impl, case: Case, bounds: torch.Tensor, split: bool) -> None:
    """Compare with the recurrence; ``split``: states of splits are computed before, as for an exchange."""
    print(impl, case, bounds)
    module = backends.choose(impl.backend, case.q)
    scale, (q, k, v, do), log_decay = case.q.shape[-1] ** -0.5, (case.q, case.k, case.v, case.do), case.log_decay
    rows, T = bounds.shape[0], case.q.shape[1] // bounds.shape[0]
    own, own_grad, dfinal, documents = None, None, case.dfinal, documents_of(bounds, T)
    if split:
        ends, own = module.local_states(k, v, log_decay, None, documents, pieces=rows)
        starts, own_grad = module.local_states(
            q, do, log_decay, None, documents, pieces=rows, reverse=True, scale=scale
        )
        dfinal = lambda: case.dfinal
        without = judge_rows(case.replace(initial_state=0 * case.initial_state, dfinal=0 * case.dfinal), bounds)
        found = {"final_state": ends, "dinitial_state": starts}
        assert_close(found, {name: without[name] for name in found}, impl.backend, impl.dtype)
    o, final, saved, plan = module.forward(q, k, v, log_decay, scale, case.initial_state, documents, True, own, rows)
    *grads, dinitial = module.backward(
        q, k, v, log_decay, scale, case.initial_state, documents, saved, plan, do, dfinal, own_grad, rows
    )
    got = (
        {"o": o, "final_state": final}
        | dict(zip(("dq", "dk", "dv"), grads, strict=True))
        | {"dinitial_state": dinitial}
    )
    assert_close(got, judge_rows(case, bounds), impl.backend, impl.dtype)
