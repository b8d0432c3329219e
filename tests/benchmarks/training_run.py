"""The process that tests.benchmarks.training starts: Megatron's pretrain(), at one sequence length after the other.

    torchrun ... -m tests.benchmarks.training_run PLAN <flags of lightning_megatron.pretrain>

PLAN is JSON: ``softmax`` (bool: every layer softmax, which the flags cannot say), ``cells`` (length, micro-batch size
and global batch size of each length), ``warmup`` and ``steps`` (how many come first, how many there are), ``profiled``
(steps that follow under the profiler) and ``rows`` (the file that gets a line of JSON after each length). Without cells
it is a plain ``lightning_megatron.pretrain``.

Configuration, model, optimizer and the first data loader are those that pretrain() builds. Only its call of train() is
taken over: train() is called once a length, after what depends on the length is set and with data loaders built anew by
Megatron's own function. Weights and optimizer states go on from length to length. torch.compile forgets the shapes of
the length before, else it would compile for shapes of any size, which a run at one length does not.

A step's time is from the end of the step before to its own end, with the GPU idle at both: data loading, logging and
all that train() does belong to it, as in the "elapsed time per iteration" of Megatron's log.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

PROGRAM_START = time.time()
TOP_KERNELS = 30
TOP_GAPS = 12


class StepClock:
    """Stands in for train_step(): calls it and notes when the GPU is done, and the loss."""

    def __init__(self, train_step: Callable, steps: int, profiled: int) -> None:
        self.train_step, self.steps, self.profiled = train_step, steps, profiled
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.profiler = None

    def __call__(self, *args, **kwargs) -> tuple:
        import torch

        if self.profiled and len(self.ends) == self.steps:
            gpu = torch.cuda.is_available()
            activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
            self.profiler = torch.profiler.profile(activities=[activity])  # kernels alone: the host runs as it does
            self.profiler.start()
        result = self.train_step(*args, **kwargs)
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.losses.append(float(result[0]["lm loss"]))
        if self.profiled and len(self.ends) == self.steps + self.profiled:
            self.profiler.stop()
        return result

    def seconds(self, warmup: int) -> list[float]:
        """Times of the steps after the warm-up, without the profiled ones."""
        return [self.ends[i] - self.ends[i - 1] for i in range(warmup, self.steps)]


def summarize(events, device_type, steps: int, seconds: float) -> dict:
    """The kernels of ``steps`` steps by time, how long the device does nothing in a step of ``seconds``, and between
    which kernels.

    Percentages are of a step without the profiler, whose own cost would count as idle time.
    """
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    spans = []
    for event in events:
        if event.device_type == device_type and event.cpu_parent is None and not event.is_user_annotation:
            span = event.time_range
            spans.append((span.start, span.end, event.name))
            totals[event.name][0] += (span.end - span.start) / 1e3 / steps
            totals[event.name][1] += 1
    gaps: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0])
    busy, end, last = 0.0, float("-inf"), ""
    for start, stop, name in sorted(spans):  # kernels of several streams overlap
        if last and start > end:
            gaps[last, name][0] += (start - end) / 1e3 / steps
            gaps[last, name][1] += 1
        busy += max(0.0, stop - max(start, end))
        end, last = max((end, last), (stop, name))
    longest = sorted(gaps.items(), key=lambda item: -item[1][0])[:TOP_GAPS]
    top = sorted(totals.items(), key=lambda item: -item[1][0])[:TOP_KERNELS]
    return {
        "idle": 1 - busy / steps / 1e6 / seconds,
        "launches": len(spans) / steps,
        "gaps": [
            {"after": after, "before": before, "ms": ms, "calls": calls / steps}
            for (after, before), (ms, calls) in longest
        ],
        "kernels": [
            {"name": name, "ms": ms, "percent": ms / seconds / 10, "calls": calls / steps} for name, (ms, calls) in top
        ],
    }


def device_type():
    """Whose events a profile is of: the GPU's, or under the shim the CPU's."""
    import torch

    return torch.autograd.DeviceType.CUDA if torch.cuda.is_available() else torch.autograd.DeviceType.CPU


def softmax_spec(config, vp_stage: int | None = None):
    """Every layer a softmax layer as the plugin builds it beside lightning layers: same norms, MLPs and SDPA core."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from lightning_megatron.norm import layer_norm
    from lightning_megatron.spec import get_hybrid_layer_specs

    assert vp_stage is None and config.transformer.pipeline_model_parallel_size == 1
    layers = config.transformer.num_layers
    hybrid = copy.copy(config.transformer)
    hybrid.linear_attention_freq = [1] + [0] * (layers - 1)
    layer = get_hybrid_layer_specs(hybrid)[-1]
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=layer_norm(config.transformer))


