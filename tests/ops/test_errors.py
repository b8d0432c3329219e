"""All a user can get wrong: the message names the value received and the remedy. And the choice of the backend."""

import ast
import importlib.util
import traceback
from pathlib import Path

import pytest
import torch

from lightning_megatron.ops import backend as backends
from lightning_megatron.ops import checks, lightning_attn, packed_part, torch_backend
from lightning_megatron.ops.triton import attention as triton_backend

HALF, DOUBLE = torch.float16, torch.float64


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def arguments(**changes) -> dict:
    """A good call, B = 2, T = 8, H = 4, Hkv = 2, K = 16, V = 32, with changes."""
    good = dict(q=zeros(2, 8, 4, 16), k=zeros(2, 8, 2, 16), v=zeros(2, 8, 2, 32), log_decay=torch.full((4,), -0.1))
    return good | changes


def packed(bounds, **options) -> dict:
    bounds = torch.tensor(bounds, **options) if isinstance(bounds, list) else bounds
    return arguments(q=zeros(1, 8, 4, 16), k=zeros(1, 8, 2, 16), v=zeros(1, 8, 2, 32), cu_seqlens=bounds)


def part(start=2, total=24, bounds=(0, 5, 17, 24), **changes) -> dict:
    """A good call of packed_part: tokens 2 to 10 of three documents."""
    state = dict(initial_state=None if start == 0 else zeros(1, 4, 16, 32))
    return packed(torch.tensor(bounds)) | state | dict(start=start, total=total) | changes


def heads(H: int, Hkv: int) -> dict:
    return arguments(q=zeros(2, 8, H, 16), k=zeros(2, 8, Hkv, 16), v=zeros(2, 8, Hkv, 32))


def decay(*values) -> dict:
    return arguments(log_decay=torch.tensor(values))


