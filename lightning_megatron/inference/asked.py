"""What a client of ``lightning-serve`` asks, checked in full before any of it enters the engine.

The fields are those of OpenAI's completions and chat completions, and ``top_k`` and ``ignore_eos`` as Megatron's own
server has them. A field that is not known, or known and not supported, is refused and not ignored. This module imports
neither torch nor Megatron.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..training.conversations import ROLES

SAMPLES = 128  # answers to one body: prompts x n
_COLDEST = 0.01  # logits divided by less overflow in 16 bits, and nothing can be drawn from infinities


class Refused(Exception):
    """An answer that is an error: the status of HTTP, and OpenAI's fields."""

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None,
        kind: str = "invalid_request_error", retry_after: int | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Asked:
    """A body that can be answered."""

    prompts: list[list[int]]
    """Token ids, at least one each."""
    texts: list[str]
    """Of the prompts, where they are echoed."""
    chat: bool
    max_tokens: int | None
    """For each answer; None for all that have room."""
    n: int = 1
    """Answers to each prompt."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    """Whether a stream ends with the numbers of tokens."""
    echo: bool = False
    logprobs: int | None = None
    """How many likeliest tokens are told beside the logarithm of each token's probability; None for neither."""
    ignore_eos: bool = False


@dataclass(frozen=True)
class Bodies:
    """Reads bodies of requests: turns text into tokens, and knows the limits."""

    model: str
    """The name that clients give."""
    vocab_size: int
    limit: int
    """Tokens of prompt and answer together."""
    tokenize: Callable[[str], Sequence[int]]
    detokenize: Callable[[list[int]], str]
    chat: Callable[[list[dict[str, Any]]], Sequence[int]] | None
    """Tokens of messages, up to where the answer begins; None without a chat template."""
    prompt_logprobs: bool = False
    """Whether the engine has those of prompts."""

    def completion(self, data: bytes) -> Asked:
        """Of the body of /v1/completions.

        Raises:
            Refused: naming the field, what it holds, and what is allowed.
        """
        fields = _Fields(data, self.model)
        if fields.get("prompt") is None:
            raise Refused(
                "prompt is missing: give some text, or token ids", "prompt", code="missing_required_parameter"
            )
        prompts, echo = self._prompts(fields.take("prompt")), fields.boolean("echo")
        logprobs = fields.integer("logprobs", None, 0, 20)
        common = _common(fields, default_max_tokens=16)
        if echo and logprobs is not None and not self.prompt_logprobs:
            raise Refused(
                "logprobs of an echoed prompt need a server that was started with --prompt-logprobs: leave out echo or "
                "logprobs, or start it so", "echo",
            )  # fmt: skip
        fields.finish("/v1/completions", {"best_of": (1,), "suffix": ("",)})
        asked = Asked(
            prompts,
            [self.detokenize(p) for p in prompts] if echo else [],
            False,
            echo=echo,
            logprobs=logprobs,
            **common,
        )
        return self._checked(asked, "prompt")

    def conversation(self, data: bytes) -> Asked:
        """Of the body of /v1/chat/completions.

        Raises:
            Refused: as of ``completion``.
        """
        fields = _Fields(data, self.model)
        if self.chat is None:
            raise Refused(
                "this model has no chat template: use /v1/completions, or serve a model that was trained with --sft, "
                "or with a tokenizer that has one (--tokenizer-type, --tokenizer-model)",
                "messages", code="no_chat_template",
            )  # fmt: skip
        messages = _messages(fields.take("messages"))
        newer, top = fields.integer("max_completion_tokens", None, 1, None), fields.integer("top_logprobs", None, 0, 20)
        logprobs = fields.boolean("logprobs")
        if top is not None and not logprobs:
            raise Refused(f"top_logprobs is {top} without logprobs: give logprobs true, too", "top_logprobs")
        common = _common(fields, default_max_tokens=None)
        if newer is not None and common["max_tokens"] is not None:
            raise Refused("max_tokens and max_completion_tokens say the same: leave one out", "max_tokens")
        common["max_tokens"] = newer or common["max_tokens"]
        fields.finish(
            "/v1/chat/completions",
            {
                "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
                "response_format": ({"type": "text"},), "modalities": (["text"],), "store": (False,), "metadata": ({},),
            },
        )  # fmt: skip
        try:
            tokens = self.chat(messages)
        except Exception as error:  # of templates, jinja, and tokenizers
            raise Refused(f"the chat template does not take these messages: {_line(error)}", "messages") from error
        prompts = [self._ids(tokens, "messages")]
        return self._checked(Asked(prompts, [], True, logprobs=(top or 0) if logprobs else None, **common), "messages")

    def _prompts(self, value: Any) -> list[list[int]]:
        if isinstance(value, str):
            return [self._of_text(value, "prompt")]
        if isinstance(value, list) and value:
            if all(map(_is_int, value)):
                return [self._ids(value, "prompt")]
            if all(isinstance(x, str) for x in value):
                return [self._of_text(x, f"prompt[{i}]") for i, x in enumerate(value)]
            if all(isinstance(x, list) and all(map(_is_int, x)) for x in value):
                return [self._ids(x, f"prompt[{i}]") for i, x in enumerate(value)]
        raise Refused(
            f"prompt is {_short(value)}; it must be a string, a list of token ids, or a list of several of one kind",
            "prompt",
        )

    def _of_text(self, text: str, name: str) -> list[int]:
        if not text:
            raise Refused(f"{name} is empty: give some text to continue", "prompt", code="empty_prompt")
        try:
            tokens = self.tokenize(text)
        except Exception as error:  # of any tokenizer library
            raise Refused(f"the tokenizer cannot read {name}: {_line(error)}", "prompt") from error
        return self._ids(tokens, name)

    def _ids(self, tokens: Sequence[Any], name: str) -> list[int]:
        param = name.partition("[")[0]
        found = [int(token) for token in tokens]
        if not found:
            raise Refused(f"{name} has no tokens: give some text to continue", param, code="empty_prompt")
        wrong = next((token for token in found if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise Refused(f"{name} has token {wrong}, but the vocabulary is 0 to {self.vocab_size - 1}", param)
        return found

    def _checked(self, asked: Asked, param: str) -> Asked:
        if len(asked.prompts) * asked.n > SAMPLES:
            raise Refused(f"{len(asked.prompts)} prompts x n={asked.n} answers are more than {SAMPLES} at once", "n")
        if asked.stream and asked.logprobs is not None:
            raise Refused("logprobs are not supported with stream: leave one of them out", "logprobs")
        if asked.top_k > self.vocab_size - 1:
            raise Refused(f"top_k is {asked.top_k}; the vocabulary has {self.vocab_size} tokens: give less", "top_k")
        for prompt in asked.prompts:
            wanted = len(prompt) + (asked.max_tokens or 1)
            if wanted > self.limit:
                answer = "" if asked.max_tokens is None else f" and {asked.max_tokens} to generate"
                raise Refused(
                    f"this model's maximum context length is {self.limit} tokens, but the prompt has {len(prompt)}"
                    f"{answer}: shorten {'it' if len(prompt) >= self.limit else 'it, or give less max_tokens'}",
                    param, code="context_length_exceeded",
                )  # fmt: skip
        return asked


class _Fields:
    """A JSON object whose fields are taken out one by one; null counts as not given."""

    def __init__(self, data: bytes, model: str):
        try:
            value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
        except UnicodeDecodeError as error:
            raise Refused(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from error
        except (ValueError, RecursionError) as error:
            raise Refused(f"the body is no JSON: {_line(error)}", code="invalid_json") from error
        if not isinstance(value, dict):
            raise Refused(f"the body is {_short(value)}; it must be a JSON object", code="invalid_json")
        self.given = {key: x for key, x in value.items() if x is not None}
        name = self.take("model", model)
        if not isinstance(name, str):
            raise Refused(f"model is {_short(name)}; it must be a string", "model")
        if name != model:
            raise Refused(
                f"there is no model {_short(name)}: this server has {model!r}",
                "model",
                status=404,
                code="model_not_found",
            )

    def get(self, name: str) -> Any:
        return self.given.get(name)

    def take(self, name: str, default: Any = None) -> Any:
        return self.given.pop(name, default)

    def boolean(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise Refused(f"{name} is {_short(value)}; it must be true or false", name)
        return value

    def integer(self, name: str, default: int | None, low: int, high: int | None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if not _is_int(value) or value < low or (high is not None and value > high):
            most = "" if high is None else f" and at most {high}"
            raise Refused(f"{name} is {_short(value)}; it must be a whole number, at least {low}{most}", name)
        return value

    def number(self, name: str, default: float, allowed: Callable[[float], bool], text: str) -> float:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
            raise Refused(f"{name} is {_short(value)}; it must be {text}", name)
        return float(value)

    def finish(self, path: str, neutral: dict[str, tuple[Any, ...]]) -> None:
        """Refuse what is left, except for values that change nothing."""
        neutral = {
            **neutral, "user": (), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "seed": (),
        }  # fmt: skip
        for name, value in self.given.items():
            if name not in neutral:
                raise Refused(f"{name!r} is not a field of {path} here: leave it out", name, code="unknown_parameter")
            same = any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in neutral[name])
            if not same and name != "user":
                raise Refused(
                    f"{name} is {_short(value)}, which this server does not support: leave it out", name,
                    code="unsupported_parameter",
                )  # fmt: skip


def _common(fields: _Fields, default_max_tokens: int | None) -> dict[str, Any]:
    temperature = fields.number(
        "temperature", 1.0, lambda x: x == 0 or _COLDEST <= x <= 2,
        f"0, which takes the likeliest token, or from {_COLDEST} to 2",
    )  # fmt: skip
    if temperature == 0:
        fields.integer("seed", None, -(2**63), 2**63 - 1)  # nothing is drawn
    top_p = fields.number("top_p", 1.0, lambda x: 0 < x <= 1, "above 0 and at most 1")
    top_k = fields.integer("top_k", 0, 0, None)
    if top_k and top_p < 1:
        raise Refused(f"top_k is {top_k} and top_p {top_p}: Megatron takes one of the two; leave one out", "top_k")
    stream, options = fields.boolean("stream"), fields.take("stream_options")
    if options is not None:
        if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
            raise Refused(
                f"stream_options is {_short(options)}; it must be an object with include_usage", "stream_options"
            )
        if not stream:
            raise Refused("stream_options is for stream true: leave it out", "stream_options")
    usage = (options or {}).get("include_usage") or False
    if not isinstance(usage, bool):
        raise Refused(f"stream_options.include_usage is {_short(usage)}; it must be true or false", "stream_options")
    return dict(
        temperature=temperature, top_p=top_p, top_k=top_k, stream=stream, include_usage=usage, stop=_stop(fields),
        n=fields.integer("n", 1, 1, SAMPLES), max_tokens=fields.integer("max_tokens", default_max_tokens, 1, None),
        ignore_eos=fields.boolean("ignore_eos"),
    )  # fmt: skip


def _stop(fields: _Fields) -> tuple[str, ...]:
    value = fields.take("stop", [])
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or len(words) > 16 or not all(isinstance(x, str) and x for x in words):
        raise Refused(f"stop is {_short(value)}; it must be some text, or a list of at most 16", "stop")
    return tuple(words)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Refused(f"messages is {_short(value)}; it must be a list of at least one message", "messages")
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refused(f"messages[{i}] is {_short(message)}; its role must be one of {', '.join(ROLES)}", "messages")
        content = message.get("content")
        if isinstance(content, list) and all(
            isinstance(x, dict) and x.get("type") == "text" and isinstance(x.get("text"), str) for x in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Refused(f"messages[{i}].content is {_short(content)}; it must be text", "messages")
        more = message.keys() - {"role", "content", "name"}
        if more:
            raise Refused(f"messages[{i}] has {min(more)!r}, which this server does not support", "messages")
        found.append({"role": message["role"], "content": content})
    return found


def _is_int(value: Any) -> bool:
    return type(value) is int


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
