"""The orchestrator policy on the real runtime: the same acts cost and bring what the simulator says."""

import json
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from records import NAMES, QUERY, Even, Shelf, Steady, steady_worker
from scripts import of_kind

from k25lite.swarm import Limits, Orchestrator, ScriptedPolicy, Trace, learned
from k25lite.swarm.critical import summarise
from k25lite.swarm.learned import LearnedPolicy, Question, write_acts
from k25lite.swarm.parl_language import ACTS, ANSWER, CLOSING, CREATE, END, READ, SEARCH, Dialogue, serial, swarm
from k25lite.swarm.parl_rollout import WINDOW, make_orchestrator, roll_out
from k25lite.swarm.search import tools
from k25lite.swarm.simulator import Budget, Simulator
from k25lite.swarm.subagent import SUB_LIMITS, table_of, work_prompt
from k25lite.swarm.tables import parse_table
from k25lite.world.library import Library
from k25lite.world.wide_tasks import make_tasks

ACT = st.sampled_from([act for act in ACTS if act not in CLOSING])
STEP = st.tuples(st.lists(ACT, max_size=8), st.sampled_from([SEARCH, READ, END])).map(lambda step: (*step[0], step[1]))


class Recited:
    """A script that says these steps one after another and then answers; it keeps the observations."""

    def __init__(self, steps):
        self.steps, self.observations = iter(steps), []

    def __call__(self, observation):
        self.observations.append(observation)
        return next(self.steps, (ANSWER,))


def live(decide, names, budget=100, each=2, **limits):
    """A run of the real runtime, and its trace."""
    trace = Trace()
    policy = LearnedPolicy(decide, steady_worker(each), each, Budget(budget))
    orchestrator = Orchestrator(
        policy,
        tools(Shelf(names)),
        sub_policy=steady_worker(each),
        limits=Limits(**limits or {"critical_steps": budget}),
        own_limits=Limits(steps=1000),
        team={"limits": SUB_LIMITS},
    )
    return orchestrator.run_sync(QUERY, trace), trace


def simulated(decide, names, budget=100, each=2, of="critical"):
    simulator = Simulator(Steady(each), Steady(each, limit=10**6), Budget(budget, of))
    (observation,) = simulator.begin([Even(names)])
    while observation is not None:
        observation = simulator.step({0: decide(observation)})[0]
    return simulator.outcomes()[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=12), st.integers(1, 40), st.sampled_from([3, 6, 20, 47, 100]), st.integers(1, 3))
@example([(SEARCH,), (CREATE, "assign:16", END)], 16, 20, 2)  # beyond the sub-agent's limit, and the run's
@example([(SEARCH,), (CREATE, "assign:2", CREATE, "assign:4", READ), (READ,)], 16, 100, 3)
@example([(SEARCH,), (SEARCH,), (READ,), (READ,)], 2, 8, 3)  # the budget ends while the second name is looked up
@example([(SEARCH,), (SEARCH,), (SEARCH,), (READ,)], 1, 6, 3)
@example([("assign:1", CREATE, "assign:1", "assign:1", SEARCH), (END,)], 16, 100, 2)
@example([(SEARCH,), (READ,), (CREATE, CREATE, CREATE, END), ("assign:8", ANSWER)], 8, 6, 3)
def test_the_simulator_keeps_the_books_of_the_runtime(steps, names, budget, each):
    told, said = Recited(steps), Recited(steps)
    result, trace = live(told, names, budget, each)
    outcome, summary = simulated(said, names, budget, each), summarise(trace.events)
    assert outcome.answered == result.done, result.reason
    assert outcome.critical_steps == result.critical_steps == summary.critical_steps
    assert outcome.total_steps == result.steps == summary.total_steps
    assert outcome.stages == summary.parallelism
    assert outcome.parallelism == summary.mean_parallelism
    assert outcome.created == len(of_kind(trace.events, "subagent"))
    without = [(o.more, o.left, o.team, o.done, o.failed) for o in told.observations]
    assert without == [(o.more, o.left, o.team, o.done, o.failed) for o in said.observations]
    if result.done:
        rows = len(parse_table(result.answer))
        assert outcome.item_f1 == pytest.approx(2 * rows / (rows + names)), "every row is right here"