WRONG = {  # call -> what its message says: value received, then remedy
    "q without heads": (arguments(q=zeros(2, 8, 64)), ["[2, 8, 64]", "q must", "[B,T,H,K]"]),
    "k with 5 dimensions": (arguments(k=zeros(1, 2, 8, 2, 16)), ["[1, 2, 8, 2, 16]", "k must", "[B,T,Hkv,K]"]),
    "v without heads": (arguments(v=zeros(2, 8, 32)), ["[2, 8, 32]", "v must", "[B,T,Hkv,V]"]),
    "k of another dtype": (arguments(k=zeros(2, 8, 2, 16, dtype=HALF)), ["k is torch.float16", "must share dtype"]),
    "v elsewhere": (arguments(v=zeros(2, 8, 2, 32, device="meta")), ["torch.float32 on meta", "torch.float32 on cpu"]),
    "integers": (
        arguments(**{n: zeros(2, 8, 4, 16, dtype=torch.int32) for n in "qkv"}),
        ["torch.int32", "bfloat16, float16 and float32"],
    ),
    "k of another length": (arguments(k=zeros(2, 9, 2, 16)), ["[2, 9, 2, 16]", "k must be [2,8,Hkv,16]"]),
    "k of another head dim": (arguments(k=zeros(2, 8, 2, 32)), ["k is [2, 8, 2, 32]", "k must be [2,8,Hkv,16]"]),
    "v of another batch": (arguments(v=zeros(1, 8, 2, 32)), ["v is [1, 8, 2, 32]", "v [2,8,Hkv,V]"]),
    "v of other heads": (arguments(v=zeros(2, 8, 4, 32)), ["v is [2, 8, 4, 32]", "k is [2, 8, 2, 16]"]),
    "4 heads, 3 kv heads": (heads(4, 3), ["4 query heads", "3 key/value heads", "must divide"]),
    "2 heads, 4 kv heads": (heads(2, 4), ["2 query heads", "4 key/value heads", "must divide"]),
    "no kv heads": (heads(4, 0), ["0 key/value heads"]),
    "no heads": (heads(0, 2), ["0 query heads"]),
    "K = 8": (arguments(q=zeros(2, 8, 4, 8), k=zeros(2, 8, 2, 8)), ["K=8", "multiple of 16 from 16", "pad q and k"]),
    "K = 0": (arguments(q=zeros(2, 8, 4, 0), k=zeros(2, 8, 2, 0)), ["K=0", "multiple of 16"]),
    "V = 24": (arguments(v=zeros(2, 8, 2, 24)), ["V=24", "multiple of 16", "with zeros"]),
    "V = 272": (arguments(v=zeros(2, 8, 2, 272)), ["V=272", "256"]),
    "log_decay of kv heads": (arguments(log_decay=zeros(2)), ["[2]", "must be [4]", "one entry per query head"]),
    "half log_decay": (arguments(log_decay=zeros(4, dtype=HALF)), ["torch.float16", "[4]", "torch.float32 on cpu"]),
    "log_decay elsewhere": (arguments(log_decay=zeros(4, device="meta")), ["on meta", "on cpu"]),
    "fp32 log_decay for fp64": (
        arguments(**{n: x.double() for n, x in arguments().items() if n != "log_decay"}),
        ["must be [4]", "torch.float64 on cpu", "[4], torch.float32"],
    ),
    "learned log_decay": (arguments(log_decay=zeros(4, requires_grad=True)), ["requires grad", "log_decay.detach()"]),
    "infinite scale": (arguments(scale=float("inf")), ["scale=inf", "finite", "K ** -0.5 = 0.25"]),
    "NaN scale": (arguments(scale=float("nan")), ["scale=nan", "None"]),
    "scale in words": (arguments(scale="1"), ["scale='1'", "None"]),
    "scale above fp32": (arguments(scale=1e39), ["scale=1e+39", "finite number in fp32"]),
    "scale above floats": (arguments(scale=10**400), ["scale=10", "finite number in fp32"]),
    "q as a list": (arguments(q=[[1.0]]), ["q must be a torch.Tensor", "is a list", "make it one"]),
    "no k": (arguments(k=None), ["k must be a torch.Tensor", "is a NoneType"]),
    "one decay for all": (arguments(log_decay=-0.1), ["log_decay must be a torch.Tensor", "is a float"]),
    "states in a tuple": (arguments(initial_state=()), ["initial_state must be a torch.Tensor", "is a tuple"]),
    "cu_seqlens as a tuple": (packed((0, 8)), ["cu_seqlens must be a torch.Tensor", "is a tuple"]),
    "scale as a tensor": (arguments(scale=torch.ones(())), ["scale=tensor(1.)", "None"]),
    "cu_seqlens and a batch": (arguments(cu_seqlens=torch.tensor([0, 8])), ["B = 2", "[1, B*T, ...]"]),
    "2-D cu_seqlens": (packed([[0, 8]]), ["[1, 2]", "[N+1]"]),
    "one bound": (packed([0]), ["[1] torch.int64", "N >= 1"]),
    "float cu_seqlens": (packed([0.0, 8.0]), ["torch.float32", "int32 or int64"]),
    "cu_seqlens elsewhere": (packed(zeros(2, dtype=torch.int32, device="meta")), ["on meta", "cpu", "move it"]),
    "cu_seqlens from 1": (packed([1, 8]), ["from 1 to 8", "start at 0"]),
    "cu_seqlens to 7": (packed([0, 5, 7]), ["to 7", "end at T = 8"]),
    "cu_seqlens past T": (packed([0, 9], dtype=torch.int32), ["to 9", "end at T = 8"]),
    "cu_seqlens fall": (packed([0, 5, 3, 8]), ["cu_seqlens[1] = 5", "followed by 3", "never fall"]),
    "state of one sequence": (
        arguments(initial_state=zeros(1, 4, 16, 32)), ["[1, 4, 16, 32]", "[2,4,16,32]", "batch size"],
    ),
    "state transposed": (arguments(initial_state=zeros(2, 4, 32, 16)), ["[2, 4, 32, 16]", "[N,H,K,V] = [2,4,16,32]"]),
    "state of kv heads": (arguments(initial_state=zeros(2, 2, 16, 32)), ["[2, 2, 16, 32]", "[2,4,16,32]"]),
    "state of rows, not documents": (
        packed([0, 3, 8]) | dict(initial_state=zeros(1, 4, 16, 32)), ["[2,4,16,32]", "documents in cu_seqlens"],
    ),
    "half state": (
        arguments(initial_state=zeros(2, 4, 16, 32, dtype=HALF)),
        ["torch.float16", "be torch.float32", "low precision"],
    ),
    "a slope": (decay(-0.1, 0.0, 0.5, -0.1), ["log_decay[2] = 0.5", "<= 0", "-log_decay"]),
    "a decay": (decay(0.9, 0.9, 0.9, 0.9), ["log_decay[0] = 0.89", "did you pass"]),
    "NaN decay": (decay(-0.1, float("nan"), -0.1, -0.1), ["log_decay[1] = nan", "finite"]),
    "forgets infinitely": (decay(-0.1, -0.1, -0.1, float("-inf")), ["log_decay[3] = -inf", "finite"]),
    "unknown backend": (arguments(backend="cuda"), ["backend='cuda'", "'triton', 'torch'"]),
    # parts of packed documents
    "part before the first token": (part(-1), ["tokens -1 to 7", "24", "from 0 to 16"]),
    "part over the end": (part(20), ["tokens 20 to 28", "start = 20", "T = 8", "from 0 to 16"]),
    "part behind the end": (part(24), ["tokens 24 to 32", "from 0 to 16"]),
    "part longer than all": (part(2, 6, [0, 6]), ["T = 8", "6 tokens", "last of cu_seqlens"]),
    "part without a token": (
        part(**{n: x[:, :0] for n, x in packed([0, 8]).items() if n in "qkv"}), ["at least one token", "leave it out"],
    ),
    "start as a float": (part(2.0), ["start must be an int", "2.0", "float"]),
    "start as a tensor": (part(torch.tensor(2)), ["start must be an int", "tensor(2)", "Tensor"]),
    "start is true": (part(True), ["start must be an int", "True", "bool"]),
    "no start": (part(None), ["start must be an int", "None"]),
    "total as a float": (part(2, 24.0), ["total must be an int", "24.0"]),
    "no total": (part(2, None), ["total must be an int", "None"]),
    "total of the part": (part(0, 8), ["end at total = 8", "to 24"]),
    "part without bounds": (part(cu_seqlens=None), ["cu_seqlens must be a torch.Tensor", "is a NoneType"]),
    "bounds of a part as a list": (part(cu_seqlens=[0, 24]), ["cu_seqlens must be a torch.Tensor", "is a list"]),
    "float bounds of a part": (part(cu_seqlens=torch.tensor([0.0, 24.0])), ["torch.float32", "int32 or int64"]),
    "short bounds of a part": (part(cu_seqlens=torch.tensor([0, 24]).short()), ["torch.int16", "int32 or int64"]),
    "2-D bounds of a part": (part(bounds=[[0, 24]]), ["[1, 2]", "[N+1]"]),
    "no bounds of a part": (part(bounds=[]), ["[0]", "N >= 1"]),
    "one number for bounds": (part(bounds=24), ["[] torch.int64", "[N+1]"]),
    "bounds of a part elsewhere": (part(cu_seqlens=torch.zeros(2, dtype=int, device="meta")), ["on meta", "move it"]),
    "bounds of a part fall": (part(bounds=[0, 9, 5, 24]), ["cu_seqlens[1] = 9", "followed by 5", "never fall"]),
    "parts in a batch": (part(**arguments()), ["B = 2", "[1, B*T, ...]"]),
    "parts in a batch with states": (part(**arguments(initial_state=zeros(2, 4, 16, 32))), ["B = 2", "[1, B*T, ...]"]),
    "part without a state": (part(initial_state=None), ["begins at token 2", "the part before it", "or zeros"]),
    "state of the first part": (part(0, initial_state=zeros(1, 4, 16, 32)), ["start = 0", "give None"]),
    "states of all documents": (
        part(initial_state=zeros(3, 4, 16, 32)), ["[3, 4, 16, 32]", "[1,4,16,32]", "document that goes on"],
    ),
    "state of a part in fp64": (part(initial_state=zeros(1, 4, 16, 32).double()), ["torch.float64", "torch.float32"]),
}  # fmt: skip

