"""Limits hold: for each agent and for the run, not exceeded by even one step, whatever the policies do."""

import asyncio
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import LOOK, boss, followed, fraction, leaf, look, of_kind, plan, prompt_of, steps_taken, subs, total

from k25lite.swarm import Limits, Orchestrator, Reply, ScriptedPolicy, Trace, call
from k25lite.swarm.critical import summarise
from k25lite.swarm.limits import Account, Exceeded
from k25lite.swarm.orchestrator import Places

RESTLESS = Reply(calls=(call(LOOK),), prompt_tokens=30, completion_tokens=10, cost=0.25)


def restless(messages):
    return RESTLESS


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"money": -1.0}, {"seconds": float("nan")}])
def test_a_limit_is_above_zero(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


def test_an_account_pays_along_or_not_at_all():
    total = Account(Limits(steps=3))
    one, other = Account(Limits(steps=2), total), Account(Limits(), total, reserve=1)
    assert [one.begin_step(), other.begin_step()] == [
        False,
        True,
    ]  # one step of the total is left, and not to the other
    with pytest.raises(Exceeded, match="steps"):
        other.begin_step()
    assert (one.steps, other.steps, total.steps) == (1, 1, 2)
    assert one.begin_step()
    with pytest.raises(Exceeded, match="steps"):
        one.begin_step()
    assert (one.steps, other.steps, total.steps) == (2, 1, 3)


@pytest.mark.parametrize(
    ("limits", "own", "reason", "steps"),
    [
        ({"steps": 4}, {}, "steps", 4),
        ({}, {"steps": 4}, "steps", 4),
        ({"critical_steps": 4}, {}, "critical steps", 4),
        ({}, {"critical_steps": 4}, "critical steps", 4),
        ({"tokens": 100}, {}, "tokens", 3),  # 40 in each step: used up after the third
        ({}, {"tokens": 120}, "tokens", 3),
        ({"money": 0.75}, {}, "money", 3),
        ({}, {"money": 1.0}, "money", 4),
    ],
)
def test_a_restless_agent_is_stopped(limits, own, reason, steps):
    run = Orchestrator(ScriptedPolicy(restless), [look], limits=Limits(**limits), own_limits=Limits(**own))
    result = run.run_sync("go")
    assert (result.status, result.reason, result.steps) == ("failed", f"limit of {reason} reached", steps)


@pytest.mark.parametrize("team", [{"steps": 3}, {"critical_steps": 3}, {"tokens": 100}, {"money": 0.75}])
def test_a_restless_sub_agent_is_stopped_alone(team):
    trace = Trace()
    sub = subs(lambda prompt, step: RESTLESS if prompt == "restless" else "fine")
    run = Orchestrator(boss(["restless", "calm"]), [look], sub_policy=sub, team={"limits": Limits(**team)})
    reason = f"failed: limit of {next(iter(team)).replace('_', ' ')} reached"
    assert json.loads(run.run_sync("go", trace).answer) == [reason, "fine"]
    assert sorted(event["steps"] for event in of_kind(trace.events, "result")) == [1, 3]


def test_seconds_of_an_agent_and_of_the_run():
    def run(trace=None, **options):
        return Orchestrator(boss(["slow"]), sub_policy=ScriptedPolicy(["late"], 60), **options).run_sync("go", trace)

    assert run(team={"limits": Limits(seconds=0.05)}).answer == '["failed: limit of 0.05 seconds reached"]'
    assert run(own_limits=Limits(seconds=0.1)).reason == "limit of 0.1 seconds reached"
    trace = Trace()
    assert run(trace, limits=Limits(seconds=0.1)).reason == "limit of 0.1 seconds reached"
    assert [event["event"] for event in trace.events][-2:] == ["result", "end"]


@pytest.mark.parametrize("limits", [None, Limits(seconds=60)])
def test_a_time_out_of_the_policy_is_not_the_agents(limits):
    """Policies raise TimeoutError too, with words and without."""
    for error, reason in [
        (TimeoutError(), "policy: TimeoutError: "),
        (TimeoutError("read timed out"), "policy: TimeoutError: read timed out"),
        (asyncio.CancelledError("their own"), "policy: CancelledError: their own"),
    ]:

        async def policy(messages, tools, error=error):
            raise error

        result = Orchestrator(policy, own_limits=limits or Limits()).run_sync("go")
        assert (result.status, result.reason) == ("failed", reason)


def test_the_last_step_is_offered_no_tools():
    """A policy that looks as long as it may and then answers: its last step is known to it by having no tools."""
    offered = []

    async def policy(messages, tools):
        offered.append([tool["function"]["name"] for tool in tools])
        return RESTLESS if tools else Reply("so far")

    def last(**options):
        offered.clear()
        return Orchestrator(policy, [look], **options).run_sync("go")

    everything = [LOOK, "create_subagent", "assign_task"]
    for options in ({"own_limits": Limits(steps=3)}, {"limits": Limits(steps=3)}, {"limits": Limits(critical_steps=3)}):
        assert last(**options).answer == "so far"
        assert offered == [everything, everything, []]


def test_tools_that_were_not_offered_are_not_called():
    called = []

    async def touch() -> str:
        called.append(1)
        return "touched"

    trace = Trace()
    policy = ScriptedPolicy([Reply(calls=(call("touch"),))] * 9)
    result = Orchestrator(policy, [touch], own_limits=Limits(steps=2)).run_sync("go", trace)
    assert result.reason == "limit of steps reached"
    assert (result.steps, len(called)) == (2, 1)


@pytest.mark.parametrize("limits", [Limits(steps=9), Limits(critical_steps=9)])
def test_one_step_is_kept_for_the_answer(limits):
    """Sub-agents that never end cannot use up what the orchestrator needs to answer."""
    policy = ScriptedPolicy(restless)
    result = Orchestrator(boss(["x", "y", "z"], "answer"), [look], sub_policy=policy, limits=limits).run_sync("go")
    assert result.answer == "answer"
    assert (result.steps if limits.steps else result.critical_steps) == 9


def unruly(seed, max_calls=5):
    """A policy that does anything that it can, depending on nothing but the seed and its context."""

    async def script(messages):
        def chance(*what):
            return fraction(seed, prompt_of(messages), len(messages), messages[-1]["content"][:50], *what)

        for _ in range(int(chance("turns") * 4)):
            await asyncio.sleep(0)
        if chance("end") < 0.07:
            return Reply("answer", prompt_tokens=7)
        if chance("crash") < 0.03:
            raise RuntimeError("crash")
        calls = [call("create_subagent", name="a", system_prompt="")] if len(messages) < 3 else []
        for index in range(1 + int(chance("calls") * max_calls)):
            if chance("kind", index) < 0.6:
                prompt = f"{prompt_of(messages)[-40:]}.{len(messages)}.{index}"
                calls.append(call("assign_task", agent="a", prompt=prompt))
            else:
                calls.append(call(LOOK))
        return Reply(calls=tuple(calls), prompt_tokens=7, cost=0.1)

    return script


@given(
    seed=st.integers(0, 10**9),
    steps=st.integers(1, 40),
    critical_steps=st.integers(1, 12),
    own=st.integers(1, 8),
    team=st.integers(1, 6),
    retries=st.integers(0, 1),
    max_parallel=st.integers(1, 4),
    max_assignments=st.integers(1, 20),
)
@settings(max_examples=80, deadline=None)
def test_no_budget_is_exceeded_by_even_one(
    seed, steps, critical_steps, own, team, retries, max_parallel, max_assignments
):
    trace = Trace()
    result = Orchestrator(
        ScriptedPolicy(unruly(seed)),
        [look],
        limits=Limits(steps=steps, critical_steps=critical_steps),
        own_limits=Limits(steps=own),
        team={
            "limits": Limits(steps=team),
            "retries": retries,
            "max_depth": 2,
            "max_parallel": max_parallel,
            "max_assignments": max_assignments,
        },
    ).run_sync("go", trace)
    taken = Counter(event["path"] for event in of_kind(trace.events, "step"))
    summary = summarise(trace.events)
    assert summary.total_steps == result.steps == sum(taken.values()) <= steps
    assert summary.critical_steps == result.critical_steps <= critical_steps
    assert taken.pop("0", 0) <= own
    assert max(taken.values(), default=0) <= team
    assert len([event for event in of_kind(trace.events, "assign") if event["attempt"] == 1]) <= max_assignments
    assert len(of_kind(trace.events, "assign")) == len(of_kind(trace.events, "result"))


@pytest.mark.parametrize("max_parallel", [1, 3, 50])
def test_max_parallel_holds_and_is_used(max_parallel):
    now = most = 0

    async def sub(messages, tools):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return RESTLESS if steps_taken(messages) < 2 else Reply("ok")

    run = Orchestrator(boss(["task"] * 20), [look], sub_policy=sub, team={"max_parallel": max_parallel})
    assert run.run_sync("go").steps == 3 + 20 * 3
    assert most == min(max_parallel, 20)


def test_places_are_given_back_by_those_who_fail():
    """With one place, an agent that hangs, one that crashes and one whose executor breaks: the last one gets it."""

    async def sub(messages, tools):
        if prompt_of(messages) == "hang":
            await asyncio.sleep(60)
        if prompt_of(messages) == "crash":
            raise RuntimeError("crash")
        return Reply("ok")

    async def executor(work, prompt):
        if prompt == "lost":
            raise ConnectionError("worker lost")
        return await work.run(prompt)

    trace = Trace()
    Orchestrator(
        boss(["hang", "crash", "lost", "fine"]),
        sub_policy=sub,
        team={"max_parallel": 1, "limits": Limits(seconds=0.05)},
        executor=executor,
    ).run_sync("go", trace)
    assert [event["reason"] for event in of_kind(trace.events, "result")] == [
        "limit of 0.05 seconds reached", "policy: RuntimeError: crash", "executor: ConnectionError: worker lost", ""
    ]  # fmt: skip


def test_a_place_given_to_one_who_is_cancelled_in_the_same_moment_is_not_lost():
    async def main():
        places = Places(1)

        async def visit():
            async with places:
                pass

        async with places:
            waiting = asyncio.ensure_future(visit())
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        async with asyncio.timeout(5):
            await visit()

    asyncio.run(main())


def test_depth_two_does_not_wait_for_its_own_place():
    todo = plan([plan([leaf(2), leaf(2)], [leaf(1)]), plan([leaf(3)]), leaf(2)])
    result, trace = followed(todo, team={"max_parallel": 1, "max_depth": 2})
    assert (result.answer, result.steps) == ("done", total(todo))
    assert len(of_kind(trace.events, "assign")) == 7


def test_max_assignments_over_all_depths():
    todo = plan([plan([leaf(1), leaf(1)]), plan([leaf(1), leaf(1)])])
    result, trace = followed(todo, team={"max_assignments": 4})
    assert result.done
    assert len(of_kind(trace.events, "assign")) == 4
    refused = [event["content"] for event in of_kind(trace.events, "observation")]
    assert refused == ["error: no more than 4 assignments"] * 2


def test_money_and_tokens_of_the_run_are_those_of_all():
    result, _ = followed(plan([leaf(2), leaf(3)]), limits=Limits(tokens=1000))
    assert (result.tokens, result.cost) == (7 * 5, 7 * 0.5)
    stopped, _ = followed(plan([leaf(9)] * 4), limits=Limits(money=4.0))
    assert stopped.reason == "limit of money reached"
    assert 4.0 <= stopped.cost < 4.0 + 4 * 0.5  # at most the steps under way go beyond
