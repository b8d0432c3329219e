"""The model of a checkpoint, configured, checked and loaded as a resumed training does it, on one or more ranks.

    saved = read_checkpoint(folder)
    with loaded_model(saved, vocab_size=157184, flags=["--tensor-model-parallel-size", "2"]) as model:
        logits = model(tokens, positions, None)

Any parallel layout loads what any other saved. Without a GPU, call ``lightning_megatron.cpu.enable`` first, before
anything imports Megatron.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import math
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.training import global_vars
from megatron.training.checkpointing import load_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from ..checkpoint_folder import TRACKER
from ..saved import saved_function
from ..training import run
from ..training.models import parser
from . import hybrid
from .reader import Reader

# Of a training that goes on from a checkpoint, without its optimizer, and that reads no data.
_FLAGS = (
    "--use-checkpoint-args --no-load-optim --no-load-rng --no-use-tokenizer-model-from-checkpoint-args "
    "--tokenizer-type NullTokenizer --mock-data --micro-batch-size 1 --train-iters 1 --lr 0 --eval-iters 0 --skip-train"
).split()
_LAYOUT = {  # Megatron's names of the sizes that a run may choose, and their flags
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "expert_tensor_parallel_size": "--expert-tensor-parallel-size",
}
_READ = ("cuda_graph_modules", "cuda_graph_scope_deprecated")  # by layers, of Megatron's group "inference"


class LoadError(ValueError):
    """A checkpoint that cannot be loaded; the message says why, and what to do."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint, before any weight is read."""

    load: Path
    """The folder of ``--save``."""
    step: int | None
    """Iteration to load; None for the one that the tracker file names."""
    args: Namespace
    """As Megatron saved them."""


def read_checkpoint(load: Path, step: int | None = None) -> Saved:
    """What a checkpoint says of itself.

    Args:
        load: folder of ``--save`` of the training, or of an import.
        step: iteration; the last one by default.

    Raises:
        LoadError: there is none, or none of Megatron's distributed format, or it has no lightning layers.
    """
    if step is None:
        tracker = load / TRACKER
        if not tracker.is_file():
            raise LoadError(f"--load {load}: no {TRACKER} there; give the folder that --save of the training named")
        newest = tracker.read_text("utf-8", errors="replace").strip()
        if newest != "release" and not (newest.isascii() and newest.isdigit()):
            raise LoadError(
                f"{tracker} says {newest[:40]!r}: write the number of the last complete iter_ folder into it"
            )
        folder = load / ("release" if newest == "release" else f"iter_{int(newest):07d}")
    else:
        folder = load / f"iter_{step:07d}"
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        named = f"which {TRACKER} names, " if step is None else ""
        raise LoadError(
            f"--load {load}: {folder}, {named}is not there, or no complete checkpoint of Megatron's distributed format "
            "(--ckpt-format torch_dist); write the number of one that is into that file"
        )
    with warnings.catch_warnings(action="ignore"):  # that no other process reads it, too
        args = dist_checkpointing.load_common_state_dict(str(folder)).get("args")
    if args is None:
        raise LoadError(f"--load {load}: {folder} holds no args of a training, so that its model is not known")
    if getattr(args, "hybrid_layer_pattern", None):
        try:
            hybrid.refuse_unserved(args)
        except ValueError as error:
            raise LoadError(f"--load {load}: {error}") from error
    elif saved_function(args).options is None:
        _spec_of(args, load)
    return Saved(load, step, args)


def _spec_of(args: Namespace, load: Path):
    """A checkpoint without options needs the spec it was trained with; Megatron ignores one that does not import."""
    if not args.spec:
        raise LoadError(f"--load {load}: it was trained without lightning_megatron, and has no lightning layers")
    module, _, name = " ".join(args.spec).partition(" ")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LoadError(
            f"--load {load}: it holds no lightning options, and the spec it was trained with, {module} {name}, "
            f"cannot be used here ({error}): put the folder of that module on PYTHONPATH"
        ) from error


