"""Random configurations of everything at once. LIGHTNING_TEST_CASES sets how many (default 40; 200 on a GPU)."""

import os

import pytest
import torch

from .cases import EVERYTHING, check, make_case, pick, random_documents
from .conftest import MAIN, MORE, runs_here
from .layouts import expanded, fused, head_dim_not_last, inside, time_first

CUDA = torch.cuda.is_available()
CASES = int(os.environ.get("LIGHTNING_TEST_CASES") or (200 if CUDA else 40))
pytestmark = [pytest.mark.gpu] if CUDA else []  # `-m gpu` runs all that needs one
DECAYS = (0.0, -1e-6, -1e-3, -0.02, -0.3, -2.0, -20.0, -1e4)


def as_made(case):
    return case


@pytest.mark.parametrize("number", range(CASES))
def test_random(rng, cut, number):
    impl = pick(rng, [x for x in MAIN + MORE if runs_here(x) and (x.device == "cuda") == CUDA])
    cut(pick(rng, (32, 64, 128)))
    T = pick(rng, range(1, 400 if CUDA else 100))
    Hkv, group = pick(rng, ((1, 1), (1, 3), (2, 2), (3, 1), (2, 1)))
    case = make_case(
        rng,
        impl,
        B=pick(rng, (1, 2)) if T > 8 else 4,
        T=T,
        H=Hkv * group,
        Hkv=Hkv,
        K=pick(rng, (16, 32, 48, 64, 96, 128, 192, 256) if CUDA else (16, 16, 32, 48, 64)),
        V=pick(rng, (16, 32, 48, 64, 96, 128, 192, 256) if CUDA else (16, 16, 32, 48, 64)),
        log_decay=[pick(rng, DECAYS) for _ in range(Hkv * group)],
        scale=pick(rng, (None, 1.0, 0.3)),
        initial=pick(rng, (True, True, False)),
        documents=pick(rng, (None, random_documents(rng, T))),
        index=pick(rng, (torch.int32, torch.int64)),
    )
    layouts = (as_made, time_first, fused, inside)
    layout = pick(rng, layouts if case.initial_state is None else layouts + (head_dim_not_last, expanded))
    check(impl, layout(case), pick(rng, (EVERYTHING, EVERYTHING, ("o",), ("final_state",))))
