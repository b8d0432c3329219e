"""Saves the right states where a buffer of the distributed optimizer has padding between its buckets, and refuses
checkpoints that have others.

Symbols:  megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable and
          .load_parameter_state_from_fully_reshardable, megatron.training.training.load_checkpoint
Why:      it gathers states without the padding at the ends of buckets, and then looks for each parameter where the
          padding still counts: all behind the first padded bucket are saved shifted, the last one filled up with
          zeros, "which can lead to data corruption", as its log says. They are loaded as weights. Buckets are several
          with --overlap-grad-reduce, and where tied embeddings meet pipeline stages.
          Such a checkpoint loads without a word, and its main parameters take the place of the weights with the first
          step. Each is compared with its weight as it is loaded, a tensor at a time; all ranks then end together.
Versions: megatron-core 0.19; in 0.20 (Megatron's branch main) saving is mended, and loading alone is patched
Can go:   when --dist-ckpt-optim-fully-reshardable resumes with equal losses where a bucket has padding, and nobody
          has a checkpoint any more that was saved before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..resume.optimizer import refuse_other_main_parameters
from ._replace import replace

_OWNER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
SYMBOLS = (
    f"{_OWNER}.sharded_param_state_fully_reshardable",
    f"{_OWNER}.load_parameter_state_from_fully_reshardable",
    "megatron.training.training.load_checkpoint",
)
PARAMETERS = (
    ("self", "model_sharded_state_dict", "is_loading", "metadata"),
    ("self", "state_dict"),
    (
        "ddp_model", "optimizer", "opt_param_scheduler", "load_arg", "strict", "checkpointing_context",
        "skip_load_to_model_and_opt", "tp_group", "pp_group", "dp_cp_group", "dp_group", "expt_dp_group",
        "rng_state_key_prefix",
    ),
)  # fmt: skip
_NAMES, _FOUND = "_lightning_names", "_lightning_main_parameters"  # attributes of an optimizer while it is loaded


def with_padding(states: torch.Tensor, buffer: Any) -> torch.Tensor:
    """The states of all buckets of a buffer, each where its bucket begins in it; zeros in between."""
    found, at = states.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        found[bucket.offset :][: bucket.numel_unpadded] = states[at : at + bucket.numel_unpadded]
        at += bucket.numel_unpadded
    return found


def is_rounded(weight: torch.Tensor, main: torch.Tensor) -> bool:
    """Whether a weight that was loaded is its main parameter, rounded some times.

    Rounded to bf16 it may be off by 2^-8 of its value, and by as much again where both were multiplied (``--qk-clip``)
    or a checkpoint goes on in another precision; fp16 has steps of 2^-24. Twice that is allowed: states from
    another place are other values.
    """
    main = main.to(weight.device, torch.float32)
    weight = weight.to(torch.float32)
    far = (weight - main).abs() > main.abs() * 2**-6 + 2**-23
    return not bool((far | (weight.isnan() != main.isnan())).any())


def is_mended(save: Callable) -> bool:
    """Whether Megatron's own method looks in the right place, as on its branch main (d98e8a64): then states must stay
    as they are gathered. Where it does not, it counts what lies behind the end, to fill it up with zeros.
    """
    return "missing_elems_num" not in inspect.unwrap(save).__code__.co_varnames


def _wrap_sharded(original: Callable) -> Callable:
    mended = is_mended(original)

    def sharded_param_state_fully_reshardable(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict | None = None
    ) -> Any:
        if is_loading:
            from megatron.core.dist_checkpointing.dict_utils import nested_values
            from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

            every = nested_values(model_sharded_state_dict)
            shards = (x for x in every if isinstance(x, (ShardedTensor, ShardedTensorFactory)))
            setattr(self, _NAMES, {x.data: x.key for x in shards})  # of the checkpoint
        if mended:
            return original(self, model_sharded_state_dict, is_loading, metadata)
        gather = self.get_parameter_state_dp_zero

        def gathered(*args: Any, **kwargs: Any) -> dict | None:
            state = gather(*args, **kwargs)
            for number, buffer in enumerate(self.buffers if state is not None else ()):
                if buffer.numel_unpadded == buffer.numel:
                    continue
                for tensors in state[number].values():
                    for name, value in tensors.items():
                        if isinstance(value, torch.Tensor):
                            tensors[name] = with_padding(value, buffer)
            return state

        self.get_parameter_state_dp_zero = gathered  # for this call alone: files of other formats have no padding
        try:
            return original(self, model_sharded_state_dict, is_loading, metadata)
        finally:
            del self.get_parameter_state_dp_zero

    return sharded_param_state_fully_reshardable


def _comparable(optimizer: Any, parameter: torch.Tensor) -> bool:
    """Whether the weight is its main parameter rounded to its dtype.

    It is not with --fp8-param-gather and the like (a scale, or blocks, and a tensor of its own class), and need not be
    where TransformerEngine's optimizer rounds the new value twice by itself, to the weight and to --main-params-dtype,
    or keeps the bits that the weight lacks (--use-precision-aware-optimizer, which --optimizer-cpu-offload needs).
    """
    plain = type(parameter.data) is torch.Tensor and parameter.is_floating_point() and parameter.element_size() > 1
    return plain and not optimizer.config.use_precision_aware_optimizer


def _wrap_load_states(original: Callable) -> Callable:
    def load_parameter_state_from_fully_reshardable(self: Any, state_dict: dict) -> None:
        put = self._set_main_param_and_optimizer_states
        names = vars(self).pop(_NAMES, {})
        unequal, compared = [], 0

        def compared_first(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
            nonlocal compared
            if _comparable(self, model_param):  # before it is put: in fp32 the weight itself is overwritten
                span = self._get_model_param_range_map(model_param)["param"]
                weight = model_param.detach().view(-1)[span.start : span.end]
                compared += 1
                if not is_rounded(weight, tensors["param"].detach()):
                    unequal.append(names.get(model_param) or self._param_name(model_param))
            put(model_param, tensors)

        self._set_main_param_and_optimizer_states = compared_first  # for this call alone: no other format is shifted
        try:
            original(self, state_dict)
        finally:
            del self._set_main_param_and_optimizer_states
        setattr(self, _FOUND, (unequal, compared))

    return load_parameter_state_from_fully_reshardable


def _all(optimizer: Any) -> Iterator[Any]:
    yield optimizer
    for inner in getattr(optimizer, "chained_optimizers", ()):
        yield from _all(inner)


def _wrap_load(original: Callable) -> Callable:
    def load_checkpoint(ddp_model: Any, optimizer: Any, *others: Any, **more: Any) -> Any:
        from megatron.training.global_vars import get_args

        result = original(ddp_model, optimizer, *others, **more)
        if optimizer is not None and dist.is_initialized():  # on all ranks: some may hold nothing of an optimizer
            found = [x for one in _all(optimizer) if (x := vars(one).pop(_FOUND, None)) is not None]
            mine = [name for unequal, _ in found for name in unequal], sum(count for _, count in found)
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, mine)
            refuse_other_main_parameters(everywhere, get_args())
        return result

    return load_checkpoint


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    effects = (
        "states are saved right where buckets have padding", "main parameters are compared with the weights",
        "a checkpoint whose main parameters are not its weights is refused",
    )  # fmt: skip
    for row in zip(SYMBOLS, PARAMETERS, (_wrap_sharded, _wrap_load_states, _wrap_load), effects, strict=True):
        replace(*row)
