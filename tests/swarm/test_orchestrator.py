"""The orchestrator: sub-agents made and set to work at the same time, their contexts apart, only results coming back."""

import asyncio
import gc
import json

import pytest
from scripts import LOOK, boss, followed, leaf, look, of_kind, plan, prompt_of, steps_taken, subs, told

from k25lite.swarm import Limits, Orchestrator, Reply, Result, ScriptedPolicy, ToolCall, Trace, call
from k25lite.swarm.orchestrator import PROMPT


def test_tasks_of_one_turn_are_worked_on_at_the_same_time():
    """Three sub-agents that only go on once all three have begun."""

    async def main():
        all_here = asyncio.Barrier(3)

        async def sub(messages, tools):
            async with asyncio.timeout(10):
                await all_here.wait()
            return Reply(prompt_of(messages).upper())

        return await Orchestrator(boss(["a", "b", "c"]), sub_policy=sub).run("go")

    assert json.loads(asyncio.run(main()).answer) == ["A", "B", "C"]  # in the order of the calls


def test_contexts_are_apart_and_only_results_come_back():
    contexts = []

    def sub(messages):
        contexts.append([message["content"] for message in messages])
        return Reply("thinking", (call(LOOK),)) if steps_taken(messages) == 0 else "short answer"

    def script(messages):
        contexts.append([message["content"] for message in messages])
        return boss(["one", "two"], "end").script(messages)

    Orchestrator(ScriptedPolicy(script), [look], sub_policy=ScriptedPolicy(sub)).run_sync("go")
    assert ["Work.", "one"] in contexts
    assert ["Work.", "two", "thinking", "seen"] in contexts
    assert contexts[-1] == [PROMPT, "go", "", "created a", "", "short answer", "short answer"]


def test_an_agent_may_be_set_to_work_again_and_knows_nothing_of_before():
    seen = []

    def sub(prompt, step):
        seen.append((prompt, step))
        return prompt.upper()

    def script(messages):
        step = steps_taken(messages)
        return boss(["first"]).script(messages) if step < 2 else (
            Reply(calls=(call("assign_task", agent="a", prompt="second"),)) if step == 2 else told(messages)[0]
        )  # fmt: skip

    assert Orchestrator(ScriptedPolicy(script), sub_policy=subs(sub)).run_sync("go").answer == "SECOND"
    assert seen == [("first", 0), ("second", 0)]


def test_mistakes_of_the_orchestrator_are_told_to_it():
    calls = (
        call("create_subagent", name="a", system_prompt="s"),
        call("create_subagent", name="a", system_prompt="s"),
        call("create_subagent", name="b"),
        call("create_subagent", name="c", system_prompt="s", path="0.9.9"),
        call("assign_task", agent="nobody", prompt="p"),
        call("assign_task", agent="a"),
        call("assign_task", agent="a", prompt="p", by="me"),
        ToolCall("", "assign_task", "{"),
    )

    def script(messages):
        return Reply(calls=calls) if len(messages) == 2 else json.dumps(told(messages))

    trace = Trace()
    answers = json.loads(Orchestrator(ScriptedPolicy(script)).run_sync("go", trace).answer)
    assert answers[0] == "created a"
    assert all(answer.startswith("error: ") for answer in answers[1:])
    for words, answer in zip(
        ["already", "system_prompt: Field required", "path: Extra", "nobody", "prompt: Field", "by: Extra", "JSON"],
        answers[1:],
        strict=True,
    ):
        assert words in answer
    assert len(of_kind(trace.events, "subagent")) == 1
    assert [event["content"] for event in of_kind(trace.events, "observation")] == answers[1:]
    assert not of_kind(trace.events, "assign")


def test_an_answer_that_reads_like_an_error_is_an_answer():
    trace = Trace()
    run = Orchestrator(boss(["x"]), sub_policy=ScriptedPolicy(["error: 404 is what the page says"]))
    assert run.run_sync("go", trace).answer == '["error: 404 is what the page says"]'
    assert not of_kind(trace.events, "observation")
    assert of_kind(trace.events, "result")[0]["status"] == "done"


def test_sub_agents_set_others_to_work_only_where_allowed():
    offered = set()

    async def sub(messages, tools):
        offered.add(tuple(tool["function"]["name"] for tool in tools))
        if steps_taken(messages):
            return Reply(told(messages)[0])
        return Reply(calls=(call("create_subagent", name="mine", system_prompt="s"),))

    run = Orchestrator(boss(["x"]), [look], sub_policy=sub)
    assert "no tool 'create_subagent'" in run.run_sync("go").answer
    assert offered == {(LOOK,)}
    offered.clear()
    run = Orchestrator(boss(["x"]), [look], sub_policy=sub, team={"max_depth": 2})
    assert run.run_sync("go").answer == '["created mine"]'
    assert offered == {(LOOK, "create_subagent", "assign_task")}


def test_names_are_those_of_one_agent():
    """Two sub-agents each make an "a" of their own, and the orchestrator has one."""
    result, trace = followed(plan([plan([leaf(1)]), plan([leaf(2)])]))
    assert result.done
    assert [event["name"] for event in of_kind(trace.events, "subagent")] == ["a"] * 3


