"""Tokens ahead, within packed documents that cross the chunks of context-parallel ranks.

Symbol:   megatron.core.transformer.multi_token_prediction.roll_tensor
Why:      multi-token prediction shifts tokens, labels and loss mask by one place within each document. With context
          parallelism Megatron assumes each packed document is sharded separately (``_roll_tensor_packed_seq`` divides
          bounds by the number of ranks). ``--dataloader-inter-document-masking`` shards the whole sequence, and the
          wrong tokens would be predicted, silently. Here the whole sequence is shifted, which Megatron does right, and
          the last token of each document gets what Megatron gives it: 0.
Versions: megatron-core 0.19, 0.20
Can go:   when ``roll_tensor`` knows how the sequence was sharded.

``roll_tensor`` is not told which model it serves: all models of a process must have their sequences cut in one way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..packed import document_bounds, sharing_group
from ..parallel import token_positions
from ._replace import replace

SYMBOLS = ("megatron.core.transformer.multi_token_prediction.roll_tensor",)
PARAMETERS = ("tensor", "shifts", "dims", "cp_group", "packed_seq_params")
LATER = (*PARAMETERS, "return_sum")  # 0.20

_layout: str | None = None


def _wrap(original: Callable) -> Callable:
    def roll_tensor(tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None, **added):
        group = sharing_group(packed_seq_params, cp_group)
        if tensor is None or packed_seq_params is None or group is None or group.size() == 1:
            how = dict(shifts=shifts, dims=dims, cp_group=group, packed_seq_params=packed_seq_params)
            return original(tensor, **how, **added)
        assert shifts == -1, shifts
        rolled, _ = original(tensor, shifts=shifts, dims=dims, cp_group=group, **added)
        ends = document_bounds(packed_seq_params)[1:] - 1
        mine = token_positions(tensor.shape[dims], group=group, layout="zigzag", device=tensor.device)
        last = torch.isin(mine, ends.to(mine.device, mine.dtype))
        rolled = rolled.transpose(dims, -1).masked_fill(last, 0).transpose(dims, -1)
        return rolled, rolled.sum() if added.get("return_sum", True) else None

    return roll_tensor


def apply(layout: str) -> None:
    """Apply the patch if ``layout`` is ``"zigzag"``; a second call does nothing.

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
    if layout == "zigzag":
        replace(
            SYMBOLS[0],
            PARAMETERS,
            _wrap,
            "packed documents may cross the chunks of context-parallel ranks",
            later=LATER,
        )
