"""Episodes with real sub-agents, in the place of simulated ones: training goes on with what they make of real tasks.

Every episode is a run of the runtime, whose orchestrator waits for the acts that the trainer samples. Steps that are taken
together run at the same time, so that the sub-agents of all episodes share batches.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Self

from k25lite.swarm.critical import summarise
from k25lite.swarm.learned import LearnedPolicy
from k25lite.swarm.limits import Limits
from k25lite.swarm.orchestrator import Orchestrator
from k25lite.swarm.parl_language import READ, Acts, Dialogue, Observation, serial
from k25lite.swarm.policy import Policy
from k25lite.swarm.simulator import PUBLISHED, Budget, Outcome, WideSearch
from k25lite.swarm.subagent import SUB_LIMITS
from k25lite.swarm.trace import Trace
from k25lite.swarm.widesearch import Evaluation, Score, Task, score
from k25lite.world import wide_tasks

Tools = Sequence[Callable[..., Any]]


class LiveEnvironment:
    """An `Environment` of the real runtime; to be closed, or used in a `with` statement.

    Args:
        tasks: to choose from: an episode gets the one whose number of rows is nearest to what is asked for, any of several.
        worker: the frozen sub-agent, which also works on what the orchestrator reads.
        own_tools, sub_tools: `search` and `read` of the orchestrator and of sub-agents.
        steps_of_a_name: that a sub-agent takes on average. budget: in critical or total steps.

    Raises:
        ValueError: no tasks.
    """

    def __init__(
        self,
        tasks: Sequence[wide_tasks.Task],
        worker: Policy,
        own_tools: Tools,
        sub_tools: Tools,
        steps_of_a_name: float,
        budget: Budget = PUBLISHED,
    ):
        if not tasks:
            raise ValueError("a live environment needs tasks, got none")
        self.tasks, self.worker, self.tools, self.budget = tasks, worker, (own_tools, sub_tools), budget
        self.steps_of_a_name = steps_of_a_name
        self.runs: list[_Run] = []
        # A loop in a thread of its own: in a notebook there is one already in this thread.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def begin(self, tasks: Sequence[WideSearch]) -> list[Observation]:
        async def first() -> list[Observation | None]:
            self._cancel()
            self.runs = [_Run(self, self.choose(task)) for task in tasks]
            return await asyncio.gather(*(run.told.get() for run in self.runs))

        observations = self._wait(first())
        for run, observation in zip(self.runs, observations, strict=True):
            if observation is None:
                raise ValueError(f"task {run.task.instance_id!r} cannot be worked on: {run.reason}")
        return [observation for observation in observations if observation is not None]

    def step(self, acts: Mapping[int, Acts]) -> dict[int, Observation | None]:
        async def next_ones() -> list[Observation | None]:
            for index, of in acts.items():
                self.runs[index].acts.put_nowait(of)
            return await asyncio.gather(*(self.runs[index].told.get() for index in acts))

        return dict(zip(acts, self._wait(next_ones()), strict=True))

    def outcomes(self) -> list[Outcome]:
        return [run.outcome() for run in self.runs]

    def choose(self, task: WideSearch) -> wide_tasks.Task:
        nearest = min(abs(len(each.gold) - task.names) for each in self.tasks)
        fitting = [each for each in self.tasks if abs(len(each.gold) - task.names) == nearest]
        return fitting[task.seed % len(fitting)]

    def close(self) -> None:
        """Whatever is still at work is cancelled."""

        async def cancelled() -> None:
            await asyncio.gather(*self._cancel(), return_exceptions=True)

        if self._thread.is_alive():
            self._wait(cancelled())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _cancel(self) -> list[asyncio.Task[None]]:
        for run in self.runs:
            run.work.cancel()
        return [run.work for run in self.runs]

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Run(LearnedPolicy):
    """One episode, and the policy of its orchestrator: what to do it asks, with an observation, and is told."""

    def __init__(self, environment: LiveEnvironment, task: wide_tasks.Task):
        budget = environment.budget
        super().__init__(serial, environment.worker, environment.steps_of_a_name, budget)
        self.task, self.trace = task, Trace()
        self.told: asyncio.Queue[Observation | None] = asyncio.Queue()
        self.acts: asyncio.Queue[Acts] = asyncio.Queue()
        self.dialogue, self.answer, self.reason = Dialogue(), "", "cancelled"
        own, sub = environment.tools
        steps = {"critical_steps" if budget.of == "critical" else "steps": budget.steps}
        self.orchestrator = Orchestrator(
            self,
            own,
            sub_policy=environment.worker,
            sub_tools=sub,
            limits=Limits(**steps),
            own_limits=Limits(steps=budget.steps),
            team={"limits": SUB_LIMITS},
        )
        self.work = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            result = await self.orchestrator.run(self.task.query, self.trace)
            self.answer, self.reason = result.answer, result.reason
        finally:
            self.told.put_nowait(None)

    async def _acts(self, dialogue: Dialogue) -> Acts:
        self.dialogue = dialogue
        self.told.put_nowait(dialogue.observations[-1])
        return await self.acts.get()

    def outcome(self) -> Outcome:
        summary, pairs = (
            summarise(self.trace.events),
            zip(self.dialogue.observations, self.dialogue.steps, strict=False),
        )
        return Outcome(
            judge(self.task, self.answer).item_f1,
            bool(self.answer),
            sum(event["event"] == "subagent" for event in self.trace.events),
            sum(observation.done for observation in self.dialogue.observations),
            summary.parallelism,
            sum(acts[-1] == READ and observation.left > 0 for observation, acts in pairs),
            summary.critical_steps,
            summary.total_steps,
        )


def judge(task: wide_tasks.Task, answer: str) -> Score:
    """In strict mode, in which no answer beats an honest one."""
    record = task.record()
    rules = Evaluation.model_validate(json.loads(record["evaluation"]))
    return score(Task(record["instance_id"], record["query"], record["language"], rules, task.gold), answer, "strict")
