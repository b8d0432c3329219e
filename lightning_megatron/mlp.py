"""MLPs in the place of Megatron's: one that its flags do not name, and one whose activation is this package's."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP

from .ops import swiglu


class SwiGLU(torch.nn.Module):
    """The activation of ``FusedMLP``, built as Megatron builds an MLP's ``activation_func``."""

    def __init__(self, *, config, backend: str | None = None):
        super().__init__()
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[s, b, 2 F]``, gate before up -> ``[s, b, F]``."""
        return swiglu(x, backend=self.backend)


class FusedMLP(MLP):
    """Megatron's MLP of ``--swiglu`` with an activation of one launch each way, which ``activation_func`` builds.

    Megatron's own, compiled by torch, takes twice the time of its memory traffic in the backward.
    """

    def __init__(self, config, *args, **kwargs):
        config = copy.copy(config)
        config.use_te_activation_func = True  # that is: of a module
        super().__init__(config, *args, **kwargs)


def fused(mlp: Callable, config, backend: str | None) -> Callable:
    """Megatron's builder of a layer's MLP, with ``FusedMLP`` where that computes the same and keeps the same.

    Not experts, an MLP with bias or clamped values, nor inputs kept in fp8 or offloaded by TransformerEngine.
    """
    plain = getattr(mlp, "func", None) == MLP.as_mlp_submodule
    gated = config.gated_linear_unit and config.activation_func is F.silu and config.bias_activation_fusion
    others = (
        config.add_bias_linear, config.activation_func_fp8_input_store, config.glu_linear_offset,
        config.activation_func_clamp_value is not None, config.cpu_offloading and config.cpu_offloading_activations,
    )  # fmt: skip
    if not plain or not gated or any(others):
        return mlp
    activation = functools.partial(SwiGLU, backend=backend)
    submodules = dataclasses.replace(mlp.keywords["submodules"], activation_func=activation)
    return functools.partial(FusedMLP.as_mlp_submodule, **{**mlp.keywords, "submodules": submodules})


class BilinearMLP(MLP):
    """Megatron's gated MLP without an activation: y = W2 (W_gate x * W_up x).

    The GLU of TransNormerLLM (section 3.3), whose l1, l2 and l3 these are; "Bilinear" in Shazeer 2020, section 2.
    Weights and checkpoints are those of ``--swiglu``, which it needs.
    """

    def __init__(self, config, *args, **kwargs):
        config = copy.copy(config)
        config.activation_func = _identity
        config.bias_activation_fusion = False  # of SwiGLU
        super().__init__(config, *args, **kwargs)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x
