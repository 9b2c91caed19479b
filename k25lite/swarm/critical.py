"""What a run cost and what parallelism saved, from its trace alone.

Source: Kimi K2.5 report, section 3. An episode's cost is its critical steps: over the stages t, the steps of the main agent
and of the slowest of the sub-agents that it waited for, Σ_t (S_main(t) + max_i S_sub,i(t)). Here a stage is one step of an
agent with what that step set to work; a sub-agent's own steps are counted in the same way, so the sum is recursive.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from k25lite.swarm.trace import CANCELLED, Event, without_attempt

ROOT = "0"


@dataclass(slots=True)
class Span:
    """Something that took time: a step of a policy, or a tool at work. Seconds since the run began."""

    path: str
    step: int
    kind: str
    label: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Assignment:
    """One piece of work: the orchestrator's (path "0", no parent), or one that it, or a sub-agent, assigned.

    Attributes:
        status: "done", "failed", or "running" where the trace has no result.
        stages: step -> the assignments that it set to work, attempts included.
    """

    path: str
    agent: str
    prompt: str
    began: float
    parent: str = ""
    attempt: int = 1
    ended: float | None = None
    status: str = "running"
    reason: str = ""
    answer: str = ""
    steps: int = 0
    spans: list[Span] = field(default_factory=list)
    stages: dict[int, list[Assignment]] = field(default_factory=lambda: defaultdict(list))

    @property
    def critical_steps(self) -> int:
        """Σ_t (S_main + max_i S_sub,i); attempts at the same assignment follow one another, so their steps add up."""
        waited = 0
        for subs in self.stages.values():
            each: dict[str, int] = defaultdict(int)
            for sub in subs:
                each[without_attempt(sub.path)] += sub.critical_steps
            waited += max(each.values())
        return self.steps + waited


@dataclass
class Summary:
    """A run in numbers.

    Attributes:
        assignments: by path, the orchestrator's among them.
        wall, busy: seconds from the first event to the last, and seconds that steps and tools took, added up.
        done, failed: of the assigned tasks, attempts apart.
    """

    assignments: dict[str, Assignment]
    wall: float
    busy: float
    total_steps: int
    tokens: int
    cost: float

    @property
    def root(self) -> Assignment:
        return self.assignments[ROOT]

    @property
    def critical_steps(self) -> int:
        return self.root.critical_steps

    @property
    def parallelism(self) -> list[int]:
        """How many assignments each stage of the orchestrator set to work at the same time; stages without are left out."""
        stages = self.root.stages.values()
        return [len({without_attempt(sub.path) for sub in stage}) for stage in stages]

    @property
    def mean_parallelism(self) -> float:
        """0 if nothing was assigned."""
        stages = self.parallelism
        return sum(stages) / len(stages) if stages else 0.0

    @property
    def ideal_speed_up(self) -> float:
        """Total over critical steps: what parallelism can save if every step takes equally long."""
        return self.total_steps / max(self.critical_steps, 1)

    @property
    def achieved_speed_up(self) -> float:
        """Busy over wall-clock time: how many steps and tools were at work on average."""
        return self.busy / self.wall if self.wall > 0 else 1.0

    @property
    def counts(self) -> dict[str, int]:
        """How many assigned tasks ended how: done, failed, running."""
        counts = {"done": 0, "failed": 0, "running": 0}
        for path, assignment in self.assignments.items():
            if path != ROOT and f"{without_attempt(path)}#{assignment.attempt + 1}" not in self.assignments:
                counts[assignment.status] += 1
        return counts


def summarise(events: Iterable[Event]) -> Summary:
    """Read a trace, whole or so far.

    Raises:
        ValueError: it does not begin with a run.
    """
    assignments: dict[str, Assignment] = {}
    wall = busy = cost = 0.0
    steps = tokens = 0
    for event in events:
        wall = max(wall, event["t"])  # events of a cluster arrive late
        kind = event["event"]
        if kind == "run":
            assignments[ROOT] = Assignment(ROOT, "orchestrator", event["task"], event["t"])
        elif not assignments:
            raise ValueError("a trace begins with the event of its run")
        elif kind == "assign":
            new = Assignment(
                event["path"], event["agent"], event["prompt"], event["t"], event["parent"], event["attempt"]
            )
            assignments[new.path] = new
            step = int(new.path.split(".")[-2])
            assignments[new.parent].stages[step].append(new)
        elif kind == "step":
            assignment = assignments[event["path"]]
            assignment.steps += 1
            called = ", ".join(name for _, name, _ in event["calls"])
            span = Span(event["path"], event["step"], "step", called or "answer", event["began"], event["t"])
            assignment.spans.append(span)
            steps += 1
            tokens += event["prompt_tokens"] + event["completion_tokens"]
            cost += event["cost"]
            busy += span.seconds
        elif kind == "observation":
            span = Span(event["path"], event["step"], "tool", event["tool"], event["began"], event["t"])
            assignments[event["path"]].spans.append(span)
            busy += span.seconds
        elif kind == "resume":
            for assignment in assignments.values():
                if assignment.reason == CANCELLED:
                    assignment.ended, assignment.status, assignment.reason = None, "running", ""
        elif kind in ("result", "end"):
            ended = assignments[event.get("path", ROOT)]
            ended.ended, ended.status = event["t"], event["status"]
            ended.reason, ended.answer = event["reason"], event["answer"]
    return Summary(assignments, wall, busy, steps, tokens, cost)


def critical_path(summary: Summary) -> list[Span]:
    """The spans that the run's wall-clock time is made of: within each stage, those of whom it had to wait for last."""

    def ended(assignment: Assignment) -> float:
        return summary.wall if assignment.ended is None else assignment.ended

    def of(assignment: Assignment) -> list[Span]:
        found: list[Span] = []
        for step in sorted({span.step for span in assignment.spans} | set(assignment.stages)):
            here = [span for span in assignment.spans if span.step == step]
            found += [span for span in here if span.kind == "step"]
            tools = [span for span in here if span.kind == "tool"]
            last = max(tools, key=lambda span: span.ended, default=None)
            subs = assignment.stages.get(step, [])
            slowest = max(subs, key=ended, default=None)
            if slowest is not None and (last is None or last.ended < ended(slowest)):
                attempts = [sub for sub in subs if without_attempt(sub.path) == without_attempt(slowest.path)]
                found += [span for attempt in attempts for span in of(attempt)]
            elif last is not None:
                found.append(last)
        return found

    return of(summary.root)
