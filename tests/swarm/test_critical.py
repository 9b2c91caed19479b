"""Critical steps counted by hand, by the run itself, and from its trace alone."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import LOOK, critical, follow, followed, fraction, leaf, plan, prompt_of, steps_taken, total

from k25lite.swarm import Limits, Reply, ScriptedPolicy, Trace, call
from k25lite.swarm.critical import critical_path, summarise
from k25lite.swarm.orchestrator import Orchestrator


def counted(todo, **options):
    """The summary of a run, once it agrees with what the run itself counted."""
    result, trace = followed(todo, **options)
    summary = summarise(trace.events)
    assert (result.steps, result.critical_steps) == (summary.total_steps, summary.critical_steps)
    assert (result.tokens, result.cost) == (summary.tokens, summary.cost)
    for event in trace.events:
        if event["event"] == "result":
            assert event["critical_steps"] == summary.assignments[event["path"]].critical_steps
    return summary


def trees(deep: int = 2):
    leaves = st.integers(1, 3).map(leaf)
    if not deep:
        return leaves
    part = st.one_of(st.just(LOOK), trees(deep - 1))
    return st.lists(st.lists(part, min_size=1, max_size=3), max_size=3).map(lambda steps: plan(*steps))


def turned(todo):
    """The same plan, the parts of every step in the opposite order."""
    steps = [[part if part == LOOK else turned(part) for part in step[::-1]] for step in todo["steps"]]
    return plan(*steps, answer=todo["answer"])


HAND_COUNTED = [
    (leaf(4), 4, 4, []),  # serial: every step is critical
    (plan([leaf(2), leaf(5), leaf(1)]), 10, 7, [3]),  # the step that assigns, the slowest sub-agent, the answer
    (plan([leaf(2), leaf(3)], [LOOK], [leaf(1)], [leaf(4), leaf(4)]), 19, 13, [2, 1, 2]),  # 1+3, 1, 1+1, 1+4, 1 and 1
    (plan([plan([leaf(3), leaf(1)]), leaf(4)]), 12, 7, [2]),  # depth 2: the nested one needs 1+3+1, more than 4
    (plan([LOOK, LOOK, LOOK]), 2, 2, []),  # its own tools cost no step
    (plan([LOOK, leaf(2), LOOK]), 4, 4, [1]),
]


@pytest.mark.parametrize(("todo", "steps", "critical_steps", "parallelism"), HAND_COUNTED)
def test_hand_counted_runs(todo, steps, critical_steps, parallelism):
    summary = counted(todo)
    assert (summary.total_steps, summary.critical_steps, summary.parallelism) == (steps, critical_steps, parallelism)
    assert summary.ideal_speed_up == steps / critical_steps
    assert summary.mean_parallelism == (sum(parallelism) / len(parallelism) if parallelism else 0)


def test_attempts_follow_one_another():
    """A sub-agent that fails after 2 steps and then succeeds in 2 took 4 critical steps, a sibling 3."""
    attempts = []

    def script(messages):
        if "fail" in prompt_of(messages) and "steps" not in prompt_of(messages) and steps_taken(messages) == 1:
            attempts.append(1)
            if len(attempts) == 1:
                return Reply(refusal="not today")
        if prompt_of(messages) == "go":
            step = steps_taken(messages)
            tasks = (call("assign_task", agent="a", prompt="fail"), call("assign_task", agent="a", prompt="slow"))
            return [Reply(calls=(call("create_subagent", name="a", system_prompt=""),)), Reply(calls=tasks), "end"][
                step
            ]
        return (
            "ok" if steps_taken(messages) == (2 if prompt_of(messages) == "slow" else 1) else Reply(calls=(call(LOOK),))
        )

    async def look() -> str:
        return "seen"

    trace = Trace()
    result = Orchestrator(ScriptedPolicy(script), [look], team={"retries": 1}).run_sync("go", trace)
    summary = summarise(trace.events)
    assert result.critical_steps == summary.critical_steps == 3 + (2 + 2)
    assert result.steps == summary.total_steps == 3 + 4 + 3
    assert summary.parallelism == [2]
    assert summary.counts == {"done": 2, "failed": 0, "running": 0}
    assert [a.status for path, a in summary.assignments.items() if path.startswith("0.2.0")] == ["failed", "done"]


@given(trees())
@settings(max_examples=60, deadline=None)
def test_any_tree_is_counted_as_defined(todo):
    summary = counted(todo)
    assert (summary.total_steps, summary.critical_steps) == (total(todo), critical(todo))
    assert summary.total_steps >= summary.critical_steps
    assert summary.ideal_speed_up >= 1


@given(trees())
@settings(max_examples=30, deadline=None)
def test_order_of_sub_agents_changes_nothing(todo):
    one, other = counted(todo), counted(turned(todo))
    assert (one.total_steps, one.critical_steps) == (other.total_steps, other.critical_steps)
    assert sorted(one.parallelism) == sorted(other.parallelism)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
@settings(max_examples=30, deadline=None)
def test_a_faster_sub_agent_changes_nothing(subs, data):
    faster = data.draw(st.integers(1, max(subs)))
    without, with_it = counted(plan([leaf(n) for n in subs])), counted(plan([leaf(n) for n in [*subs, faster]]))
    assert without.critical_steps == with_it.critical_steps
    assert with_it.total_steps == without.total_steps + faster


@given(trees(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_counts_agree_when_steps_fail(todo, seed):
    """A step that raises is none, for the run as for its trace; attempts that failed count all the same."""

    def script(messages):
        if fraction(seed, prompt_of(messages), steps_taken(messages)) < 0.2:
            raise RuntimeError("crash")
        return follow(messages)

    result, trace = followed(todo, script=script, team={"retries": 1})
    summary = summarise(trace.events)
    assert (result.steps, result.critical_steps) == (summary.total_steps, summary.critical_steps)


def test_counts_agree_when_the_run_is_cut_off():
    """The overall time ends while sub-agents of sub-agents are at work: the steps that they took are critical too."""

    def script(messages):
        if steps_taken(messages) == 2:
            return waiting()
        return follow(messages)

    async def waiting():
        await asyncio.sleep(60)

    result, trace = followed(plan([plan([leaf(4), leaf(1)]), leaf(1)]), script=script, limits=Limits(seconds=1))
    summary = summarise(trace.events)
    assert result.reason == "limit of 1 seconds reached"
    assert summary.critical_steps == result.critical_steps == 1 + (1 + 2)
    assert summary.total_steps == result.steps == 1 + 1 + (1 + 2 + 1)
    assert {a.status for a in summary.assignments.values()} == {"failed", "done"}


def test_the_critical_path_waits_for_the_slowest():
    """Three sub-agents, the second one slow: the path is the orchestrator's steps and the slow one's, within the run."""

    async def script(messages):
        prompt = prompt_of(messages)
        await asyncio.sleep(0.02 if "slow" in prompt and steps_taken(messages) == 0 and '"steps": []' in prompt else 0)
        return follow(messages)

    todo = plan([leaf(1, "fast"), leaf(1, "slow"), leaf(1, "quick")], [LOOK])
    _, trace = followed(todo, script=script)
    summary = summarise(trace.events)
    path = critical_path(summary)
    assert [(span.path, span.kind) for span in path] == [
        ("0", "step"), ("0.1.2", "step"), ("0", "step"), ("0", "tool"), ("0", "step")
    ]  # fmt: skip
    assert summary.achieved_speed_up == pytest.approx(summary.busy / summary.wall)


@given(trees())
@settings(max_examples=30, deadline=None)
def test_the_critical_path_lies_in_the_run(todo):
    _, trace = followed(todo)
    summary = summarise(trace.events)
    path = critical_path(summary)
    assert path[0].began >= 0
    assert path[-1].ended <= summary.wall
    assert all(span.began <= span.ended for span in path)
    assert all(one.ended <= other.began for one, other in pairwise(path))
    assert len([span for span in path if span.kind == "step"]) <= summary.critical_steps


def test_no_run_no_summary():
    with pytest.raises(ValueError, match="begins with"):
        summarise([{"t": 0.0, "event": "end", "status": "done", "reason": "", "answer": ""}])
