"""Plans: what is worked out once must be worked out anew for another layout, and launches take the short way only where
it is right.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.nvidia import driver

from lightning_megatron.ops import checks, kept
from lightning_megatron.ops.triton import attention as triton_backend
from lightning_megatron.ops.triton import launch as launching
from lightning_megatron.ops.triton import plans, tiling
from lightning_megatron.ops.triton.launch import Launch

from .cases import Impl, assert_same_bits, check, evaluate, make_case
from .layouts import expanded, fused, inside, time_first

RELEASE = ".".join(triton.__version__.split(".")[:2])
KNOWN = RELEASE in ("3.6", "3.7", "3.8", "3.9")  # those whose launchers and Gluon are used
OPTIONS = dict(B=2, T=35, H=1, V=32)
BF16 = Impl("triton", torch.bfloat16, "cuda")


def changes(case, rng, impl):
    """The case, and others of the same sizes or options but for one."""
    yield case
    for name in ("q", "k", "v", "do"):
        yield case.replace(**{name: getattr(time_first(case), name)})
    yield from (layout(case) for layout in (fused, expanded))
    yield case.replace(log_decay=case.log_decay * 3 - 0.01)
    yield case.replace(log_decay=torch.stack((case.log_decay, case.log_decay), 1)[:, 0])
    yield case.replace(scale=0.7)
    yield case.replace(initial_state=None)
    yield case.replace(initial_state=case.initial_state.transpose(2, 3).contiguous().transpose(2, 3))
    yield make_case(rng, impl, **OPTIONS | dict(T=36))
    yield make_case(rng, impl, **OPTIONS | dict(H=2, Hkv=1))
    yield make_case(rng, impl, **OPTIONS, documents=(20, 0, 15))
    for documents in (35,), (20, 0, 15), (20, 15):
        yield make_case(rng, impl, **OPTIONS, documents=documents, initial=False)
    yield make_case(rng, impl, **OPTIONS | dict(B=1), initial=False)
    yield case


def test_another_layout_is_another_plan(triton_impl, rng, cut):
    """Each after the others, compared with the recurrence."""
    cut(32)
    case, plans = make_case(rng, triton_impl, **OPTIONS), []
    for other in changes(case, rng, triton_impl):
        check(triton_impl, other)
        plans.append(len(triton_backend._forwards))
    assert plans[0] < plans[-2] == plans[-1], "the first case has a plan already when it comes again"


def test_another_dtype_is_another_plan(rng, cut):
    cut(32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else []))
    for dtype in (*dtypes, dtypes[0]):
        impl = Impl("triton", dtype, device)
        check(impl, make_case(rng, impl, **OPTIONS))
    assert len(triton_backend._forwards) == len(dtypes)


def test_other_values_are_not_another_plan(triton_impl, rng, cut):
    cut(32)
    cases = [make_case(rng, triton_impl, **OPTIONS) for _ in range(3)]
    for case in cases:
        check(triton_impl, case)
        assert len(triton_backend._forwards) == len(triton_backend._backwards) == 1


def test_saved_tensors_may_come_back_in_another_layout(triton_impl, rng, cut):
    """As from the host, where activations are offloaded."""
    cut(32)
    case = time_first(make_case(rng, triton_impl, **OPTIONS))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (x.clone(), x.shape), lambda x: x[0].contiguous()):
        got = evaluate(triton_impl.attn, case)
    want = evaluate(triton_impl.attn, case)
    assert_same_bits(got, want)


@pytest.mark.parametrize("call", ["forward", "backward", "final_states"])
def test_other_addresses_are_another_plan(monkeypatch, call):
    """Of the same sizes and strides: Hopper's copy engine reads only from addresses that are multiples of 16."""
    names = []

    class Named(Launch):
        def __call__(self, *tensors):
            names.append(self._kernel.fn.__name__)

    for module in (plans, triton_backend):
        monkeypatch.setattr(module, "Launch", Named)
    for name in ("has_wgmma", "has_copy_engine"):
        monkeypatch.setattr(tiling, name, lambda device: True)
    memory, log_decay = torch.zeros(4, 1 + 100 * 2 * 128, dtype=torch.bfloat16), torch.full((2,), -0.1)
    wanted = {"backward": "gradients_kernel"}.get(call, "walk_kernel")
    for offset in (0, 1, 0):
        q, k, v, do = (x[offset:][: 100 * 2 * 128].view(1, 100, 2, 128) for x in memory)
        q, k, v, do = (x.clone() if offset == 0 else x for x in (q, k, v, do))
        assert (q.data_ptr() % 16 == 0) == (offset == 0)
        names.clear()
        if call == "final_states":
            triton_backend.final_states(k, v, log_decay, None, None)
        else:
            *_, saved, cut = triton_backend.forward(q, k, v, log_decay, 1.0, None, None, False)
            if call == "backward":
                names.clear()
                triton_backend.backward(q, k, v, log_decay, 1.0, None, None, saved, cut, do, None)
        assert names == [f"hopper_{wanted}" if offset == 0 else wanted]


