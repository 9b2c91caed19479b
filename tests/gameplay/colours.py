"""Videos in which each kind of event has a colour, and a model that sees colours: for tests of what lies around a model."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import av
import numpy as np

from k25lite.gameplay.events import KINDS
from k25lite.gameplay.spans import SpanRule

COLOURS = {
    "fight": (220, 120, 0),
    "boss": (60, 200, 220),
    "pickup": (0, 200, 0),
    "death": (220, 0, 0),
    "level": (30, 30, 220),
}
GREY = (90, 90, 90)
Shown = Sequence[tuple[float, float, str]]  # start, end, kind; apart from each other


class ColourModel:
    """How near the mean colour of a chunk is to that of each kind."""

    size: ClassVar = (24, 32)
    rules: ClassVar = {kind: SpanRule(begin=0.5, stay=0.8) for kind in KINDS}

    def probabilities(self, frames: np.ndarray) -> np.ndarray:
        mean = frames.mean((1, 2, 3))[:, None]
        distance = np.abs(mean - np.array([COLOURS[kind] for kind in KINDS])).max(-1)
        return (1 - distance / 80).clip(0, 1).astype(np.float32)

    def watch(self, chunks: Iterable[np.ndarray]) -> np.ndarray:
        parts = [self.probabilities(frames) for frames in chunks]
        return np.concatenate([np.zeros((0, len(KINDS)), np.float32), *parts])


def colour_model() -> ColourModel:
    return ColourModel()


@dataclass(frozen=True)
class Crashing:
    """Makes a model that kills its process at chunks with blue in them, once for each file crash* in the folder."""

    folder: Path

    def __call__(self) -> ColourModel:
        def crash() -> None:
            for ready in self.folder.glob("crash*"):
                ready.unlink()
                os.kill(os.getpid(), signal.SIGKILL)

        return AtBlue(crash)


@dataclass(frozen=True)
class Broken:
    """Makes a model that fails at chunks with blue in them as long as there is a file `broken` in the folder."""

    folder: Path

    def __call__(self) -> ColourModel:
        def fail() -> None:
            if (self.folder / "broken").exists():
                raise RuntimeError("out of order")

        return AtBlue(fail)


class AtBlue(ColourModel):
    def __init__(self, act: Callable[[], None]):
        self.act = act

    def probabilities(self, frames: np.ndarray) -> np.ndarray:
        found = super().probabilities(frames)
        if frames.shape[1] > 1 and found[:, KINDS.index("level")].max() > 0.5:
            self.act()
        return found


class SlowModel(ColourModel):
    """Takes its time with chunks, so that one can be quicker to kill it."""

    def probabilities(self, frames: np.ndarray) -> np.ndarray:
        time.sleep(0.25 if frames.shape[1] > 1 else 0)
        return super().probabilities(frames)


def slow_model() -> SlowModel:
    return SlowModel()


def write_video(
    path: Path,
    shown: Shown = (),
    seconds: float = 20.0,
    *,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    times: Sequence[float] | None = None,
    rotation: int = 0,
    codec: str = "libx264",
) -> Path:
    """A grey video that has the colour of a kind from start to end of each event.

    Args:
        size: width, height. times: of the frames, in place of an even rate. rotation: as phones write it, in degrees.
    """
    width, height = size
    times = [n / fps for n in range(round(seconds * fps))] if times is None else times
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"preset": "ultrafast"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 2 * fps
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for moment in times:
            colour = next((COLOURS[kind] for start, end, kind in shown if start <= moment < end), GREY)
            picture = np.full((height, width, 3), colour, np.uint8)
            picture[: height // 8, : round(width * (moment % 1))] += 20  # something that moves, and tells the top
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(moment * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_truth(path: Path, shown: dict[str, Shown]) -> Path:
    lines = (
        json.dumps({"video": video, "start": start, "end": end, "kind": kind}) + "\n"
        for video, events in shown.items()
        for start, end, kind in events
    )
    path.write_text("".join(lines), encoding="utf-8")
    return path
