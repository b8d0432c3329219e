"""--lightning-loss-chunk: the same training as without it, no logits of all tokens; what it refuses."""

from __future__ import annotations

import functools

import pytest
import torch

from lightning_megatron.spec import make_spec
from lightning_megatron.training.loss import chunked_loss
from lightning_megatron.training.refusals import refuse
from tests import layers
from tests.helpers.models import gpt
from tests.helpers.training import assert_same_training, train
from tests.launch import spawn
from tests.layers import assert_close
from tests.tolerances import LAYERS as TOLERANCE

CHUNK = 48  # of 128 tokens
COUNTED = """
from lightning_megatron import pretrain
from lightning_megatron.training import loss
original = loss.linear_cross_entropy
def counted(hidden, *args, chunk, **kwargs):
    print(f"chunk {chunk} of {len(hidden)}\\n", end="")  # one write, or ranks mix theirs
    return original(hidden, *args, chunk=chunk, **kwargs)
loss.linear_cross_entropy = counted
pretrain.main()
"""


UNTIED = "--untie-embeddings-and-output-weights"
HYBRID = "--hybrid-layer-pattern L-L-*-L-"  # HybridModel
# Several buckets: the output layer's weight comes after others, and is read when its own hook has waited for it.
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 10000"


@pytest.mark.parametrize(
    "layout, flags, calls",
    [
        ("one", "", "10 of 128"),
        ("one", f"{UNTIED} --cross-entropy-loss-fusion", "10 of 128"),
        ("tp2-sp", "", "20 of 64"),
        ("cp2", f"--use-distributed-optimizer {OVERLAP}", "20 of 64"),
        ("pp2", "", "10 of 128"),
        ("pp2", UNTIED, "10 of 128"),
        ("dp2", f"{UNTIED} {OVERLAP}", "10 of 128"),
        ("one", HYBRID, "10 of 128"),
        ("tp2-sp", f"{HYBRID} {UNTIED} --use-mup --mup-output-mult 2", "20 of 64"),
        ("cp2", f"{HYBRID} --use-distributed-optimizer {OVERLAP}", "20 of 64"),
        ("pp2", "--hybrid-layer-pattern L-L-|*-L-", "10 of 128"),
    ],
    ids=["tied", "untied", "tp2-sp-tied", "cp2-overlap-tied", "pp2-tied", "pp2-untied", "dp2-overlap-untied"]
    + ["hybrid", "hybrid-tp2-sp-mup", "hybrid-cp2-overlap", "hybrid-pp2"],
)
def test_same_training(layout, flags, calls, tmp_path):
    """From the same initial values, 2 microbatches of 5 steps; ``calls``: how many on all ranks, of so many tokens."""
    script = tmp_path / "counted.py"
    script.write_text(COUNTED)
    run = train("all", layout, f"{flags} --lightning-loss-chunk {CHUNK}", script=script)
    times, tokens = calls.split(" of ")
    assert run.log.count(f"chunk {CHUNK} of {tokens}\n") == int(times)
    want = train("all", layout, flags)
    assert_same_training(run, want)
    assert want.losses[-1] < want.losses[0] - 0.3


def losses_and_gradients(rank: int, world: int, config: dict, chunk: int | None) -> dict:
    """Of every token of two sequences, and gradients of their weighted sum; the shape that the output layer returns."""
    layers.start(tp=world)
    config = layers.transformer_config(**layers.layout(world, world > 1), **config)
    model = gpt(config, make_spec())
    trained = layers.trainable(model, config)
    shapes = []
    model.output_layer.register_forward_hook(lambda module, inputs, outputs: shapes.append(list(outputs[0].shape)))
    tokens, labels = torch.randint(64, (2, 2, 16), generator=torch.Generator().manual_seed(2))
    options = dict(output_processor=chunked_loss, output_processor_context=chunk) if chunk else {}
    losses = trained(tokens, torch.arange(16).expand(2, 16), None, labels=labels, **options)
    assert "_forward_impl" not in vars(model.output_layer)
    (losses * torch.linspace(0, 1, 32).view(2, 16)).sum().backward()
    return {"shapes": torch.tensor(shapes), "losses": losses.detach().T} | layers.reduce_gradients(trained)


