"""The trace of a run: one JSON object to a line, written as it happens, from which a killed run goes on.

Every event has `t` (seconds since the run began, without the time between a kill and the next start) and `event`:

- `run`: `task`, `limits`, `started` (wall clock), `version` of this schema.
- `resume`: the run goes on after a kill, `at` (wall clock).
- `subagent`: the call `path` made the sub-agent `name` with `system_prompt` and `tools`.
- `assign`: `path` begins to work for `parent` as `agent` on `prompt`; `attempt` counts from 1.
- `step`: `path` took its step number `step`, which `began` at: `content`, `calls` [id, name, arguments], `refusal`,
  `prompt_tokens`, `completion_tokens`, `cost`, and `reasoning` if there was any.
- `observation`: what `path` was told of call `index` of its step `step`: `tool`, `began`, `content`; not of a sub-agent
  made or an assignment ended, which events of their own tell.
- `context`: `path` shortened its context before step `step`: `kept` messages of `of`.
- `result`: the assignment `path` ended: `status` done or failed, `answer`, `reason`, `attempt`, `steps`,
  `critical_steps`, `tokens`, `cost`. One that failed because it was cancelled is taken up again if the run is resumed.
- `end`: so did the run, of all agents together: `status`, `answer`, `reason`, `steps`, `critical_steps`, `tokens`, `cost`.

A `path` says where an agent comes from: "0" is the orchestrator, "0.3.1" the agent that call 1 of its step 3 set to work,
"0.3.1#2" the second attempt at it. Lines are written at the end of each turn of the event loop, and the result of an
assignment before anybody acts on it, so what a kill -9 loses was known to nobody but the agent that did it. Secrets, as far
as they are known, are left out (see `Secrets`).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import PydanticSerializationError, SchemaValidator, core_schema, to_json

from k25lite.swarm.policy import Reply, ToolCall

VERSION = 1
Event = dict[str, Any]
CANCELLED = "cancelled with the one who waited for it"
_SECRET_NAMES = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
# Of OpenAI and others, Hugging Face, GitHub, Slack, Google; but not the end of "task-force".
_SECRET_MARKS = ("sk-", "sk_", "hf_", "ghp_", "github_pat_", "xox", "AIza")
_SECRET_FORMS = (
    rf"(?:(?<![A-Za-z0-9])|(?<=\\[bfnrt]))(?:{'|'.join(_SECRET_MARKS)})[\w-]{{16,}}|(?<=Bearer )[\w.~+/=-]{{16,}}"
)


class TraceError(RuntimeError):
    """The trace cannot be written, so the run must not go on."""


def without_attempt(path: str) -> str:
    """The path of an assignment, whichever attempt at it this one is."""
    return path[: path.index("#", path.rindex("."))] if "#" in path.rpartition(".")[2] else path


class Secrets:
    """What must not be written: values of environment variables named like secrets, and strings formed like keys."""

    def __init__(self) -> None:
        named = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name) and len(value) >= 8}
        for _ in range(2):  # as they stand in JSON, which tools return, and in JSON within the JSON of the trace
            named |= {json.dumps(value, ensure_ascii=ascii)[1:-1] for value in named for ascii in (True, False)}
        longest_first = sorted(named, key=len, reverse=True)
        self.pattern = re.compile("|".join([*map(re.escape, longest_first), _SECRET_FORMS]))
        # How secrets begin: for that, pydantic's regular expressions search a thousand times as fast as Python's for the
        # pattern, and nearly always it is all there is to do. Halves of surrogate pairs are left out; no line has any.
        beginnings = [value[:32].encode(errors="ignore").decode() for value in longest_first]
        marks = "|".join(map(re.escape, [*beginnings, *_SECRET_MARKS, "Bearer "]))
        self._marked = SchemaValidator(core_schema.str_schema(pattern=marks))

    def may_be_in(self, line: str) -> bool:
        """Whether it is worth while to search in what `encode` made."""
        return self._marked.isinstance_python(line)

    def redact(self, text: str) -> str:
        return self.pattern.sub("[secret]", text)

    def redact_line(self, line: str) -> str:
        return encode(self.redact_all(json.loads(line))) if self.may_be_in(line) else line

    def redact_all(self, value: Any) -> Any:
        """A copy of `value` without secrets in any of its texts."""
        if isinstance(value, str):
            return self.redact(value)
        if isinstance(value, (list, tuple)):
            return [self.redact_all(item) for item in value]
        return {key: self.redact_all(item) for key, item in value.items()} if isinstance(value, dict) else value


def encode(event: Event) -> str:
    """One line of JSON. What JSON has no form for is written as text, and half a surrogate pair as its escape."""
    try:
        return to_json(event, fallback=str, inf_nan_mode="null").decode()
    except PydanticSerializationError:
        return json.dumps(json.loads(json.dumps(event, default=str), parse_constant=lambda constant: None))


class Trace:
    """Events to a file, to listeners, and back.

    Args:
        path: appended to. If it holds a run already, what happened there is recalled instead of done again. None keeps the
            events in memory, secrets included.
        listeners: called with every event, in the order in which they happen; what one raises ends the run.

    Raises:
        ValueError: the file is no trace, or of another version.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, listeners: tuple[Callable[[Event], None], ...] = ()):
        self.path = Path(path) if path is not None else None
        self.listeners = list(listeners)
        self.events: list[Event] = []  # only if there is no file
        self.task: str | None = None
        self.ended = False
        self.used = (0, 0.0, 0)  # tokens, money and steps of the run that is resumed
        self.assignments = 0  # begun in it
        self._replies: dict[tuple[str, int], Reply] = {}
        self._observations: dict[tuple[str, int, int], str] = {}
        self._begun: set[object] = (
            set()
        )  # assignments, calls that made sub-agents, and (path, step) of shorter contexts
        self._results: dict[str, Event] = {}
        self.secrets = Secrets()
        self._buffer: list[str] = []
        self._file: BinaryIO | None = None
        self._error: OSError | None = None
        self._is_taken = False
        self._size = self._whole = self._recalled = 0  # bytes, those of whole lines, and nanoseconds
        self._origin = time.perf_counter_ns()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (closed by `close`)
            try:
                self._recall()
            except ValueError:
                self._file.close()
                raise

    def now(self) -> float:
        """Seconds since the run began."""
        return (time.perf_counter_ns() - self._origin) // 1000 / 1e6  # much faster than to round

    def begin(self, task: str, limits: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the trace holds the run of another task, or one that has ended, or has been begun already, or
                another process writes it, or has since it was opened.
            TraceError: it cannot be written.
        """
        if self._is_taken:
            raise ValueError("a trace takes one run: open its file again to resume it")
        if self.task is not None and self.task != self.secrets.redact(task):
            raise ValueError(f"{self.path} is the trace of another task: {self.task[:80]!r}")
        if self.ended:
            raise ValueError(f"{self.path} is the trace of a run that has ended: remove it to run again")
        if self._file is not None:
            self._claim()
        self._is_taken = True
        self._origin = time.perf_counter_ns() - self._recalled
        if self._file is not None:
            self._file.truncate(self._whole)
        at = datetime.now(UTC).isoformat()
        if self.task is None:
            self.write("run", version=VERSION, task=task, limits=limits, started=at)
        else:
            self.write("resume", at=at)
        self.flush()

    def release(self) -> None:
        """Others may write the file: the run is over, in whichever way."""
        if self._file is not None:
            with suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _claim(self) -> None:
        assert self._file is not None
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it ends
        except BlockingIOError:
            raise ValueError(f"another run writes {self.path}") from None
        except (ImportError, OSError):  # on Windows, and on file systems that know no locks, nobody notices
            pass
        if os.fstat(self._file.fileno()).st_size != self._size:
            self.release()
            raise ValueError(f"another run has written {self.path} meanwhile: open it again")

    def write(self, event: str, **fields: Any) -> None:
        """
        Raises:
            TraceError: this, or what was written before, did not reach the file or a listener.
        """
        self._check()
        record: Event = {"t": self.now(), "event": event, **fields}
        if self.listeners:
            self._tell(record)
        if self.path is None:
            self.events.append(record)
            return
        self._buffer.append(encode(record))
        if len(self._buffer) == 1:
            # One write for all that happens in one turn of the loop.
            try:
                asyncio.get_running_loop().call_soon(self._write_out)
            except RuntimeError:
                self.flush()

    def flush(self) -> None:
        """
        Raises:
            TraceError: what was written did not reach the file.
        """
        self._write_out()
        self._check()

    def close(self) -> None:
        """
        Raises:
            TraceError: the last events did not reach the file.
        """
        if self._file is not None:
            self._write_out()
            self._file.close()
            self._file = None
            if self._error is not None:
                raise TraceError(f"{self.path}: {self._error}")

    def _tell(self, record: Event) -> None:
        if self.secrets.may_be_in(encode(record)):
            record = self.secrets.redact_all(record)
        for listener in self.listeners:
            try:
                listener(record)
            except Exception as error:
                raise TraceError(f"a listener failed: {type(error).__name__}: {error}") from error

    def _check(self) -> None:
        if self._error is not None or (self._file is None and self.path is not None):
            raise TraceError(f"{self.path}: {self._error or 'closed'}")

    def _write_out(self) -> None:
        if not self._buffer or self._file is None or self._error is not None:
            return
        lines, self._buffer = self._buffer, []
        if self.secrets.may_be_in(text := "\n".join(lines)):
            text = "\n".join(map(self.secrets.redact_line, lines))
        rest = memoryview(f"{text}\n".encode())
        try:
            while rest:  # a disk that is nearly full takes a part, and says so only when asked to take more
                rest = rest[self._file.write(rest) :]
        except OSError as error:  # in a callback of the loop nobody would hear of it
            self._error = error

    def reply(self, path: str, step: int) -> Reply | None:
        """What the policy said in the run that is resumed."""
        return self._replies.get((path, step))

    def observation(self, path: str, step: int, index: int) -> str | None:
        return self._observations.get((path, step, index))

    def is_begun(self, path: str, step: int | None = None) -> bool:
        """Whether, in the run that is resumed, an assignment began, a sub-agent was made, or a step had less context."""
        return (path if step is None else (path, step)) in self._begun

    def result(self, path: str) -> Event | None:
        return self._results.get(path)

    def _recall(self) -> None:
        """Read what the file holds, but for a last line that a kill left unfinished.

        Raises:
            ValueError: it is no trace.
        """
        assert self.path is not None
        with open(self.path, "rb") as file:  # the other one is not buffered, and reads lines byte by byte
            for line in file:
                self._size += len(line)
                is_torn = not line.endswith(b"\n")
                if is_torn and (self._whole or b'{"t":'.startswith(line[:5])):
                    return
                event = parse(line, self.path)
                try:
                    self._remember(event)
                except (TypeError, KeyError, ValueError, OverflowError) as error:
                    raise ValueError(f"{self.path} is no trace: {line[:60]!r}") from error
                self._whole += len(line)

    def _remember(self, event: Event) -> None:
        kind, path = event["event"], event.get("path", "")
        if (self.task is None) != (kind == "run"):
            raise KeyError("a trace begins with its run, and holds one")
        match kind:
            case "run":
                self.task = event["task"]
            case "step":
                reply = self._replies[path, event["step"]] = _reply(event)
                tokens, money, steps = self.used
                self.used = tokens + reply.tokens, money + reply.cost, steps + 1
            case "observation":
                self._observations[path, event["step"], event["index"]] = event["content"]
            case "context":
                self._begun.add((path, event["step"]))
            case "assign" | "subagent":
                self._begun.add(path)
                self.assignments += event.get("attempt") == 1
            case "result" if event["reason"] != CANCELLED:
                self._results[path] = event
            case "end":
                self.ended = True
        self._recalled = int(event["t"] * 1e9)


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
        version = event["version"] if event["event"] == "run" else VERSION
        event["t"] + 0
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no trace: {line[:60]!r}") from error
    if version != VERSION:
        raise ValueError(f"{path}: version {version} of the trace schema, this is version {VERSION}")
    return event


def _reply(event: Event) -> Reply:
    calls = tuple(ToolCall(*call) for call in event["calls"])
    fields = ("content", "refusal", "prompt_tokens", "completion_tokens", "cost")
    return Reply(calls=calls, reasoning=event.get("reasoning", ""), **{name: event[name] for name in fields})
