"""Every flag is honoured, refused before any GPU work, or named in the log: tables for both ways of starting."""

import functools
import json
import logging
import socket
from argparse import Namespace

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.training import arguments as megatron_arguments
from megatron.training import global_vars
from megatron.training.argument_utils import core_transformer_config_from_args

from lightning_megatron import flags as tables
from lightning_megatron import patches, pretrain
from lightning_megatron.config import LightningOptions, lightning_pattern, resolve_shape
from lightning_megatron.flags import warnings_of
from lightning_megatron.mixer import LightningAttention
from lightning_megatron.runtime import prepare, refuse
from lightning_megatron.spec import get_lightning_layer_spec
from lightning_megatron.training import arguments
from lightning_megatron.training.arguments import args_defaults, has_validation_data, notes, options_from_args
from lightning_megatron.training.arguments import refuse as refuse_flags
from tests.helpers.arguments import MODEL, parse_flags
from tests.layers import transformer_config

HYBRID = dict(linear_attention_freq=2)
TE = dict(transformer_impl="transformer_engine")


@pytest.fixture
def parse(monkeypatch):
    return functools.partial(parse_flags, monkeypatch)


@pytest.fixture
def without(monkeypatch):
    """Pretend that no module whose name starts so imports, and that all others do."""

    def pretend(*names):
        for module in (arguments, tables):
            monkeypatch.setattr(module, "importable", lambda name: not name.startswith(names) if names else True)

    return pretend


def model(**changes):
    """A config with ``changes`` past Megatron's own checks, some of which want packages or a GPU."""
    config = transformer_config()
    for name, value in changes.items():
        assert hasattr(config, name) or name == "cp_partition_mode", name
        setattr(config, name, value)
    return config


# ---- both ways of starting: the config, and Megatron's flags ---------------------------------------------------------

