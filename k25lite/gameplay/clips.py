"""Clips and key frames of events, cut out of the videos: H.264 that browsers play, and WebP.

A clip begins and ends at the frame, MARGIN seconds around its event, and is encoded anew: cut without that, it could only
begin at a key frame. Files are called after what they show, the video's digest and the milliseconds, so that what is there
already need not be made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from k25lite.gameplay.events import Event
from k25lite.gameplay.merge import Found
from k25lite.vision.media import MediaError

MARGIN = 1.0  # seconds before and after an event
LONGEST = 60.0  # seconds of a clip; of a longer event it shows the beginning
LARGEST_CLIP, LARGEST_FRAME = 640, 320  # pixels of the longer side
CODEC = {"preset": "veryfast", "crf": "29"}
CLOCK = Fraction(1, 1000)
ALWAYS = ("boss", "death", "level")
FIGHTS, PICKUPS = 400, 100  # the longest, and a sample


def choose(events: Sequence[Found]) -> set[int]:
    """Which events, by index, get a clip: all bosses, deaths and levels, the longest fights, a sample of the others.

    Up to FIGHTS + PICKUPS events all get one. The sample is even over the list, which is in order.
    """
    if len(events) <= FIGHTS + PICKUPS:
        return {*range(len(events))}
    chosen = {i for i, event in enumerate(events) if event.kind in ALWAYS}
    fights = [i for i, event in enumerate(events) if event.kind == "fight"]
    chosen |= set(sorted(fights, key=lambda i: events[i].start - events[i].end)[:FIGHTS])
    others = [i for i, event in enumerate(events) if event.kind not in (*ALWAYS, "fight")]
    return chosen | {others[i] for i in np.linspace(0, len(others) - 1, min(PICKUPS, len(others)), dtype=int)}


def clip_span(event: Found | Event, seconds: float) -> tuple[float, float]:
    """From when to when the clip of an event runs, in a video of that length."""
    start = max(event.start - MARGIN, 0.0)
    return round(start, 3), round(min(event.end + MARGIN, start + LONGEST, max(seconds, start + 0.1)), 3)


def clip_name(digest: str, start: float, end: float) -> str:
    return f"{digest[:10]}-{round(start * 1000)}-{round(end * 1000)}.mp4"


def frame_name(digest: str, time: float) -> str:
    return f"{digest[:10]}-{round(time * 1000)}.webp"


def illustrate(task: dict[str, Any]) -> dict[str, Any]:
    """Cut clips and key frames of one video; those that are there already are left as they are.

    Args:
        task: path, digest and seconds of the video; out, the folder to write clips/ and frames/ into; clips, a list of
            (start, end); frames, a list of seconds.

    Returns:
        {"files": how many are there now}, and `error` if some could not be made.
    """
    out, digest, made, error = Path(task["out"]), task["digest"], 0, ""
    for start, end in task["clips"]:
        target = out / "clips" / clip_name(digest, start, end)
        try:
            made += target.exists() or cut_clip(task["path"], start, end, target).exists()
        except MediaError as problem:
            error = str(problem)
    wanted = {time: out / "frames" / frame_name(digest, time) for time in task["frames"]}
    try:
        missing = [time for time, target in wanted.items() if not target.exists()]
        for time, picture in frames_at(task["path"], missing):
            _save(picture, wanted[time])
    except MediaError as problem:
        error = str(problem)
    made += sum(target.exists() for target in wanted.values())
    return {"files": made} | ({"error": error} if error else {})


def cut_clip(source: str | os.PathLike[str], start: float, end: float, out: Path) -> Path:
    """Write what is on the screen from `start` to `end` seconds to `out`, as H.264 in MP4, yuv420p, without sound.

    Raises:
        ValueError: not 0 <= start < end.
        MediaError: the file cannot be read, or has no frame there.
    """
    if not 0 <= start < end:
        raise ValueError(f"a clip goes from a start of 0 or more to a later end, got {start} and {end}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.mp4")
    resize, number = VideoReformatter(), -1
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream: Any = None
            for frame, time, until in _shown(source, start, end):
                if stream is None:
                    turned = frame.rotation % 180 != 0
                    width, height = _fit(frame.width, frame.height, LARGEST_CLIP, even=True)
                    stream = container.add_stream("libx264", rate=30, options=CODEC)
                    stream.width, stream.height = (height, width) if turned else (width, height)
                    stream.pix_fmt, stream.codec_context.time_base = "yuv420p", CLOCK
                    stream.thread_count = 1
                upright = _upright(frame, resize, width, height)
                # The first frame may have begun before the clip; two frames never share a time.
                number = max(round((max(time, start) - start) / CLOCK), number + 1)
                upright.pts, upright.time_base = number, CLOCK
                upright.duration = max(round((min(until, end) - start) / CLOCK) - number, 1)
                container.mux(stream.encode(upright))
            if stream is None:
                raise MediaError(f"{source}: has no frame from {start} to {end} s")
            container.mux(stream.encode())
        os.replace(partial, out)
    except (OSError, FFmpegError) as error:  # of the source, or of the disk
        raise MediaError(f"{source}: no clip could be cut from {start} s ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return out


def frames_at(source: str | os.PathLike[str], times: Iterable[float]) -> Iterator[tuple[float, Image.Image]]:
    """(time, what is on the screen then), upright, its longer side at most LARGEST_FRAME pixels.

    Raises:
        MediaError: the file cannot be read, or has no frame there.
    """
    resize = VideoReformatter()
    for time in sorted(times):
        shown = next(_shown(source, time, time + 1e-3), None)
        if shown is None:
            raise MediaError(f"{source}: has no frame at {time} s")
        frame = shown[0]
        picture = _upright(frame, resize, *_fit(frame.width, frame.height, LARGEST_FRAME), format="rgb24")
        yield time, Image.fromarray(picture.to_ndarray())


def _shown(source: str | os.PathLike[str], start: float, end: float) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """(frame, from, until) of all that is on the screen between two times; the last frame stays on."""
    try:
        with av.open(str(source), metadata_errors="replace") as container:
            if not container.streams.video:
                raise MediaError(f"{source}: holds no video stream")
            stream = container.streams.video[0]
            stream.thread_count = 1
            origin = stream.start_time or 0
            container.seek(origin + int(start / stream.time_base), stream=stream)
            step = 1 / float(stream.average_rate) if stream.average_rate else 0.04
            before: tuple[av.VideoFrame, float] | None = None
            for frame in container.decode(stream):
                time = float((frame.pts - origin) * stream.time_base) if frame.pts is not None else 0.0
                if before is not None and time > start + 1e-4:
                    yield *before, time
                if time >= end - 1e-4 and before is not None:
                    return
                before = frame, time
            if before is not None:
                yield *before, max(before[1] + step, end if before[1] + step < start else 0.0)
    except (OSError, FFmpegError) as error:
        raise MediaError(f"{source}: cannot be decoded as a video ({error.strerror or error})") from error


def _upright(
    frame: av.VideoFrame, resize: VideoReformatter, width: int, height: int, format: str = "yuv420p"
) -> av.VideoFrame:
    """Scaled to a size, then turned the way that the file says."""
    turns = frame.rotation // 90 % 4
    scaled = resize.reformat(
        frame, width=width, height=height, format="rgb24" if turns else format, interpolation=Interpolation.BICUBIC
    )
    if not turns:
        return scaled
    turned = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(scaled.to_ndarray(), turns)), format="rgb24")
    return turned if format == "rgb24" else turned.reformat(format=format)


def _fit(width: int, height: int, largest: int, even: bool = False) -> tuple[int, int]:
    """The size in the same shape whose longer side is at most `largest`; H.264 in yuv420p wants even numbers."""
    shrink = min(1.0, largest / max(width, height))
    unit = 2 if even else 1
    fitted = (max(unit, round(side * shrink / unit) * unit) for side in (width, height))
    return next(fitted), next(fitted)


def _save(picture: Image.Image, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        picture.save(partial, format="WEBP", quality=80, method=2)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