def check_flags(flags: Sequence[str], world: int) -> None:
    """Refuse flags that Megatron does not know, and layouts that no model is used in, before anything is loaded.

    Args:
        flags: as of ``loaded_model``.
        world: processes that were started.

    Raises:
        ValueError: naming the flag, and what to do.
    """
    args = parser().parse_args(list(flags))
    if args.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size}: states are carried from token to token by one "
            "rank; leave it out"
        )
    if args.sequence_parallel:
        raise ValueError("--sequence-parallel: single tokens cannot be split over ranks; leave it out")
    for action in next(group for group in parser()._action_groups if group.title == "inference")._group_actions:
        if action.dest not in _READ and getattr(args, action.dest) != action.default:
            raise ValueError(
                f"{action.option_strings[0]} is of Megatron's own engines and servers, and is not read here; leave it "
                "out, and see --help for options of this command"
            )
    tp, pp, ep, etp = (getattr(args, name) for name in _LAYOUT)
    wanted = pp * math.lcm(tp, ep * (etp or tp) if ep > 1 or etp else 1)
    if world != wanted:
        sizes = ", ".join(f"{flag} {getattr(args, name) or tp}" for name, flag in _LAYOUT.items())
        raise ValueError(
            f"{world} process{'es' * (world > 1)} for a model over {wanted} ({sizes}): start it with torchrun "
            f"--nproc-per-node {wanted}, or give sizes that make {world}"
        )


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """torchrun's processes as one group; without torchrun, a group of this process alone. It ends with the ``with``."""
    if dist.is_initialized():
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if gpu else "gloo"
    if world_size() > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Processes that were started, before they form a group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def loaded_model(
    saved: Saved, *, vocab_size: int, flags: Sequence[str] = (), dtype: torch.dtype | None = None
) -> Iterator[torch.nn.Module]:
    """This rank's part of the model, in evaluation mode, within model-parallel groups that end with the ``with``.

    Args:
        saved: by ``read_checkpoint``.
        vocab_size: without padding.
        flags: more flags of Megatron and this package, as of a training: sizes of the layout, ``--lightning-backend``.
        dtype: of parameters; that of the training by default.

    Raises:
        LoadError: what Megatron, or the check of its flags, says against this checkpoint, with the end of its log.
    """
    line = [*_FLAGS, "--load", str(saved.load), "--vocab-size", str(vocab_size)]
    line += [] if saved.step is None else ["--ckpt-step", str(saved.step)]
    if dtype is None:
        line += ["--bf16"] * bool(saved.args.bf16) + ["--fp16"] * bool(saved.args.fp16)
    else:
        line += {torch.float32: [], torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}[dtype]
    log = io.StringIO()
    with process_group():
        try:
            try:
                with _quiet(log):
                    line += ["--global-batch-size", str(dist.get_world_size()), *flags]
                    model = _load(line + hybrid.pattern_flags(saved.args, flags), saved)
            except (Exception, SystemExit, CheckpointException) as error:  # the last one is no Exception
                raise LoadError(f"Megatron does not load {saved.load}: {_reason(error, log.getvalue())}") from error
            if saved.args.mtp_num_layers and dist.get_rank() == 0:
                number = saved.args.mtp_num_layers
                say(f"[{number} multi-token prediction layers are left out: they only help training]")
            yield model
        finally:
            parallel_state.destroy_model_parallel()
            global_vars.unset_global_variables()


def _reason(error: BaseException, log: str) -> str:
    if isinstance(error, ValueError):  # says all that is needed
        return str(error)
    said = str(error).strip().splitlines() or [""]
    end = "".join(f"\n  | {text}" for text in log.splitlines()[-5:])
    return f"{type(error).__name__}: {said[-1] if isinstance(error, CheckpointException) else error}{end}"


def say(line: str) -> None:
    """A line for the user; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def _load(flags: list[str], saved: Saved) -> torch.nn.Module:
    before, sys.argv = sys.argv, [sys.argv[0], *flags]  # Megatron parses no other
    try:
        container, options = run.configure()
    finally:
        sys.argv = before
    for name in ("fp8", "fp4"):
        if (given := getattr(container.model.transformer, name)) is not None:
            raise ValueError(
                f"--{name}-format {given}: models generate in bf16, as a token is fewer rows than a product in {name} "
                "takes; leave it out (a checkpoint of a training in fp8 has its weights in bf16, too)"
            )
    if saved_function(saved.args).options is None:
        container.model.transformer_layer_spec = _spec_of(saved.args, saved.load)
    run.apply_patches(options)
    config, args = container.model.transformer, global_vars.get_args()
    parallel_state.initialize_model_parallel(
        **{name: getattr(args, name) for name in _LAYOUT},
        get_embedding_ranks=functools.partial(
            run.embedding_ranks, config, container.model.share_embeddings_and_output_weights
        ),
    )
    # the tracker of inference, which draws nothing, is the one that CUDA graphs allow
    tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=args.cuda_graph_impl != "none")
    config.perform_initialization = False  # every value is loaded
    builder = container.model.get_builder_cls()(container.model)
    model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
    model = model.to(torch.cuda.current_device())
    if args.bf16 or args.fp16:
        model = Float16Module(config, model).module
    load_checkpoint([model], None, None)
    # Layers of multi-token prediction are loaded, and not run: they only help training, and need labels.
    model.mtp_process, model.config.mtp_num_layers = False, None
    if hasattr(model, "mtp"):
        del model.mtp
    return model.eval()


@contextlib.contextmanager
def _quiet(log: io.StringIO) -> Iterator[None]:
    """Megatron prints some hundred lines; they are of interest where it fails."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(log), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


@torch.inference_mode()
def outputs(model: torch.nn.Module, tokens: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Output of every layer [t, h], and logits [t, padded vocabulary], of one sequence in one pass on one rank."""
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: states.append(output[0][:, 0].clone()))
        for layer in model.decoder.layers
    ]
    try:
        logits = model(torch.tensor([list(tokens)]), torch.arange(len(tokens))[None], None)[0]
    finally:
        for hook in hooks:
            hook.remove()
    return states, logits


@torch.inference_mode()
def greedy(model: torch.nn.Module, tokens: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """The ``count`` tokens that follow, each the likeliest, from caches as in generation."""
    reader = Reader(model, len(tokens) + count)
    found: list[int] = []
    read = list(tokens)
    for _ in range(count):
        logits = reader.read(read)
        assert logits is not None, "one rank has all layers"
        read = [int(logits[0, :vocab_size].argmax())]
        found += read
    return found
