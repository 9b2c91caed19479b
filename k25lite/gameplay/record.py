"""Record real gameplay: H.264 videos of ViZDoom played by a script, with their exact events.

    DIR/gameplay_0000.mp4 ...  8.75 frames per second, status bar and messages on, a key frame at least every 18 frames
    DIR/events.jsonl           {"video", "start", "end", "kind", "detail"}: seconds in that video; definitions: module
                               `events`; no detail where none is known
    DIR/states.csv             video, second, map, health, armor, ammo, kills: of the frame shown at each full second
    DIR/boxes.csv              if asked for: video, frame, monster, left, top, right, bottom: of each in view, from 0 to 1
    DIR/manifest.json          parameters, codec; per video seconds, fps, width, height, frames, maps, seed, bytes, sha256
    DIR/parts/                 until all is recorded: what is known of finished videos, work of unfinished ones

A video gets its final name by a rename, then its part likewise, and counts as recorded only with its part. So a killed
recording goes on with the first unfinished video and ends with the files of one that was never killed.

Not covered: sound, more than one player, levels other than the 32 of Freedoom: Phase 2 and five of ViZDoom's scenarios,
which are played if asked for. The player seldom finds the exit of a level, so it is taken to the next one after a
while, and a boss is summoned on each; all else comes of the play.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
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

from k25lite.gameplay.doom import (
    MAPS,
    SCENARIOS,
    TICS_PER_FRAME,
    TICS_PER_SECOND,
    WIDTHS,
    end_with_parent,
    play,
    remove_leftovers,
    require_vizdoom,
)
from k25lite.gameplay.events import STATE, Box, Step, find_events, states
from k25lite.results import write_whole

FPS = Fraction(TICS_PER_SECOND, TICS_PER_FRAME)
# Without B-frames the files are 6 % larger, but with them x264's vectorised code does not write the same bytes each
# time.
CODEC = {"preset": "veryfast", "crf": "30", "bf": "0"}
POLL_SECONDS = 0.5  # how often the bar moves while worker processes record
KEYFRAME_EVERY = 18  # frames at most, about 2 s: a clip that begins there is cut without encoding anew
BYTES_PER_SECOND = {160: 10_000, 320: 26_000, 640: 68_000}  # of footage, by width: measured, and rounded up

Part = dict[str, Any]  # of one video: {"entry" in the manifest, "events", "states", "boxes": its lines in those files}


@dataclass(frozen=True)
class Job:
    """One video to record; `seed` is that of the whole recording."""

    out: Path
    index: int
    frames: int
    seed: int
    width: int
    map_seconds: float
    maps: tuple[str, ...]
    boxes: bool
    encounters: bool

    @property
    def video(self) -> str:
        return f"gameplay_{self.index:04d}.mp4"


def record(
    out: Path | str,
    *,
    videos: int = 4,
    minutes: float = 8.0,
    seed: int = 0,
    workers: int | None = None,
    width: int = 160,
    map_seconds: float = 120.0,
    maps: Iterable[str] | None = None,
    boxes: bool = False,
    encounters: bool = False,
    progress: bool = True,
) -> Path:
    """Record `videos` videos of together `minutes` minutes into the directory `out`; return its manifest.json.

    `workers` processes record one video each at a time, by default one per processor. `width`: 160, 320 or 640 pixels
    (4:3). `map_seconds`: mean stay on one map. `maps`: those to play, two or more of doom.MAPS and doom.SCENARIOS, by
    default all of the former. `boxes`: write boxes.csv, where in each frame monsters are to be seen. `encounters`:
    monster upon monster, to learn them from; see that module. `progress`: show a bar. Videos that `out` holds already
    are kept.

    Equal arguments, `workers` apart, give equal events, and on processors of one kind equal bytes, but for a frame in tens
    of thousands in which the game has drawn a sprite otherwise.

    Raises ValueError for a bad argument, if the disk has too little room, if `out` holds a recording with other
    parameters, or if another process is recording there; ModuleNotFoundError without vizdoom; RuntimeError if the game
    crashes.
    """
    workers = min(videos, os.cpu_count() or 1) if workers is None else workers
    numbers = {"videos": videos, "minutes": minutes, "workers": workers, "map_seconds": map_seconds}
    for name, value in numbers.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be greater than 0, not {value}")
    if width not in WIDTHS:
        raise ValueError(f"width must be one of {', '.join(map(str, WIDTHS))}, not {width}")
    chosen = MAPS if maps is None else tuple(sorted(set(map(str, maps))))
    if len(chosen) < 2 or not set(chosen) <= {*MAPS, *SCENARIOS}:
        places = f"{MAPS[0]} to {MAPS[-1]}, {', '.join(SCENARIOS)}"
        raise ValueError(f"maps must be two or more of {places}, not {', '.join(chosen) or 'none'}")
    frames = round(minutes * 60 * FPS / videos)
    if frames < 1:
        raise ValueError(f"minutes must leave each of {videos} videos one frame, which {minutes} does not")

    parameters: dict[str, Any] = {
        "videos": videos,
        "minutes": minutes,
        "seed": seed,
        "width": width,
        "map_seconds": map_seconds,
    }
    if maps is not None:
        parameters["maps"] = list(chosen)
    parameters |= {name: True for name, wanted in (("boxes", boxes), ("encounters", encounters)) if wanted}
    parameters["vizdoom"] = require_vizdoom().__version__
    out = Path(out).resolve()
    jobs = [Job(out, index, frames, seed, width, map_seconds, chosen, boxes, encounters) for index in range(videos)]
    _check_room(out, float(frames / FPS) * BYTES_PER_SECOND[width] * (videos - len(_finished_parts(out))))
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
    write_whole(out / "events.jsonl", "".join(lines))
    rows = [",".join(("video", *STATE)), *(row for part in parts for row in part["states"])]
    write_whole(out / "states.csv", "\n".join(rows) + "\n")
    if "boxes" in parameters:
        rows = [",".join(("video", "frame", *Box._fields)), *(row for part in parts for row in part["boxes"])]
        write_whole(out / "boxes.csv", "\n".join(rows) + "\n")
    codec = {"name": "libx264", **CODEC, "pyav": av.__version__}
    manifest = {"parameters": parameters, "codec": codec, "videos": [part["entry"] for part in parts]}
    write_whole(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")


@contextmanager
def _claimed(out: Path, parameters: dict[str, Any]) -> Iterator[None]:
    """Hold `out` as the directory of a recording with these parameters; ValueError if it is another's."""

    def check(held: dict[str, Any]) -> None:
        if held != parameters:
            pairs = [(name, held.get(name, "all"), parameters.get(name, "all")) for name in held | parameters]
            differing = "; ".join(f"{name} {there}, not {here}" for name, there, here in pairs if there != here)
            raise ValueError(f"{out} holds a recording with {differing}: choose another directory")

    if (manifest := _manifest(out)) is not None:
        check(manifest["parameters"])
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
            write_whole(claim, json.dumps(parameters))
        check(json.loads(claim.read_text()))
        yield


