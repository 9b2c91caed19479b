"""Wide search without its documents: what steps cost and what comes back, by the measured record of the frozen sub-agent.

It keeps the books of the runtime (`orchestrator.py`): the same acts cost as many critical steps, fail for the same reasons,
and leave as many names. What a sub-agent makes of its names is drawn from its `Calibration`.

Simplified: all names found belong into the table, and all that belong are found; later pages bring as many as earlier
ones; with more names in one context than were measured, it rots no further, which favours whoever reads alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from k25lite.swarm.parl_language import ANSWER, ASSIGN, CREATE, END, READ, SEARCH, Acts, Observation

# Of 487 pages of ten hits, how many brought 0, 1, 2 ... new names, by `parl_live_stage.names_by_page`: all but the last
# pages of tasks of 10 to 95 rows in the libraries with seeds 600,000 to 600,005. With equally many on every page, an
# orchestrator learns to count.
PAGES = np.array([14, 21, 15, 29, 27, 11, 28, 26, 47, 90, 147, 11, 6, 1, 5, 5, 0, 4], float)


class Record(Protocol):
    """What is known of the sub-agent's work: a `k25lite.swarm.calibration.Calibration`."""

    def draw(self, names: int, random: np.random.Generator) -> tuple[bool, int, float]:
        """Whether an assignment of so many names was finished, in how many steps, the share of its cells that is right."""
        ...


@dataclass(frozen=True)
class WideSearch:
    """A task: so many names, and the dice that decide where they are found, and what is made of them."""

    names: int
    seed: int = 0

    @cached_property
    def _found(self) -> np.ndarray:
        """On the first page, on the first two, and so on."""
        random = np.random.default_rng([self.seed, 1])
        found = random.choice(len(PAGES), self.names, p=PAGES / PAGES.sum()).cumsum()
        found[-1] = self.names
        return found[: int((found < self.names).sum()) + 1].clip(max=self.names)

    @property
    def pages(self) -> int:
        return len(self._found)

    def found(self, pages: int) -> int:
        """Names found on the first pages."""
        return int(self._found[pages - 1]) if pages else 0


@dataclass
class Outcome:
    """How an episode went.

    Attributes:
        item_f1: of the table; 0 without an answer within the budget.
        created: sub-agents. completed: assignments that came back with rows.
        stages: how many assignments each step set to work at the same time; steps without any are left out.
        own: names that the orchestrator read itself. critical_steps, total_steps: of all agents together.
    """

    item_f1: float = 0.0
    answered: bool = False
    created: int = 0
    completed: int = 0
    stages: list[int] = field(default_factory=list)
    own: int = 0
    critical_steps: int = 0
    total_steps: int = 0

    @property
    def assigned(self) -> int:
        return sum(self.stages)

    @property
    def parallelism(self) -> float:
        """`critical.Summary.mean_parallelism`: assignments per stage that assigned, 0 if none did."""
        return self.assigned / len(self.stages) if self.stages else 0.0

    @property
    def finish_rate(self) -> float:
        """Completed of assigned, 0 if nothing was assigned."""
        return self.completed / self.assigned if self.stages else 0.0


class Environment(Protocol):
    """Where episodes take place: simulated, or with real sub-agents."""

    def begin(self, tasks: Sequence[WideSearch]) -> list[Observation]:
        """New episodes in the place of the old ones, and the first observation of each."""
        ...

    def step(self, acts: Mapping[int, Acts]) -> dict[int, Observation | None]:
        """A step in some of the episodes, by their index; None if it was the last one."""
        ...

    def outcomes(self) -> list[Outcome]:
        """Of all episodes."""
        ...


@dataclass(frozen=True)
class Budget:
    """Steps that an episode may take: those that count are critical steps, or the steps of all agents together."""

    steps: int = 100
    of: Literal["critical", "total"] = "critical"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.of not in ("critical", "total"):
            raise ValueError(f"a budget is 1 or more critical or total steps, got {self}")


# With the model, for wide search, 100 steps of the main agent and 100 of each sub-agent are published. These are fewer: 100
# critical steps in all, out of which the main agent pays for the slowest of its sub-agents.
PUBLISHED = Budget()


class Simulator:
    """Episodes with simulated sub-agents.

    Args:
        team: of sub-agents. alone: of an agent without a limit of its own that reads about all names itself.
    """

    def __init__(self, team: Record, alone: Record, budget: Budget = PUBLISHED):
        self.team, self.alone, self.budget = team, alone, budget
        self.episodes: list[Episode] = []

    def begin(self, tasks: Sequence[WideSearch]) -> list[Observation]:
        self.episodes = [Episode(task, self.team, self.alone, self.budget) for task in tasks]
        return [episode.observation() for episode in self.episodes]

    def step(self, acts: Mapping[int, Acts]) -> dict[int, Observation | None]:
        return {index: self.episodes[index].step(of) for index, of in acts.items()}

    def outcomes(self) -> list[Outcome]:
        return [episode.outcome for episode in self.episodes]


