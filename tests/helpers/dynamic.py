"""Megatron's dynamic inference engine in a process of `spawn`: models, engines, what a run computed, and its judge.

The judge is one forward pass without any cache over a request's prompt and the tokens that the engine added: the engine
is right if its logits at every position are those, and every token the largest of them. Where a token takes its last
expert by less than rounding, the judge takes the engine's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import sys
import zlib
from collections import defaultdict
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.moe.router import TopKRouter

from lightning_megatron import cpu
from lightning_megatron.config import LightningOptions
from lightning_megatron.mixer import LightningAttention
from lightning_megatron.patches import dynamic_inference
from lightning_megatron.runtime import prepare
from lightning_megatron.spec import get_hybrid_block_spec, get_mtp_block_spec
from tests import layers
from tests.conftest import _poisoned
from tests.helpers.models import gpt, hybrid
from tests.tolerances import UNIT

NOISE = 1e-5  # of logits in fp32, relative to the largest of a position: what users are promised
VOCAB = 64  # of helpers.models.gpt
Experts = tuple[torch.Tensor, torch.Tensor]
"""Each expert's share of a token, and whether it gets the token; ``[tokens or layers, experts]``."""
EVERYTHING = dict(num_kv_heads=2, qk_norm=True, rope=True, norm="all", decay="minimax")
MOE = dict(num_moe_experts=4, moe_ffn_hidden_size=32, moe_router_topk=2, moe_router_load_balancing_type="none")
PADDED = dict(moe_token_dispatcher_type="alltoall", moe_pad_experts_for_cuda_graph_inference=True)
PATTERN = "hybrid_layer_pattern"  # in place of a change of the config: the model is a HybridModel
CASES = {  # changes of the config, options
    "lightning": (dict(), dict()),
    "everything": (dict(), EVERYTHING),
    "lrpe": (dict(), dict(lrpe_layers=2, gate="linear")),
    "K<V": (dict(), dict(key_head_dim=16, value_head_dim=32, norm="none")),
    "moe": (MOE, dict()),
    "moe-padded": (MOE | PADDED, dict()),
    "gqa": (dict(linear_attention_freq=2, num_query_groups=2), EVERYTHING),
    "mla": (layers.LATENT, dict(rope=True, rotary_percent=0.5)),
    "moe-gqa": (MOE | dict(linear_attention_freq=4, qk_layernorm=True, num_query_groups=2), EVERYTHING),
    "apart": (dict(linear_attention_freq=[1, 1, 0, 0], num_query_groups=2), EVERYTHING),
    "hybrid": ({PATTERN: "L-L-L-*-", "num_query_groups": 2}, EVERYTHING),
    "hybrid-lightning": ({PATTERN: "L-L-"}, dict(lrpe_layers=1)),
    "hybrid-moe": (MOE | {PATTERN: "LE*-L-*E", "num_query_groups": 2}, EVERYTHING),
    "hybrid-mla": (layers.LATENT | {PATTERN: "L-*-"}, dict(rope=True, rotary_percent=0.5)),
    "hybrid-apart": ({PATTERN: "L-L-*-*-", "num_query_groups": 2}, EVERYTHING),
    "mtp": (dict(mtp_num_layers=1, linear_attention_freq=[1, 1, 1, 1]), dict()),
}


def start(**layout: int) -> None:
    """Megatron's process groups; and memory that nobody wrote is NaN from here on."""
    layers.start(**layout, inference=True)
    if not torch.cuda.is_available():
        torch.empty = _poisoned(torch.empty)
        cpu.enable_inference()


