"""What an agent does when its context grows: nothing, discard all, or summarise.

A swarm shards its context: sub-agents read, and only results come back. The single agents that it is held against have to
cut what they have read. Source: Kimi K2.5 report, section 3; discard-all is how its single agents browse.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from k25lite.swarm.policy import Message, Reply

Ask = Callable[[Sequence[Message]], Awaitable[Reply]]
# Gets the messages and a way to ask the policy (a step like any other, without tools); returns the same list, or a shorter
# one. It decides by the messages alone, so that a resumed run goes the same way. It is not asked before the last step of
# the agent or of the run; that tokens or money will end is known to nobody before.
Context = Callable[[list[Message], Ask], Awaitable[list[Message]]]
CHARACTERS_PER_TOKEN = 4  # where no tokenizer is at hand


async def keep_all(messages: list[Message], ask: Ask) -> list[Message]:
    return messages


@dataclass(frozen=True)
class DiscardAll:
    """Once the context is longer than `tokens`, begin again from the task, with nothing of what was read and said.

    Args:
        count: tokens of some messages; by default a fourth of their characters.
    """

    tokens: int
    count: Callable[[Sequence[Message]], int] | None = None

    async def __call__(self, messages: list[Message], ask: Ask) -> list[Message]:
        head = _head(messages)
        too_long = len(messages) > len(head) and (self.count or estimate)(messages) > self.tokens
        return head if too_long else messages


SUMMARISE = (
    "Your context is full. Write down everything you have found out that the task needs, and what is left to do."
)


@dataclass(frozen=True)
class Summarise:
    """Once the context is longer than `tokens`, the policy sums it up, in a step of its own, and goes on from there.

    With nothing to go on from, it begins again from the task, as with `DiscardAll`.
    """

    tokens: int
    count: Callable[[Sequence[Message]], int] | None = None
    prompt: str = SUMMARISE

    async def __call__(self, messages: list[Message], ask: Ask) -> list[Message]:
        head = _head(messages)
        if len(messages) == len(head) or (self.count or estimate)(messages) <= self.tokens:
            return messages
        reply = await ask([*messages, {"role": "user", "content": self.prompt}])
        if not reply.content.strip():  # asked again, it would say nothing again, in every other step
            return head
        return [*head, {"role": "user", "content": f"What you found out so far:\n{reply.content}"}]


def estimate(messages: Sequence[Message]) -> int:
    """About how many tokens these messages are, pictures not counted."""
    words = (_length(message.get(part)) for message in messages for part in ("content", "reasoning_content"))
    calls = (len(json.dumps(message["tool_calls"])) for message in messages if "tool_calls" in message)
    return (sum(words) + sum(calls)) // CHARACTERS_PER_TOKEN


def _length(content: Any) -> int:
    """Characters of a text, of a list of parts, or of nothing."""
    return len(content) if isinstance(content, str) else sum(len(part.get("text") or "") for part in content or ())


def _head(messages: Sequence[Message]) -> list[Message]:
    """The system prompt, if there is one, and the task."""
    return list(messages[: 2 if messages[0]["role"] == "system" else 1])
