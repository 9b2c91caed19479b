"""Training of K25Lite on questions about clips, and its examination.

The encoder is the detector's and stands still: what is learnt is to say what it sees, by a projector and a small language
model. The footage is that which the detector's context is learnt from, of the training maps; the encoder has not seen it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerFast

from k25lite.gameplay.detector import Detector
from k25lite.gameplay.detector_stage import CONTEXT, RUNS, SHIPPED, VALIDATION, DetectorRun, manifest, record_for
from k25lite.gameplay.events import KINDS, Event
from k25lite.gameplay.footage import CHUNK_SECONDS, Chunks, read_all, read_chunks, read_events
from k25lite.gameplay.questions import CLIP_CHUNKS, IS_THERE, STRIDE, WORDS, Asked, ask_about, clip_at, clip_start
from k25lite.model import K25Lite, K25LiteConfig
from k25lite.processing import MEDIA, K25LiteProcessor, build_tokenizer
from k25lite.shipped import shipped
from k25lite.training.cache import cached
from k25lite.training.evaluation import exact_match, tokenise
from k25lite.training.loop import Recipe, train
from k25lite.training.schedules import LearningRate, Step
from k25lite.vision import VideoChunk
from k25lite.world.families import Document
from k25lite.world.streams import make_rows

SHIPPED_ANSWERER = shipped("answerer")  # as the run of `full` left it
ROW = 160  # tokens: a clip with its times takes 96 of them
TURNS = 4  # questions about each clip in training
RARE = 3.0  # how much likelier than one that yes or no answers each of the other questions is asked


@dataclass(frozen=True)
class QuestionsRun:
    """Everything the outcome depends on beside the encoder.

    Attributes:
        footage: whose recordings CONTEXT and VALIDATION to learn from, and to be examined on.
        steps: of the optimiser, each on `clips` clips.
        asked: in the examination, about each video at most as many questions with the same words and kind of answer.
    """

    footage: DetectorRun = RUNS["full"]
    steps: int = 1500
    clips: int = 16
    learning_rate: float = 3e-3
    asked: int = 50
    seed: int = 0


QUESTIONS_RUNS = {
    "smoke": QuestionsRun(RUNS["smoke"], steps=3, clips=4, asked=2),
    "full": QuestionsRun(),
}


@dataclass(frozen=True)
class Watched:
    """A video, its chunks as a detector sees them, and all that happens in it, sights of bosses among it."""

    name: str
    chunks: Chunks
    events: Sequence[Event]

    @property
    def clips(self) -> range:
        """The indices of the chunks with which a clip can begin."""
        return range(1, len(self.chunks.times) - (CLIP_CHUNKS - 1) * STRIDE)

    def start(self, index: int) -> float:
        """Seconds at which the clip with this first chunk begins."""
        return clip_start(round(self.chunks.times[index] / CHUNK_SECONDS))

    def clip(self, index: int) -> tuple[list[VideoChunk], list[Asked]]:
        """The clip with this first chunk, and all that can be asked about it."""
        return clip_at(self.chunks, index), ask_about(self.events, self.start(index))


def watch_video(folder: Path, video: str, size: tuple[int, int], end: float = float("inf")) -> Watched:
    """One video of a recording, up to `end` seconds; `size` is (height, width) in pixels to scale its frames to."""
    events = [e for e in read_events(folder / "events.jsonl", (*KINDS, "sight")) if e.video == video]
    return Watched(video, read_all(read_chunks(folder / video, size, end=end)), events)


def document(clip: Sequence[VideoChunk], asked: Sequence[Asked], unit: int) -> Document:
    """A clip, and questions about it with their answers, one after another; a token is `unit` pixels wide and high."""
    height, width = clip[0].frames.shape[1:3]
    tokens = " ".join([MEDIA] * (height * width // unit**2))
    shown = " ".join(f"{chunk.timestamp} {tokens}" for chunk in clip)
    (question, answer), *more = ((each.question, each.answer) for each in asked)
    return Document(
        "clip", asked[0].kind, ((f"{shown} {question}", answer), *more), tuple(chunk.frames for chunk in clip)
    )


def documents(videos: Sequence[Watched], unit: int, random: Random) -> Iterator[Document]:
    """Clips with TURNS questions each, without end: all clips in random order, over and over.

    Raises:
        ValueError: no video is long enough for a clip.
    """
    places = [(video, index) for video in videos for index in video.clips]
    if not places:
        raise ValueError(f"none of {len(videos)} videos is long enough for a clip")
    while True:
        random.shuffle(places)
        for video, index in places:
            clip, left = video.clip(index)
            chosen: list[Asked] = []
            while left and len(chosen) < TURNS:
                likely = [1.0 if each.kind == IS_THERE else RARE for each in left]
                chosen.append(left.pop(random.choices(range(len(left)), likely)[0]))
            yield document(clip, chosen, unit)


def answerer(detector: Detector) -> tuple[K25Lite, K25LiteProcessor]:
    """A model that sees by the detector's encoder, which stands still, and has yet to learn to speak."""
    vision = detector.config.vision_config
    words = build_tokenizer(WORDS)
    shape: dict[str, Any] = {"num_hidden_layers": 2, "initializer_range": 0.1, "rope_theta": 1000.0}  # rows are short
    model = K25Lite(K25LiteConfig.lite(len(words), vision_config=vision, **shape))
    model.vision_tower.load_state_dict(detector.encoder.state_dict())
    model.vision_tower.requires_grad_(False)
    merge, *_ = vision.merge_kernel_size
    return model, K25LiteProcessor(words, patch_size=vision.patch_size, merge_size=merge)


