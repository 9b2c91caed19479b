"""PARL goes on with real sub-agents, from where it ended with their record, and is examined with them.

Source: Kimi K2.5 report, section 3: training starts with small sub-agents and moves to larger ones. Here it starts with
draws from what the frozen sub-agent was seen to do, and moves to the sub-agent itself, at work on tasks of a library.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import LlamaForCausalLM, PreTrainedModel

from k25lite.swarm.calibration import Calibration
from k25lite.swarm.learned import Book, Question
from k25lite.swarm.parl import FULL, ParlRecipe, parl
from k25lite.swarm.parl_language import Script
from k25lite.swarm.parl_live import LiveEnvironment
from k25lite.swarm.parl_stage import FIRST_SEED, ParlRun, evaluate, parl_stage, profile_run, save
from k25lite.swarm.search import SearchEngine, tools
from k25lite.swarm.simulator import PUBLISHED, Budget
from k25lite.swarm.subagent import search_engine, subagent_policy
from k25lite.swarm.subagent_training import CALIBRATION, wide_library
from k25lite.training.cache import cached
from k25lite.world.library import Library
from k25lite.world.wide_tasks import Task, make_tasks

PEOPLE = 800  # of a library to search widely
TRAINING_SEED, EXAMINED_SEED = 300_000, 400_000  # of libraries to train in, and of those to be examined in
# Rewards are those of the end of training with the record: nothing but the table.
LIVE = replace(FULL, iterations=6, tasks=4, samples=4, names=(10, 40), parallel=0.0, finish=0.0, updates=2)


def library(seed: int) -> Library:
    """Of eight hundred people, in whose facts there are tables of 10 to more than 100 rows."""
    return wide_library(seed, PEOPLE)


def names_by_page(of: Library, task: Task) -> list[int]:
    """How many new names each page of hits brings to an orchestrator that searches to the end."""

    async def search_on() -> list[int]:
        search = tools(SearchEngine(of.documents))[0]
        book, brought = Book(Question.read(task.query), PUBLISHED, 1.0), list[int]()
        while book.more:
            known = len(book.seen)
            book.search(await search(book.question.query, book.page))
            brought.append(len(book.seen) - known)
        return brought

    return asyncio.run(search_on())


def calibrations(subagent: Path) -> tuple[Calibration, Calibration]:
    """What the sub-agent in this folder was measured to do, as a part of the team and alone."""
    team, alone = (Calibration.load(subagent / CALIBRATION, name) for name in ("team", "alone"))
    return team, alone


def steps_of_a_name(team: Calibration) -> float:
    """That a sub-agent takes on average, its answer left out.

    Of the sizes at which nearly as many cells are right as at the best one: with more names it stops before it has read
    all, and finishes the sooner the more it leaves out.
    """
    best = max(part[:, 2].mean() for part in team.trials)
    read = [(size, part) for size, part in zip(team.sizes, team.trials, strict=True) if part[:, 2].mean() >= 0.9 * best]
    return float(np.concatenate([(part[:, 1] - 1) / size for size, part in read]).mean())


def live_environment(of: Library, tasks: Sequence[Task], subagent: Path, budget: Budget = PUBLISHED) -> LiveEnvironment:
    """Tasks of a library, worked on by the sub-agent in a folder."""
    own, sub = tools(SearchEngine(of.documents)), tools(search_engine(of.documents))
    each = steps_of_a_name(calibrations(subagent)[0])
    return LiveEnvironment(tasks, subagent_policy(subagent), own, sub, each, budget)


@dataclass(frozen=True)
class LiveRun:
    """Training that goes on: everything its outcome depends on.

    Args:
        start: with the record of the sub-agent. subagent: its folder.
        recipe: from here on. tasks: to train on. examined: tasks to be examined with, of another library, before and after;
            rows: that their tables have, at least and at most.
        episodes: of each of them.
    """

    start: ParlRun
    subagent: Path
    recipe: ParlRecipe = LIVE
    tasks: int = 24
    examined: int = 6
    rows: tuple[int, int] = (10, 60)
    episodes: int = 4


def profile_runs(profile: str, seeds: Sequence[int], subagent: Path) -> list[LiveRun]:
    """The whole of PARL for each seed: with the record of this sub-agent, then with itself."""
    team, alone = calibrations(subagent)
    starts = [profile_run(profile, "PARL", FIRST_SEED + seed, team, alone) for seed in seeds]
    if profile == "smoke":
        short = replace(LIVE, iterations=1, tasks=2, samples=2, names=(10, 20))
        return [LiveRun(start, subagent, short, tasks=4, examined=2, rows=(10, 20), episodes=1) for start in starts]
    if profile == "lite":
        short = replace(LIVE, iterations=2, tasks=2, names=(10, 30))
        return [LiveRun(start, subagent, short, examined=3, rows=(10, 30), episodes=1) for start in starts]
    return [LiveRun(start, subagent) for start in starts]


def live_stage(run: LiveRun) -> Path:
    """The folder of an orchestrator trained on: weights, log.json, start.json and evaluation.json."""

    def build(folder: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(start)
        save(examine(model, run), folder / "start.json")
        where = library(TRAINING_SEED + run.start.seed)
        tasks = make_tasks(where, "train", run.tasks, run.recipe.names)
        with live_environment(where, tasks, run.subagent, run.recipe.budget) as environment:
            save(parl(model, environment, run.recipe, run.start.seed, progress=False), folder / "log.json")
        save(examine(model, run), folder / "evaluation.json")
        model.save_pretrained(folder)

    start = parl_stage(run.start)
    weights = hashlib.sha256((run.subagent / "model.safetensors").read_bytes()).hexdigest()
    config = asdict(run) | {"start": start.name, "subagent": weights}
    return cached("parl-live", config, build)


def examine(model: PreTrainedModel | Script, run: LiveRun) -> pd.DataFrame:
    """`parl_stage.evaluate` with the real sub-agent, on tasks of a library that nobody was trained in."""
    where = library(EXAMINED_SEED + run.start.seed)
    tasks = make_tasks(where, "train", run.examined, run.rows)
    with live_environment(where, tasks, run.subagent, run.recipe.budget) as environment:
        return evaluate(model, environment, run.start.seed, [len(task.gold) for task in tasks], run.episodes)
