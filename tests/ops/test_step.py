"""Decoding: lightning_step and lightning_decode against plain loops in fp64, the states they must leave alone, errors.

A CUDA graph and bf16 are at the end, for a GPU.
"""

import itertools

import pytest
import torch

from lightning_megatron.ops import (
    lightning_attn,
    lightning_decode,
    lightning_step,
    norm_gate,
    split_heads,
    unfusable,
)
from lightning_megatron.ops.triton import step as kernels

from ..tolerances import DECODING, SMALLEST, error
from .cases import SOME_DECAYS, Impl, assert_same_bits, pick, randn

FEATURE_MAPS, GATES = ("silu", "silu-qkv", "none"), ("sigmoid", "linear", "none")
# heads, heads of k and v, K, V
SIZES = [(2, 2, 16, 16), (4, 2, 48, 32), (3, 1, 32, 80), (2, 1, 96, 16)]
EPS = {"q_norm": 0.02, "k_norm": 0.03, "out_norm": 0.05}


# ---- the judge -------------------------------------------------------------------------------------------------------


def walk(q, k, v, log_decay, states, slots, scale) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o, states and the states behind every token, head by head and token by token, of fp64 tensors on the CPU."""
    (R, S, H, K), V = q.shape, v.shape[3]
    o, states = torch.zeros(R, S, H, V, dtype=torch.float64), states.clone()
    between = torch.full((states.shape[0], S, H, K, V), 7.0, dtype=torch.float64)
    for r, h, s in itertools.product(range(R), range(H), range(S)):
        n, j = int(slots[r]), h // (H // k.shape[2])
        if n < 0:
            continue
        for i in range(K):
            states[n, h, i] = torch.exp(log_decay[h]) * states[n, h, i] + k[r, s, j, i] * v[r, s, j]
        o[r, s, h] = scale * (q[r, s, h] @ states[n, h])
        between[n, s, h] = states[n, h]
    return o, states, between


def layer(mixed, log_decay, states, slots, *, sizes, gated, feature_map, scale, weights, angles, interleaved, gate):
    """The result of a layer and its states, one head of one request after the other, in fp64."""
    H, Hkv, K, V = sizes
    group, results = H // Hkv, []
    width = group * K + gated * group * V + K + V
    states = states.clone()

    def act(x, part):
        return x / (1 + torch.exp(-x)) if part in {"silu": "qk", "silu-qkv": "qkv", "none": ""}[feature_map] else x

    def normed(x, name):
        weight = weights.get(name)
        return x if weight is None else x / torch.sqrt((x**2).sum() / K + EPS[name]) * weight

    def turned(x, r):
        if angles is None:
            return x
        n, y = angles.shape[1], x.clone()
        for i in range(n // 2):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + n // 2)
            cos, sin = torch.cos(angles[r, a]), torch.sin(angles[r, a])
            y[a], y[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
        return y

    for r, h in itertools.product(range(mixed.shape[0]), range(H)):
        n, at = int(slots[r]), (h // group) * width
        columns = mixed[r, at : at + width]
        q = columns[h % group * K :][:K]
        g = columns[group * K + h % group * V :][:V]
        k, v = columns[width - K - V : width - V], columns[width - V :]
        q, k = turned(normed(act(q, "q"), "q_norm"), r), turned(normed(act(k, "k"), "k_norm"), r)
        if n < 0:
            y = torch.zeros(V, dtype=torch.float64)
        else:
            states[n, h] = torch.exp(log_decay[h]) * states[n, h] + torch.outer(k, act(v, "v"))
            y = scale * (q @ states[n, h])
        if "out_norm" in weights:
            y = y / torch.sqrt((y**2).sum() / V + EPS["out_norm"])
            if weights["out_norm"] is not None:
                y = y * weights["out_norm"][h * V : (h + 1) * V]
        results.append({"sigmoid": lambda y, g: y / (1 + torch.exp(-g)), "linear": lambda y, g: y * g}.get(
            gate, lambda y, g: y)(y, g))  # fmt: skip
    return torch.stack(results).reshape(mixed.shape[0], H * V), states


def wide(*tensors):
    return [x.detach().cpu().to(torch.float64 if x.is_floating_point() else torch.int64) for x in tensors]


def close(what: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative RMS of the worst row or head; a row of zeros must be zeros."""
    assert got.isfinite().all(), what
    zero = (want == 0).flatten(1).all(1)
    assert (got.cpu()[zero] == 0).all(), f"{what}: padding is not zero"
    if zero.all():
        return
    rows = [x.detach().cpu().double()[~zero].flatten(1)[None, None] for x in (got, want)]
    found = error("o", *rows, SMALLEST[dtype])
    print(f"{what}: {found:.2e}")
    assert found <= DECODING[dtype], f"{what}: {found:.2e} > {DECODING[dtype]}"


