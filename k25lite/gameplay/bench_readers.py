"""Readers of the same pictures of recorded footage, ours and its peers', and what shows that they are the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import av
import numpy as np

from k25lite.bench import SUBJECT, Disagreement, refuse_difference
from k25lite.gameplay.footage import FRAME_STEP, read_chunks

PYAV, TORCHCODEC = "PyAV, to_ndarray", "torchcodec"
# Mean difference of a picture's pixels, of 255. torchcodec scales bilinearly, which makes up to 7 of recorded footage; of
# pictures one moment apart, half differ by more than 18.
TOLERANCE = {PYAV: 0.0, TORCHCODEC: 12.0}
BATCH = 256  # pictures that torchcodec is asked for at a time

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Video:
    """A video of a recording, from its manifest.

    Attributes:
        stride: each so many frames one is on the screen at a moment of a chunk.
    """

    path: Path
    frames: int
    seconds: float
    stride: int

    @property
    def pictures(self) -> int:
        """How many moments of chunks it has."""
        return -(-self.frames // self.stride)


# Yields the pictures of a video at the moments of its chunks: [n, height, width, 3] uint8, any n at a time.
Reader = Callable[[Video, Size], Iterator[np.ndarray]]


def read_recording(folder: Path) -> list[Video]:
    """The videos of a recording.

    Raises:
        ValueError: it is none, a video is missing or empty, or moments of chunks are no whole number of frames apart.
    """
    manifest = folder / "manifest.json"
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["videos"]
        videos = [
            Video(folder / each["video"], int(each["frames"]), float(each["seconds"]), round(FRAME_STEP * each["fps"]))
            for each in entries
        ]
        rates = {each["fps"] for each in entries}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"no recording in the folder {folder} ({error!r})") from error
    if odd := [rate for rate in rates if abs(FRAME_STEP * rate - max(round(FRAME_STEP * rate), 1)) > 1e-6]:
        raise ValueError(f"{manifest}: the frame rate must be a multiple of {1 / FRAME_STEP:g}, not {odd[0]:g}")
    for video in videos:
        if not (video.path.is_file() and video.frames > 0 and 0 < video.seconds < math.inf):
            raise ValueError(
                f"{manifest}: {video.path.name} is no file of some frames ({video.frames}, {video.seconds} s)"
            )
    return videos


def decode(path: Path, keyframes: bool = False) -> int:
    """Decode a video in one thread, and do nothing with it; the number of frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        if keyframes:
            stream.codec_context.skip_frame = "NONKEY"
        return sum(1 for _ in container.decode(stream))


def ours(video: Video, size: Size) -> Iterator[np.ndarray]:
    """The two moments within each chunk; those before and after belong to its neighbours. A last one may be made up.

    Peers know nothing of pictures that changed: both take the one on the screen.
    """
    for chunks in read_chunks(video.path, size, changed=False):
        yield chunks.frames[:, 1:3].reshape(-1, *chunks.frames.shape[2:])


def to_ndarray(video: Video, size: Size) -> Iterator[np.ndarray]:
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for index, frame in enumerate(container.decode(stream)):
            if index % video.stride == 0:
                yield frame.to_ndarray(format="rgb24", height=size[0], width=size[1], interpolation="BICUBIC")[None]


def torchcodec() -> Reader | None:
    """A reader, if torchcodec is there and finds the libraries of FFmpeg that it needs."""
    try:
        decoders, transforms = import_module("torchcodec.decoders"), import_module("torchcodec.transforms")
    except (ImportError, OSError, RuntimeError):
        return None

    def read(video: Video, size: Size) -> Iterator[np.ndarray]:
        scale = transforms.Resize(size)
        decoder = decoders.VideoDecoder(video.path, dimension_order="NHWC", seek_mode="approximate", transforms=[scale])
        for first in range(0, video.frames, BATCH * video.stride):
            last = min(first + BATCH * video.stride, video.frames)
            yield decoder.get_frames_in_range(first, last, video.stride).data.numpy()

    return read


def check_frames(case: str, video: Video, frames: int) -> None:
    if frames != video.frames:
        raise Disagreement(
            f"{case}: {frames:,} frames of {video.path.name} can be decoded, {video.frames:,} were recorded; not timed"
        )


def check_pictures(case: str, video: Video, readers: Mapping[str, Reader], size: Size) -> None:
    """Raise Disagreement unless all readers give the same pictures, and as many as there are."""
    seen = {who: np.concatenate(list(reader(video, size))) for who, reader in readers.items()}
    for who, pictures in seen.items():
        count = video.pictures + (video.pictures % 2 if who == SUBJECT else 0)  # whole chunks
        if len(pictures) != count:
            raise Disagreement(
                f"{case}: {who} takes {len(pictures):,} pictures of {video.path.name}, not {count:,}; not timed"
            )
    mine = seen.pop(SUBJECT)[: video.pictures].astype(np.int16)
    for who, pictures in seen.items():
        difference = max(float(np.abs(a - b).mean()) for a, b in zip(mine, pictures, strict=True))
        refuse_difference(case, who, f"a picture of {video.path.name}", difference, TOLERANCE[who])
