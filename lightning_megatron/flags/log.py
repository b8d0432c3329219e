"""Rows of the tables of flags for the options that log: norms of layers, and the peak of the card."""

from __future__ import annotations

from .rules import Rule

_NORMS, _PEAK = "lightning_log_norms", "lightning_peak_tflops"

REFUSED = (
    Rule(
        _PEAK,
        lambda run: run.get("log_throughput") is False,
        "is for --log-throughput; add that, or leave it out",
    ),
    Rule(
        _NORMS,
        lambda run: hasattr(run.args, "tensorboard_dir") and not run.args.tensorboard_dir,
        "is written to TensorBoard; add --tensorboard-dir, or leave it out",
    ),
    *(
        Rule(_NORMS, when, f"does not go with {what}; leave out one of the two")
        for when, what in (
            (lambda run: run.graphs, "CUDA graphs, whose warm-up would be counted"),
            (lambda run: run.options.recompute_chunk, "--lightning-recompute-chunk, whose chunks end in other states"),
            (lambda run: run.get("use_megatron_fsdp") or run.get("use_torch_fsdp2"), "FSDP, which cuts gradients"),
            (lambda run: (run.get("gtp_weight_remat_size") or 1) > 1, "--tensor-parallel-num-weight-shards"),
        )
    ),
)