def train_lengths(
    plan: dict, provider: Callable, train: Callable, forward_step, model, optimizer, scheduler, data, *rest, **named
):
    """Takes the place of Megatron's train(), after the first three; calls it once for every cell of the plan."""
    import torch
    from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
    from megatron.core.utils import get_model_config, unwrap_model
    from megatron.training import get_args, get_timers, training

    args, train_step = get_args(), training.train_step
    for index, (length, micro_batch, global_batch) in enumerate(plan["cells"]):
        if index:
            args.seq_length = args.encoder_seq_length = length
            args.micro_batch_size = args.eval_micro_batch_size = micro_batch
            args.global_batch_size = args.eval_global_batch_size = global_batch
            args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0
            reconfigure_num_microbatches_calculator(
                rank=args.rank,
                global_batch_size=global_batch,
                micro_batch_size=micro_batch,
                data_parallel_size=args.data_parallel_size,
            )
            # What train() leaves otherwise than it insists to find it: a running timer, and with overlapping
            # communication a function that it set and hooks that it removed.
            get_timers()("interval-time", log_level=0).reset()
            get_model_config(model[0]).no_sync_func = None
            if training.should_disable_forward_pre_hook(args):
                training.enable_forward_pre_hook(model)
            data = None  # ends the workers of the length before
            data = training.build_train_valid_test_data_iterators(provider)[0]
            torch.compiler.reset()
            training.set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)  # as pretrain() does
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        clock = StepClock(train_step, plan["steps"], plan["profiled"])
        batches: collections.Counter[str] = collections.Counter()
        with mock.patch.object(training, "train_step", clock), counted(unwrap_model(model[0]).embedding, batches):
            result = train(forward_step, model, optimizer, scheduler, data, *rest, **named)
        row = {"length": length, "seconds": clock.seconds(plan["warmup"]), "losses": clock.losses, "batches": batches}
        graphed = args.cuda_graph_impl == "full_iteration"  # Python sees no batch once the graph is captured
        row["passes"] = args.cuda_graph_warmup_steps + 1 if graphed else len(clock.losses)
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["vocabulary"], row["sizes"] = args.padded_vocab_size, describe(model[0])
        if clock.profiler is not None:
            seconds = statistics.median(row["seconds"])
            row["profile"] = summarize(clock.profiler.events(), device_type(), plan["profiled"], seconds)
        if torch.distributed.get_rank() == 0:
            with Path(plan["rows"]).open("a") as file:
                file.write(json.dumps(row) + "\n")
    return result


@contextlib.contextmanager
def counted(embedding, batches: collections.Counter):
    """Counts the microbatches of each shape, "8x4096" for instance, that reach the model."""

    def count(module, args, inputs) -> None:
        batches["x".join(map(str, inputs["input_ids"].shape))] += 1

    handle = embedding.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def describe(model) -> dict[str, int]:
    """Parameters on this rank, and attention layers of each class: what was trained, not what was asked for."""
    layers = collections.Counter(type(m).__name__ for n, m in model.named_modules() if n.endswith(".self_attention"))
    return {"parameters": sum(p.numel() for p in model.parameters()), **layers}


def main() -> None:
    """Take the plan off the command line and train."""
    plan = json.loads(sys.argv.pop(1))
    from megatron.training import training as megatron_training

    from lightning_megatron import patches
    from lightning_megatron.training import data, run

    container, options = run.configure()
    if plan["softmax"]:
        container.model.transformer_layer_spec = softmax_spec
    patches.apply_all(options)
    provider = partial(data.datasets_provider, container.model.transformer)
    provider.is_distributed = True
    takeover: contextlib.AbstractContextManager = contextlib.nullcontext()
    if plan["cells"]:
        sweep = partial(train_lengths, plan, provider, megatron_training.train)
        takeover = mock.patch.object(megatron_training, "train", sweep)
    with takeover:
        run.run(container, PROGRAM_START, time.time())


if __name__ == "__main__":
    main()
