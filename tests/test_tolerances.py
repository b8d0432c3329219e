"""The tolerances: rounding as any machine may do it stays below a third of them, a mistake exceeds ten times.

Rounding is noise of a random sign on what is computed, of the size that sums in the worst order have (2^-20 is
``summed(512)``): it is drawn, and so does not depend on the kernels of the machine that runs the test.
"""

from __future__ import annotations

import functools

import pytest
import torch

from tests.helpers.documents import write_equal_documents
from tests.helpers.training import gradient_norms, train
from tests.helpers.variants import VARIANTS
from tests.launch import ROOT
from tests.layers import SIZES, Variant, error, parameter_names, reference, with_gradients
from tests.ops.cases import Case, Impl, evaluate, judge, make_case, randn
from tests.tolerances import LAYERS, NOISE, SMALLEST, TOLERANCES, TRAINED_LOSSES, TRAINED_NORMS, summed
from tests.tolerances import error as head_error

FP32 = Impl("torch", torch.float32)


def noisy(x: torch.Tensor, rng: torch.Generator, size: float = NOISE) -> torch.Tensor:
    return x.double() * (1 + size * (2 * torch.rand(x.shape, generator=rng, dtype=torch.float64) - 1))


def test_summed_is_what_sums_lose(rng):
    """A sum in fp32, product by product, against fp64: as much as the formula says, and less in blocks."""
    assert NOISE == summed(512)
    for n in (64, 512, 4096):
        a, b = (torch.randn(n, 2000, generator=rng) for _ in range(2))
        want, one_by_one = (a.double() * b.double()).sum(0), torch.zeros(2000)
        for x, y in zip(a, b, strict=True):
            one_by_one += x * y
        lost = lambda got, want=want: float((got.double() - want).norm() / want.norm())
        assert summed(n) / 4 < lost(one_by_one) < summed(n)
        assert lost((a * b).unflatten(0, (-1, 16)).sum(1).sum(0)) < summed(n)


# ---- the operator ----------------------------------------------------------------------------------------------------


def errors_of(got: dict, want: dict) -> dict[str, float]:
    return {name: head_error(name, got[name], want[name], SMALLEST[torch.float32]) for name in want}


def draw(rng: torch.Generator) -> Case:
    return make_case(rng, FP32, documents=(33, 1, 0, 66), H=4, Hkv=2, K=48, V=32)