def test_sub_agents_have_their_own_tools_and_policy():
    async def dig() -> str:
        return "dug"

    def sub(prompt, step):
        return Reply(calls=(call("dig"), call(LOOK))) if step == 0 else "ok"

    trace = Trace()
    Orchestrator(boss(["x"]), [look], sub_policy=subs(sub), sub_tools=[dig]).run_sync("go", trace)
    assert [event["content"] for event in of_kind(trace.events, "observation")] == [
        "dug", "error: no tool 'look'; there are: dig"
    ]  # fmt: skip


@pytest.mark.parametrize("retries", [0, 2])
def test_failed_assignments_are_begun_again(retries):
    tries = []

    def sub(prompt, step):
        tries.append(step)
        if step == 0:
            return Reply(calls=(call(LOOK),))
        return "third time lucky" if len(tries) == 6 else Reply(refusal="no")

    trace = Trace()
    run = Orchestrator(boss(["x"]), [look], sub_policy=subs(sub), team={"retries": retries})
    answer = "third time lucky" if retries == 2 else "failed: refused: no"
    assert json.loads(run.run_sync("go", trace).answer) == [answer]
    assert tries == [0, 1] * (retries + 1)
    assert [(e["path"], e["attempt"]) for e in of_kind(trace.events, "assign", "result")] == [
        (path, attempt)
        for path, attempt in [("0.2.0", 1), ("0.2.0#2", 2), ("0.2.0#3", 3)][: retries + 1]
        for _ in ("assign", "result")
    ]


def test_no_attempt_is_begun_that_could_take_no_step():
    trace = Trace()
    policy = ScriptedPolicy(lambda messages: Reply(calls=(call(LOOK),)))
    limits = Limits(critical_steps=6)
    Orchestrator(boss(["x"], "end"), [look], sub_policy=policy, limits=limits, team={"retries": 5}).run_sync(
        "go", trace
    )
    assert [event["steps"] for event in of_kind(trace.events, "result")] == [3]


def test_an_executor_may_work_elsewhere():
    async def elsewhere(work, prompt):
        await asyncio.sleep(0)
        work.account.pay(10, 0.5, 4)
        return Result("done", f"{prompt} at {work.path}", steps=4, critical_steps=4, tokens=10, cost=0.5)

    result = Orchestrator(boss(["x", "y"]), executor=elsewhere).run_sync("go")
    assert json.loads(result.answer) == ["x at 0.2.0", "y at 0.2.1"]
    assert (result.steps, result.critical_steps, result.tokens, result.cost) == (3 + 8, 3 + 4, 20, 1.0)


def test_an_executor_that_fails_fails_its_assignment():
    async def broken(work, prompt):
        if prompt == "x":
            raise ConnectionError("worker lost")
        if prompt == "y":
            raise asyncio.CancelledError("their own")
        return await work.run(prompt)

    run = Orchestrator(boss(["x", "y", "z"]), sub_policy=ScriptedPolicy(["ok"]), executor=broken)
    reasons = ("ConnectionError: worker lost", "CancelledError: their own")
    assert json.loads(run.run_sync("go").answer) == [*(f"failed: executor: {reason}" for reason in reasons), "ok"]


@pytest.mark.parametrize("wrong", [{"max_parallel": 0}, {"max_depth": 0}, {"max_assignments": 0}, {"retries": -1}])
def test_a_team_has_room(wrong):
    with pytest.raises(ValueError, match=rf"a team's {next(iter(wrong))} is [01] or more, got -?[01]$"):
        Orchestrator(ScriptedPolicy([]), team=wrong)


def test_runs_at_the_same_time_do_not_meet():
    """As PARL rolls out: one orchestrator, many runs in one loop."""

    async def main():
        run = Orchestrator(boss(["x", "y"]), sub_policy=ScriptedPolicy(lambda m: prompt_of(m), 0.001))
        traces = [Trace() for _ in range(20)]
        results = await asyncio.gather(*[run.run(f"task {i}", trace) for i, trace in enumerate(traces)])
        assert {result.answer for result in results} == {'["x", "y"]'}
        assert {(result.steps, result.critical_steps) for result in results} == {(5, 4)}
        assert [trace.events[0]["task"] for trace in traces] == [f"task {i}" for i in range(20)]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


@pytest.fixture
def thresholds():
    """Sets those of the garbage collector; they are as before at the end."""
    before = gc.get_threshold()
    yield gc.set_threshold
    gc.set_threshold(*before)


@pytest.mark.parametrize(("given", "meanwhile"), [(700, 50_000), (10**6, 10**6), (0, 0)])
def test_garbage_is_looked_for_less_often_only_while_runs_go_on(given, meanwhile, thresholds):
    """Runs that overlap, one of which is cancelled."""
    seen = []

    async def policy(messages, tools):
        await asyncio.sleep(0.001 * len(messages[-1]["content"]))
        seen.append(gc.get_threshold())
        return Reply("ok")

    async def main():
        run = Orchestrator(policy)
        runs = [asyncio.create_task(run.run("x" * length)) for length in (1, 20, 60)]
        await runs[1]
        runs[2].cancel()
        await asyncio.wait(runs)

    thresholds(given, 7, 3)
    asyncio.run(main())
    assert seen == [(meanwhile, 7, 3)] * 2
    assert gc.get_threshold() == (given, 7, 3)
