"""Contests: the same tasks for all, the score of what came back, and the clock."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from k25lite.swarm.contest import Arena, System, compete, judge
from k25lite.swarm.contest_runs import Contest, Timing, hold, table
from k25lite.swarm.parl_language import serial, swarm
from k25lite.swarm.parl_rollout import make_orchestrator
from k25lite.swarm.subagent import subagent_policy, table_of
from k25lite.swarm.subagent_training import wide_library
from k25lite.world.wide_tasks import make_tasks

SUBAGENT = Path(__file__).parents[2] / "data/subagent"
TOOLS = ("search", "read")
SYSTEMS = [System("single", serial), System("swarm", swarm(4))]


@pytest.fixture(scope="module")
def library():
    return wide_library(7, 200)


@pytest.fixture(scope="module")
def task(library):
    return make_tasks(library, count=1, rows=(10, 14))[0]


@pytest.fixture(scope="module")
def arena(library):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models as small as these lose time to a second thread
    yield Arena(library, subagent_policy(SUBAGENT), 2.1)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trials(arena, task):
    return compete(arena, SYSTEMS, [task])


def test_both_find_most_and_only_one_splits(trials):
    alone, split = (trial.row() for trial in trials)
    assert min(alone["item_f1"], split["item_f1"]) > 0.6
    assert (alone["parallelism"], split["parallelism"] > 1.5) == (0, True)
    assert split["critical_steps"] < alone["critical_steps"] == alone["total_steps"] < split["total_steps"]
    assert alone["answered"] == split["answered"] == 1
    assert alone["tokens_read"] > split["tokens_read"] > 0


def test_together_or_one_after_another_they_answer_alike(arena, task, trials):
    assert [trial.answer for trial in compete(arena, SYSTEMS, [task], together=False)] == [t.answer for t in trials]


def test_the_curve_rises_to_the_score_of_the_answer(trials):
    for trial in trials:
        curve = trial.curve()
        assert curve.seconds.is_monotonic_increasing
        assert curve.item_f1.iloc[0] == 0
        assert curve.item_f1.iloc[-1] == pytest.approx(trial.score.item_f1)
        assert trial.seconds_to(0.0) == 0
        assert trial.seconds_to(1.01) is None
        reached = trial.seconds_to(trial.score.item_f1 / 2)
        assert 0 < reached <= trial.row()["seconds"]
    assert trials[0].seconds_to(0.1) < trials[0].seconds_to(0.5)  # alone, one row after another comes in


def test_waiting_for_tools_is_real_and_parallel(library, arena, task):
    slow = Arena(library, arena.worker, arena.steps_of_a_name, latency_s=0.05)
    alone, split = (
        [(of["began"], of["t"]) for of in trial.trace.events if of["event"] == "observation" and of["tool"] in TOOLS]
        for trial in compete(slow, SYSTEMS, [task], together=False)
    )
    assert all(end - began >= 0.05 for began, end in (*alone, *split))
    assert not any(later < end for (_, end), (later, _) in pairwise(sorted(alone)))
    assert sum(later < end for (_, end), (later, _) in pairwise(sorted(split))) > len(task.gold) / 2


def test_the_judge_scores_rows_one_to_one(task):
    gold = {row["name"]: [row[column] for column in task.gold.columns[1:]] for row in task.gold.to_dict("records")}
    columns = [*task.gold.columns[1:]]
    assert judge(task, table_of(gold, columns)).item_f1 == 1
    half = dict(list(gold.items())[: len(gold) // 2])
    part = len(half) / len(gold)
    assert judge(task, table_of(half, columns)).item_f1 == pytest.approx(2 * part / (1 + part))
    assert judge(task, "no table").item_f1 == 0


def test_a_table_tells_the_seed_of_contests_and_of_races(trials):
    contest = Contest(3, SUBAGENT, SUBAGENT, (("train", 1, (10, 14)),))
    rows = table([contest, Timing(contest, ("single",), 1, (10, 14), 0.0)], [trials, trials[:1]])
    assert rows.seed.tolist() == [3, 3, 3]
    assert rows.system.tolist() == ["single", "swarm", "single"]
    assert rows.answer.tolist() == [trial.answer for trial in (*trials, trials[0])]


def test_a_race_is_run_by_those_who_are_named(tmp_path):
    make_orchestrator(0).save_pretrained(tmp_path)
    contest = Contest(3, SUBAGENT, tmp_path, (("train", 1, (10, 12)),))
    trials = hold(Timing(contest, ("scripted swarm",), 2, (10, 12), 0.0))
    assert [trial.system for trial in trials] == ["scripted swarm"] * 2
    assert len({trial.task.instance_id for trial in trials}) == 2
    with pytest.raises(ValueError, match="got double"):
        Timing(contest, ("single", "double"), 1, (10, 12), 0.0)
