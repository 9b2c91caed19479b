"""A trace as OpenTelemetry spans, named as in the GenAI semantic conventions; `k25lite.` is what these have no name for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from importlib import import_module
from typing import Any

from k25lite.swarm.critical import ROOT
from k25lite.swarm.trace import CANCELLED, Event


def export(events: Iterable[Event], tracer_provider: Any = None, *, content: bool = False) -> None:
    """Make spans of a run, ended or still going, with the times at which things happened.

    Args:
        tracer_provider: by default the global one. content: whether prompts, answers, arguments and observations, which may
            be private, are exported too. Names of agents and tools and the reasons of failures always are.

    Raises:
        ModuleNotFoundError: OpenTelemetry is not installed.
    """
    try:
        otel = import_module("opentelemetry.trace")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("telemetry needs OpenTelemetry: pip install opentelemetry-sdk") from error
    tracer = otel.get_tracer("k25lite.swarm", tracer_provider=tracer_provider)
    agents, calls, origin = dict[str, Any](), dict[str, Any](), 0  # spans and last calls, by path; nanoseconds

    def begin(operation: str, name: str, event: Event, parent: str, attributes: Event) -> Any:
        given = {"gen_ai.operation.name": operation, "k25lite.path": event.get("path", ROOT), **attributes}
        context = otel.set_span_in_context(agents[parent]) if parent else None
        began = origin + round(event["began" if "began" in event else "t"] * 1e9)
        return tracer.start_span(f"{operation} {name}".strip(), context, attributes=given, start_time=began)

    for event in events:
        kind, path, failure, said = event["event"], event.get("path", ROOT), "", dict[str, Any]()
        if at := event.get("started") or event.get("at"):  # from a kill to the next start, a trace's clock stands still
            origin = round(datetime.fromisoformat(at).timestamp() * 1e9) - round(event["t"] * 1e9)
        now = origin + round(event["t"] * 1e9)
        if kind in ("run", "assign"):
            name, parent = event.get("agent", "orchestrator"), event.get("parent", "")
            named = {"gen_ai.agent.name": name, "k25lite.status": "running"}
            span = agents[path] = begin("invoke_agent", name, event, parent, named)
            said["gen_ai.input.messages"] = _message("user", event["task" if kind == "run" else "prompt"])
        elif kind == "step":
            calls[path], failure = event["calls"], event["refusal"] and f"refused: {event['refusal']}"
            used = {"gen_ai.usage.input_tokens": event["prompt_tokens"], "k25lite.cost": event["cost"]}
            span = begin("chat", "", event, path, used | {"gen_ai.usage.output_tokens": event["completion_tokens"]})
            said["gen_ai.output.messages"] = _message("assistant", event["content"])
        elif kind == "observation":
            identity, name, arguments = calls[path][event["index"]]
            span = begin("execute_tool", name, event, path, {"gen_ai.tool.name": name, "gen_ai.tool.call.id": identity})
            failure = event["content"] if event["content"].startswith("error:") else ""
            said |= {"gen_ai.tool.call.arguments": arguments, "gen_ai.tool.call.result": event["content"]}
        elif kind in ("result", "end"):
            span, failure = agents[path], event["reason"]
            for name in ("status", "steps", "critical_steps", "tokens", "cost"):
                span.set_attribute(f"k25lite.{name}", event[name])
            said["gen_ai.output.messages"] = _message("assistant", event["answer"])
        else:
            continue
        if content:
            span.set_attributes(said)
        elif failure.startswith(("refused:", "error:")):
            failure = failure.partition(":")[0]
        if failure:
            span.set_status(otel.Status(otel.StatusCode.ERROR, failure))
        elif kind in ("result", "end"):
            span.set_status(otel.Status(otel.StatusCode.OK))
        if kind not in ("run", "assign") and failure != CANCELLED:  # who is cancelled may yet go on
            span.end(now)
    for span in [span for span in reversed(agents.values()) if span.is_recording()]:
        span.end(now)


def _message(role: str, text: str) -> str:
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]}], ensure_ascii=False)
