"""fp32 means fp32 with the torch backend, whatever precision torch is told to multiply fp32 matrices with."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_megatron.ops import torch_backend

from .cases import Impl, check, evaluate, make_case

SETTINGS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "fp32_precision of CUDA": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "fp32_precision of the CPU": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "fp32_precision of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}
FP32 = [Impl("torch", dtype) for dtype in (torch.float32, torch.bfloat16)]


def settings() -> tuple[str, ...]:
    return torch.backends.fp32_precision, *(
        x.matmul.fp32_precision for x in (torch.backends.cuda, torch.backends.mkldnn)
    )


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def setting(request: pytest.FixtureRequest):
    request.param()
    yield
    torch.set_float32_matmul_precision("highest")  # sets fp32_precision to "ieee", which would override "all"
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"


class Products(TorchDispatchMode):
    """Notes the dtype of every matrix product, and the setting while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, tuple[str, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addbmm"):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            self.seen += [(x.dtype, settings()) for x in tensors]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", FP32, ids=str)
def test_no_product_is_reduced(rng, setting, impl):
    """Most CPUs have no bf16 or TF32 units to show the difference: so look at the products themselves."""
    case = make_case(rng, impl, T=100, H=2, Hkv=1)
    before = settings()
    with Products() as products:
        check(impl, case)
        torch_backend.combine(case.initial_state[None], torch.rand(2, 1, 1, 2, generator=rng))
        torch_backend.final_states(case.k, case.v, case.log_decay, None, None)
    forward_and_backward = [dtype for dtype, _ in products.seen]
    assert len(forward_and_backward) >= 4 * 2 * 4, "of the forward and three walks of the backward"
    assert set(forward_and_backward) == {torch.float64}
    assert {now for _, now in products.seen} == {before}, "the user's setting was changed meanwhile"
    assert settings() == before


def test_fp32_by_default(rng):
    """Nothing is widened where fp32 products are exact to fp32."""
    with Products() as products:
        evaluate(FP32[0].attn, make_case(rng, FP32[0]))
    assert {dtype for dtype, _ in products.seen} == {torch.float32}


@pytest.mark.gpu
def test_on_a_gpu(rng, setting):
    """TF32 would be wrong by 4e-4; the backward runs in autograd's own thread."""
    impl = Impl("torch", torch.float32, "cuda")
    check(impl, make_case(rng, impl, T=200, H=4, Hkv=2, K=64, V=64))
