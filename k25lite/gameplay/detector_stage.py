"""Training of the detector on footage that no test shows: other maps, other seeds.

Eight maps are for tests, four for choosing the rules that make events of probabilities, twenty for training. A step sees
chunks and pictures of other chunks, whole and small, mirrored or not, some without status bar or messages, so that the
detector does not live on these alone. They are of ordinary play and of encounters with monsters (module `encounters`), and
learnt with them is where each monster is to be seen, which the game says exactly. Then the encoder stands still, and the
context is learnt from footage that it has not seen: on what it knows by heart it is too sure of itself. Recordings are of
several widths, for the game writes its messages smaller on larger pictures. Not covered: hard examples, other games.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
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
from k25lite.gameplay.encounters import MONSTERS
from k25lite.gameplay.events import KINDS, Event
from k25lite.gameplay.footage import CHUNK_SECONDS, FRAME_STEP, SMALL, hide, read_all, read_chunks, read_events, shares
from k25lite.gameplay.record import record
from k25lite.gameplay.scoring import score, write_metrics
from k25lite.gameplay.spans import Scored, choose_rules, find_spans
from k25lite.shipped import shipped
from k25lite.training.cache import cached
from k25lite.training.muonclip import MuonClip
from k25lite.training.vit import mixed_precision, warmup_stable_decay

SHIPPED = shipped("detector")  # as the run of `full` left it
TEST_MAPS = MAPS[3::4]
VALIDATION_MAPS = MAPS[2::8]
TRAINING_MAPS = tuple(sorted(set(MAPS) - {*TEST_MAPS, *VALIDATION_MAPS}))
FIRST_SEED = 900  # of the recordings to train on: tests use others
MAP_SECONDS = (40.0, 20.0, 80.0, 40.0)  # short stays: many places, and many bosses
ENCOUNTER_SHARES = 0.5, 0.2  # of the examples of the first step and of the last: at the end most are as in life
MONSTER_WEIGHT = 0.3  # of what patches show in the loss
SMALLEST = 6.0  # pixels: a monster that is smaller cannot be told
CONTEXT_CHUNKS, CONTEXT_BATCH, CONTEXT_RATE = 96, 16, 3e-3
HIDDEN = 0.2  # share of examples without status bar; half of them without messages as well
PLAY, ENCOUNTERS, CONTEXT, VALIDATION = range(4)  # what recordings are for


@dataclass(frozen=True)
class DetectorRun:
    """Everything the outcome depends on.

    Attributes:
        videos: of the recordings of play and of encounters to train on, to train the context on, and to choose the rules
            with. minutes: of each of the four, all videos together.
        widths: in pixels, of the first video, the second, ... and over again.
        steps: of the optimiser, each on `chunks` chunks, `images` pictures and `small` ones of SMALL.
        learning_rate: of MuonClip, at its peak.
        context_steps: of AdamW.
    """

    videos: tuple[int, ...] = (20, 20, 12, 6)
    minutes: tuple[float, ...] = (100.0, 120.0, 120.0, 24.0)
    widths: tuple[int, ...] = (160, 160, 320, 640)
    steps: int = 1800
    chunks: int = 16
    images: int = 16
    small: int = 8
    learning_rate: float = 3e-3
    context_steps: int = 1200
    seed: int = 0


RUNS = {
    "smoke": DetectorRun(
        videos=(1, 1, 1, 1), minutes=(1.0, 0.5, 0.5, 0.5), steps=3, chunks=4, images=4, small=2, context_steps=3
    ),
    # Half of the footage; trained in less than 4 minutes on 2 cores.
    "lite": DetectorRun(videos=(10, 10, 6, 6), minutes=(50.0, 60.0, 60.0, 24.0), steps=1000, context_steps=600),
    "full": DetectorRun(),
}


@dataclass(frozen=True)
class Labelled:
    """A video as it is trained on.

    Attributes:
        times: [n]. frames: [n, 4, height, width, 3].
        targets: [n, KINDS].
        events: all of KINDS.
        monsters: [n, 4, patches, MONSTERS] uint8, 255 where a monster covers half of a patch or half of it lies in one;
            None where nobody knows.
    """

    times: np.ndarray
    frames: np.ndarray
    targets: np.ndarray
    events: list[Event]
    monsters: np.ndarray | None = None


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished recording; ValueError if there is none."""
    if not (folder / "manifest.json").exists():
        raise ValueError(f"{folder} holds no finished recording")
    return json.loads((folder / "manifest.json").read_text())


