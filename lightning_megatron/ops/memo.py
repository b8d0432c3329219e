"""What is made of a tensor that all layers are given: made once, while the tensor lives and stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

MOST = 16  # of one tensor: lengths that never return must not fill the memory
_kept = WeakTensorKeyDictionary()  # tensor -> (version, {key: made})


def keep[Made](
    tensor: torch.Tensor, key: Hashable, make: Callable[[torch.Tensor], Made], *, constant: bool = False
) -> Made:
    """``make(tensor)``, or what it returned before for this tensor, version and ``key``.

    ``make`` is given an alias, which it may hold on to; holding the tensor itself would keep it alive. It is called again inside a
    CUDA graph, whose replays find other values in the same memory, and for every stream; not if the tensor is ``constant``: what
    was made before a graph is then used in it.
    """
    if tensor.is_inference():  # such tensors do not tell whether they have changed
        return make(tensor)
    if tensor.is_cuda and not constant:
        if torch.cuda.is_current_stream_capturing():
            return make(tensor)
        key = (
            key,
            torch.cuda.current_stream(tensor.device).cuda_stream,
        )  # whose memory must not go to others before it is read
    version, made = _kept.get(tensor, (None, None))
    if version != tensor._version:
        made = {}
        _kept[tensor] = tensor._version, made
    if key not in made:
        if len(made) >= MOST:
            made.clear()
        made[key] = make(tensor.detach())
    return made[key]


def check_once(tensor: torch.Tensor, check: Callable, *arguments: int) -> None:
    """``check(tensor, *arguments)``, which waits for the GPU, once per tensor and version: marks on the tensor remember."""
    # tensors made in torch.inference_mode have no version and are checked every time
    mark = None if tensor.is_inference() else (tensor._version, check.__name__, arguments)
    marks = getattr(tensor, "_lightning_checked", ())
    if mark in marks:
        return
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # reading would break the capture; the warm-up before it has checked
    check(tensor, *arguments)
    if mark is not None:
        tensor._lightning_checked = {mark}.union(x for x in marks if x[0] == tensor._version)
