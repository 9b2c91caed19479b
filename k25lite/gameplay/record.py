"""Record real gameplay: H.264 videos of ViZDoom played by a script, with their exact events.

    DIR/gameplay_0000.mp4 ...  8.75 frames per second, status bar and messages on, a key frame at least every 18 frames
    DIR/events.jsonl           {"video", "start", "end", "kind"}: seconds in that video; definitions: module `events`
    DIR/manifest.json          parameters, codec; per video seconds, fps, width, height, frames, maps, seed, bytes, sha256
    DIR/parts/                 until all is recorded: entries and events of finished videos, work of unfinished ones

A video gets its final name by a rename, then its part likewise, and counts as recorded only with its part. So a killed
recording goes on with the first unfinished video and ends with the files of one that was never killed.

Not covered: sound, more than one player, levels other than the 32 of Freedoom: Phase 2. The player seldom finds the
exit of a level, so it is taken to the next one after a while, and a boss is summoned on each; all else comes of the
play.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from tqdm.auto import tqdm

from .doom import (
    MAPS,
    TICS_PER_FRAME,
    TICS_PER_SECOND,
    WIDTHS,
    end_with_parent,
    play,
    remove_leftovers,
    require_vizdoom,
)
from .events import Step, find_events

FPS = Fraction(TICS_PER_SECOND, TICS_PER_FRAME)
# Without B-frames the files are 6 % larger, but with them x264's vectorised code does not write the same bytes each
# time.
CODEC = {"preset": "veryfast", "crf": "30", "bf": "0"}
KEYFRAME_EVERY = 18  # frames at most, about 2 s: a clip that begins there is cut without encoding anew

Part = dict[str, Any]  # of one video: {"entry": its entry in the manifest, "events": its lines of events.jsonl}


@dataclass(frozen=True)
class Job:
    """One video to record; `seed` is that of the whole recording."""

    out: Path
    index: int
    frames: int
    seed: int
    width: int
    map_seconds: float

    @property
    def video(self) -> str:
        return f"gameplay_{self.index:04d}.mp4"


def record(
    out: Path | str,
    *,
    videos: int = 4,
    minutes: float = 8.0,
    seed: int = 0,
    workers: int = 1,
    width: int = 160,
    map_seconds: float = 120.0,
    progress: bool = True,
) -> Path:
    """Record `videos` videos of together `minutes` minutes into the directory `out`; return its manifest.json.

    `workers` processes record one video each at a time. `width`: 160, 320 or 640 pixels (4:3). `map_seconds`: mean stay
    on one map. `progress`: show a bar. Videos that `out` holds already are kept.

    Equal arguments, `workers` apart, give equal events, and on processors of one kind equal bytes.

    Raises ValueError for a bad argument, if `out` holds a recording with other parameters, or if another process is
    recording there; ModuleNotFoundError without vizdoom; RuntimeError if the game crashes.
    """
    numbers = {"videos": videos, "minutes": minutes, "workers": workers, "map_seconds": map_seconds}
    for name, value in numbers.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be greater than 0, not {value}")
    if width not in WIDTHS:
        raise ValueError(f"width must be one of {', '.join(map(str, WIDTHS))}, not {width}")
    frames = round(minutes * 60 * FPS / videos)
    if frames < 1:
        raise ValueError(f"minutes must leave each of {videos} videos one frame, which {minutes} does not")

    parameters = {"videos": videos, "minutes": minutes, "seed": seed, "width": width, "map_seconds": map_seconds}
    parameters["vizdoom"] = require_vizdoom().__version__
    out = Path(out).resolve()
    jobs = [Job(out, index, frames, seed, width, map_seconds) for index in range(videos)]
    with _claimed(out, parameters):
        parts = _finished_parts(out)
        todo = [job for job in jobs if job.video not in parts]
        with tqdm(total=frames * videos, unit=" frames", unit_scale=True, desc="record", disable=not progress) as bar:
            bar.update(frames * (videos - len(todo)))
            for job, part in _run(todo, workers, bar.update):
                parts[job.video] = part

        if todo or not (out / "manifest.json").exists():
            _assemble(out, parameters, [parts[job.video] for job in jobs])
        shutil.rmtree(out / "parts")
    return out / "manifest.json"


def _assemble(out: Path, parameters: dict[str, Any], parts: list[Part]) -> None:
    lines = [json.dumps(event) + "\n" for part in parts for event in part["events"]]
    _write(out / "events.jsonl", "".join(lines))
    codec = {"name": "libx264", **CODEC, "pyav": av.__version__}
    manifest = {"parameters": parameters, "codec": codec, "videos": [part["entry"] for part in parts]}
    _write(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")


@contextmanager
def _claimed(out: Path, parameters: dict[str, Any]) -> Iterator[None]:
    """Hold `out` as the directory of a recording with these parameters; ValueError if it is another's."""

    def check(held: dict[str, Any]) -> None:
        if held != parameters:
            differing = (f"{k} {held.get(k)}, not {v}" for k, v in parameters.items() if held.get(k) != v)
            raise ValueError(f"{out} holds a recording with {'; '.join(differing)}: choose another directory")

    if (out / "manifest.json").exists():
        check(json.loads((out / "manifest.json").read_text())["parameters"])
    claim = out / "parts" / "parameters.json"
    claim.parent.mkdir(parents=True, exist_ok=True)
    with open(out / "parts" / "lock", "w") as lock:
        try:
            import fcntl  # not on Windows

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it ends
        except ImportError:
            pass
        except BlockingIOError:
            raise ValueError(f"another process is recording into {out}") from None
        if not claim.exists():
            _write(claim, json.dumps(parameters))
        check(json.loads(claim.read_text()))
        yield


