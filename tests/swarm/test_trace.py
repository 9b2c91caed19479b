"""The trace: what is written, when, and what never is."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripts import LOOK, boss, follow, followed, leaf, lines, look, of_kind, plan, steps_taken, subs

from k25lite.swarm import DiscardAll, Limits, Orchestrator, Reply, ScriptedPolicy, ToolCall, Trace, call, read_trace
from k25lite.swarm import trace as module
from k25lite.swarm.critical import summarise
from k25lite.swarm.trace import Secrets, TraceError, encode, without_attempt


def documented() -> dict[str, set[str]]:
    """Event -> its fields, as the module's docstring names them."""
    bullets = re.findall(r"^- (.*(?:\n  .*)*)", module.__doc__ or "", re.MULTILINE)
    names = [re.findall("`([a-z_]+)`", bullet) for bullet in bullets]
    return {kind: set(fields) for kind, *fields in names}


def test_the_schema_is_what_is_written(tmp_path):
    """A run with every kind of event, killed and resumed: each event has the documented fields and no other."""
    path, dies, looked = tmp_path / "trace.jsonl", True, set[str]()

    def sub(prompt, step):
        if dies and prompt == "late":
            raise KeyboardInterrupt
        if prompt in looked:
            return "ok"
        looked.add(prompt)
        return Reply(calls=(call(LOOK),), reasoning="look first")

    def run():
        team = {"context": DiscardAll(1), "retries": 1}
        orchestrator = Orchestrator(
            boss(["early", "late"]), sub_policy=subs(sub), sub_tools=[look], limits=Limits(steps=50), team=team
        )
        return orchestrator.run_sync("task", Trace(path))

    with pytest.raises(KeyboardInterrupt):
        run()
    dies = False
    run()
    schema, seen = documented(), set()
    for event in lines(path):
        optional = {"reasoning"} - set(event)
        assert set(event) == {"t", "event"} | schema[event["event"]] - optional, event
        seen |= {event["event"], *({"reasoning"} & set(event))}
    assert seen == {*schema, "reasoning"}


def test_events_come_in_the_order_of_what_they_tell(tmp_path):
    path = tmp_path / "trace.jsonl"
    followed(plan([plan([leaf(2), leaf(1)]), leaf(3), leaf(1)], [leaf(2)]), Trace(path), team={"max_parallel": 2})
    events = lines(path)
    assert (events[0]["event"], events[-1]["event"]) == ("run", "end")
    assert [event["t"] for event in events] == sorted(event["t"] for event in events)
    state: dict[str, str] = {"0": "assign"}
    steps: dict[str, int] = {}
    for event in events[1:-1]:
        owner = event["path"]
        match event["event"]:
            case "assign":
                assert owner not in state
                assert state[event["parent"]] == "step"
            case "subagent":
                assert state[owner.rsplit(".", 2)[0]] == "step"
                continue
            case "step":
                assert state[owner] in ("assign", "step", "observation")
                assert event["step"] == steps.get(owner, 0) + 1
                steps[owner] = event["step"]
            case "observation":
                assert state[owner] in ("step", "observation")
                assert event["step"] == steps[owner]
            case "result":
                assert state[owner] == "step"
                assert event["steps"] == steps[owner]
        state[owner] = event["event"]
        assert event.get("began", 0) <= event["t"]


@pytest.mark.parametrize("tasks", [1, 3])
def test_results_are_on_disk_before_they_are_acted_on(tasks, tmp_path):
    path, read = tmp_path / "trace.jsonl", []

    def script(messages):
        events = lines(path)
        read.append([event["answer"] for event in of_kind(events, "result")])
        assert len([event for event in of_kind(events, "step") if event["path"] == "0"]) >= min(
            steps_taken(messages), 1
        )
        return boss(["x"] * tasks, "end").script(messages)

    Orchestrator(ScriptedPolicy(script), sub_policy=ScriptedPolicy(["found"])).run_sync("go", Trace(path))
    assert read == [[], [], ["found"] * tasks]


def test_a_step_is_on_disk_in_the_next_turn(tmp_path):
    path, seen = tmp_path / "trace.jsonl", []

    async def wait() -> str:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        seen.append(lines(path)[-1])
        return "waited"

    Orchestrator(ScriptedPolicy([Reply(calls=(call("wait"),)), "end"]), [wait]).run_sync("go", Trace(path))
    assert (seen[0]["event"], seen[0]["step"]) == ("step", 1)


ODD = ["\ud800", "a\udfffb\x00", "\x00\x1f\u2028\r\n\t", "NaN", '"}\n{"', "é漢😀", "\\", "\\ud800"]


