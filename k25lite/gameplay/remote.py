"""A viewer whose model is behind an OpenAI-compatible endpoint: it gets frames of a segment and answers events as JSON."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from k25lite.gameplay.clips import frames_at, illustrate
from k25lite.gameplay.footage import read_keyframes
from k25lite.gameplay.merge import KEYFRAMES, Found
from k25lite.gameplay.story import clock
from k25lite.gameplay.viewer import encode, kept_answer, overview, told
from k25lite.results import write_whole
from k25lite.swarm.endpoint import EndpointError, OpenAIPolicy
from k25lite.swarm.limits import Exceeded
from k25lite.swarm.policy import Message, Reply
from k25lite.vision.media import MediaError

SHOWN_BEFORE, SHOWN_AFTER = 1.0, 1.0  # seconds by which one frame stands for what is around it
PROMPT = """You watch a segment of a video of somebody playing a game. You get frames of it, each after its time in seconds.
Report the events: fight (the player and ordinary enemies hurt each other), boss (a boss is in view), pickup (an item is
picked up), death (the player is dead), level (another map begins). Answer with nothing but JSON, in this form:
{"events": [{"kind": "fight", "start": 12.0, "end": 20.5, "confidence": 0.9, "keyframes": [13.0]}], "summary": "..."}
Times are seconds from the start of the video. Keyframes are times of frames you were given that show the event best. The
summary says in one sentence what happens. What you are not sure of gets a low confidence; no events are []."""


class _Seen(BaseModel):
    kind: Literal["fight", "boss", "pickup", "death", "level"]
    start: Annotated[float, Field(allow_inf_nan=False)]
    end: Annotated[float, Field(allow_inf_nan=False)]
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    keyframes: list[Annotated[float, Field(allow_inf_nan=False)]] = []


class _Answer(BaseModel):
    events: list[Any]  # each is looked at by itself: one that is odd costs no other
    summary: str | None = None


@dataclass(frozen=True)
class Budget:
    """What an analysis by an endpoint may use, over all its runs; None is no limit.

    Attributes:
        images: frames shown, counted before they are sent and never exceeded; those that the endpoint's client sends
            again, after a time-out or a 5xx, count once.
        tokens: read and written. Known after a reply: those who are under way together may go beyond it.
    """

    images: int = 20_000
    tokens: int | None = None


@dataclass
class RemoteViewer:
    """A viewer that asks a model elsewhere; only fine tasks cost anything.

    Attributes:
        policy: the endpoint. work: the folder in which answers are kept.
        images: frames of a segment at most: from as many equally long parts of it, those that differ most from what came
            before.
        budget: of all who share the folder: sub-agents at the same time, on other machines, and in earlier runs.
    """

    policy: OpenAIPolicy
    work: Path
    images: int = 24
    budget: Budget = Budget()

    @property
    def identity(self) -> str:
        return encode([self.policy.model, self.policy.base_url, self.images, PROMPT])

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Reply:
        """
        Raises:
            EndpointError: no reply, or one that is not the JSON that was asked for. Exceeded: the budget is used up.
        """
        task = json.loads(messages[-1]["content"])
        if task["pass"] == "clips":
            return Reply(encode(await asyncio.to_thread(illustrate, task)))
        kept, usage = kept_answer(self.work, self.identity, task), dict[str, Any]()
        if not kept.exists():
            if task["pass"] == "coarse":
                answer = await asyncio.to_thread(self._coarse, task)
            else:
                answer, usage = await self._fine(task)
            await asyncio.to_thread(write_whole, kept, encode(answer))
        return Reply(kept.read_text(encoding="utf-8"), **usage)

    def _coarse(self, task: dict[str, Any]) -> dict[str, Any]:
        times, changes, error = list[float](), list[float](), ""
        try:
            for time, change, _ in read_keyframes(task["path"]):
                times.append(time)
                changes.append(change)
        except MediaError as problem:
            error = str(problem)
        if not times:
            return {"error": error}
        # Without a model that looks at key frames, all of the video is worth a closer look.
        answer = overview(np.array(times), np.ones(len(times)), np.array(changes), task["seconds"], error)
        return answer | {"active": [[0.0, task["seconds"]]]}

    async def _fine(self, task: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        start, end = task["spans"][0][0], task["spans"][-1][1]
        try:
            pictures = await asyncio.to_thread(self._pictures, task["path"], start, end)
        except MediaError as problem:
            return {"events": [], "summary": "", "error": str(problem)}, {}
        parts: list[dict[str, Any]] = [
            {
                "type": "text",
                "text": f"{task['video']}, from {start:.1f} s to {end:.1f} s ({clock(start)} to {clock(end)})",
            }
        ]
        for time, data in pictures:
            parts.append({"type": "text", "text": f"{time:.1f} s"})
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
        asked: list[Message] = [{"role": "system", "content": PROMPT}, {"role": "user", "content": parts}]
        with self._used() as used:
            if used["images"] + len(pictures) > self.budget.images:
                raise Exceeded("images")
            if self.budget.tokens is not None and used["tokens"] >= self.budget.tokens:
                raise Exceeded("tokens")
            used["images"] += len(pictures)
        reply = await self.policy(asked, [])
        with self._used() as used:
            used["tokens"] += reply.tokens
        if reply.refusal:
            raise EndpointError(f"{self.policy.model} refused: {reply.refusal}")
        answer = _read(reply.content, task["video"], start, end)
        return answer, {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}

    @contextmanager
    def _used(self) -> Iterator[Counter[str]]:
        """What has been used by now, to be added to; in a file, because on a cluster each task has a copy of the viewer."""
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / "used"
        with open(self.work / "lock", "w") as lock:
            with suppress(ImportError):  # on Windows
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            used = Counter[str](json.loads(path.read_text()) if path.exists() else {})
            yield used
            write_whole(path, encode(used))

    def _pictures(self, path: str, start: float, end: float) -> list[tuple[float, str]]:
        """(seconds, JPEG in base64) of the frames to show.

        Raises:
            MediaError: the file cannot be read there.
        """
        borders = np.linspace(start, end, self.images + 1)
        best: dict[int, tuple[float, float]] = {}
        for time, change, _ in read_keyframes(path, start=start, end=end):
            part = int(np.searchsorted(borders, time, "right")) - 1
            if 0 <= part < self.images and change > best.get(part, (-1.0, 0.0))[0]:
                best[part] = change, time
        # Where a part has no key frame, the frame in its middle.
        middles = (borders[:-1] + borders[1:]) / 2
        times = [best[part][1] if part in best else float(middles[part]) for part in range(self.images)]
        pictures = []
        for time, picture in frames_at(path, dict.fromkeys(round(time, 3) for time in times)):
            buffer = io.BytesIO()
            picture.save(buffer, format="JPEG", quality=80)
            pictures.append((time, base64.b64encode(buffer.getvalue()).decode()))
        return pictures


def _read(text: str, video: str, start: float, end: float) -> dict[str, Any]:
    """The answer in the form in which viewers give theirs: events within the segment, in order.

    Events that are none are left out, and `error` tells how many.

    Raises:
        EndpointError: it is not the JSON that was asked for.
    """
    block = re.search(r"\{.*\}", text, re.DOTALL)  # models like to put it into a fence, or to introduce it
    try:
        said = TypeAdapter(_Answer).validate_json(block[0] if block else text)
    except ValidationError as error:
        raise EndpointError(f"not the JSON that was asked for: {text[:200]!r}") from error
    events, odd = [], 0
    for event in said.events:
        try:
            seen = _Seen.model_validate(event)
        except ValidationError:
            odd += 1
            continue
        low, high = max(seen.start, start, 0.0), min(max(seen.end, seen.start + SHOWN_AFTER), end)
        if low < high:
            keyframes = sorted({round(time, 3) for time in seen.keyframes if low - SHOWN_BEFORE <= time <= high})
            keyframes = keyframes[:KEYFRAMES] or [round((low + high) / 2, 3)]
            events.append(Found(video, round(low, 3), round(high, 3), seen.kind, seen.confidence, tuple(keyframes)))
    answer = told(events, (said.summary or "").strip()[:300])
    return answer | ({"error": f"{odd} of {len(said.events)} events are not as asked for"} if odd else {})
