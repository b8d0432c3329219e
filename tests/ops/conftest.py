"""The implementations under test: every test that asks for ``impl`` runs once for each."""

import pytest
import torch

from .cases import Impl

CPU = [
    Impl("torch", torch.float32),
    Impl("torch", torch.float64),
    Impl("torch", torch.bfloat16),
    Impl("triton", torch.float32),
    Impl("triton", torch.float16),  # bfloat16 in the interpreter of Triton 3.6 multiplies bit patterns
]
GPU = [
    Impl("triton", torch.bfloat16, "cuda"),
    Impl("triton", torch.float16, "cuda"),
    Impl("triton", torch.float32, "cuda"),
    Impl("torch", torch.float32, "cuda"),
]


def parameters(impls: list[Impl]) -> list:
    """Of pytest: with CUDA, Triton compiles, and what needs its interpreter is skipped."""
    with_cuda = torch.cuda.is_available()
    interpreted = pytest.mark.skipif(with_cuda, reason="Triton's interpreter runs only where there is no CUDA device")
    marks = {("torch", "cpu"): [], ("triton", "cpu"): [interpreted]}
    return [pytest.param(x, id=str(x), marks=marks.get((x.backend, x.device), [pytest.mark.gpu])) for x in impls]


@pytest.fixture(params=parameters(CPU + GPU))
def impl(request: pytest.FixtureRequest) -> Impl:
    return request.param


@pytest.fixture(params=parameters([x for x in CPU + GPU if x.backend == "triton"]))
def triton_impl(request: pytest.FixtureRequest) -> Impl:
    return request.param


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch):
    """``cut(n)``: segments of n tokens, which in real life have 1024 or more."""
    from lightning_megatron.ops import kernels

    def set_length(tokens: int) -> None:
        print(f"segments of {tokens} tokens")
        monkeypatch.setattr(kernels, "_segment_len", lambda T: tokens)

    return set_length
