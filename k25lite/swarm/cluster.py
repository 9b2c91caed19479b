"""Sub-agents on a Ray cluster: one task for each assignment, no actor, the same agent code in the workers.

An assignment's events come back with its result, so a run that is resumed begins unfinished assignments anew. Each
assignment may use what the run had left when it began; those at work at the same time do not see each other, and together
may use more. Not covered: sub-agents of sub-agents, whose tasks would wait for tasks.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import fields, replace
from typing import Any

from k25lite.swarm.agent import Agent, Result, Work
from k25lite.swarm.limits import Account, Limits
from k25lite.swarm.trace import Event, Trace


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
        self.task = ray.remote(_work).options(**{"num_cpus": 0.1, "max_retries": 0} | options)

    async def __call__(self, work: Work, prompt: str) -> Result:
        if work.tools is not work.agent.tools:
            raise ValueError("on Ray only the orchestrator can set agents to work: max_depth must be 1")
        agent = replace(work.agent, limits=_left(work.agent.limits, work.account))
        began, clock = work.trace.now(), time.time()
        task = self.task.remote(agent, prompt, work.path, work.critical_left)
        try:
            result, events, started = await task
        except asyncio.CancelledError:
            self.ray.cancel(task, force=True)
            raise
        except self.ray.exceptions.RayError as error:
            return work.result(reason=f"worker: {type(error).__name__}")
        for event in events:
            for moment in {"t", "began"} & event.keys():
                event[moment] = round(began + max(started - clock, 0.0) + event[moment], 6)
            work.trace.write(event.pop("event"), **event)
        work.account.pay(result.tokens, result.cost, result.steps)
        return result

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self.ray.shutdown()


def _work(agent: Agent, prompt: str, path: str, critical_left: int | None) -> tuple[Result, list[Event], float]:
    """In a worker: the result, the events with times since the start, and the wall clock at the start."""
    trace, started = Trace(), time.time()
    result = asyncio.run(Work(agent, path, trace, Account(agent.limits), critical_left).run(prompt))
    return result, trace.events, started


def _left(limits: Limits, account: Account) -> Limits:
    """What an agent may use, and the run it belongs to has left: an account of another process cannot pay along."""
    used = {"steps": 0, "tokens": 0, "money": 0.0}
    left: dict[str, Any] = {field.name: getattr(limits, field.name) for field in fields(limits)}
    payer = account.parent
    while payer is not None:
        for name in used:
            limit, most = getattr(payer.limits, name), left[name]
            if limit is not None:
                rest = max(limit - getattr(payer, name), 1)
                left[name] = rest if most is None else min(rest, most)
        payer = payer.parent
    return Limits(**left)
