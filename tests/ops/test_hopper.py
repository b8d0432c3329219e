"""The walks of Hopper GPUs, run on the CPU by ``gluon.py``: what they compute, and that nothing overtakes anything."""

from __future__ import annotations

import pytest
import torch

from lightning_megatron.ops.triton import attention as triton_backend
from lightning_megatron.ops.triton import plans, tiling
from lightning_megatron.ops.triton.launch import Launch

from ..tolerances import assert_close
from . import gluon
from .cases import Impl, check, make_case, pick
from .isolation import check_isolated, check_pieces, packed, without_states
from .launches import HOPPER
from .parts import check_parts, draw

BF16 = Impl("triton", torch.bfloat16)
SHAPES = {  # batch, tokens, query heads, heads of k and v, K, V; tokens of a segment
    "square": (2, 200, 2, 2, 64, 64, None),
    "segments": (1, 700, 2, 1, 128, 128, 256),
    "padded": (1, 70, 1, 1, 48, 96, None),
    "wide": (1, 300, 1, 1, 256, 64, 128),
    "wide-values": (1, 150, 2, 2, 96, 208, 128),
    "three-quarters": (1, 130, 1, 1, 192, 176, None),
}
DOCUMENTS = {  # K, V; tokens of a segment; lengths
    "one": (64, 64, None, (70,)),
    "many in a chunk": (64, 64, None, (0, 1, 1, 3, 20, 0, 0, 40, 2, 60, 33, 0)),
    "on chunk borders": (128, 128, 128, (64, 128, 0, 0, 64, 32, 32, 70)),
    "over segments": (64, 128, 128, (5, 300, 1, 63, 65, 130)),
    "on segment borders": (96, 64, 128, (128, 0, 256, 127, 129, 20)),
    "wide": (256, 64, 128, (100, 28, 1, 131)),
    "wide-values": (96, 208, 128, (30, 110, 3)),
}


@pytest.fixture(params=[False, True], ids=["early", "late"])
def machine(request, monkeypatch):
    """Launches of Hopper's kernels go to ``gluon.run``. The names of those that were."""
    launched = []

    class OnCpu(Launch):
        def __call__(self, *tensors):
            if self._kernel.fn.__name__ in HOPPER:
                launched.append(self._kernel.fn.__name__)
                assert self._options.get("launch_pdl", False) == self._rest[-1]
                warps = self._options["num_warps"]
                gluon.run(self._kernel, self.grid, (*tensors, *self._rest), warps, request.param)
            else:  # Triton's interpreter cannot multiply bf16
                super().__call__(*(x.float() if x is not None and x.dtype == torch.bfloat16 else x for x in tensors))

    for module in (plans, triton_backend):
        monkeypatch.setattr(module, "Launch", OnCpu)
    monkeypatch.setattr(tiling, "has_wgmma", lambda device: True)
    monkeypatch.setattr(tiling, "o_gains", lambda *sizes: True)
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


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(name, machine, rng, cut):
    """As in training: no states, which would be those of documents."""
    K, V, segment, documents = DOCUMENTS[name]
    if segment:
        cut(segment)
    case = make_case(rng, BF16, documents=documents, H=2, Hkv=1, K=K, V=V, initial=False, log_decay=(-0.02, 0.0))
    got, want = without_states(BF16)(case), without_states(Impl("torch", torch.float64))(case.to(dtype=torch.float64))
    assert machine == list(HOPPER)
    assert_close(got, want, BF16.backend, BF16.dtype)


@pytest.mark.parametrize("rows, T, segment", [(1, 300, 128), (3, 100, None), (2, 192, 128)])
@pytest.mark.parametrize("split", [False, True], ids=["", "states apart"])
def test_states_are_of_rows(split, rows, T, segment, machine, rng, cut):
    """As with context parallelism: documents go on over the edges of rows."""
    if segment:
        cut(segment)
    case, bounds = draw(rng, BF16, rows, T, *pick(rng, ((64, 64), (128, 128), (128, 64))))
    check_parts(BF16, case, bounds, split)
    assert set(machine) == set(HOPPER)


@pytest.mark.parametrize("name", ["many in a chunk", "on chunk borders", "over segments", "on segment borders"])
def test_not_finite_stays_in_its_document(name, machine, rng, cut):
    K, V, segment, documents = DOCUMENTS[name]
    if segment:
        cut(segment)
    case = make_case(rng, BF16, documents=documents, H=1, K=K, V=V, log_decay=(pick(rng, (-0.02, 0.0)),))
    alone = [x._replace(enters=None, leaves=None) for x in packed(documents)]
    check_isolated(BF16, without_states(BF16), case, alone, rng)
    assert set(machine) == set(HOPPER)


@pytest.mark.parametrize("split", [False, True], ids=["", "states apart"])
def test_not_finite_stays_in_its_row(split, machine, rng, cut):
    cut(128)
    check_pieces(BF16, rng, [[0, 20, 20, 140, 200], [0, 0, 64, 192, 200], [0, 200, 200, 200, 200]], split, 64, 64)
    assert set(machine) == set(HOPPER)


def test_segments_of_whole_chunks(machine, rng, cut):
    """Others would be written by two programs: Triton's walks take them."""
    for tokens, overlapped in ((32, False), (96, False), (128, True)):
        cut(tokens)
        without_states(BF16)(make_case(rng, BF16, documents=(40, 110), H=1, K=64, V=64, initial=False))
        assert set(machine) == (set(HOPPER) if overlapped else set()), tokens
        machine.clear()
