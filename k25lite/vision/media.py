"""Images and videos from files into packed patches.

Sizes: a picture is resized to multiples of patch * merge pixels, so that its patches form whole 2x2 blocks, and shrunk
first if it would cost more than a budget of vision tokens. It is never cropped or padded, and enlarged only by rounding:
a picture smaller than one block becomes one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import Interpolation, VideoReformatter
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError

from k25lite.vision.moonvit3d import MoonViT3DConfig

MAX_TOKENS = 4096  # vision tokens one image, or one chunk, may cost: 1,792 x 1,792 pixels at patches of 14


class MediaError(ValueError):
    """A file that cannot be read as the picture or video it should be; the message names it."""


@dataclass(frozen=True)
class VideoChunk:
    """Up to four sampled frames of a video, one item for the encoder.

    Attributes:
        frames: [t, height, width, 3] uint8 RGB.
        times: seconds from the start of the video, one per frame.
    """

    frames: np.ndarray
    times: tuple[float, ...]

    @property
    def timestamp(self) -> str:
        """When the chunk starts, as it stands in a prompt: HH:MM:SS.mmm."""
        milliseconds = round(self.times[0] * 1000)
        seconds, milliseconds = divmod(milliseconds, 1000)
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"


def read_image(source: str | PathLike) -> np.ndarray:
    """A picture file as [height, width, 3] uint8 RGB; transparency is laid on white, the camera's rotation applied.

    Raises:
        MediaError: no such file, not a picture, damaged, or too large to decode safely.
    """
    try:
        with Image.open(source) as image:
            upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGBA")
    except FileNotFoundError as error:
        raise MediaError(f"{source}: no such file") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{source}: not a picture in a format that pillow reads") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{source}: cannot be decoded ({error})") from error
    white = Image.new("RGBA", upright.size, "white")
    return np.asarray(Image.alpha_composite(white, upright).convert("RGB"))


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits in 8, which `convert` would clip to white; others as they are. ValueError: of floats."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, of which nobody says what is white")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


def fit_size(height: int, width: int, unit: int, max_tokens: int = MAX_TOKENS) -> tuple[int, int]:
    """The size to resize to: multiples of `unit` pixels (patch * merge), at most `max_tokens` blocks of `unit` squared.

    The aspect ratio is kept as far as whole blocks allow.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    shrink = min(1.0, math.sqrt(max_tokens * unit**2 / (height * width)))
    rows, columns = (min(max(1, round(side * shrink / unit)), max_tokens) for side in (height, width))
    while rows * columns > max_tokens:  # rounding both up may overshoot: give up the side that was rounded up more
        if rows > 1 and rows * width >= columns * height:
            rows -= 1
        else:
            columns -= 1
    return rows * unit, columns * unit


def video_chunks(
    source: str | PathLike,
    fps: float = 2.0,
    *,
    frames_per_chunk: int = 4,
    unit: int = 28,
    max_tokens: int = MAX_TOKENS,
) -> Iterator[VideoChunk]:
    """Decode a video chunk by chunk, in constant memory however long it is.

    Args:
        fps: frames taken per second of video; of a slower video, every frame is taken once.
        frames_per_chunk: 1 to 4; the last chunk may be shorter.
        unit: frames are turned upright, as phones ask for, and resized to multiples of this many pixels (patch * merge)
            while they are decoded; all to the size of the first one.
        max_tokens: vision tokens a chunk may cost.

    Raises:
        MediaError: no such file, no video in it, no frame in it, or cut short. A file found to be cut short raises after
            the chunks that could be read.
    """
    if fps <= 0 or frames_per_chunk < 1:
        raise ValueError(f"fps and frames_per_chunk must be positive, got {fps} and {frames_per_chunk}")
    frames: list[np.ndarray] = []
    times: list[float] = []
    for time, frame in _sample_frames(source, fps, unit, max_tokens):
        times.append(time)
        frames.append(frame)
        if len(frames) == frames_per_chunk:
            yield VideoChunk(np.stack(frames), tuple(times))
            frames, times = [], []
    if frames:
        yield VideoChunk(np.stack(frames), tuple(times))


def read_video(source: str | PathLike, fps: float = 2.0, **options) -> list[VideoChunk]:
    """All chunks of a video at once; arguments and errors as in `video_chunks`."""
    return list(video_chunks(source, fps, **options))


