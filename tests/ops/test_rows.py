"""Parts of packed sequences: states are those of parts, not of documents."""

import pytest
import torch

from lightning_megatron.ops import backend as backends

from .cases import pick
from .parts import check_parts, documents_of, draw


@pytest.mark.parametrize("split", [False, True], ids=["", "states apart"])
@pytest.mark.parametrize("rows, T", [(1, 70), (2, 1), (2, 33), (2, 130), (3, 64)])
def test_states_are_of_rows(every_impl, rng, cut, rows, T, split):
    scale = 1 if every_impl.device == "cpu" else 4  # the walks of Hopper have segments of whole chunks of 64
    cut(scale * pick(rng, (32, 64)))
    T *= scale
    interpreted = every_impl.backend == "triton" and every_impl.device == "cpu"
    K, V = pick(rng, [(16, 16), (32, 64), (48, 32), *([] if interpreted else [(128, 128)])])
    case, bounds = draw(rng, every_impl, rows, T, K, V)
    check_parts(every_impl, case, bounds, split)


def test_one_row_is_a_packed_sequence(every_impl, rng, cut):
    """Bit for bit, where no state enters."""
    cut(64)
    case, bounds = draw(rng, every_impl, 1, 150, 32, 32)
    module = backends.choose(every_impl.backend, case.q)
    args = case.q, case.k, case.v, case.log_decay, 1.0, None
    rows = documents_of(bounds, 150)
    outputs = [module.forward(*args, x, False)[0] for x in (rows, rows._replace(by_row=False))]
    assert torch.equal(*outputs)
