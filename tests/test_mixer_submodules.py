"""Parts of the mixer that a spec can replace, and the ranges that a profiler sees."""

import dataclasses

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import configure_nvtx_profiling

from lightning_megatron.mixer import LightningAttention, LightningAttentionSubmodules
from lightning_megatron.norm import HeadNorm, OutputNorm
from tests import layers
from tests.launch import spawn
from tests.layers import Variant

SUBMODULES = LightningAttentionSubmodules(layers.ColumnParallelLinear, layers.RowParallelLinear)


class DoubleNorm(HeadNorm):
    """HeadNorm times ``factor``."""

    def __init__(self, *args, factor: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def forward(self, x):
        return self.factor * super().forward(x)


class HalfNorm(OutputNorm):
    def forward(self, o, gate=None, **options):
        return 0.5 * super().forward(o, gate, **options)


def build(submodules: LightningAttentionSubmodules) -> LightningAttention:
    variant = Variant(dict(qk_norm=True, rope=True))
    mixer = LightningAttention(layers.transformer_config(), submodules, layer_number=2, options=variant.values)
    layers.set_parameters(mixer, layers.draw_parameters(mixer, 1, torch.Generator().manual_seed(6)), 0, 1)
    return mixer


def check_norms(rank: int, world: int) -> None:
    """The operator is linear in q and in k, and the projection in its input: 4 * 0.25 * 0.5 of the output remain."""
    layers.start()
    x, freqs = torch.randn(16, 1, 64), layers.rotary(Variant(dict(rope=True)), 16)
    want, _ = build(SUBMODULES)(x, None, rotary_pos_emb=freqs)
    for q, k, out, factor in (
        (DoubleNorm, None, None, 1.0),
        (None, DoubleNorm, None, 1.0),
        (DoubleNorm, DoubleNorm, HalfNorm, 0.5),
    ):
        # one of q and k alone is seen through the epsilon of the output norm
        parts = dict(
            q_norm=ModuleSpec(module=q, params={"factor": 4.0}) if q else HeadNorm,
            k_norm=ModuleSpec(module=k, params={"factor": 0.25}) if k else HeadNorm,
            out_norm=out or OutputNorm,
        )
        mixer = build(dataclasses.replace(SUBMODULES, **parts))
        assert isinstance(mixer.q_norm, q or HeadNorm) and isinstance(mixer.k_norm, k or HeadNorm)
        got, _ = mixer(x, None, rotary_pos_emb=freqs)
        if q and k:
            torch.testing.assert_close(got, factor * want)
        else:
            assert not torch.equal(got, want)


def test_a_spec_replaces_norms():
    spawn(check_norms, 1)


def ranges(rank: int, world: int) -> tuple[list[str], list[str]]:
    layers.start()
    mixer = build(SUBMODULES)
    x, freqs = torch.randn(16, 1, 64), layers.rotary(Variant(dict(rope=True)), 16)
    seen: list[str] = []
    torch.cuda.nvtx.range_push = seen.append
    torch.cuda.nvtx.range_pop = lambda: seen.append("end")
    mixer(x, None, rotary_pos_emb=freqs)
    off = list(seen)
    configure_nvtx_profiling(True)
    mixer(x, None, rotary_pos_emb=freqs)
    return off, seen


def test_profiler_ranges_as_in_megatrons_layers():
    """Module and function come before the name, no range is inside another, and none is there with profiling off."""
    ((off, on),) = spawn(ranges, 1)
    assert off == []
    names = ["forward.qkv", "_heads.split_heads", "_heads.rotary_pos_emb"]
    names += ["_attend.lightning_attention", "_attend.output_norm_gate", "_project.linear_proj"]
    assert on == [x for name in names for x in (f"lightning_megatron.mixer.{name}", "end")]
