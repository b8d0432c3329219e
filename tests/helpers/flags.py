"""Configs of the tables of flags, and what a row of theirs must show."""

from argparse import Namespace

import pytest
import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu

from lightning_megatron.config import LightningOptions
from lightning_megatron.runtime import refuse
from tests.layers import latent_config, transformer_config

HYBRID = dict(linear_attention_freq=2)
LATENT = dict(multi_latent_attention=True)
TE = dict(transformer_impl="transformer_engine")
SWIGLU = dict(gated_linear_unit=True, activation_func=torch.nn.functional.silu)
QUICK = dict(gated_linear_unit=True, activation_func=quick_gelu)
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
CHUNK, HOST = dict(recompute_chunk=64), dict(offload_activations=True)
LATER = {  # fields and flags of later versions of Megatron
    "cp_partition_mode", "enable_mhc_connections", "gdp_num_householder", "gdp_cutedsl_kernel",
    "gdp_num_chunk_states_to_recompute", "mtp_hsm",
}  # fmt: skip
MUON = dict(optimizer="muon", muon_split_qkv=True)
OWN = dict(lightning_key_head_dim=None)  # what only the own entry point has


def model(**changes):
    """A config with ``changes`` past Megatron's own checks, some of which want packages or a GPU."""
    latent = changes.get("multi_latent_attention")
    config = latent_config(linear_attention_freq=None) if latent else transformer_config()
    for name, value in changes.items():
        assert hasattr(config, name) or name in LATER, name
        setattr(config, name, value)
    return config


def hide_packages(config: dict, without) -> None:
    """TransformerEngine is installed where ``config`` asks for it, and not elsewhere."""
    without(*(() if config.get("transformer_impl") else ("transformer_engine",)))


def check_refused(row: tuple[dict, dict, dict, str], without) -> None:
    """Config, options and flags are refused, and the message matches."""
    config, options, args, message = row
    hide_packages(config, without)
    layout = "zigzag-documents" if args.get("sft") else "zigzag"
    with pytest.raises(ValueError, match=message):
        refuse(model(**config), LightningOptions(**options), layout, Namespace(**args))


def check_allowed(row: tuple[dict, dict, dict], without) -> None:
    config, options, args = row
    hide_packages(config, without)
    refuse(model(**config), LightningOptions(**options), "zigzag", Namespace(**args))
