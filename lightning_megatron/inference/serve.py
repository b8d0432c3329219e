"""Serve a checkpoint over HTTP, as OpenAI's clients expect it: ``lightning-serve``.

    lightning-serve --load CKPT --port 5000
    torchrun --nproc-per-node 2 -m lightning_megatron.inference.serve --load CKPT --tensor-model-parallel-size 2

Requests share the steps of Megatron's dynamic inference engine: each that generates keeps a K x V state for every head
of a lightning layer, and keys and values for softmax layers. SIGINT and SIGTERM end it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .command import Parser, UsageError, build_tokenizer, check_layout, on_first_rank, rank, run_command, tokenizer_args

if TYPE_CHECKING:
    from .asked import Bodies
    from .engine import Engine

_PACKAGES = ("quart", "hypercorn", "zmq", "msgpack")
_GRACE = 3.0  # seconds for answers that are under way, when the server is to end


def parser() -> Parser:
    """The command line; flags that are not in it are Megatron's."""
    made = Parser("lightning-serve", __doc__)
    add = made.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at; others than this machine reach only another (%(default)s)",
    )
    add("--port", type=int, default=5000, help="0 for any that is free (%(default)s)")
    add("--model-name", metavar="NAME", help="what clients call the model (default: the name of the folder)")
    add(
        "--max-requests",
        type=int,
        metavar="N",
        help="requests that generate at once (64, or as many as have room; CPU 8)",
    )
    add(
        "--max-waiting",
        type=int,
        default=256,
        metavar="N",
        help="requests that wait; more get status 429 (%(default)s)",
    )
    add(
        "--max-sequence-length",
        type=int,
        metavar="N",
        help="tokens of a prompt and its answer (as the model was trained)",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="tokens of one step; longer prompts are read in parts (4096; CPU 512)",
    )
    add("--buffer-gb", type=float, metavar="X", help="GiB for states, keys and values (default: what is free)")
    add("--cuda-graphs", type=int, metavar="N", help="capture CUDA graphs for N sizes of steps (default: none)")
    add(
        "--prompt-logprobs",
        action="store_true",
        help="tell logprobs of prompts, too, where echo is asked for; a step then has logits of all its tokens",
    )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``lightning-serve``.

    Exit status: 0 after SIGINT or SIGTERM, 1 no checkpoint to load or the engine ended, 2 asked for wrongly.
    """
    made = parser()
    options, flags = made.parse_known_args(argv)
    run_command(made, lambda: _run(options, flags))


def _run(options: Namespace, flags: list[str]) -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} cannot be imported: pip install 'lightning-megatron[serve]'")
    for name in ("max_requests", "max_sequence_length", "max_tokens", "buffer_gb", "cuda_graphs"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be above 0")
        if value is not None and not value < 2**31:  # nan, too
            raise UsageError(f"--{name.replace('_', '-')} {value} must be below {2**31}")
    if not 0 <= options.port < 2**16:  # the system would take its lowest 16 bits
        raise UsageError(f"--port {options.port} must be from 0, for any that is free, to {2**16 - 1}")
    if options.max_waiting < 0:
        raise UsageError(f"--max-waiting {options.max_waiting} must be at least 0")
    from .engine import EXPERTS, GRAPHED_EXPERTS, build_engine
    from .loading import loaded_model, process_group, read_checkpoint, world_size

    if os.environ.get("LOCAL_WORLD_SIZE", str(world_size())) != str(world_size()):
        raise UsageError("processes on several machines: ranks talk over loopback; start all of them on one")
    check_layout(flags)
    saved = read_checkpoint(options.load, options.ckpt_step)
    if saved.args.num_experts:
        flags = [*EXPERTS, *flags]
    if options.cuda_graphs:
        flags = [*flags, "--cuda-graph-impl", "local", *(GRAPHED_EXPERTS if saved.args.num_experts else ())]
    args = tokenizer_args(options, saved.args)
    logging.getLogger().setLevel(logging.WARNING)  # Megatron tells each step of its start
    with process_group():
        place: list[socket.socket] = []
        on_first_rank(lambda: place.append(_listen(options.host, options.port)))
        tokenizer = build_tokenizer(args)
        with loaded_model(saved, vocab_size=tokenizer.vocab_size, flags=flags) as model:
            try:
                engine = build_engine(
                    model, tokenizer, max_requests=options.max_requests, buffer_gb=options.buffer_gb,
                    max_sequence_length=options.max_sequence_length, max_tokens=options.max_tokens,
                    cuda_graphs=options.cuda_graphs, prompt_logprobs=options.prompt_logprobs,
                )  # fmt: skip
            except ValueError as error:
                raise UsageError(
                    f"{error} (--max-requests, --max-sequence-length, --max-tokens, --buffer-gb)"
                ) from error
            name = options.model_name or options.load.resolve().name
            if rank() == 0:
                asyncio.run(_serve(engine, tokenizer, args.tokenizer_type, name, place[0], options))
            else:
                from .service import follow

                follow(engine)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        place = socket.socket(family, socket.SOCK_STREAM)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
        place.listen(1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen at {host}, port {port}: {reason}; give another --host or --port") from error
    return place


async def _serve(
    engine: Engine, tokenizer: Any, kind: str, name: str, place: socket.socket, options: Namespace
) -> None:
    """Until a signal, which is a good end, or until the engine ends, which is a bad one."""
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    from .app import build_app
    from .service import Service

    loop, told = asyncio.get_running_loop(), asyncio.Event()
    service = Service(engine, tokenizer, options.max_waiting)

    def stop() -> None:
        told.set()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)  # a second one does not wait

    async with service:
        app = build_app(service, _bodies(service, tokenizer, kind, name, options.prompt_logprobs), tokenizer)
        config = Config()
        host, port = place.getsockname()[:2]
        config.bind, config.graceful_timeout = [f"fd://{place.detach()}"], _GRACE
        config.loglevel, config.keep_alive_timeout = "WARNING", 30.0

        @app.before_serving
        async def ready() -> None:
            shown = f"[{host}]" if ":" in host else host
            print(
                f"lightning-serve: {name} at http://{shown}:{port}/v1, {service.max_requests} requests at once, "
                f"{service.limit} tokens each",
                flush=True,
            )

        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, stop)
        ends = [asyncio.create_task(event.wait()) for event in (told, service.ended)]

        async def end() -> None:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)

        await serve(app, config, shutdown_trigger=end)
        for task in ends:
            task.cancel()
        logging.getLogger().setLevel(logging.ERROR)  # the coordinator warns that the engine leaves
        if not told.is_set():
            print(f"lightning-serve: error: {service.error}; the server ends", file=sys.stderr, flush=True)
            sys.exit(1)


def _bodies(service: Any, tokenizer: Any, kind: str, name: str, prompt_logprobs: bool) -> Bodies:
    from .asked import Bodies

    return Bodies(
        model=name,
        vocab_size=tokenizer.vocab_size,
        limit=service.limit,
        tokenize=tokenizer.tokenize,
        detokenize=tokenizer.detokenize,
        chat=_chat(tokenizer, kind),
        prompt_logprobs=prompt_logprobs,
    )


def _chat(tokenizer: Any, kind: str) -> Any:
    """Tokens of messages by the tokenizer's chat template; None without one."""
    if kind == "SFTTokenizer":
        template = tokenizer._tokenizer._prompt_config.custom_chat_template
        return None if template is None else tokenizer.tokenize
    if kind != "HuggingFaceTokenizer" or getattr(tokenizer, "chat_template", None) is None:
        return None
    return lambda messages: tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )


if __name__ == "__main__":
    main()
