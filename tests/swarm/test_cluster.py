"""The same swarm on Ray: the same results and the same trace, and a worker that dies costs one assignment."""

import asyncio
import os
import signal
import sys
import tempfile
import time
from functools import partial

import pytest
from scripts import LOOK, look, of_kind

from k25lite.swarm import Limits, Orchestrator, Reply, ScriptedPolicy, Trace, call
from k25lite.swarm.cluster import RayExecutor, elsewhere, work_apart
from k25lite.swarm.critical import summarise

ray = pytest.importorskip("ray", reason="needs ray")


@pytest.fixture(scope="module")
def executor():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    # Its sockets lie here, whose names must be shorter than what pytest has to offer.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        executor = RayExecutor()
        yield executor
        executor.close()


def boss_of(tasks):
    def boss(messages):
        said = sum(message["role"] == "tool" for message in messages)
        if not said:
            return Reply(calls=(call("create_subagent", name="worker", system_prompt="Work."),))
        if said == 1:
            return Reply(calls=tuple(call("assign_task", agent="worker", prompt=task) for task in tasks))
        return " ".join(message["content"] for message in messages if message["role"] == "tool")

    return ScriptedPolicy(boss)


def double(x: int) -> int:
    """Twice a number."""
    return 2 * x


async def worker(messages, tools):
    """Doubles the number it is given; "die" kills its process, "sleep" takes long."""
    task = messages[1]["content"]
    if task.startswith("die"):
        once = task.split()[1]
        if not os.path.exists(once):
            open(once, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return Reply("survived", completion_tokens=1)
    if task == "sleep":
        time.sleep(600)
    if len(messages) == 2:
        return Reply(calls=(call("double", x=int(task)),), prompt_tokens=10, completion_tokens=2)
    return Reply(messages[-1]["content"], prompt_tokens=20, completion_tokens=1)


def test_a_swarm_on_ray_does_what_it_does_here(executor):
    tasks = ["1", "2", "3", "x"]
    results, summaries = [], []
    for options in ({}, {"executor": executor}):
        trace = Trace()
        swarm = Orchestrator(boss_of(tasks), sub_policy=worker, sub_tools=[double], **options)
        results.append(swarm.run_sync("double them", trace))
        summaries.append(summarise(trace.events))
    assert results[0] == results[1]
    assert "created worker 2 4 6 failed: policy: ValueError" in results[0].answer
    here, there = summaries
    assert here.assignments.keys() == there.assignments.keys()
    assert here.counts == there.counts == {"done": 3, "failed": 1, "running": 0}
    assert (here.critical_steps, here.total_steps, here.tokens) == (
        there.critical_steps,
        there.total_steps,
        there.tokens,
    )
    for path, assignment in there.assignments.items():
        assert assignment.answer == here.assignments[path].answer
        for span in assignment.spans:
            assert 0 <= span.began <= span.ended <= there.wall + 1


def test_a_worker_that_dies_fails_its_assignment_alone(executor, tmp_path):
    tasks = ["1", f"die {tmp_path / 'once'}", "3"]
    trace = Trace()
    result = Orchestrator(boss_of(tasks), sub_policy=worker, sub_tools=[double], executor=executor).run_sync(
        "go", trace
    )
    assert result.answer.startswith("created worker 2 failed: worker: ")
    assert result.answer.endswith(" 6")
    assert summarise(trace.events).counts == {"done": 2, "failed": 1, "running": 0}


def test_a_retry_begins_it_again(executor, tmp_path):
    swarm = Orchestrator(
        boss_of([f"die {tmp_path / 'once'}"]), sub_policy=worker, team={"retries": 1}, executor=executor
    )
    trace = Trace()
    assert swarm.run_sync("go", trace).answer == "created worker survived"
    attempts = [(e["path"], e["attempt"], e["status"]) for e in trace.events if e["event"] == "result"]
    assert attempts == [("0.2.0", 1, "failed"), ("0.2.0#2", 2, "done")]


@pytest.mark.timeout(240)
def test_limits_of_the_run_end_what_works_elsewhere(executor):
    swarm = Orchestrator(boss_of(["sleep", "1"]), sub_policy=worker, limits=Limits(seconds=8), executor=executor)
    trace = Trace()
    result = swarm.run_sync("go", trace)
    assert result.reason == "limit of 8 seconds reached"
    assert all(a.status != "running" for a in summarise(trace.events).assignments.values())


def test_only_the_orchestrator_spawns(executor):
    swarm = Orchestrator(boss_of(["1"]), sub_policy=worker, team={"max_depth": 2}, executor=executor)
    assert "max_depth must be 1" in swarm.run_sync("go").answer


async def apart(work, prompt):
    """An executor for whose workers other accounts do not exist, in threads."""
    return await elsewhere(work, prompt, partial(asyncio.to_thread, work_apart))


@pytest.mark.parametrize(
    ("limits", "taken"),
    [(Limits(steps=9), [6]), (Limits(money=0.7), [5]), (Limits(tokens=70), [5]), (Limits(steps=9, money=0.5), [3])],
)
def test_an_assignment_has_what_the_run_has_left_and_does_not_begin_with_nothing(limits, taken):
    """Two agents that never end, one after the other: the second finds nothing left, and one step is the orchestrator's."""
    restless = ScriptedPolicy(lambda messages: Reply(calls=(call(LOOK),), prompt_tokens=10, cost=0.1))
    team, trace = {"max_parallel": 1}, Trace()
    paid = [Reply("", reply.calls, prompt_tokens=10, cost=0.1) for reply in (made(), made(2))]
    swarm = Orchestrator(
        ScriptedPolicy([*paid, "answer"]), [look], sub_policy=restless, limits=limits, team=team, executor=apart
    )
    result = swarm.run_sync("go", trace)
    ends = of_kind(trace.events, "result")
    assert [end["steps"] for end in ends] == [*taken, 0]
    assert all(end["reason"].startswith("limit of ") for end in ends)
    if limits.money is None and limits.tokens is None:
        assert result.answer == "answer"


def made(assignments=0):
    """The reply that makes an agent, or sets it to work so often."""
    if not assignments:
        return Reply(calls=(call("create_subagent", name="a", system_prompt="Look."),))
    return Reply(calls=tuple(call("assign_task", agent="a", prompt="look") for _ in range(assignments)))
