"""What a sub-agent of the analysis does with a task: look over a video, watch a segment, cut clips.

A viewer is the policy of all sub-agents. A task is one line of JSON, and so is its answer:

coarse  Look at the key frames of a video alone. Answer: `quiet`, places to cut at with how much goes on there, and
        `active`, the spans that are worth a closer look. A picture that has changed is worth one whatever it shows, so
        the model is asked only about those that have not, one in NEAR seconds, and sees them small: to look closely takes
        longer than to decode.
fine    Watch these spans of a segment. Answer: `events` with their evidence, and a `summary` in words.
clips   Cut the clips and key frames of some events (`clips.illustrate`). Answer: how many `files` there are.

Answers of the first two are kept in a folder by what they depend on: the bytes of the file, the task, and the model. A
file that cannot be read is no failure of the agent, so it is an answer too: `error`, and what was found up to there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from k25lite.gameplay.clips import illustrate
from k25lite.gameplay.events import KINDS
from k25lite.gameplay.footage import CHUNK_SECONDS, SMALL, THUMBNAIL, Scaler, read_chunks, read_keyframes
from k25lite.gameplay.merge import KEYFRAMES, Found
from k25lite.gameplay.spans import SpanRule, find_spans, key_moments
from k25lite.gameplay.story import summary
from k25lite.results import write_whole
from k25lite.swarm.policy import Message, Reply
from k25lite.vision.media import MediaError

VERSION = 4  # of the answers that are kept
LOWEST = 0.25  # of a kind's threshold: a key frame below it for all kinds, and like those around it, is dull
CHANGE = 0.08  # mean difference of two key frames, from 0 to 1, that is worth a closer look
NEAR = 4.0  # seconds around what is worth it that are watched too; key frames further apart than this say nothing
CELL = 10.0  # seconds: of each such stretch of a video the quietest moment is told
BATCH = 256  # key frames that the model is asked about at once


class Model(Protocol):
    """What finds events in pictures: see `detector.Detector`."""

    size: tuple[int, int]
    rules: Mapping[str, SpanRule]

    def probabilities(self, frames: np.ndarray) -> np.ndarray: ...

    def watch(self, chunks: Iterable[np.ndarray]) -> np.ndarray: ...


_MODELS: dict[str, Model] = {}  # by identity: a viewer comes to a worker anew with each task


@dataclass(frozen=True)
class LocalViewer:
    """A viewer with a model of its own.

    Attributes:
        load: makes the model; called once in each process.
        identity: of the model, so that answers of another one are not taken for its own.
        work: the folder in which answers are kept.
    """

    load: Callable[[], Model]
    identity: str
    work: Path

    def model(self) -> Model:
        """The one of this process."""
        if self.identity not in _MODELS:
            _MODELS[self.identity] = self.load()
        return _MODELS[self.identity]

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Reply:
        """
        Raises:
            Whatever the model raises; a file that cannot be read is told in the answer.
        """
        task = json.loads(messages[-1]["content"])
        if task["pass"] == "clips":
            return Reply(encode(await asyncio.to_thread(illustrate, task)))
        kept = kept_answer(self.work, self.identity, task)
        if not kept.exists():
            answer = await asyncio.to_thread(self._coarse if task["pass"] == "coarse" else self._fine, task)
            write_whole(kept, encode(answer))
        return Reply(kept.read_text(encoding="utf-8"))

    def _coarse(self, task: dict[str, Any]) -> dict[str, Any]:
        model = self.model()
        scale, begins = Scaler(SMALL), [model.rules[kind].begin for kind in KINDS]
        times, changes, error = list[float](), list[float](), ""
        activity, still = dict[int, float](), dict[int, np.ndarray]()
        answered = -math.inf  # until when it is known whether the video is worth a closer look

        def ask() -> None:
            if still:
                scores = (model.probabilities(np.stack([*still.values()])[:, None]) / begins).max(1)
                activity.update(zip(still, scores.tolist(), strict=True))
                still.clear()

        try:
            for time, change, frame in read_keyframes(task["path"]):
                if change >= CHANGE:
                    answered = time + NEAR  # what is near it is watched anyway
                elif time >= answered:
                    still[len(times)] = scale(frame)
                    answered = time + NEAR
                times.append(time)
                changes.append(change)
                if len(still) == BATCH:
                    ask()
        except MediaError as problem:
            error = str(problem)
        if not times:
            return {"error": error}
        ask()
        known = np.array([activity.get(place, np.nan) for place in range(len(times))])
        return overview(np.array(times), known, np.array(changes), task["seconds"], error)

    def _fine(self, task: dict[str, Any]) -> dict[str, Any]:
        model = self.model()
        times, scores, thumbnails = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        error = ""

        def read(start: float, end: float) -> Iterator[np.ndarray]:
            nonlocal error
            seen = start
            try:
                for chunks in read_chunks(task["path"], model.size, start=start, end=end):
                    times.append(chunks.times)
                    thumbnails.append(shrink(chunks.frames))
                    seen = float(chunks.times[-1]) + CHUNK_SECONDS
                    yield chunks.frames
                if seen < end - 2 * CHUNK_SECONDS:
                    error = f"{task['path']}: cut short, nothing can be decoded from {seen:.1f} s on"
            except MediaError as problem:
                error = str(problem)

        for start, end in task["spans"]:
            scores.append(model.watch(read(start, end)))
        events: list[Found] = []
        if times:
            events = _events(
                task, np.concatenate(times), np.concatenate(scores), np.concatenate(thumbnails), model.rules
            )
        return told(events) | ({"error": error} if error else {})


def told(events: Sequence[Found], words: str = "") -> dict[str, Any]:
    """The answer to a fine task; in place of words of a model, what can be counted."""
    ordered = [{key: value for key, value in asdict(event).items() if key != "video"} for event in sorted(events)]
    return {"events": ordered, "summary": words or summary(events)}


def overview(
    times: np.ndarray, activity: np.ndarray, change: np.ndarray, seconds: float, error: str = ""
) -> dict[str, Any]:
    """The answer to a coarse task.

    Args:
        times: [n] of the key frames. change: [n], how much each differs from the one before, 0 to 1.
        activity: [n], 1 where there seems to be an event; nan where nobody asked, which is no place to cut either.
    """
    quiet: dict[int, tuple[float, float]] = {}
    for time, much in zip(times.tolist(), (np.nan_to_num(activity, nan=1.0) + change).tolist(), strict=True):
        cell = int(time / CELL)
        if cell not in quiet or much < quiet[cell][1]:
            quiet[cell] = (round(time, 3), round(much, 3))
    borders = np.concatenate([[0.0], times, [seconds]])
    unseen = [(start, end) for start, end in pairwise(borders.tolist()) if end - start > NEAR]
    worth = times[(activity >= LOWEST) | (change >= CHANGE)]
    spans = sorted([*((time - NEAR, time + NEAR) for time in worth), *unseen])
    active: list[list[float]] = []
    for start, end in spans:
        start, end = round(max(float(start), 0.0), 3), round(min(float(end), seconds), 3)
        if active and start <= active[-1][1] + NEAR:
            active[-1][1] = max(active[-1][1], end)
        elif start < end:
            active.append([start, end])
    answer = {"keyframes": len(times), "quiet": list(quiet.values()), "active": active}
    return answer | ({"error": error} if error else {})


def _events(
    task: dict[str, Any],
    times: np.ndarray,
    scores: np.ndarray,
    thumbnails: np.ndarray,
    rules: Mapping[str, SpanRule],
) -> list[Found]:
    found = []
    for kind, start, end, confidence in find_spans(times, scores, rules):
        start, end = round(start, 3), round(min(end, task["seconds"]), 3)
        if start >= end:
            continue
        inside = np.flatnonzero((times + CHUNK_SECONDS > start) & (times < end))
        moments = (start + end) / 2
        if len(inside):
            chosen = key_moments(times[inside], scores[inside, KINDS.index(kind)], thumbnails[inside], KEYFRAMES)
            moments = times[inside][np.asarray(chosen, dtype=int)] + CHUNK_SECONDS / 2
        keyframes = sorted({round(float(time), 3) for time in np.atleast_1d(moments).clip(start, end)})
        found.append(Found(task["video"], start, end, kind, round(confidence, 3), tuple(keyframes)))
    return found


def shrink(frames: np.ndarray) -> np.ndarray:
    """[n, t, height, width, 3] uint8 -> [n, 12, 16] from 0 to 1: grey, the mean over blocks and over t."""
    n, _, height, width, _ = frames.shape
    rows, columns = (max(side // cells, 1) for side, cells in zip((height, width), THUMBNAIL[::-1], strict=True))
    grey = frames.mean((1, 4), dtype=np.float32) / 255
    grey = grey[:, : height // rows * rows, : width // columns * columns]
    return grey.reshape(n, grey.shape[1] // rows, rows, grey.shape[2] // columns, columns).mean((2, 4))


def kept_answer(work: Path, identity: str, task: dict[str, Any]) -> Path:
    """The file for the answer to a task, by all that the answer depends on; the file's name and place are no part of it."""
    depends = {key: value for key, value in task.items() if key not in ("path", "video")}
    key = hashlib.sha256(encode([VERSION, identity, depends]).encode()).hexdigest()[:32]
    return work / f"{key}.json"


def encode(value: Any) -> str:
    """One line of JSON; what of a path is no UTF-8, which cannot be written, as its escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode()
