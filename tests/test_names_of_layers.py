"""Stock commands name lightning layers: --experimental-attention-variant lightning, L in --hybrid-layer-pattern."""

import re
from types import SimpleNamespace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.activations import quick_gelu
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module

from lightning_megatron.config import LightningOptions
from lightning_megatron.flags import messages_of_refusal
from lightning_megatron.hybrid_model import as_transformer, checked, lightning_stack, make_stack_spec
from lightning_megatron.patches import flops, hybrid_symbol
from tests.launch import ROOT, run_pretrain, spawn
from tests.layers import decay_of, start, transformer_config
from tests.tolerances import TRAINED_LOSSES

SCRIPT = ROOT / "tests" / "pretrain_gpt.py"
FLAGS = (
    "--hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 --train-iters 4 "
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --adam-eps 1e-3 --lr-decay-style constant --mock-data "
    "--split 90,10,0 --tokenizer-type NullTokenizer --vocab-size 128 --make-vocab-size-divisible-by 8 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --hidden-dropout 0 "
    "--attention-dropout 0 --log-interval 1 --eval-iters 1 --eval-interval 1000 --num-workers 0 "
    "--no-create-attention-mask-in-dataloader --transformer-impl local --no-gradient-accumulation-fusion "
    "--no-persist-layer-norm --no-rope-fusion"
).split()
LAYERS = "--num-layers 4 --linear-attention-freq 4".split()
SPEC = [*LAYERS, "--spec", "lightning_megatron.spec", "lightning_spec"]
VARIANT = [*LAYERS, "--experimental-attention-variant", "lightning"]
HYBRID = ["--hybrid-layer-pattern", "L-L-L-*-"]
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel".split()


def stock(*flags, nproc=1, check=True):
    """pretrain_gpt.py, or pretrain_hybrid.py, as it is."""
    return run_pretrain([*FLAGS, *flags], nproc, script=SCRIPT, check=check)


def patched(*flags, nproc=1, check=True):
    """... under the launcher."""
    return run_pretrain([SCRIPT, *FLAGS, *flags], nproc, module="lightning_megatron.run", check=check)


@pytest.fixture(scope="module")
def losses():
    return stock(*SPEC).losses


@pytest.mark.parametrize("nproc, flags", [(1, []), (2, TP2)], ids=["1", "tp2-sp"])
def test_stock_commands_name_the_layer(losses, nproc, flags):
    expected = losses if nproc == 1 else stock(*SPEC, *flags, nproc=nproc).losses
    assert len(expected) == 4 and expected[-1] < expected[0] - 0.2
    for names, layers in ((VARIANT, "LLLs"), (HYBRID, "L-L-L-*-")):
        run = patched(*names, *flags, nproc=nproc)
        assert run.losses == expected, "the same model, bit by bit"
        assert run.log.count(f"\n     0  {layers}\n") == 1, "the map of layers is printed once"


def test_without_the_launcher_they_are_errors():
    for names, message in (
        (VARIANT, "argument --experimental-attention-variant: invalid choice: 'lightning'"),
        (HYBRID, "In main pattern, 'L' is not a valid layer symbol"),
    ):
        run = stock(*names, check=False)
        assert not run.ok and not run.losses and message in run.log


@pytest.mark.parametrize(
    "names, message",
    [
        ([*LAYERS, "--experimental-attention-variant", "lightening"], "invalid choice: 'lightening' (choose from"),
        ([*SPEC, "--experimental-attention-variant", "lightning"], "both name the layers: leave out one"),
        ([*HYBRID, "--experimental-attention-variant", "lightning"], "write L for a lightning layer in the pattern"),
        (["--hybrid-layer-pattern", "L-l-L-*-"], "In main pattern, 'l' is not a valid layer symbol"),
        ([*HYBRID, "--linear-attention-freq", "4"], "both place layers: leave the first out"),
    ],
    ids=["misspelt", "with-spec", "with-pattern", "wrong-letter", "with-freq"],
)
def test_wrong_names_are_errors(names, message):
    run = patched(*names, check=False)
    assert not run.ok and not run.losses and message in run.log


