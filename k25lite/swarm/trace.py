"""The trace of a run: one JSON object to a line, written as it happens, from which a killed run goes on.

Every event has `t` (seconds since the run began, without the time between a kill and the next start) and `event`:

- `run`: `task`, `limits`, `started` (wall clock), `version` of this schema. `resume`: the run goes on after a kill.
- `subagent`: the call `path` made the sub-agent `name` with `system_prompt` and `tools`.
- `assign`: `path` begins to work for `parent` as `agent` on `prompt`; `attempt` counts from 1.
- `step`: `path` took its step number `step`, which `began` at: `content`, `calls` [id, name, arguments], `refusal`,
  `prompt_tokens`, `completion_tokens`, `cost`.
- `observation`: what `path` was told of call `index` of its step `step`: `tool`, `began`, `content`; not of a sub-agent
  made or an assignment ended, which events of their own tell.
- `context`: `path` shortened its context before step `step`: `kept` messages of `of`.
- `result`: the assignment `path` ended: `status` done or failed, `answer`, `reason`, `attempt`, `steps`,
  `critical_steps`, `tokens`, `cost`.
- `end`: so did the run: the same.

A `path` says where an agent comes from: "0" is the orchestrator, "0.3.1" the agent that call 1 of its step 3 set to work.
Lines reach the disk before anybody can act on what they say. Known secrets are left out (see `redact`).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import PydanticSerializationError, to_json

from k25lite.swarm.policy import Reply, ToolCall

VERSION = 1
Event = dict[str, Any]
_SECRET_NAMES = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_SECRET_MARKS = ("sk-", "sk_", "hf_", "ghp_", "xoxb-", "xoxp-", "Bearer ")
_SECRET_FORMS = rf"(?:{'|'.join(_SECRET_MARKS)})[A-Za-z0-9._~+/=-]{{16,}}"


class TraceError(Exception):
    """The trace cannot be written, so the run must not go on."""


def without_attempt(path: str) -> str:
    """The path of an assignment, whichever attempt at it this one is."""
    return path[: path.index("#", path.rindex("."))] if "#" in path.rpartition(".")[2] else path


class Secrets:
    """What must not be written: values of environment variables named like secrets, and strings formed like keys."""

    def __init__(self) -> None:
        named = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name) and len(value) >= 8}
        self.marks = (*named, *_SECRET_MARKS)
        longest_first = sorted(named, key=len, reverse=True)
        self.pattern = re.compile("|".join([*map(re.escape, longest_first), _SECRET_FORMS]))

    def redact(self, text: str) -> str:
        # Searching for plain strings is much faster than the pattern, and nearly always all there is to do.
        return self.pattern.sub("[secret]", text) if any(mark in text for mark in self.marks) else text


def redact(text: str) -> str:
    """`text` without secrets, as they are known now."""
    return Secrets().redact(text)


def encode(event: Event) -> str:
    """One line of JSON. What JSON has no form for is written as text, and half a surrogate pair as its escape."""
    try:
        return to_json(event, fallback=str).decode()
    except PydanticSerializationError:
        return json.dumps(event, default=str)


class Trace:
    """Events to a file, to listeners, and back.

    Args:
        path: appended to. If it holds a run already, what happened there is recalled instead of done again. None keeps the
            events in memory.
        listeners: called with every event, in the order in which they happen; what one raises ends the run.

    Raises:
        ValueError: the file is no trace, or of another version.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, listeners: tuple[Callable[[Event], None], ...] = ()):
        self.path = Path(path) if path is not None else None
        self.listeners = list(listeners)
        self.events: list[Event] = []  # only if there is no file
        self.task: str | None = None  # of the run that is resumed
        self.ended = False
        self._replies: dict[tuple[str, int], Reply] = {}
        self._observations: dict[tuple[str, int, int], str] = {}
        self._begun: set[str] = set()  # assignments, and calls that made sub-agents
        self._results: dict[str, Event] = {}
        self._secrets = Secrets()
        self._buffer: list[str] = []
        self._file: BinaryIO | None = None
        self._error: OSError | None = None
        offset = 0.0
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (closed by `close`)
            offset = self._recall()
        self._origin = time.perf_counter() - offset

    def now(self) -> float:
        """Seconds since the run began."""
        return round(time.perf_counter() - self._origin, 6)

    def begin(self, task: str, limits: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the trace holds the run of another task, or one that has ended.
        """
        if self.task is None:
            self.write("run", version=VERSION, task=task, limits=limits, started=datetime.now(UTC).isoformat())
        elif self.task != self._secrets.redact(task):
            raise ValueError(f"{self.path} is the trace of another task: {self.task[:80]!r}")
        elif self.ended:
            raise ValueError(f"{self.path} is the trace of a run that has ended: remove it to run again")
        else:
            self.write("resume", at=datetime.now(UTC).isoformat())
        self.flush()

    def write(self, event: str, **fields: Any) -> None:
        """
        Raises:
            TraceError: what was written before did not reach the disk.
        """
        if self._error is not None:
            raise TraceError(f"{self.path}: {self._error}")
        record: Event = {"t": self.now(), "event": event, **fields}
        for listener in self.listeners:
            listener(record)
        if self._file is None:
            self.events.append(record)
            return
        if not self._buffer:
            # One write for all that happens in one turn of the loop, and before the next turn, which acts on it, begins.
            try:
                asyncio.get_running_loop().call_soon(self.flush)
            except RuntimeError:
                self._buffer.append(encode(record))
                return self.flush()
        self._buffer.append(encode(record))

    def flush(self) -> None:
        if self._buffer and self._file is not None:
            lines, self._buffer = "\n".join(self._buffer) + "\n", []
            try:
                self._file.write(self._secrets.redact(lines).encode())
            except OSError as error:  # in a callback of the loop nobody would hear of it
                self._error = error

    def close(self) -> None:
        """
        Raises:
            TraceError: the last events did not reach the disk.
        """
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._error is not None:
            raise TraceError(f"{self.path}: {self._error}")

    def reply(self, path: str, step: int) -> Reply | None:
        """What the policy said in the run that is resumed."""
        return self._replies.get((path, step))

    def observation(self, path: str, step: int, index: int) -> str | None:
        return self._observations.get((path, step, index))

    def is_begun(self, path: str) -> bool:
        """Whether an assignment was begun, or a sub-agent made by this call, in the run that is resumed."""
        return path in self._begun

    def result(self, path: str) -> Event | None:
        return self._results.get(path)

    def _recall(self) -> float:
        """Read what the file holds, cut off a line that a kill left unfinished, and return the time of the last event."""
        assert self._file is not None
        self._file.seek(0)
        whole, last = 0, 0.0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            event = parse(line, self.path)
            last = event["t"]
            match event["event"]:
                case "run":
                    self.task = event["task"]
                case "step":
                    self._replies[event["path"], event["step"]] = _reply(event)
                case "observation":
                    self._observations[event["path"], event["step"], event["index"]] = event["content"]
                case "assign" | "subagent":
                    self._begun.add(event["path"])
                case "result":
                    self._results[event["path"]] = event
                case "end":
                    self.ended = True
        self._file.truncate(whole)
        return last


def read_trace(path: str | os.PathLike[str]) -> Iterator[Event]:
    """The events of a trace, without a last line that is not finished yet.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no trace.
    """
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield parse(line, path)


def parse(line: bytes, path: str | os.PathLike[str] | None) -> Event:
    """
    Raises:
        ValueError: the line is no event, or of another version of the schema.
    """
    try:
        event = json.loads(line)
        if event["event"] == "run" and event["version"] != VERSION:
            raise ValueError(f"{path}: version {event['version']} of the trace schema, this is version {VERSION}")
        event["t"] + 0
    except (TypeError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no trace: {line[:60]!r}") from error
    return event


def _reply(event: Event) -> Reply:
    calls = tuple(ToolCall(*call) for call in event["calls"])
    fields = ("content", "refusal", "prompt_tokens", "completion_tokens", "cost")
    return Reply(calls=calls, **{name: event[name] for name in fields})
