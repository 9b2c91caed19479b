"""The orchestrator: an agent that makes sub-agents, sets them to work at the same time, and answers from their results.

Source: Kimi K2.5 report, section 3. Each sub-agent begins with a fresh context and only its result comes back (context
sharding). Whether, when and how to split a task is up to the policy, not to this code.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from k25lite.swarm.agent import MAX_CALLS, Agent, Result, Work
from k25lite.swarm.context import Context, keep_all
from k25lite.swarm.limits import NO_LIMITS, Account, Limits
from k25lite.swarm.policy import Policy
from k25lite.swarm.tools import Tool, as_tools, cut, describe, is_cancelled
from k25lite.swarm.trace import CANCELLED, Trace, TraceError

ROOT = "0"
# As published with the model for wide search: main and sub-agents at most 100 steps each.
OWN_LIMITS = SUB_LIMITS = Limits(steps=100)
PROMPT = """You are the orchestrator of a team. You can work on the task yourself, or split it: create sub-agents with
create_subagent, each with instructions of its own, and give them tasks with assign_task. Tasks that you assign in one turn
are worked on at the same time; a sub-agent knows nothing but its instructions and the task you give it, and you see nothing
of its work but the result. When you have what you need, answer without calling a tool."""


@dataclass(frozen=True)
class Team:
    """What sub-agents are made of, and how many there may be.

    Attributes:
        policy: that of every sub-agent; they do not learn. tools: what they may be given.
        limits: of each attempt at an assignment. The run's last step is kept for the orchestrator, and a critical step for
            each one who waits; several who work elsewhere (`cluster.py`) do not see each other's steps.
        max_parallel: assignments worked on at the same time, at each depth; the others wait.
        max_assignments: over the whole run. max_depth: 1 lets only the orchestrator set others to work.
        retries: how often a failed assignment is begun again.
    """

    policy: Policy
    tools: Mapping[str, Tool]
    limits: Limits = SUB_LIMITS
    context: Context = keep_all
    max_parallel: int = 100
    max_assignments: int = 100_000
    max_depth: int = 1
    retries: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_parallel", 1), ("max_assignments", 1), ("max_depth", 1), ("retries", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"a team's {name} is {least} or more, got {value}")


class Executor(Protocol):
    """Where an assignment is worked on: in this event loop (the default), or elsewhere."""

    async def __call__(self, work: Work, prompt: str, /) -> Result: ...


in_this_loop: Executor = Work.run


class Orchestrator:
    """An agent with a team.

    Example:
        >>> policy = ScriptedPolicy([Reply(calls=(call("create_subagent", name="a", system_prompt="Add."),)), "4"])
        >>> Orchestrator(policy).run_sync("2 + 2 = ?").answer
        '4'

    Args:
        policy: of the orchestrator.
        tools: its own, beside `create_subagent` and `assign_task`.
        sub_policy: of sub-agents, by default the same. sub_tools: by default the same.
        limits: of the orchestrator with all its sub-agents; its steps are counted apart in `own_limits`.
        max_calls: in one of its steps. Its sub-agents have the default.
        team: changes to the fields of `Team`: limits, max_parallel, max_depth, retries, ...
        executor: where sub-agents work.
    """

    def __init__(
        self,
        policy: Policy,
        tools: Iterable[Callable[..., Any] | Tool] = (),
        *,
        sub_policy: Policy | None = None,
        sub_tools: Iterable[Callable[..., Any] | Tool] | None = None,
        system_prompt: str = PROMPT,
        limits: Limits = NO_LIMITS,
        own_limits: Limits = OWN_LIMITS,
        context: Context = keep_all,
        max_calls: int = MAX_CALLS,
        team: Mapping[str, Any] | None = None,
        executor: Executor = in_this_loop,
    ):
        own = as_tools(tools)
        given = own if sub_tools is None else as_tools(sub_tools)
        self.team = Team(policy if sub_policy is None else sub_policy, given, **team or {})
        if taken := SPAWNING.keys() & {*own, *given}:
            raise ValueError(f"the tools {sorted(taken)} are the orchestrator's own")
        self.limits, self.executor = limits, executor
        self.agent = Agent("orchestrator", policy, system_prompt, own, own_limits, context, max_calls)

    async def run(self, task: str, trace: Trace | None = None) -> Result:
        """Work on a task until there is an answer, or a reason why not; nothing is left running.

        Args:
            trace: where events go. One that holds the unfinished run of this task is resumed: what the orchestrator and
                its sub-agents did is recalled, and assignments that ended are not worked on again.

        Raises:
            ValueError: the trace is of another task, or of a run that has ended, or has been used, or is being written.
            TraceError: the trace cannot be written.
        """
        trace = Trace() if trace is None else trace
        trace.begin(task, _given(self.limits))
        try:
            return await self._run(task, trace)
        finally:
            trace.release()

    def run_sync(self, task: str, trace: Trace | None = None) -> Result:
        """`run`, where no event loop is running."""
        return asyncio.run(self.run(task, trace))

    async def _run(self, task: str, trace: Trace) -> Result:
        total, seconds = Account(self.limits), self.limits.seconds
        total.pay(*trace.used)
        account, run = Account(self.agent.limits, total), _Run(self.team, self.executor, trace, total)
        critical = _least(self.limits.critical_steps, self.agent.limits.critical_steps)
        work = Leader(run, 1, self.agent, ROOT, trace, account, critical)
        try:
            async with asyncio.timeout(None if seconds is None else seconds - trace.now()):
                with RARE_COLLECTION:
                    result = await work.run(task)
        except TimeoutError:
            result = work.result(reason=f"limit of {seconds} seconds reached")
        result = replace(result, steps=total.steps, tokens=total.tokens, cost=total.money)
        trace.write("end", **result.fields())
        trace.flush()
        return result


NEW_OBJECTS = 50_000  # after which garbage is looked for while runs go on


class RareCollection:
    """While runs go on, look for garbage less often; the last one to end leaves things as the first one found them.

    A run makes many objects that live long, and next to no garbage in cycles. Python, which looks at what is new after
    every 700 objects and then now and again at all that lives, would take up to a third of its time for that.
    """

    def __init__(self) -> None:
        self.runs, self.lock = 0, threading.Lock()
        self.before = gc.get_threshold()

    def __enter__(self) -> None:
        with self.lock:
            self.runs += 1
            if self.runs == 1:
                self.before = first, *others = gc.get_threshold()
                gc.set_threshold(first and max(first, NEW_OBJECTS), *others)  # 0 is never

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.runs -= 1
            if self.runs == 0:
                gc.set_threshold(*self.before)


RARE_COLLECTION = RareCollection()


class Places:
    """So many at a time, first come first served.

    With asyncio's semaphore each release passes over all who were let in and have not run yet.
    """

    def __init__(self, count: int):
        self.free = count
        self.waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        if self.free:
            self.free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        self.waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():  # it was given the place in the same moment
                self._give_up()
            raise

    async def __aexit__(self, *error: object) -> None:
        self._give_up()

    def _give_up(self) -> None:
        while self.waiting:
            place = self.waiting.popleft()
            if not place.done():
                return place.set_result(None)
        self.free += 1


class _Run:
    """What the assignments of one run share."""

    def __init__(self, team: Team, executor: Executor, trace: Trace, total: Account):
        self.team, self.executor, self.trace, self.total = team, executor, trace, total
        # One for each depth: an agent that waits for its sub-agents must not keep the place they need.
        self.places = [Places(team.max_parallel) for _ in range(team.max_depth)]
        self.assignments = trace.assignments

    def admits(self, path: str) -> bool:
        """Whether this assignment may begin; one that began before a kill may go on."""
        if not self.trace.is_begun(path):
            if self.assignments >= self.team.max_assignments:
                return False
            self.assignments += 1
        return True

    async def result(self, sub: Work, depth: int, parent: str, prompt: str, attempt: int) -> Result:
        """Work on it, or recall how it ended."""
        trace, path = self.trace, sub.path
        if (past := trace.result(path)) is not None:
            return Result(**{name: past[name] for name in Result.__slots__})
        async with self.places[depth - 1]:
            if not trace.is_begun(path):
                trace.write("assign", path=path, parent=parent, agent=sub.agent.name, prompt=prompt, attempt=attempt)
            try:
                result = await self.executor(sub, prompt)
            except TraceError:
                raise
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and is_cancelled():
                    trace.write("result", path=path, attempt=attempt, **sub.result(reason=CANCELLED).fields())
                    raise
                result = sub.result(reason=cut(trace.secrets.redact(f"executor: {describe(error)}"), 500))
            trace.write("result", path=path, attempt=attempt, **result.fields())
        return result


class Leader(Work):
    """Work that may set others to work, at the given depth."""

    __slots__ = ("agents", "depth", "shared")

    def __init__(
        self,
        shared: _Run,
        depth: int,
        agent: Agent,
        path: str,
        trace: Trace,
        account: Account,
        critical_left: int | None,
    ):
        super().__init__(agent, path, trace, account, critical_left, SPAWNING)
        self.shared, self.depth = shared, depth
        self.agents: dict[str, Agent] = {}

    def sub(self, agent: Agent, path: str, used: int) -> Work:
        """The work of an agent on an assignment, for which critical steps have been used already."""
        left = None if self.critical_left is None else self.critical_left - self.critical_steps - used - 1
        left, account = _least(left, agent.limits.critical_steps), Account(agent.limits, self.shared.total, reserve=1)
        if self.depth < self.shared.team.max_depth:
            return Leader(self.shared, self.depth + 1, agent, path, self.trace, account, left)
        return Work(agent, path, self.trace, account, left)


async def create_subagent(
    name: str, system_prompt: str, tools: list[str] | None = None, *, by: Leader, path: str
) -> str:
    """Create a sub-agent with instructions of its own, to be given tasks by its name.

    `tools` names those it may use; by default all that sub-agents can have.
    """
    team = by.shared.team
    if unknown := set(tools or ()) - team.tools.keys():
        return f"error: no tools {sorted(unknown)}; there are: {', '.join(team.tools) or 'none'}"
    if name in by.agents:
        return f"error: there is a sub-agent {name!r} already"
    if len(by.agents) >= team.max_assignments:
        return f"error: no more than {team.max_assignments} sub-agents"
    allowed = team.tools if tools is None else {tool: team.tools[tool] for tool in tools}
    by.agents[name] = Agent(name, team.policy, system_prompt, allowed, team.limits, team.context)
    by.spawned[path] = 0
    if not by.trace.is_begun(path):
        by.trace.write("subagent", path=path, name=name, system_prompt=system_prompt, tools=list(allowed))
    return f"created {name}"


async def assign_task(agent: str, prompt: str, *, by: Leader, path: str) -> str:
    """Give a sub-agent a task and wait for its result. Assign several in one turn to have them done at once."""
    shared = by.shared
    if agent not in by.agents:
        return f"error: no sub-agent {agent!r}; there are: {', '.join(by.agents) or 'none'}"
    if not shared.admits(path):
        return f"error: no more than {shared.team.max_assignments} assignments"
    by.spawned[path] = 0
    for attempt in range(1, shared.team.retries + 2):
        sub = by.sub(by.agents[agent], path if attempt == 1 else f"{path}#{attempt}", by.spawned[path])
        if attempt > 1 and sub.critical_left is not None and sub.critical_left <= 0:
            break
        try:
            result = await shared.result(sub, by.depth, by.path, prompt, attempt)
            sub.critical_steps = result.critical_steps  # where it was not worked on here
        finally:
            by.spawned[path] += sub.critical_steps
        if result.done:
            return result.answer
    return f"failed: {result.reason}"


SPAWNING = as_tools(Tool(function, spawns=True) for function in (create_subagent, assign_task))


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _given(limits: Limits) -> dict[str, Any]:
    return {name: value for name, value in asdict(limits).items() if value is not None}
