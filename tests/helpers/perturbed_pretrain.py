"""The own entry point with the rounding of another machine, or with one fault; a script for `run_pretrain`.

PERTURB_NOISE: relative size of the noise on what every module computes, forward and backward. A sum of n products that
is rounded after every step has an error of about sqrt(n) 2^-24; another order of the sum, as other kernels or other
shapes have it, draws this error anew.
PERTURB_FAULT: the name of a function below.
"""

import importlib
import os

import torch
from torch.nn.modules.module import register_module_forward_hook

from lightning_megatron import mixer, pretrain

RANK = int(os.environ.get("RANK", 0))


def add_noise(size: float) -> None:
    rng = torch.Generator().manual_seed(1 + RANK)

    class Noise(torch.autograd.Function):
        """x (1 + noise), and the same for the gradient with other noise."""

        @staticmethod
        def forward(ctx, x):
            return x * (1 + size * (2 * torch.rand(x.shape, generator=rng) - 1))

        @staticmethod
        def backward(ctx, dx):
            return Noise.forward(ctx, dx)

    def hook(module, inputs, outputs):
        if isinstance(outputs, tuple):
            return tuple(hook(module, inputs, x) for x in outputs)
        return Noise.apply(outputs) if isinstance(outputs, torch.Tensor) and outputs.is_floating_point() else outputs

    register_module_forward_hook(hook)


def boundary_off_by_one() -> None:
    """For the operator of lightning layers, the last document begins a token too late."""
    original = mixer.lightning_attn

    def wrong(*arguments, cu_seqlens, **options):
        cu_seqlens = cu_seqlens.clone()
        cu_seqlens[..., -2] += 1
        return original(*arguments, cu_seqlens=cu_seqlens, **options)

    mixer.lightning_attn = wrong


def gradients_not_summed() -> None:
    """Each tensor-parallel rank keeps what its own tokens give for weights that all hold, such as those of norms."""
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_non_tensor_model_parallel_grads = lambda *arguments: None


if __name__ == "__main__":
    if os.environ.get("PERTURB_NOISE"):
        add_noise(float(os.environ["PERTURB_NOISE"]))
    if os.environ.get("PERTURB_FAULT"):
        globals()[os.environ["PERTURB_FAULT"]]()
    pretrain.main()