@pytest.mark.parametrize("text", ODD)
def test_any_text_is_one_line_and_comes_back(text, tmp_path):
    path, dies = tmp_path / "trace.jsonl", True

    async def tell() -> str:
        return text

    def script(messages):
        if dies and steps_taken(messages) == 1:
            raise KeyboardInterrupt
        return Reply(text, calls=(ToolCall(text, "tell"),)) if len(messages) == 2 else "end"

    run = Orchestrator(ScriptedPolicy(script), [tell])
    with pytest.raises(KeyboardInterrupt):
        run.run_sync(f"task {text}", Trace(path))
    assert len(lines(path)) == 3
    trace = Trace(path)
    assert trace.reply("0", 1) == Reply(text, calls=(ToolCall(text, "tell"),))
    assert trace.observation("0", 1, 0) == text
    dies = False
    assert run.run_sync(f"task {text}", trace).answer == "end"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.characters(codec=None) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
@example(float("nan"))
@example([float("inf"), "\ud800"])
@settings(max_examples=60, deadline=None)
def test_any_event_is_strict_json(value):
    line = encode({"t": 0.0, "event": "step", "content": value, "other": object})
    assert "\n" not in line
    json.loads(line.encode().decode(), parse_constant=pytest.fail)


SECRETS = {
    "SOME_API_KEY": "plain-value-123",
    "DB_PASSWORD": 'qu"ote\\back',
    "MULTI_TOKEN": "line one\nline two é",
    "MY_SECRET": "<html>&amp;",
}
FORMED = [
    "sk-proj-AbCdEfGhIjKlMnOp1234",
    "hf_abcdefghijklmnopqrstuvwx",
    "ghp_0123456789abcdefABCDEF",
    "AIza" + "x" * 30,
]


@pytest.mark.parametrize("secret", [*SECRETS.values(), *FORMED, "Bearer abcdefghijklmnop.qrst"])
def test_secrets_are_never_written(secret, tmp_path, monkeypatch):
    """In the task, a prompt, an argument, what a tool says, as text and as JSON, an exception, an answer."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    path, heard = tmp_path / "trace.jsonl", []
    secret_part = secret.removeprefix("Bearer ")

    async def tell(how: str) -> object:
        return secret if how == "text" else {"found": [secret, f"\n{secret}"]}

    def sub(prompt, step):
        if "crash" in prompt:
            raise RuntimeError(f"401 for {secret}")
        calls = (call("tell", how="text"), call("tell", how="json"), ToolCall("", secret, json.dumps({secret: secret})))
        return Reply(f"thinking of {secret}", calls=calls) if step == 0 else f"it is {secret}"

    trace = Trace(path, listeners=(heard.append,))
    run = Orchestrator(
        boss([f"use {secret}", f"crash {secret}"], secret), [tell], sub_policy=subs(sub), system_prompt=f"key: {secret}"
    )
    assert run.run_sync(f"task with {secret}", trace).done
    text = path.read_bytes().decode()
    lines(path)
    escaped = json.dumps(secret_part)[1:-1]
    for form in (secret_part, escaped, json.dumps(escaped)[1:-1], json.dumps(secret_part, ensure_ascii=False)[1:-1]):
        assert form not in text
        assert form not in "\n".join(map(encode, heard))
    assert text.count("[secret]") >= 10


PRINTABLE = "".join(map(chr, range(32, 127)))


@pytest.mark.parametrize(
    "secret",
    [
        *(PRINTABLE[start : start + 20] for start in range(0, 90, 10)),
        "\r\v\f\b in between",
        "é漢😀 é漢😀 é漢😀",
        "A" * 10**5,
    ],
)
def test_secrets_of_any_characters_and_length_are_known(secret, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", secret)
    monkeypatch.setenv("BROKEN_TOKEN", "half a pair: \udcff")
    secrets = Secrets()
    for value in (secret, json.dumps([secret]), json.dumps([secret], ensure_ascii=False)):
        line = encode({"content": f"it is {value}."})
        assert secrets.may_be_in(line)
        assert "[secret]" in secrets.redact_line(line)
    line = encode({"content": "nothing é漢😀"})
    assert not secrets.may_be_in(line)
    assert secrets.redact_line(line) is line


@pytest.mark.parametrize(
    "text",
    ["https://x.org/task-decomposition-and-reconstruction", "risk-management-of-large-projects", "half_of_all_of_them_is",
     "the desk-sized-computer-of-1984", "Bearer of bad news", "sk-short"],
)  # fmt: skip
def test_what_only_looks_like_a_secret_is_kept(text, monkeypatch):
    monkeypatch.setenv("SHORT_KEY", "news")
    assert Secrets().redact(text) == text


def test_a_task_with_a_secret_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", SECRETS["DB_PASSWORD"])
    path, task = tmp_path / "trace.jsonl", f'use "{SECRETS["DB_PASSWORD"]}"'
    trace = Trace(path)
    trace.begin(task, {})
    trace.close()
    assert Orchestrator(ScriptedPolicy(["end"])).run_sync(task, Trace(path)).done


def test_listeners_hear_everything_in_order_and_can_end_the_run():
    heard, silent = [], Trace()
    followed(plan([leaf(2), leaf(1)]), Trace(listeners=(heard.append,)))
    followed(plan([leaf(2), leaf(1)]), silent)
    assert [(e["event"], e.get("path")) for e in heard] == [(e["event"], e.get("path")) for e in silent.events]

    def refuse(event):
        if event["event"] == "result":
            raise OSError("connection lost")

    with pytest.raises(TraceError, match="connection lost"):
        followed(plan([leaf(2), leaf(1)]), Trace(listeners=(refuse,)))


class Disk:
    """A file on a disk that takes `room` bytes, a few at a time."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = min(self.room, 100, len(data))
        self.room -= taken
        return self.file.write(data[:taken])

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_full_disk_ends_the_run_aloud(share, tmp_path, monkeypatch):
    """Wherever the disk is full, even in the last line: a TraceError, nothing left running, and what fits is a trace."""
    monkeypatch.setattr(Trace, "now", lambda self: 0.5)  # times of as many digits, so that both runs need the same room
    todo = plan([leaf(3), leaf(2), plan([leaf(2)])], [LOOK])
    followed(todo, Trace(tmp_path / "whole.jsonl"))
    whole = (tmp_path / "whole.jsonl").stat().st_size

    async def main():
        trace = Trace(tmp_path / "trace.jsonl")
        trace._file = Disk(trace._file, int(whole * share))
        run = Orchestrator(ScriptedPolicy(follow, 0.001), [look], team={"max_depth": 2})
        with pytest.raises(TraceError, match="No space left"):
            await run.run(json.dumps(todo), trace)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(TraceError, match="No space left"):
            trace.close()

    asyncio.run(main())
    list(read_trace(tmp_path / "trace.jsonl"))
    result, _ = followed(todo, Trace(tmp_path / "trace.jsonl"))
    assert (result.answer, result.steps) == ("done", summarise(lines(tmp_path / "trace.jsonl")).total_steps)