SOURCES = (Path(checks.__file__), Path(backends.__file__))


def message(**call) -> tuple[str, int]:
    """What the operator, or its part, says about a wrong call, and the place in the source that says it."""
    with pytest.raises(ValueError) as error:
        (packed_part if "start" in call else lightning_attn)(**call)
    frame = traceback.extract_tb(error.value.__traceback__)[-1]
    assert Path(frame.filename) in SOURCES
    return str(error.value), (Path(frame.filename), frame.lineno)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, words = WRONG[name]
    text, _ = message(**call)
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"
    assert "\n" not in text and len(text) < 300


def test_good_call():
    """What the wrong calls differ from is right."""
    assert lightning_attn(**arguments())[0].shape == (2, 8, 4, 32)
    assert lightning_attn(**packed([0, 3, 8]))[0].shape == (1, 8, 4, 32)
    for scale in (1, 0.5, -1.0, None):
        lightning_attn(**arguments(scale=scale))
    for start in (0, 2, 16):
        o, state = packed_part(**part(start))
        assert o.shape == (1, 8, 4, 32) and state.shape == (1, 4, 16, 32)


# ---- backends ----


@pytest.fixture
def compiled(monkeypatch):
    """As if Triton's interpreter were off."""
    monkeypatch.setattr(backends, "triton_interpreted", lambda: False)


