"""The mask of padding, one token ahead.

Symbol:   megatron.core.transformer.multi_token_prediction.MultiTokenPredictionLayer._get_embeddings
Why:      it shifts ``padding_mask`` as it shifts tokens, and sequence-parallel ranks have all tokens of the sequence,
          but a part of the mask: shifted by the bounds of whole documents it is another one. And behind the last token
          of a document there is none, which the mask would call no padding: of a conversation with padding the last
          place would count, of one without padding its last token.
Versions: megatron-core 0.19, 0.20
Can go:   when layers of multi-token prediction leave the padding of conversations out of their routing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ._replace import replace

SYMBOLS = ("megatron.core.transformer.multi_token_prediction.MultiTokenPredictionLayer._get_embeddings",)
PARAMETERS = (
    "self", "input_ids", "position_ids", "embedding", "hidden_states", "packed_seq_params", "padding_mask",
)  # fmt: skip


def ahead(
    mask: torch.Tensor, packed_seq_params: Any, cp_group: dist.ProcessGroup, sp_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Which tokens have padding behind them, or nothing of their document.

    Args:
        mask: ``[b, s]`` bool, this rank's part. True is padding.
        packed_seq_params: bounds of documents, or None.
        sp_group: ranks of which each has a part of the context-parallel rank's tokens, one behind the other; None
            where there are none.
    """
    from megatron.core.transformer import multi_token_prediction

    whole = mask
    if sp_group is not None:
        parts = [torch.empty_like(mask) for _ in range(sp_group.size())]
        dist.all_gather(parts, mask.contiguous(), group=sp_group)
        whole = torch.cat(parts, 1)
    # Megatron puts 0 where there is no token: of tokens that count, not of padding.
    counts, _ = multi_token_prediction.roll_tensor(
        (~whole).to(torch.uint8), shifts=-1, dims=-1, cp_group=cp_group, packed_seq_params=packed_seq_params
    )
    rolled = counts == 0
    return rolled if sp_group is None else rolled.chunk(sp_group.size(), 1)[sp_group.rank()].contiguous()


def _wrap(original: Callable) -> Callable:
    def _get_embeddings(
        self: Any, input_ids, position_ids, embedding, hidden_states, packed_seq_params=None, padding_mask=None
    ) -> tuple:
        ids, places, _, embedded, hidden = original(
            self, input_ids, position_ids, embedding, hidden_states, packed_seq_params
        )
        if padding_mask is not None:
            sp_group = self.tp_group if self.config.sequence_parallel else None
            padding_mask = ahead(padding_mask, packed_seq_params, self.cp_group, sp_group)
        return ids, places, padding_mask, embedded, hidden

    return _get_embeddings


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], PARAMETERS, _wrap, "the mask of padding is one token ahead on every rank")