@pytest.mark.parametrize("config", [dict(), dict(use_mup=True, mup_output_mult=0.3)], ids=["plain", "mup"])
@pytest.mark.parametrize("world", [1, 2])
def test_model_never_makes_logits(world, config):
    for chunked, plain in zip(*(spawn(losses_and_gradients, world, config, chunk) for chunk in (5, None)), strict=True):
        assert chunked.pop("shapes").tolist() == [[16, 2]]
        assert plain.pop("shapes").tolist() == [[16, 2, 64 // world]]
        assert_close(chunked, plain, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--lightning-loss-chunk 0", ["--lightning-loss-chunk 0", "1 token or more", "leave it out"]),
        ("--mtp-num-layers 2", ["--mtp-num-layers 2 is refused with --lightning-loss-chunk 9", "leave out one"]),
        ("--hybrid-layer-pattern L-L-/*-", ["--hybrid-layer-pattern L-L-/*- is refused with --lightning-loss-chunk 9"]),
        ("--fp8-output-proj", ["--fp8-output-proj is refused"]),
        ("--defer-embedding-wgrad-compute", ["--defer-embedding-wgrad-compute is refused"]),
        ("--use-megatron-fsdp", ["--use-megatron-fsdp is refused", "--use-distributed-optimizer"]),
        ("--use-torch-fsdp2", ["--use-torch-fsdp2 is refused", "--use-distributed-optimizer"]),
    ],
)
def test_refusals(parse, flags, words):
    with pytest.raises(ValueError) as error:
        refuse(parse(f"--lightning-loss-chunk 9 {flags}"))
    assert all(word in str(error.value) for word in words), error.value
    if "chunk" not in flags:
        refuse(parse(flags))  # alone it is no matter of this package


def test_refuses_sharded_weights(parse):
    args = parse("--lightning-loss-chunk 9 --tensor-parallel-num-weight-shards 4")
    args.gtp_weight_remat_size = 4  # what Megatron makes of it
    with pytest.raises(ValueError, match="--tensor-parallel-num-weight-shards 4 is refused.*use 1"):
        refuse(args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16"])  # what Megatron makes of it, and as it is given
def test_refuses_another_dtype_of_logits(parse, dtype):
    args = parse("--lightning-loss-chunk 9")
    args.logit_dtype = dtype  # --output-logit-dtype of megatron-core 0.20
    with pytest.raises(ValueError, match="--output-logit-dtype bf16 is refused.* fp32; leave out one"):
        refuse(args)
    args.bf16 = True
    refuse(args)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(bias=torch.zeros(3)), "needs an output layer without bias"),
        (dict(output_dtype=torch.bfloat16), "torch.bfloat16: .* dtype of hidden states, torch.float32; leave out one"),
        (dict(gtp_remat_size=2), "sharded over 2 ranks.* leave out one"),
        (dict(something_new=1), "does not know something_new, .* leave the flag out"),
    ],
)
def test_refuses_what_its_product_does_not_know(given, message):
    layer = torch.nn.Module()
    arguments = dict(bias=None, sequence_parallel=False, tp_group=None) | given
    layer.forward = lambda x, weight, runtime_gather_output: layer._forward_impl(input=x, weight=weight, **arguments)
    call = functools.partial(chunked_loss, torch.zeros(2, 1, 4), layer, labels=torch.zeros(1, 2), context=1)
    with pytest.raises(ValueError, match=message):
        call(output_weight=torch.zeros(3, 4), scale_logits=lambda x: x)
    assert "_forward_impl" not in vars(layer)
