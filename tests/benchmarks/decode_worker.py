"""One model of tests.benchmarks.decode in one process: python -m tests.benchmarks.decode_worker PLAN

PLAN is JSON: ``model``, ``attention``, ``contexts`` (tokens), ``batches``, ``prompt`` (tokens of the prompt whose first
token is timed, or 0), ``prefill`` (bool: one request of every context reads a prompt for real), ``memory`` (tokens of
requests whose memory is measured), ``max_tokens`` (of a step), ``steps``, ``gpu``, ``cuda_graph``, ``deadline`` (of
time.time()) and ``rows``, the file that gets a line of JSON for every cell as soon as it is measured.

How requests of N tokens are made: each reads a prompt of two tokens; then the engine's bookkeeping is told that it has
N, blocks of keys and values (random numbers) are allocated for N, and with ``prefill`` its state is that of a request
that read N tokens.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from . import decode_models as models

WARMUP = 5  # steps
TURNS = 4  # in which each of several contexts is measured


class Late(Exception):
    """The deadline has passed."""


def start(gpu: bool) -> None:
    """One rank of Megatron."""
    if not gpu:
        from lightning_megatron import cpu

        cpu.enable()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)
    initialize(gpu)


def initialize(gpu: bool) -> None:
    """Megatron's groups and random numbers, in the default group."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=gpu)


