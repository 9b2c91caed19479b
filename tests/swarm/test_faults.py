"""What goes wrong in earnest: a thousand sub-agents of which a third fail, cancellation, and kill -9 with a resume."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import LOOK, critical, follow, followed, fraction, leaf, lines, look, of_kind, plan, total

from k25lite.swarm import Limits, Orchestrator, Reply, ScriptedPolicy, ToolCall, Trace, call
from k25lite.swarm.agent import MAX_CALLS
from k25lite.swarm.critical import summarise
from k25lite.swarm.trace import CANCELLED

MEGABYTE = "x" * 10**6
SECONDS = 10  # that a sub-agent has: enough for those that do their work, on a busy machine


async def look_slowly() -> str:
    await asyncio.sleep(60)
    return ""


async def break_down() -> str:
    raise OSError("broken")


async def flood() -> str:
    return MEGABYTE


async def misbehave(kind: str, step: int):
    """A step of a faulty sub-agent; what is not listed never ends."""
    match kind:
        case "crash":
            raise RuntimeError("crash")
        case "late crash":
            return Reply(calls=(call(LOOK),)) if step == 0 else [][0]
        case "cancel":
            raise asyncio.CancelledError
        case "none":
            return None
        case "empty":
            return Reply("")
        case "refusal":
            return Reply(refusal="I would rather not")
        case "300 calls":
            return Reply(calls=(call(LOOK),) * 300)
        case "unknown tool":
            return Reply(calls=(call("fly", to="the moon"), ToolCall("", "")))
        case "garbage":
            return Reply("\x00\ud800", calls=(ToolCall("", LOOK, '{"a": '), ToolCall("", LOOK, "\ud800")))
        case "tool crash":
            return Reply(calls=(call("break_down"),))
        case "megabyte":
            return Reply(calls=(call("flood"),)) if step == 0 else Reply(MEGABYTE)
        case "hanging tool":
            return Reply(calls=(call("look_slowly"), call(LOOK)))
    await asyncio.sleep(60)
    return Reply("late")


FAULTS = {
    "crash": "policy: RuntimeError: crash",
    "late crash": "policy: IndexError",
    "cancel": "policy: CancelledError",
    "none": "malformed: ",
    "empty": "malformed: ",
    "refusal": "refused: I would rather not",
    "300 calls": "malformed: 300 calls in one step",
    "unknown tool": "limit of steps reached",
    "garbage": "limit of steps reached",
    "tool crash": "limit of steps reached",
    "megabyte": "",  # a long answer is one
    "hanging tool": f"limit of {SECONDS} seconds reached",
    "hang": f"limit of {SECONDS} seconds reached",
}


def test_a_thousand_sub_agents_of_which_a_third_fail(tmp_path):
    """Every task ends exactly once, as done or failed with its reason; those who do their work are not held up."""
    kinds = [list(FAULTS)[:-2], list(FAULTS)]  # only in the last quarter some hang, which takes its time

    def kind_of(i):
        here = kinds[i >= 750]
        return here[i // 3 % len(here)] if i % 3 == 0 else "fine"

    tasks = [f"{i} {kind_of(i)}" for i in range(1000)]
    batches = [tasks[i : i + 250] for i in range(0, 1000, 250)]

    async def sub(messages, tools):
        number, kind = messages[1]["content"].split(" ", 1)
        step = (len(messages) - 2) // 2
        if kind != "fine":
            return await misbehave(kind, step)
        await asyncio.sleep(0.001)
        return Reply(calls=(call(LOOK),), prompt_tokens=1) if step == 0 else Reply(f"answer {number}", prompt_tokens=1)

    def script(messages):
        step = sum(message["role"] == "assistant" for message in messages)
        if step == 0:
            return Reply(calls=(call("create_subagent", name="a", system_prompt="Work."),))
        if step > len(batches):
            return "all"
        return Reply(calls=tuple(call("assign_task", agent="a", prompt=task) for task in batches[step - 1]))

    async def main(trace):
        run = Orchestrator(
            ScriptedPolicy(script),
            sub_policy=sub,
            sub_tools=[look, look_slowly, break_down, flood],
            limits=Limits(steps=5000, critical_steps=40),
            team={"limits": Limits(steps=4, seconds=SECONDS), "max_parallel": 250},
        )
        result = await run.run("go", trace)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    assert max(map(len, batches)) <= MAX_CALLS
    trace = Trace(tmp_path / "trace.jsonl")
    result = asyncio.run(main(trace))
    events = lines(tmp_path / "trace.jsonl")
    assert result.answer == "all"
    prompts = {event["path"]: event["prompt"] for event in of_kind(events, "assign")}
    assert sorted(prompts.values()) == sorted(tasks)
    ends = of_kind(events, "result")
    assert Counter(event["path"] for event in ends) == Counter(prompts.keys())
    for event in ends:
        number, kind = prompts[event["path"]].split(" ", 1)
        if kind == "fine":
            assert (event["status"], event["answer"], event["steps"]) == ("done", f"answer {number}", 2), event
        elif kind == "megabyte":
            assert (event["status"], len(event["answer"])) == ("done", 10**6)
        else:
            assert (event["status"], event["answer"]) == ("failed", "")
            assert event["reason"].startswith(FAULTS[kind])
        assert event["steps"] <= 4
    assert max(len(event["content"]) for event in of_kind(events, "observation")) < 30_000
    summary = summarise(events)
    assert (summary.total_steps, summary.critical_steps) == (result.steps, result.critical_steps)
    assert summary.parallelism == [250] * 4


def test_the_overall_time_ends_everything(tmp_path):
    """Sub-agents at two depths, tools and waiting assignments: nothing runs on, and all that began has a result."""
    path = tmp_path / "trace.jsonl"

    async def main():
        todo = plan([plan([leaf(9), leaf(9)]), leaf(9), plan([LOOK], [leaf(9)])] + [leaf(9)] * 5)
        run = Orchestrator(
            ScriptedPolicy(follow, 0.1),
            [look],
            limits=Limits(seconds=1),
            team={"max_parallel": 3, "max_depth": 2},
        )
        result = await run.run(json.dumps(todo), Trace(path))
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    result = asyncio.run(main())
    events = lines(path)
    assert (result.status, result.reason) == ("failed", "limit of 1 seconds reached")
    begun = Counter(event["path"] for event in of_kind(events, "assign"))
    assert len(begun) > 3
    assert begun == Counter(event["path"] for event in of_kind(events, "result"))
    assert {event["reason"] for event in of_kind(events, "result")} == {CANCELLED}
    assert summarise(events).critical_steps == result.critical_steps


def test_a_parents_time_ends_its_sub_agents_alone():
    """The sub-agent of depth 1 runs out of time: its own are cancelled, its sibling's are not, and retried it succeeds."""
    slow = [True]

    async def script(messages):
        prompt = json.loads(messages[1]["content"])
        if prompt["answer"] == "slow" and slow:
            slow.pop()
            await asyncio.sleep(60)
        return follow(messages)

    todo = plan([plan([leaf(1, "slow")]), plan([leaf(2)])])
    result, trace = followed(todo, script=script, team={"limits": Limits(seconds=1), "retries": 1, "max_depth": 2})
    ends = {event["path"]: event["reason"] for event in of_kind(trace.events, "result")}
    assert result.done
    assert ends.pop("0.1.1.1.1") in (CANCELLED, "limit of 1 seconds reached")
    assert [path for path, reason in ends.items() if reason] in (["0.1.1"], [])
    summary = summarise(trace.events)
    assert (result.steps, result.critical_steps) == (summary.total_steps, summary.critical_steps)


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03, 0.05, 0.08])
def test_a_cancelled_run_can_be_resumed(seconds, tmp_path):
    """Whoever runs it is cancelled: nothing runs on, all that began has a result, and the cancelled are taken up again."""
    todo = plan([plan([leaf(2, "x"), leaf(4)]), leaf(5), leaf(1)], [leaf(2)], answer="whole")
    run = Orchestrator(ScriptedPolicy(follow, 0.01), [look], team={"max_depth": 2, "max_parallel": 2})
    path = tmp_path / "trace.jsonl"

    async def main():
        task = asyncio.ensure_future(run.run(json.dumps(todo), Trace(path)))
        await asyncio.sleep(seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    if path.read_bytes():
        begun = of_kind(lines(path), "assign")
        assert {event["path"] for event in begun} == {event["path"] for event in of_kind(lines(path), "result")}
        going_on = summarise([*lines(path), {"t": 9.0, "event": "resume", "at": "now"}])
        cancelled = [event for event in of_kind(lines(path), "result") if event["reason"] == CANCELLED]
        assert (going_on.counts["failed"], going_on.counts["running"]) == (0, len(cancelled))
    recorded = (
        Counter((event["path"], event["step"]) for event in of_kind(lines(path), "step")) if seconds else Counter()
    )
    result = run.run_sync(json.dumps(todo), Trace(path))
    events = lines(path)
    assert (result.answer, result.steps, result.critical_steps) == ("whole", total(todo), critical(todo))
    taken = Counter((event["path"], event["step"]) for event in of_kind(events, "step"))
    assert max(taken.values()) == 1
    assert recorded <= taken
    summary = summarise(events)
    assert (summary.total_steps, summary.critical_steps) == (total(todo), critical(todo))
    assert set(summary.counts.values()) == {0, 6}


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_run_goes_on_from_any_byte(tmp_path_factory, seed, share):
    """A trace cut off anywhere, as by a kill: the same answer and counts, and nothing on record is done again."""
    path = tmp_path_factory.getbasetemp() / "any_byte.jsonl"
    todo = plan([plan([leaf(2), leaf(1)], [leaf(2)]), leaf(3), plan([LOOK, leaf(1)])], [LOOK, LOOK], [leaf(2), leaf(2)])
    taken: list[str] = []

    async def script(messages):
        await asyncio.sleep(0)
        key = f"{messages[1]['content']} {len(messages)}"
        if fraction(seed, key) < 0.1:
            raise RuntimeError("crash")
        taken.append(key)
        return follow(messages)

    def run():
        taken.clear()
        return followed(todo, Trace(path), script=script, team={"retries": 1, "max_parallel": 2})[0]

    path.unlink(missing_ok=True)
    expected = run()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    try:
        kept = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        if of_kind(kept, "end"):
            return
        assert run() == expected
        assert len(taken) == expected.steps - len(of_kind(kept, "step"))
        one, other = summarise(map(json.loads, whole.splitlines())), summarise(lines(path))
        assert (one.total_steps, one.critical_steps, one.counts) == (
            other.total_steps,
            other.critical_steps,
            other.counts,
        )
        for event in of_kind(lines(path), "result"):
            own = [step for step in of_kind(lines(path), "step") if step["path"] == event["path"]]
            spent = sum(step["prompt_tokens"] + step["completion_tokens"] for step in own)
            assert (event["steps"], event["tokens"]) == (len(own), spent)
        for kind in ("assign", "result", "step", "observation", "subagent"):
            keys = [(e["path"], e.get("step"), e.get("index")) for e in of_kind(lines(path), kind)]
            assert len(keys) == len(set(keys))
    finally:
        path.unlink()


def test_budgets_hold_across_a_resume(tmp_path):
    """What is on record counts from the start, though those who did it are only recalled one after another."""
    todo = plan([leaf(6), leaf(6), leaf(6)], answer="end")
    for steps, max_assignments in [(17, 10), (30, 2)]:
        path = tmp_path / f"{steps}.jsonl"
        options = {"limits": Limits(steps=steps), "team": {"max_assignments": max_assignments}}
        expected, _ = followed(todo, Trace(path), **options)
        whole = lines(path)
        # Its first sub-agents' last steps are lost, as if the last one had been the fastest.
        kept = [e for e in whole if not (e.get("path") in ("0.1.1", "0.1.2") and e.get("step", 0) > 2)]
        kept = [e for e in kept if e["event"] not in ("end", "result") and not (e.get("path") == "0" and e["step"] > 1)]
        path.write_text("".join(json.dumps(event) + "\n" for event in kept))
        result, _ = followed(todo, Trace(path), **options)
        assert result.answer == expected.answer == "end"
        assert len(of_kind(lines(path), "step")) == result.steps <= steps
        assert len(of_kind(lines(path), "assign")) <= max_assignments


def test_assignments_on_record_count_against_the_most_there_may_be(tmp_path):
    todo = plan([leaf(2), leaf(2)], [leaf(1)] * 3)
    path = tmp_path / "trace.jsonl"
    followed(todo, Trace(path), team={"max_assignments": 3})
    whole = path.read_text().splitlines(keepends=True)
    second = next(i for i, line in enumerate(whole) if '"path":"0","step":2' in line)
    path.write_text("".join(whole[:second]))
    assert followed(todo, Trace(path), team={"max_assignments": 3})[0].done
    assert len(of_kind(lines(path), "assign")) == 3


def test_an_agents_own_limit_holds_across_a_resume(tmp_path):
    path = tmp_path / "trace.jsonl"
    restless = ScriptedPolicy(lambda messages: Reply(calls=(call(LOOK),), completion_tokens=5))
    run = Orchestrator(restless, [look], own_limits=Limits(steps=5))
    first = run.run_sync("go", Trace(path))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    assert run.run_sync("go", Trace(path)) == first
    assert len(of_kind(lines(path), "step")) == 5


SCRIPT = """
import asyncio, os, sys
sys.path.insert(0, {folder!r})
from scripts import follow, look, prompt_of, steps_taken
from k25lite.swarm import Orchestrator, Trace

async def policy(messages, tools):
    await asyncio.sleep(0.01)
    with open(sys.argv[2], "a") as file:
        print(os.getpid(), steps_taken(messages) + 1, prompt_of(messages), file=file)
    return follow(messages)

run = Orchestrator(policy, [look], team={{"max_depth": 2, "max_parallel": 3, "retries": 1}})
run.run_sync(sys.argv[3], Trace(sys.argv[1]))
"""


def process(*arguments) -> subprocess.Popen:
    script = SCRIPT.format(folder=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)])


