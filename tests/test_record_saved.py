"""What checkpoints tell that hold no record of their function, and which folders can be loaded. Nothing is trained."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace

import pytest
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args

from lightning_megatron.checkpoint_folder import CheckpointError, check_folder
from lightning_megatron.config import LightningOptions
from lightning_megatron.record import differences, function_record, options_from_args
from lightning_megatron.resume import check, misfit
from lightning_megatron.resume.function import padded_by_tensor_parallelism
from lightning_megatron.saved import saved_function

# ---- the vocabulary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "saved, now, same",
    [
        ((384, 1, 128), (512, 2, 128), True),  # 257 to 384 tokens
        ((512, 2, 128), (384, 1, 128), True),
        ((384, 1, 128), (1024, 2, 128), False),
        ((256, 1, 128), (384, 1, 128), False),
        ((384, 1, 128), (384 + 128, 1, 64), False),  # another divisor is a flag that was given
        ((300, 1, 128), (512, 2, 128), False),  # given
    ],
)
def test_padding_by_tensor_parallelism_alone(saved, now, same):
    names = ("padded_vocab_size", "tensor_model_parallel_size", "make_vocab_size_divisible_by")
    saved, now = (Namespace(**dict(zip(names, values, strict=True))) for values in (saved, now))
    assert padded_by_tensor_parallelism(saved, now) == same


# ---- checkpoints without a record ------------------------------------------------------------------------------------

SAVED = dict(
    num_layers=4, hidden_size=64, num_attention_heads=4, kv_channels=16, linear_attention_freq=2, num_experts=None,
    group_query_attention=False, num_query_groups=1, layernorm_epsilon=1e-5, normalization="RMSNorm", swiglu=True,
    squared_relu=False, quick_geglu=False, use_mup=False, mtp_num_layers=None, position_embedding_type="rope",
    rotary_base=10000, window_size=None, window_attn_skip_freq=None, spec=None,
)  # fmt: skip
MEGATRON = Namespace(position_embedding_type="rope", rotary_base=10000)


def running(options=None, **fields):
    base = dict(
        linear_attention_freq=2, num_layers=4, hidden_size=64, num_attention_heads=4, normalization="RMSNorm",
        activation_func=F.silu, gated_linear_unit=True, add_bias_linear=False,
    )  # fmt: skip
    return function_record(TransformerConfig(**base | fields), options or LightningOptions(), MEGATRON)


def test_own_entry_point_before_records():
    """Its flags tell, as many as there were; those that are gone or free do not matter."""
    saved = Namespace(**SAVED, lightning_decay="minimax", lightning_scale=1.0, lightning_cp_layout="zigzag")
    options = LightningOptions(decay="minimax", scale=1.0)
    assert options_from_args(saved) == options
    found = saved_function(saved)
    assert found.options == options and differences(found.record, running(options)) == []
    assert differences(found.record, running(options, linear_attention_freq=4)) == [
        ("--linear-attention-freq", "LsLs", "LLLs")
    ]
    wanted = {
        "--norm-epsilon",
        "--lightning-norm-eps (default --norm-epsilon)",
        "--swiglu, --squared-relu, --quick-geglu",
    }
    other = running(options, layernorm_epsilon=1e-6, activation_func=F.gelu, gated_linear_unit=False)
    assert {flag for flag, _, _ in differences(found.record, other)} == wanted
    assert [flag for flag, _, _ in differences(found.record, running())] == [
        "--lightning-decay, --lightning-decay-offset", "--lightning-scale",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["lightning_spec", "lightning_layer_spec"])
def test_own_spec_before_records(name):
    saved = saved_function(Namespace(**SAVED | {"spec": ["lightning_megatron.spec", name]}))
    assert saved.options == LightningOptions() and differences(saved.record, running()) == []
    assert [flag for flag, _, _ in differences(saved.record, running(LightningOptions(gate="none")))] == [
        "--lightning-gate"
    ]


def test_other_spec_before_records(caplog):
    """What it does is not known, and the log says so; what Megatron's flags say is compared."""
    args = Namespace(**SAVED | {"spec": ["my_module", "my_spec"]})
    saved = saved_function(args)
    assert saved.options is None and not saved.softmax
    assert differences(saved.record, running(linear_attention_freq=4)) == []
    now = Namespace(finetune=False, no_load_optim=True, lightning_function=running(LightningOptions(decay="paper")))
    check({"args": args}, "folder", now)
    assert "Not compared: which layers are lightning, decay, scale" in caplog.text
    assert "--spec my_module my_spec" in caplog.text and "LsLs" in caplog.text and "paper" in caplog.text
    now.lightning_function = running(layernorm_epsilon=1e-6)
    with pytest.raises(CheckpointError, match="--norm-epsilon: 1e-05 in the checkpoint, 1e-06 in this run"):
        check({"args": args}, "folder", now)


