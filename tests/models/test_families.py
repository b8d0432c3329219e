"""What a config.json of a released model means: there and back, refusals, presets."""

from __future__ import annotations

import random
import re

import pytest
import torch

from lightning_megatron.convert.model import model_of_config
from lightning_megatron.models.family import command_line, family_of
from lightning_megatron.models.presets import PRESETS, preset_config, preset_flags
from lightning_megatron.training.models import family_of_args, parser, readable, saved_args
from tests.helpers import random_models
from tests.helpers.model_cases import KINDS
from tests.helpers.released import args_of, to_megatron
from tests.launch import run_pretrain


def draw_config(kind: str, seed: int) -> dict:
    rng = random.Random(seed)
    if kind in ("minimax", "tnl"):
        return getattr(random_models, f"{kind}_config")(rng)
    return random_models.bailing_config(rng, latent="latent" in kind, experts="experts" in kind)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_identity(rng, kind):
    """Bit for bit, in both directions."""
    config = draw_config(kind, rng.initial_seed())
    args, family = args_of(config), family_of(config)
    units = family.units(args, config)
    theirs = {name: x.bfloat16() for name, x in random_models.draw(units, rng).items()}
    ours = to_megatron(config, args, theirs)
    for unit in units:
        boxes = [
            ours[p.key][tuple(slice(o, o + n) for o, n in zip(p.offset, p.shape, strict=True))] for p in unit.megatron
        ]
        back = unit.to_hf(boxes)
        assert [tuple(x.shape) for x in back] == [named.shape for named in unit.hf]
        for named, x in zip(unit.hf, back, strict=True):
            assert named.optional or torch.equal(x, theirs[named.name]), named.name
        if not any(named.optional for named in unit.hf):
            again = unit.to_megatron(back)
            assert all(torch.equal(x, y) for x, y in zip(again, boxes, strict=True))
    names = [named.name for unit in units for named in unit.hf]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", KINDS)
def test_config_of_args(rng, kind):
    """The args that a config.json gives are recognised, and give a config.json that means the same."""
    config = draw_config(kind, rng.initial_seed())
    args = args_of(config)
    family, again = family_of_args(args)
    assert family is family_of(config)
    assert family.flags(again) == family.flags(config)


def test_another_function_is_no_released_model(rng):
    config = draw_config("bailing", rng.initial_seed())
    with pytest.raises(ValueError) as error:
        family_of_args(args_of(config, "--lightning-decay alibi --lightning-gate linear"))
    message = str(error.value)
    assert "no family of released models has this function" in message
    assert re.search(r"bailing: --lightning-decay, --lightning-decay-offset: \['alibi'", message)
    assert "bailing: --lightning-gate: linear in the checkpoint, sigmoid there" in message


