"""The judge is judged: the recurrence against numerical derivatives, an explicit T x T mask, and numbers by hand."""

import pytest
import torch

from lightning_megatron.ops.reference import recurrent_lightning_attn

from ..tolerances import BY_HAND, FORMULAS, error
from .cases import EVERYTHING, Impl, evaluate, judge, make_case

FP64 = Impl("torch", torch.float64)


def masked_lightning_attn(q, k, v, log_decay, *, scale=None, initial_state=None, cu_seqlens=None):
    """The same operator as one masked product for each head, with no recurrence and no chunks."""
    (B, T, H, K), Hkv, V = q.shape, k.shape[2], v.shape[3]
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    o, final = [], []
    for b in range(B):
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            time = torch.arange(end - start)
            n = len(final)
            heads, states = [], []
            for h in range(H):
                decay, entering = (
                    log_decay[h].exp(),
                    q.new_zeros(K, V) if initial_state is None else initial_state[n, h],
                )
                qs, ks, vs = q[b, start:end, h], k[b, start:end, h * Hkv // H], v[b, start:end, h * Hkv // H]
                mask = torch.zeros(end - start, end - start, dtype=q.dtype)
                for i in range(end - start):
                    mask[i, : i + 1] = decay ** (i - time[: i + 1])
                entered = decay ** (time + 1)[:, None] * (qs @ entering)
                heads.append(((qs @ ks.T) * mask @ vs + entered) * (K**-0.5 if scale is None else scale))
                left = decay ** (end - start - 1 - time)[:, None]
                states.append(decay ** (end - start) * entering + ks.T @ (left * vs))
            o.append(torch.stack(heads, dim=1))
            final.append(torch.stack(states))
    return torch.cat(o).view(B, T, H, V), torch.stack(final)


@pytest.mark.parametrize("uses", [EVERYTHING, ("o",), ("final_state",)])
@pytest.mark.parametrize(
    "config",
    [
        dict(B=2, T=37, H=3, K=16, V=32),
        dict(T=29, H=6, Hkv=2, scale=1.7, initial=False),
        dict(T=11, H=2, log_decay=(-30.0, 0.0)),
        dict(documents=(5, 0, 1, 14, 0), H=4, Hkv=1),
    ],
)
def test_recurrence_is_the_masked_product(rng, config, uses):
    case = make_case(rng, FP64, **config)
    want, got = evaluate(masked_lightning_attn, case, uses), judge(case, uses)
    for name in want:
        assert error(name, got[name], want[name], smallest=1e-200) < FORMULAS, name


def test_recurrence_gradients_are_numerical_derivatives(rng):
    case = make_case(rng, FP64, B=1, T=5, H=2, Hkv=1, K=3, V=2)

    def attn(q, k, v, initial_state):
        return recurrent_lightning_attn(q, k, v, case.log_decay, scale=0.8, initial_state=initial_state)

    assert torch.autograd.gradcheck(attn, [x.requires_grad_() for x in (case.q, case.k, case.v, case.initial_state)])


def test_by_hand():
    """Decay 1/2, scale 3, K = V = 1, a state of 8 before: S = 4 + 2 = 6, then 3 + 20 = 23; o = 3 (1) 6, 3 (-2) 23."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([1.0, -2.0], [1.0, 4.0], [2.0, 5.0]))
    log_decay, state = torch.tensor([0.5]).log(), torch.tensor(8.0).view(1, 1, 1, 1)
    o, final = recurrent_lightning_attn(q, k, v, log_decay, scale=3.0, initial_state=state)
    assert o.flatten().tolist() == pytest.approx([18, -138], rel=BY_HAND) and final.item() == pytest.approx(
        23, rel=BY_HAND
    )
