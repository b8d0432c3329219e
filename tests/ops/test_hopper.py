"""The walks of Hopper GPUs, run on the CPU by ``gluon.py``: what they compute, and that nothing overtakes anything."""

from __future__ import annotations

import pytest
import torch

from lightning_megatron.ops.triton import attention as triton_backend

from . import gluon
from .cases import Impl, check, make_case
from .launches import HOPPER

BF16 = Impl("triton", torch.bfloat16)
SHAPES = {  # batch, tokens, query heads, heads of k and v, K, V; tokens of a segment
    "square": (2, 200, 2, 2, 64, 64, None),
    "segments": (1, 700, 2, 1, 128, 128, 256),
    "padded": (1, 70, 1, 1, 48, 96, None),
    "wide": (1, 300, 1, 1, 256, 64, 128),
    "wide-values": (1, 150, 2, 2, 96, 208, 128),
    "three-quarters": (1, 130, 1, 1, 192, 176, None),
}


@pytest.fixture(params=[False, True], ids=["early", "late"])
def machine(request, monkeypatch):
    """Launches of Hopper's kernels go to ``gluon.run``. The names of those that were."""
    launched, launch = [], triton_backend.launch

    def run(kernel, grid, tensors, numbers, constants, **options):
        if kernel.fn.__name__ in HOPPER:
            launched.append(kernel.fn.__name__)
            assert options.get("launch_pdl", False) == constants[-1]
            gluon.run(kernel, grid, (*tensors, *numbers, *constants), options["num_warps"], request.param)
        else:  # Triton's interpreter cannot multiply bf16
            tensors = [x.float() if x is not None and x.dtype == torch.bfloat16 else x for x in tensors]
            launch(kernel, grid, tuple(tensors), numbers, constants, **options)

    monkeypatch.setattr(triton_backend, "launch", run)
    monkeypatch.setattr(triton_backend, "OVERLAP", True)
    monkeypatch.setattr(triton_backend, "_has_wgmma", lambda device: True)
    monkeypatch.setattr(triton_backend, "_descriptors", lambda *tensors: True)
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
