"""The command line of the own entry point, the patches, and the FLOPs count. No process group, no training."""

import dataclasses
import functools
import importlib
import os
import re
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from megatron.core import package_info
from megatron.core.datasets import utils as dataset_utils
from megatron.core.transformer import TransformerConfig
from megatron.training import arguments as megatron_arguments
from megatron.training import training as megatron_training

from lightning_megatron import compat, patches, pretrain
from lightning_megatron.config import LightningOptions
from lightning_megatron.patches import _replace, mtp_without_te, packed_rope, recompute
from lightning_megatron.training import arguments, data, run
from lightning_megatron.training.arguments import add_arguments, options_from_args, parts_in_use
from lightning_megatron.training.refusals import refuse
from tests.checkout import python_path
from tests.helpers.arguments import ASKING, MODEL, parse_flags

KERNELS = {
    "apply_rope_fusion": ("--rope-fusion", "--no-rope-fusion", True),
    "no_persist_layer_norm": ("--persist-layer-norm", "--no-persist-layer-norm", False),
    "masked_softmax_fusion": ("--masked-softmax-fusion", "--no-masked-softmax-fusion", True),
    "gradient_accumulation_fusion": ("--gradient-accumulation-fusion", "--no-gradient-accumulation-fusion", True),
}


@pytest.fixture
def parse(monkeypatch):
    """Parse MODEL and more flags as Megatron does."""

    return functools.partial(parse_flags, monkeypatch)


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


# ---- patches ----


@pytest.fixture
def unpatched(monkeypatch):
    """Give the patched symbols back after the test."""
    for symbol in (symbol for patch in patches.ALL for symbol in patch.SYMBOLS):
        owner, _, name = symbol.rpartition(".")
        owner = _replace._owner(owner)
        if symbol in mtp_without_te.SYMBOLS and not hasattr(owner, name):  # not in megatron-core 0.19
            continue
        assert not hasattr(getattr(owner, name), _replace.MARKER), f"{symbol} was patched at import"
        monkeypatch.setattr(owner, name, getattr(owner, name))


def test_patches_are_idempotent_and_logged(unpatched, caplog):
    before = dataset_utils.compile_helpers, megatron_training.num_floating_point_operations
    with caplog.at_level("INFO", logger="lightning_megatron.patches"):
        patches.apply_all(LightningOptions())
        after = dataset_utils.compile_helpers, megatron_training.num_floating_point_operations
        patches.apply_all(LightningOptions(gate="none"))
    assert (dataset_utils.compile_helpers, megatron_training.num_floating_point_operations) == after
    assert tuple(function.__wrapped__ for function in after) == before
    symbols = [symbol for patch in patches.PATCHES for symbol in patch.SYMBOLS]
    for symbol, record in zip(symbols, caplog.records, strict=True):
        assert f"patched {symbol}: " in record.getMessage()
    for patch in (*patches.PATCHES, packed_rope, recompute):
        owner = patch.SYMBOLS[0] if len(patch.SYMBOLS) == 1 else patch.SYMBOLS[0].rpartition(".")[0]
        assert all(word in patch.__doc__ for word in ("Symbol", "Why:", "Versions:", "Can go:", owner))


def test_patch_of_a_missing_symbol(unpatched, monkeypatch):
    monkeypatch.delattr(megatron_training, "num_floating_point_operations")
    with pytest.raises(
        ImportError, match=r"megatron\.training\.training\.num_floating_point_operations.*>=0\.19,<0\.21"
    ):
        patches.flops.apply(LightningOptions())


def test_patch_of_another_signature(unpatched, monkeypatch):
    monkeypatch.setattr(dataset_utils, "compile_helpers", lambda jobs: None)
    with pytest.raises(RuntimeError, match=r"utils\.compile_helpers.*>=0\.19,<0\.21.*'jobs'"):
        patches.dataset_helpers.apply()


def test_other_megatron_versions_are_refused(unpatched, monkeypatch, capsys):
    compat.check_megatron()
    monkeypatch.setattr(package_info, "VERSION", (0, 21, 0, "rc1"))
    monkeypatch.setattr(package_info, "__shortversion__", "0.21.0")
    for check in (compat.check_megatron, patches.dataset_helpers.apply):
        with pytest.raises(RuntimeError, match=r">=0\.19,<0\.21.*0\.21\.0"):
            check()
    with pytest.raises(SystemExit) as exit:
        pretrain.main()
    assert exit.value.code == 2 and "found 0.21.0" in capsys.readouterr().err


