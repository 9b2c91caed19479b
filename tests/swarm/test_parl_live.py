"""Training with real sub-agents: the same episodes as simulated ones, where the simulated sub-agents do the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from records import NAMES, QUERY, Even, Shelf, Steady, steady_worker

from k25lite.swarm.calibration import Calibration
from k25lite.swarm.parl import ParlRecipe, draw_tasks, parl
from k25lite.swarm.parl_language import ANSWER, END, SEARCH, serial, swarm
from k25lite.swarm.parl_live import LiveEnvironment
from k25lite.swarm.parl_live_stage import calibrations, steps_of_a_name
from k25lite.swarm.parl_rollout import make_orchestrator, roll_out
from k25lite.swarm.parl_stage import demonstrate, imitate, play
from k25lite.swarm.search import tools
from k25lite.swarm.simulator import Budget, Simulator, WideSearch
from k25lite.world.wide_tasks import Task

BUDGET = Budget(40)
SUBAGENT = Path(__file__).parents[2] / "data/subagent"


def task_of(names, instance_id="lite"):
    gold = pd.DataFrame({"name": NAMES[:names], "home": "cave"}, dtype=object)
    return Task(instance_id, {"food": "figs"}, ("home",), gold)


def live(names, budget=BUDGET, worker=None):
    shelf = tools(Shelf(names))
    return LiveEnvironment([task_of(names)], worker or steady_worker(), shelf, shelf, 2.0, budget)


def simulator(budget=BUDGET):
    return Simulator(Steady(), Steady(limit=10**6), budget)


def outcomes(environment):
    """But for the last bits of the score, which adds up in another order."""
    return [replace(outcome, item_f1=round(outcome.item_f1, 9)) for outcome in environment.outcomes()]


@pytest.fixture(scope="module")
def model():
    recipe = ParlRecipe(names=(4, 12), demonstrations=256, serial=0.5)
    model = make_orchestrator(0)
    imitate(model, demonstrate(simulator(), recipe, 0), recipe.start)
    return model


def test_the_task_is_that_of_the_shelf():
    assert task_of(3).query == QUERY


def test_rollouts_are_the_same_with_simulated_and_with_real_sub_agents(model):
    tasks = [Even(12, seed) for seed in range(24)]
    simulated = roll_out(model, there := simulator(), tasks, generator=torch.Generator().manual_seed(0))
    with live(12) as here:
        real = roll_out(model, here, tasks, generator=torch.Generator().manual_seed(0))
        assert outcomes(here) == outcomes(there)
    assert torch.equal(real.input_ids, simulated.input_ids)
    assert torch.equal(real.log_probs, simulated.log_probs)
    assert {outcome.parallelism > 0 for outcome in there.outcomes()} == {True, False}
    assert sum(outcome.answered for outcome in there.outcomes()) > 12


@pytest.mark.parametrize("of", ["critical", "total"])
@pytest.mark.parametrize("script", [serial, swarm(2), swarm(4, width=2), lambda observation: (END,)])
def test_scripts_fare_the_same(script, of):
    budget = Budget(100, of)
    play(there := simulator(budget), [Even(20)], [script])
    with live(20, budget) as here:
        play(here, [Even(20)], [script])
        assert outcomes(here) == outcomes(there)


def test_training_goes_on_live(model):
    recipe = ParlRecipe(iterations=1, tasks=2, samples=4, names=(14, 14), updates=1, budget=BUDGET)
    before = model.lm_head.weight.detach().clone()
    with live(14) as here:
        log = parl(model, here, recipe, 0, progress=False)
    assert len(log) == 1
    assert log.r_perf.between(0, 1).all()
    assert not torch.equal(before, model.lm_head.weight)


def test_tasks_are_those_of_the_length_asked_for():
    shelf, tasks = tools(Shelf(9)), [task_of(3, "a"), task_of(9, "b"), task_of(9, "c")]
    with LiveEnvironment(tasks, steady_worker(), shelf, shelf, 2.0) as here:
        assert here.choose(WideSearch(4)).instance_id == "a"
        assert {here.choose(task).instance_id for task in draw_tasks((20, 20), 1, 20, 0)} == {"b", "c"}


def test_what_is_still_at_work_is_cancelled():
    with live(14) as here:
        here.begin([WideSearch(14)] * 3)
        here.step({0: (SEARCH,)})
        runs = [run.work for run in here.runs]
        here.begin([WideSearch(14)])
        assert here.step({0: (ANSWER,)}) == {0: None}
        assert here.outcomes()[0].item_f1 == 0
    assert all(run.done() for run in (*runs, here.runs[0].work))
    here.close()  # once more changes nothing


def test_a_worker_that_breaks_costs_its_episode_and_no_other():
    steady = steady_worker()

    async def breaking(messages, tools):
        if NAMES[0] in messages[-1]["content"]:
            raise RuntimeError("out of order")
        return await steady(messages, tools)

    with live(4, worker=breaking) as here:
        play(here, [WideSearch(4)] * 2, [serial, swarm(1)])
        alone, team = here.outcomes()
    assert (alone.answered, alone.item_f1) == (False, 0)
    assert team.answered
    assert team.completed == 3


def test_the_steps_of_a_name_are_those_of_sub_agents_that_read_all():
    read, stopped = np.array([[1, 5, 0.9], [1, 5, 0.8]]), np.array([[1, 5, 0.4], [0, 3, 0.0]])
    assert steps_of_a_name(Calibration((2, 4, 16), (read, read, stopped))) == (2 + 1) / 2
    assert steps_of_a_name(calibrations(SUBAGENT)[0]) == pytest.approx(1, abs=0.02)


def test_no_tasks_are_refused():
    with pytest.raises(ValueError, match="needs tasks, got none"):
        LiveEnvironment([], steady_worker(), [], [], 2.0)
