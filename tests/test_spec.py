"""Which layer is what: patterns, the log's layer map, what specs refuse, and modules built from them in one process."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core import package_info
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.training import global_vars

from lightning_megatron import flags, patches, spec
from lightning_megatron.config import LightningOptions, lightning_pattern
from lightning_megatron.mixer import LightningAttention
from lightning_megatron.patches import _replace
from lightning_megatron.record import function_record
from lightning_megatron.runtime import prepare
from lightning_megatron.softmax import DynamicSelfAttention
from lightning_megatron.spec import get_lightning_layer_spec, lightning_layer_spec, lightning_spec, make_spec
from lightning_megatron.summary import layer_map
from tests import layers
from tests.helpers.models import gpt
from tests.launch import spawn
from tests.layers import decay_of, latent_config, transformer_config

# ---- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "freq, wanted",
    [
        (None, "LLLLLLLL"),
        (2, "LsLsLsLs"),
        (3, "LLsLLsLL"),
        (8, "LLLLLLLs"),
        ([1, 0, 0, 1, 1, 1, 0, 0], "LssLLLss"),
    ],
)
def test_pattern(freq, wanted):
    assert "".join("L" if lightning else "s" for lightning in lightning_pattern(freq, 8)) == wanted


@pytest.mark.parametrize(
    "freq, message",
    [
        (
            1,
            "freq 1 would leave no lightning layer; leave the flag out for all-lightning, or give N >= 2",
        ),
        (0, "--linear-attention-freq 0 would leave no lightning layer"),
        (5, "--linear-attention-freq 5 would leave no softmax layer, .* leave the flag out .*, or give at most 4"),
        ([1, 0, 1], "lists 3 layers, but --num-layers is 4: give one entry a layer"),
        ([1, 0, 1, 2], r"\[1, 0, 1, 2\] may hold only 1 \(lightning\) and 0 \(softmax\)"),
        (2.5, r"--linear-attention-freq 2.5 must be a whole number or a list such as \(\[1\]\*7\+\[0\]\)\*4"),
        (True, "--linear-attention-freq True must be a whole number"),
    ],
)
def test_pattern_refuses(freq, message):
    with pytest.raises(ValueError, match=message):
        lightning_pattern(freq, 4)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            dict(transformer_impl="inference_optimized"),
            "inference_optimized is not supported .*; use local or transformer_engine",
        ),
        (
            dict(transformer_impl="transformer_engine"),
            "needs TransformerEngine, .* install .*, or pass --transformer-impl local",
        ),
        (
            dict(experimental_attention_variant="gated_delta_net"),
            "--experimental-attention-variant gated_delta_net chooses",
        ),
        (dict(heterogeneous_block_specs=True), "--heterogeneous-block-specs chooses another attention"),
    ],
)
def test_config_is_refused(config, message, monkeypatch):
    monkeypatch.setattr(flags, "importable", lambda module: False)
    changed = transformer_config()
    for name, value in config.items():  # past Megatron's own checks, which want more of such a config
        setattr(changed, name, value)
    with pytest.raises(ValueError, match=message):
        lightning_spec(changed)


# ---- the layer map in the log ----------------------------------------------------------------------------------------


def test_layer_map_says_what_is_trained():
    config = transformer_config(linear_attention_freq=2)
    text = layer_map(config, LightningOptions(num_kv_heads=2, value_head_dim=32, scale=0.5, rope=True, gate="linear"))
    for line in (
        "2 lightning layers (L), 2 softmax layers (s)\n     0  LsLs\n",
        "4 heads, 2 of k and v, K 16, V 32, scale 0.5, feature map silu, norm head, gate linear, rope on, q/k norm off",
        "TorchNorm for layer norms, torch's scaled_dot_product_attention for softmax layers; megatron-core "
        f"{package_info.__shortversion__}, ",
    ):
        assert line in text, text
    text = layer_map(transformer_config(), LightningOptions())
    assert "4 lightning layers (L), 0 softmax layers (s)\n     0  LLLL\n" in text and "scale 0.25," in text
    assert "for softmax layers" not in text


def test_layer_map_has_layers_of_multi_token_prediction():
    """Lightning ones decay as the last layer does, here a softmax layer."""
    config = transformer_config(linear_attention_freq=[1, 0, 0, 0], mtp_num_layers=2)
    assert "\n  2 more softmax layers for multi-token prediction\n" in layer_map(config, LightningOptions())
    options = LightningOptions(mtp_attention="lightning", decay="alibi")
    assert "\n  2 more lightning layers for multi-token prediction\n" in layer_map(config, options)
    options = LightningOptions(mtp_attention="lightning", decay="paper")
    lowest, highest = decay_of(options, 4, 1, 4).min(), decay_of(options, 4, 4, 4).max()
    assert f"log_decay {float(lowest):.3g} to {float(highest):.3g} per" in layer_map(config, options)
    config.linear_attention_freq = [0] * 4
    text = layer_map(config, options)
    assert f"log_decay {float(decay_of(options, 4, 4, 4).min()):.3g} to" in text and "layer: lightning " in text


def test_layer_map_of_softmax_layers_alone():
    text = layer_map(transformer_config(linear_attention_freq=[0] * 4), LightningOptions())
    assert "0 lightning layers (L), 4 softmax layers (s)" in text and "ssss" in text
    assert "decay" not in text and "attention parameters a layer: softmax" in text


def test_layer_map_breaks_long_models():
    text = layer_map(transformer_config(num_layers=80, linear_attention_freq=8), LightningOptions())
    assert f"\n     0  {'LLLLLLLs' * 8}\n    64  {'LLLLLLLs' * 2}\n" in text


@pytest.mark.parametrize("preset", ["tnl", "paper", "none"])
def test_layer_map_decays_are_those_of_the_lightning_layers(preset):
    """Of freq 2: the decays of layers 1 and 3; the softmax layers 2 and 4 have none."""
    options = LightningOptions(decay=preset)
    decays = torch.cat([decay_of(options, 4, layer, 4) for layer in (1, 3)])
    low, high, life = re.search(
        rf"decay {preset}: log_decay (\S+) to (\S+) per token, half-life (.*) tokens",
        layer_map(transformer_config(linear_attention_freq=2), options),
    ).groups()
    assert float(low) == pytest.approx(float(decays.min()), rel=5e-3)
    assert float(high) == pytest.approx(float(decays.max()), rel=5e-3, abs=1e-9)
    halves = ["infinitely many" if x == 0 else f"{-math.log(2) / float(x):.3g}" for x in (decays.min(), decays.max())]
    assert life == " to ".join(halves)


SIZES = {
    "defaults": (dict(), dict()),
    "bias": (dict(add_bias_linear=True), dict(num_kv_heads=2, value_head_dim=32)),
    "qkv-bias": (dict(add_qkv_bias=True, num_query_groups=2), dict(gate="none", norm="all")),
    "qk-norm": (dict(qk_layernorm=True), dict(qk_norm=True, norm_affine=False)),
    "qk-layernorm": (dict(qk_layernorm=True, normalization="LayerNorm"), dict(norm="none")),
    "qk-l2-norm": (dict(qk_layernorm=True, qk_l2_norm=True), dict(key_head_dim=32)),
    "latent": (dict(), dict()),
    "latent-queries": (dict(q_lora_rank=None, qk_layernorm=False, add_bias_linear=True), dict()),
    "softmax-gate": (dict(attention_output_gate=True), dict(norm="group", norm_groups=2)),
}


def check_parameter_counts(rank: int, world: int) -> None:
    layers.start()
    for name, (config, options) in SIZES.items():
        make = latent_config if name.startswith("latent") else transformer_config
        config, options = make(**dict(linear_attention_freq=2) | config), LightningOptions(**options)
        decoder = gpt(config, make_spec(options)).decoder
        counted = [sum(p.numel() for p in layer.self_attention.parameters()) for layer in decoder.layers[:2]]
        text = layer_map(config, options)
        assert f"attention parameters a layer: lightning {counted[0]:,}, softmax {counted[1]:,}\n" in text, (
            name,
            counted,
            text,
        )


def test_layer_map_counts_the_parameters_of_the_modules():
    spawn(check_parameter_counts, 1)


# ---- modules ---------------------------------------------------------------------------------------------------------


def loss_of(model: GPTModel) -> torch.Tensor:
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(32).expand(2, 32)
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()


def check_options_reach_modules(rank: int, world: int) -> None:
    layers.start()
    config = transformer_config(linear_attention_freq=[1, 0, 1, 1], layernorm_epsilon=1e-3)
    options = LightningOptions(
        decay="paper", feature_map="none", num_kv_heads=2, key_head_dim=32, value_head_dim=48, scale=0.3, rope=True,
        qk_norm=True, norm="all", norm_eps=0.02, gate="none", backend="torch",
    )  # fmt: skip
    changed = dataclasses.replace(options, gate="linear")
    for layer_spec, wanted in (
        (make_spec(options), options),
        (make_spec(**vars(options)), options),
        (make_spec(options, gate="linear"), changed),
        (ModuleSpec(lightning_layer_spec.module, params={"options": options}), options),
    ):
        model = gpt(config, layer_spec)
        kinds = [type(layer.self_attention) for layer in model.decoder.layers]
        assert kinds == [LightningAttention, DynamicSelfAttention, LightningAttention, LightningAttention]
        for number in (1, 3, 4):
            mixer = model.decoder.layers[number - 1].self_attention
            assert mixer.options == wanted and mixer.layer_number == number
            assert torch.equal(mixer.log_decay, decay_of(wanted, 4, number, 4).float())
            assert (mixer.scale, mixer.q_norm.eps, mixer.out_norm.eps) == (0.3, 0.02, 0.02)
        assert loss_of(model).isfinite()


def test_options_reach_the_modules():
    spawn(check_options_reach_modules, 1)


@pytest.mark.parametrize("freq", [None, 2, [0, 1, 1, 1]])
def test_single_layer_spec_is_lightning_wherever_softmax_layers_are(freq):
    config, options = transformer_config(linear_attention_freq=freq), LightningOptions(gate="none")
    attention = get_lightning_layer_spec(config, options).submodules.self_attention
    assert attention.module is LightningAttention and attention.params == {"options": options, "layout": "zigzag"}
    assert config.linear_attention_freq == freq


def check_uncalled_spec(rank: int, world: int) -> None:
    layers.start()
    config = transformer_config(linear_attention_freq=2)
    block, uncalled = gpt(config, lightning_spec), gpt(config, lightning_layer_spec)
    assert list(block.state_dict()) == list(uncalled.state_dict())
    uncalled.load_state_dict(block.state_dict())
    losses = loss_of(block), loss_of(uncalled)
    assert torch.equal(*losses), losses
    for model, loss in zip((block, uncalled), losses, strict=True):
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    for (name, a), b in zip(block.named_parameters(), uncalled.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_uncalled_spec_builds_the_same_model():
    spawn(check_uncalled_spec, 1)


def check_moe(rank: int, world: int) -> None:
    layers.start()
    config = transformer_config(
        linear_attention_freq=[1, 0, 0, 1],
        num_moe_experts=4,
        moe_layer_freq=2,
        moe_router_load_balancing_type="none",
        moe_ffn_hidden_size=64,
    )
    model = gpt(config, lightning_spec)
    parts = [(type(layer.self_attention), isinstance(layer.mlp, MoELayer)) for layer in model.decoder.layers]
    assert parts == [
        (LightningAttention, True), (DynamicSelfAttention, False),
        (DynamicSelfAttention, True), (LightningAttention, False),
    ]  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 1, losses


def test_moe_trains():
    spawn(check_moe, 1)


# ---- what must not go unnoticed --------------------------------------------------------------------------------------


def check_broken_imports(rank: int, world: int) -> None:
    names = ("lightning_megatron.spec", "lightning_spec")

    def forget():
        for module in [m for m in sys.modules if m.startswith("lightning_megatron")]:
            del sys.modules[module]

    try:
        assert import_module(("no_such_package", "spec")) is None  # in 0.19; 0.20 raises
    except ImportError:
        pass
    for broken in ("lightning_megatron.ops", "lightning_megatron.mixer", "megatron.core.transformer.spec_utils"):
        forget()
        kept = sys.modules.get(broken)
        sys.modules[broken] = None
        with pytest.raises(RuntimeError, match=f"lightning_megatron.spec cannot be used, an import failed: .*{broken}"):
            import_module(names)
        del sys.modules[broken]
        if kept is not None:
            sys.modules[broken] = kept
    forget()
    package_info = importlib.import_module("megatron.core.package_info")
    version, package_info.VERSION = package_info.VERSION, (0, 12, 0)
    with pytest.raises(RuntimeError, match="needs megatron-core >=0.19,<0.21, but found .*pip install"):
        import_module(names)
    package_info.VERSION = version
    forget()
    assert callable(import_module(names))


def test_broken_import_is_no_import_error():
    """Megatron 0.19 logs an ImportError of a --spec module and goes on with softmax attention."""
    spawn(check_broken_imports, 1)


@pytest.fixture
def megatron_args(monkeypatch):
    """The arguments of a training by the own entry point in progress, as far as the announcement reads them."""
    args = SimpleNamespace(create_attention_mask_in_dataloader=False, rank=0, lightning_key_head_dim=None)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    counted = []
    monkeypatch.setattr(patches.flops, "apply", counted.append)
    monkeypatch.setattr(patches.checkpoint_args, "apply", lambda: None)
    monkeypatch.setattr(patches.dynamic_inference, "apply", lambda: None)
    return args, counted


def test_prepare_prints_the_map_once_and_patches_the_flops_count(megatron_args, capsys, caplog):
    args, counted = megatron_args
    options = LightningOptions(gate="linear")
    config = transformer_config(
        pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, virtual_pipeline_model_parallel_size=2
    )
    for _ in range(2):
        assert prepare(config, options) == "zigzag"
    for vp_stage in (0, 1):
        spec.get_hybrid_block_spec(config, options, vp_stage=vp_stage, pp_rank=0)
    assert capsys.readouterr().out.count(layer_map(config, options)) == 1
    assert counted == [options]
    assert not caplog.records
    assert args.lightning_function == function_record(config, options, args), "Megatron saves its args in checkpoints"
    prepare(config, LightningOptions(gate="none"))
    assert "gate none" in capsys.readouterr().out and len(counted) == 2, "another model is announced again"


def check_builders(rank: int, world: int) -> None:
    """Builders print, log and patch nothing, and say so where a layer is built without ``prepare``."""
    import contextlib
    import io

    layers.start()
    before = {symbol: _resolve(symbol) for module in patches.ALL for symbol in module.SYMBOLS}
    config, out = transformer_config(linear_attention_freq=2), io.StringIO()
    with contextlib.redirect_stdout(out):
        block = spec.get_hybrid_block_spec(config)
        spec.get_lightning_layer_spec(config)
    assert out.getvalue() == ""
    assert {symbol: _resolve(symbol) for symbol in before} == before
    records = []
    logging.getLogger("lightning_megatron").addFilter(lambda record: records.append(record.getMessage()))
    gpt(config, block)
    assert any("without lightning_megatron.runtime.prepare" in text for text in records), records
    records.clear()
    prepare(config)
    gpt(config, block)
    assert not any("without" in text for text in records), records


def _resolve(symbol: str):
    owner, _, name = symbol.rpartition(".")
    if symbol in patches.mtp_without_te.SYMBOLS:  # which Megatron 0.19 does not have
        return getattr(_replace._owner(owner), name, None)
    return getattr(_replace._owner(owner), name)


def test_builders_are_pure():
    spawn(check_builders, 1)


def check_stages(rank: int, world: int) -> None:
    """Every pipeline stage is patched, not only the first layer's, in a program of one's own and by either spec."""
    from megatron.core import tensor_parallel

    layers.start(pp=2)
    config = transformer_config(
        pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, context_parallel_size=2,
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1,
    )  # fmt: skip
    assert not hasattr(tensor_parallel.checkpoint, _replace.MARKER)
    prepare(config)
    assert hasattr(tensor_parallel.checkpoint, _replace.MARKER)


def test_every_stage_is_patched():
    spawn(check_stages, 2)


def test_prepare_warns_of_the_attention_mask(megatron_args, caplog):
    args, _ = megatron_args
    args.create_attention_mask_in_dataloader = True
    with caplog.at_level(logging.WARNING):
        prepare(transformer_config())
    (record,) = caplog.records
    assert (
        "builds a seq_length x seq_length attention mask" in record.getMessage()
        and "--no-create-attention-mask" in record.getMessage()
    )
    caplog.clear()
    args.rank = 1
    prepare(transformer_config())
    assert not caplog.records


def test_prepare_refuses_reset_attention_mask(megatron_args):
    args, counted = megatron_args
    args.reset_attention_mask = True
    with pytest.raises(
        ValueError, match="--reset-attention-mask has no effect .*use --dataloader-inter-document-masking"
    ):
        prepare(transformer_config())
    assert not counted


@pytest.mark.parametrize("sft, layout", [(False, "zigzag"), (True, "zigzag-documents")])
def test_the_loader_decides_the_layout(megatron_args, sft, layout):
    args, _ = megatron_args
    args.sft = sft
    assert prepare(transformer_config()) == layout
    assert prepare(transformer_config(), layout=layout) == layout
    with pytest.raises(
        ValueError, match=f"layout='contiguous', but Megatron's data loader cuts sequences as '{layout}'"
    ):
        prepare(transformer_config(), layout="contiguous")


def test_apex_without_its_kernels_is_not_taken(monkeypatch):
    """Its module of norms imports without them, and ends in the first forward."""
    from lightning_megatron import norm

    config = transformer_config(normalization="LayerNorm")
    monkeypatch.setattr(norm, "importable", lambda name: name.startswith("apex"))
    assert norm.layer_norm(config) is norm.TorchNorm
