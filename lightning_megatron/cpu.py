"""Runs Megatron on a machine without a GPU, or beside one that is left alone.

    from lightning_megatron import cpu

    cpu.enable()  # before the first import of megatron.core

Megatron-core assumes CUDA and NCCL. enable() patches torch: the device "cuda" means the CPU, the CUDA random
generator the CPU's, NCCL gloo, and the torch.cuda calls that only order or measure work do nothing.
enable_pretrain() also patches the three places of pretrain() that insist on a GPU or lose time for one, and
enable_inference() the one of generation over pipeline stages. Nothing else of Megatron changes, and no value does: a
run proves the wiring (parallel groups, schedules, optimizers, checkpoints), nothing about kernels or NCCL.
``examples/cpu_shim.py`` runs a module or a script this way.

Importing this module changes nothing. ``lightning-convert verify``, the commands of ``inference`` where there is no
GPU, tests and examples call enable(); training does not. Written for torch 2.11 and megatron-core 0.19. Paths in the
comments are relative to the megatron package and name a caller that needs the patch.
"""

import collections
import contextlib
import functools
import logging
import os
import sys
import time
from types import SimpleNamespace

import torch
import torch.utils.data.dataloader
from torch.utils._device import _device_constructors

# What Megatron calls with device="cuda" or torch.cuda.current_device(). Others fail loudly: add them here.
_FACTORIES = ("arange", "empty", "empty_like", "full", "full_like", "ones", "tensor", "zeros", "zeros_like")