def build(case: str, *, tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None, **changes):
    """A model of random weights, the same whatever the layout, in which logits differ a lot from token to token."""
    (config, options), pattern = CASES[case], None
    if PATTERN in config:
        config, pattern = {name: config[name] for name in config if name != PATTERN}, config[PATTERN]
        config |= dict(num_layers=len(pattern), linear_attention_freq=None, moe_layer_freq=1)
    make = layers.latent_config if "q_lora_rank" in config else layers.transformer_config
    layout = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep)
    layout |= dict(expert_tensor_parallel_size=etp)
    config = make(**config | layout | dict(pipeline_dtype=torch.float32 if pp > 1 else None) | changes)
    options = LightningOptions(**options)
    dynamic_inference.apply()
    if pattern is None:
        prepare(config, options)
    if pattern is not None:
        model = hybrid(config, options, pattern)
    elif config.mtp_num_layers:
        from megatron.core.models.gpt import GPTModel

        spec = get_hybrid_block_spec(config, options)
        model = GPTModel(
            config, spec, VOCAB, 32, position_embedding_type="rope",
            mtp_block_spec=get_mtp_block_spec(config, options),
        )  # fmt: skip
    else:
        model = gpt(config, get_hybrid_block_spec(config, options))
    draw(model, config)
    return (model.bfloat16() if config.bf16 else model).eval()  # as Float16Module does


@torch.no_grad()
def draw(model, config) -> None:
    """Every parameter from its name in the whole model; a rank takes its slice."""
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    local = (config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    first = model.decoder.layers[0].layer_number - 1
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + first)
        group = parallel_state.get_tensor_model_parallel_group()
        if "local_experts" in parts:
            group = parallel_state.get_expert_tensor_parallel_group()
            at = parts.index("local_experts") + 1
            parts[at] = str(int(parts[at]) + ep_rank * local)
        shape = list(parameter.shape)
        tp = group.size()
        cut = tp > 1 and getattr(parameter, "tensor_model_parallel", False)
        if cut:
            shape[parameter.partition_dim] *= tp
        generator = torch.Generator().manual_seed(zlib.crc32(".".join(parts).encode()))
        x = torch.randn(shape, generator=generator, device="cpu")
        if "theta" in name:
            x = x.abs() * 0.1
        elif "norm" in name:
            x = 1 + 0.3 * x
        elif "word_embeddings" not in name and "output_layer" not in name:
            x *= shape[-1] ** -0.5
        if cut:
            x = x.chunk(tp, parameter.partition_dim)[group.rank()]
        parameter.copy_(x)


class Tokens:
    """A tokenizer of numbers."""

    vocab_size, eod, bos = VOCAB, VOCAB - 1, None

    def tokenize(self, text: str) -> list[int]:
        return [int(x) for x in text.split()]

    def detokenize(self, tokens, **how) -> str:
        return " ".join(map(str, tokens))


