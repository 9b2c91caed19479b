"""The simulator of wide search: what is drawn from the record, what fails, what an answer is worth."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import SUB_STEPS, Even, Rotting, Steady

from k25lite.swarm.parl_language import ACTS, ANSWER, ASSIGN, CREATE, END, READ, SEARCH, serial, swarm
from k25lite.swarm.parl_live_stage import library, names_by_page
from k25lite.swarm.simulator import PAGES, Budget, Outcome, Simulator, WideSearch
from k25lite.world.wide_tasks import make_tasks

ALONE = Steady(limit=10**6)
TEAM_OF_TWO = (CREATE, CREATE, "assign:4", "assign:4", END)


def played(steps, names=16, team=None, alone=ALONE, budget=100, of="critical"):
    """The outcome of these steps, and the last observation."""
    simulator = Simulator(team or Steady(), alone, Budget(budget, of))
    (observation,) = simulator.begin([Even(names)])
    for acts in steps:
        observation = simulator.step({0: acts})[0]
    return simulator.outcomes()[0], observation


def test_an_episode_by_hand():
    """Two searches, four and four names at a time by sub-agents (2 · 4 + 1 steps), two names read alone (2 steps each)."""
    outcome, last = played([(SEARCH,), (SEARCH,), TEAM_OF_TWO, (READ,), (READ,)])
    assert outcome.critical_steps == 2 + 1 + 9 + 2 + 2
    assert outcome.total_steps == 2 + 1 + 18 + 2 + 2
    assert (last.more, last.left, last.team, last.steps) == (False, 6, 2, 100 - 16)
    outcome, last = played([(SEARCH,), (SEARCH,), TEAM_OF_TWO, (READ,), (READ,), (ANSWER,)], team=Steady(share=0.5))
    assert last is None
    right, rows = 8 * 0.5 + 2 * 1.0, 10
    assert outcome.item_f1 == pytest.approx(2 * right / (rows + 16))
    assert (outcome.created, outcome.assigned, outcome.completed, outcome.own) == (2, 2, 2, 2)
    assert (outcome.stages, outcome.parallelism, outcome.finish_rate) == ([2], 2, 1)


def test_names_of_an_assignment_that_failed_are_left_again():
    outcome, last = played([(SEARCH,), (SEARCH,), (CREATE, "assign:16", END)])
    assert outcome.critical_steps == 3 + SUB_STEPS, "33 steps are needed, more than a sub-agent has"
    assert (last.left, last.done, last.failed) == (16, 0, 1)
    assert outcome.finish_rate == 0


@pytest.mark.parametrize(
    ("acts", "created", "stages", "failed"),
    [
        ((CREATE, CREATE, CREATE, END), 3, [], 0),  # never set to work
        (("assign:1", END), 0, [], 1),  # there is nobody
        (("assign:1", CREATE, END), 1, [], 1),  # not yet
        ((CREATE, "assign:8", "assign:8", END), 1, [1], 1),  # one sub-agent, one assignment a step
        ((CREATE, CREATE, "assign:8", "assign:8", END), 2, [2], 1),  # the second has nobody to read about
    ],
)
def test_spurious_parallelism_is_possible(acts, created, stages, failed):
    outcome, last = played([(SEARCH,), acts], team=Steady(limit=24))
    assert (outcome.created, outcome.stages, last.failed) == (created, stages, failed)
    assert outcome.completed == bool(stages)


@pytest.mark.parametrize("acts", [(END,), (ANSWER,)])
def test_a_step_without_calls_ends_an_episode(acts):
    outcome, last = played([acts])
    assert last is None
    assert outcome.answered == (acts == (ANSWER,))
    assert outcome.item_f1 == 0
    assert outcome.critical_steps == 1


def test_an_answer_behind_calls_is_not_heard():
    outcome, last = played([(CREATE, ANSWER)])
    assert last is not None
    assert not outcome.answered


def test_who_does_not_answer_within_the_budget_earns_nothing():
    steps = [(SEARCH,), (SEARCH,), TEAM_OF_TWO, (SEARCH,)]
    outcome, last = played([*steps, (ANSWER,)], budget=14)
    assert outcome.item_f1 == pytest.approx(2 * 8 / (8 + 16))
    assert outcome.critical_steps == 14
    outcome, last = played([*steps, (SEARCH,)], budget=14)
    assert (last, outcome.item_f1, outcome.answered, outcome.critical_steps) == (None, 0, False, 14)


def test_sub_agents_leave_the_last_step_to_the_orchestrator():
    outcome, last = played([(SEARCH,), TEAM_OF_TWO], budget=8)
    assert (outcome.critical_steps, last.steps, last.failed) == (7, 1, 2), "5 of the 9 steps that each needs"


def test_in_total_steps_sub_agents_that_work_at_the_same_time_add_up():
    _, last = played([(SEARCH,), TEAM_OF_TWO], of="total")
    assert last.steps == 100 - 2 - 18
    _, last = played([(SEARCH,), TEAM_OF_TWO], budget=14, of="total")
    assert (last.steps, last.done, last.failed) == (1, 1, 1), (
        "what is left after the first is not enough for the second"
    )


def test_reading_alone_takes_as_long_and_rots_as_recorded():
    read = played([(SEARCH,), (SEARCH,), *[(READ,)] * 16], alone=Steady(each=3, limit=100))[0]
    assert read.critical_steps == 2 + 3 * 16
    assert played([(SEARCH,), (READ,), (ANSWER,)], alone=Steady(share=0.25))[0].item_f1 == pytest.approx(0.5 / 17)
    assert played([(SEARCH,), (READ,), (ANSWER,)], alone=Steady(limit=2))[0].item_f1 == 0, "it would never answer"


def test_how_long_reading_takes_is_told_by_those_who_finished():
    class Stumbling(Steady):
        def draw(self, names, random):
            return super().draw(names, random) if random.random() < 0.7 else (False, 2, 0.0)

    simulator = Simulator(Steady(), Stumbling(each=3, limit=10**6))
    simulator.begin([WideSearch(20, seed) for seed in range(200)])
    rates = [episode.steps_of_a_name for episode in simulator.episodes]
    assert set(rates) == {1.0, 3.0}
    assert rates.count(1.0) <= 10, "where nobody of four finished"


@given(st.integers(1, 300), st.integers(0, 2**62))
def test_all_names_are_found_on_all_pages(names, seed):
    task = WideSearch(names, seed)
    found = [task.found(page) for page in range(task.pages + 1)]
    assert found == [WideSearch(names, seed).found(page) for page in range(task.pages + 1)]
    assert found[0] == 0
    assert found[-1] == names
    assert found[-2] < names
    assert min(np.diff(found)) >= 0


def test_pages_bring_as_many_names_as_those_of_a_real_library():
    of = library(600_006)
    real = [n for task in make_tasks(of, "train", 6, (40, 80)) for n in names_by_page(of, task)[:-1]]
    simulated = [n for seed in range(100) for n in np.diff([WideSearch(60, seed).found(p) for p in range(6)])]
    assert np.mean(simulated) == pytest.approx(np.mean(real), abs=1.5)
    assert np.std(simulated) == pytest.approx(np.std(real), abs=1.5)


def test_the_pages_were_counted():
    counts = np.zeros(len(PAGES))
    for seed in range(600_000, 600_006):
        of, tasks = library(seed), []
        for rows in ((10, 20), (20, 40), (40, 80), (80, 200)):
            with suppress(ValueError):  # one has no four tasks as long as the last
                tasks += make_tasks(of, "train", 4, rows)
        for task in tasks:
            counts += np.bincount(names_by_page(of, task)[:-1], minlength=len(PAGES))
    assert counts.tolist() == PAGES.tolist()


STEPS = st.lists(st.lists(st.sampled_from(ACTS), min_size=1, max_size=20), max_size=40)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(1, 60), st.integers(1, 100), st.sampled_from(["critical", "total"]), st.integers(0, 9))
def test_whatever_is_done_the_books_balance(steps, names, budget, of, seed):
    simulator = Simulator(Rotting(), Rotting(limit=500), Budget(budget, of))
    (observation,) = simulator.begin([WideSearch(names, seed)])
    outcome, task = simulator.outcomes()[0], simulator.episodes[0].task
    for acts in steps:
        before = observation
        observation = simulator.step({0: acts})[0]
        assert (outcome.total_steps if of == "total" else outcome.critical_steps) <= budget
        assert outcome.critical_steps <= outcome.total_steps
        if observation is None:
            break
        assert 0 < observation.steps < before.steps
        returned = sum(count for count, _ in simulator.episodes[0].returned)
        assert observation.left + outcome.own + returned == task.found(simulator.episodes[0].pages)
        assert observation.done + observation.failed == sum(act in ASSIGN for act in acts)
    assert 0 <= outcome.item_f1 <= 1
    assert outcome.answered or not outcome.item_f1
    assert 0 <= outcome.completed <= outcome.assigned
    assert all(1 <= stage <= outcome.created for stage in outcome.stages)


def test_the_same_dice_the_same_episode():
    def play(seed):
        simulator = Simulator(Rotting(), Rotting(limit=500))
        (observation,) = simulator.begin([WideSearch(40, seed)])
        while observation is not None:
            observation = simulator.step({0: swarm(4)(observation)})[0]
        return simulator.outcomes()[0]

    assert play(1) == play(1)
    assert play(1) != play(2)


def test_where_context_rots_a_team_beats_whoever_works_alone():
    """With twenty names or more; the scripts are what the trained orchestrator is compared with."""

    def f1(script, names):
        simulator = Simulator(Rotting(), Rotting(limit=500))
        tasks = [WideSearch(names, seed) for seed in range(30)]
        working = dict(enumerate(simulator.begin(tasks)))
        while working:
            told = simulator.step({index: script(of) for index, of in working.items()})
            working = {index: of for index, of in told.items() if of is not None}
        return np.mean([outcome.item_f1 for outcome in simulator.outcomes()])

    for names in (20, 40, 80):
        assert f1(swarm(4), names) > f1(serial, names) + 0.05


@pytest.mark.parametrize(
    "given", [lambda: Budget(0), lambda: Budget(10, "seconds"), lambda: Simulator(ALONE, ALONE).begin([WideSearch(0)])]
)
def test_what_makes_no_sense_is_refused(given):
    with pytest.raises(ValueError, match="got"):
        given()


def test_an_outcome_of_nothing():
    assert (Outcome().parallelism, Outcome().finish_rate) == (0, 0)