def test_the_launcher_says_what_it_needs(tmp_path):
    for arguments, message in (
        ([], "lightning_megatron.run: no script is given\nusage: "),
        ([tmp_path / "none.py"], "none.py: no such file"),
    ):
        run = run_pretrain(arguments, module="lightning_megatron.run", check=False)
        assert not run.ok and message in run.log and "Traceback" not in run.log


def test_checkpoints_say_what_they_say_with_spec(losses, tmp_path):
    save = ["--save", tmp_path, "--save-interval", "2", "--no-save-rng", "--no-load-rng"]
    assert patched(*VARIANT, *save, "--exit-interval", "2").losses == losses[:2]
    args = dist_checkpointing.load_common_state_dict(tmp_path / "iter_0000002")["args"]
    assert args.spec == ["lightning_megatron.spec", "lightning_spec"] and args.experimental_attention_variant is None
    assert args.lightning_function["values"]["layers"] == "LLLs"
    load = ["--load", tmp_path, "--no-load-rng"]
    assert stock(*SPEC, *load).losses == pytest.approx(losses[2:], abs=TRAINED_LOSSES)
    run = patched("--num-layers", "4", *VARIANT[2:], "--linear-attention-freq", "2", *load, check=False)
    assert not run.ok and "--linear-attention-freq: LLLs" in run.log


def test_a_hybrid_resumes_as_what_it_was(losses, tmp_path):
    save = ["--save", tmp_path, "--save-interval", "2", "--no-save-rng", "--no-load-rng"]
    assert patched(*HYBRID, *save, "--exit-interval", "2").losses == losses[:2]
    load = ["--load", tmp_path, "--no-load-rng"]
    assert patched(*HYBRID, *TP2, *load, nproc=2).losses == pytest.approx(losses[2:], abs=TRAINED_LOSSES)
    run = patched("--hybrid-layer-pattern", "L-L-*-L-", *load, check=False)
    assert not run.ok and not run.losses and "--hybrid-layer-pattern: L-L-L-*-" in run.log


OWN = [x for x in FLAGS if x not in ("--no-rope-fusion", "--split", "90,10,0")]
OWN[OWN.index("--eval-iters") + 1] = "0"
OTHER_ENDS = ["--decoder-first-pipeline-num-layers", "6"]


@pytest.mark.parametrize(
    "pattern, flags, counts",
    [
        ("L-L-|L-*-", "--pipeline-model-parallel-size 2", "3 lightning (L), 1 softmax (*), 4 MLP (-)"),
        (
            "LEL-LE*-",
            "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --context-parallel-size 2 "
            "--dataloader-inter-document-masking --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 1",
            "3 lightning (L), 1 softmax (*), 2 MLP (-), 2 experts (E)",
        ),
        (
            "L-L-L-*-",
            "--tensor-model-parallel-size 2 --distribute-saved-activations --recompute-granularity full "
            "--recompute-method uniform --recompute-num-layers 1",
            "3 lightning (L), 1 softmax (*), 4 MLP (-)",
        ),
    ],
    ids=["pp2", "cp2-experts-packed-recompute", "tp2-distributed-inputs"],
)
def test_the_own_entry_point_names_them_too(pattern, flags, counts):
    """On two pipeline stages first values are others than on one."""
    experts = "--moe-layer-freq 2".split() if "E" in pattern else []
    variant = run_pretrain([*OWN, *VARIANT, *experts, *flags.split()], 2)
    hybrid = run_pretrain([*OWN, "--hybrid-layer-pattern", pattern, *flags.split()], 2)
    assert len(hybrid.losses) == 4 and hybrid.losses == variant.losses
    assert hybrid.log.count(counts) == 1