PART = dict(optimizer="muon", mtp_num_layers=1, sft=True, num_experts=4)


@pytest.mark.parametrize(
    "there, name, was, now, said",
    [
        ("optimizer", "muon_nesterov", False, True, "--muon-nesterov: off in the checkpoint, on in this run"),
        ("optimizer", "muon_scale_mode", "spectral", "unit_rms_norm", "--muon-scale-mode: spectral in the checkpoint"),
        ("optimizer", "muon_coefficient_type", "quintic", "polar_express", "--muon-coefficient-type: quintic in"),
        ("optimizer", "muon_num_ns_steps", 5, 2, "--muon-num-ns-steps: 5 in the checkpoint, 2 in this run"),
        ("optimizer", "muon_extra_scale_factor", 1.0, 0.1, "--muon-extra-scale-factor: 1.0 in the checkpoint, 0.1 in"),
        ("optimizer", "muon_tp_mode", "blockwise", "duplicated", "--muon-tp-mode: blockwise in the checkpoint"),
        ("optimizer", "muon_split_qkv", True, False, "(off: --muon-no-split-qkv): on in the checkpoint, off in this"),
        ("mtp_num_layers", "mtp_detach_heads", False, True, "--mtp-detach-heads: off in the checkpoint, on in this"),
        ("num_experts", "moe_z_loss_coeff", None, 0.1, "--moe-z-loss-coeff: none in the checkpoint, 0.1 in this run"),
        ("sft", "sft_tokenizer_prompt_format", "default", "identity", "--sft-tokenizer-prompt-format: default in the"),
        ("sft", "lightning_sft_answers_only", False, True, "--lightning-sft-answers-only: off in the checkpoint, on"),
        (None, "tokenizer_model", "a", "b", "--tokenizer-model: a in the checkpoint, b in this run"),
        (None, "apply_wd_to_qk_layernorm", False, True, "--apply-wd-to-qk-layernorm: off in the checkpoint, on"),
    ],
)
def test_other_training_is_named_where_its_part_is_there(there, name, was, now, said, caplog):
    saved = Namespace(**SAVED | dict(spec=["my_module", "my_spec"]), **{name: was})
    args = Namespace(finetune=False, no_load_optim=True, lightning_function=running(), **{name: now})
    check({"args": saved}, "folder", args)
    assert (said in caplog.text) == (there is None)
    caplog.clear()
    vars(args).update(PART if there is None else {there: PART[there]})
    check({"args": saved}, "folder", args)
    assert said in caplog.text


@pytest.mark.parametrize(
    "more, what",
    [
        ({}, "4 softmax layers"),
        (dict(experimental_attention_variant="gated_delta_net"),
         "4 layers of --experimental-attention-variant gated_delta_net"),
    ],
)  # fmt: skip
def test_model_without_lightning_layers(more, what, caplog):
    args = Namespace(**SAVED | more)
    now = Namespace(finetune=False, no_load_optim=True, lightning_function=running())
    with pytest.raises(CheckpointError) as error:
        check({"args": args}, "folder", now)
    assert f"folder has {what} where this run has 2 lightning layers (LsLs)" in str(error.value)
    assert "--finetune" in str(error.value)
    now.finetune = True
    check({"args": args}, "folder", now)
    assert f"--finetune: the checkpoint in folder has {what}" in caplog.text


def test_checkpoint_that_knows_nothing(caplog):
    check({}, "folder", Namespace(finetune=False, no_load_optim=False, lightning_function=running()))
    assert "folder holds no args: whether it computes the same function as this run is not checked" in caplog.text