class Run:
    """An engine around a model, and the logits of every position of every request.

    Args:
        blocks: number of blocks of keys and values, one of which Megatron keeps for padding; None for enough.
        paused: as many of them as paused requests may hold together.
        inference: fields of InferenceConfig.
    """

    def __init__(self, model, *, blocks: int | None = None, paused: int = 0, **inference):
        states = MambaInferenceStateConfig.from_model(model)
        how = dict(max_sequence_length=256, buffer_size_gb=0.25, max_requests=8, max_tokens=64, block_size_tokens=32)
        how |= dict(enable_chunked_prefill=True, materialize_only_last_token_logits=False)
        how |= dict(mamba_inference_state_config=states) | inference
        if blocks is not None:
            size = self._bytes(model.config, states, blocks + paused, how) / 2**30 / (blocks + paused)
            how |= dict(buffer_size_gb=blocks * size, paused_buffer_size_gb=paused * size)
        self.model = model
        self.context = DynamicInferenceContext(model.config, InferenceConfig(**how))
        self.controller = TextGenerationController(GPTInferenceWrapper(model, self.context), Tokens())
        self.engine = DynamicInferenceEngine(self.controller, self.context)
        self.prompts: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.logits: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)
        self.experts: dict[int, dict[int, Experts]] = defaultdict(dict)
        self.repeated = 0.0  # largest difference of logits that were computed more than once
        self.changed = False  # whether a token went to other experts when it was computed once more
        self.most_paused = 0
        self.routers = [m for m in model.modules() if isinstance(m, TopKRouter)]
        self.routed: dict[TopKRouter, Experts] = {}  # of this pass; steps that are CUDA graphs call no hooks
        note = lambda router, inputs, outputs: self.routed.update({router: outputs})
        self.handles = [router.register_forward_hook(note) for router in self.routers]
        self.handles.append(model.register_forward_hook(self._keep))

    @staticmethod
    def _bytes(config, states, blocks: int, how: dict) -> int:
        shape, kinds = states.ssm_states_shape, states.layer_type_list
        state = 4 * math.prod(shape) * kinds.count(Symbols.MAMBA)
        numbers = 2 * config.kv_channels * (config.num_query_groups or config.num_attention_heads)
        if getattr(config, "cache_mla_latents", False):
            numbers = config.kv_lora_rank + config.qk_pos_emb_head_dim
        block = 4 * kinds.count(Symbols.ATTENTION) * how["block_size_tokens"] * numbers
        return how["max_requests"] * state + blocks * block + block // 2

    def _keep(self, module, inputs, logits) -> None:
        context, n = self.context, self.context.active_token_count
        routed, self.routed = [self.routed.get(router) for router in self.routers], {}
        if not module.post_process:
            return  # another pipeline stage has the logits
        owners = context.request_ids[context.token_to_request_idx[:n].long()].tolist()
        places = context.token_to_pos_ids[:n].tolist()
        if routed and all(x is not None and len(x[0]) >= n for x in routed):  # sequence parallelism has parts of them
            shares, chosen = (torch.stack([x[:n].cpu() for x in every], 1) for every in zip(*routed, strict=True))
            for i, (owner, place) in enumerate(zip(owners, places, strict=True)):
                before = self.experts[owner].get(place)
                self.changed |= before is not None and not torch.equal(before[1], chosen[i])
                self.experts[owner][place] = shares[i], chosen[i]
        for row, owner, place in zip(logits[0, :n].float().cpu(), owners, places, strict=True):
            before = self.logits[owner].get(place)
            if before is not None:
                self.repeated = max(self.repeated, float((row - before).abs().max() / before.abs().max()))
            self.logits[owner][place] = row.clone()

    def add(self, number: int, prompt: list[int], count: int, **how) -> None:
        self.prompts[number] = prompt
        params = SamplingParams(num_tokens_to_generate=count, top_k=1, **dict(termination_id=-1) | how)
        self.engine.add_request(number, torch.tensor(prompt).tolist(), params)

    def step(self) -> None:
        for record in self.engine.step_modern()["finished_request_records"]:
            request = record.merge()
            assert request.status.name == "COMPLETED", (request.request_id, request.status, request.events)
            self.tokens[request.request_id] = list(request.generated_tokens)
        self.most_paused = max(self.most_paused, self.context.paused_request_count)

    def reset(self) -> None:
        """Whatever runs is forgotten."""
        self.engine.reset()
        for mine in (self.prompts, self.tokens, self.logits, self.experts):
            mine.clear()

    def finish(self, most: int = 100_000) -> None:
        while self.engine.has_unfinished_requests():
            assert (most := most - 1) > 0, "the engine does not come to an end"
            self.step()

    @torch.inference_mode()  # or Megatron would make a graph of this pass where engines have some
    def judge(self) -> dict[str, float]:
        """Largest difference of logits to a pass without caches, relative to the largest of the position; and numbers
        of tokens that are the largest logit (``tokens``), of those that are not, and of those whose logit is within
        NOISE of it (``ties``). ``swapped``: experts that the engine chose otherwise, by less than NOISE. Where it is
        not known what the engine chose, as in CUDA graphs, a request is compared up to there; ``left`` is the rest.
        """
        InferenceMode.unset_active()
        worst, wrong, ties, compared, positions, left, skipped, noisy, swapped = 0.0, 0, 0, 0, 0, 0, 0, 0, 0
        for number, prompt in self.prompts.items():
            new = self.tokens.get(number)
            if new is None:
                continue  # it never began
            whole = prompt + new
            replay = Replay(self, number)
            tokens, places = (x[None].to("cuda") for x in (torch.tensor(whole), torch.arange(len(whole))))
            want = self.model(tokens, places, None)[0].float().cpu()
            largest, end = want.abs().amax(-1), len(whole) - 1
            got = self.logits[number]
            skipped += end - len(set(got) & set(range(end)))
            left, end = left + max(end - replay.end, 0), min(end, replay.end)
            there = [i for i in range(end) if i in got]
            rows = torch.stack([got[i] for i in there]) if there else want[:0]
            errors = differences(rows, want[there])
            if (errors >= NOISE).any() and (exact := self._exact(tokens, places)) is not None:
                # tokens whose values almost cancel: the engine is as exact as passes without caches
                mine, others = differences(rows, exact[there]), self._without_caches(tokens, places, exact)[there]
                excused = (errors >= NOISE) & (mine < 4 * others) & (others < 10 * NOISE)
                noisy, errors = noisy + int(excused.sum()), errors.masked_fill(excused, 0.0)
            worst = max(worst, float(errors.max()) if len(errors) else 0.0)
            positions += len(rows)
            for i, token in list(enumerate(new, start=len(prompt) - 1))[: max(end - len(prompt) + 1, 0)]:
                tie = want[i].max() - want[i, token] < NOISE * largest[i]
                right = token == int(want[i].argmax())
                compared, ties, wrong = compared + right, ties + bool(tie and not right), wrong + (not tie)
            swapped += replay.remove()
        repeated = 0.0 if left or self.changed else self.repeated
        assert self.context.enable_prefix_caching or not skipped, f"{skipped} positions have no logits"
        return dict(
            worst=worst, repeated=repeated, wrong=wrong, ties=ties, tokens=compared, positions=positions, left=left,
            skipped=skipped, noisy=noisy, swapped=swapped,
        )  # fmt: skip

    def _exact(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor | None:
        """Logits of a pass in fp64, by the torch backend; None for bf16 weights."""
        if self.model.config.params_dtype != torch.float32:
            return None
        mixers = [m for m in self.model.modules() if isinstance(m, LightningAttention)]
        given = [mixer.options for mixer in mixers]
        # A training goes on with the memory of its buffers and optimizer, not with converted copies.
        parameters = list(self.model.parameters())
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        memory = [(tensor, tensor.data) for tensor in (*parameters, *grads, *self.model.buffers())]
        norms = {m: m.backend for m in self.model.modules() if getattr(m, "backend", self) in (None, "auto")}
        with torch.inference_mode(False), torch.no_grad():
            try:
                torch.set_default_dtype(torch.float64)
                self.model.double()
                for mixer in mixers:
                    mixer.log_decay = mixer.log_decay.double()
                    mixer.options = dataclasses.replace(mixer.options, backend="torch")
                for norm in norms:
                    norm.backend = "torch"
                return self.model(tokens.clone(), places.clone(), None)[0].cpu()
            finally:
                torch.set_default_dtype(torch.float32)
                for tensor, data in memory:
                    tensor.data = data
                for mixer, options in zip(mixers, given, strict=True):
                    mixer.log_decay = mixer.log_decay.float()
                    mixer.options = options
                for norm, backend in norms.items():
                    norm.backend = backend

    def _without_caches(self, tokens: torch.Tensor, places: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        """The largest of eight differences to ``exact`` at each position: of passes in fp32 whose weights differ in the
        last bit. Of one pass alone it may be small by chance.
        """
        parameters, found = list(self.model.parameters()), []
        rng = torch.Generator().manual_seed(tokens.numel())
        with torch.inference_mode(False), torch.no_grad():
            kept = [parameter.clone() for parameter in parameters]
            try:
                for _ in range(8):
                    for parameter, value in zip(parameters, kept, strict=True):
                        parameter.copy_(value * (1 + UNIT * torch.randn(value.shape, generator=rng).to(value)))
                    logits = self.model(tokens.clone(), places.clone(), None)[0].float().cpu()
                    found.append(differences(logits, exact))
            finally:
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
        return torch.stack(found).amax(0)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        InferenceMode.unset_active()


class Replay:
    """The judge's routers take the experts of a run's request where theirs are as good to within NOISE.

    Else a token whose second and third expert are equal to seven digits would show that the engine rounds otherwise,
    and so would all later tokens, of which it is the past. ``end`` is the first position where the engine's choice
    would have to be known, and is not.
    """

    def __init__(self, run: Run, number: int):
        self.run, self.number, self.end, self.swapped = run, number, sys.maxsize, set()
        self.whole = run.prompts[number] + run.tokens[number]
        self.hooks = [
            router.register_forward_hook(functools.partial(self._choose, layer))
            for layer, router in enumerate(run.routers)
        ]

    def remove(self) -> int:
        """Returns how many experts were the engine's and not the judge's."""
        for hook in self.hooks:
            hook.remove()
        return len(self.swapped)

    def _choose(self, layer: int, router: TopKRouter, inputs: tuple[torch.Tensor, ...], outputs: Experts) -> Experts:
        shares, chosen = (x.clone() for x in outputs)
        logits = (inputs[0].float() @ router.weight.float().T).flatten(0, -2)
        best, near = logits.topk(router.topk + 1, -1).values, NOISE * logits.abs().amax(-1)
        for i in (best[:, -2] - best[:, -1] < near).nonzero().flatten().tolist():
            theirs = self._theirs(i)
            if theirs is None:
                self.end = min(self.end, i)
            elif not torch.equal(theirs[1][layer], chosen[i].cpu()):
                as_good = logits[i] >= best[i, -2] - near[i]
                if as_good[theirs[1][layer].to(as_good.device)].all():  # else the logits will show what is wrong
                    shares[i], chosen[i] = theirs[0][layer].to(shares), theirs[1][layer].to(chosen)
                    self.swapped.add((layer, i))
        return shares, chosen

    def _theirs(self, place: int) -> Experts | None:
        """What the engine chose at this place of the request, or of one that began alike, and whose states it took."""
        run, begin = self.run, self.whole[: place + 1]
        for number in (self.number, *(run.prompts if run.context.enable_prefix_caching else ())):
            if (
                place in run.experts[number]
                and (run.prompts[number] + run.tokens.get(number, []))[: place + 1] == begin
            ):
                return run.experts[number][place]
        return None


def differences(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Of each position, relative to its largest logit; infinite where a logit is no number, so that no bound holds."""
    return ((got - want).abs().amax(-1) / want.abs().amax(-1)).nan_to_num(nan=float("inf"))


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest of all positions."""
    return float(differences(got, want).max()) if len(got) else 0.0


def agree(mine: list[int], other: list[int], rows: torch.Tensor, logits: torch.Tensor) -> int:
    """How many tokens two runs have in common, up to the first that both may choose: a tie.

    Args:
        rows, logits: of either run, before each token, ``[tokens, vocabulary]``.

    Raises:
        AssertionError: their logits differ by more than twice ``NOISE``, but for one token in 32, or tokens do that are
            no tie.
    """
    same = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
    errors = differences(rows[: same + 1], logits[: same + 1])
    # a token whose values almost cancel may be ten times as far from exact in each run, as ``Run.judge`` says
    noisy = int((errors >= 2 * NOISE).sum())
    assert noisy <= 1 + len(errors) // 32 and float(errors.max()) < 20 * NOISE, errors
    if same < len(mine):
        gap = float((logits[same, other[same]] - logits[same, mine[same]]) / logits[same].abs().max())
        assert gap < 2 * NOISE, f"token {same} is {mine[same]}, not {other[same]}, by {gap} of the largest logit"
    return same


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]


def slots(run: Run) -> SimpleNamespace:
    """What the context says about its states when nothing runs."""
    metadata, blocks = run.context.mamba_metadata, run.context.kv_block_allocator
    return SimpleNamespace(
        all_blocks=blocks.pool_size if hasattr(blocks, "pool_size") else blocks.total_count,
        free=sorted(metadata.mamba_state_free_slots[: metadata.mamba_state_free_slot_count].tolist()),
        of_requests=metadata.request_to_mamba_state_idx.tolist(),
        blocks=blocks.pool_avail if hasattr(blocks, "pool_avail") else blocks.total_avail,  # in 0.20, and before
    )