def _manifest(out: Path) -> dict[str, Any] | None:
    """That of a finished recording, if `out` holds one; ValueError if it is something else's."""
    if not (out / "manifest.json").exists():
        return None
    try:
        match json.loads((out / "manifest.json").read_text()):
            case {"parameters": dict(), "videos": list()} as manifest:
                return manifest
    except ValueError:  # no JSON
        pass
    raise ValueError(f"{out / 'manifest.json'} is that of something else: choose another directory")


def _finished_parts(out: Path) -> dict[str, Part]:
    """By video, the parts whose videos are there: from parts/, or from the manifest of a finished recording."""
    parts = [json.loads(path.read_text()) for path in (out / "parts").glob("*.mp4.json")]
    manifest = _manifest(out)
    tables = ["states", *(["boxes"] if manifest and "boxes" in manifest["parameters"] else [])]
    if manifest is not None and all((out / name).exists() for name in ("events.jsonl", *(f"{t}.csv" for t in tables))):
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        rows = {table: (out / f"{table}.csv").read_text().splitlines() for table in tables}
        for entry in manifest["videos"]:
            mine = [event for event in events if event["video"] == entry["video"]]
            own = {table: [row for row in rows[table] if row.startswith(entry["video"] + ",")] for table in tables}
            parts.append({"entry": entry, "events": mine, **own})
    paths = [out / part["entry"]["video"] for part in parts]
    return {
        path.name: part
        for path, part in zip(paths, parts, strict=True)
        if "states" in part and path.exists() and path.stat().st_size == part["entry"]["bytes"]
    }