@pytest.mark.parametrize(
    "more",
    [
        dict(position_embedding_type="yarn", rotary_scaling_factor=4.0, mscale=1.0, mscale_all_dim=0.0),
        dict(group_query_attention=True, num_query_groups=2),
        dict(swiglu=False, squared_relu=True),
        dict(swiglu=False, quick_geglu=True),
        dict(swiglu=False),
        dict(use_mup=True, mup_embedding_mult=2.0, mup_output_mult=1.0),
        dict(num_experts=4, moe_layer_freq=2, moe_router_topk=2, moe_router_load_balancing_type="aux_loss"),
        dict(no_rope_freq=2, window_size=(8, 0), mtp_num_layers=1, linear_attention_freq=4),
    ],
    ids=lambda more: next(iter(more)),
)
def test_derived_record_is_that_of_megatrons_config(more, monkeypatch):
    """What is derived from saved args equals the record of the config that Megatron makes of the same flags."""
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    args = parse_args()
    values = SAVED | dict(lightning_gate="linear", lightning_decay="tnl", ffn_hidden_size=128, params_dtype=None) | more
    for name, value in values.items():
        setattr(args, name, value)
    args.add_bias_linear = args.bias_gelu_fusion = args.apply_rope_fusion = False
    args.moe_ffn_hidden_size = 64 if args.num_experts else None
    config = core_transformer_config_from_args(copy.copy(args))
    record = function_record(config, LightningOptions(gate="linear"), args)
    derived = saved_function(args).record
    missing = record["values"].keys() - derived["values"].keys()
    assert missing <= ({"mup", "softmax_scale"} if args.use_mup else set())
    assert derived["values"] == {key: value for key, value in record["values"].items() if key not in missing}


# ---- folders ---------------------------------------------------------------------------------------------------------


def loading(load, save=None, **more):
    base = dict(
        ckpt_step=None,
        pretrained_checkpoint=None,
        non_persistent_save_interval=None,
        exit_on_missing_checkpoint=False,
        rank=1,  # rank 0 looks into the files, too: test_broken_checkpoints.py
    )
    return Namespace(load=load and str(load), save=save and str(save), **base | more)


def test_folder_to_load(tmp_path):
    other = tmp_path / "other"
    check_folder(loading(None))
    check_folder(loading(other, other))  # the first start of a run
    check_folder(loading(f"{tmp_path}/./other", other))
    check_folder(loading("msc://bucket/run"))
    for wrong in (loading(other), loading(other, tmp_path), loading(other, other, exit_on_missing_checkpoint=True)):
        with pytest.raises(CheckpointError, match=f"--load {other}: no latest_checkpointed_iteration.txt there"):
            check_folder(wrong)
    other.mkdir()
    tracker = other / "latest_checkpointed_iteration.txt"
    for text in ("", "abc", "-1", "1.5", "\ufffd"):
        tracker.write_text(text, "utf-8")
        with pytest.raises(CheckpointError, match="where the number of an iteration .or release. should be"):
            check_folder(loading(other, other))
    tracker.write_text("20\n")
    with pytest.raises(CheckpointError, match="names iter_0000020, which is not there"):
        check_folder(loading(other))
    (other / "iter_0000020").mkdir()
    check_folder(loading(other))
    with pytest.raises(CheckpointError, match="--ckpt-step 3: no iter_0000003 in --load .*there .iter_0000020"):
        check_folder(loading(other, ckpt_step=3))
    check_folder(loading(other, ckpt_step=20))
    check_folder(loading(other, ckpt_step=3, non_persistent_save_interval=5))
    for load in (None, tmp_path / "empty"):  # --load has nothing yet
        check_folder(loading(load, pretrained_checkpoint=str(other)))
        with pytest.raises(CheckpointError, match="--pretrained-checkpoint .*typo: no latest_checkpointed_iteration"):
            check_folder(loading(load, pretrained_checkpoint=f"{other}typo"))
    check_folder(loading(other, pretrained_checkpoint="typo"))  # not read any more
    tracker.write_text("release")
    (other / "release").mkdir()
    check_folder(loading(other))


@pytest.mark.parametrize("fp16", [False, True])
def test_a_missing_state_of_the_optimizer_names_the_remedy(fp16):
    """In fp16 a checkpoint of skipped steps alone has none, whatever the flags of the optimizer."""
    error = RuntimeError("KeyError: 'optimizer.state.exp_avg.x from model not in state dict'")
    said = str(misfit(error, "there", Namespace(fp16=fp16, use_checkpoint_args=False)))
    assert "optimizer.state.exp_avg.x is not in it" in said and "--no-load-optim --no-load-rng" in said
    assert ("until its first step that is not skipped" in said) == fp16
