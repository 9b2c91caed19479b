"""Ways to search widely, on the same tasks and with the same frozen sub-agent: what they find, how fast, and for how much.

Source: Kimi K2.5 report, section 3, Table 6 and Figure 8. The systems differ in who decides what to do next, a script or a
trained orchestrator, and in what happens when a context gets long. Searching, reading and writing rows are the same for
all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from transformers import PreTrainedModel

from k25lite.swarm.context import Context, keep_all
from k25lite.swarm.critical import ROOT, summarise
from k25lite.swarm.learned import LearnedPolicy, Question
from k25lite.swarm.limits import Limits
from k25lite.swarm.orchestrator import Orchestrator
from k25lite.swarm.parl_language import Script
from k25lite.swarm.parl_live import Tools, judge
from k25lite.swarm.policy import Message, Policy
from k25lite.swarm.search import SearchEngine, tools
from k25lite.swarm.simulator import PUBLISHED, Budget
from k25lite.swarm.subagent import SUB_LIMITS, rows_of, search_engine
from k25lite.swarm.tools import run_apart
from k25lite.swarm.trace import Trace
from k25lite.swarm.widesearch import Score
from k25lite.world.library import Library
from k25lite.world.wide_tasks import Task


@dataclass(frozen=True)
class System:
    """One way to work: who decides, and what to do with a context that grows."""

    name: str
    decide: PreTrainedModel | Script
    context: Context = keep_all


@dataclass(frozen=True, eq=False)
class Arena:
    """What all systems have in common.

    Args:
        worker: the frozen sub-agent. steps_of_a_name: that it takes, on average.
        latency_s: seconds that each call of a tool waits, as an engine that is far away would: chosen, not measured.
        temperature: of a trained orchestrator's acts. 1, as in training, which rewards a distribution: the likeliest act
            alone can be the same for ever, such as one more sub-agent.
        budget: of a run, in critical steps.
    """

    library: Library
    worker: Policy
    steps_of_a_name: float
    latency_s: float = 0.0
    temperature: float = 1.0
    budget: Budget = PUBLISHED

    @cached_property
    def tools(self) -> tuple[Tools, Tools]:
        """Of orchestrators, and of sub-agents."""
        documents = self.library.documents
        engines = SearchEngine(documents), search_engine(documents)
        return tools(engines[0], self.latency_s), tools(engines[1], self.latency_s)

    def orchestrator(self, system: System) -> Orchestrator:
        return Orchestrator(
            LearnedPolicy(system.decide, self.worker, self.steps_of_a_name, self.budget, self.temperature),
            self.tools[0],
            sub_policy=self.worker,
            sub_tools=self.tools[1],
            limits=Limits(critical_steps=self.budget.steps),
            own_limits=Limits(steps=self.budget.steps),
            context=system.context,
            team={"limits": SUB_LIMITS},
        )


@dataclass(frozen=True)
class Trial:
    """One run of a system on a task: its answer, the score in strict mode, and its trace."""

    system: str
    task: Task
    answer: str
    score: Score
    trace: Trace

    def row(self) -> dict[str, float | str]:
        """Scores, `seconds`, steps, tokens, and how many assignments ran at once."""
        run = summarise(self.trace.events)
        end = self.trace.events[-1]
        return {
            "system": self.system,
            "task": self.task.instance_id,
            "split": self.task.split,
            "rows": len(self.task.gold),
            "item_f1": self.score.item_f1,
            "row_f1": self.score.row_f1,
            "success": self.score.success,
            "answered": float(end["status"] == "done"),
            "seconds": run.wall,
            "critical_steps": run.critical_steps,
            "total_steps": run.total_steps,
            "parallelism": run.mean_parallelism,
            "tokens_read": sum(event.get("prompt_tokens", 0) for event in self.trace.events),
            "tokens_written": sum(event.get("completion_tokens", 0) for event in self.trace.events),
        }

    def curve(self) -> pd.DataFrame:
        """`seconds` and `item_f1` of the table that could be written from the rows that had come in by then."""
        question, rows, points = Question.read(self.task.query), dict[str, list[str]](), [(0.0, 0.0)]
        for event in self.trace.events:
            told = ""
            if event["event"] == "result" and event["status"] == "done":
                told = event["answer"]
            elif event["event"] == "step" and event["path"] == ROOT and event["calls"]:
                told = event["content"]
            if found := rows_of(told):
                rows |= found
                points.append((event["t"], judge(self.task, question.table(rows)).item_f1))
        return pd.DataFrame(points, columns=["seconds", "item_f1"])

    def seconds_to(self, item_f1: float) -> float | None:
        """When the rows that had come in were worth so much; None if never."""
        reached = self.curve().query("item_f1 >= @item_f1")
        return None if reached.empty else float(reached.seconds.iloc[0])


def compete(arena: Arena, systems: Iterable[System], tasks: Sequence[Task], together: bool = True) -> list[Trial]:
    """Every system on every task.

    Args:
        together: all at the same time, so that they share batches of the model. Their times then mean nothing; to measure
            time, one run after another.
    """
    pairs = [(system, task) for system in systems for task in tasks]

    async def run(system: System, task: Task) -> Trial:
        trace = Trace()
        result = await arena.orchestrator(system).run(task.query, trace)
        return Trial(system.name, task, result.answer, judge(task, result.answer), trace)

    async def run_all() -> list[Trial]:
        if together:
            return list(await asyncio.gather(*(run(*pair) for pair in pairs)))
        return [await run(*pair) for pair in pairs]

    return run_apart(run_all())


def words(messages: Sequence[Message]) -> int:
    """Tokens of a conversation in the vocabulary of the world, about: what a context is cut by."""
    return sum(len(message["content"].split()) for message in messages)
