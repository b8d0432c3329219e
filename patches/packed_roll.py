"""Tokens ahead in packed documents: all at once, also where they cross the chunks of context-parallel ranks.

Symbol:   megatron.core.transformer.multi_token_prediction.roll_tensor
Why:      multi-token prediction shifts tokens, labels and loss mask by one place within each document, in Megatron one
          document after the other, waiting for the GPU at each. With context parallelism Megatron assumes each packed
          document is sharded separately (``_roll_tensor_packed_seq`` divides bounds by the number of ranks).
          ``--dataloader-inter-document-masking`` shards the whole sequence, and the wrong tokens would be predicted,
          silently. Here the whole sequence is shifted, which Megatron does right, and the last token of each document
          gets what Megatron gives it: 0. Megatron also assumes two chunks a rank, with packed documents and without; of
          a sequence cut as "contiguous" each has one, and the shift is done here.
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
        over_ranks = group is not None and group.size() > 1
        how = dict(shifts=shifts, dims=dims, cp_group=group)
        if over_ranks:
            ours = contiguous or (packed_seq_params is not None and _layout == "zigzag")
        else:
            ours = packed_seq_params is not None
        if tensor is None or not ours:
            return original(tensor, **how, packed_seq_params=packed_seq_params, **added)
        assert shifts == -1, shifts
        if over_ranks and contiguous:
            rolled = _shift(tensor, dims, group)
        else:
            rolled, _ = original(tensor, **how, **added)
        if packed_seq_params is not None:
            ends = document_bounds(packed_seq_params)[1:] - 1
            layout = _layout if over_ranks else "zigzag"
            mine = token_positions(tensor.shape[dims], group=group, layout=layout, device=tensor.device)
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


def apply(layout: str | None) -> None:
    """Apply the patch; a second call does nothing. Sequences cut as "zigzag-documents" are left to Megatron.

    Args:
        layout: how sequences are cut over context-parallel ranks; None for a model of one.

    Raises:
        ValueError: another model of this process has its sequences cut in another way.
    """
    global _layout
    if layout is not None:
        if _layout not in (None, layout):
            raise ValueError(
                f"multi-token prediction over context-parallel ranks: sequences are cut as {layout!r}, and those of "
                f"another model of this process as {_layout!r}; use one process for each"
            )
        _layout = layout
    replace(
        SYMBOLS[0],
        PARAMETERS,
        _wrap,
        "packed documents are shifted at once, and may cross the chunks of context-parallel ranks",
        later=LATER,
    )
