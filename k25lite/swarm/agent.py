"""One agent at work: its own fresh context, a policy that decides each step, tools, limits; only its result comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from k25lite.swarm.context import Context, keep_all
from k25lite.swarm.limits import NO_LIMITS, Account, Exceeded, Limits
from k25lite.swarm.policy import Message, Policy, Reply, ToolCall
from k25lite.swarm.tools import Tool, cut, describe, is_cancelled
from k25lite.swarm.trace import Trace, TraceError

MAX_CALLS = 256


@dataclass(frozen=True, slots=True)
class Agent:
    """What an agent is, before it has a task. It holds no state: one agent may work on many tasks at the same time.

    Attributes:
        max_calls: of tools in one step; a reply that asks for more is malformed.
    """

    name: str
    policy: Policy
    system_prompt: str = ""
    tools: Mapping[str, Tool] = field(default_factory=dict)
    limits: Limits = NO_LIMITS
    context: Context = keep_all
    max_calls: int = MAX_CALLS


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
        spawning: tools by which this work sets others to work; they fill `spawned`.
    """

    __slots__ = (
        "account", "agent", "critical_left", "critical_steps", "path", "schemas", "spawned", "step", "tools", "trace"
    )  # fmt: skip

    def __init__(
        self,
        agent: Agent,
        path: str,
        trace: Trace,
        account: Account,
        critical_left: int | None = None,
        spawning: Mapping[str, Tool] | None = None,
    ):
        self.agent, self.path, self.trace, self.account = agent, path, trace, account
        self.critical_left = critical_left
        self.critical_steps = self.step = 0
        # Of the step under way: the call that made a sub-agent or set it to work -> its critical steps.
        self.spawned: dict[str, int] = {}
        self.tools = {**agent.tools, **spawning} if spawning else agent.tools
        self.schemas = [tool.schema for tool in self.tools.values()]

    async def run(self, prompt: str) -> Result:
        """Steps until an answer, or until there is a reason to fail.

        Raises:
            TraceError: the trace cannot be written. CancelledError: from outside.
        """
        seconds = self.agent.limits.seconds
        clock = None if seconds is None else asyncio.timeout(seconds)
        answer = reason = ""
        try:
            if clock is None:
                answer = await self._steps(prompt)
            else:
                async with clock:
                    answer = await self._steps(prompt)
        except TraceError:
            raise
        except Exceeded as limit:
            reason = f"limit of {limit} reached"
        except Malformed as error:
            reason = cut(self.trace.secrets.redact(str(error)), 500)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            if clock and clock.expired():
                reason = f"limit of {seconds} seconds reached"
            else:
                reason = cut(self.trace.secrets.redact(f"policy: {describe(error)}"), 500)
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
            reply = await self.ask(messages, self.schemas)
            if reply.refusal:
                raise Malformed(f"refused: {reply.refusal}")
            if not reply.calls:
                if not reply.content.strip():
                    raise Malformed("malformed: neither an answer nor a call")
                return reply.content
            if len(reply.calls) > agent.max_calls:
                raise Malformed(f"malformed: {len(reply.calls):,} calls in one step")
            messages.append(reply.message)
            contents = await self._observe(reply.calls)
            messages += [
                {"role": "tool", "tool_call_id": call.id, "content": content}
                for call, content in zip(reply.calls, contents, strict=True)
            ]

    async def ask(self, messages: Sequence[Message], schemas: Sequence[dict[str, Any]] = ()) -> Reply:
        """The policy's next step: counted, paid, and written to the trace, or recalled from it.

        Args:
            schemas: of the tools it may call, if this is not the last step.

        Raises:
            Exceeded: there is no step left, or it calls tools in the last one. Whatever the policy raises.
        """
        account, step = self.account, self.step + 1
        reply = self.trace.reply(self.path, step)
        if reply is not None:
            self.step, self.critical_steps = step, self.critical_steps + 1
            account.recall(reply.tokens, reply.cost)
            return reply
        critical_left = inf if self.critical_left is None else self.critical_left - self.critical_steps
        if critical_left <= 0:
            raise Exceeded("critical steps")
        last = "steps" if account.begin_step() else "critical steps" if critical_left == 1 else None
        self.step, self.critical_steps = step, self.critical_steps + 1
        began = self.trace.now()
        try:
            reply = _with_ids(await self.agent.policy(messages, [] if last else schemas), step)
        except BaseException:
            self.step, self.critical_steps = self.step - 1, self.critical_steps - 1
            account.pay(0, 0.0, -1)
            raise
        self.trace.write(
            "step",
            path=self.path,
            step=step,
            began=began,
            content=reply.content,
            calls=[(call.id, call.name, call.arguments) for call in reply.calls],
            refusal=reply.refusal,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            cost=reply.cost,
            **({"reasoning": reply.reasoning} if reply.reasoning else {}),
        )
        account.pay(reply.tokens, reply.cost)
        if last and reply.calls:
            raise Exceeded(last)
        return reply

    async def _shorten(self, messages: list[Message]) -> list[Message]:
        is_last = self.account.steps + 1 == self.agent.limits.steps or self.critical_steps + 1 == self.critical_left
        # Those who pay along have counted a recalled step already.
        is_recalled = self.trace.reply(self.path, self.step + 1) is not None
        if is_last or (not is_recalled and self.account.is_last_step()):
            return messages  # the last step is for an answer, from all that is known
        shorter = await self.agent.context(messages, self.ask)
        if shorter is not messages and not self.trace.is_begun(self.path, self.step + 1):
            self.trace.write("context", path=self.path, step=self.step + 1, kept=len(shorter), of=len(messages))
        return shorter

    async def _observe(self, calls: Sequence[ToolCall]) -> list[str]:
        """The observations of all calls of a step, made at the same time."""
        try:
            if len(calls) == 1:
                return [await self._call(0, calls[0])]
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._call(index, call)) for index, call in enumerate(calls)]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            return [task.result() for task in tasks]
        finally:
            if self.spawned:
                self.critical_steps += max(self.spawned.values())
                self.spawned.clear()
                self.trace.flush()

    async def _call(self, index: int, call: ToolCall) -> str:
        recalled = self.trace.observation(self.path, self.step, index)
        if recalled is not None:
            return recalled
        began = self.trace.now()
        tool = self.tools.get(call.name)
        if tool is None:
            content = f"error: no tool {call.name[:80]!r}; there are: {', '.join(self.tools) or 'none'}"
        elif tool.spawns:
            path = f"{self.path}.{self.step}.{index}"
            content = await tool(call.arguments, by=self, path=path)
            if path in self.spawned:
                return content  # its own events tell it
        else:
            content = await tool(call.arguments)
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
    """The reply, its calls told apart by ids of our own where the policy gave none or gave one twice.

    Raises:
        Malformed: it is no reply.
    """
    if not isinstance(reply, Reply):
        raise Malformed(f"malformed: the policy returned {type(reply).__name__}, not a reply")
    ids = {call.id for call in reply.calls}
    if len(ids) == len(reply.calls) and "" not in ids:
        return reply
    calls = (ToolCall(f"call_{step}_{index}", call.name, call.arguments) for index, call in enumerate(reply.calls))
    return replace(reply, calls=tuple(calls))
