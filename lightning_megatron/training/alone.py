"""The model of a checkpoint in this process alone, configured, checked and loaded as a resumed training does it.

    with loaded_model(folder, vocab_size=157184, length=200) as model:
        states, logits = outputs(model, tokens)

In fp32 and with the torch backend, whatever it was trained in. Without a GPU, call ``lightning_megatron.cpu.enable``
first, before anything imports Megatron.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import global_vars
from megatron.training.checkpointing import load_checkpoint
from megatron.training.models.gpt import GPTModelBuilder

from .. import patches
from . import run

# Of a training that goes on from a checkpoint, without its optimizer, and that reads no data.
_FLAGS = (
    "--use-checkpoint-args --no-load-optim --no-load-rng --no-use-tokenizer-model-from-checkpoint-args "
    "--tokenizer-type NullTokenizer --mock-data --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 0 "
    "--eval-iters 0 --lightning-backend torch"
).split()


@contextlib.contextmanager
def loaded_model(folder: Path, *, vocab_size: int, length: int, step: int | None = None) -> Iterator[torch.nn.Module]:
    """The model in evaluation mode, within process groups of one rank, which end with the ``with``.

    Args:
        folder: of ``--save``, with a tracker file unless ``step`` is given.
        vocab_size: without padding.
        length: at least the tokens of one sequence.
        step: iteration; the last one by default.

    Raises:
        RuntimeError: what Megatron, or the check of its flags, says against this checkpoint, with the end of its log.
    """
    flags = [*_FLAGS, "--load", str(folder), "--vocab-size", str(vocab_size), "--seq-length", str(length)]
    flags += [] if step is None else ["--ckpt-step", str(step)]
    log = io.StringIO()
    dist = torch.distributed
    try:
        try:
            with _quiet(log):
                model = _load(flags)
        except (Exception, SystemExit) as error:
            end = "".join(f"\n  | {line}" for line in log.getvalue().splitlines()[-5:])
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            raise RuntimeError(f"Megatron does not load {folder}: {reason}{end}") from error
        yield model
    finally:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        global_vars.unset_global_variables()


def _load(flags: list[str]) -> torch.nn.Module:
    before, sys.argv = sys.argv, [sys.argv[0], *flags]  # Megatron parses no other
    try:
        container, options = run.configure()
    finally:
        sys.argv = before
    patches.apply_all(options)
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    container.model.transformer.perform_initialization = False  # every value is loaded
    model = GPTModelBuilder(container.model).build_model(ProcessGroupCollection.use_mpu_process_groups())
    load_checkpoint([model], None, None)
    # Layers of multi-token prediction are loaded, and not run: they only help training, and need labels.
    model.mtp_process, model.config.mtp_num_layers = False, None
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
    """Output of every layer [t, h], and logits [t, padded vocabulary], of one sequence in one pass."""
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
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(tokens) + count)
    found: list[int] = []
    read = list(tokens)
    for _ in range(count):
        start = context.sequence_len_offset
        positions = torch.arange(start, start + len(read))[None]
        logits = model(torch.tensor([read]), positions, None, inference_context=context)
        context.sequence_len_offset += len(read)
        read = [int(logits[0, -1, :vocab_size].argmax())]
        found += read
    return found