def load_answerer(folder: Path | None = None) -> tuple[K25Lite, K25LiteProcessor, tuple[int, int]]:
    """A trained model, its processor, and (height, width) of the frames it is to be shown; by default the shipped one.

    Raises:
        ValueError: there is no model in `folder`, or another one.
    """
    folder = folder or SHIPPED_ANSWERER
    if not (folder / "config.json").is_file():
        raise ValueError(f"no folder with a model: {folder}")
    model, processor = K25Lite.from_pretrained(folder).eval(), K25LiteProcessor.from_pretrained(folder)
    grid = model.config.vision_config
    return model, processor, (grid.pos_emb_height * grid.patch_size, grid.pos_emb_width * grid.patch_size)


def unit_of(model: K25Lite) -> int:
    """Pixels of the side of what one vision token shows."""
    return model.config.vision_config.patch_size * model.config.vision_config.merge_kernel_size[0]


def examine(model: K25Lite, words: PreTrainedTokenizerFast, video: Watched, most: int, seed: int = 0) -> pd.DataFrame:
    """Questions about clips of a video, answered with and without sight.

    Args:
        most: questions of each wording; of those that yes or no answers as many are answered by the one as by the other,
            so that a constant answer to them is right in half of the cases.

    Returns:
        One row per question: video, kind, question, answer (the true one), start (of the clip, in seconds), and whether
        the model's was right: `seeing`, and `blind`, with grey frames.
    """
    random = Random(f"k25lite clips {seed} {video.name}")
    rows, wanted = [], dict[tuple[str, str], list[tuple[int, list[VideoChunk], Asked]]]()
    for index in random.sample(video.clips, len(video.clips)):
        clip, asked = video.clip(index)
        for each in asked:
            alike = wanted.setdefault((each.question, each.answer if each.kind == IS_THERE else ""), [])
            if len(alike) < (most // 2 if each.kind == IS_THERE else most):
                alike.append((index, clip, each))
    for (question, said), alike in wanted.items():
        if said:
            other = wanted.get((question, {"yes": "no", "no": "yes"}[said]), [])
            alike = alike[: len(other)]
        if not alike:
            continue
        questions = tokenise([document(clip, [each], unit_of(model)) for _, clip, each in alike], words)
        right = zip(exact_match(model, questions), exact_match(model, questions.without_sight()), strict=True)
        rows += [
            (video.name, *each, video.start(index), *scored)
            for (index, _, each), scored in zip(alike, right, strict=True)
        ]
    return pd.DataFrame(rows, columns=["video", "kind", "question", "answer", "start", "seeing", "blind"])


def questions_stage(
    run: QuestionsRun,
    detector: Path = SHIPPED,
    footage: Sequence[Sequence[Path]] | None = None,
    progress: bool = False,
) -> Path:
    """The folder of a trained `K25Lite` and its processor; beside them log.json and, of its examination, exam.csv.

    That of `full` is shipped, for to record and to train takes a quarter of an hour.

    Args:
        detector: the folder of the one whose encoder it sees with.
        footage: recordings to learn from, and to be examined on; by default they are made, and removed afterwards.

    Raises:
        ModuleNotFoundError: no footage is given, and the game is not installed.
        ValueError: a folder holds no finished recording.
    """

    def build(folder: Path) -> None:
        torch.manual_seed(run.seed)
        eyes = Detector.from_pretrained(detector)
        model, processor = answerer(eyes)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        with tempfile.TemporaryDirectory() as made:
            recordings = footage or [
                record_for(what, Path(made), run.footage, progress) for what in (CONTEXT, VALIDATION)
            ]
            learnt, examined = (
                [watch_video(each, video["video"], eyes.size) for each in folders for video in manifest(each)["videos"]]
                for folders in recordings
            )
        rows = make_rows(
            documents(learnt, unit_of(model), Random(f"k25lite clips {run.seed}")),
            run.steps * run.clips,
            ROW,
            processor.tokenizer,
        )
        steps: list[Step] = [[("vision", step * run.clips + i) for i in range(run.clips)] for step in range(run.steps)]
        recipe = Recipe(LearningRate(run.learning_rate))
        log = train(model, steps, {"vision": rows}, recipe, progress=progress).log
        log.to_json(folder / "log.json", orient="records")
        exam = [examine(model, processor.tokenizer, video, run.asked) for video in examined]
        pd.concat(exam).round({"start": 3}).to_csv(folder / "exam.csv", index=False)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    is_shipped = run == QUESTIONS_RUNS["full"] and detector == SHIPPED and footage is None
    if is_shipped and SHIPPED_ANSWERER.is_dir():
        return SHIPPED_ANSWERER
    config: dict[str, Any] = asdict(run)
    config["detector"] = hashlib.sha256((detector / "model.safetensors").read_bytes()).hexdigest()
    if footage:
        config["recordings"] = [
            [video["sha256"] for each in folders for video in manifest(each)["videos"]] for folders in footage
        ]
    return cached("answerer", config, build, threads=None)
