"""Training of the detector on footage that no test shows: other maps, other seeds.

Eight maps are for tests, four for choosing the rules that make events of probabilities, twenty for training. A step sees
chunks and single pictures of other chunks, mirrored or not, some without status bar or messages, so that the detector does
not live on these alone. Changes of map are rare, so some are made: a chunk that goes on with pictures of another video.
Not covered: hard examples, other games.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn
from tqdm.auto import tqdm

from k25lite.gameplay.detector import Detector, DetectorConfig
from k25lite.gameplay.doom import MAPS
from k25lite.gameplay.events import KINDS, Event
from k25lite.gameplay.footage import (
    CHUNK_SECONDS,
    FRAME_STEP,
    FRAMES,
    ROUNDING,
    hide,
    read_all,
    read_chunks,
    read_events,
    shares,
)
from k25lite.gameplay.record import record
from k25lite.gameplay.scoring import score, write_metrics
from k25lite.gameplay.spans import Scored, choose_rules, find_spans
from k25lite.training.cache import cached
from k25lite.training.muonclip import MuonClip
from k25lite.training.vit import mixed_precision, warmup_stable_decay

LEVEL = KINDS.index("level")
TEST_MAPS = MAPS[3::4]
VALIDATION_MAPS = MAPS[2::8]
TRAINING_MAPS = tuple(sorted(set(MAPS) - {*TEST_MAPS, *VALIDATION_MAPS}))
FIRST_SEED = 900  # of the recordings to train on: tests use others
MAP_SECONDS = 40.0  # to train on: short stays, many places, and many bosses
VALIDATION_MAP_SECONDS = 120.0  # as long as recordings have by default: how rare bosses are decides on the thresholds
HIDDEN = 0.2  # share of examples without status bar; half of them without messages as well
SPLICED = 0.03  # share of chunks that go on with pictures of another video: as many again as there are changes of map


@dataclass(frozen=True)
class DetectorRun:
    """Everything the outcome depends on.

    Attributes:
        videos, minutes: of the recording to train on, together.
        validation_videos, validation_minutes: of that to choose the rules with.
        steps: of the optimiser, each on `chunks` chunks and `images` pictures.
        learning_rate: of MuonClip, at its peak.
    """

    videos: int = 48
    minutes: float = 240.0
    validation_videos: int = 12
    validation_minutes: float = 48.0
    steps: int = 1300
    chunks: int = 16
    images: int = 8
    learning_rate: float = 2e-3
    seed: int = 0


RUNS = {
    "smoke": DetectorRun(
        videos=1, minutes=1.0, validation_videos=1, validation_minutes=0.5, steps=3, chunks=4, images=4
    ),
    "lite": DetectorRun(),
    "full": DetectorRun(),
}


@dataclass(frozen=True)
class Labelled:
    """A video as it is trained on: times [n], frames [n, 4, height, width, 3], targets [n, KINDS], and its events.

    The frames may be a view in which those of neighbouring chunks are the same.
    """

    times: np.ndarray
    frames: np.ndarray
    targets: np.ndarray
    events: list[Event]


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished recording; ValueError if there is none."""
    if not (folder / "manifest.json").exists():
        raise ValueError(f"{folder} holds no finished recording")
    return json.loads((folder / "manifest.json").read_text())


def read_recording(folder: Path, size: tuple[int, int]) -> list[Labelled]:
    """The videos of a recording, in chunks; a kind that fills half a chunk is its target, a level if the change is seen.

    Raises:
        ValueError: `folder` holds no finished recording.
    """
    entries = manifest(folder)["videos"]
    events = read_events(folder / "events.jsonl")
    videos = []
    for entry in entries:
        mine = [event for event in events if event.video == entry["video"]]
        chunks = read_all(read_chunks(folder / entry["video"], size))
        targets = (2 * shares(mine, chunks.times)).clip(max=1)
        targets[:, LEVEL] = _changes_seen(mine, chunks.times)
        videos.append(Labelled(chunks.times, _overlapping(chunks.frames), targets, mine))
    return videos


def _changes_seen(events: Iterable[Event], times: np.ndarray) -> np.ndarray:
    """[n]: 1 where a map begins between the first and the last picture of a chunk. Soon after, it is like any other."""
    first, last = times - FRAME_STEP, times + CHUNK_SECONDS
    seen = np.zeros(len(times), np.float32)
    for event in events:
        if event.kind == "level":
            seen[(first < event.start - ROUNDING) & (event.start - ROUNDING <= last)] = 1
    return seen


def _overlapping(frames: np.ndarray) -> np.ndarray:
    """The same chunks, in half the memory: the last two pictures of each are the first two of the next."""
    pictures = np.concatenate([rearrange(frames[:, :2], "n t h w c -> (n t) h w c"), frames[-1, 2:]])
    return rearrange(sliding_window_view(pictures, FRAMES, axis=0)[::2], "n h w c t -> n t h w c")


