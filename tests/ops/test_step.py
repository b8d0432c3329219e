"""lightning_step against plain loops in fp64, and the states it must leave alone; on a GPU in CUDA graphs."""

import pytest
import torch

from lightning_megatron.ops import lightning_attn, lightning_decode, lightning_step

from .cases import assert_same_bits, pick
from .decoding import (
    BACKENDS,
    BF16,
    EPS,
    HEAD_DIMS,
    SIZES,
    check_step,
    close,
    decode_case,
    graph,
    step_case,
    walk,
    wide,
)


@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_step(every_impl, rng, sizes, S):
    index = pick(rng, (torch.int32, torch.int64))
    check_step(every_impl, step_case(rng, every_impl, sizes, R=4, S=S, N=6, index=index), pick(rng, (None, 0.7)))


@pytest.mark.parametrize("S", [1, 2])
def test_all_rows_are_padding(impl, rng, S):
    case = step_case(rng, impl, (2, 1, 16, 32), R=3, S=S, N=4)
    case["slots"].fill_(-1)
    check_step(impl, case)


def test_no_requests_and_no_states(impl, rng):
    case = step_case(rng, impl, (2, 1, 16, 32), R=3, S=1, N=4)
    none = {name: case[name][:0] for name in ("q", "k", "v", "slots")}
    assert lightning_step(**case | none, backend=impl.backend).shape == (0, 1, 2, 32)
    padding = dict(states=case["states"][:0], slots=torch.full_like(case["slots"], -1))
    assert not lightning_step(**case | padding, backend=impl.backend).any()


def test_a_layer_of_a_larger_buffer(impl, rng):
    """[L, N, H, K, V] with requests in a part of its rows, and [N, L, H, K, V]: the other layers stay as they are."""
    case = step_case(rng, impl, (2, 1, 16, 32), R=3, S=2, N=5)
    want = check_step(impl, case)
    for layers_first in (True, False):
        buffer = torch.stack([case["states"] + layer for layer in (1, 0, 2)], 0 if layers_first else 1)
        before, states = buffer.clone(), buffer[1] if layers_first else buffer[:, 1]
        between = torch.zeros(5, 3, 4, 2, 16, 32, dtype=impl.wide, device=impl.device)
        o = lightning_step(**case | {"states": states}, intermediate=between[:, 2], backend=impl.backend)
        assert_same_bits({"o": o, "states": states}, want)
        (before[1] if layers_first else before[:, 1]).copy_(want["states"])
        assert torch.equal(buffer, before)
        assert (between[:, :2] == 0).all() and (between[:, 2, 2:] == 0).all() and between[:, 2, :2].any()


def test_strides(impl, rng):
    case = step_case(rng, impl, (4, 2, 16, 32), R=3, S=2, N=5)
    want = check_step(impl, case)
    for change in (
        lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],  # of a fused projection
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # [S, R, ...], Megatron's order
        lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    ):
        strided = {name: change(case[name]) for name in ("q", "k", "v")}
        strided["slots"] = torch.stack((case["slots"],) * 2, 1)[:, 0]
        assert_same_bits(check_step(impl, case | strided), want)


@pytest.mark.parametrize("sizes", [(2, 1, 128, 64), (1, 1, 256, 48)])
def test_the_same_in_any_batch_and_one_by_one(triton_impl, rng, sizes):
    """A request's bits do not depend on the others, nor on how many tokens a step takes."""
    case = step_case(rng, triton_impl, sizes, R=3, S=3, N=4)
    case["slots"] = torch.tensor([2, 0, 3], device=triton_impl.device)
    together, states = check_step(triton_impl, case), case["states"].clone()
    for s in range(3):
        alone = {name: case[name][1:2, s : s + 1] for name in ("q", "k", "v")} | {"slots": case["slots"][1:2]}
        o = lightning_step(**case | alone | {"states": states}, backend=triton_impl.backend)
        assert torch.equal(o[0, 0], together["o"][1, s])
    assert torch.equal(states[0], together["states"][0]) and torch.equal(states[1:], case["states"][1:])


def test_equals_the_operator(triton_impl, rng):
    """lightning_attn of one token is the same kernel."""
    case = step_case(rng, triton_impl, (4, 2, 48, 32), R=3, S=1, N=3)
    case["slots"] = torch.arange(3, device=triton_impl.device)
    q, k, v, log_decay, states, _ = case.values()
    want = lightning_attn(
        q, k, v, log_decay, initial_state=states, output_final_state=True, backend=triton_impl.backend
    )
    assert_same_bits(check_step(triton_impl, case), dict(zip(("o", "states"), want, strict=True)))


# ---- GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 4])
@pytest.mark.parametrize("K", HEAD_DIMS)
@pytest.mark.parametrize("V", HEAD_DIMS)
def test_step_of_head_dims(rng, K, V, S):
    check_step(BF16, step_case(rng, BF16, (2, 1, K, V), R=3, S=S, N=5))


@pytest.mark.gpu
def test_slot_past_states_is_nan_and_touches_nothing(rng):
    case = step_case(rng, BF16, (2, 1, 64, 64), R=3, S=2, N=5)
    case["slots"] = torch.tensor([1, 4, 0], device="cuda")
    states = case["states"].clone()
    o = lightning_step(**case | {"states": states[:3]})
    assert o[1].isnan().all() and o[[0, 2]].isfinite().all() and torch.equal(states[2:], case["states"][2:])


@pytest.mark.gpu
@pytest.mark.parametrize("impl", BACKENDS, ids=str)
@pytest.mark.parametrize("S", [1, 2])
def test_step_in_a_cuda_graph(rng, impl, S):
    """Replayed with other inputs and other slots, padding among them."""
    sizes = (4, 2, 64, 64)
    case = step_case(rng, impl, sizes, R=4, S=S, N=7)
    between = torch.zeros(7, S, 4, 64, 64, device="cuda")
    replay, o = graph(lambda: lightning_step(**case, intermediate=between, backend=impl.backend))
    for _ in range(3):
        fresh = step_case(rng, impl, sizes, R=4, S=S, N=7)
        for name, x in fresh.items():
            case[name].copy_(x)
        between.fill_(7.0)
        replay.replay()
        want = walk(*wide(*fresh.values()), 64**-0.5)
        close("o", o, want[0], impl.dtype)
        close("states", case["states"], want[1], impl.wide)
        close("intermediate", between, want[2], impl.wide)


@pytest.mark.gpu
def test_does_not_wait(rng):
    """Neither operator waits for the GPU, not even the first time."""
    case = step_case(rng, BF16, (4, 2, 64, 64), R=4, S=2, N=7)
    fused, _ = decode_case(rng, BF16, (4, 2, 64, 64), gated=True, norms=tuple(EPS), out_weight=True, turned=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in ("triton", "torch"):
            lightning_step(**case, backend=backend)
            lightning_decode(**fused | {"backend": backend})
    finally:
        torch.cuda.set_sync_debug_mode("default")
