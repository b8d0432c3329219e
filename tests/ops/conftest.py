"""The implementations under test: a test that asks for ``impl`` or ``every_impl`` runs once for each of them."""

import pytest
import torch

from .cases import Impl
from .launches import forget_plans

# One for each algorithm and machine ...
MAIN = [
    Impl("torch", torch.float64),
    Impl("triton", torch.float32),
    Impl("triton", torch.bfloat16, "cuda"),
    Impl("triton", torch.float32, "cuda"),
]
# ... and the other dtypes. No bfloat16 in the interpreter of Triton 3.6, which multiplies its bit patterns.
MORE = [
    Impl("torch", torch.float32),
    Impl("torch", torch.bfloat16),
    Impl("torch", torch.float16),
    Impl("triton", torch.float16),
    Impl("triton", torch.float16, "cuda"),
    Impl("torch", torch.float32, "cuda"),
]


def runs_here(impl: Impl) -> bool:
    """With CUDA, Triton compiles and cannot interpret in the same process."""
    return torch.cuda.is_available() == (impl.device == "cuda") or impl.backend == "torch" and impl.device == "cpu"


def parameters(impls: list[Impl]) -> list:
    interpreted = pytest.mark.skipif(
        torch.cuda.is_available(), reason="Triton's interpreter needs a machine without CUDA"
    )
    marks = {("torch", "cpu"): [], ("triton", "cpu"): [interpreted]}
    return [pytest.param(x, id=str(x), marks=marks.get((x.backend, x.device), [pytest.mark.gpu])) for x in impls]


@pytest.fixture(params=parameters(MAIN))
def impl(request: pytest.FixtureRequest) -> Impl:
    return request.param


@pytest.fixture(params=parameters(MAIN + MORE))
def every_impl(request: pytest.FixtureRequest) -> Impl:
    return request.param


@pytest.fixture(params=parameters([x for x in MAIN if x.backend == "triton"]))
def triton_impl(request: pytest.FixtureRequest) -> Impl:
    return request.param


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch):
    """``cut(n)``: segments of n tokens in two splits, twice that for dk and dv. Real ones have 256 or more."""
    from lightning_megatron.ops.triton import tiling

    def set_length(tokens: int) -> None:
        print(f"segments of {tokens} tokens")
        forget_plans()
        monkeypatch.setattr(tiling, "plan_splits", lambda *sizes: tiling.SplitPlan(tokens // 2, 2, 4))

    return set_length


@pytest.fixture(autouse=True)
def no_plans():
    """Plans of other tests, which may have changed what plans are made of."""
    forget_plans()
    yield
    forget_plans()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors here are tiny: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