def test_rounding_of_the_operator(rng):
    """Noise on all inputs, and channels in another order, so that sums over them have another order too."""
    limit = TOLERANCES["torch", torch.float32]
    for _ in range(10):
        case = draw(rng)
        want = judge(case)
        other = case.replace(
            **{name: noisy(getattr(case, name), rng) for name in ("q", "k", "v", "initial_state", "do")}
        )
        assert all(e <= limit[name] / 3 for name, e in errors_of(judge(other), want).items())
        order = torch.randperm(case.q.shape[-1], generator=rng)
        turned = case.replace(
            q=case.q[..., order], k=case.k[..., order],
            initial_state=case.initial_state[:, :, order], dfinal=case.dfinal[:, :, order],
        )  # fmt: skip
        got, back = evaluate(FP32.attn, turned), order.argsort()
        got |= {name: got[name][..., back] for name in ("dq", "dk")}
        got |= {name: got[name][:, :, back] for name in ("final_state", "dinitial_state")}
        assert all(e <= limit[name] / 3 for name, e in errors_of(got, want).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mistakes_in_the_operator(rng, dtype):
    """A bound off by one, and a token left out."""
    limit = TOLERANCES["triton", dtype]
    for _ in range(10):
        case = draw(rng)
        want = judge(case)
        bounds = case.cu_seqlens.clone()
        bounds[1] += 1
        without = case.k.clone()
        without[:, 50] = 0
        for wrong in (case.replace(cu_seqlens=bounds), case.replace(k=without)):
            found = errors_of(judge(wrong), want)
            assert any(e > 10 * limit[name] for name, e in found.items()), found


# ---- layers ----------------------------------------------------------------------------------------------------------

LENGTH = 40


def whole_parameters(variant: Variant, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """As layers.draw_parameters gives them, for the variants below."""
    options = variant.values
    kv_heads, K = options.num_kv_heads or 4, SIZES["kv_channels"]
    V = options.value_head_dim or K
    rows = 4 * K + (4 * V if options.gate != "none" else 0) + kv_heads * (K + V)
    shapes = {"linear_qkv.weight": (rows, 64), "linear_qkv.bias": (rows,), "linear_proj.weight": (64, 4 * V)}
    shapes |= {"linear_proj.bias": (64,), "q_norm.weight": (K,), "k_norm.weight": (K,)}
    shapes["out_norm.weight"] = (4 * V,)
    whole = {}
    for name in sorted(parameter_names(variant) - {"linear_proj.bias"}):
        x = randn(rng, *shapes[name])
        whole[name] = 1 + 0.3 * x if "norm" in name else x * (shapes[name][1] ** -0.5 if x.dim() == 2 else 0.3)
    return whole


def layer(variant: Variant, p: dict, x: torch.Tensor, weight: torch.Tensor, documents=(LENGTH,)) -> dict:
    attend = lambda p, x: torch.cat([reference(variant, p, y)[0] for y in x.split(documents)])
    return with_gradients(attend, p, x, weight)


@pytest.mark.parametrize("name", ["defaults", "everything", "norm-all"])
def test_rounding_and_mistakes_in_a_layer(name):
    """Fixed values: in one draw of many the norm of a head that is almost 0 amplifies more (tests/tolerances.py)."""
    rng = torch.Generator().manual_seed(1)
    variant, limit = VARIANTS[name], LAYERS[torch.float32]
    for _ in range(5):
        p, (x, weight) = whole_parameters(variant, rng), (randn(rng, LENGTH, 2, 64) for _ in range(2))
        judged = functools.partial(layer, variant)
        want = judged(p, x, weight, documents=(17, 23))
        worst = lambda got, want=want: max(error(got[name], y) for name, y in want.items())
        rounded = judged(
            {n: noisy(y, rng) for n, y in p.items()}, noisy(x, rng), noisy(weight, rng), documents=(17, 23)
        )
        assert worst(rounded) <= limit / 3
        assert worst(judged(p, x, weight, documents=(18, 22))) > 10 * limit
        half = judged(p, x, weight.index_fill(0, torch.arange(20), 0), documents=(17, 23))  # one of two ranks' tokens
        for parameter in p:
            assert error(half[f"d {parameter}"], want[f"d {parameter}"]) > 10 * limit, parameter


# ---- training --------------------------------------------------------------------------------------------------------


def test_rounding_and_mistakes_in_training(tmp_path):
    """A bound between documents off by one, and gradients of norms that tensor-parallel ranks do not sum."""
    start = f"--lr 0 --train-iters 1 --save {tmp_path} --save-interval 1 --no-save-optim --no-save-rng"
    train("freq4", "one", start)
    script = ROOT / "tests" / "helpers" / "perturbed_pretrain.py"

    def differences(layout: str, flags: str = "", **perturb: str) -> tuple[float, float]:
        """Largest differences of losses and gradient norms from one process without noise and fault."""
        env = {f"PERTURB_{name.upper()}": value for name, value in perturb.items()}
        want = train("freq4", "one", flags, load=tmp_path)
        run = train("freq4", layout, flags, load=tmp_path, script=script, env=env)
        pairs = (run.losses, want.losses), (gradient_norms(run), gradient_norms(want))
        return tuple(max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairs)

    documents = f"{write_equal_documents(tmp_path)} --dataloader-inter-document-masking"
    for flags in ("", documents):
        losses, norms = differences("one", flags, noise=str(NOISE))
        assert losses <= TRAINED_LOSSES / 3 and norms < TRAINED_NORMS
    assert differences("tp2-sp", fault="gradients_not_summed")[0] > 10 * TRAINED_LOSSES
    losses, norms = differences("one", documents, fault="boundary_off_by_one")
    assert losses > 100 * TRAINED_LOSSES and norms > 10 * TRAINED_NORMS
