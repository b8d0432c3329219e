"""``--lightning-backend`` decides for every part of a model that this package computes, not for the operator alone."""

import functools
from collections import Counter
from unittest import mock

import pytest
import torch

from lightning_megatron.config import LightningOptions
from lightning_megatron.norm import TorchNorm
from lightning_megatron.ops import backend
from lightning_megatron.patches import cross_entropy
from lightning_megatron.spec import make_spec
from lightning_megatron.training.loss import chunked_loss
from tests import layers
from tests.helpers.models import gpt
from tests.launch import spawn
from tests.ops.launches import GLU, LOSS, POINTWISE
from tests.tolerances import LAYERS as TOLERANCE

CONFIG = dict(
    num_layers=2,
    linear_attention_freq=2,  # one lightning and one softmax layer
    qk_layernorm=True,
    hidden_size=32,
    num_attention_heads=2,
    gated_linear_unit=True,
    activation_func=torch.nn.functional.silu,
    bias_activation_fusion=True,
    cross_entropy_loss_fusion=True,
    cross_entropy_fusion_impl="native",
)


def step(rank: int, world: int, name: str, auto: str, chunk: int | None) -> tuple[dict, dict]:
    """Kernels that one step of a hybrid with ``backend=name`` launches, where "auto" means ``auto``, and results."""
    from triton.runtime.interpreter import InterpretedFunction

    layers.start()
    options = LightningOptions(backend=name)
    cross_entropy.apply(options)
    config = layers.transformer_config(**CONFIG)
    model = gpt(config, make_spec(options))
    whole = layers.draw_parameters(model, 1, torch.Generator().manual_seed(3))
    layers.set_parameters(model, whole, 0, 1)
    assert sum(isinstance(module, TorchNorm) for module in model.modules()) == 5 + 2  # two of q and k
    tokens, labels = torch.randint(64, (2, 1, 16), generator=torch.Generator().manual_seed(4))
    processor = functools.partial(chunked_loss, backend=options.backend)
    chunks = dict(output_processor=processor, output_processor_context=chunk) if chunk else {}
    launched, run = Counter(), InterpretedFunction.run

    def counted(self, *args, **kwargs):
        launched[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    with (
        mock.patch.object(InterpretedFunction, "run", counted),
        mock.patch.object(backend, "_auto_backend", lambda device: auto),
    ):
        losses = model(tokens, torch.arange(16).expand(1, 16), None, labels=labels, **chunks)
        losses.sum().backward()
    grads = {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return dict(launched), {"losses": losses.detach().T} | grads


@pytest.mark.parametrize("chunk", [None, 5], ids=["cross entropy", "loss chunk"])
def test_backend_reaches_every_part(chunk):
    """torch launches no kernel where auto would be triton (a GPU); triton launches all where auto is torch (a CPU)."""
    ((none, by_torch),) = spawn(step, 1, "torch", "triton", chunk)
    assert none == {}
    ((every, by_triton),) = spawn(step, 1, "triton", "torch", chunk)
    assert every.keys() >= {*POINTWISE, *GLU, *LOSS, "rotary_kernel", "walk_kernel", "gradients_kernel"}
    # input and MLP norms of two layers and the final norm; the output norm of the lightning layer
    assert every["norm_gate_kernel"] == 5 + 1
    layers.assert_close(by_triton, by_torch, TOLERANCE[torch.float32])
