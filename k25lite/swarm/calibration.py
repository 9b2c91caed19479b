"""What the frozen sub-agent does with assignments of so many names: measured once, so that a simulator draws from it.

Source: Kimi K2.5 report, section 3: the orchestrator is first trained with small, fast sub-agents. Here these are draws
from what the real one was seen to do.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from k25lite.results import write_whole
from k25lite.swarm.agent import Agent, Work
from k25lite.swarm.learned import LearnedPolicy
from k25lite.swarm.limits import NO_LIMITS, Account, Limits
from k25lite.swarm.orchestrator import Orchestrator
from k25lite.swarm.parl_language import serial
from k25lite.swarm.policy import Policy
from k25lite.swarm.search import SearchEngine, tools
from k25lite.swarm.simulator import Budget
from k25lite.swarm.subagent import rows_of, search_engine, work_prompt
from k25lite.swarm.tables import parse_table
from k25lite.swarm.tools import as_tools, run_apart
from k25lite.swarm.trace import Trace
from k25lite.world.library import ATTRIBUTES, Library, Person
from k25lite.world.wide_tasks import make_task

SIZES = (1, 2, 4, 8, 16, 32)
COLUMNS = (2, 4)  # to fill in, at least and at most: what is wanted of everybody, and what is to be listed
Trial = Callable[[int, int], Coroutine[Any, Any, tuple[bool, int, float]]]


@dataclass(frozen=True)
class Calibration:
    """What the frozen sub-agent does with assignments of so many names, measured on libraries it was not trained on.

    Attributes:
        sizes: names per assignment, ascending.
        trials: per size [trials, 3]: finished (0 or 1), steps, share of cells right (of an unfinished one 0).
        limit: steps that an assignment may take, or None.

    Raises:
        ValueError: sizes that do not ascend from 1 or more, or trials that are not of this form.
    """

    sizes: tuple[int, ...]
    trials: tuple[np.ndarray, ...]
    limit: int | None = None

    def __post_init__(self) -> None:
        ascend = bool(self.sizes) and all(a < b for a, b in zip((0, *self.sizes), self.sizes, strict=False))
        if not ascend or len(self.sizes) != len(self.trials) or not all(map(_is_form, self.trials)):
            raise ValueError(
                f"sizes ascend from 1, each with trials [n, 3] of finished, steps, share; got {self.sizes}"
            )

    def draw(self, names: int, random: np.random.Generator) -> tuple[bool, int, float]:
        """What happens to an assignment of so many names: finished, steps, share of cells right.

        It is a trial of one of the two sizes measured next to it, the nearer one likelier, and outside of them of the
        last one; its steps grow with the names, up to the limit, at which it fails. One that failed, failed as it is.

        Raises:
            ValueError: no names.
        """
        if names < 1:
            raise ValueError(f"an assignment has a name or more, got {names}")
        place = np.interp(names, self.sizes, range(len(self.sizes)))
        index = int(place) + int(random.random() < place % 1)
        finished, steps, share = random.choice(self.trials[index])
        if not finished:
            return False, int(steps), 0.0
        scaled = max(1, round(steps * names / self.sizes[index]))
        if self.limit is not None and scaled > self.limit:
            return False, self.limit, 0.0
        return True, scaled, float(share)

    def save(self, path: str | PathLike[str], name: str = "team") -> None:
        """Write this calibration to a JSON file under a name, beside the others that stand there."""
        path = Path(path)
        others = json.loads(path.read_text()) if path.exists() else {}
        mine = {"sizes": self.sizes, "trials": [part.tolist() for part in self.trials], "limit": self.limit}
        write_whole(path, json.dumps(others | {name: mine}))

    @classmethod
    def load(cls, path: str | PathLike[str], name: str = "team") -> Calibration:
        """The calibration of this name in a file.

        Raises:
            ValueError: it holds none. OSError: it cannot be read.
        """
        found: Any = json.loads(Path(path).read_text())
        if not isinstance(found, dict) or name not in found:
            raise ValueError(f"{path} holds no calibration called {name!r}")
        mine = found[name]
        return cls(tuple(mine["sizes"]), tuple(map(np.array, mine["trials"])), mine["limit"])


def measure(
    policy: Policy,
    libraries: Sequence[Library],
    sizes: Sequence[int] = SIZES,
    trials: int = 16,
    limits: Limits = NO_LIMITS,
    seed: int = 0,
) -> Calibration:
    """Assignments of people drawn from these libraries in turn, two to four columns each, all at the same time.

    Raises:
        ValueError: no library, or one with fewer people than are asked for at once. Whatever is wrong with a calibration.
    """
    if not libraries or min(len(library.people) for library in libraries) < max(sizes):
        raise ValueError(f"libraries of {max(sizes)} people or more are needed")
    random = Random(f"k25lite calibration {seed}")
    agents = [
        Agent("sub-agent", policy, tools=as_tools(tools(search_engine(library.documents))), limits=limits)
        for library in libraries
    ]

    async def trial(number: int, size: int) -> tuple[bool, int, float]:
        agent, library = agents[number % len(agents)], libraries[number % len(libraries)]
        people = random.sample(library.people, size)
        columns = random.sample(list(ATTRIBUTES), random.randint(*COLUMNS))
        prompt = work_prompt([person.name for person in people], columns)
        result = await Work(agent, "0", Trace(), Account(limits)).run(prompt)
        rows = rows_of(result.answer) if result.done else {}
        return result.done, result.steps, _right(people, columns, rows)

    return _measured(trial, sizes, trials, limits.steps)


def measure_alone(
    policy: Policy,
    libraries: Sequence[Library],
    sizes: Sequence[int] = SIZES,
    trials: int = 16,
    steps: int = 400,
    seed: int = 0,
) -> Calibration:
    """The same of one agent that searches and reads everything itself: runs of the script `serial` in the runtime.

    A trial is a search for people who have a fact in common, in a library of their articles alone, and one to three columns
    more. Steps are those after the search. The runtime tells it whom to read next, which it does not tell sub-agents.

    Raises:
        ValueError: no library, or one in which too few people have anything in common.
    """
    random = Random(f"k25lite calibration alone {seed}")
    shared = [list(_in_common(library, max(sizes))) for library in libraries]
    if not shared or not all(shared):
        raise ValueError(f"libraries in which {max(sizes)} people have a fact in common are needed")

    async def trial(number: int, size: int) -> tuple[bool, int, float]:
        (relation, value), alike = random.choice(shared[number % len(libraries)])
        library, people = libraries[number % len(libraries)], random.sample(alike, size)
        others = [other for other in ATTRIBUTES if other != relation]
        columns = random.sample(others, random.randint(COLUMNS[0] - 1, COLUMNS[1] - 1))
        task = make_task(library, {relation: value}, columns)
        # Snippets of whole articles: what a search may miss is no matter of reading.
        engine = SearchEngine({person.name: library.documents[person.name] for person in people}, snippet_words=64)
        single = Orchestrator(
            LearnedPolicy(serial, policy, 1.0, Budget(steps)), tools(engine), own_limits=Limits(steps=steps)
        )
        result = await single.run(task.query)
        table = parse_table(result.answer) if result.done else None
        rows = {} if table is None else {name: cells for name, *cells in table.itertuples(index=False)}
        pages = -(-size // engine.page_size)
        return bool(rows), max(1, result.steps - pages), _right(people, columns, rows)

    return _measured(trial, sizes, trials, steps)


def _measured(trial: Trial, sizes: Sequence[int], trials: int, limit: int | None) -> Calibration:
    """All trials at the same time."""

    async def all_trials() -> list[tuple[bool, int, float]]:
        return await asyncio.gather(*(trial(number, size) for size in sizes for number in range(trials)))

    measured = np.array(run_apart(all_trials()), float).reshape(len(sizes), trials, 3)
    return Calibration(tuple(sizes), tuple(measured), limit)


def _right(people: Sequence[Person], columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> float:
    """The share of all cells."""
    pairs = (
        (cell, person.facts[column])
        for person in people
        for column, cell in zip(columns, rows.get(person.name, ()), strict=False)
    )
    return sum(cell == fact for cell, fact in pairs) / (len(people) * len(columns))


def _in_common(library: Library, count: int) -> Iterator[tuple[tuple[str, str], list[Person]]]:
    """Facts that the articles of so many people or more tell, with these people."""
    told = defaultdict[tuple[str, str], list[Person]](list)
    for person in library.people:
        for relation, value in person.facts.items():
            if person.sources.get(relation) == person.name:
                told[relation, value].append(person)
    return ((fact, people) for fact, people in told.items() if len(people) >= count)


def _is_form(trials: np.ndarray) -> bool:
    """[n, 3], n above 0: 0 or 1, steps of 1 or more, a share."""
    if trials.ndim != 2 or trials.shape[1] != 3 or not len(trials):
        return False
    finished, steps, share = trials.T
    return bool(np.isin(finished, (0, 1)).all() and (steps >= 1).all() and ((share >= 0) & (share <= 1)).all())