@settings(max_examples=15, deadline=None)
@given(st.lists(STEP, max_size=8), st.integers(1, 40))
def test_and_those_of_total_steps(steps, names):
    result, _ = live(Recited(steps), names, steps=10_000)
    outcome = simulated(Recited(steps), names, 10_000, of="total")
    assert (outcome.critical_steps, outcome.total_steps) == (result.critical_steps, result.steps)


@pytest.mark.parametrize(("script", "most"), [(serial, 0), (swarm(4), 5), (swarm(4, width=1), 1)])
def test_scripts_find_everybody(script, most):
    result, trace = live(script, 20)
    rows, summary = parse_table(result.answer), summarise(trace.events)
    assert sorted(rows["name"]) == sorted(NAMES[:20])
    assert summary.mean_parallelism == most
    assert script != serial or summary.critical_steps == 3 + 2 * 20 + 1


def test_an_assignment_beyond_the_limit_of_sub_agents_brings_nothing():
    result, trace = live(swarm(16), 32)
    assert result.done
    assert not len(parse_table(result.answer)), "16 names take 33 steps, more than a sub-agent has"
    summary = summarise(trace.events)
    assert summary.counts == {"done": 0, "failed": len(summary.assignments) - 1, "running": 0}


def test_what_the_orchestrator_reads_is_worked_on_in_a_conversation_of_its_own():
    """The worker sees its notes and documents, and neither assignments nor the names that others have."""
    seen = []
    worker = steady_worker()

    async def listening(messages, tools):
        seen.append(messages)
        return await worker(messages, tools)

    steps = [(SEARCH,), (READ,), (CREATE, "assign:2", READ), (READ,)]
    policy = LearnedPolicy(Recited(steps), listening, 2.0)
    orchestrator = Orchestrator(policy, tools(Shelf(8)), sub_policy=worker)
    assert orchestrator.run_sync(QUERY).done
    one, four, five = NAMES[0], NAMES[3], NAMES[4]
    assert seen[-1][0]["content"] == work_prompt([one, four, five], ["food", "home"])
    called = [json.loads(call["function"]["arguments"]) for m in seen[-1][1:] for call in m.get("tool_calls", ())]
    assert called[::2] == [{"title": one}, {"title": four}, {"title": five}]
    assert [m["content"] for m in seen[-1] if m["role"] == "assistant"] == ["", *(f"note {n}" for n in range(1, 6))]
    assert [m["content"] for m in seen[-1] if m["role"] == "tool"][::2] == [
        f"year 4 . {name} eats figs ." for name in (one, four, five)
    ]


@pytest.mark.parametrize(
    ("steps", "budget"),
    [
        ([(SEARCH,), (READ,), (READ,)], 100),  # asked for a note, and then for the rows
        ([(SEARCH,), (READ,), (READ,)], 7),  # the rows are asked for twice: the second name was not looked up
        ([(SEARCH,), (READ,), (CREATE, "assign:2", READ), (READ,)], 100),
    ],
)
def test_every_reply_of_the_worker_is_counted(steps, budget):
    spent, steady = [], steady_worker(3)

    async def counting(messages, tools):
        spent.append(len(messages))
        return replace(await steady(messages, tools), prompt_tokens=len(messages), completion_tokens=1, cost=0.5)

    policy = LearnedPolicy(Recited(steps), counting, 3.0, Budget(budget))
    limits = Limits(steps=budget)
    result = Orchestrator(policy, tools(Shelf(8)), sub_policy=counting, own_limits=limits).run_sync(QUERY)
    assert result.done
    assert (result.tokens, result.cost) == (sum(spent) + len(spent), 0.5 * len(spent))


