"""What function a checkpoint was trained with: its record, or what older ones and those of other specs tell without it.

The one job here is to read ``args`` as Megatron saved them; the record itself, and how two are compared, is record.py.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

from .config import LightningOptions
from .record import ATTRIBUTE, FORMAT, ROPE, Model, options_from_args, options_from_record, values_of

# Options of lightning_spec and lightning_layer_spec when checkpoints held no record yet, whatever the defaults are now.
_OPTIONS_BEFORE_RECORDS: dict[str, Any] = dict(
    decay="tnl", decay_offset=0, feature_map="silu", num_kv_heads=None, key_head_dim=None, value_head_dim=None,
    scale=None, rope=False, qk_norm=False, norm="head", norm_groups=None, norm_affine=True, norm_eps=None,
    gate="sigmoid",
)  # fmt: skip


class Saved(NamedTuple):
    """What the args in a checkpoint tell about its function."""

    record: dict[str, Any] | None  # None: nothing that can be compared
    options: LightningOptions | None  # None: they are not known
    source: str  # where this is known from, for the log
    softmax: str = ""  # not empty: no lightning layers at all; what they are instead


def saved_function(args: Any) -> Saved:
    """What the function of a checkpoint was, from the args that Megatron saved in it.

    With a record, that. Else checkpoints of the own entry point hold our flags, those of
    ``--spec lightning_megatron.spec`` have the options of that time; other specs hold options of their own, and what
    Megatron's config says is compared. All others have no lightning layers.
    """
    record = getattr(args, ATTRIBUTE, None)
    if record is not None:
        return Saved(record, options_from_record(record), "the record saved with it")
    if hasattr(args, "lightning_decay"):
        options, source = options_from_args(args), "the flags saved with it, by a version that saved no record"
    else:
        spec = getattr(args, "spec", None)
        if not spec:
            return Saved(None, None, "the flags saved with it", softmax=_softmax_layers(args))
        name = " ".join(map(str, spec)) if isinstance(spec, (list, tuple)) else str(spec)
        if name not in ("lightning_megatron.spec lightning_spec", "lightning_megatron.spec lightning_layer_spec"):
            return Saved(_derived(args, None), None, f"--spec {name}")
        options, source = LightningOptions(**_OPTIONS_BEFORE_RECORDS), f"--spec {name}, whose options were the defaults"
    return Saved(_derived(args, options), options, source)


def _softmax_layers(args: Any) -> str:
    layers = getattr(args, "num_layers", None)
    for name in ("experimental_attention_variant", "hybrid_layer_pattern"):
        if getattr(args, name, None):
            return f"{layers} layers of --{name.replace('_', '-')} {getattr(args, name)}"
    return f"{layers} softmax layers"


def _derived(args: Any, options: LightningOptions | None) -> dict[str, Any]:
    """A record from saved args: Megatron's config of them, as far as it decides the function."""
    held = dict(vars(args))
    config = SimpleNamespace(**held)
    renamed = {"num_moe_experts": "num_experts", "yarn_rotary_scaling_factor": "rotary_scaling_factor"}
    renamed |= {"yarn_mscale": "mscale", "yarn_mscale_all_dim": "mscale_all_dim"}
    for name, arg in renamed.items():
        if arg in held:
            setattr(config, name, held[arg])
    if "swiglu" in held:
        gated = held["swiglu"] or held.get("quick_geglu", False)
        names = {"swiglu": "silu", "squared_relu": "squared_relu", "quick_geglu": "quick_gelu"}
        config.activation_func = next((names[flag] for flag in names if held.get(flag)), "gelu")
        config.gated_linear_unit = bool(gated)
    if "group_query_attention" in held and not held["group_query_attention"]:
        config.num_query_groups = held["num_attention_heads"]
    if held.get("use_mup"):  # TransformerConfig computes them
        del config.mup_output_mult
    else:
        config.softmax_scale = None
    if held.get("position_embedding_type") == "yarn":
        # TransformerConfig is given defaults for what is None.
        for name, default in (("original_max_position_embeddings", 4096), ("beta_fast", 32.0), ("beta_slow", 1.0)):
            value = held.get(f"yarn_{name}")
            setattr(config, f"yarn_{name}", default if value is None else value)
        if held.get("yarn_correction_range_round_to_int") is None:
            config.yarn_correction_range_round_to_int = True
    values = values_of(Model(config, options, None))
    if options is None:  # which layers are lightning is not known either
        del values["layers"]
        if values.get("position_embedding_type") in ROPE:  # applied or not, by the layers
            del values["position_embedding_type"]
    return {"format": FORMAT, "options": dataclasses.asdict(options) if options else {}, "values": values}