def seconds(call: Callable, repeats: int, warmup: int = WARMUP) -> list[float]:
    """Wall time of each call; the device is idle before and after it."""
    taken = []
    for _ in range(warmup + repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return taken[warmup:]


def age(context, tokens: int, states: torch.Tensor | None) -> None:
    """Let every request that decodes have ``tokens`` tokens, and the recurrent state ``states`` ``[layers, ...]``."""
    count, block = context.total_request_count, context.block_size_tokens
    assert not context.paused_request_count and not context.num_prefill_requests
    need = tokens // block + 1
    for row in range(count):
        have = int(context.request_kv_block_counts[row])
        if need > have:
            new = context.kv_block_allocator.allocate_memory_blocks(need - have)
            assert new is not None, f"{need - have} blocks of request {row} of {count}"
            context.request_to_kv_block_ids[row, have:need] = new
    context.request_kv_block_counts[:count] = need
    last = context.request_to_kv_block_ids[:count, need - 1]
    context.request_last_kv_block_id[:count] = last
    context.request_last_kv_block_offset[:count] = tokens % block
    context.request_kv_length_offsets[:count] = tokens
    context.request_output_lengths[:count] = context.max_sequence_length
    context.token_to_pos_ids[:count] = context.token_to_position_in_request[:count] = tokens
    context.token_to_block_idx[:count] = last
    context.token_to_local_position_within_kv_block[:count] = tokens % block
    if states is not None:
        slots = context.mamba_metadata.request_to_mamba_state_idx[:count].to(context.mamba_ssm_states.device).long()
        context.mamba_ssm_states[:, slots] = states[:, None]


class Engine:
    """Megatron's dynamic engine with one model."""

    def __init__(self, plan: dict):
        self.plan, self.gpu, self.cuda_graph = plan, plan["gpu"], plan["cuda_graph"]
        self.model = models.build(plan["model"], plan["attention"], cuda_graph=self.cuda_graph, gpu=self.gpu)
        self.traffic = models.Traffic.of(self.model, models.states_of(self.model))
        self.params = sum(p.numel() for p in self.model.parameters())
        self.longest = max(*plan["contexts"], plan["prompt"])
        self.batch = max([self.most(n) for n in plan["contexts"]] + [1])
        self._warm_up()
        blocks = max([models.blocks_of(self.longest), *(self.most(n) * models.blocks_of(n) for n in plan["contexts"])])
        self.context = models.context_of(
            self.model, self.traffic, self.longest, self.batch, plan["max_tokens"], blocks=blocks,
            cuda_graph=self.cuda_graph,
        )  # fmt: skip
        self.taken = torch.cuda.memory_allocated() if self.gpu else 0
        if self.traffic.kv:
            for layers in self.context.memory_buffer:
                for layer in layers:
                    layer.normal_()
        self.engine = models.engine_of(self.model, self.context)
        self.graphs = self.context.cuda_graph_batch_dimensions_list
        self.serial = 0

    def room(self) -> int:
        """Bytes for requests: what weights, angles, graphs and activations of a step leave."""
        if not self.gpu:
            return 64 << 20
        return torch.cuda.get_device_properties(0).total_memory - self.traffic.weights - (10 << 30)

    def most(self, context: int) -> int:
        """The largest batch of the plan that fits, or 0."""
        each = max(1, self.traffic.request(context))
        return max((b for b in self.plan["batches"] if b * each <= self.room()), default=0)

    def _warm_up(self) -> None:
        """Compile what torch.compile compiles before any graph is captured."""
        if not self.gpu:
            return
        with torch.inference_mode():
            for tokens in (256, 128, 2, 1, self.plan["max_tokens"]):
                hidden = torch.randn(tokens, 1, self.model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
                for layer in self.model.decoder.layers:
                    if hasattr(layer, "mlp") and hasattr(layer.mlp, "linear_fc1"):
                        layer.mlp(hidden)
                        break

    def use_graphs(self, use: bool) -> None:
        self.context.cuda_graph_batch_dimensions_list = self.graphs if use else []

    def add(self, prompt: torch.Tensor | list[int], new: int) -> None:
        from megatron.core.inference.sampling_params import SamplingParams

        how = SamplingParams(num_tokens_to_generate=new, top_k=1, termination_id=-1)
        self.engine.add_request(self.serial, prompt, how)
        self.serial += 1

    def prompt(self, tokens: int) -> torch.Tensor | list[int]:
        numbers = torch.randint(0, self.model.vocab_size - 1, (tokens,))
        return numbers.to(torch.cuda.current_device()) if self.gpu else numbers.tolist()

    def step(self) -> None:
        self.engine._run_coroutine_sync(self.engine.async_step())

    def read(self, batch: int, tokens: int) -> None:
        """Give ``batch`` new requests prompts of ``tokens`` tokens, and step until all of them decode."""
        self.engine.reset()
        for _ in range(batch):
            self.add(self.prompt(tokens), 400)
        for _ in range(2 + batch * math.ceil(tokens / self.plan["max_tokens"]) + batch):
            self.step()
            context = self.context
            reading = context.num_prefill_requests or self.engine.waiting_request_ids
            if not reading and context.total_request_count == batch and context.chunked_prefill_request_id == -1:
                return
        raise RuntimeError(f"{batch} prompts of {tokens} tokens were not read")

    def state(self) -> torch.Tensor | None:
        """A copy of the only request's recurrent state, ``[layers, ...]``."""
        if not self.traffic.state or self.plan["attention"] != "lightning":
            return None
        slot = int(self.context.mamba_metadata.request_to_mamba_state_idx[0])
        return self.context.mamba_ssm_states[:, slot].clone()

    def forward_ms(self) -> tuple[float, bool]:
        """Time of the model's forward of the step that is next, on the GPU; whether the host was too slow for it."""
        controller = self.engine.controller
        ids, positions, _ = controller._dynamic_step_context_init()
        call = partial(controller._dynamic_step_forward_logits, ids, positions)
        if not self.gpu:
            return statistics.median(seconds(call, 3, 1)) * 1e3, False
        from .measure import gpu_time

        timing = gpu_time([call], self.plan["steps"])
        return timing.ms, timing.host_bound


def decode_rows(engine: Engine, batch: int, contexts: list[int], states: dict, how: str) -> list[dict]:
    """Steps and forward of requests of each context; they are there if ``how`` is "read" (one context).

    Contexts take turns: what else the host does meanwhile slows all of them alike.
    """
    steps = engine.plan["steps"]
    gc.collect()  # not while steps are measured
    if how == "aged":
        engine.use_graphs(True)
        engine.read(batch, 2)

    def turns(measure: Callable[[], list[float]], count: int) -> list[float]:
        """Median of what is measured at each context."""
        found: dict[int, list[float]] = {context: [] for context in contexts}
        for _ in range(count):
            for context in contexts:
                if how == "aged":
                    age(engine.context, context, states.get(context))
                found[context] += measure()
        return [statistics.median(found[context]) for context in contexts]

    def steps_ms(count: int, warmup: int) -> list[float]:
        each = max(1, count // TURNS)
        return turns(lambda: [1e3 * taken for taken in seconds(engine.step, each, warmup)], TURNS)

    rows = [dict(kind="decode", batch=batch, context=context, requests=how) for context in contexts]
    late: list[bool] = []

    def forward_ms() -> list[float]:
        taken, host_bound = engine.forward_ms()
        late.append(host_bound)
        return [taken]

    def measured(kind: str, milliseconds: list[float]) -> None:
        for row, taken in zip(rows, milliseconds, strict=True):
            row |= {f"{kind}_step_ms": taken, f"{kind}_tokens_per_second": 1e3 * batch / taken}

    if engine.cuda_graph:
        measured("graph", steps_ms(steps, WARMUP))
        forward = turns(forward_ms, 1)
    engine.use_graphs(False)
    measured("eager", steps_ms(steps // 8, 2))
    if not engine.cuda_graph:
        forward = turns(forward_ms, 1)
    engine.use_graphs(True)
    for row, taken, host_bound in zip(rows, forward, late, strict=True):
        row |= dict(forward_ms=taken, host_bound=host_bound, bytes=engine.traffic.step(batch, row["context"]))
    return rows


def first_token_row(engine: Engine, tokens: int) -> dict:
    """Seconds from a request to its first token."""
    taken = []
    engine.use_graphs(True)
    for _ in range(4):  # the first compiles
        engine.engine.reset()
        prompt = engine.prompt(tokens)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        engine.add(prompt, 1)
        while engine.engine.has_unfinished_requests():
            engine.step()
        taken.append(time.perf_counter() - begin)
        check_time(engine.plan)
    return dict(
        kind="first token", context=tokens, seconds=statistics.median(taken[1:]), all=taken[1:], batch=1,
        max_tokens=engine.plan["max_tokens"],
    )  # fmt: skip


def memory_row(engine: Engine, tokens: int) -> dict:
    """Bytes on the GPU that a context for requests of ``tokens`` tokens takes for each of four, or for one."""
    need = engine.traffic.request(tokens)
    row = dict(kind="memory", context=tokens, formula_bytes=need)
    left = engine.room() - max(0, engine.taken - engine.traffic.weights)
    requests = next((n for n in (4, 1) if n * need < 0.98 * left), 0)
    if not requests:
        return row | dict(error="does not fit")
    engine.engine.reset()
    gc.collect()  # a context refers to itself
    before = torch.cuda.memory_allocated() if engine.gpu else 0
    if engine.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    blocks = requests * models.blocks_of(tokens)
    context = models.context_of(engine.model, engine.traffic, tokens, requests, requests, blocks=blocks)
    buffers = [context.memory_buffer, context.gpu_view._buf]
    if engine.traffic.state:
        buffers += [context.mamba_conv_states, context.mamba_ssm_states]
    row["bytes"] = sum(x.numel() * x.element_size() for x in buffers) / requests
    if engine.gpu:
        row["allocated_bytes"] = (torch.cuda.memory_allocated() - before) / requests
        row["peak_bytes"] = (torch.cuda.max_memory_allocated() - before) / requests
    return row


def check_time(plan: dict) -> None:
    if time.time() > plan["deadline"]:
        raise Late


def cells(engine: Engine) -> Iterator[tuple[list[dict], Callable[[], list[dict]]]]:
    """What cells are, and what measures them together; the most important first."""
    plan, kept = engine.plan, {}
    if plan["prefill"]:
        for context in plan["contexts"]:

            def read(context=context) -> list[dict]:
                begin = time.perf_counter()
                engine.use_graphs(True)
                peak = torch.cuda.memory_allocated() if engine.gpu else 0
                if engine.gpu:
                    torch.cuda.reset_peak_memory_stats()
                engine.read(1, context)
                taken = time.perf_counter() - begin
                grown = torch.cuda.max_memory_allocated() - peak if engine.gpu else 0
                kept[context] = engine.state()
                rows = decode_rows(engine, 1, [context], {}, "read")
                return [row | dict(prefill_seconds=taken, prefill_peak_bytes=grown) for row in rows]

            yield [dict(kind="decode", batch=1, context=context, requests="read")], read
    for batch in sorted(plan["batches"], key=lambda b: (b != 64, b != 16, -b)):
        fits = [n for n in plan["contexts"] if batch <= engine.most(n)]
        for context in plan["contexts"]:
            if context not in fits:
                what = dict(kind="decode", batch=batch, context=context, requests="aged")
                row = what | dict(error="does not fit", needs_bytes=batch * engine.traffic.request(context))
                yield [what], lambda row=row: [row]
        # blocks of keys and values of one context are not those of the next: such contexts do not take turns
        for turns in [[n] for n in fits] if engine.traffic.kv else [fits] if fits else []:
            what = [dict(kind="decode", batch=batch, context=context, requests="aged") for context in turns]
            yield what, lambda b=batch, c=turns: decode_rows(engine, b, c, kept, "aged")
    if plan["prompt"]:
        what = dict(kind="first token", context=plan["prompt"])
        yield [what], lambda: [first_token_row(engine, plan["prompt"])]
    for tokens in plan["memory"]:
        yield [dict(kind="memory", context=tokens)], lambda n=tokens: [memory_row(engine, n)]


def main() -> int:
    plan = json.loads(sys.argv[1])
    head = {key: plan[key] for key in ("model", "attention")}
    with open(plan["rows"], "a", buffering=1) as file:
        start(plan["gpu"])
        engine = Engine(plan)
        traffic = engine.traffic
        about = dict(weight_bytes=traffic.weights, state_bytes=traffic.state, kv_bytes=traffic.kv)
        about |= dict(parameters=engine.params, longest=engine.longest, most_requests=engine.batch)
        for what, measure in cells(engine):
            try:
                check_time(plan)
                rows = measure()
            except Late:
                print(head | {"stopped": "out of time before", **what[0]}, file=sys.stderr, flush=True)
                return 0
            except Exception as error:  # one cell that fails must not stop the others
                rows = [row | dict(error=f"{type(error).__name__}: {error}"[:300]) for row in what]
                if isinstance(error, torch.AcceleratorError):  # nothing works on this device from now on
                    file.writelines(json.dumps(head | about | row) + "\n" for row in rows)
                    raise
                import traceback

                traceback.print_exc()
            file.writelines(json.dumps(head | about | row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    asyncio.set_event_loop(asyncio.new_event_loop())
    sys.exit(main())
