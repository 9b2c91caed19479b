"""`k25lite analyze`: from hours of video to a list of events and a report that opens by a double click.

    OUT/events.jsonl         {"video", "start", "end", "kind", "confidence", "clip", "keyframes"}; files relative to OUT
    OUT/metrics.json         with ground truth: see `scoring.score`
    OUT/trace.jsonl          what the orchestrator and its sub-agents did: see `swarm.trace`
    OUT/report/index.html    the report, with its clips, key frames and data beside it
    OUT/work/                answers of sub-agents, by the content of what they depend on

An analysis that was cut off goes on where it was. One that has ended is told again from its trace, unless something
failed: then what failed is tried again.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from os import PathLike, cpu_count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from k25lite.gameplay.clips import choose, clip_name, clip_span, frame_name
from k25lite.gameplay.director import Director, Outcome
from k25lite.gameplay.events import Event
from k25lite.gameplay.footage import read_events
from k25lite.gameplay.remote import Budget, RemoteViewer
from k25lite.gameplay.report import build, compare
from k25lite.gameplay.scoring import score, write_metrics
from k25lite.gameplay.segments import Footage, find_videos, most_segments, probe
from k25lite.gameplay.viewer import LocalViewer, Model
from k25lite.results import write_whole
from k25lite.swarm.critical import summarise
from k25lite.swarm.orchestrator import in_this_loop
from k25lite.swarm.trace import Event as TraceEvent
from k25lite.swarm.trace import Trace, read_trace
from k25lite.vision.media import MediaError

if TYPE_CHECKING:
    from k25lite.gameplay.detector import Detector

RETRIES = 2  # of a task whose sub-agent failed
REMOTE_AT_ONCE = 16  # segments with an endpoint at the same time
IMAGES = 24  # of a segment, if the budget allows it


def analyze(
    paths: Iterable[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    truth: str | PathLike[str] | None = None,
    backend: str = "local",
    model: str | PathLike[str] | Callable[[], Model] | None = None,
    base_url: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    budget: Budget | None = None,
    progress: bool = True,
) -> Path:
    """Find the events of videos and write the report; return its index.html.

    Args:
        paths: videos, and folders of videos.
        truth: a file events.jsonl to score against.
        backend: "local" or "openai".
        model: for "local" the folder of a detector, or a function that makes one, by default the one that is trained on
            recorded footage when it is first needed; for "openai" the name of a vision model at the endpoint `base_url`.
        workers: sub-agents at work at the same time; by default one for each core, or 16 that wait for an endpoint.
        budget: what the backend openai may use.
        ray: address of a Ray cluster to work on, "auto", or "local" for one started here.

    Raises:
        ValueError: bad arguments, or no video that can be read. FileNotFoundError: no truth at that path.
        RuntimeError: the orchestrator failed. Of sub-agents that fail, the report tells.
    """
    if backend not in ("local", "openai"):
        raise ValueError(f"backend is local or openai, got {backend!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out = Path(out).absolute()
    true = [] if truth is None else read_events(truth)
    videos, problems = _look(find_videos(paths), progress)
    if true and not {event.video for event in true} & {video.name for video in videos}:
        raise ValueError(f"{truth} has no event of these videos: {', '.join(video.name for video in videos)}")
    health = _states(truth, videos)
    viewer = _viewer(backend, model, base_url, budget or Budget(), out / "work", videos, progress)
    at_once = workers or (REMOTE_AT_ONCE if backend == "openai" else cpu_count() or 1)
    task = _task(videos, viewer.identity, truth)
    with ExitStack() as stack:
        trace = _trace(out / "trace.jsonl", task)
        stack.callback(trace.close)
        director = Director(videos, trace, out / "report", true)
        if not trace.ended:
            bars = stack.enter_context(_Progress(sum(video.seconds for video in videos), not progress))
            trace.listeners.append(bars)
            executor = _executor(backend, ray, at_once)
            if hasattr(executor, "close"):
                stack.callback(executor.close)
            result = director.orchestrator(viewer, at_once, executor, RETRIES).run_sync(task, trace)
            if not result.done:
                raise RuntimeError(f"the analysis failed: {result.reason}")
        outcome = director.outcome()
    for name, words in outcome.problems.items():
        problems.setdefault(name, []).extend(words)
    for name, words in problems.items():
        print(f"k25lite: {name}: {'; '.join(words)}", file=sys.stderr)
    return _write(out, videos, outcome, problems, None if truth is None else true, health)


def _look(paths: dict[str, Path], progress: bool) -> tuple[list[Footage], dict[str, list[str]]]:
    """The videos that can be read, and what is wrong with the others."""
    videos, problems = list[Footage](), dict[str, list[str]]()
    for name, path in tqdm(paths.items(), desc="look at files", unit=" files", disable=not progress):
        try:
            videos.append(probe(path, name))
        except MediaError as problem:
            problems[name] = [str(problem)]
    if not videos:
        raise ValueError(f"no video can be read: {'; '.join(words for own in problems.values() for words in own)}")
    return videos, problems


def _viewer(
    backend: str,
    model: str | PathLike[str] | Callable[[], Model] | None,
    base_url: str | None,
    budget: Budget,
    work: Path,
    videos: Sequence[Footage],
    progress: bool,
) -> Any:
    if backend == "openai":
        from k25lite.swarm.endpoint import OpenAIPolicy

        if not isinstance(model, str):
            raise ValueError("the backend openai needs the name of a vision model")
        segments = sum(map(most_segments, videos))  # what these leave over is for retries
        images = min(IMAGES, budget.images // segments)
        if images < 1:
            raise ValueError(f"{budget.images} images are too few for up to {segments} segments")
        return RemoteViewer(OpenAIPolicy(model, base_url), work, images, budget)
    if base_url is not None:
        raise ValueError("base_url is for the backend openai")
    if callable(model):
        return LocalViewer(model, f"{model.__module__}:{getattr(model, '__qualname__', model)}", work)
    if model is None:
        from k25lite.gameplay.detector_stage import RUNS, detector_stage

        model = detector_stage(RUNS["full"], progress=progress)
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"no folder with a detector: {folder}")
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        digest.update(file.name.encode() + file.read_bytes())
    return LocalViewer(partial(load, folder), digest.hexdigest(), work)


def load(folder: Path, device: str | None = None) -> Detector:
    """The detector in a folder; by default on the GPU, if there is one."""
    import torch
    from transformers.utils import logging

    from k25lite.gameplay.detector import Detector

    logging.disable_progress_bar()
    return Detector.from_pretrained(folder).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _executor(backend: str, ray: str | None, workers: int) -> Any:
    if ray is not None:
        from k25lite.swarm.cluster import RayExecutor

        return RayExecutor(None if ray == "local" else ray, num_cpus=0.1 if backend == "openai" else 1)
    if backend == "openai" or workers == 1:
        return in_this_loop
    from k25lite.gameplay.workers import ProcessExecutor

    return ProcessExecutor()


def _task(videos: Sequence[Footage], identity: str, truth: str | PathLike[str] | None) -> str:
    """In words, with the digests of all that the outcome depends on."""
    files = "".join(f"\n- {video.name} ({video.digest[:16]})" for video in videos)
    against = "" if truth is None else f" Truth: {hashlib.sha256(Path(truth).read_bytes()).hexdigest()[:16]}."
    model = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return f"Find the events of {len(videos)} videos and tell the story. Model: {model}.{against}{files}"


def _trace(path: Path, task: str) -> Trace:
    """The trace of this task, to be resumed or told again; a new one if there is another task's, or a failed one."""
    try:
        trace = Trace(path)
        ended_badly = trace.ended and not _succeeded(path)
        if trace.task is None or (trace.task == trace.secrets.redact(task) and not ended_badly):
            return trace
        trace.close()
    except ValueError:  # it is none, or of another version
        pass
    path.unlink()
    return Trace(path)