def _finished_parts(out: Path) -> dict[str, Part]:
    """By video, the parts whose videos are there: from parts/, or from the manifest of a finished recording."""
    parts = [json.loads(path.read_text()) for path in (out / "parts").glob("*.mp4.json")]
    if (out / "manifest.json").exists() and (out / "events.jsonl").exists():
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        for entry in json.loads((out / "manifest.json").read_text())["videos"]:
            parts.append({"entry": entry, "events": [event for event in events if event["video"] == entry["video"]]})
    paths = [out / part["entry"]["video"] for part in parts]
    return {
        path.name: part
        for path, part in zip(paths, parts, strict=True)
        if path.exists() and path.stat().st_size == part["entry"]["bytes"]
    }


def _run(jobs: list[Job], workers: int, advance: Callable[[int], Any]) -> Iterator[tuple[Job, Part]]:
    """Record the jobs, here or in worker processes; `advance` hears of each number of frames done."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, _record_video(job, advance)
        return
    spawn = multiprocessing.get_context("spawn")
    count = min(workers, len(jobs))
    pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=end_with_parent, initargs=(os.getpid(),))
    try:
        futures = {pool.submit(_record_video, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
            advance(futures[future].frames)
    finally:
        pool.shutdown(cancel_futures=True)


def _record_video(job: Job, advance: Callable[[int], Any] = lambda frames: None) -> Part:
    vizdoom = require_vizdoom()
    work = job.out / "parts" / job.video
    remove_leftovers(work)
    work.mkdir()
    seed = Random(f"{job.seed} {job.index}").randrange(2**31)
    # All share one order of maps, and each goes on about where the one before stops: together they show every map.
    order = Random(job.seed).sample(MAPS, len(MAPS))
    first = job.index * math.ceil(job.frames / FPS / job.map_seconds)
    maps = itertools.islice(itertools.cycle(order), first % len(order), None)
    session = play(work, job.frames, maps=maps, seed=seed, width=job.width, map_seconds=job.map_seconds)
    try:
        with closing(session):
            steps = _encode(session, work / "video.mp4", job.width, advance)
    except (vizdoom.ViZDoomErrorException, vizdoom.ViZDoomUnexpectedExitException) as error:
        raise RuntimeError(f"the game crashed while {job.video} was recorded: see {work / 'game.log'}") from error

    entry = {
        "video": job.video,
        "seconds": round(float(len(steps) / FPS), 3),
        "fps": float(FPS),
        "width": job.width,
        "height": job.width * 3 // 4,
        "frames": len(steps),
        "maps": [name for name, _ in itertools.groupby(step.map for step in steps)],
        "seed": seed,
        "bytes": (work / "video.mp4").stat().st_size,
        "sha256": hashlib.sha256((work / "video.mp4").read_bytes()).hexdigest(),
    }
    part = {"entry": entry, "events": [event.as_dict() for event in find_events(job.video, steps, float(FPS))]}
    os.replace(work / "video.mp4", job.out / job.video)
    _write(job.out / "parts" / f"{job.video}.json", json.dumps(part))
    shutil.rmtree(work)
    return part


def _encode(
    session: Iterable[tuple[np.ndarray, Step]], path: Path, width: int, advance: Callable[[int], Any]
) -> list[Step]:
    """Write the pictures of a session as H.264 to `path`; return its steps."""
    steps: list[Step] = []
    reformatter = VideoReformatter()  # one for all frames: setting it up costs more than using it
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=CODEC)
        stream.width, stream.height, stream.pix_fmt = width, width * 3 // 4, "yuv420p"
        stream.gop_size = KEYFRAME_EVERY  # x264 closes every group of pictures
        stream.thread_count = 1  # the videos are what runs in parallel
        for picture, step in session:
            frame = reformatter.reformat(av.VideoFrame.from_ndarray(picture, format="rgb24"), format="yuv420p")
            frame.pts, frame.time_base = len(steps), 1 / FPS
            container.mux(stream.encode(frame))
            steps.append(step)
            advance(1)
        container.mux(stream.encode())
    return steps


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
