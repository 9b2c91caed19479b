"""A run to look at while it goes on, in a notebook or a terminal: listeners that count events and draw on a clock."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
import warnings
from collections import Counter
from contextlib import suppress
from html import escape
from math import inf
from typing import Any, TextIO

from k25lite.swarm.critical import ROOT
from k25lite.swarm.trace import CANCELLED, Event, without_attempt

MAX_LANES, ROW = 40, 16  # how many, and how high in pixels
COLOURS = {"running": "#3d86cf", "done": "#1d8f7f", "failed": "#c9581d", "stopped": "#858a93"}  # on white and on black


class View:
    """The numbers of `critical.Summary`, drawn every so many seconds; of a resumed run, give it the events before first."""

    def __init__(self, every: float) -> None:
        self.every, self.status, self.seconds = every, "running", 0.0
        self.assigned = self.running = self.done = self.failed = self.critical_steps = self.steps = self.tokens = 0
        # Critical steps: of each assignment, attempts added up, and of the slowest assignment of each stage.
        self._taken, self._waited = Counter[str](), Counter[str]()
        self._heard, self._drawn, self._cancelled = time.perf_counter(), 0.0, 0

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if event["t"] > self.seconds:  # a worker elsewhere tells what it did when it is done
            self.seconds, self._heard = event["t"], time.perf_counter()
        if kind == "step":
            self.steps += 1
            self.tokens += event["prompt_tokens"] + event["completion_tokens"]
            self._take(event["path"])
        elif kind == "assign":
            self.assigned += event["attempt"] == 1
            self.failed -= event["attempt"] > 1
        elif kind == "result":
            self.done += event["status"] == "done"
            self.failed += event["status"] != "done"
            self._cancelled += event["reason"] == CANCELLED
        elif kind in ("run", "resume"):
            self.failed, self._cancelled = self.failed - self._cancelled, 0
            self._tick(is_first=True)
        elif kind == "end":
            self.stop(event["status"])
        self._show()

    def stop(self, status: str = "stopped") -> None:
        """Draw for the last time: the run ended, or was broken off."""
        if self.status == "running":
            self.status, self._drawn = status, 0.0
            self._show()
            self.every = inf

    def draw(self, words: list[str]) -> None: ...  # each screen its own way

    def _take(self, path: str) -> None:
        """One step more for `path`, and for those who wait for it and for nobody slower."""
        while path != ROOT:
            path = without_attempt(path)
            stage = path.rpartition(".")[0]
            self._taken[path] += 1
            if self._taken[path] <= self._waited[stage]:
                return
            self._waited[stage] += 1
            path = stage.rpartition(".")[0]
        self.critical_steps += 1

    def _tick(self, is_first: bool = False) -> None:
        """Draw also while nothing happens, until the task that runs the swarm is over, in whichever way."""
        with suppress(RuntimeError):  # where a trace is read out, there may be no event loop
            if is_first and (task := asyncio.current_task()):
                task.add_done_callback(lambda task: self.stop())
            if self.status == "running" and self.every < inf:
                asyncio.get_running_loop().call_later(self.every, self._tick)
                self._show()

    def _show(self) -> None:
        now = time.perf_counter()
        if now < self._drawn + self.every:
            return
        self.seconds, self.running = self.seconds + now - self._heard, self.assigned - self.done - self.failed
        self._heard = self._drawn = now
        names = ("assigned", "running", "done", "failed", "critical_steps", "steps", "tokens")
        numbers = (f"{getattr(self, name):,} {name.replace('_', ' ')}" for name in names)
        try:
            self.draw([self.status, f"{self.seconds:,.1f} s", *numbers])
        except Exception as error:  # of a screen, which must not end the run
            self.every = inf
            warnings.warn(f"the run goes on unseen: {type(error).__name__}: {error}", stacklevel=2)


class ProgressLine(View):
    """One line of a terminal, written over and over; elsewhere (a log, say) a new line every ten seconds."""

    def __init__(self, stream: TextIO | None = None, every: float | None = None) -> None:
        self.stream, self._width = stream or sys.stderr, 0
        self.is_terminal = self.stream.isatty()
        super().__init__(every or (0.25 if self.is_terminal else 10.0))

    def draw(self, words: list[str]) -> None:
        line = "  ".join(words)
        if self.is_terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
            line, self._width = f"\r{line:<{self._width}}", len(line)
        self.stream.write(line + "\n" * (self.status != "running" or not self.is_terminal))
        self.stream.flush()


class LiveView(View):
    """The numbers and a small Gantt chart of who began last, in a notebook, whose saved copy keeps the last picture."""

    def __init__(self, every: float = 0.25) -> None:
        super().__init__(every)
        self.lanes: dict[str, Event] = {}
        self._output: Any = None

    def __call__(self, event: Event) -> None:
        kind, path = event["event"], event.get("path", ROOT)
        if kind in ("run", "assign"):
            self.lanes[path] = {"agent": "orchestrator", "attempt": 1, "status": "running", **event}
            if len(self.lanes) > MAX_LANES:
                del self.lanes[next(path for path in self.lanes if path != ROOT)]
        elif kind in ("result", "end") and path in self.lanes and event["reason"] != CANCELLED:
            self.lanes[path] |= {"status": event["status"], "ended": event["t"]}
        super().__call__(event)

    def draw(self, words: list[str]) -> None:
        from IPython.display import HTML, display

        self._output = self._output or display(display_id=True)
        self._output.update(HTML(self.picture(words)))

    def picture(self, words: list[str]) -> str:
        """HTML, in which names that models gave are text."""
        scale, rows = 69 / max(self.seconds, 1e-3), []
        for top, lane in zip(range(0, len(self.lanes) * ROW, ROW), self.lanes.values(), strict=True):
            colour = COLOURS[self.status if lane["status"] == "running" else lane["status"]]
            name = lane["agent"][:24] + (f" ({lane['attempt']})" if lane["attempt"] > 1 else "")
            left, width = 30 + lane["t"] * scale, max((lane.get("ended", self.seconds) - lane["t"]) * scale, 0.3)
            bar = f'x="{left:.2f}%" y="{top + 3}" width="{width:.2f}%" height="{ROW - 5}" fill="{colour}"'
            rows.append(f'<text y="{top + 12}">{escape(name)}</text><rect {bar}/>')
        svg = f'<svg width="100%" height="{len(rows) * ROW}" font-size="12" fill="currentColor">{"".join(rows)}</svg>'
        head = "".join(f"<span>{word}</span>" for word in words)
        return f'<div style="display:flex;flex-wrap:wrap;gap:.2em 1.4em;margin-bottom:.4em">{head}</div>{svg}'