# ---- lightning_step --------------------------------------------------------------------------------------------------


def random_slots(rng, R: int, N: int, index=torch.int64) -> torch.Tensor:
    """Different rows in any order; about every third is padding, but at least one is not."""
    slots = torch.randperm(N, generator=rng)[:R]
    padding = torch.rand(R, generator=rng) < 0.3
    padding[int(torch.randint(R, (), generator=rng))] = False
    return torch.where(padding, -1, slots).to(index)


def step_case(rng, impl, sizes, R: int, S: int, N: int, index=torch.int64) -> dict:
    H, Hkv, K, V = sizes
    low, high = ({"dtype": dtype, "device": impl.device} for dtype in (impl.dtype, impl.wide))
    print(f"{impl} {sizes=} {R=} {S=} {N=}")
    return dict(
        q=randn(rng, R, S, H, K).to(**low),
        k=randn(rng, R, S, Hkv, K).to(**low),
        v=randn(rng, R, S, Hkv, V).to(**low),
        log_decay=torch.tensor(SOME_DECAYS, dtype=torch.float64).repeat(H)[:H].to(**high),
        states=randn(rng, N, H, K, V).to(**high),
        slots=random_slots(rng, R, N, index).to(impl.device),
    )


def check_step(impl, case, scale=None, between=True) -> dict[str, torch.Tensor]:
    states, (N, S) = case["states"].clone(), (case["states"].shape[0], case["q"].shape[1])
    buffer = torch.full((N, S, *states.shape[1:]), 7.0, dtype=impl.wide, device=impl.device) if between else None
    o = lightning_step(
        **case | {"states": states}, scale=scale, intermediate=buffer, backend=impl.backend
    )  # fmt: skip
    want = walk(*wide(*case.values()), case["q"].shape[3] ** -0.5 if scale is None else scale)
    assert o.dtype == impl.dtype and o.is_contiguous()
    close("o", o, want[0], impl.dtype)
    used = case["slots"][case["slots"] >= 0].cpu()
    rest = torch.ones(N, dtype=torch.bool).index_fill_(0, used.long(), False)
    assert torch.equal(states.cpu()[rest], case["states"].cpu()[rest]), "a state that no request has was touched"
    close("states", states.cpu()[used], want[1][used], impl.wide)
    if between:
        assert (buffer.cpu()[rest] == 7).all(), "a row that no request has was touched"
        close("intermediate", buffer.cpu()[used], want[2][used], impl.wide)
        assert torch.equal(buffer.cpu()[used, -1], states.cpu()[used]), "the last of them is the state"
        o_alone = lightning_step(**case | {"states": case["states"].clone()}, scale=scale, backend=impl.backend)
        assert torch.equal(o, o_alone), "the result depends on whether states between are wanted"
    return {"o": o, "states": states}


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


# ---- lightning_decode ------------------------------------------------------------------------------------------------