def _sample_frames(source, fps: float, unit: int, max_tokens: int) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, [height, width, 3]) of the first frame at or after each multiple of 1 / fps seconds."""
    # One reformatter for the whole video: a new one per frame costs four times the decoding.
    reformatter = VideoReformatter()
    try:
        with av.open(str(source)) as container:
            if not container.streams.video:
                raise MediaError(f"{source}: holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            start = float((stream.start_time or 0) * stream.time_base)
            due, end, decoded = 0.0, 0.0, 0
            size: tuple[int, int] | None = None
            for frame in container.decode(stream):
                time = float(frame.pts * stream.time_base) - start if frame.pts is not None else end
                if frame.duration:
                    end = time + float(frame.duration * frame.time_base)
                else:
                    end = time + (1 / float(stream.average_rate) if stream.average_rate else 0.0)
                decoded += 1
                if time < due - 1e-6:
                    continue
                due = (math.floor((time + 1e-6) * fps) + 1) / fps
                turns = frame.rotation // 90 % 4  # counter-clockwise
                if size is None:
                    sides = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
                    size = fit_size(*sides, unit, max_tokens)
                height, width = size[::-1] if turns % 2 else size
                scaled = reformatter.reformat(
                    frame, width=width, height=height, format="rgb24", interpolation=Interpolation.BICUBIC
                )
                yield time, np.rot90(scaled.to_ndarray(), turns)
            if not decoded:
                raise MediaError(f"{source}: the video stream holds no frame")
            promised, grace = end, 0.5  # durations in headers are rounded
            if stream.duration:
                promised = float(stream.duration * stream.time_base)
            elif container.duration and len(container.streams) == 1:  # else it may be the sound that lasts longer
                promised = container.duration / av.time_base - max(start, 0.0)
                grace = max(2.0, 0.1 * promised)
            if end < promised - grace and not 0 < stream.frames <= decoded:
                raise MediaError(
                    f"{source}: cut short, {end:.2f} s can be decoded of the {promised:.2f} s in its header"
                )
    except FileNotFoundError as error:
        raise MediaError(f"{source}: no such file") from error
    except FFmpegError as error:
        raise MediaError(f"{source}: cannot be decoded as a video ({error.strerror})") from error


def pack(
    items: Iterable[np.ndarray | Image.Image | VideoChunk], config: MoonViT3DConfig, max_tokens: int = MAX_TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and video chunks, in order, as one packed sequence of normalised patches.

    Args:
        items: pictures (pillow images or [height, width, 3] uint8), clips ([t, height, width, 3] uint8) and
            `VideoChunk`s, of any sizes.
        config: the encoder's, for its patch size and merge.
        max_tokens: vision tokens one item may cost; larger items are shrunk.

    Returns:
        pixel_values [patches, 3, p, p] float32 in [-1, 1] and grid_thw [items, 3] int64: what `MoonViT3D` takes.

    Raises:
        ValueError: an item that is none of these, or has no pixels, or more frames than a chunk may have.
    """
    patch, merge = config.patch_size, config.merge_kernel_size[0]
    patches, grids = [], []
    for index, item in enumerate(items):
        frames = _as_frames(item, index)
        if not 1 <= len(frames) <= config.pos_emb_time:
            raise ValueError(f"items[{index}] has {len(frames)} frames; a chunk has 1 to {config.pos_emb_time}")
        size = fit_size(frames.shape[1], frames.shape[2], patch * merge, max_tokens)
        if frames.shape[1:3] != size:
            resized = [Image.fromarray(f).resize(size[::-1], Image.Resampling.BICUBIC) for f in frames]
            frames = np.stack([np.asarray(f) for f in resized])
        pixels = torch.from_numpy(np.array(frames)).float() / 127.5 - 1
        patches.append(rearrange(pixels, "t (h p) (w q) c -> (t h w) c p q", p=patch, q=patch))
        grids.append([len(frames), size[0] // patch, size[1] // patch])
    if not grids:
        raise ValueError("items is empty: there is nothing to pack")
    return torch.cat(patches), torch.tensor(grids)


def _as_frames(item: np.ndarray | Image.Image | VideoChunk, index: int) -> np.ndarray:
    """An item as [t, height, width, 3] uint8."""
    given = item.frames if isinstance(item, VideoChunk) else item
    array = np.asarray(_eight_bits(given).convert("RGB") if isinstance(given, Image.Image) else given)
    frames = array[None] if array.ndim == 3 else array
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames[:1].size:
        raise ValueError(f"items[{index}] must be [(t,) height, width, 3] uint8 RGB, got {array.dtype} {array.shape}")
    return frames