class Episode:
    """One task at work.

    Raises:
        ValueError: a task without names.
    """

    def __init__(self, task: WideSearch, team: Record, alone: Record, budget: Budget):
        if task.names < 1:
            raise ValueError(f"a task has 1 name or more, got {task.names}")
        self.task, self.team, self.alone, self.budget = task, team, alone, budget
        self.random = np.random.default_rng(task.seed)
        self.outcome = Outcome()
        self.pages = self.left = 0
        self.unfinished = 0  # of the names read alone, those whose lookups the budget cut off
        self.returned: list[tuple[int, float]] = []  # by each sub-agent that finished: names, and the share right
        drawn = [alone.draw(task.names, self.random) for _ in range(4)]
        # Who failed may have stopped anywhere, and tells how long it takes only if nobody finished.
        steps = next((steps for finished, steps, _ in drawn if finished), drawn[0][1])
        self.steps_of_a_name = max(1.0, (steps - 1) / task.names)  # of whoever works alone, the answer left out

    @property
    def steps_left(self) -> int:
        outcome = self.outcome
        return self.budget.steps - (outcome.critical_steps if self.budget.of == "critical" else outcome.total_steps)

    def observation(self, done: int = 0, failed: int = 0) -> Observation:
        more = self.pages < self.task.pages
        return Observation(more, self.left, self.outcome.created, self.steps_left, done, failed)

    def step(self, acts: Acts) -> Observation | None:
        """What comes of it; None if the episode has ended: by an answer, a step without acts, or the end of the budget."""
        self._spend(1)
        if acts[0] == ANSWER:
            self._answer()
            return None
        # A reply that neither answers nor calls ends a run, and so do calls in its last step.
        if self.steps_left < 1 or not set(acts) - {ANSWER, END}:
            return None
        calls, names = 0, list[int]()
        for act in acts:
            self.outcome.created += act == CREATE
            if act in ASSIGN:
                calls += 1
                if len(names) < self.outcome.created:  # the first sub-agent that has no assignment in this step
                    names.append(min(ASSIGN[act], self.left))
                    self.left -= names[-1]
        done = self._work(names) if names else 0
        if acts[-1] == SEARCH and self.pages < self.task.pages:
            self.pages += 1
            self.left += self.task.found(self.pages) - self.task.found(self.pages - 1)
        if acts[-1] == READ and self.left:
            self._read()
        return self.observation(done, calls - done)

    def _spend(self, critical: int, total: int | None = None) -> None:
        self.outcome.critical_steps += critical
        self.outcome.total_steps += critical if total is None else total

    def _work(self, assignments: Sequence[int]) -> int:
        """Sub-agents at work at the same time on so many names each; how many finish. The others' names are left again."""
        steps, done = [], 0
        room = self.steps_left - 1  # the last step is kept for the orchestrator
        for names in assignments:
            # Without names there is nothing to finish.
            finished, needed, share = self.team.draw(names, self.random) if names else (False, 1, 0.0)
            steps.append(min(needed, room))
            if self.budget.of == "total":
                room -= steps[-1]
            if finished and needed == steps[-1]:
                done += 1
                self.returned.append((names, share))
            else:
                self.left += names
        self.outcome.stages.append(len(assignments))
        self.outcome.completed += done
        self._spend(max(steps), sum(steps))
        return done

    def _read(self) -> None:
        """The next name, in the own context. Its step is spent; lookups take more, but the last step is for the policy."""
        self.left -= 1
        self.outcome.own += 1
        lookups = int(self.steps_of_a_name * self.outcome.own) - int(self.steps_of_a_name * (self.outcome.own - 1)) - 1
        self.unfinished = int(lookups > self.steps_left - 1)
        self._spend(min(lookups, self.steps_left - 1))

    def _answer(self) -> None:
        """The table: rows that came back, and those written from the own context. Names without row are missing cells."""
        outcome, returned = self.outcome, list(self.returned)
        if own := outcome.own - self.unfinished:
            finished, _, share = self.alone.draw(own, self.random)
            if finished:
                returned.append((own, share))
        outcome.answered = True
        right = sum(names * share for names, share in returned)
        outcome.item_f1 = 2 * right / (sum(names for names, _ in returned) + self.task.names)
