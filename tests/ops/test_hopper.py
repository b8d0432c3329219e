"""The walks of Hopper GPUs, run on the CPU by ``gluon.py``: what they compute, and that nothing overtakes anything."""

from __future__ import annotations

import pytest
import torch

from lightning_megatron.ops.triton import attention as triton_backend
from lightning_megatron.ops.triton import plans, tiling
from lightning_megatron.ops.triton.launch import Launch

from . import gluon
from .cases import Impl, check, evaluate, judge, make_case
from .launches import FUSED, HOPPER, forget_plans

BF16 = Impl("triton", torch.bfloat16)
SHAPES = {  # batch, tokens, query heads, heads of k and v, K, V; tokens of a segment
    "square": (2, 200, 2, 2, 64, 64, None),
    "segments": (1, 700, 2, 1, 128, 128, 256),
    "padded": (1, 70, 1, 1, 48, 96, None),
    "wide": (1, 300, 1, 1, 256, 64, 128),
    "wide-values": (1, 150, 2, 2, 96, 208, 128),
    "three-quarters": (1, 130, 1, 1, 192, 176, None),
}
ONE_WALK = {  # which fused.py takes
    "segments": (1, 420, 2, 1, 128, 128, 128),
    "short": (1, 40, 1, 1, 128, 128, None),
    "padded": (2, 170, 1, 1, 80, 112, None),
}


@pytest.fixture
def turns():
    return gluon.Turns(None)


@pytest.fixture(params=[False, True], ids=["early", "late"])
def machine(request, monkeypatch, turns):
    """Launches of Hopper's kernels go to ``gluon.run``. The names of those that were."""
    launched = []

    class OnCpu(Launch):
        def __call__(self, *tensors):
            if self._kernel.fn.__name__ in (*HOPPER, FUSED):
                launched.append(self._kernel.fn.__name__)
                assert self._options.get("launch_pdl", False) == self._rest[-1]
                warps = self._options["num_warps"]
                gluon.run(self._kernel, self.grid, (*tensors, *self._rest), warps, request.param, turns)
            else:  # Triton's interpreter cannot multiply bf16
                super().__call__(*(x.float() if x is not None and x.dtype == torch.bfloat16 else x for x in tensors))

    for module in (plans, triton_backend):
        monkeypatch.setattr(module, "Launch", OnCpu)
    monkeypatch.setattr(tiling, "has_wgmma", lambda device: True)
    monkeypatch.setattr(tiling, "o_gains", lambda K, V: True)
    monkeypatch.setattr(tiling, "has_descriptors", lambda *tensors: True)
    return launched


@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_recurrence(name, initial, machine, rng, cut):
    B, T, H, Hkv, K, V, segment = SHAPES[name]
    if segment:
        cut(segment)
    case = make_case(rng, BF16, B=B, T=T, H=H, Hkv=Hkv, K=K, V=V, initial=initial)
    check(BF16, case)
    assert machine == list(HOPPER)


@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
@pytest.mark.parametrize(
    "name, leader", [*(("segments", x) for x in (0, 1, None)), ("short", 0), ("padded", 1)]
)  # fmt: skip
def test_one_walk_for_dk_and_dv(name, leader, turns, initial, machine, rng, cut, monkeypatch):
    """Whichever warpgroup leads."""
    monkeypatch.setattr(tiling, "FUSED", True)
    turns.leader = leader
    B, T, H, Hkv, K, V, segment = ONE_WALK[name]
    if segment:
        cut(segment)
    case = make_case(rng, BF16, B=B, T=T, H=H, Hkv=Hkv, K=K, V=V, initial=initial)
    check(BF16, case)
    assert machine == [HOPPER[0], FUSED]


def test_one_walk_is_as_exact(machine, rng, monkeypatch):
    """As two, which multiply what rounding cut off of weights, too."""
    case = make_case(rng, BF16, B=1, T=64, H=2, K=128, V=128, initial=False)
    errors, true = [], judge(case, ["o"])
    for one in (False, True):
        monkeypatch.setattr(tiling, "FUSED", one)
        forget_plans()
        found = evaluate(BF16.attn, case, ["o"])
        errors.append(
            [float((found[x] - true[x]).double().norm() / true[x].double().norm()) for x in ("dk", "dv", "dq")]
        )
    print(errors)
    assert machine[1::2] == [HOPPER[1], FUSED]
    assert all(b < 1.1 * a for a, b in zip(*errors, strict=True))
