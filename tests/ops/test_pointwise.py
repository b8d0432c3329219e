"""split_heads and norm_gate: values and gradients against formulas in fp64, strides, and the kernels launched."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_megatron.ops import norm_gate, norm_residual, split_heads, swiglu
from lightning_megatron.ops.triton import pointwise as pointwise_kernels

from ..tolerances import POINTWISE, SMALLEST, error
from .cases import assert_same_bits, pick, randn
from .launches import POINTWISE as KERNELS
from .launches import record_pointwise

FEATURE_MAPS = ("silu", "silu-qkv", "none")
KINDS = ("sigmoid", "linear", "none")
NORMS = ("head", "group", "all", "none")
# heads, heads of k and v, K, V
SIZES = [(2, 2, 16, 16), (4, 2, 48, 16), (3, 1, 16, 80), (4, 4, 32, 112), (6, 2, 64, 32)]
TOKENS = [(1, 1), (1, 3), (5, 1), (3, 2), (7, 3), (33, 1)]
EPS = 0.01


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs, and for the weight's gradient several tiles each, for few tokens."""
    monkeypatch.setattr(pointwise_kernels, "TILE", 256)
    monkeypatch.setattr(pointwise_kernels, "PROGRAMS", 2)


# ---- the judge -------------------------------------------------------------------------------------------------------


def dims_of(sizes: tuple[int, ...], gated: bool) -> tuple[int, ...]:
    H, Hkv, K, V = sizes
    return H // Hkv * K, gated * H // Hkv * V, K, V