def read_recording(folder: Path, size: tuple[int, int], patch: int = 16) -> list[Labelled]:
    """The videos of a recording, in chunks, with what there is to see in each as its targets.

    Args:
        size: (height, width) in pixels to scale frames to.
        patch: in pixels; the patches of which it is told what monsters they show, if the recording has boxes.

    Raises:
        ValueError: `folder` holds no finished recording.
    """
    entries = manifest(folder)["videos"]
    events = read_events(folder / "events.jsonl", (*KINDS, "sight"))
    boxes = pd.read_csv(folder / "boxes.csv") if (folder / "boxes.csv").exists() else None
    videos = []
    for entry in entries:
        mine = [event for event in events if event.video == entry["video"]]
        chunks = read_all(read_chunks(folder / entry["video"], size))
        scored = [event for event in mine if event.kind in KINDS]
        monsters = None
        if boxes is not None:
            numbers = (chunks.shown * entry["fps"]).round().astype(int)
            monsters = _monsters(boxes[boxes.video == entry["video"]], numbers, size, patch)
        videos.append(Labelled(chunks.times, chunks.frames, _targets(mine, chunks.times), scored, monsters))
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


def _monsters(boxes: pd.DataFrame, frames: np.ndarray, size: tuple[int, int], patch: int) -> np.ndarray:
    """[n, 4, patches, MONSTERS] uint8, see `Labelled`: of one video's boxes, at its `frames` [n, 4]."""
    (height, width), (rows, columns) = size, (size[0] // patch, size[1] // patch)
    found = np.zeros((*frames.shape, rows, columns, len(MONSTERS)), np.uint8)
    by_frame = dict(iter(boxes[boxes.monster.isin(MONSTERS)].groupby("frame")))
    tops, lefts = np.arange(rows) * patch, np.arange(columns) * patch
    for place, number in np.ndenumerate(frames):
        for box in by_frame[number].itertuples() if number in by_frame else ():
            left, top, right, bottom = box.left * width, box.top * height, box.right * width, box.bottom * height
            area = (right - left) * (bottom - top)
            if area < SMALLEST:
                continue
            across = (np.minimum(lefts + patch, right) - np.maximum(lefts, left)).clip(0)
            down = (np.minimum(tops + patch, bottom) - np.maximum(tops, top)).clip(0)
            share = (2 * down[:, None] * across / min(area, patch**2)).clip(max=1)
            shown = found[place][..., MONSTERS.index(box.monster)]
            np.maximum(shown, (255 * share).astype(np.uint8), out=shown)
    return found.reshape(*frames.shape, rows * columns, len(MONSTERS))


def train(
    detector: Detector,
    videos: Sequence[Labelled],
    run: DetectorRun,
    encounters: Sequence[Labelled] = (),
    progress: bool = True,
) -> pd.DataFrame:
    """Binary cross-entropy of each kind, and of each monster in each patch; MuonClip, warm-up-stable-decay.

    Returns:
        One row per step: step, loss (that of the kinds), learning_rate.

    Raises:
        ValueError: fewer chunks than one step takes.
    """
    rng = np.random.default_rng(run.seed)
    size, known = run.chunks + run.images + run.small, sum(len(video.times) for video in videos)
    if known < size:
        raise ValueError(f"{known} chunks are less than the {size} of one step")
    of_play, of_encounters = _endless(videos, rng), _endless(encounters, rng)
    optimiser = MuonClip(detector, run.learning_rate, qk_clip_threshold=None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmup_stable_decay(step, run.steps))
    detector.train()
    losses, rates = [], []
    for step in tqdm(range(run.steps), desc="detector", leave=False, mininterval=1.0, disable=not progress):
        share = np.interp(step / run.steps, (0, 1), ENCOUNTER_SHARES) if encounters else 0.0
        items, targets, shown, patches = [], [], [], 0
        for number in range(size):
            video, chunk = next(of_encounters if rng.random() < share else of_play)
            which = slice(None) if number < run.chunks else slice(2, 3)
            mirrored = rng.random() < 0.5
            frames = _changed(video.frames[chunk, which], mirrored, rng)
            small = number >= run.chunks + run.images
            items.append(shrink(frames) if small else frames)
            targets.append(video.targets[chunk])
            if video.monsters is not None and not small:
                own = video.monsters[chunk, which]
                own = (_mirrored(own, detector) if mirrored else own).reshape(-1, len(MONSTERS))
                shown.append((np.arange(patches, patches + len(own)), own))
            patches += items[-1][..., 0].size // detector.config.vision_config.patch_size**2
        with mixed_precision(detector.device):
            features, monsters = detector.see(items)
        wanted = torch.from_numpy(np.stack(targets)).to(detector.device)
        loss = F.binary_cross_entropy_with_logits(features[:, -len(KINDS) :].float(), wanted)
        whole = loss
        if shown:
            where, covered = (
                torch.from_numpy(np.concatenate(parts)).to(detector.device) for parts in zip(*shown, strict=True)
            )
            each = F.binary_cross_entropy_with_logits(monsters[where].float(), covered / 255, reduction="none")
            whole = loss + MONSTER_WEIGHT * each.sum(-1).mean()
        optimiser.zero_grad()
        whole.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
    detector.eval()
    return pd.DataFrame({"step": range(run.steps), "loss": losses, "learning_rate": rates})


def train_context(detector: Detector, videos: Sequence[Labelled], run: DetectorRun, progress: bool = True) -> None:
    """Teach `detector.context` what chunks are among their neighbours; all else of the detector stands still.

    Raises:
        ValueError: there is no video.
    """
    if not videos:
        raise ValueError("the context is learnt from one video or more")
    rng = np.random.default_rng(run.seed)
    seen = [torch.from_numpy(detector.features(video.frames)).to(detector.device) for video in videos]
    wanted = [torch.from_numpy(video.targets).to(detector.device) for video in videos]
    length = min(CONTEXT_CHUNKS, *(len(each) for each in seen))
    context = detector.context
    context.fit(torch.cat(seen))
    optimiser = torch.optim.AdamW(context.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, CONTEXT_RATE, max(run.context_steps, 2))
    odds = np.array([len(each) for each in seen]) / sum(map(len, seen))
    context.train()
    for _ in tqdm(range(run.context_steps), desc="context", leave=False, mininterval=1.0, disable=not progress):
        chosen = rng.choice(len(seen), CONTEXT_BATCH, p=odds)
        parts = [
            (video, slice(start := int(rng.integers(len(seen[video]) - length + 1)), start + length))
            for video in chosen
        ]
        logits = context(torch.stack([seen[video][part] for video, part in parts]))
        loss = F.binary_cross_entropy_with_logits(logits, torch.stack([wanted[video][part] for video, part in parts]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    context.eval()


def shrink(frames: np.ndarray) -> np.ndarray:
    """[n, height, width, 3] uint8 -> [n, SMALL, SMALL, 3], each pixel the mean of those that it stands for."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    return F.interpolate(pixels, SMALL, mode="area").round().byte().permute(0, 2, 3, 1).numpy()


def _endless(videos: Sequence[Labelled], rng: np.random.Generator) -> Iterator[tuple[Labelled, int]]:
    """(video, number of a chunk): all in random order, over and over."""
    places = [(video, chunk) for video in videos for chunk in range(len(video.times))]
    while True:
        for place in rng.permutation(len(places)):
            yield places[place]


def _changed(frames: np.ndarray, mirrored: bool, rng: np.random.Generator) -> np.ndarray:
    hidden = rng.random()
    return hide(frames[:, :, ::-1] if mirrored else frames, status=hidden < HIDDEN, messages=hidden < HIDDEN / 2)


def _mirrored(monsters: np.ndarray, detector: Detector) -> np.ndarray:
    columns = detector.size[1] // detector.config.vision_config.patch_size
    return monsters.reshape(len(monsters), -1, columns, len(MONSTERS))[:, :, ::-1]


def found_events(detector: Detector, video: str, times: np.ndarray, probabilities: np.ndarray) -> list[Event]:
    """The events of one video, by the detector's rules."""
    return [Event(video, s.start, s.end, s.kind) for s in find_spans(times, probabilities, detector.rules)]


def detector_stage(run: DetectorRun, footage: Sequence[Sequence[Path]] | None = None, progress: bool = False) -> Path:
    """The folder of a trained `Detector`; beside it log.json and, for the validation footage, metrics.json.

    The detector of `full` is shipped, for it takes half an hour; with another `seed` it is trained anew.

    Args:
        footage: recordings of play, of encounters, for the context and to choose the rules with; by default they are made,
            on maps of their own, and removed afterwards.

    Raises:
        ModuleNotFoundError: no footage is given, and the game is not installed.
    """

    def build(folder: Path) -> None:
        torch.manual_seed(run.seed)
        detector = Detector(DetectorConfig()).to("cuda" if torch.cuda.is_available() else "cpu")
        with tempfile.TemporaryDirectory() as made:
            recordings = footage or [record_for(what, Path(made), run, progress) for what in range(len(run.videos))]

            def read(what: int) -> list[Labelled]:
                patch = detector.config.vision_config.patch_size
                return [video for each in recordings[what] for video in read_recording(each, detector.size, patch)]

            log = train(detector, read(PLAY), run, read(ENCOUNTERS), progress)
            train_context(detector, read(CONTEXT), run, progress)
            videos = read(VALIDATION)
        seen = [Scored(v.times, detector.watch([v.frames]), v.events) for v in videos]
        detector.config.rules = {kind: asdict(rule) for kind, rule in choose_rules(seen).items()}
        found = [e for n, v in enumerate(seen) for e in found_events(detector, f"{n}", v.times, v.probabilities)]
        true = [replace(event, video=f"{n}") for n, v in enumerate(seen) for event in v.events]
        write_metrics(folder / "metrics.json", score(true, found))
        log.to_json(folder / "log.json", orient="records")
        detector.save_pretrained(folder)

    if run == RUNS["full"] and footage is None and SHIPPED.is_dir():
        return SHIPPED
    config: dict[str, Any] = asdict(run)
    if footage:
        config["footage"] = [
            [video["sha256"] for each in recordings for video in manifest(each)["videos"]] for recordings in footage
        ]
    return cached("detector", config, build, threads=None)


def record_for(what: int, folder: Path, run: DetectorRun, progress: bool = False) -> list[Path]:
    """What PLAY, ENCOUNTERS, CONTEXT or VALIDATION is learnt from: for each width a recording's folder, in `folder`."""
    videos, minutes = run.videos[what], run.minutes[what]
    counts = Counter(run.widths[video % len(run.widths)] for video in range(videos))
    return [
        record(
            folder / f"{what}-{width}",
            videos=count,
            minutes=minutes * count / videos,
            maps=VALIDATION_MAPS if what == VALIDATION else TRAINING_MAPS,
            seed=FIRST_SEED + 4 * run.seed + what + 1000 * place,  # other games for each width
            width=width,
            map_seconds=MAP_SECONDS[what],
            boxes=what in (PLAY, ENCOUNTERS),
            encounters=what == ENCOUNTERS,
            progress=progress,
        ).parent
        for place, (width, count) in enumerate(counts.items())
    ]