def test_plans_do_not_fill_the_memory(rng, cut, monkeypatch):
    cut(32)
    monkeypatch.setattr(kept, "KEPT", 2)
    impl = Impl("triton", torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    for T in (17, 18, 19, 20):
        check(impl, make_case(rng, impl, B=1, T=T))
        assert 0 < len(triton_backend._forwards) <= 2 and 0 < len(triton_backend._backwards) <= 2


# ---- launches --------------------------------------------------------------------------------------------------------


class Address:
    """What a launch asks of a tensor."""

    is_cuda, dtype, device = True, torch.float32, "cpu"

    def __init__(self, address: int, device: int = 0) -> None:
        self.address, self.index = address, device

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.index


class Kernel:
    """A Triton kernel, already compiled, on a GPU that is not there. Notes which way its launches go."""

    def __init__(self, scratch: int = 0) -> None:
        self.through_triton, self.direct = [], []
        self.fn = object()
        run = SimpleNamespace(
            launch=lambda *arguments: self.direct.append(arguments), num_ctas=1, launch_cooperative_grid=False,
            launch_pdl=False, global_scratch_size=scratch, global_scratch_align=128, profile_scratch_size=0,
            profile_scratch_align=1, arg_annotations=("annotations",), kernel_signature=b"signature",
            gsan_enabled=False,
        )  # fmt: skip
        self.compiled = SimpleNamespace(run=run, function=77, packed_metadata=(4, 1, 1024))

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.through_triton.append((grid, arguments, options))
            return self.compiled

        return launch


@pytest.fixture
def streams(monkeypatch):
    """The number of the current stream of each device."""
    if not KNOWN:
        pytest.skip(f"the launcher of triton {triton.__version__} is another one: launches go through Triton")
    numbers = [5, 6]
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: numbers[index], raising=False)
    launching.launcher.cache_clear()
    yield numbers
    launching.launcher.cache_clear()


TENSORS = Address(1024), None, Address(2048)
REST = (7, 0.5, 64, True)


def launch_of(kernel, **options) -> Launch:
    return Launch(kernel, 12, (7, 0.5), (64, True), num_warps=4, **options)