@pytest.fixture
def no_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    backends._auto_backend.cache_clear()
    yield
    backends._auto_backend.cache_clear()


def test_cpu_chooses_torch(compiled, monkeypatch):
    monkeypatch.setattr(triton_backend, "forward", None)
    for backend in (None, "auto", "torch"):
        assert backends.choose(backend, zeros(1)) is torch_backend
        lightning_attn(**arguments(backend=backend))


def test_cuda_chooses_triton(caplog):
    assert backends._auto_backend("cuda") == "triton" and not caplog.records


def test_cuda_without_triton(no_triton, caplog):
    for _ in range(2):
        assert backends._auto_backend("cuda") == "torch"
    assert len(caplog.records) == 1 and "pip install triton" in caplog.text and "slower" in caplog.text


def test_triton_is_chosen_by_name(monkeypatch):
    monkeypatch.setattr(backends, "triton_interpreted", lambda: True)
    assert backends.choose("triton", zeros(1)) is triton_backend


def backend_errors(monkeypatch) -> dict[str, tuple[dict, list[str]]]:
    """Calls that are wrong only on some machines."""
    doubles = {name: x.double() for name, x in arguments().items()}
    monkeypatch.setattr(backends, "triton_interpreted", lambda: True)
    yield doubles | {"backend": "triton"}, ["float64", "triton backend", "backend='torch'"]
    monkeypatch.setattr(backends, "triton_interpreted", lambda: False)
    yield arguments(backend="triton"), ["backend='triton'", "q is on cpu", "backend='torch'"]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    yield arguments(backend="triton"), ["not installed", "backend='torch'"]


def test_wrong_backends(monkeypatch):
    for call, words in backend_errors(monkeypatch):
        text, _ = message(**call)
        assert all(word in text for word in words), text


def test_every_error_is_tested(monkeypatch):
    """Each ``raise`` of the checks and of the choice of the backend is reached by a call above."""
    raises = {
        (path, node.lineno, node.end_lineno)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Raise)
    }
    calls = [call for call, _ in WRONG.values()]
    reached = {message(**call)[1] for call in calls} | {message(**call)[1] for call, _ in backend_errors(monkeypatch)}
    missed = [
        f"{path.name}:{first}-{last}"
        for path, first, last in raises
        if not any(path == where and first <= line <= last for where, line in reached)
    ]
    assert not missed, f"{missed} raise what no test sees"


# ---- values are read once for each tensor, and again once it changes ----


def test_changed_log_decay_is_checked_again():
    call = arguments()
    lightning_attn(**call)
    call["log_decay"][1] = 2.0
    assert "log_decay[1] = 2.0" in message(**call)[0]
    assert "log_decay[1] = 2.0" in message(**call)[0]  # having been refused does not help
    call["log_decay"][1] = -2.0
    lightning_attn(**call)


def test_changed_cu_seqlens_are_checked_again():
    call = packed([0, 3, 8])
    lightning_attn(**call)
    call["cu_seqlens"][1] = 9
    assert "followed by 8" in message(**call)[0]
    call["cu_seqlens"][1] = 4
    lightning_attn(**call)
    shorter = call | {name: call[name][:, :7] for name in "qkv"}  # the same bounds, for another T
    assert "end at T = 7" in message(**shorter)[0]


def test_inference_tensors_are_checked_every_time():
    with torch.inference_mode():
        call = arguments()
        lightning_attn(**call)
        call["log_decay"][1] = 2.0
        assert "log_decay[1] = 2.0" in message(**call)[0]


def test_values_are_read_once_where_that_waits(monkeypatch):
    """Reading waits for the GPU, so a layer must not do it in every step. On a CPU every call looks: nothing waits."""
    checked = []
    for name in ("check_log_decay", "check_cu_seqlens"):
        check = getattr(checks, name)
        counted = lambda *a, check=check, name=name, **k: checked.append(name) or check(*a, **k)
        monkeypatch.setattr(checks, name, counted)
    call, twice = packed([0, 3, 8]), ["check_log_decay", "check_cu_seqlens"]
    for waits in (False, True):
        monkeypatch.setattr(checks, "_waits", lambda x, waits=waits: waits)
        checked.clear()
        for _ in range(3):
            lightning_attn(**call)
        assert checked == (twice if waits else 3 * twice)
    call["cu_seqlens"][1] = 4
    lightning_attn(**call)
    assert checked == [*twice, "check_cu_seqlens"]
