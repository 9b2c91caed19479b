"""What there is to analyse, and how it is split: files, what their containers say, and segments with quiet borders.

A segment is a stretch of one video that one sub-agent watches. It also sees MARGIN seconds on either side, because what an
event is cannot be told from half of it; `merge` then makes one event of what two neighbours saw.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from k25lite.vision.media import MediaError

SUFFIXES = frozenset(".avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ts .webm .wmv".split())  # taken from a folder
SHORTEST, LONGEST = 60.0, 300.0  # seconds of a segment: enough of them for two workers, few enough for a day of video
LEAST = 0.75  # of the length aimed at: how short a quiet place may cut a segment
MARGIN = 15.0  # seconds: what an event may have of gaps, 10 s (`events.BOSS_GAP`), and what a chunk is judged by, 14 s


@dataclass(frozen=True)
class Footage:
    """One video file.

    Attributes:
        name: by which it is called in events and in the report.
        digest: SHA-256 of its bytes, in hexadecimal.
        seconds: its duration. fps: frames per second on average, 0 where the container does not say.
        rotation: degrees, counter-clockwise, by which its pictures are to be turned to stand upright.
    """

    path: Path
    name: str
    digest: str
    seconds: float
    fps: float
    width: int
    height: int
    rotation: int
    codec: str
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "path"}


@dataclass(frozen=True, order=True)
class Segment:
    """Seconds `start` to `end` of the video of that name."""

    video: str
    start: float
    end: float


def find_videos(paths: Iterable[str | os.PathLike[str]]) -> dict[str, Path]:
    """Files by the names they go by: that of the file, with as many folders before it as it takes to tell them apart.

    Args:
        paths: files, whatever they are called, and folders, whose files with the suffix of a video are taken.

    Raises:
        ValueError: nothing is given, there is no such path, no video in a folder, or two with names that read alike.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            if not files:
                raise ValueError(f"no video in the folder {path}")
        found += [file.absolute() for file in files]
    found = list(dict.fromkeys(found))
    if not found:
        raise ValueError("give at least one video, or a folder of videos")
    # Bytes that are no UTF-8 as \xff, for names go into JSON, prompts and pages.
    shown = {path: Path(os.fsencode(path).decode("utf-8", "backslashreplace")) for path in found}
    names = {path: shown[path].name for path in found}
    depth = 1
    while len(set(names.values())) < len(names):
        depth += 1
        if depth > max(len(path.parts) for path in found):
            raise ValueError(f"two videos have names that read alike: {Counter(names.values()).most_common(1)[0][0]}")
        shared = {name for name, count in Counter(names.values()).items() if count > 1}
        names = {path: "/".join(shown[path].parts[-depth:]) if name in shared else name for path, name in names.items()}
    return {name: path for path, name in names.items()}


def probe(path: Path, name: str | None = None) -> Footage:
    """What a video file is, from its container and first frame.

    Raises:
        MediaError: no such file, no video in it, or nothing in the video that can be decoded.
    """
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise MediaError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            frame = next(container.decode(stream), None)
            if frame is None:
                raise MediaError(f"{path}: the video stream holds no frame")
            seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
            seconds = seconds or (container.duration or 0) / av.time_base
            if not 0 < seconds < container.size:  # nothing is said, or nonsense: less than a byte for a second
                seconds = _measured(container, stream)
            about = (float(stream.average_rate or 0), frame.width, frame.height, frame.rotation % 360)
            codec = stream.codec_context.name
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, FFmpegError) as error:
        raise MediaError(f"{path}: cannot be read as a video ({error.strerror or error})") from error
    return Footage(path, name or path.name, digest, seconds, *about, codec, path.stat().st_size)


def _measured(container: Any, stream: Any) -> float:
    """The end of the last packet."""
    last = 0.0
    for packet in container.demux(stream):
        if packet.pts is not None:
            last = max(last, float((packet.pts - (stream.start_time or 0) + (packet.duration or 0)) * stream.time_base))
    return last or 1.0 / float(stream.average_rate or 1)


def plan(footage: Footage, quiet: Sequence[tuple[float, float]]) -> list[Segment]:
    """Segments that cover the video without a gap, each SHORTEST to LONGEST seconds where the video allows it.

    Args:
        quiet: (seconds, how much goes on there) of places to cut at; the quietest within reach is taken.
    """
    target = _target(footage)
    borders = [0.0]
    while (left := footage.seconds - borders[-1]) > 1.5 * target:
        low, high = borders[-1] + LEAST * target, borders[-1] + min(1.25 * target, left - 0.5 * target)
        within = [(activity, abs(time - borders[-1] - target), time) for time, activity in quiet if low <= time <= high]
        borders.append(min(within)[2] if within else borders[-1] + target)
    borders.append(footage.seconds)
    return [Segment(footage.name, start, end) for start, end in pairwise(borders)]


def most_segments(footage: Footage) -> int:
    """As many as `plan` may make at most, wherever it is quiet."""
    return math.ceil(footage.seconds / (LEAST * _target(footage)))


def _target(footage: Footage) -> float:
    return min(max(footage.seconds / 4, SHORTEST), LONGEST)