@pytest.mark.parametrize("known", [False, True], ids=["no-version", "an-old-version"])
def test_packages_that_keep_megatron_from_being_imported(known, tmp_path):
    """Megatron takes nvidia-resiliency-ext from 0.6.0 on, and asks while it is imported; 0.4 names no version."""
    folder = tmp_path / "nvidia_resiliency_ext"
    modules = "core", "cached_metadata_filesystem_reader", "filesystem_async", "state_dict_saver"
    for part in ("", "checkpointing", *(f"checkpointing/async_ckpt/{name}" for name in ("", *modules))):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "__init__.py").write_text("__version__ = '0.5.0'" if known and not part else "")
    command = [sys.executable, "-m", "lightning_megatron.pretrain", "--num-layers", "1"]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": python_path(tmp_path)}
    )
    *_, last = run.stderr.splitlines()
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert re.search(r"importing megatron\.core failed .*resiliency.*update the package", last)


def test_parameters_of_later_versions(monkeypatch):
    """A patch gets those that it was written for, none or all, and is not applied to others."""

    def wrap(original):
        return lambda jobs, **added: original(2 * jobs, **added)

    symbol, known = "megatron.core.datasets.utils.compile_helpers", (("jobs",), wrap, "")
    for original, found in ((lambda jobs: (jobs,), {}), (lambda jobs, a, b: (jobs, a, b), dict(b=4, a=3))):
        monkeypatch.setattr(dataset_utils, "compile_helpers", original)
        assert _replace.replace(symbol, *known, later=("jobs", "a", "b"))
        assert dataset_utils.compile_helpers(1, **found) == (2, 3, 4)[: 1 + len(found)]
    for original in (lambda jobs, a: 0, lambda jobs, b, a: 0, lambda jobs, a, b, c: 0):
        monkeypatch.setattr(dataset_utils, "compile_helpers", original)
        with pytest.raises(RuntimeError, match=r"\('jobs',\) or \('jobs', 'a', 'b'\), but here .* is tested with"):
            _replace.replace(symbol, *known, later=("jobs", "a", "b"))


@pytest.mark.parametrize("checkout", [False, True])
def test_compiled_helpers_are_used(unpatched, monkeypatch, tmp_path, checkout):
    """Those of the wheel, and in a checkout, which has a Makefile, those that are as new as their source."""
    calls = []
    monkeypatch.setattr(dataset_utils, "compile_helpers", lambda: calls.append("make"))
    patches.dataset_helpers.apply()
    source, built = tmp_path / "helpers.cpp", tmp_path / "helpers_cpp.so"
    for path in (source, built, *([tmp_path / "Makefile"] if checkout else [])):
        path.touch()
    helpers = types.ModuleType("megatron.core.datasets.helpers_cpp")
    helpers.__file__ = str(built)
    monkeypatch.setattr(importlib.import_module("megatron.core.datasets"), "__path__", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, helpers.__name__, helpers)
    os.utime(source, (100, 100))
    os.utime(built, (100, 100))
    dataset_utils.compile_helpers()
    assert not calls
    os.utime(source, (101, 101))
    dataset_utils.compile_helpers()
    assert calls == ["make"] * checkout
    monkeypatch.setitem(sys.modules, helpers.__name__, None)  # as if not built
    dataset_utils.compile_helpers()
    assert calls == ["make"] * (1 + checkout)


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


# ---- FLOPs ----


@pytest.fixture
def count(parse, unpatched):
    """Megatron's count, and the patched one, for MODEL and more flags: two samples of 32 tokens, or the sums given."""

    def run(flags="", options=None, **sums):
        args = parse("--linear-attention-freq ([1,0,1]) " + flags)
        megatron_arguments.validate_args(args)
        args.padded_vocab_size = 128
        patches.flops.apply(options or LightningOptions())
        patched = megatron_training.num_floating_point_operations
        return patched.__wrapped__(args, 2, **sums), patched(args, 2, **sums), args

    return run


def test_flops_by_hand(count):
    # One lightning layer, per token: projections 64 (256 + 64); 4 heads of 64/2 (16 + 16) + 2 16 16. 64 tokens.
    lightning = 6 * 64 * (64 * (256 + 64) + 4 * (32 * 32 + 512))
    # One softmax layer: q, k, v and output are 64 x 64; 2 samples with two triangles of 32 x 32 / 2, of width 64.
    softmax = 6 * (64 * 4 * 64 * 64 + 2 * 32 * 32 * 64)
    assert (lightning, softmax) == (10_223_616, 7_077_888)
    original, patched, _ = count()
    assert patched == original + 2 * (lightning - softmax)


