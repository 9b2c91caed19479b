"""Footage as a detector sees it: chunks of four small frames, or key frames alone, and what happens in them.

A chunk is about CHUNK_SECONDS of a video, whatever its frame rate, and shows one picture of each of four steps of
FRAME_STEP: one before, two within and one after, so that a change between two chunks is seen by both. The picture of a step
is the one that changed most: what tells another map is a flash of a single frame. Key frames are the pictures that decode
without any other, for a look over hours in seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from os import PathLike

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation, VideoReformatter

from k25lite.gameplay.events import KINDS, Event
from k25lite.vision.media import MediaError

FRAMES = 4  # of a chunk
FRAME_STEP = 16 / 35  # seconds: every fourth frame of a recording
CHUNK_SECONDS = 2 * FRAME_STEP  # from one chunk to the next
STATUS_BAR = 168 / 200  # of the height of the picture: where it begins
MESSAGES = 0.2  # of the height of the picture: where the third of the game's messages ends
SMALL = (64, 64)  # height and width in pixels of a picture that is only glanced at
THUMBNAIL = (16, 12)  # width and height in which pictures are compared
THREADS = 1  # of scaling: to have several meet costs more than a small picture does
ROUNDING = 2e-3  # seconds that a time stamp may be off: containers round them to milliseconds


@dataclass(frozen=True)
class Chunks:
    """Some consecutive chunks of one video.

    Attributes:
        times: [n] seconds from the start of the video at which what each is about begins.
        frames: [n, 4, height, width, 3] uint8 RGB.
        shown: [n, 4] seconds at which each of these pictures appears.
    """

    times: np.ndarray
    frames: np.ndarray
    shown: np.ndarray


def read_chunks(
    source: str | PathLike,
    size: tuple[int, int],
    *,
    start: float = 0.0,
    end: float = math.inf,
    batch: int = 256,
    changed: bool = True,
) -> Iterator[Chunks]:
    """The chunks that begin in [start, end) seconds, `batch` at a time, in constant memory.

    Chunk k begins at k * CHUNK_SECONDS wherever reading starts, so the parts of a video have the chunks of the whole.
    Before a video begins its first picture stands still, and after it has ended the last that was chosen.

    Args:
        size: (height, width) in pixels to scale to, whatever the shape of the picture.
        changed: take the picture of a step that changed most; else the one on the screen when it begins.

    Raises:
        ValueError: `start` is negative or not before `end`, or `batch` is not positive.
        MediaError: no such file, no video in it, no frame in it, or cut short; what could be read comes first.
    """
    if not (0 <= start < end and batch > 0):
        raise ValueError(f"read_chunks needs 0 <= start < end and batch > 0, got {start}, {end} and {batch}")
    first = math.ceil((start - ROUNDING) / CHUNK_SECONDS)
    last = math.inf if end == math.inf else math.ceil((end - ROUNDING) / CHUNK_SECONDS)
    return _chunks(_moments(source, size, 2 * first - 1, 2 * last + 1, changed), first, last, batch)


def read_keyframes(
    source: str | PathLike, *, start: float = 0.0, end: float = math.inf
) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """The key frames from the one before `start` to `end` seconds, one by one.

    Returns:
        Seconds from the start of the video, how much the picture differs from the one before, 0 to 1, and the frame.

    Raises:
        MediaError: as in `read_chunks`; what could be read comes first.
    """
    difference = _Difference()
    for time, frame in _decode(source, start=start, keyframes=True):
        if time > end:
            return
        if frame is not None:
            yield time, difference(frame) / 255, frame


def read_all(chunks: Iterable[Chunks]) -> Chunks:
    """All batches of a video as one; ValueError if there is none."""
    parts = list(chunks)
    if not parts:
        raise ValueError("there is no chunk to read")
    return Chunks(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Chunks)))


def read_events(path: str | PathLike, kinds: Collection[str] = KINDS) -> list[Event]:
    """The events of a file events.jsonl that are of one of `kinds`; further kinds are passed over.

    Raises:
        ValueError: a line is no event; the message names file and line.
    """
    events = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = json.loads(line)
                times = float(fields["start"]), float(fields["end"])
                event = Event(fields["video"], *times, fields["kind"], fields.get("detail", ""))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: an event has video, start, end and kind ({error!r})"
                ) from error
            if event.kind in kinds:
                events.append(event)
    return events


def hide(frames: np.ndarray, *, status: bool = True, messages: bool = False) -> np.ndarray:
    """A copy of [..., height, width, 3] with the game's status bar, or the lines for its messages, black."""
    frames, height = frames.copy(), frames.shape[-3]
    if status:
        frames[..., math.floor(STATUS_BAR * height) :, :, :] = 0
    if messages:
        frames[..., : math.ceil(MESSAGES * height), :, :] = 0
    return frames


def shares(events: Iterable[Event], times: np.ndarray) -> np.ndarray:
    """[n, KINDS] float32: how much of each chunk lies in events of each kind, from 0 to 1.

    The events are those of the video whose `times` [n] these are; those of one kind do not overlap.
    """
    covered = np.zeros((len(times), len(KINDS)), np.float32)
    for event in events:
        common = np.minimum(times + CHUNK_SECONDS, event.end) - np.maximum(times, event.start)
        covered[:, KINDS.index(event.kind)] += common.clip(0) / CHUNK_SECONDS
    return covered.clip(max=1)


