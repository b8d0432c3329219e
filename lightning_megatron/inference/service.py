"""An engine that serves: Megatron's coordinator and engine loop in threads of rank 0, and requests by its client.

    web server (event loop of the main thread)
      | InferenceClient                     ^ tokens of each step
    DataParallelInferenceCoordinator      Engine.on_tokens
      |                                     |
    engine loop of rank 0  -> engine loops of the other ranks

The coordinator is Megatron's; it runs in a thread, and not as the process that Megatron starts, so that no process is
left behind, nothing is imported twice, and its end is seen at once. Messages between ranks go over loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import multiprocessing
import signal
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch
from megatron.core.inference.data_parallel_inference_coordinator import DataParallelInferenceCoordinator
from megatron.core.inference.engines.dynamic_engine import EngineState
from megatron.core.inference.inference_client import InferenceClient
from megatron.core.inference.sampling_params import SamplingParams

from .engine import ABORT, KEY, Engine, longest

HOST = "127.0.0.1"
_PATIENCE = 30.0  # seconds for a step to end, when the engine is to stop

logger = logging.getLogger("lightning_megatron")


class Full(Exception):
    """No more requests can wait."""


class Gone(Exception):
    """The engine ended, or is about to."""


class Service:
    """Requests to an engine, on rank 0; used by one event loop. It is a context manager, within which it serves."""

    def __init__(self, engine: Engine, tokenizer: Any, max_waiting: int):
        self.limit = longest(engine)
        self.max_requests, self.max_waiting = engine.context.max_requests, max_waiting
        self.ended = asyncio.Event()
        """Set when the engine or the coordinator ends, for whatever reason."""
        self.error: BaseException | None = None
        self._engine, self._tokenizer = engine, tokenizer
        self._queues: dict[int, asyncio.Queue[Any]] = {}
        self._keys = itertools.count()
        self._threads: list[threading.Thread] = []
        self._engine_loop: asyncio.AbstractEventLoop | None = None
        self._registered = threading.Event()

    async def __aenter__(self) -> Service:
        self._loop = asyncio.get_running_loop()
        address = await self._start("coordinator", self._coordinate)
        self._engine.on_tokens = lambda news: self._loop.call_soon_threadsafe(self._deliver, news)
        await self._start("engine", functools.partial(self._run_engine, address))
        # The coordinator takes its first message for the engine's, so that the client must come later.
        if not await asyncio.to_thread(self._registered.wait, _PATIENCE):
            raise Gone("the engine does not reach the coordinator")
        self._client = InferenceClient(address, deserialize=False)
        self._client.start(self._loop)
        return self

    async def __aexit__(self, *error: Any) -> None:
        """Stop at the end of the step; requests that are open fail with ``Gone``."""
        engine, coordinator = self._threads[1], self._threads[0]
        # the thread of an engine that has ended may be alive for a moment, without its event loop
        if not self.ended.is_set() and engine.is_alive() and coordinator.is_alive():
            self._client.pause_engines()
            paused = asyncio.run_coroutine_threadsafe(self._engine.wait_until(EngineState.PAUSED), self._engine_loop)
            await asyncio.wait_for(asyncio.wrap_future(paused), _PATIENCE)
            self._client.stop_engines()
            await asyncio.to_thread(engine.join, _PATIENCE)
        if coordinator.is_alive():
            self._client.shutdown_coordinator()
            # its last messages may be for an engine that is gone
            await asyncio.to_thread(coordinator.join, _PATIENCE if self.error is None else 0.5)
        self._client.stop()

    @property
    def open(self) -> int:
        """Requests that wait or generate, and whose answer somebody waits for."""
        return len(self._queues)

    def held(self) -> dict[str, int]:
        """Requests that generate, that wait, that are either; slots of states that are free; steps so far."""
        context = self._engine.context
        free = getattr(context.mamba_metadata, "mamba_state_free_slot_count", context.max_requests)
        return {
            "active": int(context.total_request_count),
            "waiting": len(self._engine.waiting_request_ids),
            "known": len(self._engine.requests),
            "free_slots": int(free),
            "steps": int(context.step_count),
        }

    def check_room(self, requests: int) -> None:
        """
        Raises:
            Gone: nothing is served any more.
            Full: so many more requests have no room.
        """
        if self.ended.is_set():
            raise Gone("the engine has ended")
        if self.open + requests > self.max_requests + self.max_waiting:
            raise Full(
                f"{self.open} requests generate or wait, and {requests} more would be above "
                f"{self.max_requests + self.max_waiting}: try again later"
            )

    def key(self) -> int:
        """A name for one request."""
        return next(self._keys)

    async def tokens(
        self, key: int, prompt: list[int], params: SamplingParams
    ) -> AsyncIterator[list[int] | dict[str, Any]]:
        """New tokens as they come, then Megatron's reply with all of them.

        A request whose iterator is closed before the reply is ended in the engine, after the step that it is in.
        """
        queue: asyncio.Queue[Any] = asyncio.Queue()
        setattr(params, KEY, key)
        self._queues[key] = queue
        reply = None
        try:
            self._client.add_request(prompt, params).add_done_callback(functools.partial(_put, queue))
            while reply is None:
                item = await queue.get()
                if isinstance(item, BaseException):
                    reply = {}  # there is nothing to end
                    raise item
                if isinstance(item, dict):
                    reply = item
                yield item
        finally:
            del self._queues[key]
            if reply is None and not self.ended.is_set():
                self.abort(key)

    def abort(self, key: int) -> None:
        """End a request in the engine."""
        params = SamplingParams(num_tokens_to_generate=1, termination_id=-1)
        setattr(params, ABORT, [key])
        self._client.add_request([0], params)

    def _deliver(self, news: list[tuple[int, list[int]]]) -> None:
        for key, tokens in news:
            if key in self._queues:
                self._queues[key].put_nowait(tokens)

    # ---- threads -----------------------------------------------------------------------------------------------------

    async def _start(self, name: str, work: Callable[[Callable[[Any], None]], None]) -> Any:
        """Run ``work(ready)`` in a thread; returns what it gives to ``ready``, or raises why it ended before."""
        started: asyncio.Future[Any] = self._loop.create_future()

        def tell(value: Any, error: BaseException | None = None) -> None:
            if started.done():
                return
            if error is not None:
                started.set_exception(error)
            else:
                started.set_result(value)

        def run() -> None:
            error: BaseException | None = None
            try:
                work(lambda value: self._loop.call_soon_threadsafe(tell, value))
            except BaseException as raised:  # Megatron ends a failing loop by SystemExit
                error = raised
            with contextlib.suppress(RuntimeError):  # the event loop may have ended before
                self._loop.call_soon_threadsafe(tell, None, Gone(f"the {name} did not start: {error}"))
                self._loop.call_soon_threadsafe(self._end, name, error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
        return await started

    def _end(self, name: str, error: BaseException | None) -> None:
        if not self.ended.is_set():
            told = "; its log is above" if isinstance(error, SystemExit) else f": {error}" if error else ""
            self.error = Gone(f"the {name} ended{told}")
            self.ended.set()
        for queue in self._queues.values():
            queue.put_nowait(Gone(f"the {name} has ended"))

    def _coordinate(self, ready: Callable[[Any], None]) -> None:
        here, there = multiprocessing.Pipe()
        thread = threading.Thread(target=lambda: ready(here.recv()), daemon=True)  # it tells its address, then waits
        thread.start()
        context = self._engine.context
        DataParallelInferenceCoordinator.entrypoint(
            pipe_connection=there, ready_event=self._registered, data_parallel_size=1, tokenizer=self._tokenizer,
            max_requests=context.max_requests, block_size_tokens=context.block_size_tokens, hostname=HOST,
        )  # fmt: skip

    def _run_engine(self, address: str, ready: Callable[[Any], None]) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(self._engine_device)

        async def main() -> None:
            self._engine_loop = asyncio.get_running_loop()
            await listen(self._engine, int(address.rsplit(":", 1)[1]))
            ready(None)
            await self._engine.engine_loop_task

        asyncio.run(main())

    @functools.cached_property
    def _engine_device(self) -> int:
        return int(next(self._engine.controller.inference_wrapped_model.model.parameters()).device.index or 0)


async def listen(engine: Engine, port: int | None = None) -> None:
    """Start the engine's loop in this event loop; all ranks, with the port of the coordinator on rank 0."""
    await engine.start_listening_to_data_parallel_coordinator(
        inference_coordinator_port=port, launch_inference_coordinator=False, hostname=HOST,
        loop=asyncio.get_running_loop(),
    )  # fmt: skip


def follow(engine: Engine) -> None:
    """What ranks other than 0 do, until rank 0 tells them to end.

    Signals go to all ranks at once: rank 0 ends the others in order, and they wait for it for a while.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(int(_PATIENCE)))

    async def main() -> None:
        await listen(engine)
        await engine.engine_loop_task

    asyncio.run(main())


def _put(queue: asyncio.Queue[Any], future: asyncio.Future[Any]) -> None:
    queue.put_nowait(Gone("the server stops") if future.cancelled() else future.result())
