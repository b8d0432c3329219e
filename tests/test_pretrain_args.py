"""The command line of the own entry point, and what its training loop calls. No process group, no training."""

import dataclasses
import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.training import arguments as megatron_arguments

from lightning_megatron import pretrain
from lightning_megatron.config import LightningOptions
from lightning_megatron.training import arguments, data, run
from lightning_megatron.training.arguments import add_arguments, options_from_args, parts_in_use
from lightning_megatron.training.refusals import refuse
from tests.helpers.arguments import ASKING, MODEL

KERNELS = {
    "apply_rope_fusion": ("--rope-fusion", "--no-rope-fusion", True),
    "no_persist_layer_norm": ("--persist-layer-norm", "--no-persist-layer-norm", False),
    "masked_softmax_fusion": ("--masked-softmax-fusion", "--no-masked-softmax-fusion", True),
    "gradient_accumulation_fusion": ("--gradient-accumulation-fusion", "--no-gradient-accumulation-fusion", True),
}


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly the optional packages whose names start so are installed."""

    def pretend(*names):
        for module in ASKING:
            monkeypatch.setattr(module, "importable", lambda name: name.startswith(names) if names else False)

    return pretend


EVERYTHING = ("transformer_engine", "apex", "scaled", "fused")


# ---- flags and defaults ----


def test_options_default(parse):
    assert options_from_args(parse()) == LightningOptions()


EVERY_OPTION = (
    LightningOptions(
        decay="minimax", decay_offset=-1, feature_map="none", num_kv_heads=2, key_head_dim=8, value_head_dim=24,
        scale=1.0, rope=True, rotary_percent=0.5, qk_norm=True, norm="group", norm_groups=2, norm_affine=False,
        norm_eps=1e-6, gate="linear", backend="torch", cp_exchange="ring", cp_keep_states=False,
    ),
    LightningOptions(
        lrpe_layers=2, attn_alpha=3.5, attn_beta=0.5, softmax_alpha=2.5, softmax_beta=0.25, mlp_alpha=1.5,
        mlp_beta=0.75, layernorm_affine=False, bilinear_glu=True, embedding_scale=8.0,
        recompute_qkv=True, recompute_chunk=64, offload_activations=True, log_norms=True, peak_tflops=165.0,
        checksums=False, mtp_attention="lightning",
    ),
)  # fmt: skip


def test_options_all_flags(parse):
    default, tested = LightningOptions(), set()
    for wanted in EVERY_OPTION:
        flags = []
        for field in dataclasses.fields(wanted):
            value, name = getattr(wanted, field.name), field.name.replace("_", "-")
            if value == getattr(default, field.name):
                continue
            tested.add(field.name)
            switch = {True: f"--lightning-{name}", False: f"--no-lightning-{name}"}
            flags.append(switch[value] if isinstance(value, bool) else f"--lightning-{name} {value}")
        assert options_from_args(parse(" ".join(flags))) == wanted
    assert tested == {field.name for field in dataclasses.fields(default)}


def test_help_names_every_option(parse, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(LightningOptions):
        assert "--lightning-" + field.name.replace("_", "-") in text
    assert "--tensor-model-parallel-size" in text


def test_defaults_with_nothing_installed(parse, installed):
    installed()
    args = parse()
    refuse(args)
    assert args.transformer_impl == "local"
    assert args.no_persist_layer_norm
    assert not (args.apply_rope_fusion or args.masked_softmax_fusion or args.gradient_accumulation_fusion)
    assert not args.create_attention_mask_in_dataloader


def test_defaults_with_everything_installed(parse, installed):
    installed(*EVERYTHING)
    args = parse()
    refuse(args)
    assert args.transformer_impl == "transformer_engine"
    assert not args.no_persist_layer_norm
    assert arguments.args_defaults(args)["apply_rope_fusion"]
    assert args.masked_softmax_fusion and args.gradient_accumulation_fusion
    assert not args.create_attention_mask_in_dataloader


def test_defaults_with_transformer_engine_alone(parse, installed):
    installed("transformer_engine")
    args = parse()
    refuse(args)
    assert args.transformer_impl == "transformer_engine"
    assert not args.gradient_accumulation_fusion  # the output layer is Megatron's own, and that needs apex


@pytest.mark.parametrize(
    "flags, on",
    [
        ("", True),
        ("--multi-latent-attention --rope-type yarn", True),
        ("--multi-latent-attention", True),  # Megatron's default is yarn
        ("--multi-latent-attention --rope-type rope", False),
        ("--multi-latent-attention --rope-type yarn --no-rope-fusion", None),
        ("--multi-latent-attention --rope-type rope --rope-fusion", None),
    ],
)
def test_rope_fusion_is_off_where_megatron_has_no_kernel(parse, installed, flags, on):
    """Megatron refuses the fusion for latents without YaRN, and is asked for it unless the user says so."""
    installed("transformer_engine")
    assert arguments.args_defaults(parse(flags)).get("apply_rope_fusion") is on
    installed()
    assert "apply_rope_fusion" not in arguments.args_defaults(parse("--multi-latent-attention --rope-type rope"))


@pytest.mark.parametrize("attribute", KERNELS)
def test_user_overrides_kernel_defaults(parse, installed, attribute):
    flag, against, on = KERNELS[attribute]
    installed(*EVERYTHING)
    assert getattr(parse(against), attribute) is not on
    assert getattr(parse(f"{against} {flag}"), attribute) is on
    installed()
    args = parse(flag)
    assert getattr(args, attribute) is on
    with pytest.raises(ValueError, match=f"{flag} needs .* does not import.*{against}"):
        refuse(args)


def test_user_overrides_other_defaults(parse, installed):
    installed(*EVERYTHING)
    args = parse("--transformer-impl local --create-attention-mask-in-dataloader")
    assert args.transformer_impl == "local" and args.create_attention_mask_in_dataloader
    assert not parse(
        "--create-attention-mask-in-dataloader --no-create-attention-mask-in-dataloader"
    ).create_attention_mask_in_dataloader
    reshardable = {"dist_ckpt_optim_fully_reshardable": False}
    wanted = {"eval_interval": sys.maxsize, "eval_iters": 100, "tokenizer_type": "NullTokenizer"} | reshardable
    rope = {"apply_rope_fusion": True}
    assert arguments.args_defaults(args) == wanted | rope
    args = parse("--eval-interval 5 --eval-iters 7 --tokenizer-type HuggingFaceTokenizer")
    assert arguments.args_defaults(args) == reshardable | rope


@pytest.mark.parametrize(
    "flags, value",
    [
        ("", False),
        ("--use-distributed-optimizer", True),
        ("--use-distributed-optimizer --no-dist-ckpt-optim-fully-reshardable", False),
        (
            "--use-distributed-optimizer --no-dist-ckpt-optim-fully-reshardable --dist-ckpt-optim-fully-reshardable",
            True,
        ),
        ("--use-distributed-optimizer --non-persistent-ckpt-type local", False),
        ("--use-distributed-optimizer --non-persistent-ckpt-type local --dist-ckpt-optim-fully-reshardable", True),
    ],
)
def test_optimizer_checkpoints_are_reshardable(parse, flags, value):
    """... as far as Megatron lets them; what the user says wins."""
    args = parse(flags)
    defaults = arguments.args_defaults(args)
    given = args.dist_ckpt_optim_fully_reshardable
    assert (defaults["dist_ckpt_optim_fully_reshardable"] if given is None else given) is value


def test_parts_in_use(parse, installed):
    installed()
    line = parts_in_use(parse(), "TorchNorm")
    assert "\n" not in line and "linear layers megatron-core local" in line and "layer norms TorchNorm" in line
    assert "gradient accumulation fusion off" in line and "torch 2." in line
    assert ("rotary positions lightning_megatron" if torch.cuda.is_available() else "rotary positions torch") in line
    assert "rotary positions lightning_megatron;" in parts_in_use(parse("--lightning-backend triton"), "TorchNorm")
    installed(*EVERYTHING)
    line = parts_in_use(parse(), "TENorm")
    assert "linear layers TransformerEngine" in line and "gradient accumulation fusion apex" in line
    own = "--no-rope-fusion --lightning-backend triton"
    assert "rotary positions lightning_megatron;" in parts_in_use(parse(own), "TENorm")
    line = parts_in_use(parse(f"{own} --multi-latent-attention"), "TENorm")
    assert "rotary positions lightning_megatron (of latents: torch);" in line


def test_checkpoint_brings_what_decides_the_function(parse):
    """--use-checkpoint-args: of checkpoints of any age, and what the user gives wins."""
    saved = parse("--lightning-scale 1 --lightning-backend torch --norm-epsilon 1e-6 --linear-attention-freq 3")
    del saved.lightning_gate  # an older version
    brought = arguments.defaults_from_checkpoint(saved)
    assert not {"lightning_backend", "lightning_cp_exchange", "micro_batch_size", "lr"} & brought.keys()
    parse("--lightning-decay paper")  # sets sys.argv
    args = megatron_arguments.parse_args(functools.partial(add_arguments, checkpoint=brought))
    assert options_from_args(args) == LightningOptions(scale=1.0, decay="paper")
    assert args.layernorm_epsilon == 1e-6 and args.linear_attention_freq == 3
    saved = SimpleNamespace(num_layers=3, spec=["my_module", "my_spec"], linear_attention_freq=3)
    assert arguments.defaults_from_checkpoint(saved) == {"linear_attention_freq": 3}


# ---- refusals ----

REFUSALS = [
    ("--spec lightning_megatron.spec hybrid", ["--spec", "pretrain_gpt.py"]),
    ("--reset-attention-mask", ["--reset-attention-mask", "--dataloader-inter-document-masking"]),
    ("--experimental-attention-variant gated_delta_net", ["gated_delta_net", "--linear-attention-freq"]),
    ("--hybrid-override-pattern L-*-", ["--hybrid-layer-pattern"]),
    (
        "--dataloader-inter-document-masking --pipeline-model-parallel-size 2 --micro-batch-size 4",
        ["--micro-batch-size 1", "not 4"],
    ),
    (
        "--num-experts 4 --tensor-model-parallel-size 2",
        ["--num-experts 4 with --tensor-model-parallel-size 2 trains with --sequence-parallel only: add that"],
    ),
    ("--attention-backend local", ["--transformer-impl local"]),
    ("--save there", ["--save there needs --save-interval N", "leave --save out"]),
    ("--save there --save-interval 0", ["--save-interval N", "not 0"]),
    ("--transformer-impl transformer_engine", ["TransformerEngine", "--transformer-impl local"]),
    ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model /no/such/dir", ["--tokenizer-model /no/such/dir"]),
    ("--tokenizer-type SentencePieceTokenizer --tokenizer-model missing.model", ["missing.model"]),
    ("--lightning-norm-groups 2", ["--lightning-norm-groups 2", "use --lightning-norm group"]),
]  # fmt: skip


@pytest.mark.parametrize("flags, words", REFUSALS, ids=[flags.split()[0] for flags, _ in REFUSALS])
def test_main_refuses(parse, installed, capsys, flags, words):
    installed()
    parse(flags)  # sets sys.argv
    with pytest.raises(SystemExit) as exit:
        pretrain.main()
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("lightning-pretrain: ") and len(message.splitlines()) == 1
    assert all(word in message for word in words), message


def test_refuses_missing_data(parse):
    without = MODEL.replace("--mock-data", "")
    with pytest.raises(ValueError, match="--data-path PREFIX .* or --mock-data"):
        refuse(parse(model=without))
    with pytest.raises(ValueError, match=r"no /no/such\.idx"):
        refuse(parse("--data-path 0.5 /no/such", model=without))


def test_refuses_missing_tokenizer(parse, tmp_path):
    (tmp_path / "text.idx").touch()
    without = MODEL.replace("--mock-data", "")
    with pytest.raises(ValueError, match="--tokenizer-type"):
        refuse(parse(f"--data-path {tmp_path}/text", model=without))
    with pytest.raises(ValueError, match="--vocab-size"):
        refuse(parse(model=MODEL.replace("--vocab-size 128", "")))
    refuse(parse("--tokenizer-type HuggingFaceTokenizer --tokenizer-model some/name"))  # may be on the hub


@pytest.mark.parametrize(
    "flags, value",
    [("--lightning-decay fast", "'fast'"), ("--yaml-cfg some.yaml", "some.yaml"), ("--no-such 1", "--no-such")],
)
def test_argparse_error_is_short(parse, capsys, flags, value):
    with pytest.raises(SystemExit) as exit:
        parse(flags)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert value in message and len(message.splitlines()) < 5


def test_bare_assert_of_megatron_names_flags(parse, installed, capsys):
    installed()
    parse("--weight-decay-incr-style linear")
    with pytest.raises(SystemExit) as exit:
        pretrain.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "lightning-pretrain: Megatron checks `args.start_weight_decay is not None`, which does not hold (given: "
        "--start-weight-decay not given; change one of them)\n"
    )


def test_unexpected_error_keeps_its_traceback(parse, monkeypatch):
    parse()
    monkeypatch.setattr(run, "configure", lambda: {}["bug"])
    with pytest.raises(KeyError):
        pretrain.main()


# ---- what the training loop calls ----


def test_embedding_ranks():
    config = TransformerConfig(num_layers=4, hidden_size=8, num_attention_heads=2)
    assert run.embedding_ranks(config, True, [3]) == [3]
    assert run.embedding_ranks(config, True, [0, 2, 4]) == [0, 4]
    assert run.embedding_ranks(config, False, [0, 2, 4]) == [0]
    config.mtp_num_layers = 1
    assert run.embedding_ranks(config, False, [0, 2, 4]) == [0, 4]


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--sft", 128),
        ("--sft --context-parallel-size 2", 64),
        ("--sft --tensor-model-parallel-size 2 --sequence-parallel", None),
        ("--dataloader-inter-document-masking", 128),
        ("--dataloader-inter-document-masking --context-parallel-size 2", None),  # cuts all samples as one sequence
    ],
)
def test_tokens_of_a_sample(flags, wanted, parse):
    assert data.tokens_per_sample(parse(f"--seq-length 128 {flags}")) == wanted


def test_packed_seq_params():
    batch = dict.fromkeys(data._BATCH)
    assert data.packed_seq_params(batch, 8) is None
    batch.update(cu_seqlens=torch.tensor([[0, 3, 8]], dtype=torch.int32), max_seqlen=torch.tensor([5]))
    params = data.packed_seq_params(batch, 8)
    assert params.cu_seqlens_q.tolist() == [0, 3, 8] and params.max_seqlen_q == 5 and params.cu_seqlens_q_padded is None
    batch["cu_seqlens_padded"] = torch.tensor([[0, 4, 8]], dtype=torch.int32)
    params = data.packed_seq_params(batch, 8)
    assert params.cu_seqlens_kv.tolist() == params.cu_seqlens_kv_padded.tolist() == [0, 4, 8]
