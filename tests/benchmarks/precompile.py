"""Fill Triton's cache from many processes at once, so that what is measured afterwards finds its kernels compiled.

Autotuned peers try up to 48 configurations of every kernel and compile them one after another, which takes minutes on a
GPU that waits. Here every process runs the chosen suites on tensors without memory (torch's meta device): kernels are
compiled as a launch would, with all configurations of the autotuners, and not launched. Who first comes to a
compilation does it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from . import attention, measure, peers


def fill(processes: int, suites: list[str], only: list[str] | None, quick: bool) -> None:
    """Compile what the suites launch, and say how long it took and what did not get through."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = functools.partial(compile_all, suites, only, quick)
        try:
            with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
                failures = list(pool.map(work, [Path(folder)] * processes))[0]
        except Exception as error:  # then the measuring process compiles what is missing
            failures = [f"stopped: {error!r}"]
        count = len(list(Path(folder).iterdir()))
    for failure in failures:
        print(f"precompile: {failure}")
    print(f"precompiled {count} kernels in {time.perf_counter() - start:.0f} s by {processes} processes", flush=True)


def watch() -> Counter[str]:
    """Counts, from now on, what this process must compile itself, by kernel."""
    import triton

    missing = Counter()
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **details: missing.update(
        [] if cache_hit else [src.name]
    )
    return missing


def compile_all(suites: list[str], only: list[str] | None, quick: bool, claims: Path) -> list[str]:
    """Compile what nobody has claimed by a file in ``claims``; returns the rows that failed."""
    wanted = [row.name for row in peers.ROWS if not row.softmax and (only is None or row.name in only)]
    bench = attention.Bench("alibi", 1, quick, wanted, 1.0)
    failures = []
    with ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # the measuring process says what is missing
        for suite in suites:
            bench.rows(suite)  # peers ask for the GPU while they are imported
        for target, name, value in _replacements(claims):
            stack.enter_context(patch.object(target, name, value))
        for suite in suites:
            for x in (x for group in attention.SUITES[suite](bench) for x in group):
                if "failed" in x:
                    failures.append(f"{suite} {x['impl']} {[x[key] for key in 'BTHKV']}: {x['failed']}")
    return failures


def _replacements(claims: Path) -> list[tuple[Any, str, Any]]:
    """Nothing is timed, nothing needs a GPU, kernels are compiled only."""
    import triton
    from triton.runtime import Autotuner, JITFunction

    from lightning_megatron.ops import attention as operator
    from lightning_megatron.ops.triton import attention as triton_backend
    from lightning_megatron.ops.triton import tiling
    from lightning_megatron.ops.triton.launch import launcher

    nothing = lambda *args, **kwargs: None
    driver = triton.runtime.driver.active
    capability = driver.get_current_target().arch
    # fla asks for the shared memory by the number of the tensor's device, which tensors without memory do not have
    chunk_o = sys.modules.get("fla.ops.common.chunk_o")
    return [
        *([(chunk_o, "check_shared_mem", _of_first_device(chunk_o.check_shared_mem))] if chunk_o else []),
        (measure, "DEVICE", "meta"),
        (measure, "bounds", lambda lengths: torch.tensor([0, *lengths]).cumsum(0).int()),  # fla reads their values
        (measure, "copies_beyond_cache", lambda footprint: 1),
        (measure, "gpu_time", _call_each),
        (measure, "eager_ms", lambda calls, repeats: 1.0),
        (measure, "graph_ms", lambda calls, repeats: 1.0),
        (measure, "extra_bytes", lambda attn, q, k, v, do: len(torch.autograd.grad(attn(q, k, v), (q, k, v), do))),
        (attention, "exact_results", nothing),
        (attention, "errors", _results_only),
        (driver, "get_current_stream", lambda device: 0),  # without a context on the GPU
        (torch.cuda, "synchronize", nothing),
        (torch.cuda, "empty_cache", nothing),
        (operator, "check_shapes", nothing),  # which wants all tensors on one device
        (operator, "check_values", nothing),
        (operator, "choose", lambda backend, q: triton_backend),
        (tiling, "has_copy_engine", lambda device: isinstance(capability, int) and capability >= 90),
        (tiling, "has_wgmma", lambda device: capability == 90 and launcher() is not None),
        (JITFunction, "run", _compile_only(JITFunction.run)),
        (Autotuner, "run", _every_configuration),
        (triton.knobs.runtime, "jit_cache_hook", functools.partial(_claimed, claims)),
    ]


def _of_first_device(check: Callable) -> Callable:
    return lambda arch, device: check(arch)


def _call_each(calls: list[Callable], repeats: int) -> measure.Timing:
    for call in calls:
        call()
    return measure.Timing(1.0, 1, False)


def _results_only(
    bench: attention.Bench, row: peers.Row, shape: measure.Shape, *, inputs, expected
) -> dict[str, float]:
    return dict.fromkeys(attention.results_of(row.load(), *inputs), 0.0)


def _compile_only(run: Callable) -> Callable:
    """``JITFunction.run`` as its ``warmup`` calls it."""

    def compile_only(self, *args, warmup=True, **kwargs):
        return run(self, *args, warmup=True, **kwargs)

    return compile_only


def _every_configuration(self, *args, **kwargs) -> None:
    """In place of ``Autotuner.run``."""
    for config in self.configs:
        with contextlib.suppress(Exception):  # the autotuner leaves out what does not compile
            self.fn.run(*args, **kwargs, **config.all_kwargs())
    self.best_config = self.configs[0]  # which Mamba-2's scan reads


def _claimed(claims: Path, *, key: str, fn, **details) -> bool:
    """Triton's hook before a compilation, which is left out if this is true."""
    name = hashlib.sha256(f"{fn.module} {fn.name} {key}".encode()).hexdigest()
    try:
        (claims / name).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False
