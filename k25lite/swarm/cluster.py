"""Sub-agents on a Ray cluster: one task for each assignment, no actor, the same agent code in the workers.

An assignment's events come back with its result, so a run that is resumed begins unfinished assignments anew. Each
assignment may use what the run had left when it began, and does not begin if that is nothing; those at work at the same
time do not see each other, and together may use more. Not covered: sub-agents of sub-agents, whose tasks would wait for
tasks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from typing import Any

from k25lite.swarm.agent import Agent, Result, Work
from k25lite.swarm.limits import Account, Exceeded, Limits
from k25lite.swarm.trace import Event, Trace

Told = tuple[Result, list[Event], float]  # with times since the start, and the wall clock at the start


class Lost(Exception):
    """The worker of an assignment died; how, is the argument."""


class RayExecutor:
    """Where an `Orchestrator` has its assignments worked on: `Orchestrator(..., executor=RayExecutor())`.

    A worker that dies fails its assignment, with a reason; `team={"retries": ...}` begins it again.

    Args:
        address: of a running cluster, "auto" for the one of this machine; None starts one here.
        options: of each task, as `num_cpus` or `resources`. An agent that mostly waits for an endpoint needs little CPU.

    Raises:
        ModuleNotFoundError: ray is not installed. ConnectionError: no cluster at the address.
    """

    def __init__(self, address: str | None = None, **options: Any):
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("a Ray cluster needs ray: pip install 'k25lite[ray]'") from error
        self.ray = ray
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        self.task = ray.remote(work_apart).options(**{"num_cpus": 0.1, "max_retries": 0} | options)

    async def __call__(self, work: Work, prompt: str) -> Result:
        return await elsewhere(work, prompt, self._send)

    async def _send(self, *assignment: Any) -> Told:
        task = self.task.remote(*assignment)
        try:
            return await task
        except asyncio.CancelledError:
            self.ray.cancel(task, force=True)
            raise
        except self.ray.exceptions.RayError as error:
            raise Lost(type(error).__name__) from error

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self.ray.shutdown()


async def elsewhere(work: Work, prompt: str, send: Callable[..., Awaitable[Told]]) -> Result:
    """Have an assignment worked on in another process, and tell here what happened there.

    Args:
        send: has the process call `work_apart` with its arguments.

    Raises:
        ValueError: the agent could set others to work. Whatever `send` raises, but for `Lost`.
    """
    if work.tools is not work.agent.tools:
        raise ValueError("in other processes only the orchestrator can set agents to work: max_depth must be 1")
    began, clock = work.trace.now(), time.time()
    try:
        agent = replace(work.agent, limits=_left(work.agent.limits, work.account))
        result, events, started = await send(agent, prompt, work.path, work.critical_left)
    except Exceeded as limit:
        return work.result(reason=f"limit of {limit} reached")
    except Lost as loss:
        return work.result(reason=f"worker: {loss}")
    for event in events:
        for moment in {"t", "began"} & event.keys():
            event[moment] = round(began + max(started - clock, 0.0) + event[moment], 6)
        work.trace.write(event.pop("event"), **event)
    work.account.pay(result.tokens, result.cost, result.steps)
    return result


def work_apart(agent: Agent, prompt: str, path: str, critical_left: int | None) -> Told:
    """An assignment, in a process that knows nothing of the run."""
    trace, started = Trace(), time.time()
    result = asyncio.run(Work(agent, path, trace, Account(agent.limits), critical_left).run(prompt))
    return result, trace.events, started


def _left(limits: Limits, account: Account) -> Limits:
    """What an agent may use, and the run it belongs to has left: an account of another process cannot pay along.

    Raises:
        Exceeded: nothing is left.
    """
    left: dict[str, Any] = {field.name: getattr(limits, field.name) for field in fields(limits)}
    payer, reserve = account.parent, account.reserve
    while payer is not None:
        for name in ("steps", "tokens", "money"):
            limit, most = getattr(payer.limits, name), left[name]
            if limit is not None:
                rest = limit - getattr(payer, name) - (reserve if name == "steps" else 0)
                if rest <= 0:
                    raise Exceeded(name)
                left[name] = rest if most is None else min(rest, most)
        reserve, payer = payer.reserve, payer.parent
    return Limits(**left)