BASES = {
    "bailing": "ring-mini-linear-2.0@tiny", "latent": "ling-2.6-flash@tiny", "minimax": "minimax-m1@tiny",
    "tnl": "tnl-1b@tiny",
}  # fmt: skip
REFUSALS = [
    ("latent", dict(architectures=["BailingMoeV3ForCausalLM"]), "Ling 3.0 .bailing_hybrid. has Kimi Delta Attention"),
    ("latent", dict(linear_attention="kda"), "linear_attention 'kda': Ling 3.0"),
    ("latent", dict(short_conv_kernel_size=4), "short_conv_kernel_size 4: Ling 3.0"),
    ("latent", dict(rope_interleave=False), "rope_interleave is False, and the rotated channels"),
    ("bailing", dict(use_qkv_bias=True), "use_qkv_bias is True, which this package does not have; it may be False"),
    ("bailing", dict(rope_scaling=dict(type="yarn", factor=4)), "rope_scaling is .*yarn"),
    ("bailing", dict(sliding_window=4096), "sliding_window is 4096, and every softmax layer here sees all tokens"),
    ("bailing", dict(head_dim=32), "head_dim is 32, but lightning layers have hidden_size / num_attention_heads = 16"),
    ("bailing", dict(norm_topk_prob=False), "norm_topk_prob is False"),
    ("bailing", dict(num_experts_per_tok=2), "num_experts_per_tok 2 of topk_group 2 groups"),
    ("bailing", dict(hidden_size=None), "hidden_size is missing"),
    ("bailing", dict(num_hidden_layers="5"), "num_hidden_layers is '5'; it must be a whole number from 1 to 10000"),
    ("bailing", dict(num_hidden_layers=5.0), "num_hidden_layers is 5.0; it must be a whole number"),
    ("bailing", dict(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000; it must be"),
    ("bailing", dict(num_attention_heads=0), "num_attention_heads is 0; it must be"),
    ("bailing", dict(num_attention_heads=True), "num_attention_heads is True; it must be"),
    ("bailing", dict(layer_group_size=0), "layer_group_size is 0; it must be"),
    ("bailing", dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan; it must be a number above 0"),
    ("bailing", dict(routed_scaling_factor=10**400), "routed_scaling_factor is 10{59}...; it must be a number"),
    ("bailing", dict(rope_theta=1e4 + 0.5), "rope_theta is 10000.5; it must be a whole number"),
    ("bailing", dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; it must be true or false"),
    ("bailing", dict(model_type=["bailing_hybrid"]), r"model_type is \['bailing_hybrid'\]; it must be text"),
    ("bailing", dict(architectures="X"), "architectures is 'X'; it must be a list of text"),
    ("bailing", dict(rope_parameters=dict(rope_type="yarn")), "rope_parameters is .*yarn.*scaled rotary embeddings"),
    ("bailing", dict(rope_parameters=dict(rope_theta=1e4)), r"rope_theta \d+ and rope_parameters.rope_theta 10000"),
    ("bailing", dict(partial_rotary_factor=None, rotary_dim=8), "rotary_dim is 8, which .* write partial_rotary"),
    ("bailing", dict(linear_attn_config=dict(kda_layers=[1])), r"linear_attn_config has kda_layers \[1\].*\[\] here"),
    ("latent", dict(linear_attn_config=dict(num_heads=8)), "linear_attn_config has num_heads 8, .*it may be 4 here"),
    ("bailing", dict(linear_attn_config=dict(full_attn_layers=[1])), r"full_attn_layers \[1\], .*it may be \[5\] here"),
    ("bailing", dict(linear_attn_config=dict(short_conv_kernel_size=4)), "short_conv_kernel_size 4, .*known are num_h"),
    ("bailing", dict(linear_attn_config="kda"), "linear_attn_config is 'kda', which is not understood; leave it out"),
    ("bailing", dict(num_key_value_heads=3), "num_key_value_heads is 3, which does not divide num_attention_heads 4"),
    ("bailing", dict(num_key_value_heads=8), "num_key_value_heads is 8, which does not divide"),
    ("bailing", dict(layer_group_size=9), "layer_group_size 9 and num_hidden_layers 5 leave no lightning layer among"),
    ("bailing", dict(layer_group_size=1), "layer_group_size 1 and num_hidden_layers 5 leave no lightning layer"),
    ("bailing", dict(partial_rotary_factor=1.5), "partial_rotary_factor 1.5 rotates 24 of the 16 channels"),
    ("bailing", dict(partial_rotary_factor=0.2), "partial_rotary_factor 0.2 rotates 3 of the 16 .* even number from 2"),
    ("bailing", dict(partial_rotary_factor=0.01), "partial_rotary_factor 0.01 rotates 0 of the 16 channels"),
    ("bailing", dict(num_experts_per_tok=17, n_group=1), "num_experts_per_tok is 17, and num_experts is 16; .* most"),
    ("bailing", dict(group_norm_size=3), "group_norm_size is 3, which does not divide num_attention_heads 4; correct"),
    ("latent", dict(group_norm_size=8), "group_norm_size is 8, which does not divide num_attention_heads 4; correct"),
    ("latent", dict(n_group=5), "n_group is 5, which does not divide num_experts 16; correct one of them"),
    ("bailing", dict(n_group=16), "n_group 16 and topk_group 2 of num_experts 16: .* best two experts, needs two"),
    (
        "bailing",
        dict(n_group=4, topk_group=8),
        "n_group 4 and topk_group 8 of num_experts 16: topk_group may be",
    ),
    (
        "bailing",
        dict(n_group=8, topk_group=4, num_experts_per_tok=9),
        "is 9 of the 8 experts in 4 groups of 2",
    ),
    ("bailing", dict(score_function="softmax"), "moe_router_enable_expert_bias is true and score_function softmax"),
    ("minimax", dict(num_experts_per_tok=1), "num_experts_per_tok is 1: .* it must be 2 or more"),
    ("latent", dict(qk_rope_head_dim=7), "qk_rope_head_dim is 7, and pairs of channels turn; it must be even"),
    ("minimax", dict(num_key_value_heads=3), "num_key_value_heads is 3, which does not divide num_attention_heads 4"),
    ("minimax", dict(layer_types=["full_attention"] * 8), "layer_types .* leave no lightning layer among 8 layers"),
    ("minimax", dict(rotary_dim=17), "rotary_dim 17 rotates 17 of the 16 channels"),
    ("minimax", dict(rotary_dim=3), "rotary_dim 3 rotates 3 of the 16 channels of a head, and pairs"),
    ("minimax", dict(num_experts_per_tok=5), "num_experts_per_tok is 5, and num_local_experts is 4; it may be at most"),
    ("minimax", dict(rope_scaling=dict(type="linear", factor=4)), "rope_scaling is .*linear"),
    ("minimax", dict(attn_type_list=[1] * 8), "layer_types and attn_type_list contradict each other"),
    ("minimax", dict(attn_type_list=["0"] * 8), "attn_type_list is .* it must be a list of 0 and 1"),
    ("minimax", dict(rope_parameters=dict(rope_theta=1e7, partial_rotary_factor=0.25)), "rotary_dim 8 says 0.5 of"),
    ("minimax", dict(sliding_window=512), "sliding_window is 512"),
    ("minimax", dict(layer_types=None), "neither layer_types nor attn_type_list is given"),
    ("minimax", dict(layer_types=["linear_attention"]), "layer_types has 1 entries for num_hidden_layers 8"),
    ("minimax", dict(postnorm=False), "postnorm is False, and the residual of this family is the norm's output"),
    ("minimax", dict(shared_intermediate_size=64), "shared_intermediate_size is 64"),
    ("minimax", dict(rope_parameters=dict(rope_type="yarn")), "scaled rotary embeddings are not supported here"),
    ("minimax", dict(model_type="minimax_m2"), "MiniMax-M2 has softmax attention in every layer"),
    ("tnl", dict(norm_type="layernorm"), "norm_type is 'layernorm'"),
    ("tnl", dict(linear_use_lrpe_list=[0, 1, 0]), "the first ones are 1 and all others 0"),
    ("tnl", dict(model_type="minicpm_sala"), "model_type 'minicpm_sala': .*InfLLM-v2 sparse attention"),
    ("tnl", dict(model_type="mamba2"), "model_type 'mamba2': its decay depends on the data"),
    ("tnl", dict(model_type="llama"), "model_type 'llama', .* is no model that is known here"),
]


def test_a_field_of_other_models_may_say_what_the_model_is(caplog):
    config = preset_config(BASES["bailing"])
    said = dict(num_heads=4, head_dim=16, full_attn_layers=[5], linear_attn_layers=[1, 2, 3, 4], kda_layers=[])
    flags = family_of(config).flags(config | dict(linear_attn_config=said | dict(short_conv_kernel_size=None)))
    assert flags == family_of(config).flags(config | dict(linear_attn_config=None)) == family_of(config).flags(config)
    assert "linear_attn_config" not in caplog.text


@pytest.mark.parametrize("base, changes, message", REFUSALS)
def test_refusals(base, changes, message):
    config = preset_config(BASES[base]) | changes
    with pytest.raises(ValueError, match=f"^config.json: .*{message}"):
        family_of(config).flags(config)


def test_refusals_behind_the_flags():
    with pytest.raises(ValueError, match=r"^config.json: dtype is 'bf17'; it must be bfloat16, float16 or float32"):
        model_of_config(preset_config(BASES["minimax"]) | dict(dtype="bf17"))
    words = command_line(preset_flags(BASES["latent"]))
    refused = r"^Megatron refuses this model: num_moe_experts \(16\) should be divisible by"
    with pytest.raises(ValueError, match=refused):
        saved_args([*words, "--moe-router-num-groups", "5"])


def test_angles_as_transformers_5_writes_them():
    config = preset_config(BASES["bailing"])
    later = {name: value for name, value in config.items() if name not in ("rope_theta", "partial_rotary_factor")}
    later["rope_parameters"] = {name: config[name] for name in ("rope_theta", "partial_rotary_factor")}
    later["rope_parameters"]["rope_type"] = "default"
    later["rope_scaling"] = dict(rope_type="default")
    assert family_of(later).flags(later) == family_of(config).flags(config)


def test_unknown_fields_are_named(caplog):
    config = preset_config(BASES["bailing"]) | dict(new_kind_of_norm=True)
    family_of(config).flags(config)
    assert "fields that are not known here and that are ignored: new_kind_of_norm;" in caplog.text


def test_minimax_in_its_first_format():
    """Fields of MiniMax-Text-01 and M1 before transformers renamed them."""
    config = preset_config("minimax-m1")
    first = {name: config[name] for name in config if name not in ("layer_types", "rope_parameters")}
    first = {name: value for name, value in first.items() if not name.endswith("_factor")}
    first |= dict(
        model_type="minimax_m1", architectures=["MiniMaxM1ForCausalLM"], attn_type_list=([0] * 7 + [1]) * 10,
        rope_theta=1e7, postnorm=True, shared_intermediate_size=0, shared_moe_mode="sigmoid",
    )  # fmt: skip
    for part in ("full_attention", "linear_attention", "mlp"):
        first |= {f"layernorm_{part}_alpha": 3.5565588200778455, f"layernorm_{part}_beta": 1.0}
    assert family_of(first).flags(first) == preset_flags("minimax-m1")


def test_decays_by_the_serving_engines(rng):
    """Hugging Face's code has layer - 1 in the slope, vLLM and SGLang have layer: a flag chooses."""
    config = draw_config("bailing", rng.initial_seed())
    records = [
        args_of(config, more).lightning_function["values"]["decay"] for more in ("", "--lightning-decay-offset 1")
    ]
    assert records[0] != records[1]


# ---- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse(name):
    for variant in (name, f"{name}@tiny"):
        words = command_line(preset_flags(variant))
        args = parser().parse_args(words)
        assert args.num_layers == preset_config(variant).get("num_hidden_layers", args.num_layers)
    assert args.hidden_size == 64


def test_readable_numbers():
    assert [readable(x) for x in (999, 16.4e9, 1.01e12, 465e6)] == ["999", "16.4B", "1.01T", "465M"]


RUN = (
    "--seq-length 32 --micro-batch-size 1 --global-batch-size 1 --train-iters 2 --lr 1e-3 --mock-data --log-interval 1 "
    "--eval-iters 0 --num-workers 0"
).split()


@pytest.mark.parametrize("base", ["bailing", "tnl"])  # the others: test_conversion.py
def test_tiny_models_train(base):
    run = run_pretrain(["--lightning-model", BASES[base], *RUN])
    assert len(run.losses) == 2 and all(5 < loss < 6 for loss in run.losses)
    assert f"--lightning-model {BASES[base]}: unless given as flags, --num-layers" in run.log


def test_flags_win_over_the_model():
    flags = "--num-layers 2 --linear-attention-freq 2 --no-untie-embeddings-and-output-weights --no-lightning-rope"
    run = run_pretrain(["--lightning-model", BASES["tnl"], *flags.split(), "--lightning-lrpe-layers", "0", *RUN])
    assert "1 lightning layers (L), 1 softmax layers (s)" in run.log and "LRPE" not in run.log
    assert re.search(r"untie_embeddings_and_output_weights \.+ False", run.log)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lightning-model mistral", "--lightning-model mistral is unknown; choose one of ring-mini-linear-2.0, "),
        ("--lightning-model minicpm-sala", "--lightning-model minicpm-sala: 8 of its 32 layers are InfLLM-v2"),
        ("--lightning-model tnl-1b --use-checkpoint-args", "both choose the model: leave out one"),
    ],
)
def test_models_that_are_refused(flags, message):
    run = run_pretrain(flags.split(), check=False)
    assert not run.ok and message in run.log and "Traceback" not in run.log


def test_list_of_models():
    run = run_pretrain(["--lightning-model", "list"])
    lines = run.log.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("name "))
    assert [line.split()[0] for line in lines[start + 1 : start + len(PRESETS) + 1]] == list(PRESETS)
    assert re.search(r"^ring-mini-linear-2.0 +20 +4 +2048 +16 +8/256 +16.4B +1.6B$", run.log, re.MULTILINE)
    assert "minicpm-sala: 8 of its 32 layers are InfLLM-v2" in run.log
