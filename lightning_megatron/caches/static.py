"""The states of lightning layers in Megatron's StaticInferenceContext: one batch whose rows advance together."""

from __future__ import annotations

import torch

from ..config import has_softmax_layers


class StaticStates:
    """What one step of a lightning layer reads from a StaticInferenceContext, and leaves there.

    ``context.key_value_memory_dict[layer_number]`` is a pair whose second dimension is the batch, as that of softmax
    layers, because ``context.swap_key_value_dict`` unpacks and permutes pairs:

        (states of all rows: fp32 [1, max_batch_size, H, K, V],
         an empty tensor [0, max_batch_size, rows, tokens, padded])

    The sizes of the empty tensor are what is known of the states: how many rows are in use, how many tokens they hold,
    and whether (1 or 0) some of these were padding. They stay with the states when a caller permutes or restores these,
    and reading them needs no synchronization. No step writes into the tensors of an earlier one.

    Args:
        context: Megatron's StaticInferenceContext.
        layer_number: 1-based, over all pipeline stages.
        config: Megatron's TransformerConfig.
        tokens, rows: of this step; the rows are those from ``context.batch_size_offset`` on.
        mask: attention_mask of this step, ``[..., tokens or 1, keys]``, true where a key is hidden, or None.

    Raises:
        ValueError: a step that the states cannot serve, and what to do.
    """

    def __init__(self, context, layer_number: int, config, *, tokens: int, rows: int, mask: torch.Tensor | None):
        self._context, self._layer = context, layer_number
        self._start, self._end = context.batch_size_offset, context.batch_size_offset + rows
        self._before, self._after = context.sequence_len_offset, context.sequence_len_offset + tokens
        _refuse_config(config, context, tokens, self._before)
        if self._end > context.max_batch_size:
            raise ValueError(
                f"rows {self._start} to {self._end - 1} of a batch are more than the StaticInferenceContext has with "
                f"max_batch_size={context.max_batch_size}; give it a larger one"
            )
        self._padded = mask is not None and _refuse_hidden(mask, tokens, first=self._before == 0)
        if self._before:
            self._check_continued()

    @property
    def initial(self) -> torch.Tensor | None:
        """The states before this step, fp32 ``[b, H, K, V]``; None before the first token."""
        if self._before == 0:
            return None
        return self._context.key_value_memory_dict[self._layer][0][0, self._start : self._end]

    def store(self, states: torch.Tensor) -> None:
        """Leave ``states``, fp32 ``[b, H, K, V]``, for the next step."""
        size = self._context.max_batch_size
        rows, padded = self._end, self._padded
        if states.shape[0] != size:
            earlier = self._context.key_value_memory_dict.get(self._layer)
            others = states.new_zeros(size, *states.shape[1:])
            if earlier is not None and (self._before or self._start):  # of this batch
                others = earlier[0][0]
                rows, padded = max(rows, earlier[1].shape[2]), padded or bool(earlier[1].shape[4])
            states = torch.cat((others[: self._start], states, others[self._end :]))
        known = states.new_empty(0, size, rows, self._after, int(padded))
        self._context.key_value_memory_dict[self._layer] = (states[None], known)

    def _check_continued(self) -> None:
        """Refuse states that are not those of the tokens before this step."""
        offset = f"sequence_len_offset is {self._before}"
        entry = self._context.key_value_memory_dict.get(self._layer)
        if entry is None:
            raise ValueError(
                f"{offset}, but the context holds no state of lightning layer {self._layer}; begin with the prompt, at "
                "sequence_len_offset 0"
            )
        _, _, rows, tokens, padded = entry[1].shape
        # rows before these may have had this step already, as micro-batches of one batch
        if tokens != self._before and not (self._start and tokens == self._after):
            raise ValueError(
                f"{offset}, but the state of lightning layer {self._layer} holds {tokens} tokens, and a state cannot "
                "go back; to go back, begin again with the prompt, or copy context.key_value_memory_dict before the "
                "step (as dict(...)) and restore it with the offset"
            )
        if self._end > rows:
            raise ValueError(
                f"{self._end} rows go on after a prompt of {rows}: the others have no state in lightning layer "
                f"{self._layer}; begin with a prompt for all of them"
            )
        if padded and not self._padded:
            raise ValueError(
                "a step after a right-padded prompt, without a mask that still marks the padded rows as padding: the "
                "states of these rows hold padding, and a state of a lightning layer cannot leave a token out; give "
                "prompts of equal length, generate for one at a time, or use Megatron's static engine, which reads the "
                "longer prompts' last tokens step by step"
            )


def _refuse_config(config, context, tokens: int, before: int) -> None:
    if config.sequence_parallel:
        raise ValueError(
            "lightning layers do not generate with --sequence-parallel: steps of one token cannot be shared among "
            "ranks; leave it out when the model is loaded to generate"
        )
    if config.cuda_graph_impl == "local" and context.is_decode_only():
        raise ValueError(
            "--cuda-graph-impl local captures steps of Megatron's static inference, whose states of lightning layers "
            "have no fixed address; use --cuda-graph-impl none"
        )
    several = tokens > 1 and before > 0 and config.transformer_impl == "transformer_engine"
    if several and has_softmax_layers(config):
        raise ValueError(
            f"{tokens} tokens after {before} in one step: Megatron turns the mask of the softmax layers off after the "
            "first step, and with TransformerEngine the tokens would see each other's future; generate one token at a "
            "time, or use --transformer-impl local"
        )


def _refuse_hidden(mask: torch.Tensor, tokens: int, *, first: bool) -> bool:
    """Refuse a mask ``[..., tokens or 1, keys]``, true where a key is hidden, that hides a key from a later token.

    The state sums all tokens so far. What follows a query, and padding after a prompt, is never in it.

    Returns:
        Whether the last token of a row is padding, which sees itself only, or not itself. A row that has no token
        in the ``first`` step only fills the batch.
    """
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # its values cannot be read now, and were in the run before the capture
    hidden, (queries, keys) = mask.bool(), mask.shape[-2:]
    of_keys = queries < tokens  # one row for all queries
    last = keys if of_keys else keys - queries  # position of the first query
    earlier = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(last - 1)
    # a key that is visible and earlier than its query, right after a hidden one
    refused = (hidden[..., :-1] & ~hidden[..., 1:] & earlier[:, 1:]).any()
    if not of_keys and queries < keys:  # a query that sees itself and earlier keys, but not the one before itself
        query = torch.arange(queries, device=mask.device)
        own, previous = hidden[..., query, last + query], hidden[..., query, last + query - 1]
        refused |= (~own & previous & (~hidden & earlier).any(-1)).any()
    if queries == keys or of_keys:  # the first key hidden from all queries, in a row that is not empty
        refused |= (hidden[..., 0].all(-1) & ~hidden.flatten(-2).all(-1)).any()
    padded = hidden[..., -1, :].any(-1)
    if first:
        padded &= ~hidden.flatten(-2).all(-1)
    refused, padded = torch.stack((refused, padded.any())).tolist()  # one synchronization
    if refused:
        raise ValueError(
            f"attention_mask {list(mask.shape)} hides earlier tokens from later ones, as left-padded prompts need it, "
            "but the state of a lightning layer holds every token before; give prompts of equal length, or generate "
            "for one at a time"
        )
    return padded
