"""What happens in a few seconds of play, in words: questions about a clip, their true answers, and the model's.

This is the detector in language form: behind the same encoder stand, instead of a linear layer, a projector and a small
language model. A clip is CLIP_CHUNKS chunks of four frames that share none, each behind its time in the clip, as a video
stands in a prompt of Kimi K2.5 (report, section 4.2). Not covered: what is picked up, for the letters of the message that
tells it are two of the encoder's pixels wide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

import torch

from k25lite.gameplay.events import BOSSES, KINDS, Event
from k25lite.gameplay.footage import CHUNK_SECONDS, FRAME_STEP, FRAMES, Chunks, read_all, read_chunks
from k25lite.model import K25Lite
from k25lite.processing import K25LiteProcessor
from k25lite.vision import VideoChunk

CLIP_CHUNKS = 4
CLIP_SECONDS = CLIP_CHUNKS * FRAMES * FRAME_STEP  # 7.3
STRIDE = round(FRAMES * FRAME_STEP / CHUNK_SECONDS)  # the detector's chunks overlap: every second one shares no frame
LEAST = 0.5  # seconds of a fight, of a boss in sight or of a death within the clip, for it to be said to happen there
MOMENTS = ("pickup", "level")  # the other kinds, which happen where they begin
NAMES = {"level": "new level"}  # how kinds are called in words, where not by their name
WHAT, IS_THERE, WHICH, WHEN = "what happens", "is there", "which boss", "when"  # kinds of questions
IS_THERE_A = {kind: f"is there a {NAMES.get(kind, kind)} ?" for kind in KINDS}
WHEN_IS = {kind: f"when is the {NAMES.get(kind, kind)} ?" for kind in MOMENTS}
WHAT_HAPPENS, WHICH_BOSS = "what happens here ?", "which boss is it ?"
QUESTIONS = (WHAT_HAPPENS, *IS_THERE_A.values(), *WHEN_IS.values(), WHICH_BOSS)
LONGEST_ANSWER = 12  # tokens; all five kinds are ten, and the end


class Asked(NamedTuple):
    """A question about a clip: of which kind, in words, and the true answer."""

    kind: str
    question: str
    answer: str


def ask_about(events: Sequence[Event], start: float) -> list[Asked]:
    """All that can be asked about the clip that begins at `start` seconds of a video, and what is true of it.

    Args:
        events: those of that video, sights among them: a boss behind the player's back is none that can be seen.
    """
    inside = {kind: [event for event in events if _shows(event, kind, start)] for kind in KINDS}
    happens = [NAMES.get(kind, kind) for kind in KINDS if inside[kind]]
    asked = [Asked(WHAT, WHAT_HAPPENS, " and ".join(happens) or "nothing")]
    for kind in KINDS:
        asked.append(Asked(IS_THERE, IS_THERE_A[kind], "yes" if inside[kind] else "no"))
        if kind in MOMENTS and len(inside[kind]) == 1:
            chunk = int((inside[kind][0].start - start) / (FRAMES * FRAME_STEP))
            asked.append(Asked(WHEN, WHEN_IS[kind], _second(chunk)))
    if len(bosses := {event.detail for event in inside["boss"]}) == 1 and (boss := bosses.pop()) in BOSSES:
        asked.append(Asked(WHICH, WHICH_BOSS, in_words(boss)))
    return asked


def in_words(name: str) -> str:
    """The name of a class of the game as words: "BaronOfHell" -> "baron of hell"."""
    return " ".join(re.findall(r"[A-Z][a-z]+", name)).lower()


def clip_start(chunk: int) -> float:
    """Seconds at which the clip begins whose first chunk has this number: with the step before what that chunk is about."""
    return chunk * CHUNK_SECONDS - FRAME_STEP


def clip_at(chunks: Chunks, index: int) -> list[VideoChunk]:
    """The clip whose first chunk has this index in `chunks`; its times count from its own start.

    Raises:
        IndexError: it would go on after the last of them.
    """
    indices = range(index, index + CLIP_CHUNKS * STRIDE, STRIDE)
    if index < 0 or indices[-1] >= len(chunks.times):
        raise IndexError(f"of {len(chunks.times)} chunks, {list(indices)} cannot be a clip")
    times = [frame * FRAME_STEP for frame in range(CLIP_CHUNKS * FRAMES)]
    return [VideoChunk(chunks.frames[i], tuple(times[n * FRAMES :][:FRAMES])) for n, i in enumerate(indices)]


def read_clip(source: str | PathLike, start: float, size: tuple[int, int]) -> tuple[float, list[VideoChunk]]:
    """The clip of a video that begins closest to `start` seconds: when it really begins, and its chunks.

    Args:
        size: (height, width) in pixels to scale to.

    Raises:
        ValueError: the video ends before the clip does. MediaError: as in `read_chunks`.
    """
    first = max(1, round((start + FRAME_STEP) / CHUNK_SECONDS))  # before the first chunk there is no step
    last = first + CLIP_CHUNKS * STRIDE
    parts = list(read_chunks(source, size, start=first * CHUNK_SECONDS, end=last * CHUNK_SECONDS))
    if sum(len(part.times) for part in parts) < last - first:
        raise ValueError(f"{source} ends before a clip of {CLIP_SECONDS:.1f} s from {start:g} s does")
    return clip_start(first), clip_at(read_all(parts), 0)


@torch.inference_mode()
def answer(
    model: K25Lite, processor: K25LiteProcessor, clips: Sequence[Sequence[VideoChunk]], questions: Sequence[str]
) -> list[str]:
    """What the model answers, in words: to `questions[i]` about `clips[i]`; times count from the start of the clip.

    Raises:
        ValueError: clips and questions differ in number, or a question has a word that the model does not know.
    """
    if len(clips) != len(questions):
        raise ValueError(f"one question about each clip, got {len(questions)} about {len(clips)}")
    words = processor.tokenizer
    for question in questions:
        if words.unk_token in words.tokenize(question):
            raise ValueError(f"the model knows not every word of {question!r}; what it can be asked: {QUESTIONS}")
    if not clips:
        return []
    inputs = processor(text=[f"<video> {question}" for question in questions], videos=[list(clip) for clip in clips])
    told = model.generate(
        **{name: value if name == "grid_thw" else value.to(model.device) for name, value in inputs.items()},
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
        eos_token_id=words.convert_tokens_to_ids("."),
    )
    answers = words.batch_decode(told[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [said.removesuffix(".").strip().replace(" : ", ":") for said in answers]


def _shows(event: Event, kind: str, start: float) -> bool:
    """Whether the event is of that kind, and to be seen in the clip that begins at `start` seconds."""
    if event.kind != ("sight" if kind == "boss" else kind):
        return False
    if kind in MOMENTS:
        return start <= event.start < start + CLIP_SECONDS
    return min(event.end, start + CLIP_SECONDS) - max(event.start, start) >= LEAST


def _second(chunk: int) -> str:
    """When a chunk of a clip begins, as its `VideoChunk.timestamp` says it, to the full second: a point ends an answer."""
    return f"00:00:{int(chunk * FRAMES * FRAME_STEP):02d}"


# What the tokenizer knows beside what media and times need: of questions and answers all words, and the end of an answer.
WORDS = sorted(
    {word for text in (*QUESTIONS, *map(in_words, BOSSES), "yes no nothing and") for word in text.split()} | {"."}
)
