"""The five systems of the wide-search contest, and a contest as a job for a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from transformers import LlamaForCausalLM

from k25lite.swarm.contest import Arena, System, compete, words
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


def hold(contest: Contest) -> pd.DataFrame:
    """Every system on every task: `Trial.row`, with `seed` and `answer`."""
    trials = compete(contest.arena(), contest.systems, contest.tasks)
    return pd.DataFrame([trial.row() | {"seed": contest.seed, "answer": trial.answer} for trial in trials])
