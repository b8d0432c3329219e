"""Losses of a sequence read in chunks, in memory that does not grow with it where all layers are lightning layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

from ..ops import vocab_parallel_cross_entropy
from ..training.loss import output_processed
from .angles import angles_on_demand
from .reader import Reader

_ROWS = 1024  # tokens whose logits exist at once


class LossReader(Reader):
    """A ``Reader`` that is told which tokens follow, and returns how well the model foresaw them."""

    def __init__(self, model: torch.nn.Module, vocab_size: int, max_length: int | None, chunk: int):
        """At most ``max_length`` tokens are read, any number if None, and ``chunk`` at a time."""
        super().__init__(model, max_length=chunk)
        self._vocab_size, self._longest = vocab_size, max_length
        self._wrapper = _Losses(model, self.context)

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, model: torch.nn.Module, vocab_size: int, max_length: int | None, chunk: int
    ) -> Iterator[LossReader]:
        """A reader, and the model's angles on demand while it is open."""
        with angles_on_demand(model):
            yield cls(model, vocab_size, max_length, chunk)

    def losses(self, tokens: Sequence[int], targets: Sequence[int]) -> torch.Tensor | None:
        """-log p of every target [t] in fp32 (fp64 of an fp64 model) on the last pipeline stage, None on the others.

        p is over the first ``vocab_size`` rows of the table: the others are padding, and generation never draws them.
        """
        self._reserve(self.context.sequence_len_offset + len(tokens))
        labels = torch.tensor([list(targets)], device=torch.cuda.current_device())
        return self._wrapper.losses(self.inputs(tokens), labels, self._vocab_size)

    def forget(self) -> None:
        """Begin a new sequence."""
        self.context.reset()

    def softmax_bytes(self) -> int:
        """Bytes of keys and values that this rank's softmax layers keep for one token; 0 before the first chunk."""
        lightning = set(self.lightning_layers())
        memory = self.context.key_value_memory_dict
        return sum(x[:1].nbytes for number, xs in memory.items() if number not in lightning for x in xs)

    def _reserve(self, length: int) -> None:
        """Room for keys and values of ``length`` tokens: at least twice as much as before, as a list grows."""
        context = self.context
        if length <= context.max_sequence_length:
            return
        room = max(length, 2 * context.max_sequence_length)
        context.max_sequence_length = room if self._longest is None else min(room, max(length, self._longest))
        lightning = set(self.lightning_layers())
        for number, memory in context.key_value_memory_dict.items():
            if number not in lightning:
                larger = [x.new_empty(context.max_sequence_length, *x.shape[1:]) for x in memory]
                for new, old in zip(larger, memory, strict=True):
                    new[: context.sequence_len_offset] = old[: context.sequence_len_offset]
                context.key_value_memory_dict[number] = tuple(larger)


class _Losses(GPTInferenceWrapper):
    """Megatron's forward over pipeline stages, with losses in place of the logits of all tokens."""

    def losses(self, inputs: dict[str, Any], labels: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
        self._labels, self._vocab_size, self._found = labels, vocab_size, None
        self.run_one_forward_step(inputs)
        return self._found

    def _forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        with output_processed(self.model, self._keep, self._labels) as arguments:
            return self.model(
                inputs["tokens"], inputs["position_ids"], None, inference_context=self.inference_context, **arguments
            )

    def _keep(
        self, hidden_states, output_layer, output_weight, labels, scale_logits, call=None, **_: Any
    ) -> torch.Tensor:
        """Keeps the losses, which Megatron would round to the dtype of parameters."""
        group, layer = parallel_state.get_tensor_model_parallel_group(), call or output_layer
        found = []
        for hidden, target in zip(hidden_states.split(_ROWS), labels[0].split(_ROWS), strict=True):
            logits, _ = layer(hidden, weight=output_weight, runtime_gather_output=False)
            logits = scale_logits(logits)[:, 0]
            tokens = min(max(self._vocab_size - group.rank() * logits.shape[1], 0), logits.shape[1])
            logits[:, tokens:] = float("-inf")
            found.append(vocab_parallel_cross_entropy(logits, target, group))
        self._found = torch.cat(found)
        return hidden_states
