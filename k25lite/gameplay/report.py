"""The report of an analysis: a folder that opens by a double click, with no server and nothing asked of the network.

index.html has what is read: numbers, stories, scores; data.js what is drawn and searched: events in columns, the run of the
swarm. Names of files and words of models are data on the page, never markup, and the page's policy lets only its own three
scripts run.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from k25lite.gameplay.clips import FIGHTS, LONGEST, MARGIN, PICKUPS, choose, clip_name, clip_span, frame_name
from k25lite.gameplay.director import Outcome, frames_of
from k25lite.gameplay.events import KINDS, Event
from k25lite.gameplay.merge import Found
from k25lite.gameplay.scoring import match
from k25lite.gameplay.segments import Footage
from k25lite.gameplay.story import clock, length, overall, tell
from k25lite.gameplay.viewer import encode
from k25lite.results import write_whole
from k25lite.swarm.critical import ROOT, Assignment, Summary, summarise
from k25lite.swarm.timeline import timeline
from k25lite.swarm.trace import read_trace

RIGHT, WRONG, MISSED = 1, 2, 3  # 0: nobody knows
HEALTH_POINTS = 500  # drawn of one video
SWARM_TEXTS = 400_000  # characters on the page of the run: the events that agents told of stand in the report itself


@dataclass(frozen=True)
class Scored:
    """What ground truth says: `scoring.score`, and the mistakes one by one."""

    metrics: dict[str, Any]
    wrong: set[Found]
    missed: list[Event]


def compare(true: Sequence[Event], found: Sequence[Found], metrics: dict[str, Any], videos: Iterable[str]) -> Scored:
    """The mistakes behind `metrics`, at its tolerance, in the videos of these names."""
    names = set(videos)
    matching = match((event for event in true if event.video in names), found, metrics["tolerance_s"])  # type: ignore[arg-type]
    return Scored(metrics, set(matching.wrong), sorted(matching.missed))  # type: ignore[arg-type]


def build(
    folder: Path,
    videos: Sequence[Footage],
    outcome: Outcome,
    problems: Mapping[str, Sequence[str]],
    trace: Path,
    scored: Scored | None = None,
    health: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Path:
    """Write the report beside its clips/ and frames/; return its index.html.

    Args:
        problems: what is wrong with a file, in words, by its name.
        trace: of the run that found the events.
        health: (second, health) by video, where known.
    """
    events, seconds = outcome.events, {video.name: video.seconds for video in videos}
    of_video: dict[str, list[Found]] = defaultdict(list)
    for event in events:
        of_video[event.video].append(event)
    run, total = summarise(read_trace(trace)), sum(seconds.values())
    data = {
        "kinds": KINDS,
        "videos": [_video(video, folder, (health or {}).get(video.name, ())) for video in videos],
        "events": _columns(folder, videos, events, scored),
        "swarm": _lanes(run),
    }
    # No </script> can end a script in a file of its own, but two line separators end a string in older browsers.
    text = f"const DATA = {encode(data)};\n".replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    write_whole(folder / "data.js", text)
    write_whole(folder / "plotly.min.js", get_plotlyjs())
    timeline(trace, folder / "swarm.html", characters=SWARM_TEXTS)
    sections = [
        {"video": video, "events": len(of_video[video.name]), "story": tell(of_video[video.name], video.seconds)}
        | {"watched": outcome.watched.get(video.name, 0.0), "problems": problems.get(video.name, [])}
        | {"segments": [(s.start, s.end, words) for s, words in outcome.summaries.items() if s.video == video.name]}
        for video in videos
    ]
    environment = Environment(
        loader=PackageLoader("k25lite.gameplay", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(clock=clock, length=length)
    page = environment.get_template("report.html.j2").render(
        style=_own("report.css"),
        script=_own("report.js"),
        nonce=secrets.token_hex(16),
        written=datetime.now(UTC).strftime("%d %B %Y"),
        total=total,
        duration=f"{total / 3600:.3g} hours"
        if total >= 5400
        else f"{total / 60:.0f} minutes"
        if total >= 90
        else length(total),
        counts=Counter(event.kind for event in events),
        kinds=KINDS,
        story=overall(events, seconds),
        sections=sections,
        unread={name: words for name, words in problems.items() if name not in seconds},
        run=run,
        parts=_parts(run),
        scored=scored,
        clips={"count": len(choose(events)), "of": len(events), "margin": MARGIN, "longest": LONGEST}
        | {"fights": FIGHTS, "pickups": PICKUPS},
        knows_health=bool(health),
    )
    return write_whole(folder / "index.html", page.encode("utf-8", "replace").decode())


def _own(name: str) -> Markup:
    return Markup(resources.files("k25lite.gameplay").joinpath(name).read_text(encoding="utf-8"))


def _video(video: Footage, folder: Path, health: Sequence[tuple[float, float]]) -> dict[str, Any]:
    try:
        source = quote(os.fsencode(Path(os.path.relpath(video.path, folder)).as_posix()))
    except ValueError:  # on another drive
        source = video.path.as_uri()
    step = max(len(health) // HEALTH_POINTS, 1)
    # The least of each step: a death of two seconds must not fall between two points.
    least = [(health[i][0], min(value for _, value in health[i : i + step])) for i in range(0, len(health), step)]
    return {"name": video.name, "file": video.digest[:10], "seconds": round(video.seconds, 3), "source": source} | (
        {"health": [[round(second, 1) for second, _ in least], [round(value) for _, value in least]]} if least else {}
    )


def _columns(folder: Path, videos: Sequence[Footage], events: Sequence[Found], scored: Scored | None) -> dict[str, Any]:
    """Found and missed events in order of video and time: numbers of videos and kinds, milliseconds, percent.

    `frames` are milliseconds, `clip` those of its start and end or 0; both only where the file is there.
    """
    place = {video.name: number for number, video in enumerate(videos)}
    chosen = {events[index] for index in choose(events)}
    there = {name: {*os.listdir(folder / name)} if (folder / name).exists() else set() for name in ("clips", "frames")}
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    rows: list[tuple[Found | Event, int]] = [
        (event, 0 if scored is None else WRONG if event in scored.wrong else RIGHT) for event in events
    ]
    rows += [(event, MISSED) for event in (scored.missed if scored else []) if event.video in place]
    for event, status in sorted(rows, key=lambda row: (place[row[0].video], row[0].start, row[0].end, row[0].kind)):
        video = videos[place[event.video]]
        span = clip_span(event, video.seconds)
        has_clip = event in chosen and clip_name(video.digest, *span) in there["clips"]
        times = [
            time for time in frames_of(event, event in chosen) if frame_name(video.digest, time) in there["frames"]
        ]
        row = (
            place[event.video],
            KINDS.index(event.kind),
            round(event.start * 1000),
            round(event.end * 1000),
            round(100 * getattr(event, "confidence", 0.0)),
            [round(time * 1000) for time in times],
            [round(time * 1000) for time in span] if has_clip else 0,
            status,
        )
        for name, value in zip(COLUMNS, row, strict=True):
            columns[name].append(value)
    return columns


COLUMNS = ("video", "kind", "start", "end", "confidence", "frames", "clip", "status")


def _lanes(run: Summary) -> dict[str, Any]:
    """Who worked when: each assignment on the first lane that is free, so that lanes are places, not names."""
    lanes: list[float] = []
    work = []
    for assignment in sorted(_assigned(run), key=lambda assignment: assignment.began):
        ended = run.wall if assignment.ended is None else assignment.ended
        lane = next((number for number, free in enumerate(lanes) if free <= assignment.began + 1e-6), len(lanes))
        lanes[lane : lane + 1] = [ended]
        task = json.loads(assignment.prompt)
        what = f"{task['pass']}: {task['video']}"
        if task["pass"] == "fine":
            what += f", {clock(task['start'])} to {clock(task['end'])}"
        if assignment.status != "done":
            what += f" ({assignment.status}: {assignment.reason[:100]})"
        times = (round(assignment.began, 3), round(ended, 3))
        work.append([lane, *times, task["pass"] if assignment.status == "done" else "failed", what])
    return {"wall": round(run.wall, 3), "lanes": len(lanes), "work": work}


def _parts(run: Summary) -> dict[str, dict[str, float]]:
    """By pass: how many tasks, and the seconds from the first that began to the last that ended, and of all added up."""
    parts: dict[str, list[Assignment]] = defaultdict(list)
    for assignment in _assigned(run):
        parts[json.loads(assignment.prompt)["pass"]].append(assignment)
    return {
        name: {
            "tasks": len(own),
            "wall": max(a.ended or run.wall for a in own) - min(a.began for a in own),
            "busy": sum((a.ended or run.wall) - a.began for a in own),
        }
        for name, own in parts.items()
    }


def _assigned(run: Summary) -> list[Assignment]:
    return [assignment for path, assignment in run.assignments.items() if path != ROOT]
