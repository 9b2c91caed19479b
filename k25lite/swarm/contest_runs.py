"""The five systems of the wide-search contest, and contests as jobs for processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from transformers import LlamaForCausalLM

from k25lite.swarm.contest import Arena, System, Trial, compete, words
from k25lite.swarm.context import DiscardAll, Summarise
from k25lite.swarm.parl_language import serial, swarm
from k25lite.swarm.parl_live_stage import calibrations, library, steps_of_a_name
from k25lite.swarm.subagent import subagent_policy
from k25lite.world.wide_tasks import Task, make_tasks

FIRST_SEED = 500_000  # of the libraries, in which nobody was trained or examined
ROOM = 1200  # tokens: a single agent that cuts its context does so beyond that
NAMES = ("single", "single, discard all", "single, summary", "scripted swarm", "trained swarm")


@dataclass(frozen=True)
class Contest:
    """Tasks of one library, and who works on them.

    Args:
        seed: of the library. subagent, orchestrator: their folders.
        splits: of tasks: (name, how many, (rows at least, at most)).
    """

    seed: int
    subagent: Path
    orchestrator: Path
    splits: tuple[tuple[str, int, tuple[int, int]], ...]

    @property
    def tasks(self) -> list[Task]:
        where = library(FIRST_SEED + self.seed)
        return [task for split, count, rows in self.splits for task in make_tasks(where, split, count, rows)]

    @property
    def systems(self) -> list[System]:
        return [
            System(NAMES[0], serial),
            System(NAMES[1], serial, DiscardAll(ROOM, words)),
            System(NAMES[2], serial, Summarise(ROOM, words)),
            System(NAMES[3], swarm(4)),
            System(NAMES[4], LlamaForCausalLM.from_pretrained(self.orchestrator)),
        ]

    def arena(self, latency_s: float = 0.0) -> Arena:
        each = steps_of_a_name(calibrations(self.subagent)[0])
        return Arena(library(FIRST_SEED + self.seed), subagent_policy(self.subagent), each, latency_s)


@dataclass(frozen=True)
class Timing:
    """The same systems against the clock.

    Args:
        systems: their names, some of `NAMES`. count: of tasks; rows: that they have, at least and at most.
        latency_s: of each call of a tool.
    """

    contest: Contest
    systems: tuple[str, ...]
    count: int
    rows: tuple[int, int]
    latency_s: float

    def __post_init__(self) -> None:
        if unknown := set(self.systems) - {*NAMES}:
            raise ValueError(f"systems are some of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")


def hold(job: Contest | Timing) -> list[Trial]:
    """Every system on every task: all at once, or, to be timed, one after another."""
    if isinstance(job, Contest):
        return compete(job.arena(), job.systems, job.tasks)
    contest = job.contest
    tasks = make_tasks(library(FIRST_SEED + contest.seed), "train", job.count, job.rows, seed=1)
    trials = list[Trial]()
    for system in contest.systems:
        if system.name in job.systems:  # each has a sub-agent of its own, which remembers nothing of those before
            trials += compete(contest.arena(job.latency_s), [system], tasks, together=False)
    return trials


def table(jobs: Sequence[Contest | Timing], trials: Sequence[Sequence[Trial]]) -> pd.DataFrame:
    """`Trial.row` of each trial of each job, with its `seed` and `answer`."""
    seeds = [job.seed if isinstance(job, Contest) else job.contest.seed for job in jobs]
    return pd.DataFrame(
        [
            trial.row() | {"seed": seed, "answer": trial.answer}
            for seed, part in zip(seeds, trials, strict=True)
            for trial in part
        ]
    )
