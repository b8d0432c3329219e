"""Models of the released families on ranks of Megatron: built from a config.json, loaded through its units."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder

from lightning_megatron.models.family import command_line, family_of
from lightning_megatron.record import options_from_args
from lightning_megatron.spec import make_spec
from lightning_megatron.training.models import saved_args

Tensors = dict[str, torch.Tensor]

# Heads of 64, as the kernels see them in released models; transformers rotates all of a head. All experts are chosen:
# rounding would choose others.
_BAILING = dict(hidden_size=256, head_dim=64, num_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1)
LARGER = {
    "ring-mini-linear-2.0": _BAILING,
    "ling-2.6-flash": _BAILING | dict(kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
    "minimax-m1": dict(hidden_size=256, head_dim=64, rotary_dim=64, num_local_experts=2, num_experts_per_tok=2),
    "tnl-1b": dict(decoder_embed_dim=256, hidden_dim=256),
}


def args_of(config: dict[str, Any], more: str = "") -> Namespace:
    return saved_args([*command_line(family_of(config).flags(config)), *more.split()])


def to_megatron(config: dict[str, Any], args: Namespace, theirs: Tensors) -> Tensors:
    """Whole tensors of a Megatron checkpoint, by key; every tensor of both is accounted for."""
    found: Tensors = {}
    filled: dict[str, int] = {}
    unread = set(theirs)
    for unit in family_of(config).units(args, config):
        for named in unit.hf:
            if named.name in theirs:
                assert tuple(theirs[named.name].shape) == named.shape, named
                unread.remove(named.name)
            else:
                assert named.optional, f"{named.name} is missing"
        moved = unit.to_megatron([theirs.get(named.name) for named in unit.hf])
        for piece, x in zip(unit.megatron, moved, strict=True):
            assert tuple(x.shape) == piece.shape, (piece, x.shape)
            whole = found.setdefault(piece.key, torch.full(piece.whole, torch.nan, dtype=x.dtype))
            whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))] = x
            filled[piece.key] = filled.get(piece.key, 0) + x.numel()
    assert not unread, f"no unit reads {sorted(unread)}"
    assert all(filled[key] == x.numel() for key, x in found.items())
    return found


def build(args: Namespace, spec: Callable | None = None, **layout: Any) -> torch.nn.Module:
    """This rank's part of the model, in process groups that exist; ``spec`` in place of that of the args."""
    tp = layout.get("tensor_model_parallel_size", 1)
    layout |= dict(expert_tensor_parallel_size=tp, tensor_parallel_num_weight_shards=tp)
    layout |= dict(expert_tensor_parallel_num_weight_shards=tp)
    for name, value in layout.items():
        setattr(args, name, value)
    config = core_transformer_config_from_args(args)
    model = gpt_config_from_args(args, config=config)
    model.transformer_layer_spec = spec or make_spec(options_from_args(args))
    pp = parallel_state
    return GPTModelBuilder(model).build_model(
        ProcessGroupCollection.use_mpu_process_groups(),
        pre_process=pp.is_pipeline_first_stage(),
        post_process=pp.is_pipeline_last_stage(),
    )


def load(model: torch.nn.Module, tensors: Tensors) -> None:
    """Every parameter and buffer of this rank, from whole tensors of a checkpoint."""
    held = model.sharded_state_dict(metadata={}).values()
    keys = {x.key for x in held if isinstance(x, (ShardedTensor, ShardedTensorFactory))}
    alone = parallel_state.get_pipeline_model_parallel_world_size() == 1
    assert keys == set(tensors) if alone else keys <= set(tensors), keys ^ set(tensors)
    missing, unexpected = model.load_state_dict(slices(model, tensors), strict=False)
    assert not unexpected and not [name for name in missing if "_extra_state" not in name], (missing, unexpected)


def slices(model: torch.nn.Module, tensors: Tensors) -> Tensors:
    """This rank's part of whole tensors, by the model's own names."""
    found = {}
    for name, sharded in model.sharded_state_dict(metadata={}).items():
        if isinstance(sharded, ShardedTensorFactory):
            found[name] = sharded.merge_fn(dict_list_map_outplace(lambda x: _slice(x, tensors), sharded.build()))
        elif isinstance(sharded, ShardedTensor):
            found[name] = _slice(sharded, tensors)
    return found


def _slice(sharded: ShardedTensor, tensors: Tensors) -> torch.Tensor:
    whole = tensors[sharded.key]
    assert tuple(whole.shape) == tuple(sharded.global_shape), f"{sharded.key}: {whole.shape}, {sharded.global_shape}"
    local = (1,) * sharded.prepend_axis_num + tuple(sharded.local_shape)
    box = whole[tuple(slice(o, o + n) for o, n in zip(sharded.global_offset, local, strict=True))]
    return box.reshape(sharded.local_shape).clone()


def hidden_states(model: torch.nn.Module, forward: Callable[[], Any]) -> tuple[dict[int, torch.Tensor], Any]:
    """What each layer of this rank returns, by its number from 0, and the result of ``forward``.

    Layers of multi-token prediction, whose states have passed its final norm, follow the others.
    """
    found, hooks = {}, []
    ahead = model.mtp.layers if model.mtp_process else ()
    for first, layer in [(0, layer) for layer in model.decoder.layers] + [(model.config.num_layers, x) for x in ahead]:

        def keep(module, inputs, outputs, number=first + layer.layer_number - 1):
            found[number] = outputs[0].detach()

        hooks.append(layer.register_forward_hook(keep))
    result = forward()
    for hook in hooks:
        hook.remove()
    return found, result