@functools.cache
def enable() -> None:
    """Patch torch so that Megatron runs on the CPU. Call it before the first import of Megatron.

    Calling it again does nothing.

    Raises:
        RuntimeError: if this machine has a usable GPU, or if Megatron was imported first.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "lightning_megatron.cpu.enable(): this process sees a GPU, on which Megatron runs as it is; set "
            "CUDA_VISIBLE_DEVICES= (empty) to use the CPU all the same"
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "lightning_megatron.cpu.enable() must come before the first import of megatron.core, which binds names"
        )
    _map_device()
    _stub_cuda()
    _map_rng()
    _map_backend()
    _skip_compile()


def _map_device() -> None:
    """Turn every request for the device "cuda" into one for "cpu"."""

    def on_cpu(device):
        index = type(device) is int  # torch.cuda.current_device()
        return "cpu" if index or (isinstance(device, str | torch.device) and str(device)[:4] == "cuda") else device

    def mapped(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)  # core/models/common/embeddings/rope_utils.py:62 under CP
            return function(*args, **kwargs)

        return call

    # `with torch.device("meta")` knows torch's factories by identity, from a list that torch makes when it first needs
    # it. Made now, it holds those that are called in the end; else transformers leaves buffers without values.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, mapped(getattr(torch, name)))
    torch.Tensor.new_empty = mapped(torch.Tensor.new_empty)

    to = mapped(torch.Tensor.to)  # takes the device by position too
    torch.Tensor.to = lambda self, *args, **kwargs: to(self, *map(on_cpu, args), **kwargs)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # core/inference/contexts/dynamic_context.py:2415

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
            return Event()

        def wait_event(self, event):  # core/inference: what is copied to the host while the next step is prepared
            pass

        def synchronize(self):
            pass

    class Event:  # core/inference/text_generation_controllers/text_generation_controller.py:263
        def __init__(self, *args, **kwargs):
            pass

        def record(self, stream=None):
            self.time = time.perf_counter()

        def query(self):
            return True

        def synchronize(self):
            pass

        def wait(self, stream=None):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    cuda = torch.cuda
    cuda.Event = Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.memory_stats = lambda device=None: collections.defaultdict(int)  # core/inference/engines/dynamic_engine.py
    cuda.device_count = lambda: 1  # training/initialize.py:270 and :447 set up groups and seeds only if > 0
    cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0)  # training/arguments.py:1414
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # the same line asks for it where major < 10
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.Stream = Stream
    cuda.current_stream = lambda device=None: Stream()
    torch.Tensor.record_stream = lambda tensor, stream: None  # core/pipeline_parallel/utils.py:269


def _map_rng() -> None:
    """Let Megatron's CUDA generator (core/tensor_parallel/random.py) be the CPU's one, and guard it."""
    torch.cuda.default_generators = (torch.default_generator,)
    for module in (torch.cuda, torch.cuda.random):  # the second imported these names from the first
        module.current_device = lambda: 0
        module._lazy_init = lambda: None
        module._lazy_call = lambda call, **kwargs: call()

    # core/inference/text_generation_controllers/text_generation_controller.py:251 draws tokens with one of its own
    plain = torch.Generator

    class Kind(type(plain)):  # in torch 2.15 not type itself
        def __instancecheck__(cls, instance):
            return isinstance(instance, plain)

    class Generator(plain, metaclass=Kind):
        def __new__(cls, device="cpu"):
            return plain("cpu" if type(device) is int else device)

    torch.Generator = Generator

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
    """Use gloo where NCCL is asked for. It has every collective that Megatron uses, in bf16 too, but one."""
    dist = torch.distributed
    init, new_group, all_to_all = dist.init_process_group, dist.new_group, dist.all_to_all_single
    all_gather = dist.all_gather

    def name(backend):
        return "gloo" if backend == "nccl" else backend

    dist.init_process_group = lambda backend=None, **kwargs: init(name(backend), **kwargs)
    dist.new_group = lambda ranks=None, *, backend=None, **kwargs: new_group(ranks, backend=name(backend), **kwargs)

    # Expert parallelism passes split sizes that it leaves as tensors unless they are CUDA ones
    # (core/transformer/moe/token_dispatcher.py:927).
    def all_to_all_single(*args, **kwargs):
        return all_to_all(
            *args, **{k: v.tolist() if "split_sizes" in k and torch.is_tensor(v) else v for k, v in kwargs.items()}
        )

    # Experts gather the tokens of tensor-parallel ranks, which have different numbers of them
    # (core/tensor_parallel/mappings.py:154); gloo refuses that.
    def all_gather_of_any_size(tensors, tensor, group=None, async_op=False):
        if async_op or len({x.shape for x in tensors}) == 1:
            return all_gather(tensors, tensor, group=group, async_op=async_op)
        tensors[dist.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensors):
            dist.broadcast(part, group=group, group_src=rank)

    dist.all_to_all_single = all_to_all_single
    dist.all_gather = all_gather_of_any_size


def _skip_compile() -> None:
    """Make torch.compile, Megatron's jit_fuser (core/jit.py), return its argument: no compiler, no warm-up."""

    def identity(model=None, **kwargs):
        return (lambda function: function) if model is None else model

    torch.compile = identity


@functools.cache
def enable_pretrain() -> None:
    """enable(), and let megatron.training.pretrain() start without CUDA. Imports megatron.training."""
    enable()
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import training

    # pretrain() gives no way to pass the argument on (training/training.py:1091).
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    # Warms the compiler up on random "cuda" tensors, whose draws would here move the CPU generator.
    training.set_jit_fusion_options = lambda tp_size=None: None
    # A checkpoint's first save spawns a helper process that imports the main module, and so Megatron: 5 s for
    # nothing. Without CUDA it can be forked.
    filesystem_async.get_write_results_queue = functools.partial(
        filesystem_async.get_write_results_queue, mp_mode="fork"
    )


def can_train() -> bool:
    """Whether pretrain() can start in this process: on a CUDA device, or after ``enable_pretrain()``."""
    return torch.cuda.is_available() or bool(enable_pretrain.cache_info().currsize)


@functools.cache
def enable_inference() -> None:
    """enable(), and let pipeline stages exchange what they generate. Imports megatron.core.inference."""
    enable()
    from megatron.core.inference import communication_utils

    communication_utils._is_cuda = lambda tensor: None  # asserts that what it sends is on a GPU
