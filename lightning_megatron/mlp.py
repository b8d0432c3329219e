"""MLPs that Megatron's flags do not name."""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer.mlp import MLP


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
