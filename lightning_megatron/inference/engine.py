"""Megatron's dynamic inference engine around a loaded model: many requests at once, each step all their tokens.

engine = build_engine(model, tokenizer, max_requests=16)
records = engine.generate(["one prompt", "another"], SamplingParams(num_tokens_to_generate=8, top_k=1))
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import torch
from megatron.core import parallel_state
from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.headers import Headers
from megatron.core.inference.inference_request import DynamicInferenceRequest, DynamicInferenceRequestRecord, Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

# Attributes of SamplingParams, which Megatron carries to every rank with all that they hold.
KEY = "lightning_key"
"""Names a request, in ``Engine.on_tokens`` and for ABORT."""
ABORT = "lightning_abort"
"""Keys of requests to end; what carries them is no request itself."""

EXPERTS = ("--moe-token-dispatcher-type", "alltoall")
"""Flags of a model with experts, in front of a user's: the dispatcher that the engine takes on any ranks."""
GRAPHED_EXPERTS = (*EXPERTS, "--moe-pad-experts-for-cuda-graph-inference")
"""Flags of a model with experts whose steps can be captured: every expert gets as many rows as a step has tokens."""

GIB = 1024**3
_SHARE = 0.8  # of the memory that is free once the model is loaded; the rest is for activations
_CPU_GIB = 1.0  # for keys and values
_BLOCK = 256  # tokens whose keys and values are kept together

logger = logging.getLogger("lightning_megatron")


