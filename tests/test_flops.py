"""The count of floating-point operations, by hand and beside Megatron's. No process group, no training."""

import pytest
from megatron.training import arguments as megatron_arguments
from megatron.training import training as megatron_training

from lightning_megatron import patches
from lightning_megatron.config import LightningOptions


@pytest.fixture
def count(parse, unpatched):
    """Megatron's count, and the patched one, of a small model and more flags: two samples of 32 tokens, or the sums."""

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
