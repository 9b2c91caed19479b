"""What decides an agent's next step: the protocol of policies, and the scripted one for teaching and tests.

Messages and tool schemas are those of the OpenAI chat format, because every endpoint and chat template reads them.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]
LARGEST = 1e15  # number of tokens or dollars that is taken for one


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as the model wrote it: `arguments` is JSON, or what was meant to be.

    Raises:
        ValueError: something else than text.
    """

    id: str
    name: str
    arguments: str = "{}"

    def __post_init__(self) -> None:
        if not (isinstance(self.id, str) and isinstance(self.name, str) and isinstance(self.arguments, str)):
            raise ValueError(f"a call is made of texts, got {self.id!r}, {self.name!r}, {self.arguments!r}")

    @property
    def as_json(self) -> str:
        """The arguments, or an object that holds what was meant to be them: endpoints parse what stands in a history."""
        try:
            json.loads(self.arguments)
        except (ValueError, RecursionError):
            return json.dumps({"malformed": self.arguments})
        return self.arguments


@dataclass(frozen=True, slots=True)
class Reply:
    """One step of an agent: words, calls of tools, or both. Without calls the words are its answer.

    Attributes:
        refusal: why the model would not answer.
        cost: of this step, in US dollars.
        reasoning: what it thought before; endpoints that tell it want it back, with the calls that it led to.

    Raises:
        ValueError: words that are no text, or tokens or cost that no account could be kept of.
    """

    content: str = ""
    calls: tuple[ToolCall, ...] = ()
    refusal: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    reasoning: str = ""

    def __post_init__(self) -> None:
        if not all(isinstance(words, str) for words in (self.content, self.refusal, self.reasoning)):
            raise ValueError(f"a reply's words are text, got {self.content!r}, {self.refusal!r}, {self.reasoning!r}")
        read, written, cost = self.prompt_tokens, self.completion_tokens, self.cost
        whole = isinstance(read, int) and isinstance(written, int)
        if not (whole and 0 <= read < LARGEST and 0 <= written < LARGEST and 0 <= cost < LARGEST):
            raise ValueError("a reply costs 0 or more, and tokens are whole numbers")

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def message(self) -> Message:
        """As it stands in the conversation."""
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.as_json}}
                for call in self.calls
            ]
        return message


class Policy(Protocol):
    """Anything that continues a conversation. One policy serves many agents at the same time, so it keeps no state of any.

    Args:
        messages: the agent's whole context, which the policy must not change.
        tools: schemas of the tools that the agent may call now; none is left in its last step.

    Raises:
        Anything: the agent's task then fails with this reason, and nobody else's does.
    """

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Reply: ...


class ScriptedPolicy:
    """A policy that is a function of the messages, or a list of replies that one agent gives one after another.

    Example:
        >>> policy = ScriptedPolicy(lambda messages: f"You said: {messages[-1]['content']}")

    Args:
        script: gets the messages and returns a `Reply` or the words of one; may be async. Or the replies of step 0, 1, ...,
            counted by the answers that a context already holds.
        seconds: how long each step takes.
    """

    def __init__(
        self,
        script: Callable[[Sequence[Message]], Reply | str | Awaitable[Reply | str]] | Iterable[Reply | str],
        seconds: float = 0.0,
    ):
        self.replies = None if callable(script) else list(script)
        self.script = script if callable(script) else self._next
        self.seconds = seconds

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Reply:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        reply = self.script(messages)
        if inspect.isawaitable(reply):
            reply = await reply
        return reply if isinstance(reply, Reply) else Reply(reply)

    def _next(self, messages: Sequence[Message]) -> Reply | str:
        assert self.replies is not None
        step = sum(message["role"] == "assistant" for message in messages)
        if step >= len(self.replies):
            raise IndexError(f"the script has {len(self.replies)} replies, and step {step} is asked for")
        return self.replies[step]


def call(name: str, /, **arguments: Any) -> ToolCall:
    """A call of a tool, for scripts; ids are given by the agent where they are empty."""
    return ToolCall("", name, json.dumps(arguments))