@pytest.mark.parametrize("seed", range(4))
def test_kill_and_resume(seed, tmp_path):
    """A process killed at random moments, its last line torn: the next one does what is left, and nothing else."""
    path, side, chance = tmp_path / "trace.jsonl", tmp_path / "side", random.Random(seed)
    # Each answer tells one sub-agent, and so one line of the side file, from another.
    deep = plan([leaf(3, "b"), leaf(6, "c")], [leaf(2, "d")], answer="a")
    task = json.dumps(plan([deep, leaf(9, "e"), leaf(4, "f"), leaf(7, "g")], [LOOK], [leaf(5, "h")], answer="whole"))
    kills = 0
    while True:
        running = process(path, side, task)
        if kills < 3:
            deadline = time.monotonic() + 30
            size = path.stat().st_size if path.exists() else 0
            while time.monotonic() < deadline and running.poll() is None:
                if path.exists() and path.stat().st_size > size:  # it has begun, or gone on
                    break
                time.sleep(0.001)
            time.sleep(chance.random() * 0.06)
            running.send_signal(signal.SIGKILL)
        running.wait(60)
        if of_kind(lines(path, torn=True), "end"):
            break
        assert running.returncode == -signal.SIGKILL
        kills += 1
        if chance.random() < 0.7:
            with open(path, "ab") as file:
                file.write(b'{"t":0.5,"event":"result","path":"0.1.1","st'[: chance.randrange(1, 40)])
    assert kills >= 1
    events = lines(path)
    end = events[-1]
    assert (end["event"], end["answer"]) == ("end", "whole")
    assert (end["steps"], end["critical_steps"]) == (total(json.loads(task)), critical(json.loads(task)))
    prompts = {event["path"]: event["prompt"] for event in of_kind(events, "assign")} | {"0": task}
    steps = [(prompts[event["path"]], event["step"]) for event in of_kind(events, "step")]
    assert len(steps) == len(set(steps)) == end["steps"]
    assert len(of_kind(events, "result")) == len(prompts) - 1
    taken = [line.split(" ", 2) for line in side.read_text().splitlines()]
    assert {(prompt, int(step)) for _, step, prompt in taken} == set(steps)
    assert len({tuple(step) for step in taken}) == len(taken)  # no process took a step twice
    # The steps of the turn of the loop in which a kill came may be taken again: one of each agent at work.
    assert len(taken) - len(steps) <= kills * 6