class _Numbers:
    """A tokenizer in which each token has a text of its own, its number.

    Megatron keys the likeliest tokens by their texts, and leaves out those whose text another one has, too, as all
    parts of characters do in byte-level tokenizers. It sends such a dict, too; ``app`` gives the texts back.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def detokenize(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


class Engine(DynamicInferenceEngine):
    """Megatron's engine, which also ends a request that nobody waits for any more, and tells tokens as they come."""

    on_tokens: Callable[[list[tuple[Any, list[int]]]], None] | None = None
    """Called after each step with (key, new tokens) of the requests that go on; their last ones are in the reply."""

    def add_request(
        self, request_id: int, prompt: str | list[int] | torch.Tensor, sampling_params: SamplingParams | None = None
    ) -> Any:
        """As Megatron's. From a coordinator, a request that cannot be added fails, and the engine goes on."""
        if not getattr(self, "use_coordinator", False):
            return super().add_request(request_id, prompt, sampling_params)
        keys = getattr(sampling_params, ABORT, None)
        if keys is not None:
            self._abort(keys)
            return self._refuse(request_id, sampling_params, Status.COMPLETED)
        try:
            return super().add_request(request_id, prompt, sampling_params)
        except Exception:  # Megatron asserts what a request may ask, here, in the loop that serves all
            logger.exception("request %d cannot be added", request_id)
            self.requests.pop(request_id, None)
            return self._refuse(request_id, sampling_params, Status.FAILED)

    def post_process_requests(
        self, request_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[list[int], list[Any]]:
        """As Megatron's; then ``on_tokens``."""
        tokenizer, tops = self.controller.tokenizer, kwargs.get("top_n_logprobs")
        # Behind a part of a prompt Megatron keeps no log probability, but likeliest tokens, as if one was generated.
        cut, places = kwargs["consumed_chunked_prefill_request_id"], request_ids.tolist()
        if tops and cut in places and self.get_request(cut).sampling_params.skip_prompt_log_probs:
            tops.pop(places.index(cut), None)
        if any(hasattr(entry.record[-1].sampling_params, KEY) for entry in self.requests.values()):
            self.controller.tokenizer = _Numbers(tokenizer)
        try:
            active, finished = super().post_process_requests(request_ids, *args, **kwargs)
        finally:
            self.controller.tokenizer = tokenizer
        told = self.__dict__.setdefault("_told", {})
        for record in finished:
            told.pop(record.request_id, None)
        if self.on_tokens is not None:
            news = []
            for request_id in active:
                record = self.requests[request_id].record
                count = sum(len(request.generated_tokens) for request in record.requests)
                before = told.get(request_id, 0)
                key = getattr(record.requests[0].sampling_params, KEY, None)
                if count > before and key is not None:
                    news.append((key, _last(record, count - before)))
                    told[request_id] = count
            if news:
                self.on_tokens(news)
        return active, finished

    def _abort(self, keys: Sequence[Any]) -> None:
        for request_id, entry in list(self.requests.items()):
            if getattr(entry.record.requests[0].sampling_params, KEY, None) not in keys:
                continue
            request = entry.record[-1]
            if request_id == self.context.chunked_prefill_request_id:  # the next part of its prompt is the last
                request.remaining_prompt_tokens = request.remaining_prompt_tokens[:2]
                request.sampling_params.num_tokens_to_generate = 1
            elif request_id in self.waiting_request_ids:
                self.waiting_request_ids.remove(request_id)
                del self.requests[request_id]
                request.status = Status.COMPLETED
                entry.future.set_result(entry.record)
                self._reply(entry.record)
            elif request.status != Status.FAILED:
                self.stop_word_finished_request_ids.add(request_id)  # it ends with the next step

    def _refuse(self, request_id: int, sampling_params: SamplingParams, status: Status) -> Any:
        request = DynamicInferenceRequest(
            request_id=request_id,
            prompt_tokens=torch.zeros(1, dtype=torch.int64),
            sampling_params=sampling_params,
            status=status,
        )
        record = DynamicInferenceRequestRecord.from_request(request)
        self._reply(record)
        future = self._loop.create_future()
        future.set_result(record)
        return future

    def _reply(self, record: DynamicInferenceRequestRecord) -> None:
        if self.is_mp_coordinator:
            message = [Headers.ENGINE_REPLY.value, [record.merge().serialize()]]
            self.socket_for_receiving_requests.send(msgpack.packb(message, use_bin_type=True))


def _last(record: DynamicInferenceRequestRecord, count: int) -> list[int]:
    """The last ``count`` tokens, most of the time one; a record goes on in a new request after its states were lost."""
    found: list[int] = []
    for request in reversed(record.requests):
        found = [*request.generated_tokens[-(count - len(found)) :], *found]
        if len(found) >= count:
            break
    return [int(token) for token in found]


class _Context(DynamicInferenceContext):
    """Tells of the last token of a part of a prompt how probable the next part's first is, where Megatron takes the
    token that it would draw.
    """

    following: Callable[[int], int]
    """Of a request whose prompt is not at its end yet, the token that comes next."""

    def calculate_log_probs_tensors(
        self, logits: torch.Tensor, new_tokens: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cut = self.chunked_prefill_request_id
        active = self.request_ids[self.paused_request_count : self.total_request_count].tolist() if cut != -1 else []
        if cut in active:
            new_tokens = new_tokens.clone()
            new_tokens[active.index(cut)] = self.following(cut)
        return super().calculate_log_probs_tensors(logits, new_tokens, *args, **kwargs)


class _Wrapper(GPTInferenceWrapper):
    """Never draws a row of the vocabulary that only pads it."""

    vocab_size: int

    @torch.inference_mode()
    def run_one_forward_step(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        logits = super().run_one_forward_step(*args, **kwargs)
        if logits is not None:
            logits[..., self.vocab_size :] = float("-inf")
        return logits


def build_engine(
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    max_requests: int | None = None,
    max_sequence_length: int | None = None,
    buffer_gb: float | None = None,
    max_tokens: int | None = None,
    cuda_graphs: int | None = None,
    prompt_logprobs: bool = False,
) -> Engine:
    """Megatron's engine for ``model``; all ranks of the model call it alike.

    Args:
        model: as ``loading.loaded_model`` yields it.
        tokenizer: ``tokenize``, ``detokenize``, ``vocab_size`` and ``eod`` are used.
        max_requests: that generate at once; each keeps a state for every lightning layer. 64 by default, or as many as
            have room; 8 on a CPU.
        max_sequence_length: of prompt and answer together; what the model was trained for by default.
        buffer_gb: GiB for states, keys and values; by default what they need without softmax layers, else most of the
            memory that is free.
        max_tokens: of a step; a longer prompt is read in parts. 4096 by default, on a CPU 512.
        cuda_graphs: how many sizes of steps to capture; none by default. Experts need ``GRAPHED_EXPERTS``.
        prompt_logprobs: take requests for the log probabilities of prompts (SamplingParams without
            ``skip_prompt_log_probs``), for which each step has logits of all its tokens, not of the last ones alone.

    Raises:
        ValueError: naming the value, what is allowed, and what to do.
    """
    gpu, tp = torch.cuda.is_available(), parallel_state.get_tensor_model_parallel_world_size()
    if cuda_graphs and model.config.cuda_graph_impl != "local":
        raise ValueError(f"cuda_graphs={cuda_graphs} needs a model that is loaded with --cuda-graph-impl local")
    if cuda_graphs and model.config.num_moe_experts and not model.config.moe_pad_experts_for_cuda_graph_inference:
        raise ValueError(
            f"cuda_graphs={cuda_graphs} needs experts that get equally many tokens: load the model with "
            + " ".join(GRAPHED_EXPERTS)
        )
    length = model.max_sequence_length if max_sequence_length is None else max_sequence_length
    learned = model.max_sequence_length if model.position_embedding_type == "learned_absolute" else None
    if length < 2 or (learned is not None and length > learned):
        limit = "" if learned is None else f", and at most the {learned} positions that the model has learned"
        raise ValueError(f"max_sequence_length={length} must be at least 2{limit}")
    states = MambaInferenceStateConfig.from_model(model)
    each, keys = _state_bytes(states), states is None or Symbols.ATTENTION in states.layer_type_list
    free = _free_bytes() if gpu else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free
    if max_requests is None:
        room = buffer_gb * GIB if buffer_gb is not None else None if free is None else _SHARE * free
        wanted = 64 if gpu else 8
        if room is not None and each:  # with softmax layers half of the room is for their keys and values
            wanted = min(wanted, int((room / 2 if keys else room) // each))
        max_requests = max(1, wanted // tp) * tp
    if max_requests < 1 or max_requests % tp:
        raise ValueError(f"max_requests={max_requests} must be a multiple of the tensor-parallel size, {tp}")
    rounded = DynamicInferenceContext.round_up_tokens
    if max_tokens is None:
        max_tokens = rounded(max(max_requests, 4096 if gpu else 512))
    if max_tokens < 1 or max_tokens != rounded(max_tokens):  # Megatron pads a step to a multiple, and must have room
        raise ValueError(f"max_tokens={max_tokens} must be a multiple of {rounded(1)}")
    if max_tokens < max_requests:
        raise ValueError(
            f"max_tokens={max_tokens} is less than max_requests={max_requests}, but each step has a token of every "
            "request: give more"
        )
    needed = max_requests * each
    if buffer_gb is None:
        if not keys:
            buffer = needed + _without_keys(length, max_requests, model.config)
        elif free is not None:
            buffer = int(_SHARE * free)
        else:
            buffer = needed + int(_CPU_GIB * GIB)
    else:
        buffer = int(buffer_gb * GIB)
    if needed >= buffer or needed > memory:
        held = f"the {memory / GIB:.3g} GiB of this machine" if free is None else f"{free / GIB:.3g} GiB that are free"
        if needed >= buffer:
            held = f"buffer_gb={buffer / GIB:.3g}"
        raise ValueError(
            f"states of {max_requests} requests take {needed / GIB:.3g} GiB ({each / GIB:.3g} each), more than {held}: "
            "give fewer requests, or more memory"
        )
    config = InferenceConfig(
        max_sequence_length=length,
        max_requests=max_requests,
        max_tokens=max_tokens,
        buffer_size_gb=buffer / GIB,
        block_size_tokens=_BLOCK if gpu else 32,
        enable_chunked_prefill=True,
        num_cuda_graphs=cuda_graphs,
        materialize_only_last_token_logits=not prompt_logprobs,
        mamba_inference_state_config=states,
        # Without expert ranks to agree with, Megatron would make up to 20 empty steps after the last request.
        **({"ep_consensus_interval": 1} if parallel_state.get_expert_model_parallel_world_size() == 1 else {}),
    )
    context = _Context(_without_nvls(model.config), config)
    wrapper = _Wrapper(model, context)
    wrapper.vocab_size = tokenizer.vocab_size
    engine = Engine(TextGenerationController(inference_wrapped_model=wrapper, tokenizer=tokenizer), context)
    context.following = lambda request: int(engine.get_request(request).remaining_prompt_tokens[0])
    return engine


def _without_nvls(config: Any) -> Any:
    """For a context that does not take buffers of a dispatcher over NVLink, which only Megatron's own inference layers
    use, and which most machines cannot give.
    """
    if config.expert_model_parallel_size == 1 or config.transformer_impl == "inference_optimized":
        return config
    config = copy.copy(config)
    config.inference_moe_token_dispatcher_type = "nccl"
    return config


def longest(engine: DynamicInferenceEngine) -> int:
    """Tokens that prompt and answer of one request may have, by the limit that was set and by the room there is."""
    context, blocks = engine.context, engine.context.kv_block_allocator
    count = blocks.pool_size if hasattr(blocks, "pool_size") else blocks.total_count  # in 0.20, and before
    return min(context.max_sequence_length, (count - 1) * context.block_size_tokens)


def _state_bytes(states: MambaInferenceStateConfig | None) -> int:
    if states is None:
        return 0
    each = sum(
        math.prod(shape) * dtype.itemsize
        for shape, dtype in (
            (states.conv_states_shape, states.conv_states_dtype),
            (states.ssm_states_shape, states.ssm_states_dtype),
        )
    )
    return each * states.layer_type_list.count(Symbols.MAMBA)


def _without_keys(length: int, requests: int, config: Any) -> int:
    """Bytes by which Megatron counts requests of a model without softmax layers, in blocks of a whole sequence."""
    return (requests + 2) * 2 * max(length, _BLOCK) * config.params_dtype.itemsize


def _free_bytes() -> int:
    """Of the rank that has least, so that all ranks decide alike."""
    free = torch.tensor([torch.cuda.mem_get_info()[0]], device=torch.cuda.current_device())
    torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MIN)
    return int(free)