@pytest.mark.parametrize("scratch", [0, 384])
def test_launcher_gets_what_triton_gives_it(streams, monkeypatch, scratch):
    """The same arguments as from Triton's own code, with addresses in place of tensors. Multiply-adds are contracted,
    whatever Triton's default.
    """
    kernel = Kernel(scratch)
    launch = launch_of(kernel, scratch=scratch > 0)
    launch(*TENSORS)
    assert kernel.through_triton == [((12,), (*TENSORS, *REST), dict(num_warps=4, num_stages=3, enable_fp_fusion=True))]
    streams[0] = 9
    launch(Address(4096), None, Address(16))
    assert len(kernel.through_triton) == 1
    (direct,) = kernel.direct
    triton.set_allocator(lambda size, alignment, stream: ("memory", size))
    monkeypatch.setattr(triton.runtime.driver, "_active", object(), raising=False)  # of 3.8 and later, for profilers
    addresses = (4096, None, 16)
    driver.CudaLauncher.__call__(
        kernel.compiled.run, 12, 1, 1, 9, 77, (4, 1, 1024), None, None, None, *addresses, *REST
    )
    want = kernel.direct[1]
    if scratch:
        place = 7 if RELEASE == "3.6" else 11
        assert want[place] == ("memory", 12 * scratch) and isinstance(direct[place], int)
        direct, want = ((*x[:place], *x[place + 1 :]) for x in (direct, want))
    assert direct == want


def test_other_addresses_go_through_triton(streams):
    """It has another kernel for them. The first launch does not decide for those after it."""
    kernel = Kernel()
    launch, odd = launch_of(kernel), (Address(1024), None, Address(2056))
    for tensors, through, direct in ((odd, 1, 0), (TENSORS, 2, 0), (TENSORS, 2, 1), (odd, 3, 1), (TENSORS, 3, 2)):
        launch(*tensors)
        assert (len(kernel.through_triton), len(kernel.direct)) == (through, direct)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_every_launch(streams, monkeypatch, name):
    kernel, runtime = Kernel(), triton.knobs.runtime
    launch, hook = launch_of(kernel), lambda metadata: None
    launch(*TENSORS)
    getattr(runtime, name).add(hook)
    launch(*TENSORS)
    getattr(runtime, name).remove(hook)
    assert (len(kernel.through_triton), len(kernel.direct)) == (2, 0)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, name, hook)
        launch(*TENSORS)
        assert (len(kernel.through_triton), len(kernel.direct)) == (3, 0)
        patch.setattr(runtime, name, None)
        launch(*TENSORS)
        assert (len(kernel.through_triton), len(kernel.direct)) == (3, 1)


@pytest.mark.parametrize("change", ["signature", "gone", *(["format"] if RELEASE == "3.6" else ["newer"])])
def test_another_triton(streams, monkeypatch, caplog, change):
    """Launches go through Triton where its launcher is another one, and the log says so."""
    if change == "format":
        monkeypatch.setattr(driver, "_BASE_ARGS_FORMAT", "iiiKKppOOOOOOp")
    elif change == "signature":
        monkeypatch.setattr(driver.CudaLauncher, "__call__", lambda self, grid, *args: None)
    elif change == "newer":
        monkeypatch.setattr(triton, "__version__", "3.10.0")
    else:
        monkeypatch.delattr(driver, "_BASE_ARGS_FORMAT" if RELEASE == "3.6" else "make_kernel_signature")
    kernel = Kernel()
    launch = launch_of(kernel)
    with caplog.at_level(logging.DEBUG, launching.__name__):
        for _ in range(3):
            launch(*TENSORS)
    assert (len(kernel.through_triton), len(kernel.direct)) == (3, 0)
    assert len(caplog.records) == 1 and triton.__version__ in caplog.text


def test_this_triton_is_known():
    """Else every launch here goes through Triton: see ``launch.launcher``."""
    launching.launcher.cache_clear()
    here = KNOWN and torch.version.hip is None and hasattr(torch._C, "_cuda_getCurrentRawStream")
    assert launching.launcher() == (None if not here else "3.6" if RELEASE == "3.6" else "3.7")


