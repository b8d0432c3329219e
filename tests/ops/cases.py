"""Random inputs of the operator, and its results in one dictionary: o, final_state and every gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightning_megatron.ops import lightning_attn
from lightning_megatron.ops.reference import recurrent_lightning_attn

from ..tolerances import assert_close

EVERYTHING = ("o", "final_state")
SOME_DECAYS = (-0.003, -0.1, -0.7, 0.0)


@dataclass(frozen=True)
class Impl:
    """One implementation on one device in one dtype."""

    backend: str
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        where = "gpu" if self.device == "cuda" else "interpreter" if self.backend == "triton" else "cpu"
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}-{where}"

    @property
    def wide(self) -> torch.dtype:
        """dtype of states and log_decay."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def attn(self, q, k, v, log_decay, **kwargs):
        return lightning_attn(q, k, v, log_decay, output_final_state=True, backend=self.backend, **kwargs)


@dataclass(frozen=True)
class Case:
    """Arguments of the operator, and a gradient for each of its outputs."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor
    scale: float | None
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    do: torch.Tensor
    dfinal: torch.Tensor

    def __str__(self) -> str:
        """What a failed test has to say about its input."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        text = [f"{name}{list(x.shape)} strides {x.stride()}" for name, x in tensors.items() if x.dim() > 1]
        bounds = None if self.cu_seqlens is None else self.cu_seqlens.tolist()
        return f"{'; '.join(text)}; log_decay {self.log_decay.tolist()}, scale {self.scale}, cu_seqlens {bounds}"

    def to(self, **kwargs) -> Case:
        """Every floating point tensor converted; cu_seqlens only moved."""
        device = {"device": kwargs["device"]} if "device" in kwargs else {}
        moved = {
            name: x.to(**(kwargs if x.is_floating_point() else device)) if isinstance(x, torch.Tensor) else x
            for name, x in vars(self).items()
        }
        return Case(**moved)

    def replace(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)


def randn(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def pick(rng: torch.Generator, options: Sequence):
    return options[int(torch.randint(len(options), (), generator=rng))]


def random_documents(rng: torch.Generator, T: int) -> list[int]:
    """Lengths that sum to T: ragged, with empty and one-token documents among them."""
    lengths = [0] * pick(rng, (0, 0, 1))
    while sum(lengths) < T:
        length = pick(rng, (0, 1, 1, pick(rng, range(2, 20)), pick(rng, (16, 32, 64)), pick(rng, range(1, T + 1))))
        lengths.append(min(length, T - sum(lengths)))
    return lengths + [0] * pick(rng, (0, 0, 1, 2))


def make_case(
    rng: torch.Generator,
    impl: Impl,
    *,
    B: int = 2,
    T: int = 100,
    H: int = 2,
    Hkv: int | None = None,
    K: int = 16,
    V: int = 16,
    log_decay: Sequence[float] = SOME_DECAYS,
    scale: float | None = None,
    initial: bool = True,
    documents: Sequence[int] | None = None,
    index: torch.dtype = torch.int32,
) -> Case:
    """Normal values in impl's dtype on impl's device; ``documents`` are lengths, and set B and T."""
    cu_seqlens, N = None, B
    if documents is not None:
        cu_seqlens = torch.tensor([0, *documents]).cumsum(0).to(index)
        B, T, N = 1, sum(documents), len(documents)
    Hkv = Hkv or H
    low = {"dtype": impl.dtype, "device": impl.device}
    wide = {"dtype": impl.wide, "device": impl.device}
    decays = torch.tensor(log_decay, dtype=torch.float64).repeat(H)[:H]
    return Case(
        q=randn(rng, B, T, H, K).to(**low),
        k=randn(rng, B, T, Hkv, K).to(**low),
        v=randn(rng, B, T, Hkv, V).to(**low),
        log_decay=decays.to(**wide),
        scale=scale,
        initial_state=randn(rng, N, H, K, V).to(**wide) if initial else None,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(impl.device),
        do=randn(rng, B, T, H, V).to(**low),
        dfinal=randn(rng, N, H, K, V).to(**wide),
    )


def evaluate(attn: Callable, case: Case, uses: Sequence[str] = EVERYTHING) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of <o, do> + <final_state, dfinal>, or of the one of them that ``uses`` names."""
    leaves = {name: getattr(case, name) for name in ("q", "k", "v", "initial_state")}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items() if x is not None}
    o, final = attn(**leaves, log_decay=case.log_decay, scale=case.scale, cu_seqlens=case.cu_seqlens)
    outputs, given = {"o": o, "final_state": final}, {"o": case.do, "final_state": case.dfinal}
    uses = [name for name in uses if outputs[name].requires_grad]  # the reference's state of no token is a constant
    gradients = torch.autograd.grad(
        [outputs[name] for name in uses], list(leaves.values()), [given[name].to(outputs[name].dtype) for name in uses],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return outputs | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def judge(case: Case, uses: Sequence[str] = EVERYTHING) -> dict[str, torch.Tensor]:
    """The same results from the recurrence, in fp64."""
    return evaluate(recurrent_lightning_attn, case.to(device="cpu"), uses)


def check(impl: Impl, case: Case, uses: Sequence[str] = EVERYTHING) -> dict[str, torch.Tensor]:
    """Compare every result with the recurrence; returns impl's."""
    print(impl, case)  # pytest shows it if the test fails
    got = evaluate(impl.attn, case, uses)
    for name, x in got.items():
        assert x.dtype == (impl.wide if "state" in name else impl.dtype) and x.device.type == impl.device, name
    time_first = impl.backend == "triton" and case.q.shape[0] > 1 and case.q.stride(0) < case.q.stride(1)
    assert (got["o"].transpose(0, 1) if time_first else got["o"]).is_contiguous()
    assert got["o"].requires_grad and got["final_state"].requires_grad
    assert_close(got, judge(case, uses), impl.backend, impl.dtype)
    return got


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"not bit for bit the same: {different}"


def with_gradient(function, x, dy) -> dict[str, torch.Tensor]:
    """y of a function of x, and the gradient of x."""
    x = x.detach().requires_grad_()
    y = function(x)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}
