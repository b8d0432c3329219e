"""Rows of the tables of flags for what megatron-core 0.19 does not have."""

from __future__ import annotations

from .rules import Rule

REFUSED = (
    Rule(
        "enable_mhc_connections",
        lambda run: True,
        "needs layers of Megatron's own, which pass on several residual streams; leave it out",
    ),
    *(
        Rule(
            name,
            lambda run, name=name, default=default: run.get(name) != default,
            "belongs to gated delta product, and no layer of this model reads it; leave it out",
        )
        for name, default in (
            ("gdp_num_householder", 3), ("gdp_cutedsl_kernel", False), ("gdp_num_chunk_states_to_recompute", 2),
        )
    ),
    Rule(
        "mtp_hsm",
        lambda run: (
            run.config.context_parallel_size > 1
            and run.config.sequence_parallel
            and run.layout == "zigzag"
            and run.get("dataloader_inter_document_masking")
        ),
        "with --sequence-parallel and --context-parallel-size above 1 assumes each document is sharded separately, and "
        "would mix hidden states of different documents; leave it out, or --dataloader-inter-document-masking",
    ),
    Rule(
        "mtp_hsm",
        lambda run: run.config.context_parallel_size > 1 and run.layout == "contiguous",
        "moves hidden states as layout='zigzag' has them; use that, or leave it out",
    ),
    Rule(
        "cp_partition_mode",  # of Megatron's branch dev
        lambda run: run.config.context_parallel_size > 1 and run.get("cp_partition_mode") != "zigzag",
        "cuts sequences in a way that this version does not know; use zigzag",
    ),
)  # fmt: skip
