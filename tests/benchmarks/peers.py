"""The registry of measured implementations: one row each, ours first.

Peers are optional. Every row's ``load`` gives a function ``(q, k, v, log_decay, **features) -> (o, final_state or
None)`` on tensors in the row's own layout, so that nobody is charged for a transpose. Imports happen in ``load`` only.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

BTHD, BHTD = "BTHD", "BHTD"
EVERY_SUITE = ("speed", "length", "dims", "heads", "packed", "grouped", "decode", "memory", "error")


@dataclass(frozen=True)
class Row:
    """One implementation.

    Attributes:
        name: in tables and legends.
        module: the package that is imported.
        pip: what ``pip install`` takes.
        load: imports it and returns its function.
        suites: where it takes part; the others ask for what it does not compute.
        colour: in plots.
        layout: axes of q, k, v and o.
        backward: whether there is a backward to measure.
        autotunes: whether its first call tries many configurations (left out by ``--quick``).
        softmax: computes softmax attention, another function, for comparison of speed only.
        note: printed with its rows.
    """

    name: str
    module: str
    pip: str
    load: Callable[[], Callable]
    suites: tuple[str, ...]
    colour: str
    layout: str = BTHD
    backward: bool = True
    autotunes: bool = False
    softmax: bool = False
    note: str = ""

    @property
    def is_fla(self) -> bool:
        return self.module == "fla"

    def why_missing(self) -> str | None:
        """None if it can be imported, else what to do."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.name}: skipped, package {self.module} is not installed; pip install {self.pip}"
        try:
            self.load()
        except Exception as error:  # whatever a peer raises with this torch and triton, the others can be measured
            return f"{self.name}: skipped, package {self.module} does not load ({error!r}); pip install {self.pip}"
        return None

    def version(self) -> str:
        """Of the installed distribution; of sources on the path what the module says."""
        for distribution in importlib.metadata.packages_distributions().get(self.module, ()):
            return importlib.metadata.version(distribution)
        return str(getattr(importlib.import_module(self.module), "__version__", "unknown"))


def _lightning() -> Callable:
    from lightning_megatron.ops import lightning_attn

    return lightning_attn


def _fla(name: str) -> Callable[[], Callable]:
    def load() -> Callable:
        import fla.ops.simple_gla

        function = getattr(fla.ops.simple_gla, name)

        def attn(q, k, v, log_decay, **features):
            return function(q, k, v, g_gamma=log_decay, scale=q.shape[-1] ** -0.5, **features)

        return attn

    return load


def _lightning_attn2(name: str) -> Callable[[], Callable]:
    def load() -> Callable:
        import lightning_attn.ops

        function = getattr(lightning_attn.ops, name)
        return lambda q, k, v, log_decay: (function(q, k, v, -log_decay.view(-1, 1, 1)), None)

    return load


def _linghe() -> Callable:
    from linghe.attn.la import triton_lightning_attention_forward

    def attn(q, k, v, log_decay):
        return triton_lightning_attention_forward(
            q, k, v, -log_decay, hpc=False, hp=False, softmax_scale=q.shape[-1] ** -0.5
        )

    return attn


def _ssd(chunk: int) -> Callable[[], Callable]:
    """Mamba-2's scan with dt = 1 and A = log_decay; x is v, B is k and C is q, with a group for each head of k."""

    def load() -> Callable:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        ones = functools.lru_cache(maxsize=1)(lambda *shape, device: torch.ones(shape, device=device))

        def attn(q, k, v, log_decay):
            dt = ones(*v.shape[:3], device=v.device)
            return mamba_chunk_scan_combined(v, dt, log_decay, k, q, chunk_size=chunk), None

        return attn

    return load


def _seg_la() -> Callable:
    from sglang.kernels.ops.attention.linear.seg_la import SegLaMeta, seg_la_fwd  # 0.5.23; once in srt.layers

    @functools.lru_cache(maxsize=2)
    def prepared(B: int, T: int, device: torch.device) -> SegLaMeta:
        starts, slots = (torch.arange(B, device=device, dtype=torch.int32) * n for n in (T, 1))
        lengths, resumed = (torch.full_like(starts, n) for n in (T, int(T == 1)))
        return SegLaMeta(B, T, starts, slots, lengths, resumed)

    def attn(q, k, v, log_decay, initial_state=None, output_final_state=False):
        """The state that enters is overwritten by the one that leaves."""
        B, T, H, K = q.shape
        state = v.new_empty(B, H, K, v.shape[-1], dtype=torch.float32) if initial_state is None else initial_state
        o = seg_la_fwd(*(x.flatten(0, 1) for x in (q, k, v)), state, -log_decay, prepared(B, T, q.device))
        return o.view(B, T, H, -1), state

    return attn


