"""Tokens ahead, where packed documents cross the chunks of context-parallel ranks, or each rank has one piece.

Symbol:   megatron.core.transformer.multi_token_prediction.roll_tensor
Why:      multi-token prediction shifts tokens, labels and loss mask by one place within each document. With context
          parallelism Megatron assumes each packed document is sharded separately (``_roll_tensor_packed_seq`` divides
          bounds by the number of ranks). ``--dataloader-inter-document-masking`` shards the whole sequence, and the
          wrong tokens would be predicted, silently. Here the whole sequence is shifted, which Megatron does right, and
          the last token of each document gets what Megatron gives it: 0. Megatron also assumes two chunks a rank, with
          packed documents and without; of a sequence cut as "contiguous" each has one, and the shift is done here.
Versions: megatron-core 0.19, 0.20
Can go:   when ``roll_tensor`` knows how the sequence was sharded.

``roll_tensor`` is not told which model it serves: all models of a process must have their sequences cut in one way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from ..packed import document_bounds, sharing_group
from ..parallel import token_positions
from ._replace import replace

SYMBOLS = ("megatron.core.transformer.multi_token_prediction.roll_tensor",)
PARAMETERS = ("tensor", "shifts", "dims", "cp_group", "packed_seq_params")
LATER = (*PARAMETERS, "return_sum")  # 0.20

_layout: str | None = None


def _wrap(original: Callable) -> Callable:
    def roll_tensor(tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None, **added):
        contiguous = _layout == "contiguous"
        group = sharing_group(packed_seq_params, cp_group, contiguous=contiguous)
        here = packed_seq_params is None and not contiguous
        if tensor is None or here or group is None or group.size() == 1:
            how = dict(shifts=shifts, dims=dims, cp_group=group, packed_seq_params=packed_seq_params)
            return original(tensor, **how, **added)
        assert shifts == -1, shifts
        if contiguous:
            rolled = _shift(tensor, dims, group)
        else:
            rolled, _ = original(tensor, shifts=shifts, dims=dims, cp_group=group, **added)
        if packed_seq_params is not None:
            ends = document_bounds(packed_seq_params)[1:] - 1
            mine = token_positions(tensor.shape[dims], group=group, layout=_layout, device=tensor.device)
            last = torch.isin(mine, ends.to(mine.device, mine.dtype))
            rolled = rolled.transpose(dims, -1).masked_fill(last, 0).transpose(dims, -1)
        return rolled, rolled.sum() if added.get("return_sum", True) else None

    return roll_tensor


def _shift(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """A piece of the sequence, one place later; 0 behind the last token. Of tokens, labels and masks: no gradients."""
    first = tensor.select(dim, 0).contiguous()
    firsts = [torch.empty_like(first) for _ in range(group.size())]
    dist.all_gather(firsts, first, group=group)
    after = (*firsts, torch.zeros_like(first))[group.rank() + 1]
    return torch.cat((tensor.narrow(dim, 1, tensor.shape[dim] - 1), after.unsqueeze(dim)), dim)


def apply(layout: str) -> None:
    """Apply the patch unless ``layout`` is ``"zigzag-documents"``; a second call does nothing.

    Raises:
        ValueError: another model of this process has its sequences cut in another way.
    """
    global _layout
    if _layout not in (None, layout):
        raise ValueError(
            f"multi-token prediction over context-parallel ranks: sequences are cut as {layout!r}, and those of "
            f"another model of this process as {_layout!r}; use one process for each"
        )
    _layout = layout
    if layout != "zigzag-documents":
        replace(
            SYMBOLS[0],
            PARAMETERS,
            _wrap,
            "packed documents may cross the chunks of context-parallel ranks",
            later=LATER,
        )