def test_stages_without_experts(tmp_path):
    """Each stage has room for what routers log, also where it has none."""
    experts = (
        "--num-experts 4 --moe-ffn-hidden-size 32 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1 "
        "--moe-z-loss-coeff 0.1"
    ).split()
    saving = ["--save", tmp_path, "--save-interval", "2", "--exit-interval", "2"]
    run_pretrain([*OWN, "--hybrid-layer-pattern", "L-LE*-", *experts, *saving])
    logged = []
    for nproc, pattern in (1, "L-LE*-"), (3, "L-|LE*|-"):
        layout = ["--hybrid-layer-pattern", pattern, "--pipeline-model-parallel-size", nproc]
        run = run_pretrain([*OWN, *layout, *experts, "--load", tmp_path], nproc)
        values = [re.findall(rf" {name}: (\S+)", run.log) for name in ("lm loss", "load_balancing_loss", "z_loss")]
        logged.append([[float(value) for value in each] for each in values])
    assert [len(each) for each in logged[0]] == [2, 2, 2]
    for one, three in zip(*logged, strict=True):
        assert three == pytest.approx(one, abs=TRAINED_LOSSES)


def test_checkpoint_args_bring_the_letter(tmp_path):
    run_pretrain([*OWN, *HYBRID, "--save", tmp_path, "--save-interval", "2", "--exit-interval", "2"])
    run = run_pretrain([*OWN, "--load", tmp_path, "--use-checkpoint-args"])
    assert len(run.losses) == 2 and "L-L-L-*-" in run.log
    stages = "--pipeline-model-parallel-size 3 --hybrid-layer-pattern L-L|-|L-*-".split()
    cut = run_pretrain([*OWN, *stages, "--load", tmp_path, "--use-checkpoint-args"], 3)
    assert cut.losses == pytest.approx(run.losses, abs=TRAINED_LOSSES)


def test_checkpoint_args_leave_out_stages_of_another_run(tmp_path):
    """Trained on stages of its own, it goes on on one, on as many, and on others, without a pattern being given."""
    stages = "--pipeline-model-parallel-size 2 --hybrid-layer-pattern L-|L-L-*-".split()
    run_pretrain([*OWN, *stages, "--save", tmp_path, "--save-interval", "2", "--exit-interval", "2"], 2)
    load = [*OWN, "--load", tmp_path, "--use-checkpoint-args"]
    same = run_pretrain([*load, *stages[:2]], 2)
    assert "|" in same.log.partition("hybrid_layer_pattern ..")[2].partition("\n")[0]
    for flags, nproc in (([], 1), (["--pipeline-model-parallel-size", "4"], 4), (stages[:2] + OTHER_ENDS, 2)):
        other = run_pretrain([*load, *flags], nproc)
        assert other.losses == pytest.approx(same.losses, abs=TRAINED_LOSSES) and len(same.losses) == 2
        assert "pattern L-|L-L-*- are left out, as this run has other ones" in other.log


def test_a_pattern_for_a_checkpoint_of_gpt_model(tmp_path):
    """Not told to leave out --linear-attention-freq, which the checkpoint brought."""
    run_pretrain([*OWN, *VARIANT, "--save", tmp_path, "--save-interval", "2", "--exit-interval", "2"])
    run = run_pretrain([*OWN, *HYBRID, "--load", tmp_path, "--use-checkpoint-args"], check=False)
    assert not run.ok and "Traceback" not in run.log
    assert "is of a GPTModel, and this run has HybridModel" in run.log and "leave --hybrid-layer-pattern out" in run.log


