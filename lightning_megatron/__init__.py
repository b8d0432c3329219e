"""Lightning Attention-2 for NVIDIA megatron-core.

Importing this package is cheap: torch, triton and megatron are imported by the modules that need them.

    lightning_megatron.ops        the operator: lightning_attn
    lightning_megatron.decay      slopes and presets -> log_decay
    lightning_megatron.config     every option, and its validation
    lightning_megatron.mixer      the attention module Megatron's TransformerLayer accepts
    lightning_megatron.spec       layer and block specs; the --spec target
    lightning_megatron.pretrain   own entry point: python -m lightning_megatron.pretrain
"""

__version__ = "0.1.0"
