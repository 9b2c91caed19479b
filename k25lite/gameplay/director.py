"""The orchestrator of an analysis: looks at the files, splits them, has the parts watched, puts the events together.

Source: Kimi K2.5 report, the 24-hour game video: decompose, extract in parallel, reconstruct. Where a video is split, and
what of it is watched closely, comes from a first look at it; the rest of the plan is a script, so that a run that is
resumed goes the same way.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25lite.gameplay.clips import choose, clip_span
from k25lite.gameplay.events import Event
from k25lite.gameplay.footage import CHUNK_SECONDS
from k25lite.gameplay.merge import Found, merge
from k25lite.gameplay.scoring import match
from k25lite.gameplay.segments import MARGIN, Footage, Segment, plan
from k25lite.gameplay.story import overall
from k25lite.gameplay.viewer import encode
from k25lite.swarm.orchestrator import Executor, Orchestrator
from k25lite.swarm.policy import Message, Policy, Reply, ToolCall, call
from k25lite.swarm.trace import Trace, read_trace

PASSES = ("look", "create", "coarse", "fine", "clips")
WORDS = {
    "look": "I look at the files.",
    "create": "I make a scout, a viewer for each video, and an editor.",
    "coarse": "The scout looks over each video by its key frames.",
    "fine": "Each segment goes to a viewer.",
    "clips": "The events are put together. The editor cuts their clips and key frames.",
}
SCOUT = "You look over a video by its key frames: where it is quiet, and where something happens."
VIEWER = "You watch segments of {name} ({seconds:.0f} s, {width} x {height}) and report the events in them."
EDITOR = "You cut clips and key frames of events."
CLIPS_AT_ONCE = 100  # events of one assignment
MISSED_SHOWN = 500  # true events that were missed and get a picture


@dataclass(frozen=True)
class Outcome:
    """What an analysis found, from its trace.

    Attributes:
        problems: what was not or not wholly analysed, by video, in words.
        summaries: what a sub-agent said about a segment.
        watched: seconds that were watched closely, by video.
    """

    events: list[Found]
    problems: dict[str, list[str]]
    summaries: dict[Segment, str]
    watched: dict[str, float]


@dataclass(frozen=True)
class Director:
    """The policy of the orchestrator, and its one tool, `look_at_files`.

    Attributes:
        videos: to analyse. report: the folder into which clips/ and frames/ are written.
        truth: true events; those that were missed get pictures too.
    """

    videos: Sequence[Footage]
    trace: Trace
    report: Path
    truth: Sequence[Event] = ()

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Reply:
        done = _last_pass(messages)
        for name in PASSES[PASSES.index(done) + 1 if done else 0 :]:
            if calls := getattr(self, f"_{name}")():
                return Reply(WORDS[name], tuple(calls))
        events = self.outcome().events
        return Reply(overall(events, {video.name: video.seconds for video in self.videos}))

    def orchestrator(self, viewer: Policy, at_once: int, executor: Executor, retries: int = 0) -> Orchestrator:
        """An agent with this policy, and a team whose policy is `viewer`, `at_once` of them at work at the same time."""
        return Orchestrator(
            self,
            [self.look_at_files],
            sub_policy=viewer,
            sub_tools=(),
            system_prompt="",
            max_calls=1_000_000,
            team={"max_parallel": at_once, "retries": retries},
            executor=executor,
        )

    def look_at_files(self) -> str:
        """How long the videos are, and what kind of pictures they hold."""
        return "\n".join(
            f"{video.name}: {video.seconds:.1f} s, {video.fps:.2f} fps, {video.width}x{video.height}, {video.codec}"
            for video in self.videos
        )

    def outcome(self) -> Outcome:
        """From what the trace holds by now."""
        self.trace.flush()
        seconds = {video.name: video.seconds for video in self.videos}
        parts, summaries, watched = [], dict[Segment, str](), defaultdict[str, float](float)
        problems: dict[str, list[str]] = defaultdict(list)
        for task, answer, failure in self._told():
            problem = failure or answer.get("error", "")
            where = ""
            if task["pass"] == "fine":
                segment = Segment(task["video"], task["start"], task["end"])
                where = f"{segment.start:.0f} to {segment.end:.0f} s: "
                found = answer.get("events", [])
                parts.append((segment, [Found(task["video"], **_as_fields(event)) for event in found]))
                if not failure:
                    summaries[segment] = answer["summary"]
                    watched[segment.video] += sum(end - start for start, end in task["core"])
            if problem and f"{where}{problem}" not in problems[task["video"]]:
                problems[task["video"]].append(f"{where}{problem}")
        ordered = {name: problems[name] for name in seconds if problems[name]}
        return Outcome(merge(parts, CHUNK_SECONDS), ordered, dict(sorted(summaries.items())), dict(watched))

    def _told(self) -> Iterable[tuple[dict[str, Any], dict[str, Any], str]]:
        """(task, answer, why it failed) of each task that sub-agents ended, in the order of tasks."""
        path = self.trace.path
        prompts, ended = dict[str, str](), dict[str, tuple[dict[str, Any], str]]()
        for event in self.trace.events if path is None else read_trace(path):
            if event["event"] == "assign":
                prompts[event["path"]] = event["prompt"]
            elif event["event"] == "result":
                done = event["status"] == "done"
                ended[prompts[event["path"]]] = (json.loads(event["answer"]) if done else {}, event["reason"])
        return sorted(
            ((json.loads(prompt), *end) for prompt, end in ended.items()),
            key=lambda told: (PASSES.index(told[0]["pass"]), told[0]["video"], told[0].get("start", 0.0)),
        )

    def _look(self) -> list[ToolCall]:
        return [call("look_at_files")]

    def _create(self) -> list[ToolCall]:
        def make(name: str, prompt: str) -> ToolCall:
            return call("create_subagent", name=name, system_prompt=prompt, tools=[])

        viewers = [make(f"viewer of {video.name}", VIEWER.format(**video.as_dict())) for video in self.videos]
        return [make("scout", SCOUT), *viewers, make("editor", EDITOR)]

    def _coarse(self) -> list[ToolCall]:
        return [_assign("scout", as_task("coarse", video)) for video in self.videos]

    def _fine(self) -> list[ToolCall]:
        overviews = {task["video"]: answer for task, answer, _ in self._told() if task["pass"] == "coarse"}
        calls = []
        for video in self.videos:
            seen = overviews.get(video.name, {})
            if "keyframes" not in seen:
                continue
            for segment in plan(video, seen["quiet"]):
                wide = max(segment.start - MARGIN, 0.0), min(segment.end + MARGIN, video.seconds)
                core = _within(seen["active"], segment.start, segment.end)
                if core:
                    task = as_task("fine", video, start=segment.start, end=segment.end)
                    task |= {"spans": _within(seen["active"], *wide), "core": core}
                    calls.append(_assign(f"viewer of {video.name}", task))
        return calls

    def _clips(self) -> list[ToolCall]:
        events = self.outcome().events
        chosen = choose(events)
        shown: dict[str, list[tuple[Found | Event, bool]]] = defaultdict(list)
        for index, event in enumerate(events):
            shown[event.video].append((event, index in chosen))
        for missed in match(self.truth, events).missed[:MISSED_SHOWN] if self.truth else []:  # type: ignore[arg-type]
            shown[missed.video].append((missed, False))
        calls = []
        for video in self.videos:
            own = shown[video.name]
            for first in range(0, len(own), CLIPS_AT_ONCE):
                part = own[first : first + CLIPS_AT_ONCE]
                clips = [clip_span(event, video.seconds) for event, has_clip in part if has_clip]
                frames = sorted({time for event, has_clip in part for time in frames_of(event, has_clip)})
                task = as_task("clips", video, out=str(self.report), clips=clips, frames=frames)
                calls.append(_assign("editor", task))
        return calls


def as_task(name: str, video: Footage, **more: Any) -> dict[str, Any]:
    """What a sub-agent is told to do in a pass: see `viewer`."""
    task = {"pass": name, "video": video.name, "path": str(video.path), "digest": video.digest}
    return task | {"seconds": video.seconds} | more


def frames_of(event: Found | Event, has_clip: bool) -> Sequence[float]:
    """The seconds of the key frames that are kept of an event: of one without a clip, and of one missed, one."""
    times = getattr(event, "keyframes", ()) or (round((event.start + event.end) / 2, 3),)
    return times if has_clip else (times[len(times) // 2],)


def _assign(agent: str, task: Mapping[str, Any]) -> ToolCall:
    return call("assign_task", agent=agent, prompt=encode(task))


def _last_pass(messages: Sequence[Message]) -> str:
    """The last of PASSES that has been done, from the calls in the conversation; "" before the first."""
    calls = next((message["tool_calls"] for message in reversed(messages) if message.get("tool_calls")), None)
    if calls is None:
        return ""
    function = calls[0]["function"]
    if function["name"] == "assign_task":
        return json.loads(json.loads(function["arguments"])["prompt"])["pass"]
    return "look" if function["name"] == "look_at_files" else "create"


def _within(spans: Iterable[Sequence[float]], low: float, high: float) -> list[tuple[float, float]]:
    cut = ((max(start, low), min(end, high)) for start, end in spans)
    return [(start, end) for start, end in cut if start < end]


def _as_fields(event: dict[str, Any]) -> dict[str, Any]:
    return event | {"keyframes": tuple(event["keyframes"])}
