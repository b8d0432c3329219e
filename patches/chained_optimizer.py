"""Resumes a model with experts at another expert-parallel size.

Symbol:   megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict
Why:      experts have an optimizer of their own where expert parallelism is more than 1, and else that of all other
          parameters. A checkpoint holds the hyperparameters of the groups as one dict, or as a dict by number, and
          loading one as the other fails with KeyError 'optimizer' or "Expected 2 entries". The tensors have the same
          names in both.
Versions: megatron-core 0.19, 0.20
Can go:   when a checkpoint saved with --expert-model-parallel-size 2 resumes with 1, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._replace import replace

SYMBOLS = ("megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",)
_EXPERTS = "is_expert_parallel"


def regrouped(optimizers: list[Any], state: Any) -> Any:
    """The state of a checkpoint that was saved with another number of optimizers, in the form for these.

    Such a state has both forms: entries of this run's, with the tensors that were loaded, and those of the
    checkpoint's, which hold groups and the state of the loss scaler. Any other state is returned as it is.

    Raises:
        ValueError: a group that the checkpoint does not have.
    """
    if not isinstance(state, dict):
        return state
    numbered = [state[key] for key in sorted(key for key in state if isinstance(key, int))]
    single = {key: value for key, value in state.items() if not isinstance(key, int)}
    if not numbered or not single:
        return state
    ours, theirs = ([single], numbered) if len(optimizers) == 1 else (numbered, [single])
    saved = [group for one in theirs for group in _inner(one)["param_groups"]]
    # the step of all parameters, where it does not lie in the groups
    common = {key: value for key, value in _inner(theirs[0]).get("state", {}).items() if isinstance(key, str)}
    for optimizer, own in zip(optimizers, ours, strict=True):
        for key, value in theirs[0].items():
            if key not in ("state", "param_groups"):
                own.setdefault(key, value)
        inner = _inner(own)
        if inner is not own:
            inner = own["optimizer"] = dict(inner)  # of which the checkpoint may have one for all
        if common:
            inner["state"] = common | inner.get("state", {})
        inner["param_groups"] = [_of(group, saved) for group in optimizer.optimizer.state_dict()["param_groups"]]
    return ours[0] if len(optimizers) == 1 else dict(enumerate(ours))


def _inner(state: dict[str, Any]) -> dict[str, Any]:
    """What torch's optimizer has: all there is, in fp32 without the distributed optimizer."""
    found: dict[str, Any] = state.get("optimizer", state)
    return found


def _of(group: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved group that holds what this one holds, with the parameters of this one."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    names = [name for name in param_group_identifier_keys if name != _EXPERTS]
    key = [_value(group, name) for name in names]
    found = [other for other in saved if [_value(other, name) for name in names] == key]
    if not found:
        raise ValueError(
            f"the optimizer of the checkpoint has no group of parameters with {dict(zip(names, key, strict=True))}, as "
            "this run has: give the flags of learning rate and weight decay of that run; or go on without its state, "
            "with --no-load-optim"
        )
    exact = [other for other in found if other.get(_EXPERTS) == group.get(_EXPERTS)]
    return {**(exact or found)[0], "params": group["params"], _EXPERTS: group.get(_EXPERTS)}


def _value(group: dict[str, Any], name: str) -> Any:
    return group.get(name, group.get(f"pre_{name}"))


def _wrap(original: Callable) -> Callable:
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, regrouped(self.chained_optimizers, state_dict))

    return load_state_dict


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], ("self", "state_dict"), _wrap, "experts resume at another expert-parallel size")
