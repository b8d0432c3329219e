"""For all tests: Triton's interpreter without a GPU, seeded values, poisoned memory, nothing left, the gpu marker."""

import argparse
import functools
import gc
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny, and threads that wait for each other spin

import pytest  # noqa: E402
import torch  # noqa: E402

pytest.register_assert_rewrite("tests.helpers")  # failed asserts there show values, as in test modules

from tests.helpers import drawn  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has done yet
    from tests.helpers.interpreter import set_up

    set_up()

SEED = int(os.environ.get("LIGHTNING_TEST_SEED") or random.SystemRandom().randrange(2**31))
os.environ["LIGHTNING_TEST_SEED"] = str(SEED)  # one seed for all workers of pytest-xdist


def pytest_report_header() -> str:
    return f"random values: LIGHTNING_TEST_SEED={SEED} repeats them"


def pytest_configure(config: pytest.Config) -> None:
    # of Triton 3.6's interpreter, thousands of times, on NumPy 2.3
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--drawn", type=Path, metavar="FILE", help="of the tests in FILE, only so many cases, by the seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[drawn.CASES] = drawn.count(item.nodeid for item in items)
    if (path := config.getoption("--drawn")) is not None:
        out = drawn.left_out(items, drawn.read(path), SEED)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in out])
        items[:] = [item for item in items if item.nodeid not in out]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.freeze()  # a million objects of torch and Megatron, which stay: do not look through them again and again


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Give every test the same environment variables: a process of torchrun is told its ranks and ports by them."""
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """A patch of Megatron that outlives its test decides what later tests see: fail here, where it was made."""
    try:
        return (yield)
    finally:
        if (patches := sys.modules.get("lightning_megatron.patches")) is not None:
            _take_letter_back()
            left = [symbol for patch in patches.ALL for symbol in patch.SYMBOLS if _take_back(symbol)]
            assert not left, f"this test leaves {', '.join(left)} patched: restore it, or run in a process of its own"


def _take_back(symbol: str) -> bool:
    """Whether ``symbol`` was patched in this process; not any more."""
    from lightning_megatron.patches import _replace

    owner, _, name = symbol.rpartition(".")
    if not {owner, owner.rpartition(".")[0]} & sys.modules.keys():
        return False  # nothing of it is imported
    patched = getattr(_replace._owner(owner), name, None)
    if not hasattr(patched, _replace.MARKER):
        return False
    setattr(_replace._owner(owner), name, patched.__wrapped__)
    return True


def _take_letter_back() -> None:
    """Whoever reads a pattern of HybridModel's layers teaches Megatron our letter first: not for the tests behind."""
    if (module := sys.modules.get("megatron.core.models.hybrid.hybrid_layer_allocation")) is not None:
        if letter := vars(module.Symbols).get("LIGHTNING"):
            module.Symbols.VALID_LAYERS.discard(letter)
            del module.Symbols.LIGHTNING


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the patched symbols back after the test."""
    from lightning_megatron import patches
    from lightning_megatron.patches import _replace, mtp_without_te

    for symbol in (symbol for patch in patches.ALL for symbol in patch.SYMBOLS):
        owner, _, name = symbol.rpartition(".")
        owner = _replace._owner(owner)
        if symbol in mtp_without_te.SYMBOLS and not hasattr(owner, name):  # not in megatron-core 0.19
            continue
        assert not hasattr(getattr(owner, name), _replace.MARKER), f"{symbol} was patched at import"
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    """Parse the flags of a small model, and more, as Megatron does."""
    from tests.helpers.arguments import parse_flags

    return functools.partial(parse_flags, monkeypatch)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of random values of this test, the same whether it runs alone or with others."""
    print(f"random values: LIGHTNING_TEST_SEED={SEED}")  # pytest shows it if the test fails
    return torch.Generator().manual_seed((SEED + zlib.crc32(request.node.nodeid.encode())) % 2**31)


def _poisoned(allocate):
    """``allocate``, with the memory it returns filled with NaN, or the largest integer."""

    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        x = allocate(*args, **kwargs)
        with torch.no_grad():
            if x.is_floating_point() or x.is_complex():
                x.fill_(float("nan"))
            else:
                x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)
        return x

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is often zero, which hides a value nobody wrote; here it is NaN."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    """initial(model): a checkpoint of its initial values, written by one process; layouts would draw others."""
    from tests.helpers.training import train

    @functools.cache
    def write(model: str) -> Path:
        folder = tmp_path_factory.mktemp(f"initial-{model}")
        train(model, "one", f"--lr 0 --train-iters 1 --save {folder} --save-interval 1 --no-save-optim --no-save-rng")
        return folder

    return write