def decode_case(rng, impl, sizes, *, gated, norms, out_weight, turned, R=4, N=6) -> tuple[dict, dict]:
    """(arguments of lightning_decode, and of its judge beside these)."""
    H, Hkv, K, V = sizes
    case = step_case(rng, impl, sizes, R=R, S=1, N=N, index=pick(rng, (torch.int32, torch.int64)))
    group_dims = H // Hkv * K, gated * H // Hkv * V, K, V
    low = {"dtype": impl.dtype, "device": impl.device}
    weights = {name: 1 + 0.3 * randn(rng, K) for name in ("q_norm", "k_norm") if name in norms}
    if "out_norm" in norms:
        weights["out_norm"] = 1 + 0.3 * randn(rng, H * V) if out_weight else None
    weights = {name: None if x is None else x.to(**low) for name, x in weights.items()}
    angles = None
    if turned:
        angles = (10 * randn(rng, R, turned // 2)).to(dtype=impl.wide, device=impl.device)
    case = {name: case[name] for name in ("log_decay", "states", "slots")} | dict(
        mixed=randn(rng, R, Hkv * sum(group_dims)).to(**low), group_dims=group_dims, backend=impl.backend,
        **{name: (weight, EPS[name]) for name, weight in weights.items()},
    )  # fmt: skip
    return case, dict(weights=weights, angles=angles, gated=gated, sizes=sizes)


def check_decode(impl, case, about, *, feature_map="silu", gate="none", interleaved=False, scale=None) -> dict:
    angles = about["angles"]
    if angles is not None:
        angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat((angles, angles), 1)
        case = case | dict(cos=angles.cos(), sin=angles.sin(), interleaved=interleaved)
    options = dict(feature_map=feature_map, gate=gate, scale=scale)
    states = case["states"].clone()
    y = lightning_decode(**case | options | {"states": states})
    weights = {name: None if x is None else wide(x)[0] for name, x in about["weights"].items()}
    judged = dict(weights=weights, angles=None if angles is None else wide(angles)[0], interleaved=interleaved)
    want, want_states = layer(
        *wide(*(case[name] for name in ("mixed", "log_decay", "states", "slots"))),
        **options | {"scale": case["group_dims"][2] ** -0.5 if scale is None else scale}, **about | judged,
    )  # fmt: skip
    assert y.dtype == impl.dtype and y.is_contiguous()
    close("y", y, want, impl.dtype)
    used = case["slots"][case["slots"] >= 0].cpu()
    rest = torch.ones(len(states), dtype=torch.bool).index_fill_(0, used.long(), False)
    assert torch.equal(states.cpu()[rest], case["states"].cpu()[rest]), "a state that no request has was touched"
    # the torch backend rounds q, k and v as the operations before it do; triton rounds nothing before the state
    close("states", states.cpu()[used], want_states[used], impl.dtype if impl.backend == "torch" else impl.wide)
    return {"y": y, "states": states}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("sizes", SIZES)
def test_decode(every_impl, rng, sizes, feature_map, gate):
    """Each feature map and gate, with random norms and rotations."""
    K = sizes[2]
    norms = [name for name in EPS if pick(rng, (True, False))]
    turned, gated, weight = pick(rng, (0, K // 2, K)), gate != "none" or pick(rng, (True, False)), pick(rng, (0, 1))
    case, about = decode_case(rng, every_impl, sizes, gated=gated, norms=norms, out_weight=weight, turned=turned)
    options = dict(interleaved=pick(rng, (True, False)), scale=pick(rng, (None, 0.7)))
    print(f"{norms=} {turned=} {gated=} {weight=} {options}")
    check_decode(every_impl, case, about, feature_map=feature_map, gate=gate, **options)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of a head where there is a norm over it, of several programs where there is none."""
    for name, size in (("WHOLE", 16 * 64), ("SEVERAL", 16 * 32), ("MIN_COLUMNS", 16), ("SPLIT", 16 * 64)):
        monkeypatch.setattr(kernels, name, size)
    kernels.step_tiles.cache_clear()
    assert kernels.step_tiles(48, 32, whole=True)[:3] == (16, 32, 3)
    assert kernels.step_tiles(48, 32, whole=False)[:3] == (64, 16, 1)
    yield
    kernels.step_tiles.cache_clear()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("turned", [0, 2, 16, 48])
@pytest.mark.parametrize("norms", [(), ("out_norm",), ("q_norm", "k_norm"), tuple(EPS)], ids="-".join)
def test_norms_and_angles(triton_impl, rng, small_tiles, norms, turned, interleaved):
    case, about = decode_case(rng, triton_impl, (4, 2, 48, 32), gated=True, norms=norms, out_weight=True, turned=turned)
    check_decode(triton_impl, case, about, gate="sigmoid", interleaved=interleaved)


@pytest.mark.parametrize("gate", GATES)
def test_equals_the_operations_after_each_other(triton_impl, rng, gate):
    """As a layer would launch them one by one."""
    case, about = decode_case(rng, triton_impl, (4, 2, 48, 32), gated=True, norms=tuple(EPS), out_weight=True, turned=0)
    want_states, backend = case["states"].clone(), triton_impl.backend
    q, g, k, v = split_heads(case["mixed"][:, None], case["group_dims"], feature_map="silu-qkv", backend=backend)
    q, k = (torch.nn.functional.rms_norm(x, (48,), *case[name]) for x, name in ((q, "q_norm"), (k, "k_norm")))
    o = lightning_step(q, k, v, case["log_decay"], want_states, case["slots"], backend=backend)
    weight, eps = case["out_norm"]
    want = norm_gate(o, g, weight, kind=gate, width=32, eps=eps, backend=backend)[:, 0]
    got = check_decode(triton_impl, case, about, feature_map="silu-qkv", gate=gate)
    for name, x in (("y", want), ("states", want_states)):
        difference = (got[name].double() - x.double()).norm() / x.double().norm()
        assert difference <= (1e-6 if triton_impl.dtype == torch.float32 else DECODING[triton_impl.dtype]), name


def test_strides_of_the_projection(impl, rng):
    case, about = decode_case(rng, impl, (4, 2, 16, 32), gated=True, norms=tuple(EPS), out_weight=True, turned=16)
    want = check_decode(impl, case, about, gate="linear")
    for mixed in (torch.cat((case["mixed"],) * 2, 1)[:, : case["mixed"].shape[1]], case["mixed"].t().contiguous().t()):
        assert_same_bits(check_decode(impl, case | {"mixed": mixed}, about, gate="linear"), want)


@pytest.mark.parametrize("K, V", [(128, 128), (64, 64), (192, 128), (256, 256), (96, 96), (16, 16), (128, 256)])
def test_tiles(K, V):
    """A head of at most 64 KiB is one tile; a state never fills the registers; all of K and V is covered once."""
    for whole in (True, False):
        BK, BV, tiles, warps = kernels.step_tiles(K, V, whole)
        assert BK * tiles >= K > BK * (tiles - 1) and (tiles == 1 or whole)
        assert BV >= V or not whole and BV % 16 == 0
        assert BK * BV / (32 * warps) <= 64
        assert tiles == 1 or K * V > 128 * 128


def test_unfusable():
    dims = (256, 128, 128, 64)
    assert unfusable(dims) is unfusable(dims, norm_width=64, turned=128) is None
    assert "128 channels" in unfusable(dims, norm_width=128)
    assert "LRPE" in unfusable(dims, lrpe=True)
    assert "turns 130" in unfusable(dims, turned=130) and "turns 3" in unfusable(dims, turned=3)
    assert "512" in unfusable((512, 128, 512, 64))


# ---- errors ----------------------------------------------------------------------------------------------------------


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def step_arguments(**changes) -> dict:
    """R = 2, S = 3, H = 4, Hkv = 2, K = 16, V = 32, N = 5, with changes."""
    return dict(
        q=zeros(2, 3, 4, 16), k=zeros(2, 3, 2, 16), v=zeros(2, 3, 2, 32), log_decay=torch.full((4,), -0.1),
        states=zeros(5, 4, 16, 32), slots=torch.tensor([3, 0]),
    ) | changes  # fmt: skip


def decode_arguments(**changes) -> dict:
    """R = 2, H = 4, Hkv = 2, K = 16, V = 32 with a gate, N = 5, with changes."""
    good = step_arguments(mixed=zeros(2, 2 * 144), group_dims=(32, 64, 16, 32))
    return {name: x for name, x in good.items() if name not in "qkv"} | changes


WRONG_STEPS = {
    "q as a list": (dict(q=[1.0]), ["q must be a torch.Tensor", "list"]),
    "no slots": (dict(slots=None), ["slots must be a torch.Tensor", "NoneType"]),
    "three dimensions": (dict(q=zeros(2, 4, 16)), ["[2, 4, 16]", "[R,S,H,K]"]),
    "k of other tokens": (dict(k=zeros(2, 2, 2, 16)), ["[2, 2, 2, 16]", "is [R,S,H,K]", "[2,3,Hkv,16]"]),
    "no token": ({n: x[:, :0] for n, x in step_arguments().items() if n in "qkv"}, ["S = 0", "1 to 16"]),
    "17 tokens": (
        dict(q=zeros(2, 17, 4, 16), k=zeros(2, 17, 2, 16), v=zeros(2, 17, 2, 32)), ["S = 17", "lightning_attn"],
    ),
    "a gradient": (dict(q=zeros(2, 3, 4, 16, requires_grad=True)), ["requires grad", "no_grad"]),
    "states of kv heads": (dict(states=zeros(5, 2, 16, 32)), ["[5, 2, 16, 32]", "H,K,V = 4,16,32"]),
    "states in half": (dict(states=zeros(5, 4, 16, 32).half()), ["torch.float16", "must be torch.float32"]),
    "states elsewhere": (dict(states=zeros(5, 4, 16, 32, device="meta")), ["on meta", "on cpu"]),
    "states transposed": (dict(states=zeros(5, 4, 32, 16).mT), ["strides", "contiguous"]),
    "one state for all": (dict(states=zeros(1, 4, 16, 32).expand(5, 4, 16, 32)), ["overlap", "in place"]),
    "slots of floats": (dict(slots=zeros(2)), ["torch.float32", "int32 or int64"]),
    "three slots": (dict(slots=torch.tensor([0, 1, 2])), ["[3]", "must be [2]"]),
    "slot past states": (dict(slots=torch.tensor([0, 5])), ["slot 5", "5 rows", "-1"]),
    "slot -2": (dict(slots=torch.tensor([-2, 1])), ["slot -2", "padding"]),
    "the same slot": (dict(slots=torch.tensor([1, 1])), ["[1, 1]", "twice"]),
    "a slope": (dict(log_decay=torch.full((4,), 0.1)), ["log_decay[0] = 0.1", "<= 0"]),
    "intermediate of few tokens": (dict(intermediate=zeros(5, 2, 4, 16, 32)), ["S >= 3", "[5, 2, 4, 16, 32]"]),
    "intermediate of other rows": (dict(intermediate=zeros(4, 3, 4, 16, 32)), ["N = 5", "[4, 3, 4, 16, 32]"]),
    "flat intermediate": (dict(intermediate=zeros(5, 4, 16, 32)), ["[N,S,H,K,V]", "[5, 4, 16, 32]"]),
    "unknown backend": (dict(backend="cuda"), ["backend='cuda'"]),
}  # fmt: skip
NORM = (torch.ones(16), 1e-6)
WRONG_DECODES = {
    "flat mixed": (dict(mixed=zeros(288)), ["[288]", "[R, Hkv * 144]"]),
    "mixed of part of a group": (dict(mixed=zeros(2, 280)), ["[2, 280]", "whole groups"]),
    "integers": (dict(mixed=zeros(2, 288, dtype=torch.int32)), ["torch.int32", "bfloat16"]),
    "group of three": (dict(group_dims=(32, 64, 16)), ["(32, 64, 16)", "q, gate, k and v"]),
    "gate of one head": (dict(group_dims=(32, 32, 16, 32)), ["32 columns of gate", "2 * 32"]),
    "K = 8": (dict(group_dims=(16, 64, 8, 32), mixed=zeros(2, 240)), ["K=8", "multiple of 16"]),
    "decay of kv heads": (dict(log_decay=zeros(2)), ["[2]", "must be [4]"]),
    "feature map": (dict(feature_map="relu"), ["'relu'", "silu-qkv"]),
    "gate": (dict(gate="tanh"), ["'tanh'", "sigmoid"]),
    "gate without columns": (
        dict(gate="linear", group_dims=(32, 0, 16, 32), mixed=zeros(2, 160)), ["'linear'", "gate='none'"],
    ),
    "norm without eps": (dict(q_norm=NORM[0]), ["q_norm", "(weight, eps)"]),
    "q norm of no weight": (dict(q_norm=(None, 1e-6)), ["weight of q_norm", "NoneType"]),
    "norm of kv channels": (dict(k_norm=(torch.ones(32), 1e-6)), ["weight of k_norm", "[16]", "[32]"]),
    "out norm of a head": (dict(out_norm=(torch.ones(32), 1e-6)), ["weight of out_norm", "[128]", "[32]"]),
    "cos alone": (dict(cos=zeros(2, 16)), ["cos and sin belong together"]),
    "angles of all positions": (dict(cos=zeros(9, 16), sin=zeros(9, 16)), ["[2, n]", "[9, 16]"]),
    "wide angles": (dict(cos=zeros(2, 18), sin=zeros(2, 18)), ["at most K = 16", "[2, 18]"]),
    "odd angles": (dict(cos=zeros(2, 3), sin=zeros(2, 3)), ["n even", "[2, 3]"]),
    "cos of integers": (dict(cos=zeros(2, 16).int(), sin=zeros(2, 16)), ["floating point", "torch.int32"]),
    "other sin": (dict(cos=zeros(2, 16), sin=zeros(2, 8)), ["[2, 16]", "[2, 8]"]),
    "half states": (dict(states=zeros(5, 4, 16, 32).half()), ["torch.float16"]),
    "slot past states": (dict(slots=torch.tensor([0, 5])), ["slot 5"]),
    "a gradient": (dict(mixed=zeros(2, 288, requires_grad=True)), ["requires grad"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "operator, call, words",
    [(lightning_step, step_arguments(**call), words) for call, words in WRONG_STEPS.values()]
    + [(lightning_decode, decode_arguments(**call), words) for call, words in WRONG_DECODES.values()],
    ids=[*WRONG_STEPS, *(f"decode: {name}" for name in WRONG_DECODES)],
)
def test_wrong_call(operator, call, words):
    with pytest.raises(ValueError) as raised:
        operator(**call)
    text = str(raised.value)
    assert not [word for word in words if word not in text], text
    assert "\n" not in text and len(text) < 300


def test_good_calls():
    """What the wrong calls differ from is right."""
    assert lightning_step(**step_arguments()).shape == (2, 3, 4, 32)
    lightning_step(**step_arguments(intermediate=zeros(5, 4, 4, 16, 32)))
    angles, out = dict(cos=zeros(2, 16), sin=zeros(2, 16)), (torch.ones(128), 1e-6)
    call = decode_arguments(q_norm=NORM, k_norm=NORM, out_norm=out, gate="linear", **angles)
    assert lightning_decode(**call).shape == (2, 128)


# ---- GPU -------------------------------------------------------------------------------------------------------------

BF16 = Impl("triton", torch.bfloat16, "cuda")
BACKENDS = [BF16, Impl("torch", torch.bfloat16, "cuda")]
HEAD_DIMS = (32, 64, 96, 128, 192, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 4])
@pytest.mark.parametrize("K", HEAD_DIMS)
@pytest.mark.parametrize("V", HEAD_DIMS)
def test_step_of_head_dims(rng, K, V, S):
    check_step(BF16, step_case(rng, BF16, (2, 1, K, V), R=3, S=S, N=5))


@pytest.mark.gpu
@pytest.mark.parametrize("norms", [(), tuple(EPS)], ids="-".join)
@pytest.mark.parametrize("K", HEAD_DIMS)
@pytest.mark.parametrize("V", HEAD_DIMS)
def test_decode_of_head_dims(rng, K, V, norms):
    case, about = decode_case(rng, BF16, (2, 1, K, V), gated=True, norms=norms, out_weight=True, turned=K // 2)
    check_decode(BF16, case, about, gate="sigmoid")


@pytest.mark.gpu
def test_slot_past_states_is_nan_and_touches_nothing(rng):
    case = step_case(rng, BF16, (2, 1, 64, 64), R=3, S=2, N=5)
    case["slots"] = torch.tensor([1, 4, 0], device="cuda")
    states = case["states"].clone()
    o = lightning_step(**case | {"states": states[:3]})
    assert o[1].isnan().all() and o[[0, 2]].isfinite().all() and torch.equal(states[2:], case["states"][2:])


def graph(call):
    """``call`` in a CUDA graph, after a warm-up on a stream beside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        result = call()
    return captured, result


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
@pytest.mark.parametrize("impl", BACKENDS, ids=str)
def test_decode_in_a_cuda_graph(rng, impl):
    options = dict(gated=True, norms=tuple(EPS), out_weight=True, turned=32)
    case, about = decode_case(rng, impl, (4, 2, 64, 64), **options)
    cos, sin = (torch.zeros(4, 32, device="cuda") for _ in range(2))
    replay, y = graph(lambda: lightning_decode(**case, cos=cos, sin=sin, gate="sigmoid"))
    for _ in range(3):
        fresh, about = decode_case(rng, impl, (4, 2, 64, 64), **options)
        want = check_decode(impl, fresh, about, gate="sigmoid")
        for name, x in fresh.items():
            if isinstance(x, torch.Tensor):
                case[name].copy_(x)
            elif name in EPS:
                case[name][0].copy_(x[0])
        cos.copy_(torch.cat((about["angles"],) * 2, 1).cos())
        sin.copy_(torch.cat((about["angles"],) * 2, 1).sin())
        replay.replay()
        assert_same_bits({"y": y, "states": case["states"]}, want)


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
