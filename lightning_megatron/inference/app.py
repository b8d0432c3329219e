"""HTTP of ``lightning-serve``: OpenAI's completions and chat completions, whole and as streams, over a ``Service``.

Megatron's own endpoints are not used: they answer in plain text where something is wrong, pass on what makes the
engine's loop raise, and so end it for all, know no streams, and let a request run on whose client has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from megatron.core.inference.sampling_params import SamplingParams
from quart import Quart, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge, RequestTimeout

from .asked import Asked, Bodies, Refused
from .sampling import Text
from .service import Full, Gone, Service

_BODY_SECONDS = 60

logger = logging.getLogger("lightning_megatron")


@dataclass
class Answer:
    """What came of one prompt so far."""

    index: int
    prompt: list[int]
    echo: str = ""
    parts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    reply: dict[str, Any] = field(default_factory=dict)
    """Megatron's; empty if a stop word ended it."""

    @property
    def text(self) -> str:
        return self.echo + "".join(self.parts)


class Answers:
    """Answers to one body, all at the same time in the engine."""

    def __init__(self, service: Service, tokenizer: Any, asked: Asked):
        self.service, self.tokenizer, self.asked = service, tokenizer, asked
        texts = asked.texts or [""] * len(asked.prompts)
        pairs = [(p, text) for p, text in zip(asked.prompts, texts, strict=True) for _ in range(asked.n)]
        self.all = [Answer(i, prompt, text) for i, (prompt, text) in enumerate(pairs)]
        eod = getattr(tokenizer, "eod", None)
        self.eod = -1 if asked.ignore_eos or eod is None else int(eod)

    def params(self, prompt: list[int]) -> SamplingParams:
        """As Megatron's sampling takes them; greedy is its top-k of 1."""
        asked, greedy = self.asked, self.asked.temperature == 0
        return SamplingParams(
            temperature=1.0 if greedy else asked.temperature,
            top_k=1 if greedy else asked.top_k,
            top_p=0.0 if greedy or asked.top_p == 1 else asked.top_p,
            num_tokens_to_generate=asked.max_tokens or self.service.limit - len(prompt),
            termination_id=self.eod,
            return_log_probs=asked.logprobs is not None,
            top_n_logprobs=asked.logprobs or 0,
            skip_prompt_log_probs=not (asked.echo and asked.logprobs is not None),
        )

    async def pieces(self, answer: Answer) -> AsyncIterator[str]:
        """New text of one answer, as it is certain; at the end ``answer`` is complete."""
        text, key = Text(self.tokenizer, answer.prompt, self.asked.stop), self.service.key()
        async with contextlib.aclosing(self.service.tokens(key, answer.prompt, self.params(answer.prompt))) as stream:
            async for item in stream:
                if isinstance(item, dict):
                    if item["status"] != "COMPLETED":
                        raise RuntimeError(f"the engine refused what was checked: {item['events']}")
                    answer.reply, item = item, item["generated_tokens"][len(answer.tokens) :]
                if answer.finish is not None:
                    continue  # a stop word ended it, and the reply is waited for
                piece = self._push(answer, text, item)
                answer.parts.append(piece)
                if piece:
                    yield piece
                if answer.finish is not None and not answer.reply:
                    if self.asked.logprobs is None:
                        return  # which ends it in the engine
                    self.service.abort(key)  # its reply has the logprobs

    def _push(self, answer: Answer, text: Text, tokens: list[int]) -> str:
        found = []
        for token in map(int, tokens):
            answer.tokens.append(token)
            if token == self.eod:
                answer.finish = "stop"
                break
            found.append(text.push(token))
            if text.stopped:
                answer.finish = "stop"
                return "".join(found)
        if answer.reply and answer.finish is None:
            answer.finish = "length"
        # The reply is the end of tokens, but the end of document comes before it.
        return "".join(found) + (text.flush() if answer.finish is not None else "")

    async def each(self) -> AsyncIterator[tuple[Answer, str]]:
        """New text of whichever answer has some; "" once it is complete."""
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def one(answer: Answer) -> None:
            try:
                async with contextlib.aclosing(self.pieces(answer)) as pieces:
                    async for piece in pieces:
                        queue.put_nowait((answer, piece))
                queue.put_nowait((answer, ""))
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(one(answer)) for answer in self.all]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                left -= item[1] == ""
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens; a prompt counts once however many answers there are."""
        prompts, answers = sum(map(len, self.asked.prompts)), sum(len(answer.tokens) for answer in self.all)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}


# ---- bodies ----------------------------------------------------------------------------------------------------------


def _head(asked: Asked, model: str, chunk: bool = False) -> dict[str, Any]:
    kind = "text_completion" if not asked.chat else "chat.completion.chunk" if chunk else "chat.completion"
    prefix = "chatcmpl" if asked.chat else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _choice(answer: Answer, asked: Asked, tokenizer: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": answer.index, "finish_reason": answer.finish, "logprobs": None}
    if asked.chat:
        choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
    else:
        choice["text"] = answer.text
    if asked.logprobs is not None:
        count = len(answer.tokens)
        values = answer.reply["generated_log_probs"][:count]
        by_number = (answer.reply["generated_top_n_logprobs"] or [{}] * count)[:count]
        before = answer.prompt if asked.echo else []
        if before:  # whose first token follows nothing
            values = [None, *(answer.reply["prompt_log_probs"] or []), *values]
            by_number = [None, *(answer.reply["prompt_top_n_logprobs"] or [{}] * (len(before) - 1)), *by_number]
        names = [tokenizer.detokenize([token]) for token in (*before, *answer.tokens)]
        tops = [top and {int(number): value for number, value in top.items()} for top in by_number]
        if asked.chat:
            choice["logprobs"] = {
                "content": [
                    {
                        **_logprob(name, value),
                        "top_logprobs": [
                            _logprob(tokenizer.detokenize([token]), logprob) for token, logprob in top.items()
                        ],
                    }
                    for name, value, top in zip(names, values, tops, strict=True)
                ],
                "refusal": None,
            }
        else:
            named = [None if top is None else _by_text(top, tokenizer) for top in tops]
            text = Text(tokenizer, [] if before else answer.prompt)  # in which each begins, spaces before it too
            lengths = (len(text.push(token)) for token in (*before, *answer.tokens))
            offsets = list(itertools.accumulate(lengths, initial=0))[:-1]
            choice["logprobs"] = {
                "tokens": names, "token_logprobs": values, "top_logprobs": named if asked.logprobs else None,
                "text_offset": offsets,
            }  # fmt: skip
    return choice


def _by_text(top: dict[int, float], tokenizer: Any) -> dict[str, float]:
    """The likeliest tokens; one whose text a likelier one has, too, by its number."""
    named: dict[str, float] = {}
    for token, value in top.items():
        text = tokenizer.detokenize([token])
        named[f"token_id:{token}" if text in named else text] = value
    return named


def _logprob(token: str, value: float) -> dict[str, Any]:
    """Of the bytes of a part of a character its name tells nothing."""
    return {"token": token, "logprob": value, "bytes": None if "\ufffd" in token else list(token.encode())}


def _part(answer: Answer, asked: Asked, piece: str, finish: str | None, first: bool) -> dict[str, Any]:
    part: dict[str, Any] = {"index": answer.index, "finish_reason": finish, "logprobs": None}
    if asked.chat:
        part["delta"] = ({"role": "assistant"} if first else {}) | ({"content": piece} if piece or first else {})
    else:
        part["text"] = piece
    return part


async def _events(answers: Answers, model: str) -> AsyncIterator[str]:
    """Server-sent events, each a part of one answer."""
    asked, head = answers.asked, _head(answers.asked, model, chunk=True)
    usage = {"usage": None} if asked.include_usage else {}

    def event(answer: Answer, piece: str, finish: str | None = None, first: bool = False) -> str:
        return _event({**head, "choices": [_part(answer, asked, piece, finish, first)], **usage})

    for answer in answers.all:
        if asked.chat or answer.echo:
            yield event(answer, answer.echo, first=True)
    try:
        async with contextlib.aclosing(answers.each()) as each:
            async for answer, piece in each:
                yield event(answer, piece, None if piece else answer.finish)
    except Gone as error:
        yield _event(_unavailable(error).body)
    except Exception:
        logger.exception("a stream failed")
        yield _event(_failed().body)
    else:
        if asked.include_usage:
            yield _event({**head, "choices": [], "usage": answers.usage()})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


# ---- the app ---------------------------------------------------------------------------------------------------------


def build_app(service: Service, bodies: Bodies, tokenizer: Any) -> Quart:
    """The web application.

    Args:
        service: within its ``async with``.
        bodies: reads them; may be called in another thread.
        tokenizer: of the model.
    """
    app = Quart("lightning_serve")
    app.config["MAX_CONTENT_LENGTH"] = None  # of Quart, which answers, and closes, while the client still sends
    longest = 2**20 + 64 * service.limit
    began, reading = int(time.time()), asyncio.Lock()  # tokenizers are not used by two threads at once

    async def answer(read: Any) -> Response:
        service.check_room(1)
        data = await _body(longest)
        async with reading:
            asked = await asyncio.to_thread(read, data)
        asks, most = len(asked.prompts) * asked.n, service.max_requests + service.max_waiting
        if asks > most:
            raise Refused(
                f"{len(asked.prompts)} prompts x n={asked.n} answers are more than the {most} that this server takes "
                "at once: ask in several requests",
                "n",
            )
        service.check_room(asks)
        answers = Answers(service, tokenizer, asked)
        if asked.stream:
            response = Response(_events(answers, bodies.model), mimetype="text/event-stream")
            response.headers["Cache-Control"] = "no-cache"
            response.timeout = None  # of Quart, which would cut it off
            return response
        async with contextlib.aclosing(answers.each()) as each:
            async for _ in each:
                pass
        choices = [_choice(x, asked, tokenizer) for x in answers.all]
        return _json({**_head(asked, bodies.model), "choices": choices, "usage": answers.usage()})

    @app.post("/v1/completions")
    async def completions() -> Response:
        return await answer(bodies.completion)

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        return await answer(bodies.conversation)

    model = {"id": bodies.model, "object": "model", "created": began, "owned_by": "lightning_megatron"}

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [model]})

    @app.get("/v1/models/<path:name>")
    async def one_model(name: str) -> Response:
        if name != bodies.model:
            raise Refused(
                f"there is no model {name!r}: this server has {bodies.model!r}", "model", status=404,
                code="model_not_found",
            )  # fmt: skip
        return _json(model)

    @app.get("/health")
    async def health() -> Response:
        ended = service.ended.is_set()
        return _json({"status": "error" if ended else "ok", **service.held()}, 503 if ended else 200)

    @app.after_request
    async def read_to_the_end(response: Response) -> Response:
        """A connection with an unread body is closed, and its client may have sent the next request on it."""
        with contextlib.suppress(RequestTimeout, RequestEntityTooLarge):  # the answer is known
            await _body(longest)
        return response

    @app.errorhandler(Refused)
    async def refused(error: Refused) -> Response:
        response = _json(error.body, error.status)
        if error.retry_after is not None:
            response.headers["Retry-After"] = str(error.retry_after)
        return response

    @app.errorhandler(Full)
    async def full(error: Full) -> Response:
        kind = "rate_limit_error"
        return await refused(Refused(str(error), status=429, kind=kind, code="rate_limit_exceeded", retry_after=1))

    @app.errorhandler(Gone)
    async def gone(error: Gone) -> Response:
        return await refused(_unavailable(error))

    @app.errorhandler(HTTPException)
    async def http(error: HTTPException) -> Response:
        status = error.code or 500
        text = {
            404: f"there is no {request.path} here: see /v1/completions, /v1/chat/completions, /v1/models, /health",
            405: f"{request.path} does not take {request.method}",
            413: f"the body is longer than {longest} bytes, more than any prompt that fits",
        }.get(status, str(error.description or error.name))
        return await refused(Refused(text, status=status, code=error.name.lower().replace(" ", "_")))

    @app.errorhandler(Exception)
    async def failed(error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.path, exc_info=error)
        return await refused(_failed())

    return app


async def _body(longest: int) -> bytes:
    """What the client sends; all of a longer body is read, and nothing of it kept."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.body:
                size += len(part)
                if size <= longest:
                    parts.append(part)
    except TimeoutError as error:
        raise RequestTimeout(f"the body did not come within {_BODY_SECONDS} s") from error
    if size > longest:
        raise RequestEntityTooLarge()
    return b"".join(parts)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value), status=status, mimetype="application/json")


def _unavailable(error: Exception) -> Refused:
    return Refused(f"nothing is served any more: {error}", status=503, kind="server_error", code="unavailable")


def _failed() -> Refused:
    return Refused("the server failed; its log says why", status=500, kind="server_error", code="internal_error")
