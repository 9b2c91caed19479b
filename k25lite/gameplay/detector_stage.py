"""Training of the detector on footage that no test shows: other maps, other seeds.

Eight maps are for tests, four for choosing the rules that make events of probabilities, twenty for training. A step sees
chunks and single pictures of other chunks, mirrored or not, some without status bar or messages, so that the detector does
not live on these alone. Recordings are of several widths, for the game writes its messages smaller on larger pictures. Not
covered: hard examples, other games.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from k25lite.gameplay.detector import Detector, DetectorConfig
from k25lite.gameplay.doom import MAPS
from k25lite.gameplay.events import KINDS, Event
from k25lite.gameplay.footage import CHUNK_SECONDS, FRAME_STEP, hide, read_all, read_chunks, read_events, shares
from k25lite.gameplay.record import record
from k25lite.gameplay.scoring import score, write_metrics
from k25lite.gameplay.spans import Scored, choose_rules, find_spans
from k25lite.shipped import shipped
from k25lite.training.cache import cached
from k25lite.training.muonclip import MuonClip
from k25lite.training.vit import mixed_precision, warmup_stable_decay

SHIPPED = shipped("detector")  # as the run of `lite` left it
TEST_MAPS = MAPS[3::4]
VALIDATION_MAPS = MAPS[2::8]
TRAINING_MAPS = tuple(sorted(set(MAPS) - {*TEST_MAPS, *VALIDATION_MAPS}))
FIRST_SEED = 900  # of the recordings to train on: tests use others
MAP_SECONDS = 40.0  # short stays: many places, and many bosses
HIDDEN = 0.2  # share of examples without status bar; half of them without messages as well


@dataclass(frozen=True)
class DetectorRun:
    """Everything the outcome depends on.

    Attributes:
        videos, minutes: of the recording to train on, together.
        validation_videos, validation_minutes: of that to choose the rules with.
        widths: in pixels, of the first video, the second, ... and over again.
        steps: of the optimiser, each on `chunks` chunks and `images` pictures.
        learning_rate: of MuonClip, at its peak.
    """

    videos: int = 20
    minutes: float = 100.0
    validation_videos: int = 6
    validation_minutes: float = 24.0
    widths: tuple[int, ...] = (160, 160, 320, 640)
    steps: int = 1600
    chunks: int = 16
    images: int = 16
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
    """A video as it is trained on: times [n], frames [n, 4, height, width, 3], targets [n, KINDS], and its events."""

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
    """The videos of a recording, in chunks, with what there is to see in each as its targets.

    Raises:
        ValueError: `folder` holds no finished recording.
    """
    entries = manifest(folder)["videos"]
    events = read_events(folder / "events.jsonl", (*KINDS, "sight"))
    videos = []
    for entry in entries:
        mine = [event for event in events if event.video == entry["video"]]
        chunks = read_all(read_chunks(folder / entry["video"], size))
        scored = [event for event in mine if event.kind in KINDS]
        videos.append(Labelled(chunks.times, chunks.frames, _targets(mine, chunks.times), scored))
    return videos


def _targets(events: Sequence[Event], times: np.ndarray) -> np.ndarray:
    """[n, KINDS]: a kind that fills half a chunk is its target, but for two that are longer than they can be seen.

    Of a boss it is the sight alone: behind the player's back it cannot be learnt, only the place where it happened can.
    Of another map it is the change, in all chunks that show it.
    """
    seen = [replace(event, kind="boss") if event.kind == "sight" else event for event in events if event.kind != "boss"]
    targets = (2 * shares(seen, times)).clip(max=1)
    changes = np.array([event.start for event in events if event.kind == "level"])[:, None]
    shown = (times - FRAME_STEP <= changes) & (changes < times + CHUNK_SECONDS + FRAME_STEP)
    targets[:, KINDS.index("level")] = shown.any(0)
    return targets


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
        items = [_changed(videos[video].frames[chunk], rng) for video, chunk in chosen]
        items[run.chunks :] = [frames[2:3] for frames in items[run.chunks :]]
        targets = torch.from_numpy(np.stack([videos[video].targets[chunk] for video, chunk in chosen]))
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


def _changed(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mirrored, hidden = rng.random(2)
    if mirrored < 0.5:
        frames = frames[:, :, ::-1]
    return hide(frames, status=hidden < HIDDEN, messages=hidden < HIDDEN / 2)


def found_events(detector: Detector, video: str, times: np.ndarray, probabilities: np.ndarray) -> list[Event]:
    """The events of one video, by the detector's rules."""
    return [Event(video, s.start, s.end, s.kind) for s in find_spans(times, probabilities, detector.rules)]


def detector_stage(
    run: DetectorRun, footage: tuple[Sequence[Path], Sequence[Path]] | None = None, progress: bool = False
) -> Path:
    """The folder of a trained `Detector`; beside it log.json and, for the validation footage, metrics.json.

    The detector of `lite` and `full` is shipped, for it takes a quarter of an hour; with another `seed` it is trained anew.

    Args:
        footage: recordings to train on, and others to choose the rules with; by default they are made on maps of their
            own, and removed afterwards.

    Raises:
        ModuleNotFoundError: no footage is given, and the game is not installed.
    """

    def build(folder: Path) -> None:
        torch.manual_seed(run.seed)
        detector = Detector(DetectorConfig()).to("cuda" if torch.cuda.is_available() else "cpu")
        with tempfile.TemporaryDirectory() as made:
            training, validation = footage or _record(Path(made), run, progress)
            log = train(detector, [v for each in training for v in read_recording(each, detector.size)], run, progress)
            videos = [v for each in validation for v in read_recording(each, detector.size)]
        seen = [Scored(v.times, detector.probabilities(v.frames), v.events) for v in videos]
        detector.config.rules = {kind: asdict(rule) for kind, rule in choose_rules(seen).items()}
        found = [e for n, v in enumerate(seen) for e in found_events(detector, f"{n}", v.times, v.probabilities)]
        true = [replace(event, video=f"{n}") for n, v in enumerate(seen) for event in v.events]
        write_metrics(folder / "metrics.json", score(true, found))
        log.to_json(folder / "log.json", orient="records")
        detector.save_pretrained(folder)

    if run == RUNS["lite"] and footage is None and SHIPPED.is_dir():
        return SHIPPED
    config: dict[str, Any] = asdict(run)
    if footage:
        config["footage"] = [
            [video["sha256"] for each in recordings for video in manifest(each)["videos"]] for recordings in footage
        ]
    return cached("detector", config, build, threads=None)


def _record(folder: Path, run: DetectorRun, progress: bool) -> tuple[list[Path], list[Path]]:
    """Recordings to train on, and to choose the rules with: one for each width."""
    sizes = ((run.videos, run.minutes, TRAINING_MAPS), (run.validation_videos, run.validation_minutes, VALIDATION_MAPS))
    made: tuple[list[Path], list[Path]] = ([], [])
    for number, (videos, minutes, maps) in enumerate(sizes):
        counts = Counter(run.widths[video % len(run.widths)] for video in range(videos))
        for place, (width, count) in enumerate(counts.items()):
            recording = record(
                folder / f"{number}-{width}",
                videos=count,
                minutes=minutes * count / videos,
                maps=maps,
                seed=FIRST_SEED + 2 * run.seed + number + 1000 * place,  # other games for each width
                width=width,
                map_seconds=MAP_SECONDS,
                progress=progress,
            )
            made[number].append(recording.parent)
    return made
