import json
from datetime import datetime

import pytest

from k25lite.swarm import Orchestrator, Reply, ScriptedPolicy, Trace, call
from k25lite.swarm.telemetry import export
from k25lite.swarm.trace import CANCELLED

SECRET = "a private matter"


def orchestrate(messages):
    step = sum(message["role"] == "assistant" for message in messages)
    if step == 0:
        names = ("good", "broken", "mute")
        return Reply(calls=tuple(call("create_subagent", name=name, system_prompt=SECRET) for name in names))
    if step == 1:
        names = ("good", "broken", "mute")
        return Reply(calls=tuple(call("assign_task", agent=name, prompt=f"{name}: {SECRET}") for name in names))
    return Reply(SECRET, prompt_tokens=100, completion_tokens=7, cost=0.5)


def work(messages):
    task, step = messages[1]["content"], sum(message["role"] == "assistant" for message in messages)
    if "broken" in task:
        raise ConnectionError("endpoint down")
    if "mute" in task:
        return Reply(refusal=SECRET)
    return Reply(SECRET) if step else Reply(calls=(call("read", page=SECRET), call("lose", page=SECRET)))


def read(page: str) -> str:
    """Read."""
    return page


def lose(page: str) -> str:
    """Lose."""
    raise OSError(page)


@pytest.fixture
def events():
    trace = Trace()
    policies = {"sub_policy": ScriptedPolicy(work), "sub_tools": [read, lose]}
    Orchestrator(ScriptedPolicy(orchestrate), **policies, team={"retries": 1}).run_sync(SECRET, trace)
    return trace.events


@pytest.fixture
def spans_of():
    """What `export` makes of events, in the order in which the spans end."""
    needs = "needs opentelemetry-sdk"
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=needs)
    exporting = pytest.importorskip("opentelemetry.sdk.trace.export", reason=needs)
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=needs)

    def spans(events, **options):
        exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
        provider.add_span_processor(exporting.SimpleSpanProcessor(exporter))
        export(events, provider, **options)
        return exporter.get_finished_spans()

    return spans


def test_spans_nest_as_the_run_did(events, spans_of):
    spans = spans_of(events)
    names = {span.context.span_id: span.name for span in spans}
    tree = [(span.name, names.get(span.parent.span_id) if span.parent else None) for span in spans]
    agents = [name for name, _ in tree if name.startswith("invoke_agent")]
    assert sorted(agents) == [
        *["invoke_agent broken"] * 2,
        "invoke_agent good",
        *["invoke_agent mute"] * 2,
        "invoke_agent orchestrator",
    ]
    assert tree[-1] == ("invoke_agent orchestrator", None)
    assert ("invoke_agent good", "invoke_agent orchestrator") in tree
    assert ("execute_tool read", "invoke_agent good") in tree
    assert tree.count(("chat", "invoke_agent good")) == 2
    assert tree.count(("chat", "invoke_agent orchestrator")) == 3
    assert len({span.context.trace_id for span in spans}) == 1


def test_spans_have_the_attributes_of_the_conventions_and_the_times_of_the_run(events, spans_of):
    spans = spans_of(events)
    last = [span for span in spans if span.name == "chat"][-1]
    assert last.attributes["gen_ai.operation.name"] == "chat"
    assert last.attributes["gen_ai.usage.input_tokens"] == 100
    assert last.attributes["gen_ai.usage.output_tokens"] == 7
    run = spans[-1]
    assert run.attributes["gen_ai.agent.name"] == "orchestrator"
    assert run.attributes["k25lite.critical_steps"] == events[-1]["critical_steps"]
    (tool,) = [span for span in spans if span.name == "execute_tool lose"]
    assert tool.attributes["gen_ai.tool.name"] == "lose"
    assert tool.attributes["gen_ai.tool.call.id"] == "call_1_1"

    step = next(event for event in reversed(events) if event["event"] == "step")
    started = datetime.fromisoformat(events[0]["started"]).timestamp()
    assert last.start_time / 1e9 == pytest.approx(started + step["began"] - events[0]["t"], abs=1e-4)
    assert last.end_time / 1e9 == pytest.approx(started + step["t"] - events[0]["t"], abs=1e-4)
    for span in spans:
        assert run.start_time <= span.start_time <= span.end_time <= run.end_time


def test_failures_are_errors_with_their_reason(events, spans_of):
    found = {}
    for span in spans_of(events):
        if span.status.status_code.name == "ERROR":
            found.setdefault(span.name, set()).add(span.status.description)
    assert found == {
        "invoke_agent broken": {"policy: ConnectionError: endpoint down"},
        "invoke_agent mute": {"refused"},
        "chat": {"refused"},
        "execute_tool lose": {"error"},
    }


def test_what_was_said_is_exported_only_if_it_is_asked_for(events, spans_of):
    assert SECRET not in "".join(span.to_json() for span in spans_of(events))
    spans = spans_of(events, content=True)
    (message,) = json.loads(spans[-1].attributes["gen_ai.output.messages"])
    assert message == {"role": "assistant", "parts": [{"type": "text", "content": SECRET}]}
    (message,) = json.loads(spans[-1].attributes["gen_ai.input.messages"])
    assert message["role"] == "user"
    (tool,) = [span for span in spans if span.name == "execute_tool read"]
    assert json.loads(tool.attributes["gen_ai.tool.call.arguments"]) == {"page": SECRET}
    assert tool.attributes["gen_ai.tool.call.result"] == SECRET
    (tool,) = [span for span in spans if span.name == "execute_tool lose"]
    assert SECRET in tool.status.description


def test_a_run_that_goes_on_after_a_kill_has_the_pause_in_it(events, spans_of):
    middle = next(i for i, event in enumerate(events) if event["event"] == "assign") + 1
    resume = {"t": events[middle - 1]["t"], "event": "resume", "at": "2100-01-01T00:00:00+00:00"}
    spans = spans_of([*events[:middle], resume, *events[middle:]])
    run, year = spans[-1], 1e9 * 365 * 24 * 3600
    assert run.end_time - run.start_time > 50 * year
    assert all(span.end_time - span.start_time < 1e9 for span in spans if span.name == "chat")


def test_who_is_cancelled_may_go_on(events, spans_of):
    done = next(i for i, event in enumerate(events) if event["event"] == "result" and event["status"] == "done")
    cancelled = events[done] | {"status": "failed", "reason": CANCELLED, "answer": ""}
    resume = {"t": cancelled["t"], "event": "resume", "at": "2100-01-01T00:00:00+00:00"}
    for goes_on, code in ((True, "OK"), (False, "ERROR")):
        after = [resume, *events[done:]] if goes_on else events[done + 1 :]
        (span,) = [span for span in spans_of([*events[:done], cancelled, *after]) if span.name == "invoke_agent good"]
        assert span.status.status_code.name == code
        assert span.attributes["k25lite.status"] == ("done" if goes_on else "failed")


def test_a_run_that_has_not_ended_is_exported_as_far_as_it_went(events, spans_of):
    past = max(i for i, event in enumerate(events) if event["event"] == "assign")
    spans = spans_of(events[: past + 1])
    running = [
        span.attributes["gen_ai.agent.name"] for span in spans if span.attributes.get("k25lite.status") == "running"
    ]
    assert running[-1] == "orchestrator"
    assert len(running) >= 2


def test_without_opentelemetry_the_package_is_named(events, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("k25lite.swarm.telemetry.import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install opentelemetry-sdk"):
        export(events)