def test_a_conversation_is_read_as_it_was_written(monkeypatch):
    """Step by step the model is given the tokens that the simulator would give it after the same acts."""
    dialogues = []

    def keep(model, dialogue, temperature, seed):
        dialogues.append(dialogue)
        return write_acts(model, dialogue, temperature, seed)

    monkeypatch.setattr(learned, "write_acts", keep)
    steps = 0
    for seed in range(16):
        policy = LearnedPolicy(make_orchestrator(seed), steady_worker(), 2.0, temperature=1.0, seed=seed)
        given = {"limits": Limits(critical_steps=100), "team": {"limits": SUB_LIMITS}}
        Orchestrator(policy, tools(Shelf(30)), sub_policy=steady_worker(), **given).run_sync(QUERY)
        last = dialogues[-1]
        simulator = Simulator(Steady(), Steady(limit=10**6))
        repeated = Dialogue(simulator.begin([Even(30)]), last.steps)
        repeated.observations += [simulator.step({0: acts})[0] for acts in last.steps]
        assert last.ids == repeated.ids
        steps += len(last.steps)
    assert steps > 20


def test_the_model_writes_what_it_would_write_in_a_rollout():
    """At temperature 0, over a conversation read as a whole and not token by token."""
    model = make_orchestrator(4)
    rollouts = roll_out(model, simulator := Simulator(Steady(), Steady()), [Even(30)], temperature=0.0)
    simulator.begin([Even(30)])
    observation, dialogue = simulator.episodes[0].observation(), Dialogue()
    while observation is not None and len(dialogue.ids) < int(rollouts.lengths[0]):
        dialogue.observations.append(observation)
        try:
            dialogue.steps.append(write_acts(model, dialogue))
        except ValueError:  # the window
            break
        observation = simulator.step({0: dialogue.steps[-1]})[0]
    assert dialogue.ids == rollouts.input_ids[0, : len(dialogue.ids)].tolist()
    assert len(dialogue.steps) > 1


def test_a_conversation_beyond_the_window_is_refused():
    observations = Simulator(Steady(), Steady()).begin([Even(3)]) * (WINDOW // 2)
    dialogue = Dialogue(observations, [(CREATE, END)] * (len(observations) - 1))
    with pytest.raises(ValueError, match="at most 512 tokens"):
        write_acts(make_orchestrator(0), dialogue)


@pytest.mark.parametrize("seed", range(3))
def test_queries_of_the_world_are_understood(seed):
    for task in make_tasks(Library(seed, people=200), "train", 20, (2, 60)):
        for query in (task.query, task.record(explained=True)["query"]):
            assert Question.read(query) == Question(task.wanted, task.columns)


@pytest.mark.parametrize(
    "query", ["", "who eats figs ?", "list every person who eats snow with home", f"{QUERY} , age"]
)
def test_other_queries_are_refused(query):
    with pytest.raises(ValueError, match="a task is to list every person"):
        Question.read(query)


def test_names_are_those_of_whom_a_wanted_fact_is_stated():
    hits = (
        "ada bo : year 3 . ada bo eats figs . ce do lives in the cave\n"
        "tale 3 : ... the goat of ef go eats figs . formerly hi jo eats figs . ka lo eats figs\n"
        "more on page 2"
    )
    assert Question({"food": "figs"}, ("home",)).names(hits) == ["ada bo", "ka lo"]
    assert Question({"home": "cave", "food": "figs"}, ("music",)).names(hits) == ["ada bo", "ce do", "ka lo"]


def test_the_answer_has_those_who_belong_and_not_what_was_only_asked_of_them():
    rows = {"a b": ["figs", "cave"], "c d": ["plums", "cave"], "e f": ["unknown", "cave"], "g h": ["figs"]}
    table = Question({"food": "figs"}, ("home",)).table(rows)
    assert table == table_of({"a b": ["cave"]}, ["home"])


def test_rows_of_names_that_were_not_asked_for_do_not_count():
    """A sub-agent that answers with others' rows, or with a bare failure, has done nothing."""

    def script(messages):
        return "ze ro : food figs , home cave"

    policy = LearnedPolicy(swarm(4), steady_worker(), 2.0)
    orchestrator = Orchestrator(policy, tools(Shelf(4)), sub_policy=ScriptedPolicy(script))
    assert not len(parse_table(orchestrator.run_sync(QUERY).answer))


@pytest.mark.parametrize(("steps", "temperature"), [(0, 0), (2, -1)])
def test_settings_out_of_range_are_refused(steps, temperature):
    with pytest.raises(ValueError, match="got"):
        LearnedPolicy(serial, steady_worker(), steps, temperature=temperature)
