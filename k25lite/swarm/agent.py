"""One agent at work: its own fresh context, a policy that decides each step, tools, limits; only its result comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from k25lite.swarm.context import Context, keep_all
from k25lite.swarm.limits import NO_LIMITS, Account, Exceeded, Limits
from k25lite.swarm.policy import Message, Policy, Reply, ToolCall
from k25lite.swarm.tools import Tool, cut
from k25lite.swarm.trace import Trace, TraceError, redact

MAX_CALLS = 256  # of tools in one step: a reply that asks for more is malformed


@dataclass(frozen=True, slots=True)
class Agent:
    """What an agent is, before it has a task. It holds no state: one agent may work on many tasks at the same time."""

    name: str
    policy: Policy
    system_prompt: str = ""
    tools: Mapping[str, Tool] = field(default_factory=dict)
    limits: Limits = NO_LIMITS
    context: Context = keep_all


@dataclass(frozen=True, slots=True)
class Result:
    """How a task ended.

    Attributes:
        status: "done" or "failed". reason: why it failed.
        steps, tokens, cost: of this agent, in the result of a run of all together. critical_steps: see `critical.py`.
    """

    status: str
    answer: str = ""
    reason: str = ""
    steps: int = 0
    critical_steps: int = 0
    tokens: int = 0
    cost: float = 0.0

    @property
    def done(self) -> bool:
        return self.status == "done"

    def fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Malformed(Exception):
    """The model said something that is neither an answer nor a call."""


class Work:
    """One agent working on one task.

    Args:
        path: of this assignment in the trace. account: pays for its steps.
        critical_left: how many critical steps it may take.
        spawning: makes the tools by which this work sets others to work; `sub_steps` are theirs to fill.
    """

    __slots__ = (
        "account", "agent", "critical_left", "critical_steps", "path", "schemas", "step", "sub_steps", "tools", "trace"
    )  # fmt: skip

    def __init__(
        self,
        agent: Agent,
        path: str,
        trace: Trace,
        account: Account,
        critical_left: int | None = None,
        spawning: Callable[[Work], Mapping[str, Tool]] | None = None,
    ):
        self.agent, self.path, self.trace, self.account = agent, path, trace, account
        self.critical_left = critical_left
        self.critical_steps = self.step = 0
        self.sub_steps: list[int] = []  # critical steps of each sub-agent of the stage under way
        self.tools = {**agent.tools, **spawning(self)} if spawning else agent.tools
        self.schemas = [tool.schema for tool in self.tools.values()]

    async def run(self, prompt: str) -> Result:
        """Steps until an answer, or until there is a reason to fail.

        Raises:
            TraceError: the trace cannot be written. CancelledError: from outside.
        """
        seconds = self.agent.limits.seconds
        answer = reason = ""
        try:
            if seconds is None:
                answer = await self._steps(prompt)
            else:
                async with asyncio.timeout(seconds):
                    answer = await self._steps(prompt)
        except TraceError:
            raise
        except Exceeded as limit:
            reason = f"limit of {limit} reached"
        except Malformed as error:
            reason = redact(str(error))
        except TimeoutError as error:
            reason = f"policy: timed out: {error}" if str(error) else f"limit of {seconds} seconds reached"
        except Exception as error:
            reason = cut(redact(f"policy: {type(error).__name__}: {error}"), 500)
        return self.result(answer, reason)

    def result(self, answer: str = "", reason: str = "") -> Result:
        """With what has been used so far; failed if there is a reason."""
        account, status = self.account, "failed" if reason else "done"
        return Result(status, answer, reason, account.steps, self.critical_steps, account.tokens, account.money)

    async def _steps(self, prompt: str) -> str:
        agent = self.agent
        messages: list[Message] = [{"role": "user", "content": prompt}]
        if agent.system_prompt:
            messages.insert(0, {"role": "system", "content": agent.system_prompt})
        while True:
            if agent.context is not keep_all:
                messages = await self._shorten(messages)
            reply = await self.ask(messages)
            if reply.refusal:
                raise Malformed(cut(f"refused: {reply.refusal}", 500))
            if not reply.calls:
                if not reply.content.strip():
                    raise Malformed("malformed: neither an answer nor a call")
                return reply.content
            if len(reply.calls) > MAX_CALLS:
                raise Malformed(f"malformed: {len(reply.calls):,} calls in one step")
            messages.append(reply.message)
            contents = await self._observe(reply.calls)
            messages += [
                {"role": "tool", "tool_call_id": call.id, "content": content}
                for call, content in zip(reply.calls, contents, strict=True)
            ]

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """The policy's next step: counted, paid, and written to the trace, or recalled from it.

        Raises:
            Exceeded: there is no step left. Whatever the policy raises.
        """
        if self.critical_left is not None and self.critical_steps >= self.critical_left:
            raise Exceeded("critical steps")
        self.account.begin_step()
        self.critical_steps += 1
        self.step += 1
        reply = self.trace.reply(self.path, self.step)
        if reply is None:
            began = self.trace.now()
            is_last = self.account.is_last_step or self.critical_steps == self.critical_left
            reply = _with_ids(await self.agent.policy(messages, [] if is_last else self.schemas), self.step)
            self.trace.write(
                "step",
                path=self.path,
                step=self.step,
                began=began,
                content=reply.content,
                calls=[(call.id, call.name, call.arguments) for call in reply.calls],
                refusal=reply.refusal,
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
                cost=reply.cost,
            )
        self.account.pay(reply.tokens, reply.cost)
        return reply

    async def _shorten(self, messages: list[Message]) -> list[Message]:
        shorter = await self.agent.context(messages, self.ask)
        if shorter is not messages:
            self.trace.write("context", path=self.path, step=self.step + 1, kept=len(shorter), of=len(messages))
        return shorter

    async def _observe(self, calls: Sequence[ToolCall]) -> list[str]:
        """The observations of all calls of a step, made at the same time."""
        self.sub_steps.clear()
        if len(calls) == 1:
            contents = [await self._call(0, calls[0])]
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._call(index, call)) for index, call in enumerate(calls)]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            contents = [task.result() for task in tasks]
        if self.sub_steps:
            self.critical_steps += max(self.sub_steps)
        return contents

    async def _call(self, index: int, call: ToolCall) -> str:
        recalled = self.trace.observation(self.path, self.step, index)
        tool = self.tools.get(call.name)
        if recalled is not None and not (tool and tool.spawns):
            return recalled
        began = self.trace.now()
        if tool is None:
            content = f"error: no tool {call.name[:80]!r}; there are: {', '.join(self.tools) or 'none'}"
        elif tool.spawns:
            content = await tool(call.arguments, f"{self.path}.{self.step}.{index}")
        else:
            content = await tool(call.arguments)
        # What an assignment came to stands in its result already.
        if recalled is None and not (tool and tool.spawns and not content.startswith("error:")):
            self.trace.write(
                "observation",
                path=self.path,
                step=self.step,
                index=index,
                tool=call.name,
                began=began,
                content=content,
            )
        return content


def _with_ids(reply: Reply, step: int) -> Reply:
    """The reply, its calls told apart by ids of our own where the policy gave none or gave one twice."""
    if not reply.calls:
        return reply
    if len({call.id for call in reply.calls} - {""}) == len(reply.calls):
        return reply
    calls = (ToolCall(f"call_{step}_{index}", call.name, call.arguments) for index, call in enumerate(reply.calls))
    return replace(reply, calls=tuple(calls))