# What scaled_dot_product_attention calls once it has chosen. Called directly, neither can give way to another kernel,
# and no context manager costs host time.
def _sdpa_flash() -> Callable:
    sdpa = torch.ops.aten._scaled_dot_product_flash_attention.default
    return lambda q, k, v, log_decay: (sdpa(q, k, v, 0.0, True)[0], None)


def _sdpa_cudnn() -> Callable:
    sdpa = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    return lambda q, k, v, log_decay: (sdpa(q, k, v, None, q.requires_grad, 0.0, True)[0], None)


SDPA = dict(module="torch", pip="torch", layout=BHTD, softmax=True, note="softmax attention")
MAMBA = dict(
    module="mamba_ssm", pip="mamba-ssm", autotunes=True,
    note="no scale argument; made for few groups of k and q; its backward also gives ddt and dA",
)  # fmt: skip
FLA = dict(module="fla", pip="flash-linear-attention", autotunes=True)
OPENNLPLAB = dict(module="lightning_attn", pip="git+https://github.com/OpenNLPLab/lightning-attention", layout=BHTD)

ROWS = (
    Row("lightning", "lightning_megatron", "lightning-megatron", _lightning, EVERY_SUITE, "#d62728"),
    Row(
        "fla chunk", load=_fla("chunk_simple_gla"), colour="#1f77b4",
        suites=("speed", "length", "dims", "heads", "packed", "memory", "error"), **FLA,
    ),
    Row(
        "fla fused", load=_fla("fused_chunk_simple_gla"), colour="#17becf",
        suites=("speed", "length", "dims", "packed", "memory"), **FLA,
    ),
    Row("fla recurrent", load=_fla("fused_recurrent_simple_gla"), colour="#7fb3d5", suites=("decode",), **FLA),
    Row(
        "lightning-attn2", load=_lightning_attn2("lightning_attn2"), colour="#2ca02c", suites=("speed", "length"),
        note="no scale argument", **OPENNLPLAB,
    ),
    Row(  # not in length: it compiles nine kernels anew for every length
        "lightning-attn2 parallel", load=_lightning_attn2("lightning_attn2_parallel"), colour="#98d594",
        suites=("speed",), note="no scale argument; T % 256 == 0", **OPENNLPLAB,
    ),
    Row(
        "linghe", "linghe", "git+https://github.com/inclusionAI/linghe", _linghe, ("speed", "length"), "#9467bd",
        backward=False, note="forward only: its published backward is wrong",
    ),
    Row(
        "mamba-2 ssd 256", load=_ssd(256), colour="#8c564b", suites=("speed", "length"), **MAMBA,
    ),
    Row(
        "mamba-2 ssd 128", load=_ssd(128), colour="#c49c94", suites=("speed",), **MAMBA,
    ),
    Row(
        "sglang seg_la", "sglang", "sglang", _seg_la, ("speed", "length", "decode"), "#e377c2",
        backward=False, note="for serving: no backward",
    ),
    Row("sdpa flash", load=_sdpa_flash, colour="#7f7f7f", suites=("speed", "length"), **SDPA),
    Row("sdpa cudnn", load=_sdpa_cudnn, colour="#bcbd22", suites=("speed", "length"), **SDPA),
)  # fmt: skip


def choose(suite: str, only: list[str] | None = None, autotune: bool = True) -> list[Row]:
    """Rows of a suite, of the names in ``only``, without those that autotune if they are not wanted."""
    rows = [row for row in ROWS if suite in row.suites and (only is None or row.name in only)]
    return [row for row in rows if autotune or not row.autotunes]


TUNING_MS = dict(warmup=2, rep=8)  # of each configuration: dozens of calls of most; Triton's own are 25 and 100
_choices: dict[tuple, dict] = {}


def tune_for(*sizes) -> None:
    """Let the autotuners of fla and Mamba choose for these sizes, if they have not.

    By themselves they keep the choice of the first length that comes, some of them also that of the first heads and
    head dims, and on disk for later runs: good for a model, but in a benchmark the shapes that come later would be
    slower.
    """
    import triton

    for tuner in _tuners():
        tuner.cache = _choices.setdefault((id(tuner), *sizes), {})
        tuner.cache_results = False
        tuner.do_bench = functools.partial(triton.testing.do_bench, **TUNING_MS)


def _tuners() -> Iterator:
    from triton.runtime import Autotuner, Heuristics

    for name, module in list(sys.modules.items()):
        for kernel in list(vars(module).values()) if name.startswith(("fla.", "mamba_ssm.")) else ():
            while isinstance(kernel, Heuristics):
                kernel = kernel.fn
            if isinstance(kernel, Autotuner):
                yield kernel
