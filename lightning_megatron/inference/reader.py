"""One sequence, read a few tokens at a time with Megatron's static caches, over tensor and pipeline parallel ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.utils import InferenceMode

from ..mixer import LightningAttention
from .sample import Piece, Sample
from .sampling import Sampling


class Reader:
    """Reads tokens of one sequence; what layers keep of those before is in ``context``.

    All ranks of the model read the same tokens at the same time.
    """

    def __init__(self, model: torch.nn.Module, max_length: int):
        """``model`` as ``loading.loaded_model`` yields it; ``max_length`` tokens at most are read."""
        self.model = model
        self.context = StaticInferenceContext(max_batch_size=1, max_sequence_length=max_length)
        self._wrapper = GPTInferenceWrapper(model, self.context)

    def read(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """Logits of the token that follows: [1, padded vocabulary] on the last pipeline stage, None on the others."""
        with InferenceMode.active():  # the output layer reads the last token only
            logits = self._wrapper.run_one_forward_step(self.inputs(tokens))
        return None if logits is None else logits[:, -1]

    def read_all(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """As ``read``, with the logits behind every one of ``tokens``: [t, padded vocabulary]."""
        logits = self._wrapper.run_one_forward_step(self.inputs(tokens))
        return None if logits is None else logits[0]

    def inputs(self, tokens: Sequence[int]) -> dict[str, torch.Tensor | None]:
        """What Megatron's wrapper reads: ``tokens`` behind those that were read before."""
        start, device = self.context.sequence_len_offset, torch.cuda.current_device()
        ids = torch.tensor([list(tokens)], device=device)
        positions = torch.arange(start, start + len(tokens), device=device)[None]
        return {"tokens": ids, "position_ids": positions, "attention_mask": None}

    def lightning_layers(self) -> list[int]:
        """Numbers of this rank's lightning layers; the others that keep something are softmax layers."""
        attentions = ((layer, getattr(layer, "self_attention", None)) for layer in self.model.decoder.layers)
        return [layer.layer_number for layer, attention in attentions if isinstance(attention, LightningAttention)]

    def place(self) -> tuple[int, dict[int, tuple[torch.Tensor, ...]]]:
        """Where it is now: ``go_back`` returns to it any number of times."""
        return self.context.sequence_len_offset, dict(self.context.key_value_memory_dict)

    def go_back(self, place: tuple[int, dict[int, tuple[torch.Tensor, ...]]]) -> None:
        """Forget the tokens since ``place()``: no step writes into earlier states, and softmax layers read keys and
        values up to the offset only.
        """
        self.context.sequence_len_offset, memory = place
        self.context.key_value_memory_dict.update(memory)

    def cache_sizes(self) -> dict[str, int]:
        """Bytes that this rank keeps after the last token, by kind of layer."""
        sizes, lightning = {"lightning": 0, "softmax": 0}, set(self.lightning_layers())
        for number, memory in self.context.key_value_memory_dict.items():
            if number in lightning:
                sizes["lightning"] += sum(x.nbytes for x in memory)
            else:  # allocated for the maximum length; used up to the offset
                sizes["softmax"] += sum(x[: self.context.sequence_len_offset].nbytes for x in memory)
        return sizes


def one_by_one(
    model: torch.nn.Module, tokenizer: Any, sampling: Sampling, samples: Iterator[Sample]
) -> Iterator[Piece]:
    """Continue one sample after the other; those of a prompt come together, and it is read once.

    All ranks of the model call it alike.
    """
    like = torch.zeros(1, dtype=torch.int64, device=torch.cuda.current_device())
    for _, group in itertools.groupby(samples, lambda sample: sample.request):
        first_sample = next(group)
        reader = Reader(model, max_length=len(first_sample.prompt) + sampling.tokens)
        first, after_prompt = reader.read(first_sample.prompt), reader.place()
        for sample in itertools.chain([first_sample], group):
            reader.go_back(after_prompt)
            logits, finish = first, None
            while finish is None:
                drawn = None if logits is None else sampling.draw(logits[:, : tokenizer.vocab_size], [sample.random])
                token = int(from_last_stage(drawn, like))
                piece = sample.piece(token, reader.cache_sizes)
                finish = piece.finish
                yield piece
                if finish is None:
                    logits = reader.read([token])


def last_stage() -> int:
    """The rank whose logits and losses all ranks take: first of those with the output layer."""
    return dist.get_world_size() - dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()


def from_last_stage(value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """``value`` of that rank on every rank; ``like`` has its shape and dtype."""
    if dist.get_world_size() == 1:
        assert value is not None
        return value
    value = like if value is None else value
    dist.broadcast(value, src=last_stage())
    return value