def _chunks(pictures: Iterator[tuple[float, np.ndarray]], first: int, last: float, batch: int) -> Iterator[Chunks]:
    """Chunks first ... last - 1 of as many pictures as there are, from the one before chunk `first`."""
    window = list(islice(pictures, 2))
    while first < last:
        window += islice(pictures, 2 * batch)
        count = int(min(len(window) // 2, batch, last - first))
        if not count:
            return
        padded = window + window[-1:] * 2
        parts = [padded[2 * i : 2 * i + FRAMES] for i in range(count)]
        frames = np.stack([[picture for _, picture in part] for part in parts])
        shown = np.array([[since for since, _ in part] for part in parts])
        yield Chunks((first + np.arange(count)) * CHUNK_SECONDS, frames, shown)
        first, window = first + count, window[2 * count :]


def _moments(
    source: str | PathLike, size: tuple[int, int], first: int, last: float, changed: bool
) -> Iterator[tuple[float, np.ndarray]]:
    """(when it appears, the picture) of step `first`, of the next ... before `last`; step k begins at FRAME_STEP * k.

    Of the pictures that appear in a step it is the one that differs most from those before and after it, for a flash may
    last for a single frame; where none appears, or none differs, the one on the screen.
    """
    scale, difference = Scaler(size), _Difference()
    number, most, since = first, 0.0, 0.0
    shown = chosen = None
    appeared, before = -math.inf, 0.0  # of `shown`: when, and how much it differs from the one before
    for time, frame in _decode(source, start=max(0.0, first * FRAME_STEP - 2 * ROUNDING)):
        after = difference(frame) if changed and frame else 0.0
        if shown is None:
            shown = frame  # before the first picture, that one
        begins = number * FRAME_STEP
        if chosen is None or appeared < begins - ROUNDING:
            chosen, since = shown, max(appeared, 0.0)
        elif appeared <= begins + ROUNDING or before + after > most:
            chosen, since, most = shown, appeared, before + after
        over = (number + 1) * FRAME_STEP - ROUNDING if frame else number * FRAME_STEP + ROUNDING
        while number < last and over <= time:
            yield since, scale(chosen)
            number, over, most = number + 1, over + FRAME_STEP, 0.0
            chosen, since = shown, max(appeared, 0.0)
        if number >= last:
            return
        shown, appeared, before = frame, time, after


class _Difference:
    """How much each frame differs from the one before it, in a thumbnail, 0 to 255."""

    def __init__(self) -> None:
        self.reformatter = VideoReformatter()
        self.before: np.ndarray | None = None

    def __call__(self, frame: av.VideoFrame) -> float:
        small = self.reformatter.reformat(
            frame, *THUMBNAIL, format="gray", interpolation=Interpolation.AREA, threads=THREADS
        )
        now, before = small.to_ndarray().astype(np.int16), self.before
        self.before = now
        return 0.0 if before is None else int(np.abs(now - before).sum()) / now.size


class Scaler:
    """Frames as upright [height, width, 3] uint8, by one reformatter: a new one per frame costs four times the decoding."""

    def __init__(self, size: tuple[int, int]):
        self.size, self.reformatter = size, VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        turns = frame.rotation // 90 % 4  # counter-clockwise, as phones ask for
        height, width = self.size[::-1] if turns % 2 else self.size
        scaled = self.reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=Interpolation.BICUBIC, threads=THREADS
        )
        return np.rot90(scaled.to_ndarray(), turns)


def _decode(
    source: str | PathLike, *, start: float = 0.0, keyframes: bool = False
) -> Iterator[tuple[float, av.VideoFrame | None]]:
    """(seconds, frame) from the key frame before `start`, and at last (the end of the video, None)."""
    try:
        with av.open(str(source), metadata_errors="replace") as container:
            if not container.streams.video:
                raise MediaError(f"{source}: holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise MediaError(f"{source}: the video is in a format that cannot be decoded")
            stream.thread_count = 1  # the videos are what runs in parallel
            if keyframes:
                stream.codec_context.skip_frame = "NONKEY"
            origin = stream.start_time or 0
            if start > 0:
                container.seek(origin + int(start / stream.time_base), stream=stream)
            duration = 1 / float(stream.average_rate) if stream.average_rate else 0.0
            end, tick = 0.0, stream.time_base
            for frame in container.decode(stream):  # exact: fractions in each would cost a tenth of decoding key frames
                time = (frame.pts - origin) * tick.numerator / tick.denominator if frame.pts is not None else end
                end = time + duration
                yield time, frame
            if not end:
                raise MediaError(f"{source}: the video stream holds no frame")
            yield end, None
            promised = float(stream.duration * stream.time_base) if stream.duration else end
            # Half a second of grace: durations in headers are rounded, and a last frame may be held longer.
            if not keyframes and end < promised - 0.5:
                raise MediaError(
                    f"{source}: cut short, {end:.2f} s can be decoded of the {promised:.2f} s in its header"
                )
    except FileNotFoundError as error:
        raise MediaError(f"{source}: no such file") from error
    except FFmpegError as error:
        raise MediaError(f"{source}: cannot be decoded as a video ({error.strerror})") from error