def test_the_own_entry_point_refuses_wrong_names():
    for flags, message in (
        (["--experimental-attention-variant", "lightening"], "'lightening' (choose lightning, or leave the flag out)"),
        (["--hybrid-layer-pattern", "*-*-"], "has no lightning layer (L)"),
        (
            ["--hybrid-layer-pattern", "L-L-/*-", "--lightning-loss-chunk", "8"],
            "--hybrid-layer-pattern L-L-/*- is refused with --lightning-loss-chunk 8",
        ),
        (
            ["--hybrid-layer-pattern", "L-LE", "--num-experts", "4", "--moe-layer-freq", "2"],
            "--moe-layer-freq 2 and --hybrid-layer-pattern L-LE both place experts: leave the first out",
        ),
        (
            ["--hybrid-layer-pattern", "L-L-", "--lightning-model", "ling-2.6-flash@tiny"],
            "--lightning-model ling-2.6-flash@tiny is a GPTModel, and --hybrid-layer-pattern L-L- makes another: leave",
        ),
        (["--hybrid-layer-pattern", "-L-*"], "--hybrid-layer-pattern: expected one argument; write "),
        (["--hybrid-layer-pattern", "L-L-", "--num-experts", "4"], "--num-experts 4, but --hybrid-layer-pattern L-L-"),
        (["--hybrid-layer-pattern", "L-L-", "--mtp-num-layers", "1"], "--mtp-num-layers 1, but --hybrid-layer-pattern"),
    ):
        run = run_pretrain([*OWN, *flags], check=False)
        assert not run.ok and message in run.log and "Traceback" not in run.log


# ---- patterns --------------------------------------------------------------------------------------------------------


def test_layers_are_counted_as_in_gpt_model():
    view = as_transformer(transformer_config(num_layers=11, num_moe_experts=2, moe_ffn_hidden_size=8), "-L-|LE*-LL-E")
    assert view.num_layers == 5 and view.linear_attention_freq == [1, 1, 0, 1, 1]
    assert view.moe_layer_freq == [0, 1, 0, 0, 1] and view.hybrid_layer_pattern == "-L-LE*-LL-E"


