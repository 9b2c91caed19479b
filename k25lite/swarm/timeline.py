"""A run as one page: its numbers, who worked when, the critical path, and every agent's whole conversation.

The page is one file that asks nothing of the network. What models and tools wrote is data on it, never markup: it stands in
one block of JSON, which the page's own script shows as text, and the page's policy lets no other script run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from k25lite.results import write_whole
from k25lite.swarm.critical import Assignment, Summary, critical_path, summarise
from k25lite.swarm.tools import cut
from k25lite.swarm.trace import Event, encode, read_trace

LONGEST_TEXT, TEXTS = 24_000, 64_000_000  # characters: an observation was cut before; a browser reads all of them


def timeline(events: Iterable[Event] | str | os.PathLike[str], out: Path, *, characters: int = TEXTS) -> Path:
    """Write the page of a run, ended or still going, to `out`, and return `out`.

    Args:
        events: the events of a trace, or its path.
        characters: of what was written, about so many are shown; the longest texts are cut first, none below 90.

    Raises:
        FileNotFoundError: no such trace. ValueError: it is none, or it is empty.
    """
    known = list(read_trace(events) if isinstance(events, (str, os.PathLike)) else events)
    if not known:
        raise ValueError("the trace is empty: the run has not begun")
    summary, numbers = summarise(known), dict[str, int]()
    agents = _agents(known, summary, numbers)
    resumed = [event["t"] for event in known if event["event"] == "resume"]
    wall = max(event["t"] for event in known)  # not that of the last: a worker tells what it did when it is done
    island = _as_island(
        {"wall": wall, "resumed": resumed, "agents": agents, "texts": _shortened([*numbers], characters)}
    )
    environment = Environment(loader=PackageLoader("k25lite.swarm", "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("timeline.html.j2").render(
        summary=summary,
        task=cut(summary.root.prompt, LONGEST_TEXT),
        answer=cut(summary.root.answer or summary.root.reason, LONGEST_TEXT),
        started=known[0]["started"],
        data=island,
        # Nobody who writes into the data can know the digest of the data.
        nonce=hashlib.sha256(island.encode("utf-8", "replace")).hexdigest(),
    )
    return write_whole(Path(out), page.encode("utf-8", "replace").decode())


def _shortened(texts: list[str], characters: int) -> list[str]:
    longest = LONGEST_TEXT
    while longest > 100 and sum(min(len(text), longest) for text in texts) > characters:
        longest //= 2
    return [cut(text, longest) for text in texts]


def _agents(events: Sequence[Event], summary: Summary, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """The assignments as the page needs them: parents first, each with its log of what happened, in order.

    Texts are told by their `numbers`, so that each is on the page once: agents share prompts, and answers stand twice.
    """

    def text(content: str) -> int:
        return numbers.setdefault(content, len(numbers))

    critical = {id(span) for span in critical_path(summary)}
    spans = {path: iter(assignment.spans) for path, assignment in summary.assignments.items()}
    logs: dict[str, list[dict[str, Any]]] = {path: [] for path in spans}
    made: dict[tuple[str, str], Event] = {}
    for event in events:
        kind, path = event["event"], event.get("path", "")
        entry = {key: value for key, value in event.items() if key != "path"}
        if kind == "subagent":
            path, step, index = path.rsplit(".", 2)
            made[path, event["name"]] = event
            entry = {"event": kind, "step": int(step), "index": int(index)}
        elif kind in ("step", "observation"):
            entry |= {"content": text(event["content"]), "critical": id(next(spans[path])) in critical}
            if kind == "step":
                entry["calls"] = [(name, text(arguments)) for _, name, arguments in event["calls"]]
        if kind in ("step", "observation", "subagent", "context"):
            logs[path].append(entry)
    places, found = dict[str, int](), []
    for assignment, depth in _in_order(summary.root):
        places[assignment.path] = len(places)
        maker = made.get((assignment.parent, assignment.agent), {})
        same = ("path", "agent", "attempt", "status", "steps", "critical_steps", "began", "ended")
        found.append(
            {key: getattr(assignment, key) for key in same}
            | {key: text(getattr(assignment, key)) for key in ("prompt", "answer", "reason")}
            | {"parent": places.get(assignment.parent, -1), "depth": depth, "log": logs[assignment.path]}
            | {"system_prompt": text(maker.get("system_prompt", "")), "tools": maker.get("tools", [])}
        )
    return found


def _in_order(root: Assignment) -> Iterator[tuple[Assignment, int]]:
    """Every assignment with its depth: in the order of the calls that set them to work, attempts one after another."""

    def place(assignment: Assignment) -> tuple[int, int]:
        return int(assignment.path.rpartition(".")[2].partition("#")[0]), assignment.attempt

    waiting = [(root, 0)]
    while waiting:
        assignment, depth = waiting.pop()
        yield assignment, depth
        stages = (sorted(assignment.stages[step], key=place) for step in sorted(assignment.stages))
        waiting += [(sub, depth + 1) for stage in stages for sub in stage][::-1]


def _as_island(data: Any) -> Markup:
    """JSON that cannot end the script element it stands in, whatever its texts hold."""
    return Markup(encode(data).translate({ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}))
