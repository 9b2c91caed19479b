"""A policy over any endpoint that speaks the OpenAI chat format: Kimi, OpenRouter, vLLM, `transformers serve`.

Connections and retries are the `openai` package's; replies are read here, because endpoints differ in what they leave out.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai

from k25lite.swarm.context import estimate
from k25lite.swarm.policy import Message, Reply, ToolCall
from k25lite.swarm.tools import cut

OPENAI = "https://api.openai.com/v1"
_Session = tuple[AsyncGenerator[openai.AsyncOpenAI, None], openai.AsyncOpenAI, asyncio.Semaphore]


class EndpointError(RuntimeError):
    """The endpoint gave no reply that can be used."""


@dataclass(eq=False)
class OpenAIPolicy:
    """A model behind an endpoint.

    Example:
        >>> policy = OpenAIPolicy("kimi-k2.5", "http://localhost:8000/v1", requests_per_minute=60)

    Attributes:
        base_url: up to /chat/completions; by default $OPENAI_BASE_URL, or else OpenAI's own.
        key_variable: the environment variable of the key; a copy of the policy on another machine reads it there. An
            endpoint on this machine may do without.
        timeout: seconds without a byte, in each try; the wall clock of a task is limited by its `Limits`.
        retries: after 408, 409, 429, 5xx, a time-out or a broken connection: in 0.5 s, 1 s, ... 8 s, or when Retry-After
            says; if it says more than two minutes, there is none.
        requests_per_minute: evenly spaced, retries included, in one process. max_concurrent: in one event loop.
        max_tokens: of a reply. temperature: None is the endpoint's own.
        price: US dollars per million tokens read, and written. Where an endpoint does not count them, they are estimated
            (see `context.estimate`), so that limits hold all the same.
        extra: more fields of each request, such as {"reasoning_effort": "low"}.

    Raises:
        ValueError: no key, no such URL, or a number out of range.
    """

    model: str
    base_url: str | None = None
    _: KW_ONLY
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 5
    requests_per_minute: float | None = None
    max_concurrent: int = 64
    max_tokens: int | None = None
    temperature: float | None = None
    price: tuple[float, float] = (0.0, 0.0)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rate = 1.0 if self.requests_per_minute is None else self.requests_per_minute
        if min(self.timeout, self.max_concurrent, rate) <= 0 or min(self.retries, *self.price) < 0:
            raise ValueError("timeout, max_concurrent and requests_per_minute are above 0, retries and price not below")
        self.base_url = self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        self._next_turn, self._sessions = 0.0, dict[asyncio.AbstractEventLoop, _Session]()
        self._key()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next_turn": 0.0, "_sessions": {}}

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Reply:
        """
        Raises:
            EndpointError: no reply after all retries, or a malformed one. ValueError: the key is gone.
        """
        asked = {"max_tokens": self.max_tokens, "temperature": self.temperature, **_offered(messages, tools)}
        body = {"model": self.model, "messages": list(messages), **asked, **self.extra}
        body = {name: value for name, value in body.items() if value is not None}
        key, failure, text = self._key(), "", ""
        client, places = await self._session(key)
        try:
            async with places:
                text = await client.post("/chat/completions", content=_encoded(body), cast_to=str)
        except openai.APIError as error:
            cause = f" {error.__cause__}" if str(error.__cause__ or "") else ""
            failure = f"{error}{cause} (after {error.request.headers.get('x-stainless-retry-count', 0)} retries)"
        if len(key) >= 8:  # an endpoint may tell the key back; shorter ones are placeholders
            failure, text = failure.replace(key, "[key]"), text.replace(key, "[key]")
        if not failure:
            try:
                return self._reply(json.loads(text), messages)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                failure = f"malformed reply: {text!r}"
        raise EndpointError(f"{self.model} at {self.base_url}: {cut(failure, 400)}")

    async def close(self) -> None:
        """Close the connections of this event loop; `asyncio.run` does so when it ends. Another call opens new ones."""
        if session := self._sessions.pop(asyncio.get_running_loop(), None):
            await session[0].aclose()

    def _key(self) -> str:
        url, key = urlsplit(str(self.base_url)), os.environ.get(self.key_variable, "").strip()
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query:
            raise ValueError("base_url is http(s)://host[:port]/path, without a key")
        if not key and (url.hostname in ("localhost", "::1") or url.hostname.startswith("127.")):
            return "none"
        if not re.fullmatch("[!-~]+", key):
            raise ValueError(f"no key for {self.base_url} in the environment variable {self.key_variable}")
        return key

    async def _session(self, key: str) -> tuple[openai.AsyncOpenAI, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            self._sessions = {other: session for other, session in self._sessions.items() if not other.is_closed()}
            opened = self._open(key)
            self._sessions[loop] = opened, await anext(opened), asyncio.Semaphore(self.max_concurrent)
        return self._sessions[loop][1:]

    async def _open(self, key: str) -> AsyncGenerator[openai.AsyncOpenAI, None]:
        """A generator, because an event loop that ends closes these while connections can still be closed."""
        hooks = {"request": [self._pace]} if self.requests_per_minute else {}
        async with openai.AsyncOpenAI(
            api_key=key,
            base_url=self.base_url,
            max_retries=self.retries,
            timeout=openai.Timeout(self.timeout, connect=min(self.timeout, 10.0), pool=None),
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        ) as client:
            yield client

    async def _pace(self, request: object) -> None:
        now = time.monotonic()
        turn = max(now, self._next_turn)
        self._next_turn = turn + 60 / (self.requests_per_minute or 1)
        await asyncio.sleep(turn - now)

    def _reply(self, body: Any, messages: Sequence[Message]) -> Reply:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        content, calls = message.get("content"), tuple(map(_call, message.get("tool_calls") or ()))
        refusal = message.get("refusal") or _text(content, "refusal")
        thoughts = (message.get(name) for name in ("reasoning_content", "reasoning"))
        reasoning = next((thought for thought in thoughts if thought and isinstance(thought, str)), "")
        text = _text(content, "text")
        read = int(usage.get("prompt_tokens") or estimate(messages))
        written = int(usage.get("completion_tokens") or estimate([Reply(text, calls, reasoning=reasoning).message]))
        # Told as refusals, not raised: they have been paid for all the same.
        if not refusal and (finish == "content_filter" or (finish == "length" and not calls)):
            refusal = f"cut off after {written} tokens ({finish})"
        cost = (self.price[0] * read + self.price[1] * written) / 1e6
        return Reply(text, calls, str(refusal), read, written, cost, reasoning)


def _offered(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a request. Some endpoints refuse calls in a history without tools, so those called are named, and none allowed."""
    if tools:
        return {"tools": list(tools)}
    called = [call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()]
    named = [{"name": name, "parameters": {"type": "object"}} for name in dict.fromkeys(called)]
    schemas = [{"type": "function", "function": function} for function in named]
    return {"tools": schemas, "tool_choice": "none"} if schemas else {}


def _encoded(body: Any) -> bytes:
    """As JSON; half a surrogate pair, which models and tools write now and then, has no form in UTF-8 and becomes "?"."""
    return json.dumps(body, ensure_ascii=False).encode(errors="replace")


def _text(content: Any, kind: str) -> str:
    """Of a message's content, which is a text, a list of parts, or null."""
    if content is None or isinstance(content, str):
        return (content or "") if kind == "text" else ""
    return "".join(part[kind] for part in content if part["type"] == kind)


def _call(call: dict[str, Any]) -> ToolCall:
    arguments = call["function"].get("arguments") or {}
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(str(call.get("id") or ""), call["function"]["name"], arguments)