# config, options, flags, and what the message says; an entry may start with "te", which pretends TransformerEngine
REFUSED = {
    "fp8": (dict(fp8="hybrid"), {}, {}, "--fp8-format hybrid needs .*use --transformer-impl transformer_engine"),
    "fp4": (dict(fp4="e2m1"), {}, {}, "--fp4-format e2m1 needs .*use --transformer-impl transformer_engine"),
    "recompute-layernorm": (
        dict(recompute_granularity="selective", recompute_modules=["layernorm", "mlp"]), {}, {},
        "--recompute-modules layernorm mlp needs TransformerEngine .*use --recompute-granularity full",
    ),
    "recompute-moe-act": (
        dict(recompute_granularity="selective", recompute_modules=["moe_act"]), {}, {},
        "--recompute-modules moe_act needs",
    ),
    "position-ids-rope": (
        {}, dict(rope=True), dict(reset_position_ids=True, position_embedding_type="rope"),
        "--reset-position-ids has no effect .*use --dataloader-inter-document-masking",
    ),
    "position-ids-none": (
        {}, {}, dict(reset_position_ids=True, position_embedding_type="none"), "--reset-position-ids has no effect",
    ),
    "attention-mask": ({}, {}, dict(reset_attention_mask=True), "--reset-attention-mask has no effect on lightning"),
    "window": (
        dict(window_size=(8, 0)), {}, {},
        r"--window-size \(8, 0\) limits softmax layers, and this model has none",
    ),
    "window-sdpa": (
        HYBRID | dict(window_size=(8, 0)), {}, {},
        r"--window-size \(8, 0\) is not supported .*SDPA; leave it",
    ),
    "softmax-type": (
        dict(softmax_type="learnable"), {}, {},
        "--softmax-type learnable changes .*this model has none; leave",
    ),
    "softmax-type-sdpa": (
        HYBRID | dict(softmax_type="off-by-one"), {}, {},
        "--softmax-type off-by-one is not supported",
    ),
    "qk-clip": (dict(qk_clip=True), {}, {}, "--qk-clip clips .*this model has none; .*--lightning-qk-norm"),
    "qk-clip-sdpa": (
        HYBRID | dict(qk_clip=True), {}, {},
        "--qk-clip .*is not supported by the softmax layers on torch",
    ),
    "rope-without-angles": (
        {}, dict(rope=True), dict(position_embedding_type="learned_absolute"),
        "--position-embedding-type learned_absolute gives no angles to --lightning-rope",
    ),
    "conv": (
        dict(linear_conv_kernel_dim=3), {}, {},
        "--linear-conv-kernel-dim 3 belongs to gated delta net.*leave it out",
    ),
    "cp-partition": (
        dict(context_parallel_size=2, cp_partition_mode="contiguous"), {}, {},
        "--cp-partition-mode contiguous cuts sequences in a way .*use zigzag",
    ),
    "mtp-tied": (
        dict(mtp_num_layers=1, pipeline_model_parallel_size=2), {},
        dict(save="there", untie_embeddings_and_output_weights=False),
        "--mtp-num-layers 1 with tied embeddings .*--untie-embeddings-and-output-weights",
    ),
    "mtp-cp": (dict(mtp_num_layers=1, context_parallel_size=2), {}, {}, "--mtp-num-layers 1 adds .*transformer_engine"),
    "mtp-sp": (
        dict(mtp_num_layers=1, tensor_model_parallel_size=2, sequence_parallel=True), {}, {},
        "--mtp-num-layers 1 adds a softmax",
    ),
    "mtp-packed": (
        dict(mtp_num_layers=1), {}, dict(dataloader_inter_document_masking=True),
        "--mtp-num-layers 1 adds a softmax layer",
    ),
    "mtp-sft": (
        dict(mtp_num_layers=2), {}, dict(sft=True),
        "--mtp-num-layers 2 adds a softmax layer of Megatron's own",
    ),
    "rampup": (
        {}, {}, dict(rampup_batch_size=[16, 8, 300]),
        "--rampup-batch-size 16 8 300 is ignored .*--step-batch-size",
    ),
    "full-validation": ({}, {}, dict(full_validation=True), "--full-validation ends Megatron .*use --eval-iters N"),
    "validation-sets": (
        {}, {}, dict(multiple_validation_sets=True),
        "--multiple-validation-sets needs --full-validation",
    ),
    "freq": (
        dict(linear_attention_freq=5), {}, {},
        "--linear-attention-freq 5 would leave no softmax layer.* is 4.*at most 4",
    ),
    "packed-cp-te": (
        HYBRID | TE | dict(context_parallel_size=2), {}, dict(dataloader_inter_document_masking=True),
        "--dataloader-inter-document-masking with context parallelism .*use --transformer-impl local",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_both_ways(name, without):
    config, options, args, message = REFUSED[name]
    without(*(() if config.get("transformer_impl") else ("transformer_engine",)))
    layout = "zigzag-documents" if args.get("sft") else "zigzag"
    with pytest.raises(ValueError, match=message):
        refuse(model(**config), LightningOptions(**options), layout, Namespace(**args))


ALLOWED = {
    "fp8-te": (TE | dict(fp8="hybrid"), {}, {}),
    "selective-mlp": (dict(recompute_granularity="selective", recompute_modules=["mlp"]), {}, {}),
    "layernorm-te": (TE | dict(recompute_granularity="selective", recompute_modules=["layernorm"]), {}, {}),
    "modules-unused": (dict(recompute_modules=["layernorm"]), {}, {}),
    "position-ids": ({}, {}, dict(reset_position_ids=True, position_embedding_type="learned_absolute")),
    "window-te": (HYBRID | TE | dict(window_size=(8, 0)), {}, {}),
    "window-of-a-lightning-layer": (
        dict(linear_attention_freq=[1, 0, 1, 1], window_size=(8, 0), window_attn_skip_freq=2), {}, {},
    ),
    "mtp": (dict(mtp_num_layers=1), {}, dict(save="there", untie_embeddings_and_output_weights=False)),
    "mtp-untied": (
        dict(mtp_num_layers=1, pipeline_model_parallel_size=2), {},
        dict(save="x", untie_embeddings_and_output_weights=True),
    ),
    "mtp-te": (TE | dict(mtp_num_layers=1, context_parallel_size=2), {}, {}),
    "cp-partition": (dict(context_parallel_size=2, cp_partition_mode="zigzag"), {}, {}),
    "freq": (dict(linear_attention_freq=4), {}, {}),
    "packed-cp": (HYBRID | dict(context_parallel_size=2), {}, dict(dataloader_inter_document_masking=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_beside_what_is_refused(name, without):
    config, options, args = ALLOWED[name]
    without(*(() if config.get("transformer_impl") else ("transformer_engine",)))
    refuse(model(**config), LightningOptions(**options), "zigzag", Namespace(**args))


OWN = dict(lightning_key_head_dim=None)  # what only the own entry point has
LOGGED = {
    "core-attn": (
        dict(recompute_granularity="selective", recompute_modules=["core_attn"]), {}, OWN,
        ["--recompute-modules core_attn recomputes nothing in lightning layers", "--recompute-granularity full"],
    ),
    "window": (
        HYBRID | TE | dict(window_size=(8, 0)), {}, OWN,
        ["--window-size (8, 0) limits the softmax layers only"],
    ),
    "cp-comm": (
        HYBRID | dict(context_parallel_size=2, cp_comm_type="a2a"), {}, OWN,
        ["--cp-comm-type a2a is not read by softmax"],
    ),
    "mup": (
        HYBRID | dict(use_mup=True), {}, OWN,
        ["--use-mup scales the logits of softmax layers only", "--lightning-scale"],
    ),
    "no-positions": (
        {}, {}, OWN | dict(position_embedding_type="rope"),
        ["--position-embedding-type rope rotates q and k of softmax",
         "no position embedding is used; pass --lightning-rope"],
    ),
    "rotary": (
        dict(rotary_interleaved=True), {}, OWN | dict(position_embedding_type="none", rotary_percent=0.5),
        ["--rotary-interleaved, --rotary-percent 0.5: act on rotary embeddings only; no layer"],
    ),
    "softmax-only": (
        dict(
            qk_layernorm=True, attention_dropout=0.2, attention_backend=AttnBackend.flash, attention_output_gate=True,
            log_max_attention_logit=True, num_query_groups=2, cp_comm_type="all_gather",
        ), {}, OWN,
        [
            "--attention-backend flash, --attention-dropout 0.2, --attention-output-gate, --cp-comm-type all_gather, "
            "--log-max-attention-logit, --qk-layernorm, --num-query-groups 2 (for lightning layers: "
            "--lightning-num-kv-heads): act on softmax layers only; this model has none",
        ],
    ),
    "kv-channels": (
        {}, {}, {"rank": 0},
        ["--linear-key-head-dim 128 is Megatron's default", "make_spec(key_head_dim=128)"],
    ),
    "two-key-dims": (
        dict(linear_key_head_dim=32), dict(key_head_dim=64), OWN,
        ["--linear-key-head-dim 32 gives way to the option key_head_dim"],
    ),
    "two-value-dims": (
        dict(linear_value_head_dim=32), dict(value_head_dim=64), OWN,
        ["--linear-value-head-dim 32 gives way to the option"],
    ),
    "mask": (
        {}, {}, OWN | dict(create_attention_mask_in_dataloader=True),
        ["--create-attention-mask-in-dataloader builds", "--no-create-attention-mask-in-dataloader"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGGED)
def test_logged_in_one_line(name):
    config, options, args, words = LOGGED[name]
    (line,) = warnings_of(model(**config), LightningOptions(**options), "zigzag", Namespace(**args))
    assert all(word in line for word in words), line


QUIET = {
    "defaults": ({}, {}, OWN),
    "a-program-of-ones-own": ({}, {}, {}),
    "hybrid": (HYBRID | dict(qk_layernorm=True, attention_output_gate=True, num_query_groups=2), {}, OWN),
    "rope": (
        dict(rotary_interleaved=True), dict(rope=True), OWN | dict(position_embedding_type="rope", rotary_percent=0.5),
    ),
    "hybrid-rope": (HYBRID, {}, OWN | dict(position_embedding_type="rope", rotary_percent=0.5)),
    "key-dims": (dict(linear_key_head_dim=32), dict(key_head_dim=32), OWN),
    "a-hybrid-of-ones-own": (HYBRID | dict(rotary_interleaved=True), {}, {}),
    "spec-with-128": (dict(kv_channels=128), {}, {"rank": 0}),
    "spec-with-option": ({}, dict(key_head_dim=128), {"rank": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", QUIET)
def test_nothing_is_logged_without_need(name):
    config, options, args = QUIET[name]
    assert warnings_of(model(**config), LightningOptions(**options), "zigzag", Namespace(**args)) == []


@pytest.mark.parametrize("flags", ["", "--linear-attention-freq 3", "--group-query-attention --num-query-groups 4"])
def test_megatrons_defaults_are_quiet(parse, flags):
    """What a real command line becomes is neither refused nor named in the log."""
    args = parse(flags)
    megatron_arguments.validate_args(args, args_defaults(args))
    args.params_dtype = torch.float32
    config, options = core_transformer_config_from_args(args), options_from_args(args)
    refuse(config, options, "zigzag", args)
    assert warnings_of(config, options, "zigzag", args) == []


def test_one_layer_of_a_hybrid_with_windows(without):
    """The spec of the lightning layers alone is no model without softmax layers."""
    without("nothing")
    config = model(linear_attention_freq=[1, 0, 1, 1], window_size=(8, 0), window_attn_skip_freq=2)
    assert get_lightning_layer_spec(config).submodules.self_attention.module is LightningAttention


def test_tables_name_fields_and_flags(parse):
    """A misspelt attribute would never speak."""
    known = {*vars(parse()), *vars(transformer_config()), "cp_partition_mode", "heterogeneous_block_specs"}
    named = (
        {*tables.REFUSED_ALWAYS}
        | {rule.attribute for rule in (*tables.REFUSED, *tables.WARNED)}
        | {*tables.SOFTMAX_ONLY, *tables.ROTARY_ONLY}
    )
    assert named <= known, named - known


@pytest.mark.parametrize("rank", [0, 1])
def test_prepare_logs_on_the_first_rank(monkeypatch, caplog, rank):
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", Namespace(rank=rank, **OWN))
    monkeypatch.setattr(patches.flops, "apply", lambda options: None)
    config = model(qk_layernorm=True, log_max_attention_logit=True)
    with caplog.at_level(logging.WARNING, logger="lightning_megatron"):
        prepare(config)
    lines = [record.getMessage() for record in caplog.records]
    assert (
        lines == ["--log-max-attention-logit, --qk-layernorm: act on softmax layers only; this model has none"][rank:]
    )


# ---- the own entry point ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, value", [("", "auto"), ("", "zigzag"), ("--sft", "zigzag-documents"), ("--sft", "auto")]
)
def test_layout_of_old_command_lines(parse, without, flags, value):
    without("transformer_engine", "apex", "scaled", "fused")
    args = parse(f"{flags} --lightning-cp-layout {value}")
    refuse_flags(args)
    (line,) = notes(args)
    assert f"--lightning-cp-layout {value} is no option any more" in line and "leave the flag out" in line
    assert options_from_args(args) == LightningOptions()
    assert not hasattr(args, "lightning_cp_layout")


@pytest.mark.parametrize("flags, value, layout", [
    ("", "contiguous", "zigzag"), ("", "zigzag-documents", "zigzag"), ("--sft", "zigzag", "zigzag-documents"),
])  # fmt: skip
def test_layout_that_the_loader_does_not_cut(parse, without, flags, value, layout):
    without("transformer_engine", "apex", "scaled", "fused")
    with pytest.raises(
        ValueError, match=f"--lightning-cp-layout {value} .*sequences as {layout}, so leave the flag out"
    ):
        refuse_flags(parse(f"{flags} --lightning-cp-layout {value}"))


def test_layout_is_not_in_the_help(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "--lightning-cp-exchange" in text and "cp-layout" not in text


@pytest.mark.parametrize("flags, key, value", [
    ("", 16, 16), ("--linear-key-head-dim 128", 128, 128), ("--linear-value-head-dim 128", 16, 128),
    ("--linear-key-head-dim 32 --linear-value-head-dim 48", 32, 48), ("--lightning-key-head-dim 128", 128, 128),
])  # fmt: skip
def test_a_given_128_is_honoured(parse, flags, key, value):
    """kv-channels is 16 here, and 128 the default of Megatron's flag."""
    args = parse(flags)
    megatron_arguments.validate_args(args, args_defaults(args))
    args.params_dtype = torch.float32
    config = core_transformer_config_from_args(args)
    shape = resolve_shape(config, options_from_args(args), tp=1)
    assert (shape.key_dim, shape.value_dim) == (key, value)
    assert config.kv_channels == 16 and config.linear_key_head_dim == config.linear_value_head_dim == 128


@pytest.mark.parametrize(
    "flag", ["--linear-num-key-heads 16", "--linear-num-value-heads 32", "--linear-conv-kernel-dim 4"]
)
def test_defaults_of_gated_delta_net_given_by_hand(parse, without, flag):
    without("transformer_engine", "apex", "scaled", "fused")
    with pytest.raises(ValueError, match=f"{flag} is refused: "):
        refuse_flags(parse(flag))
    refuse_flags(parse())


REAL = MODEL.replace("--mock-data", "--tokenizer-type NullTokenizer")


@pytest.fixture
def data(tmp_path):
    """Prefix of a dataset, and files that name it for splits."""
    (tmp_path / "text.idx").touch()
    text = str(tmp_path / "text")
    for name, valid in (("with", [text]), ("none", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"train": [text], "valid": valid, "test": None}), "utf-8")
    return text


@pytest.mark.parametrize("flags, there", [
    ("--data-path {text}", True), ("--data-path {text} --split 90,10", True),
    ("--data-path {text} --split 100,0,0", False),
    ("--data-path {text} --split 1", False), ("--train-data-path {text}", False),
    ("--train-data-path {text} --valid-data-path {text}", True),
    ("--per-split-data-args-path {folder}/with.json", True), ("--per-split-data-args-path {folder}/none.json", False),
    ("--mock-data", True), ("--mock-data --split 1,0,0", True),
])  # fmt: skip
def test_evaluation_needs_validation_data(parse, without, data, flags, there):
    without("transformer_engine", "apex", "scaled", "fused")
    flags = flags.format(text=data, folder=data.removesuffix("/text"))
    args = parse(flags, model=REAL)
    refuse_flags(args)
    assert has_validation_data(args) is there
    assert args_defaults(args)["eval_iters"] == (100 if there else 0)
    assert notes(args) == [] if there else "nothing is evaluated (--eval-iters 0)" in "".join(notes(args))
    asked = parse(flags + " --eval-iters 3", model=REAL)
    assert "eval_iters" not in args_defaults(asked) and notes(asked) == []
    if there:
        refuse_flags(asked)
    else:
        with pytest.raises(ValueError, match="--eval-iters 3, but no validation data: give --valid-data-path"):
            refuse_flags(asked)
    refuse_flags(parse(flags + " --eval-iters 0", model=REAL))


def test_sft_needs_datasets(parse, without):
    without("datasets", "transformer_engine", "apex", "scaled", "fused")
    with pytest.raises(ValueError, match="--sft .*pip install datasets"):
        refuse_flags(parse("--sft"))
    refuse_flags(parse())


@pytest.mark.parametrize("flags", [
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /no/such", "--vocab-file /no/such", "--data-path /no/such",
    "--sft --data-path /no/such",
])  # fmt: skip
def test_missing_files_name_the_node(parse, without, monkeypatch, flags):
    without("transformer_engine", "apex", "scaled", "fused")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError) as error:
        refuse_flags(parse(flags, model=REAL))
    message = str(error.value)
    assert f"(rank 3, host {socket.gethostname()}; every node needs the same path)" in message and "/no/such" in message


def test_every_refusal_of_the_entry_point_ends_it(parse, without, capsys):
    """One of each table, through main(): before Megatron builds anything, status 2 and one line."""
    without("transformer_engine", "apex", "scaled", "fused")
    for given, words in (
        ("--reset-attention-mask", "--dataloader-inter-document-masking"),
        ("--rampup-batch-size 1 1 8", "--step-batch-size-schedule"),
        ("--multi-latent-attention", "chooses another attention"),
        ("--linear-num-key-heads 16", "--lightning-num-kv-heads"),
    ):
        parse(given)
        with pytest.raises(SystemExit) as exit:
            pretrain.main()
        message = capsys.readouterr().err
        assert exit.value.code == 2 and words in message and len(message.splitlines()) == 1, message


def test_pattern_at_its_bound():
    assert lightning_pattern(4, 4) == [True, True, True, False]