def _succeeded(path: Path) -> bool:
    summary = summarise(read_trace(path))
    return summary.root.status == "done" and not summary.counts["failed"]


class _Progress:
    """A bar for each pass, in seconds of video; a listener of the trace."""

    def __init__(self, seconds: float, disable: bool):
        self.seconds, self.disable = seconds, disable
        self.tasks, self.bars = dict[str, dict[str, Any]](), dict[str, Any]()

    def __call__(self, event: TraceEvent) -> None:
        if event["event"] == "assign":
            task = self.tasks[event["path"]] = json.loads(event["prompt"])
            if task["pass"] not in self.bars:
                self._close()
                total = None if task["pass"] == "clips" else round(self.seconds)
                unit = " events" if task["pass"] == "clips" else " s"
                self.bars[task["pass"]] = tqdm(total=total, desc=task["pass"], unit=unit, disable=self.disable)
        elif event["event"] == "result" and event["status"] == "done":
            task = self.tasks.get(event["path"])
            if task is not None:  # None: it began before a kill
                shown = (
                    len(task["clips"]) if "clips" in task else task.get("end", task["seconds"]) - task.get("start", 0)
                )
                self.bars[task["pass"]].update(round(shown))

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        for bar in self.bars.values():
            bar.close()


def _write(
    out: Path,
    videos: Sequence[Footage],
    outcome: Outcome,
    problems: dict[str, list[str]],
    true: Sequence[Event] | None,
    health: dict[str, list[tuple[float, float]]],
) -> Path:
    digests = {video.name: video.digest for video in videos}
    seconds = {video.name: video.seconds for video in videos}
    chosen = choose(outcome.events)
    lines = []
    for index, event in enumerate(outcome.events):
        clip = Path("report", "clips", clip_name(digests[event.video], *clip_span(event, seconds[event.video])))
        frames = [Path("report", "frames", frame_name(digests[event.video], time)) for time in event.keyframes]
        files = {"clip": str(clip) if index in chosen and (out / clip).exists() else None}
        images = [
            {"second": time, "image": str(frame) if (out / frame).exists() else None}
            for time, frame in zip(event.keyframes, frames, strict=True)
        ]
        lines.append(json.dumps(asdict(event) | files | {"keyframes": images}, ensure_ascii=False) + "\n")
    write_whole(out / "events.jsonl", "".join(lines))
    scored = None
    (out / "metrics.json").unlink(missing_ok=True)
    if true is not None:
        metrics = score(true, outcome.events, videos=seconds)  # type: ignore[arg-type]
        scored = compare(true, outcome.events, metrics, seconds)
        write_metrics(out / "metrics.json", metrics)
    return build(out / "report", videos, outcome, problems, out / "trace.jsonl", scored, health)


def _states(truth: str | PathLike[str] | None, videos: Sequence[Footage]) -> dict[str, list[tuple[float, float]]]:
    """(second, health) by video, from a file states.csv beside the truth or the videos."""
    folders = {*(video.path.parent for video in videos), *([Path(truth).parent] if truth is not None else [])}
    names, found = {video.name for video in videos}, dict[str, list[tuple[float, float]]]()
    for path in sorted(folder / "states.csv" for folder in folders):
        if path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    if row.get("video") in names:
                        try:
                            point = float(row["second"]), float(row["health"])
                        except (KeyError, TypeError, ValueError) as error:
                            raise ValueError(f"{path}: a row needs video, second and health ({row})") from error
                        found.setdefault(row["video"], []).append(point)
    return found
