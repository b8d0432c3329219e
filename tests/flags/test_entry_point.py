"""Flags that the own entry point alone honours, refuses or names in the log."""

import json
import socket

import pytest
import torch
from megatron.training import arguments as megatron_arguments
from megatron.training.argument_utils import core_transformer_config_from_args

from lightning_megatron import pretrain
from lightning_megatron.config import LightningOptions, lightning_pattern, resolve_shape
from lightning_megatron.training.arguments import args_defaults, has_validation_data, notes, options_from_args
from lightning_megatron.training.refusals import refuse as refuse_flags
from tests.helpers.arguments import MODEL


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


@pytest.mark.parametrize("kind, counts", [("NullTokenizer", True), ("SentencePieceTokenizer", False)])
def test_vocabulary_that_is_not_read(parse, without, kind, counts):
    without("transformer_engine", "apex", "scaled", "fused")
    assert ("--vocab-size 128 is not read" in "".join(notes(parse(f"--tokenizer-type {kind}")))) is not counts


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


def test_sft_needs_transformers(parse, without):
    without("transformers", "transformer_engine", "apex", "scaled", "fused")
    with pytest.raises(ValueError, match="--sft .*pip install transformers"):
        refuse_flags(parse("--sft"))
    refuse_flags(parse())


@pytest.mark.parametrize("flags", [
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /no/such", "--vocab-file /no/such", "--data-path /no/such",
    "--sft --data-path /no/such", "--te-precision-config-file /no/such", "--per-dataset-sequences-path /no/such",
    "--tp-comm-overlap-cfg /no/such",
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
        ("--experimental-attention-variant gated_delta_net", "chooses another attention"),
        ("--linear-num-key-heads 16", "--lightning-num-kv-heads"),
    ):
        parse(given)
        with pytest.raises(SystemExit) as exit:
            pretrain.main()
        message = capsys.readouterr().err
        assert exit.value.code == 2 and words in message and len(message.splitlines()) == 1, message


def test_pattern_at_its_bound():
    assert lightning_pattern(4, 4) == [True, True, True, False]
