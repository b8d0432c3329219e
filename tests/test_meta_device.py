"""Models built under torch.device("meta"), as --init-model-with-meta-device does: no value may get lost unseen."""

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from megatron.training.models.dist_utils import to_empty_if_meta_device

from lightning_megatron.mixer import LightningAttention
from lightning_megatron.spec import make_spec
from tests import layers
from tests.helpers.models import gpt
from tests.helpers.training import assert_same_training, train
from tests.launch import spawn
from tests.layers import Variant

EVERYTHING = Variant(options=dict(qk_norm=True, decay="minimax"))


def outputs(rank: int, world: int, seed: int) -> None:
    layers.start()
    rng = torch.Generator().manual_seed(seed)
    mixer = layers.build_mixer(EVERYTHING)
    layers.set_parameters(mixer, layers.draw_parameters(mixer, 1, rng), 0, 1)
    x = torch.randn(24, 2, 64, generator=rng)
    want, _ = mixer(x, None)
    decay = layers.decay_of(EVERYTHING.values, 4, EVERYTHING.layer, 4).float()

    def meta_weights() -> (
        LightningAttention
    ):  # as of TransformerEngine's layers, which take the device from the context
        return layers.build_mixer(EVERYTHING).to("meta")

    def in_context() -> LightningAttention:
        with torch.device("meta"):
            return layers.build_mixer(EVERYTHING)

    for build in (meta_weights, in_context):
        for materialize in (lambda m: m.to_empty(device="cpu"), lambda m: to_empty_if_meta_device(m, device="cpu")):
            module = materialize(build())
            module.load_state_dict(mixer.state_dict())
            assert torch.equal(module(x, None)[0], want)

    module = meta_weights()
    assert all(parameter.is_meta for parameter in module.parameters())
    for (
        child
    ) in module.children():  # FSDP brings weights to the modules that hold them, and the others do not hear of it
        child.to_empty(device="cpu")
    module.load_state_dict(mixer.state_dict())
    assert torch.equal(module(x, None)[0], want)

    kept = mixer.log_decay.clone()
    narrow = Float16Module(layers.transformer_config(bf16=True), layers.build_mixer(EVERYTHING)).module
    for module in (narrow, mixer.half()):
        assert module.linear_qkv.weight.dtype in (torch.float16, torch.bfloat16)
        assert torch.equal(module.log_decay, kept) and module.log_decay.dtype == torch.float32
    torch.testing.assert_close(kept, decay, rtol=2e-6, atol=0)


def test_a_layer_keeps_its_decay(rng):
    spawn(outputs, 1, rng.initial_seed())


def start_values(rank: int, world: int, normalization: str, layernorm_1p: bool) -> None:
    """Without FSDP Megatron gives memory to what is meta, and values to nothing."""
    layers.start()
    config = dict(linear_attention_freq=2, qk_layernorm=True, normalization=normalization)
    config = layers.transformer_config(**config, layernorm_zero_centered_gamma=layernorm_1p)
    with torch.device("meta"):
        assert torch.ones(1).is_meta
        model = gpt(config, make_spec(qk_norm=True))
    model = to_empty_if_meta_device(model, device="cpu")
    norms = {name: p for name, p in model.named_parameters() if "norm" in name}
    assert len(norms) >= 2 * 4 + 1 + 2 * 3 + 2 * 2
    for name, parameter in norms.items():
        ours = "out_norm" in name or "q_norm" in name or "k_norm" in name
        first = 0.0 if name.endswith("bias") or (layernorm_1p and not ours) else 1.0
        assert torch.equal(parameter, torch.full_like(parameter, first)), name


@pytest.mark.parametrize("layernorm_1p", [False, True], ids=["", "1p"])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norms_keep_their_first_values(normalization, layernorm_1p):
    spawn(start_values, 1, normalization, layernorm_1p)


def test_a_run_starts_from_the_same_weights():
    """Of a hybrid: everything that Megatron's local layers and ours make names its device."""
    want, got = (train("freq2", "one", flags) for flags in ("", "--init-model-with-meta-device"))
    assert_same_training(got, want)
