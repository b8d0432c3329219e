"""Resumes a model with experts at another expert-parallel size, and any model with another learning rate.

Symbol:   megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict
Why:      experts have an optimizer of their own where expert parallelism is more than 1, and else that of all other
          parameters. A checkpoint holds the hyperparameters of the groups as one dict, or as a dict by number, and
          loading one as the other fails with KeyError 'optimizer' or "Expected 2 entries". The tensors have the same
          names in both.
          Megatron finds the groups of a checkpoint by what they hold, the learning rates among it, so that with another
          --lr or --min-lr it finds none and fails: --override-opt-param-scheduler and
          --use-checkpoint-opt-param-scheduler, which settle the rest of the schedule, are looked at behind it.
          The groups also hold the betas, epsilon and momentum of the run that saved them, which take the place of
          the flags' without a word; ``resume`` refuses others without one of the two flags.
Versions: megatron-core 0.19, 0.20
Can go:   when a checkpoint saved with --expert-model-parallel-size 2 resumes with 1, and the other way round; and any
          with another --lr and either of the two flags, with the losses of the rate that the flag chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._replace import replace

SYMBOLS = ("megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",)
_EXPERTS = "is_expert_parallel"
_RATES = ("max_lr", "min_lr")
_OF_FLAGS = ("betas", "eps", "momentum", "beta2", "shampoo_beta")  # of any optimizer, in its groups


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
    groups = [one.optimizer.state_dict()["param_groups"] for one in optimizers]
    every = [group for some in groups for group in some]
    for own_groups, own in zip(groups, ours, strict=True):
        for key, value in theirs[0].items():
            if key not in ("state", "param_groups"):
                own.setdefault(key, value)
        inner = _inner(own)
        if inner is not own:
            inner = own["optimizer"] = dict(inner)  # of which the checkpoint may have one for all
        if common:
            inner["state"] = common | inner.get("state", {})
        inner["param_groups"] = [_of(group, every, saved) for group in own_groups]
    return ours[0] if len(optimizers) == 1 else dict(enumerate(ours))


def _inner(state: dict[str, Any]) -> dict[str, Any]:
    """What torch's optimizer has: all there is, in fp32 without the distributed optimizer."""
    found: dict[str, Any] = state.get("optimizer", state)
    return found


def _of(group: dict[str, Any], groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved group that holds what this one of ``groups`` holds, with the parameters of this one."""
    free = (_EXPERTS, *_RATES)
    found = _like(group, _rates_there(group, groups, saved, free), saved, free)
    if found is None:
        raise ValueError(
            f"the optimizer of the checkpoint has no group of parameters with {_held(group, (_EXPERTS, *_RATES))}, as "
            "this run has: give the flags of optimizer and weight decay of that run; or go on without its state, "
            "with --no-load-optim"
        )
    return {**found, "params": group["params"], _EXPERTS: group.get(_EXPERTS)}


def rerate(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the learning rates of ``groups`` into those of a checkpoint, by which Megatron looks for them.

    Returns:
        The checkpoint's rates for each of ``groups``; none for a group that it does not have.
    """
    before, rest = [], list(saved)
    there = [_rates_there(group, groups, saved, _RATES) for group in groups]  # before any is written
    for group, rates in zip(groups, there, strict=True):
        found = _like(group, rates, rest, _RATES)
        before.append({} if found is None else {name: found[name] for name in _RATES if name in found})
        if found is not None:
            found.update((name, group[name]) for name in _RATES if name in group)
            rest = [other for other in rest if other is not found]
    return before


def _rates_there(
    group: dict[str, Any], groups: list[dict[str, Any]], saved: list[dict[str, Any]], free: tuple[str, ...]
) -> tuple:
    """The rates that one of ``groups`` has in the checkpoint, where several are told apart by their rates alone: those
    of muP, hidden weights and all others. Their order is that of this run's: one of these may have the rate that
    another one has there.
    """
    held = _held(group, free)
    ours, theirs = (sorted({_rates(x) for x in some if _held(x, free) == held}) for some in (groups, saved))
    return theirs[ours.index(_rates(group))] if len(ours) == len(theirs) else _rates(group)


def _rates(group: dict[str, Any]) -> tuple:
    return tuple(value if (value := _value(group, name)) is not None else -1.0 for name in _RATES)


def _like(
    group: dict[str, Any], rates: tuple, saved: list[dict[str, Any]], free: tuple[str, ...]
) -> dict[str, Any] | None:
    """The saved group that holds the same but for ``free``, and of several one with these rates, and with the same
    values of the rest of ``free``.
    """
    found = [other for other in saved if _held(other, free) == _held(group, free)]
    others = [name for name in free if name not in _RATES]
    return max(
        found,
        key=lambda other: (
            sum(a == b for a, b in zip(_rates(other), rates, strict=True))
            + sum(_value(other, name) == _value(group, name) for name in others)
        ),
        default=None,
    )


def _held(group: dict[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
    """What tells a group from others."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    return {name: _value(group, name) for name in param_group_identifier_keys if name not in free}


def _value(group: dict[str, Any], name: str) -> Any:
    return group.get(name, group.get(f"pre_{name}"))


def _wrap(original: Callable) -> Callable:
    def load_state_dict(self: Any, state_dict: Any) -> None:
        from megatron.training.global_vars import get_args

        optimizers = self.chained_optimizers
        state = regrouped(optimizers, state_dict)
        numbered = isinstance(state, dict) and all(isinstance(key, int) for key in state)
        states = [state[key] for key in sorted(state)] if numbered else state if isinstance(state, list) else [state]
        if self.config.optimizer == "sgd":
            for one in states:
                _inner(one).setdefault("state", {})  # without momentum there is none
        rates = [
            rerate(optimizer.param_groups, _inner(one).get("param_groups", []))
            for optimizer, one in zip(optimizers, states, strict=False)  # Megatron says what is missing
        ]
        flags = [[{x: group[x] for x in _OF_FLAGS if x in group} for group in one.param_groups] for one in optimizers]
        original(self, state)
        if get_args().override_opt_param_scheduler:
            for optimizer, ours in zip(optimizers, flags, strict=True):
                for group, values in zip(optimizer.param_groups, ours, strict=True):
                    group.update(values)
        if get_args().use_checkpoint_opt_param_scheduler:  # Megatron asks for it once it has the schedule
            for optimizer, before in zip(optimizers, rates, strict=False):
                for group, values in zip(optimizer.param_groups, before, strict=True):
                    group.update(values)

    return load_state_dict


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], ("self", "state_dict"), _wrap, "another expert-parallel size or learning rate resumes")