def test_flops_by_hand_without_gate_and_shared_heads(count):
    # q 4 x 8, k 2 x 8, v 2 x 24 and the output 4 x 24; 4 heads of 32 (8 + 24) + 2 8 24.
    lightning = 6 * 64 * (64 * (32 + 16 + 48 + 96) + 4 * (32 * 32 + 384))
    original, patched, _ = count(
        options=LightningOptions(num_kv_heads=2, key_head_dim=8, value_head_dim=24, gate="none")
    )
    assert patched == original + 2 * (lightning - 7_077_888)


@pytest.mark.parametrize(
    "flags", ["", "--group-query-attention --num-query-groups 2", "--attention-output-gate", "--kv-channels 32"]
)
@pytest.mark.parametrize("sums", [{}, {"seqlen_squared_sum_in_batch": 700, "total_real_tokens_in_batch": 50}])
def test_flops_of_softmax_layers_are_megatrons(count, flags, sums):
    _, _, args = count(flags)
    args.ffn_hidden_size = args.padded_vocab_size = 0  # leaves Megatron's three attention layers
    original = megatron_training.num_floating_point_operations.__wrapped__(args, 2, **sums)
    tokens, squared = sums.get("total_real_tokens_in_batch", 64), sums.get("seqlen_squared_sum_in_batch", 2048)
    assert original == 3 * patches.flops.softmax_layer_flops(args, tokens, squared)
    patched = megatron_training.num_floating_point_operations(args, 2, **sums)
    lightning = patches.flops.lightning_layer_flops(args, LightningOptions(), tokens)
    assert patched == pytest.approx(original / 3 + 2 * lightning, rel=1e-12)


@pytest.mark.parametrize("queries", ["", "--q-lora-rank 24"])
@pytest.mark.parametrize("sums", [{}, {"seqlen_squared_sum_in_batch": 700, "total_real_tokens_in_batch": 50}])
def test_flops_of_latent_attention_are_megatrons(count, queries, sums):
    sizes = "--kv-lora-rank 20 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 12"
    _, _, args = count(f"--multi-latent-attention --rope-type rope {sizes} {queries}")
    args.ffn_hidden_size = args.padded_vocab_size = 0  # leaves Megatron's three attention layers
    original = megatron_training.num_floating_point_operations.__wrapped__(args, 2, **sums)
    tokens, squared = sums.get("total_real_tokens_in_batch", 64), sums.get("seqlen_squared_sum_in_batch", 2048)
    assert original == pytest.approx(3 * patches.flops.latent_layer_flops(args, tokens, squared), rel=1e-12)
    patched = megatron_training.num_floating_point_operations(args, 2, **sums)
    lightning = patches.flops.lightning_layer_flops(args, LightningOptions(), tokens)
    assert patched == pytest.approx(original / 3 + 2 * lightning, rel=1e-12)


def test_flops_leave_the_rest_alone(count):
    dense = count()
    for flags in (
        "--swiglu",
        "--num-experts 4 --moe-router-topk 2",
        "--mtp-num-layers 1 --position-embedding-type rope",
    ):
        other = count(flags)
        assert other[0] != dense[0]
        assert other[1] - other[0] == dense[1] - dense[0]


def test_flops_of_multi_token_prediction(count):
    """Lightning layers by hand, as above; with LRPE, where all layers have it, K is twice as large in the operator."""
    flags = "--mtp-num-layers 2 --position-embedding-type rope"
    for lrpe, each, more in ((0, 4, 0), (2, 3, 1), (3, 0, 4)):
        lightning, twice = (6 * 64 * (64 * (256 + 64) + 4 * (32 * (k + 16) + 2 * k * 16)) for k in (16, 32))
        original, patched, _ = count(flags, LightningOptions(mtp_attention="lightning", lrpe_layers=lrpe))
        assert patched == original + each * lightning + more * twice - 4 * 7_077_888


@pytest.mark.parametrize("sums", [{}, {"seqlen_squared_sum_in_batch": 700, "total_real_tokens_in_batch": 50}])
def test_flops_of_a_softmax_model_are_megatrons(count, sums):
    original, patched, _ = count("--linear-attention-freq ([0]*3) --swiglu", **sums)
    assert patched == original


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