def split_formula(mixed, sizes, gated, feature_map) -> dict[str, torch.Tensor]:
    """Column by column of the fused projection."""
    H, Hkv, K, V = sizes
    found, at = {"q": [], "gate": [], "k": [], "v": []}, 0
    for _ in range(Hkv):
        for name, count, dim in (("q", H // Hkv, K), ("gate", gated * H // Hkv, V), ("k", 1, K), ("v", 1, V)):
            for _ in range(count):
                x, at = mixed[..., at : at + dim], at + dim
                active = name in {"silu": "qk", "silu-qkv": "qkv", "none": ""}[feature_map]
                found[name].append(x / (1 + torch.exp(-x)) if active else x)
    assert at == mixed.shape[-1]
    parts = {name: torch.stack(x, 2) for name, x in found.items() if x}
    return parts | ({"gate": parts["gate"].unflatten(2, (Hkv, -1)).flatten(3)} if gated else {})


def norm_formula(o, gate, weight, kind, width) -> torch.Tensor:
    y, columns = [], o.shape[2] * o.shape[3]
    for c in range(0, columns, width or columns):
        x = o.flatten(2)[..., c : c + (width or columns)]
        y.append(x if width is None else x / torch.sqrt((x**2).sum(-1, keepdim=True) / width + EPS))
    y = torch.cat(y, -1)
    y = y if weight is None else y * weight
    return {"sigmoid": lambda g: y / (1 + torch.exp(-g)), "linear": lambda g: y * g, "none": lambda g: y}[kind](
        None if gate is None else gate.flatten(2)
    )


def with_gradients(function, leaves: dict, given: dict, uses=None) -> dict[str, torch.Tensor]:
    """Outputs of ``function(**leaves)``, and the gradients of <output, given> of those in ``uses``."""
    leaves = {name: x if x is None else x.detach().requires_grad_() for name, x in leaves.items()}
    outputs = function(**leaves)
    uses = list(uses or given)
    wanted = {name: x for name, x in leaves.items() if x is not None}
    grads = torch.autograd.grad([outputs[name] for name in uses], list(wanted.values()), [given[n] for n in uses])
    return outputs | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def assert_close(got: dict, want: dict, dtype: torch.dtype, parts: dict | None = None) -> None:
    """Relative RMS of every 16 columns: neither q, k, v and gate nor heads are mixed.

    ``parts``: of a result, a part that is rounded by itself before the rest is added, and may be larger than the sum.
    """
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.dtype == dtype and x.shape == want[name].shape, name
    blocks = lambda x: x.reshape(1, -1, x.shape[-1] // 16, 16)
    pairs = {name: [blocks(x), blocks(want[name])] for name, x in got.items()}
    errors = {name: error("o", *pair, SMALLEST[dtype]) for name, pair in pairs.items() if name not in (parts or {})}
    for name, part in (parts or {}).items():
        x, y = (values.double().cpu() for values in pairs[name])
        rms = lambda values: values.square().mean((1, 3)).sqrt()
        errors[name] = float((rms(x - y) / (rms(y) + rms(blocks(part)))).max().nan_to_num(nan=float("inf")))
    print(errors)
    assert max(errors.values()) <= POINTWISE[dtype], errors


# ---- split_heads -----------------------------------------------------------------------------------------------------


def named(outputs) -> dict[str, torch.Tensor]:
    return {name: x for name, x in zip(("q", "gate", "k", "v"), outputs, strict=True) if x is not None}


def split_case(rng, impl, sizes, gated, tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """mixed, and gradients of its parts."""
    H, Hkv, K, V = sizes
    print(f"{impl} {sizes=} {gated=} {tokens=}")
    low = dict(dtype=impl.dtype, device=impl.device)
    shapes = {"q": (H, K), "gate": (Hkv, H // Hkv * V), "k": (Hkv, K), "v": (Hkv, V)}
    shapes = {name: shape for name, shape in shapes.items() if gated or name != "gate"}
    given = {name: randn(rng, *tokens, *shape).to(**low) for name, shape in shapes.items()}
    return (2 * randn(rng, *tokens, Hkv * sum(dims_of(sizes, gated)))).to(**low), given


def split_with_gradients(impl, mixed, sizes, gated, feature_map, given, uses=None):
    def function(mixed):
        return named(split_heads(mixed, dims_of(sizes, gated), feature_map=feature_map, backend=impl.backend))

    return with_gradients(function, {"mixed": mixed}, given, uses)


def split_judge(mixed, sizes, gated, feature_map, given, uses=None):
    given = {name: x.double().cpu() for name, x in given.items()}
    leaves = {"mixed": mixed.double().cpu()}
    return with_gradients(lambda mixed: split_formula(mixed, sizes, gated, feature_map), leaves, given, uses)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("sizes", SIZES)
def test_split_heads(every_impl, rng, small_tiles, sizes, feature_map, gated):
    mixed, given = split_case(rng, every_impl, sizes, gated, pick(rng, TOKENS))
    got = split_with_gradients(every_impl, mixed, sizes, gated, feature_map, given)
    assert_close(got, split_judge(mixed, sizes, gated, feature_map, given), every_impl.dtype)


@pytest.mark.parametrize("uses", ["q", "k", "v", "gate", "kv"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_parts_that_nobody_uses(impl, rng, feature_map, uses):
    """Their columns of the gradient are zero."""
    uses, sizes = [uses] if uses == "gate" else list(uses), pick(rng, SIZES)
    mixed, given = split_case(rng, impl, sizes, True, (3, 2))
    got = split_with_gradients(impl, mixed, sizes, True, feature_map, given, uses)
    assert_close(got, split_judge(mixed, sizes, True, feature_map, given, uses), impl.dtype)
    assert (got["dmixed"] == 0).any()


def strided(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values: a part of wider rows, batch before sequence, and last dimension not contiguous."""
    wider = torch.cat((x, x), -1)[..., : x.shape[-1]]
    return [wider, x.transpose(0, 1).contiguous().transpose(0, 1), x.transpose(1, -1).contiguous().transpose(1, -1)]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_strides_of_projection(triton_impl, rng, small_tiles, feature_map):
    sizes = (2, 1, 48, 16)
    mixed, given = split_case(rng, triton_impl, sizes, True, (3, 2))
    want = split_with_gradients(triton_impl, mixed, sizes, True, feature_map, given)
    for other in strided(mixed):
        assert_same_bits(split_with_gradients(triton_impl, other, sizes, True, feature_map, given), want)
    for others in zip(*(strided(x) for x in given.values()), strict=True):
        others = dict(zip(given, others, strict=True))
        assert_same_bits(split_with_gradients(triton_impl, mixed, sizes, True, feature_map, others), want)
    ones = {name: torch.ones_like(x) for name, x in given.items()}
    alike = {name: x[:1, :1, :1, :1].expand_as(x) for name, x in ones.items()}  # of a sum
    assert_same_bits(*(split_with_gradients(triton_impl, mixed, sizes, True, feature_map, x) for x in (ones, alike)))


@pytest.mark.parametrize("feature_map, copied", [("silu", "qk"), ("silu-qkv", "qkv"), ("none", "")])
def test_what_is_not_activated_is_not_copied(impl, rng, feature_map, copied):
    mixed, _ = split_case(rng, impl, (2, 2, 32, 16), True, (3, 2))
    for x in (mixed, mixed.clone().requires_grad_()):
        parts = named(split_heads(x, dims_of((2, 2, 32, 16), True), feature_map=feature_map, backend=impl.backend))
        memory = x.untyped_storage().data_ptr()
        for name, part in parts.items():
            assert (part.untyped_storage().data_ptr() == memory) == (name not in copied), name
            assert part.is_contiguous() or name not in copied or impl.backend == "torch"


# ---- norm_gate -------------------------------------------------------------------------------------------------------


def norm_case(rng, impl, sizes, kind, norm, affine, tokens):
    """Leaves, options and the gradient of y."""
    H, G, _, V = sizes
    heads = pick(rng, [n for n in range(1, H + 1) if H % n == 0])
    width = {"head": V, "group": heads * V, "all": H * V, "none": None}[norm]
    print(f"{impl} {sizes=} {kind=} {width=} {affine=} {tokens=}")
    low = dict(dtype=impl.dtype, device=impl.device)
    leaves = dict(
        o=randn(rng, *tokens, H, V).to(**low),
        gate=None if kind == "none" else (2 * randn(rng, *tokens, G, H // G * V)).to(**low),
        weight=(1 + randn(rng, H * V)).to(**low) if affine else None,
    )
    return leaves, dict(kind=kind, width=width), {"y": randn(rng, *tokens, H * V).to(**low)}


def norm_with_gradients(impl, leaves, options, given):
    def function(**leaves):
        return {"y": norm_gate(**leaves, **options, eps=EPS, backend=impl.backend)}

    return with_gradients(function, leaves, given)


def norm_judge(leaves, options, given):
    leaves, given = (
        {name: None if x is None else x.double().cpu() for name, x in xs.items()} for xs in (leaves, given)
    )
    return with_gradients(lambda **leaves: {"y": norm_formula(**leaves, **options)}, leaves, given)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_gate(every_impl, rng, small_tiles, kind, norm, affine):
    interpreted = every_impl.backend == "triton" and every_impl.device == "cpu"  # which is slow
    for _ in range(1 if interpreted else 3):
        case = norm_case(rng, every_impl, pick(rng, SIZES), kind, norm, affine, pick(rng, TOKENS))
        assert_close(norm_with_gradients(every_impl, *case), norm_judge(*case), every_impl.dtype)


@pytest.mark.parametrize(
    "tokens, sizes", [((2, 20), (1, 1, 16, 256)), ((5, 1), (24, 1, 16, 256)), ((150, 2), (2, 1, 16, 16))]
)
def test_tiles_in_use(impl, rng, tokens, sizes):
    """Without smaller tiles: several rows each, one row each, several programs."""
    case = norm_case(rng, impl, sizes, "sigmoid", "all", True, tokens)
    assert_close(norm_with_gradients(impl, *case), norm_judge(*case), impl.dtype)


def test_strides_of_output(triton_impl, rng, small_tiles):
    leaves, options, given = norm_case(rng, triton_impl, (2, 1, 16, 48), "sigmoid", "all", True, (3, 2))
    want = norm_with_gradients(triton_impl, leaves, options, given)
    for o, gate, y in zip(*(strided(x) for x in (leaves["o"], leaves["gate"], given["y"])), strict=True):
        assert_same_bits(norm_with_gradients(triton_impl, leaves | {"o": o}, options, given), want)
        assert_same_bits(norm_with_gradients(triton_impl, leaves | {"gate": gate}, options, given), want)
        assert_same_bits(norm_with_gradients(triton_impl, leaves, options, {"y": y}), want)
    ones = torch.ones_like(given["y"])
    ones = {"y": ones}, {"y": ones[:1, :1, :1].expand_as(ones)}
    assert_same_bits(*(norm_with_gradients(triton_impl, leaves, options, y) for y in ones))


@pytest.mark.parametrize("wanted", ["o", "gate", "weight"])
def test_some_gradients(impl, rng, wanted):
    leaves, options, given = norm_case(rng, impl, (4, 2, 16, 16), "sigmoid", "head", True, (5, 1))
    want = norm_with_gradients(impl, leaves, options, given)
    leaves = {name: x.clone().requires_grad_(name == wanted) for name, x in leaves.items()}
    norm_gate(**leaves, **options, eps=EPS, backend=impl.backend).backward(given["y"])
    for name, x in leaves.items():
        assert torch.equal(x.grad, want[f"d{name}"]) if name == wanted else x.grad is None


def test_sums_are_repeatable(impl, rng):
    """Bit for bit, run after run: no atomic additions."""
    case = norm_case(rng, impl, (4, 2, 16, 32), "sigmoid", "all", True, (300, 2))
    first = norm_with_gradients(impl, *case)
    for _ in range(20 if impl.device == "cuda" else 1):
        assert_same_bits(norm_with_gradients(impl, *case), first)


# ---- norm_residual ---------------------------------------------------------------------------------------------------


def residual_case(rng, impl, columns, affine, tokens):
    print(f"{impl} {columns=} {affine=} {tokens=}")
    low = dict(dtype=impl.dtype, device=impl.device)
    leaves = dict(x=randn(rng, *tokens, columns).to(**low), weight=(1 + randn(rng, columns)).to(**low))
    leaves["weight"] = leaves["weight"] if affine else None
    return leaves, {name: randn(rng, *tokens, columns).to(**low) for name in ("y", "residual")}


def residual_with_gradients(impl, leaves, given, uses=None):
    def function(**leaves):
        return dict(zip(("y", "residual"), norm_residual(**leaves, eps=EPS, backend=impl.backend), strict=True))

    return with_gradients(function, leaves, given, uses)


def residual_judge(leaves, given, uses=None):
    leaves, given = (
        {name: None if x is None else x.double().cpu() for name, x in xs.items()} for xs in (leaves, given)
    )

    def function(x, weight):
        return {"y": norm_formula(x.unsqueeze(2), None, weight, "none", x.shape[-1]), "residual": x * 1}

    return with_gradients(function, leaves, given, uses)


@pytest.mark.parametrize("affine", [True, False])
def test_norm_residual(every_impl, rng, small_tiles, affine):
    for columns in (16, 80, 272):
        leaves, given = residual_case(rng, every_impl, columns, affine, pick(rng, TOKENS))
        got = residual_with_gradients(every_impl, leaves, given)
        assert got["residual"].data_ptr() == leaves["x"].data_ptr()
        want, parts = residual_judge(leaves, given), {}
        if every_impl.backend == "torch":  # whose autograd adds the rounded gradients of both outputs
            parts = {"dx": want["dx"] - given["residual"].double().cpu()}
        assert_close(got, want, every_impl.dtype, parts)


def test_norm_residual_is_the_norm(impl, rng):
    """Its bits, and with a gradient of one output alone that of it."""
    leaves, given = residual_case(rng, impl, 80, True, (7, 3))
    want = norm_with_gradients(
        impl, {"o": leaves["x"].unsqueeze(2), "gate": None, "weight": leaves["weight"]},
        dict(kind="none", width=80), {"y": given["y"]},
    )  # fmt: skip
    got = residual_with_gradients(impl, leaves, given, ["y"])
    assert torch.equal(got["y"], want["y"]) and torch.equal(got["dweight"], want["dweight"])
    assert torch.equal(got["dx"], want["do"].squeeze(2))
    x = leaves["x"].clone().requires_grad_()
    (dx,) = torch.autograd.grad(norm_residual(x, eps=EPS, backend=impl.backend)[1], x, given["residual"])
    assert torch.equal(dx, given["residual"])


# ---- both ------------------------------------------------------------------------------------------------------------


def around(impl, mixed, weight, sizes=(4, 2, 32, 16), feature_map="silu"):
    """A layer without its operator: what goes into it, and the gated norm of v."""
    q, gate, k, v = split_heads(mixed, dims_of(sizes, True), feature_map=feature_map, backend=impl.backend)
    o = v.repeat_interleave(sizes[0] // sizes[1], 2)
    return q, k, norm_gate(o, gate, weight, kind="sigmoid", width=sizes[3], eps=EPS, backend=impl.backend)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_without_gradients(impl, rng, context, feature_map):
    """One token, as in decoding."""
    mixed, _ = split_case(rng, impl, (4, 2, 32, 16), True, (1, 3))
    weight = randn(rng, 64).to(mixed)
    want = around(impl, mixed.clone().requires_grad_(), weight, feature_map=feature_map)
    with context():  # the input too is made inside
        got = around(impl, mixed.clone(), weight, feature_map=feature_map)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and b.requires_grad and not a.requires_grad


@pytest.mark.parametrize("tokens", [(0, 2), (3, 0)])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_no_tokens(impl, rng, feature_map, tokens):
    mixed, _ = split_case(rng, impl, (4, 2, 32, 16), True, tokens)
    leaves = mixed.requires_grad_(), randn(rng, 64).to(mixed.detach()).requires_grad_()
    outputs = around(impl, *leaves, feature_map=feature_map)
    assert [list(x.shape) for x in outputs] == [[*tokens, 4, 32], [*tokens, 2, 32], [*tokens, 64]]
    sum(x.sum() for x in outputs).backward()
    assert leaves[0].grad.shape == mixed.shape and torch.equal(leaves[1].grad, torch.zeros_like(leaves[1]))


def test_chained(impl, rng):
    """The gate is a view of the projection, and its gradient ends there."""
    mixed, _ = split_case(rng, impl, (4, 2, 32, 16), True, (5, 2))
    leaves = {"mixed": mixed, "weight": randn(rng, 64).to(mixed)}
    given = [randn(rng, 5, 2, *shape).to(mixed) for shape in ((4, 32), (2, 32), (64,))]
    given = dict(zip(("q", "k", "y"), given, strict=True))

    def formula(mixed, weight):
        parts = split_formula(mixed, (4, 2, 32, 16), True, "silu")
        o = parts["v"][:, :, [0, 0, 1, 1]]
        return {"q": parts["q"], "k": parts["k"], "y": norm_formula(o, parts["gate"], weight, "sigmoid", 16)}

    def function(**leaves):
        return dict(zip(("q", "k", "y"), around(impl, **leaves), strict=True))

    judged = [{name: x.double().cpu() for name, x in xs.items()} for xs in (leaves, given)]
    got, want = with_gradients(function, leaves, given), with_gradients(formula, *judged)
    want = {name: x.detach() for name, x in want.items()}
    worst = {name: float((got[name].detach().double().cpu() - x).norm() / x.norm()) for name, x in want.items()}
    assert max(worst.values()) < 2 * POINTWISE[impl.dtype], worst


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("kind", ["sigmoid", "linear"])
def test_gradcheck(rng, feature_map, kind):
    """The torch formulas, by finite differences."""
    mixed = randn(rng, 2, 1, 2 * sum(dims_of((4, 2, 3, 2), True))).requires_grad_()
    weight = randn(rng, 8).requires_grad_()

    def function(mixed, weight):
        q, gate, k, v = split_heads(mixed, dims_of((4, 2, 3, 2), True), feature_map=feature_map)
        return q, k, norm_gate(q[..., :2] + k.sum(), gate, weight, kind=kind, width=4, eps=EPS), v

    assert torch.autograd.gradcheck(function, (mixed, weight))


def test_second_derivatives_are_refused(triton_impl, rng):
    mixed, _ = split_case(rng, triton_impl, (4, 2, 32, 16), True, (2, 1))
    weight = randn(rng, 64).to(mixed).requires_grad_()
    for leaf, y in ((mixed.requires_grad_(), 0), (weight, 2)):
        (grad,) = torch.autograd.grad(around(triton_impl, mixed, weight)[y].square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_fp64_is_refused_by_triton(triton_impl):
    with pytest.raises(ValueError, match="float64.*backend='torch'"):
        mixed = torch.zeros(1, 1, 64, dtype=torch.float64, device=triton_impl.device)
        split_heads(mixed, (16, 16, 16, 16), backend="triton")


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(rng):
    """The last tokens of a tensor that int32 cannot count get the bits they get alone."""
    sizes, tail = (8, 4, 64, 128), 5
    columns = sizes[1] * sum(dims_of(sizes, True))
    rows = 2**31 // columns + 100
    low = dict(dtype=torch.bfloat16, device="cuda")
    mixed, weight = torch.zeros(rows, 1, columns, **low), randn(rng, 1024).to(**low)
    mixed[-tail:] = randn(rng, tail, 1, columns).to(**low)
    results = []
    for x in (mixed, mixed[-tail:].clone()):
        q, gate, k, v = split_heads(x.requires_grad_(), dims_of(sizes, True))
        y = norm_gate(v.repeat_interleave(2, 2), gate, weight, kind="sigmoid", width=128, eps=EPS)
        (q[-tail:].sum() + k[-tail:].sum() + y[-tail:].sum()).backward()
        results.append([t[-tail:].detach().clone() for t in (q, k, y, x.grad)])
        del q, gate, k, v, y
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- launches --------------------------------------------------------------------------------------------------------


class _Executed(TorchDispatchMode):
    """Names of torch's operations that compute, not only allocate or take a view."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if not function.is_view and not any(word in name for word in ("empty", "fill_", "_unsafe_view")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("silu_v", [False, True])
@pytest.mark.parametrize("width", [128, 4096, None])
def test_number_of_launches(kind, silu_v, width):
    """One forward and one backward each, and a sum for the weight's gradient."""
    with _Executed() as executed:
        launches = record_pointwise(
            dtype=torch.bfloat16, s=2048, b=2, Hkv=8, K=64, V=128, kind=kind, width=width, silu=(True, silu_v)
        )
    assert sorted(launch.what for launch in launches) == sorted(KERNELS)
    assert executed.names == ["aten::sum.dim_IntList", "aten::_to_copy"]


def test_nothing_to_do(impl):
    """Neither norm nor gate: no launch, no copy."""
    o = torch.zeros(3, 2, 4, 16, device=impl.device, dtype=impl.dtype)
    assert norm_gate(o, backend=impl.backend).data_ptr() == o.data_ptr()
    assert norm_gate(o, o, kind="none", backend=impl.backend).data_ptr() == o.data_ptr()


def test_no_recompiles():
    """Constants of the compiled kernels depend on dtype, head dims and features; never on s and b."""

    def constants(s, b):
        launches = record_pointwise(dtype=torch.bfloat16, s=s, b=b, K=64, V=64, width=64)
        kinds = [getattr(pointwise_kernels, launch.kernel).fn.__annotations__ for launch in launches]
        names = [[name for name, kind in kind.items() if "constexpr" in str(kind)] for kind in kinds]
        assert all(names)
        return [{n: x.arguments[n] for n in ns} | x.options for x, ns in zip(launches, names, strict=True)]

    assert constants(1, 1) == constants(300, 7) == constants(70001, 2)


@pytest.mark.parametrize("s, b, H", [(1, 2048, 64), (2048, 1024, 128), (2**20, 1, 64)])
def test_grids_are_within_cuda_limits(s, b, H):
    for width in (256, 256 * H):
        for launch in record_pointwise(dtype=torch.bfloat16, s=s, b=b, H=H, K=256, V=256, width=width):
            assert len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31, launch


@pytest.mark.parametrize("width", [64, 768, 8192, 16384])
def test_sums_of_the_weight_are_short(width):
    """Its partial sums in fp32 are a small part of what is read and written, and programs enough to fill a GPU.

    Up to a tenth: sums twice as long, in half as many programs, were 4% slower on an H100.
    """
    for launch in record_pointwise(dtype=torch.bfloat16, s=8192, H=16384 // 64, K=64, V=64, width=width):
        if launch.what == "norm_gate_grad_kernel":
            programs = launch.arguments["dweight"].shape[0]
            assert programs * 2 * 4 <= 0.1 * 8192 * 5 * 2 and launch.grid[0] >= 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_swiglu_has_the_same_gradient(dtype):
    x = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    (want,) = torch.autograd.grad(swiglu(x, backend="torch").square().sum(), x)
    compiled = torch.compile(lambda x: swiglu(x, backend="torch"), backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert want.abs().sum() > 0
    torch.testing.assert_close(got, want)