@pytest.mark.parametrize(
    "pattern, options, message",
    [
        ("*-*-", {}, "has no lightning layer"),
        ("L-M-", {}, "M has parts of TransformerEngine, which does not import"),
        ("L-G-", {}, "G has parts of TransformerEngine"),
        ("L-+-", {}, r"\+ has parts of TransformerEngine"),
        ("L-D-", {}, "D is not supported beside L"),
        ("LELE", {}, "E needs --num-experts"),
        ("L-L-/L", {}, "multi-token prediction .* cannot be lightning .*--lightning-mtp-attention lightning"),
        ("L-L-/*", {}, "multi-token prediction .* has parts of TransformerEngine"),
        (
            "L-L-",
            dict(mtp_attention="lightning"),
            "--lightning-mtp-attention lightning is not supported in HybridModel",
        ),
        (
            "*-L-",
            dict(embedding_scale=2.0),
            r"--lightning-embedding-scale 2.0 is not .* \*-L-: .* begin the pattern with L",
        ),
        ("-L-", dict(embedding_scale=2.0), "--lightning-embedding-scale 2.0 is not supported with"),
        ("L-/*-", dict(embedding_scale=2.0), "--lightning-embedding-scale 2.0 is not .* put nothing behind /"),
    ],
)
def test_patterns_that_cannot_be_built(pattern, options, message):
    with pytest.raises(ValueError, match=message):
        checked(transformer_config(), LightningOptions(**options), pattern)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(num_moe_experts=4), "--num-experts 4, but --hybrid-layer-pattern L-L- has no experts .*leave .* out"),
        (dict(mtp_num_layers=1), "--mtp-num-layers 1, but --hybrid-layer-pattern L-L- has no layers of multi-token"),
    ],
)
def test_flags_of_parts_that_a_pattern_lacks(config, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        checked(transformer_config(**config), LightningOptions(), "L-L-")
    # a run that generates leaves out what stands behind / in the checkpoint's pattern, and the number stays
    monkeypatch.setattr(
        "lightning_megatron.hybrid_model.training_args", lambda: SimpleNamespace(use_checkpoint_args=True)
    )
    checked(transformer_config(**config), LightningOptions(), "L-L-")


@pytest.mark.parametrize(
    "pattern, refused", [("L-E", True), ("LE-E", True), ("LELE", False)], ids=["both", "two-kinds", "experts"]
)
def test_dense_mlps_of_a_pattern(pattern, refused):
    """Several MLPs may follow one attention: GPTModel would call both one layer with experts."""
    config = transformer_config(num_layers=len(pattern), num_moe_experts=4, moe_ffn_hidden_size=8)
    config.activation_func, config.bias_activation_fusion = quick_gelu, True  # as a config with TransformerEngine has
    view = as_transformer(config, pattern)
    found = list(messages_of_refusal(view, LightningOptions(), "zigzag", None))
    assert any("--quick-geglu" in message for message in found) == refused, found


def test_angles_of_another_order_are_refused():
    """HybridModel makes those of halves, whatever --rotary-interleaved says."""
    with pytest.raises(ValueError, match="--rotary-interleaved is not supported in HybridModel"):
        checked(transformer_config(rotary_interleaved=True), LightningOptions(), "L-*-")


def test_a_stack_of_another_kind_is_refused():
    given = SimpleNamespace(module=torch.nn.Module, params={}, submodules=None)
    with pytest.raises(ValueError, match="L needs Megatron's HybridStack, and this stack spec has .*Module"):
        lightning_stack(transformer_config(), given, "L-L-")


@pytest.mark.parametrize("options", [dict(), dict(lrpe_layers=1)], ids=["plain", "lrpe"])
def test_flops_of_letters(options):
    """A lightning layer counts what one of GPTModel's does, and Megatron counts the others."""
    config = transformer_config(num_layers=2)
    args = SimpleNamespace(**vars(config), hybrid_layer_pattern="L-|L-*-/*", seq_length=32)
    flops._options = LightningOptions(**options)
    counted = flops._wrap(lambda args, *sizes: 1e3)(args, 3)
    first, rest = (flops.lightning_layer_flops(args, flops._options, 96, lrpe=x) for x in (bool(options), False))
    assert counted == 1e3 + first + rest


def check_letter(rank: int, world: int) -> None:
    hybrid_symbol.add_letter()
    hybrid_symbol.add_letter()
    assert Symbols.LIGHTNING == "L" and "L" in Symbols.name_sorted_valid_layer_symbols()
    Symbols.LIGHTNING, Symbols.LSTM = "l", "L"
    with pytest.raises(RuntimeError, match="names its layers L in --hybrid-layer-pattern, but L is LSTM here"):
        hybrid_symbol.add_letter()


def test_a_letter_that_is_taken_is_refused():
    assert "L" not in Symbols.VALID_LAYERS, "nothing is patched at import"
    spawn(check_letter, 1)


def check_decay(rank: int, world: int) -> None:
    """The second of two stages, "L-L" and "L-*-L": decays count all attentions before a layer, and no MLPs."""
    start()
    config = transformer_config(num_layers=8)
    stack = lightning_stack(config, hybrid_stack_spec, "L-LL-*-L")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = build_module(stack, config, layer_type_list=list("L-*-L"), pp_layer_offset=3, pg_collection=groups)
    assert "".join(model.layer_type_list) == "L-*-L"
    for place, number in ((0, 3), (4, 5)):
        values = model.layers[place].self_attention.log_decay
        torch.testing.assert_close(values.double(), decay_of(LightningOptions(), 4, number, 5), rtol=1e-6, atol=0)


def test_decays_of_a_pipeline_stage():
    spawn(check_decay, 1)


def check_angles(rank: int, world: int) -> None:
    """Learnt angles in the first 3 attentions of 4, MLPs not counted."""
    start()
    config, options = transformer_config(num_layers=8), LightningOptions(lrpe_layers=3)
    stack = lightning_stack(config, make_stack_spec(options), "L-L-L-L-")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = build_module(stack, config, layer_type_list=list("L-L-L-L-"), pg_collection=groups)
    assert [layer.self_attention.lrpe is not None for layer in list(model.layers)[::2]] == [True] * 3 + [False]


def test_learnt_angles_in_more_layers_than_two():
    spawn(check_angles, 1)
