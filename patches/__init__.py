"""Runtime patches of Megatron symbols that no layer spec can reach. README.md lists them.

Nothing is patched at import: ``lightning_megatron.pretrain`` calls ``apply_all``, and so may a launcher of your own.
"""

from __future__ import annotations

from ..config import LightningOptions
from . import (
    attention_variant,
    bucket_padding,
    chained_optimizer,
    checkpoint_args,
    cross_entropy,
    dataset_helpers,
    distributed_optimizer,
    dynamic_inference,
    expert_padding,
    flops,
    hybrid_symbol,
    layer_log,
    mfu,
    mtp_padding,
    mtp_spec,
    mtp_without_te,
    packed_roll,
    packed_rope,
    paged_attention,
    recompute,
    sgd_state,
)

PATCHES = (
    dataset_helpers, checkpoint_args, distributed_optimizer, bucket_padding, chained_optimizer, sgd_state,
    cross_entropy, flops, attention_variant,
)  # fmt: skip
ALL = (
    *PATCHES, dynamic_inference, expert_padding, hybrid_symbol, layer_log, mfu, mtp_padding, mtp_spec, mtp_without_te,
    packed_roll, packed_rope, paged_attention, recompute,
)  # fmt: skip


def apply_all(options: LightningOptions) -> None:
    """Apply all of ``PATCHES``, each with a line in rank 0's log. Calling it again is harmless.

    The others of ``ALL`` are left to ``runtime.prepare``, which knows whether a model needs them, those that add
    names to Megatron's flags to ``lightning_megatron.run``, and those of padding to the training that names it.

    Raises:
        ImportError, RuntimeError: this megatron-core is not the one a patch is written for; the message names both.
    """
    dataset_helpers.apply()
    checkpoint_args.apply()
    distributed_optimizer.apply()
    bucket_padding.apply()
    chained_optimizer.apply()
    sgd_state.apply()
    cross_entropy.apply(options)
    flops.apply(options)
    attention_variant.apply()