def test_a_file_that_may_not_grow_ends_the_run_aloud(tmp_path):
    """The operating system's own limit, in a process of its own."""
    script = """
import resource, sys
from k25lite.swarm import Orchestrator, Reply, ScriptedPolicy, Trace, call
from k25lite.swarm.trace import TraceError

async def look() -> str:
    return "seen"

resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
trace = Trace(sys.argv[1])
try:
    Orchestrator(ScriptedPolicy([Reply(calls=(call("look"),))] * 50 + ["end"]), [look]).run_sync("go", trace)
except TraceError as error:
    print("TraceError:", error)
"""
    path = tmp_path / "trace.jsonl"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"TraceError: {path}: [Errno 27]"), done
    assert done.stderr == ""
    assert path.stat().st_size == 3000


FOREIGN = {
    "notes.txt": b"do not lose me",
    "notes.md": b"# Notes\n\nmore\n",
    "data.json": b'{"t": 1}\n',
    "array.json": b"[1, 2]\n",
    "events.jsonl": b'{"t": 1.0, "event": "click", "path": "/"}\n{"t": 2.0, "event": "click", "path": "/"}\n',
    "step.jsonl": b'{"t": 1.0, "event": "step"}\n',
    "half.jsonl": b'{"t":0.0,"event":"run","version":1,"task":"t"}\n{"t":0.1,"event":"step","path":"0","step":1}\n',
    "garbage.jsonl": (
        b'{"t":0.0,"event":"run","version":1,"task":"t"}\n'
        b'{"t":0.1,"event":"step","path":"0","step":1,"content":null,"calls":[],"refusal":"","prompt_tokens":0,'
        b'"completion_tokens":0,"cost":0.0}\n'
    ),
    "endless.jsonl": b'{"t":Infinity,"event":"run","version":1,"task":"t"}\n',
    "twice.jsonl": b'{"t":0.0,"event":"run","version":1,"task":"t"}\n' * 2,
    "future.jsonl": b'{"t":0.0,"event":"run","version":2,"task":"t"}\n',
    "binary": bytes(range(256)) * 4,
    "digits": b'{"t":0.0,"event":"run","version":1,"task":"t","limits":' + b"1" * 5000 + b"}\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_and_left_alone(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FOREIGN[name])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Trace(path)
    assert path.read_bytes() == FOREIGN[name]


def test_another_task_or_an_ended_run_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "trace.jsonl"
    run = Orchestrator(ScriptedPolicy(["end"]))
    trace = Trace(path)
    trace.begin("task", {})
    trace.close()
    torn = path.read_bytes() + b'{"t":1.0,"event":"st'
    path.write_bytes(torn)
    with pytest.raises(ValueError, match="another task: 'task'"):
        run.run_sync("other", Trace(path))
    assert path.read_bytes() == torn
    assert run.run_sync("task", Trace(path)).done
    ended = path.read_bytes()
    with pytest.raises(ValueError, match="has ended"):
        run.run_sync("task", Trace(path))
    assert path.read_bytes() == ended


WRITES_FOR_A_MINUTE = """
import asyncio, sys
from k25lite.swarm import Orchestrator, Trace

async def policy(messages, tools):
    print("begun", flush=True)
    await asyncio.sleep(60)

Orchestrator(policy).run_sync("task", Trace(sys.argv[1]))
"""


def test_two_processes_do_not_write_one_trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    run, early = Orchestrator(ScriptedPolicy(["end"])), Trace(path)
    with subprocess.Popen(
        [sys.executable, "-c", WRITES_FOR_A_MINUTE, path], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "begun\n"
        written = path.read_bytes()
        with pytest.raises(ValueError, match=f"another run writes {path}"):
            run.run_sync("task", Trace(path))
        assert path.read_bytes() == written
        other.kill()
    with pytest.raises(ValueError, match="another run has written"):
        run.run_sync("task", early)
    assert run.run_sync("task", Trace(path)).done


def test_a_run_that_was_interrupted_leaves_its_trace_to_the_next(tmp_path):
    path, traces = tmp_path / "trace.jsonl", []
    for script in (lambda messages: (_ for _ in ()).throw(KeyboardInterrupt), ["end"]):
        traces.append(Trace(path))  # a notebook keeps the old one
        try:
            result = Orchestrator(ScriptedPolicy(script)).run_sync("task", traces[-1])
        except KeyboardInterrupt:
            continue
    assert result.done


def test_a_trace_takes_one_run(tmp_path):
    for trace in (Trace(), Trace(tmp_path / "trace.jsonl")):
        Orchestrator(ScriptedPolicy(["end"])).run_sync("task", trace)
        with pytest.raises(ValueError, match="one run"):
            Orchestrator(ScriptedPolicy(["end"])).run_sync("task", trace)


def test_a_closed_trace_says_so(tmp_path):
    trace = Trace(tmp_path / "trace.jsonl")
    trace.close()
    trace.close()
    with pytest.raises(TraceError, match="closed"):
        Orchestrator(ScriptedPolicy(["end"])).run_sync("task", trace)


@pytest.mark.parametrize("length", range(8))
def test_a_first_line_that_was_torn_begins_anew(length, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b'{"t":0.0,"event":"run"'[:length])
    assert Orchestrator(ScriptedPolicy(["end"])).run_sync("task", Trace(path)).done
    assert [event["event"] for event in lines(path)] == ["run", "step", "end"]


def test_the_time_of_a_run_begins_with_it_and_goes_on_after_a_kill(tmp_path):
    """Neither the time before the run counts, nor that between a kill and the next start; the limit is for both parts."""
    path = tmp_path / "trace.jsonl"
    trace = Trace(path)
    trace._origin -= 10**12
    trace.begin("task", {})
    trace.close()
    assert lines(path)[0]["t"] < 1
    with open(path, "a") as file:
        file.write('{"t":9.9,"event":"resume","at":"then"}\n')
    run = Orchestrator(ScriptedPolicy(["late"], 60), limits=Limits(seconds=10))
    assert run.run_sync("task", Trace(path)).reason == "limit of 10 seconds reached"
    assert 9.9 <= lines(path)[2]["t"] <= lines(path)[-1]["t"] < 12


def test_folders_are_made(tmp_path):
    Trace(tmp_path / "a" / "b" / "trace.jsonl").close()
    assert (tmp_path / "a" / "b" / "trace.jsonl").exists()
    with pytest.raises(OSError):  # noqa: PT011  (which one is up to the system)
        Trace(Path(os.devnull) / "trace.jsonl")


@pytest.mark.parametrize(
    ("path", "without"),
    [
        ("0", "0"),
        ("0.1.2", "0.1.2"),
        ("0.1.2#3", "0.1.2"),
        ("0.1.2#3.4.5", "0.1.2#3.4.5"),
        ("0.1.2#3.4.5#2", "0.1.2#3.4.5"),
    ],
)
def test_attempts_are_of_one_assignment(path, without):
    assert without_attempt(path) == without
