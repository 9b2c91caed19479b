"""`k25lite bench video`: what reading and analysing footage costs, against bare decoding of the same files.

Four questions, on recorded footage of 8.75 frames per second:

decode      The pictures of all chunks, scaled for the detector, against the same pictures by PyAV's `to_ndarray` and by
            torchcodec, where it loads. One thread each; what decoding costs without a picture taken is the floor.
coarse pass Looking over all footage by key frames, detector included, against decoding the key frames alone.
analysis    All of `k25lite analyze` but clips and report, against decoding every frame in as many processes. The worker
            processes have been started by a smaller analysis before; what starting costs is told of the smallest.
growth      The same for an eighth, a quarter, half and all of the footage: time per hour, and memory. Memory is what all
            processes hold together, pages that they share counted once, at the moment of ten a second when it is most:
            what they held for less than a tenth of a second can be missed.

The detector's speed does not depend on what it has learnt, but how much is watched closely does. So without a trained one
it has fresh weights, to which everything looks worth it: what is measured then is the most work there can be.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import torch
from transformers.utils import logging

from k25lite.bench import SUBJECT, Disagreement, Report, device_name, devices, median_seconds
from k25lite.gameplay.analyze import load
from k25lite.gameplay.bench_readers import (
    PYAV,
    TORCHCODEC,
    Reader,
    Size,
    Video,
    check_frames,
    check_pictures,
    decode,
    ours,
    read_recording,
    to_ndarray,
    torchcodec,
)
from k25lite.gameplay.detector import Detector, DetectorConfig
from k25lite.gameplay.director import Director, as_task
from k25lite.gameplay.footage import read_keyframes
from k25lite.gameplay.record import record
from k25lite.gameplay.segments import probe
from k25lite.gameplay.viewer import LocalViewer, Model, encode
from k25lite.gameplay.workers import ProcessExecutor
from k25lite.swarm.orchestrator import Executor
from k25lite.swarm.trace import Trace

UNSEEN = "k25lite without the detector"
FLOOR, KEYS = "decoding alone", "decoding key frames alone"
PROGRAM = "import sys; from k25lite.gameplay import bench; bench.serve(sys.argv[1])"


def run(
    device: str | None = None,
    quick: bool = False,
    *,
    footage: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
) -> Report:
    """Measure everything: some 10 minutes on 2 CPU cores, a third of it for recording an hour of footage.

    Args:
        device: of the detector, "cpu" or "cuda"; by default the GPU, if there is one.
        quick: seconds of footage, each number measured once, to see that everything works. They mean nothing.
        footage: a folder that `record` made; of its videos as many are taken as can be halved three times.
        model: the folder of a trained detector; by default one with fresh weights.

    Raises:
        Disagreement: somebody decodes other pictures, or something was not analysed; nobody was timed then.
        ValueError: no such device, no such folder, or too few videos.
    """
    where = devices(device)[-1]
    report = Report(f"{device_name(where)}, PyAV {av.__version__}")
    with TemporaryDirectory() as folder:
        weights = fresh(Path(folder, "detector")) if model is None else Path(model).absolute()
        if not (weights / "config.json").is_file():
            raise ValueError(f"no folder with a detector: {weights}")
        size, parts = load(weights, "cpu").size, 2 if quick else 8
        if footage is None:
            recording = {"videos": parts, "minutes": 0.1 * parts} if quick else {"videos": 2 * parts, "minutes": 64.0}
            footage = record(Path(folder, "footage"), **recording).parent  # type: ignore[arg-type]
        videos = read_recording(Path(footage))
        if not (unit := len(videos) // parts):
            raise ValueError(f"{footage} holds {len(videos)} videos, the benchmark needs {parts} or more")
        with one_thread():
            decoding(report, videos[:unit], size, quick)
            coarse(report, videos[: unit * parts], partial(load, weights, where.type), quick)
        sizes = [videos[: unit * times] for times in (1, 2, 4, 8) if times <= parts]
        growth(report, sizes, weights, where.type, quick)
    return report


def fresh(folder: Path) -> Path:
    """A folder with a detector that has learnt nothing."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    Detector(DetectorConfig()).save_pretrained(folder)
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """As in the workers of an analysis."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decoding(report: Report, videos: Sequence[Video], size: Size, quick: bool = False) -> None:
    """Frames per second, of all that are decoded, while the pictures at the moments of chunks are taken.

    Raises:
        Disagreement: other pictures, or another number of them or of frames, than there are.
    """
    stride = videos[0].stride
    case = f"decode, every {stride}th frame a picture of {size[1]}x{size[0]}"
    readers: dict[str, Reader] = {SUBJECT: ours, PYAV: to_ndarray}
    if (decoder := torchcodec()) is not None:
        readers[TORCHCODEC] = decoder
    for video in videos:
        check_frames(case, video, decode(video.path))
        check_pictures(case, video, readers, size)

    def exhaust(reader: Reader) -> None:
        for video in videos:
            for _ in reader(video, size):
                pass

    calls: dict[str, Callable[[], object]] = {who: partial(exhaust, reader) for who, reader in readers.items()}
    calls[FLOOR] = lambda: [decode(video.path) for video in videos]
    seconds = median_seconds(calls, torch.device("cpu"), seconds=0, rounds=(1, 1) if quick else (5, 5))
    frames = sum(video.frames for video in videos)
    report.add(case, "decode frames/s", "frames/s", {who: frames / each for who, each in seconds.items()}, seconds)


def coarse(report: Report, videos: Sequence[Video], load_model: Callable[[], Model], quick: bool = False) -> None:
    """The first pass of an analysis over all videos, in one thread of this process.

    Raises:
        Disagreement: not all see as many key frames of each video.
    """
    case = f"coarse pass, {hours(videos):.3g} h"
    tasks = [encode(as_task("coarse", probe(video.path))) for video in videos]
    model = load_model()

    def look() -> list[int]:
        with TemporaryDirectory() as work:  # a new one, so that no answer is kept from one look to the next
            viewer = LocalViewer(lambda: model, f"{id(model)}", Path(work))
            replies = [asyncio.run(viewer([{"role": "user", "content": task}], ())) for task in tasks]
        return [json.loads(reply.content).get("keyframes", 0) for reply in replies]

    def read() -> list[int]:
        return [sum(1 for _ in read_keyframes(video.path)) for video in videos]

    calls: dict[str, Callable[[], Sequence[int]]] = {SUBJECT: look, UNSEEN: read}
    calls[KEYS] = lambda: [decode(video.path, keyframes=True) for video in videos]
    if len({tuple(call()) for call in calls.values()}) > 1:
        raise Disagreement(f"{case}: the numbers of key frames differ; not timed")
    seconds = median_seconds(calls, torch.device("cpu"), seconds=0, rounds=(1, 1) if quick else (3, 3))
    report.add(case, "time", "s", seconds, seconds)
    report.add(case, "time, as a multiple", "times key frames", {SUBJECT: seconds[SUBJECT] / seconds[KEYS]})


def growth(report: Report, sizes: Sequence[Sequence[Video]], weights: Path, device: str, quick: bool = False) -> None:
    """The analysis of more and more videos, in turn with its floor: time, and memory of all processes.

    Raises:
        Disagreement: a video has another number of frames than were recorded, or was not wholly analysed.
    """
    workers = min(os.cpu_count() or 1, len(sizes[0]))
    per_hour, memory = list[float](), list[float]()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for videos in sizes:
            case = f"analysis, {hours(videos):.3g} h"
            decode_all(case, videos, pool)  # starts the processes, and has the files read
            turns = [
                (decode_all(case, videos, pool), *analyse_apart(sizes[0], videos, weights, device, workers))
                for _ in range(1 if quick else 3)
            ]
            floors, told, peaks = zip(*turns, strict=True)
            own = statistics.median(each["seconds"] for _, each in told)
            seconds = {SUBJECT: own, FLOOR: statistics.median(floors)}
            if videos is sizes[0]:
                begun = statistics.median(each["seconds"] for each, _ in told)
                report.add(case, "time with start of processes", "s", {SUBJECT: begun})
            report.add(case, "time", "s", seconds, seconds)
            rates = {who: each / hours(videos) for who, each in seconds.items()}
            report.add(case, "time per hour", "s/h", rates, seconds)
            watched = told[0][1]["watched"] / sum(video.seconds for video in videos)
            report.add(case, "watched closely", "fraction", {SUBJECT: watched})
            per_hour.append(rates[SUBJECT])
            if max(peaks):
                memory.append(max(peaks))
                report.add(case, "peak memory of all processes", "MB", {SUBJECT: max(peaks)})
    case = f"analysis, {len(sizes[-1]) // len(sizes[0])} times the footage"
    for metric, values in {"time per hour": per_hour, "peak memory of all processes": memory}.items():
        if values:
            report.add(case, metric, "times as much", {SUBJECT: values[-1] / values[0]})


def decode_all(case: str, videos: Sequence[Video], pool: ProcessPoolExecutor) -> float:
    """Decode every frame, a process a video at a time; the seconds that it takes."""
    begun = time.perf_counter()
    counts = list(pool.map(decode, [video.path for video in videos]))
    seconds = time.perf_counter() - begun
    for video, count in zip(videos, counts, strict=True):
        check_frames(case, video, count)
    return seconds


def hours(videos: Sequence[Video]) -> float:
    return sum(video.seconds for video in videos) / 3600


def analyse_apart(
    first: Sequence[Video], videos: Sequence[Video], weights: Path, device: str, workers: int
) -> tuple[list[dict[str, float]], float]:
    """Analyse in a process of its own, and watch the memory of that one and of those that it starts.

    Args:
        first: videos to analyse before; what is told of them includes the start of worker processes.

    Returns:
        What `analyse` says of both, and MB; 0 where there is no /proc.
    """
    paths = [[str(video.path.absolute()) for video in each] for each in (first, videos)]
    order = json.dumps({"turns": paths, "weights": str(weights), "device": device, "workers": workers})
    command = [sys.executable, "-c", PROGRAM, order]
    peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    answer, _ = process.communicate(timeout=0.1)
                    break
                peak = max(peak, held(process.pid))
        finally:
            process.kill()  # its workers end with it
    if process.returncode:
        raise Disagreement(f"an analysis of {len(videos)} videos failed; not timed")
    return json.loads(answer), peak


def serve(order: str) -> None:
    """What the process of `analyse_apart` does: the analyses one after another, with the same workers."""
    asked = json.loads(order)
    with closing(ProcessExecutor()) as executor:
        load_model = partial(load, Path(asked["weights"]), asked["device"])
        told = [analyse(map(Path, paths), load_model, asked["workers"], executor) for paths in asked["turns"]]
    print(json.dumps(told))


class Unillustrated(Director):
    """Is done when the events are put together."""

    def _clips(self) -> list[Any]:
        return []


def analyse(
    paths: Iterable[Path], load_model: Callable[[], Model], workers: int, executor: Executor
) -> dict[str, float]:
    """What `analyze` does up to the list of events: {"seconds" it took, seconds of video "watched" closely, "events"}.

    Raises:
        RuntimeError: something could not be analysed.
    """
    with TemporaryDirectory() as work:
        begun = time.perf_counter()
        videos = [probe(path) for path in paths]
        with closing(Trace(Path(work, "trace.jsonl"))) as trace:
            director = Unillustrated(videos, trace, Path(work))
            viewer = LocalViewer(load_model, "benchmark", Path(work))
            result = director.orchestrator(viewer, workers, executor).run_sync("Find the events.", trace)
            outcome = director.outcome()
        seconds = time.perf_counter() - begun
    if not result.done or outcome.problems:
        raise RuntimeError(f"the analysis failed: {result.reason or outcome.problems}")
    return {"seconds": seconds, "watched": sum(outcome.watched.values()), "events": len(outcome.events)}


def held(session: int) -> float:
    """The MB of memory that the processes of a session hold, shared pages counted once; 0 where there is no /proc."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:  # each process is charged its part of what it shares
                parts = re.findall(r"^Pss:\s*(\d+)", (folder / "smaps_rollup").read_text(), re.MULTILINE)
                total += sum(map(int, parts))
    return total * 1024 / 1e6