def train(detector: Detector, videos: Sequence[Labelled], run: DetectorRun, progress: bool = True) -> pd.DataFrame:
    """Binary cross-entropy of each kind, MuonClip, warm-up-stable-decay.

    Returns:
        One row per step: step, loss, learning_rate.

    Raises:
        ValueError: fewer chunks than one step takes.
    """
    rng = np.random.default_rng(run.seed)
    places = [(video, chunk) for video, labelled in enumerate(videos) for chunk in range(len(labelled.times))]
    size = run.chunks + run.images
    if len(places) < size:
        raise ValueError(f"{len(places)} chunks are less than the {size} of one step")
    rounds = -(-run.steps * size // len(places))
    order = np.concatenate([rng.permutation(len(places)) for _ in range(rounds)])
    optimiser = MuonClip(detector, run.learning_rate, qk_clip_threshold=None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmup_stable_decay(step, run.steps))
    detector.train()
    losses, rates = [], []
    for step in tqdm(range(run.steps), desc="detector", leave=False, mininterval=1.0, disable=not progress):
        chosen = [places[i] for i in order[step * size : (step + 1) * size]]
        examples = [_example(videos, video, chunk, rng) for video, chunk in chosen]
        items = [frames for frames, _ in examples]
        items[run.chunks :] = [frames[2:3] for frames in items[run.chunks :]]
        targets = torch.from_numpy(np.stack([target for _, target in examples]))
        with mixed_precision(detector.device):
            logits = detector.logits(items)
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets.to(logits.device))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
    detector.eval()
    return pd.DataFrame({"step": range(run.steps), "loss": losses, "learning_rate": rates})


def _example(
    videos: Sequence[Labelled], video: int, chunk: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    frames, targets = videos[video].frames[chunk], videos[video].targets[chunk]
    if rng.random() < SPLICED and len(videos) > 1:
        other = videos[(video + rng.integers(1, len(videos))) % len(videos)]
        after, cut = rng.integers(len(other.times)), rng.integers(1, FRAMES)
        share = (cut - 1) / 2  # of what the chunk is about, its second and third picture, that comes before the cut
        frames = np.concatenate([frames[:cut], other.frames[after][cut:]])
        targets = share * targets + (1 - share) * other.targets[after]
        targets[LEVEL] = 1
    return _changed(frames, rng), targets.astype(np.float32)


def _changed(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mirrored, hidden = rng.random(2)
    if mirrored < 0.5:
        frames = frames[:, :, ::-1]
    return hide(frames, status=hidden < HIDDEN, messages=hidden < HIDDEN / 2)


def found_events(detector: Detector, video: str, times: np.ndarray, probabilities: np.ndarray) -> list[Event]:
    """The events of one video, by the detector's rules."""
    return [Event(video, s.start, s.end, s.kind) for s in find_spans(times, probabilities, detector.rules)]


def detector_stage(run: DetectorRun, footage: tuple[Path, Path] | None = None, progress: bool = False) -> Path:
    """The folder of a trained `Detector`; beside it log.json and, for the validation footage, metrics.json.

    Args:
        footage: recordings to train on and to choose the rules with; by default they are made on maps of their own, and
            removed afterwards.

    Raises:
        ModuleNotFoundError: no footage is given, and the game is not installed.
    """

    def build(folder: Path) -> None:
        torch.manual_seed(run.seed)
        detector = Detector(DetectorConfig()).to("cuda" if torch.cuda.is_available() else "cpu")
        with tempfile.TemporaryDirectory() as made:
            training, validation = footage or _record(Path(made), run, progress)
            log = train(detector, read_recording(training, detector.size), run, progress)
            videos = read_recording(validation, detector.size)
        seen = [Scored(v.times, detector.probabilities(v.frames), v.events) for v in videos]
        detector.config.rules = {kind: asdict(rule) for kind, rule in choose_rules(seen).items()}
        found = [e for n, v in enumerate(seen) for e in found_events(detector, f"{n}", v.times, v.probabilities)]
        true = [replace(event, video=f"{n}") for n, v in enumerate(seen) for event in v.events]
        write_metrics(folder / "metrics.json", score(true, found))
        log.to_json(folder / "log.json", orient="records")
        detector.save_pretrained(folder)

    config: dict[str, Any] = asdict(run)
    if footage:
        config["footage"] = [[video["sha256"] for video in manifest(folder)["videos"]] for folder in footage]
    return cached("detector", config, build)


def _record(folder: Path, run: DetectorRun, progress: bool) -> tuple[Path, Path]:
    sizes = (
        (run.videos, run.minutes, TRAINING_MAPS, MAP_SECONDS),
        (run.validation_videos, run.validation_minutes, VALIDATION_MAPS, VALIDATION_MAP_SECONDS),
    )
    made = [
        record(
            folder / str(number),
            videos=videos,
            minutes=minutes,
            maps=maps,
            seed=FIRST_SEED + 2 * run.seed + number,
            map_seconds=map_seconds,
            progress=progress,
        ).parent
        for number, (videos, minutes, maps, map_seconds) in enumerate(sizes)
    ]
    return made[0], made[1]
