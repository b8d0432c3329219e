"""Decoding: random requests, and plain loops in fp64 that judge lightning_step and lightning_decode."""

import itertools

import torch

from lightning_megatron.ops import lightning_decode, lightning_step

from ..tolerances import DECODING, SMALLEST, error
from .cases import SOME_DECAYS, Impl, pick, randn

FEATURE_MAPS, GATES = ("silu", "silu-qkv", "none"), ("sigmoid", "linear", "none")
# heads, heads of k and v, K, V
SIZES = [(2, 2, 16, 16), (4, 2, 48, 32), (3, 1, 32, 80), (2, 1, 96, 16)]
EPS = {"q_norm": 0.02, "k_norm": 0.03, "out_norm": 0.05}
BF16 = Impl("triton", torch.bfloat16, "cuda")
BACKENDS = [BF16, Impl("torch", torch.bfloat16, "cuda")]
HEAD_DIMS = (32, 64, 96, 128, 192, 256)


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


def layer(
    mixed, log_decay, states, slots, *, sizes, gated, feature_map, scale, weights, angles, turn_scale, interleaved, gate
):  # fmt: skip
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
            cos, sin = (turn_scale * f(angles[r, a]) for f in (torch.cos, torch.sin))
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


# ---- cases -----------------------------------------------------------------------------------------------------------


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
    angles, case["positions"] = None, None
    if turned:  # up to those of a million positions
        size = 10 ** (6 * torch.rand(2 * R, 1, generator=rng, dtype=torch.float64))
        angles = (size * randn(rng, 2 * R, turned // 2)).to(dtype=impl.wide, device=impl.device)
        case["positions"] = torch.randint(2 * R, (R,), generator=rng).to(impl.device)
    case = {name: case[name] for name in ("log_decay", "states", "slots", "positions")} | dict(
        mixed=randn(rng, R, Hkv * sum(group_dims)).to(**low), group_dims=group_dims, backend=impl.backend,
        **{name: (weight, EPS[name]) for name, weight in weights.items()},
    )  # fmt: skip
    return case, dict(weights=weights, angles=angles, gated=gated, sizes=sizes)


def check_decode(
    impl, case, about, *, feature_map="silu", gate="none", interleaved=False, scale=None, turn_scale=1.0
) -> dict:
    angles = about["angles"]
    if angles is not None:
        angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat((angles, angles), 1)
        case = case | dict(angles=angles, interleaved=interleaved, turn_scale=turn_scale)
        angles = angles[case["positions"]]
    options = dict(feature_map=feature_map, gate=gate, scale=scale)
    states = case["states"].clone()
    y = lightning_decode(**case | options | {"states": states})
    weights = {name: None if x is None else wide(x)[0] for name, x in about["weights"].items()}
    judged = dict(weights=weights, angles=None if angles is None else wide(angles)[0], interleaved=interleaved)
    judged["turn_scale"] = turn_scale
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
