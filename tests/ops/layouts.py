"""The same case, with its tensors elsewhere in memory."""

import torch

from .cases import Case


def time_first(case: Case) -> Case:
    """[T, B, ...] in memory, as Megatron has it; the gradient of o as well."""
    names = ("q", "k", "v", "do")
    return case.replace(**{n: getattr(case, n).transpose(0, 1).contiguous().transpose(0, 1) for n in names})


def fused(case: Case) -> Case:
    """Slices [Q | K | V] of one projection."""
    parts = (case.q, case.k, case.v)
    slices = torch.cat([x.flatten(2) for x in parts], dim=2).split([x.shape[2] * x.shape[3] for x in parts], dim=2)
    q, k, v = (part.unflatten(2, x.shape[2:]) for part, x in zip(slices, parts, strict=True))
    return case.replace(q=q, k=k, v=v)


def inside(case: Case) -> Case:
    """Slices of larger tensors along every axis, from an odd offset, with NaN around them."""

    def slice_of_larger(x: torch.Tensor) -> torch.Tensor:
        larger = x.new_full([n + 3 for n in x.shape], float("nan"))
        return larger[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)

    return case.replace(**{name: slice_of_larger(x) for name, x in vars(case).items() if getattr(x, "ndim", 0) == 4})


def head_dim_not_last(case: Case) -> Case:
    names = ("q", "k", "v", "do", "initial_state", "dfinal")
    return case.replace(**{n: getattr(case, n).transpose(1, 3).contiguous().transpose(1, 3) for n in names})


def expand(case: Case, **parts: torch.Tensor) -> Case:
    return case.replace(**{name: part.expand_as(getattr(case, name)) for name, part in parts.items()})


def expanded(case: Case) -> Case:
    """Inputs of stride 0: one q for all heads, one k for all tokens, one v for all rows."""
    return expand(case, q=case.q[:, :, :1], k=case.k[:, :1], v=case.v[:1], initial_state=case.initial_state[:1])


def summed(case: Case) -> Case:
    """Gradients of stride 0, as from ``.sum()``.

    A head's dv is then one draw a token: by itself, and not with short random documents, where all draws may be almost
    0 and the error of the head what was rounded off them.
    """
    return expand(case, do=case.do[:1, :1, :1, :1], dfinal=case.dfinal[:1, :1, :1, :1])