def _check_room(out: Path, needed: float) -> None:
    """ValueError if the disk of `out` has less than `needed` bytes left."""
    free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free
    if needed > free:
        raise ValueError(f"recording needs about {needed / 1e9:.1f} GB in {out}, which has {free / 1e9:.1f} GB left")


def _run(jobs: list[Job], workers: int, advance: Callable[[int], Any]) -> Iterator[tuple[Job, Part]]:
    """Record the jobs, here or in worker processes; `advance` hears of each number of frames done."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, _record_video(job, advance)
        return
    spawn = multiprocessing.get_context("spawn")
    frames_done = spawn.RawArray("q", len(jobs))  # by job: each has one writer, so that no lock is needed
    stop = spawn.RawValue("b")
    arguments = (os.getpid(), frames_done, stop)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=spawn, initializer=_begin_worker, initargs=arguments)
    try:
        futures = {pool.submit(_record_in_worker, job, i): job for i, job in enumerate(jobs)}
        pending, shown = set(futures), 0
        while pending:
            done, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            total = sum(frames_done)
            advance(total - shown)
            shown = total
            for future in done:
                yield futures[future], future.result()
    finally:
        stop.value = True  # after an error or an interrupt the others do not finish their videos first
        pool.shutdown(cancel_futures=True)


_shared: tuple[MutableSequence[int], Any]  # a worker's frames_done and stop


def _begin_worker(parent: int, frames_done: MutableSequence[int], stop: Any) -> None:
    global _shared
    end_with_parent(parent)
    _shared = frames_done, stop


def _record_in_worker(job: Job, index: int) -> Part:
    frames_done, stop = _shared

    def advance(frames: int) -> None:
        if stop.value:
            raise InterruptedError("the recording has been stopped")
        frames_done[index] += frames

    return _record_video(job, advance)


def _record_video(job: Job, advance: Callable[[int], Any]) -> Part:
    vizdoom = require_vizdoom()
    work = job.out / "parts" / job.video
    remove_leftovers(work)
    work.mkdir()
    seed = Random(f"{job.seed} {job.index}").randrange(2**31)
    # All share one order of maps, and each goes on about where the one before stops: together they show every map.
    order = Random(job.seed).sample(job.maps, len(job.maps))
    first = job.index * math.ceil(job.frames / FPS / job.map_seconds)
    maps = itertools.islice(itertools.cycle(order), first % len(order), None)
    session = play(
        work,
        job.frames,
        maps=maps,
        seed=seed,
        width=job.width,
        map_seconds=job.map_seconds,
        encounters=job.encounters,
    )
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
    part = {
        "entry": entry,
        "events": [event.as_dict() for event in find_events(job.video, steps, float(FPS))],
        "states": [",".join(map(str, (job.video, *row))) for row in states(steps, float(FPS))],
    }
    if job.boxes:
        seen = [(frame, box) for frame, step in enumerate(steps) for box in step.boxes]
        part["boxes"] = [
            f"{job.video},{frame},{box[0]}," + ",".join(f"{v:.4f}" for v in box[1:]) for frame, box in seen
        ]
    os.replace(work / "video.mp4", job.out / job.video)
    write_whole(job.out / "parts" / f"{job.video}.json", json.dumps(part))
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