@pytest.mark.parametrize(
    "capability, known, faster, lines", [(9, "3.6", True, 0), (9, None, False, 1), (8, None, False, 0)]
)
def test_a_triton_without_the_faster_kernels_is_told(monkeypatch, caplog, capability, known, faster, lines):
    """Once, and only where they would be used."""
    monkeypatch.setattr(tiling, "launcher", lambda: known)
    monkeypatch.setattr(tiling, "has_copy_engine", lambda device: capability >= 9)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    tiling.has_wgmma.cache_clear()
    try:
        assert {tiling.has_wgmma(torch.device("cuda")) for _ in range(3)} == {faster}
    finally:
        tiling.has_wgmma.cache_clear()
    assert len(caplog.records) == lines and caplog.text.count(f"this is {triton.__version__}") == lines


def test_launches_that_are_not_kept(streams):
    """``launch()`` finds the launch of an earlier call by everything but the addresses."""
    kernel = Kernel()

    def launch(*tensors, numbers=(7, 0.5), grid=12):
        launching.launch(kernel, grid, tensors, numbers, (64, True), num_warps=4)
        return len(kernel.through_triton), len(kernel.direct)

    assert launch(*TENSORS) == (1, 0) and launch(*TENSORS) == (1, 1)
    assert launch(*TENSORS, numbers=(8, 0.5)) == (2, 1)
    assert launch(*TENSORS, grid=13) == (3, 1)
    assert launch(Address(1024), Address(16), Address(2048)) == (4, 1), "a tensor in place of None"
    assert launch(Address(1024, device=1), None, Address(2048, device=1)) == (5, 1), "another device"
    half = Address(2048)
    half.dtype = torch.float16
    assert launch(Address(1024), None, half) == (6, 1), "another dtype"
    assert launch(*TENSORS) == (6, 2) and kernel.direct[-1][0] == 12


def test_values_are_looked_at_once(monkeypatch):
    """Of every tensor and version, where it takes a wait for a GPU."""
    monkeypatch.setattr(checks, "_waits", lambda tensor: True)
    seen, x = checks.Seen(), torch.zeros(3)
    assert seen.is_new(x)
    seen.remember(x)
    assert not seen.is_new(x) and seen.is_new(x, "another check") and seen.is_new(x.clone())
    x.add_(1)
    assert seen.is_new(x)
    seen.remember(x)
    assert not seen.is_new(x)
    del x
    assert not seen._versions, "what is gone is forgotten: another tensor may have its id"


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("T", [35, 2100])
def test_plans_on_a_gpu(rng, T):
    """Layouts, odd addresses and options one after the other, twice: the second time without Triton's own launches."""
    options = OPTIONS | dict(T=T, K=64, V=64)
    case = make_case(rng, BF16, **options)
    for _ in range(2):
        for layout in (lambda x: x, time_first, fused, inside, expanded):
            check(BF16, layout(case))
        for other in (dict(scale=0.7), dict(initial_state=None), dict(log_decay=case.log_decay * 3 - 0.01)):
            check(BF16, case.replace(**other))


@pytest.mark.gpu
def test_launches_go_the_short_way(rng, monkeypatch):
    case = make_case(rng, BF16, B=1, T=2100, K=64, V=64)
    want = evaluate(BF16.attn, case)
    monkeypatch.setattr(Launch, "_through_triton", lambda *arguments: pytest.fail("a launch through Triton"))
    assert_same_bits(evaluate(BF16.attn, case), want)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again = evaluate(BF16.attn, case)
    torch.cuda.current_stream().wait_stream(side)
    assert_same_bits(again, want)


@pytest.mark.gpu
def test_profilers_see_launches_on_a_gpu(rng):
    case, names = make_case(rng, BF16, B=1, T=2100, K=64, V=64), []
    want = evaluate(BF16.attn, case)
    hook = lambda metadata: names.append(metadata.get()["name"])
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        got = evaluate(BF16.attn, case)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert_same_bits(got, want)
    gradients = "hopper_gradients_kernel" if tiling.has_wgmma(case.q.device) else "gradients_kernel"
    assert names == ["walk_kernel", "walk_kernel", "walk_kernel", gradients]
