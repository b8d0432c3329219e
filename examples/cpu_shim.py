"""Run Megatron's own training loop on a machine without a GPU.

    python examples/cpu_shim.py -m some.module --its --flags
    python examples/cpu_shim.py script.py --its --flags
    torchrun --nproc-per-node 2 examples/cpu_shim.py -m some.module --its --flags

Megatron-core assumes CUDA and NCCL. `enable()` maps the device "cuda" to the CPU, the CUDA random
generator to the CPU generator and NCCL to gloo, and stubs the torch.cuda calls that only order or
measure work. No line of Megatron is replaced and no value is changed, so a run proves the wiring:
parallel groups, schedules, optimizers and checkpoints. It proves nothing about kernels or NCCL.

For tests and demos only; written for torch 2.11 and megatron-core 0.19. Paths below are relative to
the megatron package.
"""

import contextlib
import functools
import logging
import os
import runpy
import sys
from types import SimpleNamespace

import torch
import torch.utils.data.dataloader

# Functions that take device=, each called by Megatron with "cuda" or torch.cuda.current_device().
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like",
    "rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_METHODS = ("to", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")

_enabled = False


def enable() -> None:
    """Patch torch so that Megatron runs on the CPU. Call it before the first import of Megatron.

    Calling it again does nothing.

    Raises:
        RuntimeError: if this machine has a usable GPU, or if Megatron was imported first.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available():
        raise RuntimeError("cpu_shim.enable(): this machine has a GPU; run Megatron on it without the shim")
    if "megatron.core" in sys.modules:
        raise RuntimeError("cpu_shim.enable() must come before the first import of megatron.core, which binds names")
    _map_device()
    _stub_cuda()
    _map_rng()
    _map_backend()
    _skip_compile()
    _enabled = True


def _map_device() -> None:
    """Turn every request for the device "cuda" into one for "cpu"."""

    def on_cpu(device):
        if isinstance(device, int) and not isinstance(device, bool):  # a device index: torch.cuda.current_device()
            return "cpu"
        if isinstance(device, str) and device.startswith("cuda"):
            return "cpu"
        if isinstance(device, torch.device) and device.type == "cuda":
            return "cpu"
        return device

    def mapped(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)  # core/models/common/embeddings/rope_utils.py:62 under CP
            return function(*args, **kwargs)

        return call

    for name in _FACTORIES:
        setattr(torch, name, mapped(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, mapped(getattr(torch.Tensor, name)))

    to = torch.Tensor.to  # x.to(device) also takes it by position
    torch.Tensor.to = lambda self, *args, **kwargs: to(self, *map(on_cpu, args), **kwargs)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self

    # Megatron's optimizers sort parameters by type(): "torch.cuda.FloatTensor" (core/optimizer/optimizer.py:1009).
    tensor_type = torch.Tensor.type

    def type_(self, *args, **kwargs):
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = type_


def _stub_cuda() -> None:
    """Answer the torch.cuda calls that order, count or measure work on a GPU; the CPU runs in program order."""

    class Stream:  # core/distributed and training/models/dist_utils.py:303 build DDP on a side stream
        def __init__(self, *args, **kwargs):
            pass

        def wait_stream(self, stream):
            pass

        def record_event(self, event=None):  # core/transformer/moe/token_dispatcher.py:946
            return SimpleNamespace(synchronize=lambda: None)

    cuda = torch.cuda
    cuda.device_count = lambda: 1  # training/initialize.py:270 and :447 set up groups and seeds only if > 0
    cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0)  # training/arguments.py:1414
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # the same line asks for it where major < 10
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream = Stream
    cuda.current_stream = lambda device=None: Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()


def _map_rng() -> None:
    """Let Megatron's CUDA generator (core/tensor_parallel/random.py) be the CPU's one, and guard it."""
    torch.cuda.default_generators = (torch.default_generator,)
    for module in (torch.cuda, torch.cuda.random):  # the second imported these names from the first
        module.current_device = lambda: 0
        module._lazy_init = lambda: None
        module._lazy_call = lambda call, **kwargs: call()

    # CudaRNGStatesTracker.fork() warns when the CPU generator moves: here it is the forked one.
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    # A data loader draws its seed from the CPU generator, and only TP rank 0 has one. On a GPU that leaves
    # the CUDA generator alone; here TP ranks would come to drop different elements of the same activations.
    loader = torch.utils.data.dataloader._BaseDataLoaderIter
    init = loader.__init__

    def init_apart(self, *args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            init(self, *args, **kwargs)

    loader.__init__ = init_apart


def _map_backend() -> None:
    """Use gloo where NCCL is asked for, by name or by default."""

    def on_gloo(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if kwargs.get("backend") == "nccl":
                kwargs["backend"] = "gloo"
            return function(*args, **kwargs)

        return call

    dist = torch.distributed
    dist.init_process_group = on_gloo(dist.init_process_group)
    dist.new_group = on_gloo(dist.new_group)

    # Expert parallelism passes split sizes that it leaves as tensors unless they are CUDA ones
    # (core/transformer/moe/token_dispatcher.py:927).
    all_to_all = dist.all_to_all_single

    @functools.wraps(all_to_all)
    def all_to_all_single(*args, **kwargs):
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return all_to_all(*args, **kwargs)

    dist.all_to_all_single = all_to_all_single


def _skip_compile() -> None:
    """Make torch.compile, Megatron's jit_fuser (core/jit.py), return its argument: no compiler, no warm-up."""

    def identity(model=None, **kwargs):
        return (lambda function: function) if model is None else model

    torch.compile = identity


def enable_pretrain() -> None:
    """enable(), and let megatron.training.pretrain() start without CUDA. Imports megatron.training."""
    enable()
    from megatron.training import training

    # pretrain() gives no way to pass the argument on (training/training.py:1091).
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    # Warms the compiler up on random "cuda" tensors, whose draws would here move the CPU generator.
    training.set_jit_fusion_options = lambda tp_size=None: None


def main() -> None:
    """Run `-m module` or a script, as python itself would, after enable_pretrain()."""
    if len(sys.argv) < 2 or sys.argv[1:] == ["-m"]:
        sys.exit(__doc__)
    enable_pretrain()
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    del sys.path[0]  # this folder, which python put there
    main()
