"""Many samples at once, in the steps of Megatron's dynamic engine: one that ends makes room for the next."""

from __future__ import annotations

import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.inference_request import Status
from megatron.core.inference.sampling.torch_sampling import TorchSampling
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode

from .engine import build_engine, longest
from .reader import from_last_stage, last_stage
from .sample import Piece, Sample
from .sampling import Sampling


class Together:
    """Reads up to ``size`` samples at once. All ranks of the model call it alike."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, sampling: Sampling, size: int, max_length: int):
        """
        Args:
            model: as ``loading.loaded_model`` yields it.
            tokenizer: of the model.
            sampling: how to draw, and when to stop.
            size: samples at once.
            max_length: tokens of the longest prompt and what is generated after it.

        Raises:
            ValueError: the engine does not serve this model, or has no room; it says what to do.
        """
        tp = parallel_state.get_tensor_model_parallel_world_size()
        slots = math.ceil(size / tp) * tp
        self._engine = build_engine(model, tokenizer, max_requests=slots, max_sequence_length=max_length)
        InferenceMode.unset_active()  # between steps the model is the caller's
        if max_length > longest(self._engine):
            raise ValueError(
                f"the longest sample has {max_length} tokens, and keys and values of {longest(self._engine)} have room "
                "beside the states: give fewer samples at once, or less tokens"
            )
        self._size, self._sampling, self._vocab_size = size, sampling, tokenizer.vocab_size
        self._open: dict[int, Sample] = {}
        self._drawn: list[Piece] = []
        self._engine.controller._sampling = _Draw(self._engine.controller, self._draw)

    def pieces(self, samples: Iterator[Sample]) -> Iterator[Piece]:
        """One for each token of each sample, in the order of steps."""
        numbers = itertools.count()
        while True:
            for sample in itertools.islice(samples, self._size - len(self._open)):
                number = next(numbers)
                self._open[number] = sample
                params = SamplingParams(num_tokens_to_generate=self._sampling.tokens, termination_id=-1)
                self._engine.add_request(number, sample.prompt, params)
            if not self._open:
                break
            with InferenceMode.active():
                ended = self._engine.step_modern()["finished_request_records"]
            assert all(record[-1].status == Status.COMPLETED for record in ended), ended
            drawn, self._drawn = self._drawn, []
            yield from drawn
        del self._engine
        gc.collect()  # its parts know each other, and the next engine may need the memory

    def _draw(self, logits: torch.Tensor, requests: list[int | None]) -> torch.Tensor:
        """The next token of each request, ``[n]`` int64; 0 for None. Requests that end leave the engine in this step.

        Args:
            logits: [n, padded vocabulary].
            requests: of each row; None where the row is no sample's next token.
        """
        found = torch.zeros(len(requests), dtype=torch.int64, device=logits.device)
        samples = [(row, i, self._open[i]) for row, i in enumerate(requests) if i is not None]
        if not samples:
            return found
        rows, drawn = [row for row, *_ in samples], None
        if dist.get_rank() == last_stage():  # logits of other ranks may be rounded otherwise
            generators = [sample.random for *_, sample in samples]
            drawn = self._sampling.draw(logits[rows, : self._vocab_size], generators)
        found[rows] = tokens = from_last_stage(drawn, torch.zeros_like(found[rows]))
        for (_, number, sample), token in zip(samples, tokens.tolist(), strict=True):
            piece = sample.piece(token, functools.partial(self._cache_sizes, sample))
            self._drawn.append(piece)
            if piece.finish is not None:
                del self._open[number]
                self._engine.stop_word_finished_request_ids.add(number)
        return found

    def _cache_sizes(self, sample: Sample) -> dict[str, int]:
        context = self._engine.context
        states = context.mamba_ssm_states.nbytes // context.max_requests
        block = 0 if context.lightning_without_keys else context.block_size_bytes
        return {"lightning": states, "softmax": block // context.block_size_tokens * sample.read}


class _Draw(TorchSampling):
    """In place of Megatron's, which draws for all requests with the random numbers of the engine."""

    def __init__(
        self, controller: TextGenerationController, draw: Callable[[torch.Tensor, list[int | None]], torch.Tensor]
    ):
        super().__init__(controller.sampling_rng, controller.vocab_size)
        self._draw = draw

    def sample_kernel(
        self, logits: torch.Tensor, n: int, context: Any, *, gather_indices: torch.Tensor | None = None,
        output: torch.Tensor | None = None, **others: Any,
    ) -> torch.Tensor:  # fmt: skip
        del others
        ids = context.request_ids[context.paused_request_count : context.total_request_count].tolist()
        partial = context.chunked_prefill_request_id  # its prompt goes on in the next step
        rows = logits[:n] if gather_indices is None else logits[gather_indices[:n]]
        drawn = self._draw(rows, [None if i == partial else i for i in ids])
        return drawn if output is None else output.copy_(drawn)
