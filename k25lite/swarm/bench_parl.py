"""`k25lite bench swarm`, the orchestrator's training: episodes per second, and what takes the time, on one thread.

The orchestrator begins as in training, with demonstrations, if fewer: what it does decides how long episodes are. The
record of the frozen sub-agent is made up, and drawn from by the code that draws from a measured one.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from k25lite.swarm.calibration import SIZES, Calibration
from k25lite.swarm.parl import FULL, ParlRecipe, draw_tasks, parl
from k25lite.swarm.parl_language import serial, swarm
from k25lite.swarm.parl_rollout import make_orchestrator
from k25lite.swarm.parl_stage import demonstrate, imitate, play
from k25lite.swarm.simulator import Simulator
from k25lite.swarm.subagent import SUB_LIMITS

if TYPE_CHECKING:
    from k25lite.bench import Report

SUBJECT = "k25lite"
PARTS = ("rollout", "environment", "update")
SCRIPTS = {"serial": serial, "swarm": swarm(4)}
RECIPE = replace(FULL, iterations=6, demonstrations=256)
QUICK = replace(RECIPE, iterations=2, tasks=4, demonstrations=32)


def training(report: Report, quick: bool) -> None:
    """Episodes per second of the simulator alone, played by scripts, and of PARL with the share of time of each part.

    The first of several iterations or rounds does not count.
    """
    recipe, threads = QUICK if quick else RECIPE, torch.get_num_threads()
    simulator = Simulator(_record(SUB_LIMITS.steps), _record(None), recipe.budget)
    torch.set_num_threads(1)
    try:
        _play(report, simulator, recipe)
        model = make_orchestrator(0)
        imitate(model, demonstrate(simulator, recipe, 0), recipe.start)
        log = parl(model, simulator, recipe, 0, progress=False)[1:]
    finally:
        torch.set_num_threads(threads)
    case = f"PARL, {recipe.tasks} tasks, K={recipe.samples}"
    seconds = log[[f"{part}_s" for part in PARTS]]
    rate = recipe.tasks * recipe.samples / seconds.sum(axis=1).median()
    report.add(case, "episodes_per_second", "episodes/s", {SUBJECT: float(rate)})
    for part, share in zip(PARTS, seconds.sum() / seconds.to_numpy().sum(), strict=True):
        report.add(case, f"{part}, share of time", "fraction", {SUBJECT: float(share)})


def _play(report: Report, simulator: Simulator, recipe: ParlRecipe) -> None:
    tasks = draw_tasks(recipe.names, recipe.tasks, recipe.samples, 0)
    for name, script in SCRIPTS.items():
        times = []
        for _ in range(recipe.iterations):
            begun = time.perf_counter()
            play(simulator, tasks, [script] * len(tasks))
            times.append(time.perf_counter() - begun)
        rate = len(tasks) / statistics.median(times[1:])
        report.add(f"simulator, {name} script", "episodes_per_second", "episodes/s", {SUBJECT: rate})


def _record(limit: int | None, trials: int = 16) -> Calibration:
    """Of a sub-agent that takes one to three steps for a name, and gets nine cells of ten right."""
    random, parts = np.random.default_rng(0), []
    for names in SIZES:
        steps = 1 + names + random.binomial(2 * names, 0.5, trials)
        finished = steps <= (limit or np.inf)
        parts.append(np.stack([finished, np.where(finished, steps, limit or 0), 0.9 * finished], axis=1))
    return Calibration(SIZES, tuple(parts), limit)
