"""Small scenes of shapes and digits, as pictures and as clips, with questions whose answers are exact by construction.

A scene is a 2 x 2 board of 16-pixel cells, one object to a cell, so that one vision token of the lite encoder (patches of
8 pixels, merged 2 x 2) covers one object. In a clip an object crosses its cell, or stays.

- *still* questions can be answered from any one frame: the colour of an object, and what it is.
- *motion* questions need several frames in their order: which way an object moves.
- *flash* questions ask which digit appeared in a cell for a moment, if any did: one needs to have looked in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, GLYPH = 16, 8  # pixels

CELLS = ("top-left", "top-right", "bottom-left", "bottom-right")
COLOURS = {
    "red": (230, 60, 50),
    "green": (60, 190, 80),
    "blue": (70, 110, 240),
    "yellow": (240, 210, 60),
    "cyan": (60, 210, 220),
    "magenta": (220, 80, 210),
}
SHAPES = ("disc", "square", "triangle", "cross", "ring")
DIGITS = tuple("01247")  # five that stay distinct at eight pixels
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}
ASKED = ("colour", "what", "move", "flash")

WORDS = ("<pad>", "<start>", *ASKED, "none", *COLOURS, *SHAPES, *DIGITS, *DIRECTIONS)
TOKEN = {word: index for index, word in enumerate(WORDS)}

Kind = Literal["still", "motion", "flash"]


@dataclass(frozen=True)
class Question:
    """`asked` of `where` is `answer`; `concept` is the shape or digit that stands there, for splits by what was taught."""

    asked: str
    where: str
    answer: str
    concept: str = ""

    @property
    def kind(self) -> Kind:
        if self.asked == "flash":
            return "flash"
        return "still" if self.asked in ("colour", "what") else "motion"


@dataclass(frozen=True)
class Thing:
    """What stands in a cell, of which colour, moving in which direction, and from where if it stands still."""

    concept: str
    colour: str
    motion: str
    start: tuple[int, int]

    def position(self, frame: int, frames: int) -> tuple[int, int]:
        """Top and left of the glyph in its cell, in pixels: what moves crosses the whole cell during the clip."""
        free = CELL - GLYPH
        row, column = (
            start if step == 0 else round(free * (frame if step > 0 else frames - 1 - frame) / (frames - 1))
            for start, step in zip(self.start, DIRECTIONS[self.motion], strict=True)
        )
        return row, column


@dataclass(frozen=True)
class Scene:
    """A board through time.

    Attributes:
        things: one per cell, in the order of `CELLS`.
        frames: 1 for a picture, else how many frames the clip has.
        flash: (cell, digit, first frame, frames it lasts), or None.
        noise: seed of the sensor noise.
    """

    things: tuple[Thing, ...]
    frames: int
    flash: tuple[int, str, int, int] | None
    noise: int

    @property
    def questions(self) -> tuple[Question, ...]:
        found: list[Question] = []
        for cell, (where, thing) in enumerate(zip(CELLS, self.things, strict=True)):
            if self.flash:
                found.append(Question("flash", where, self.flash[1] if self.flash[0] == cell else "none"))
                continue
            found.append(Question("what", where, thing.concept, thing.concept))
            found.append(Question("colour", where, thing.colour, thing.concept))
            if self.frames > 1:
                found.append(Question("move", where, thing.motion, thing.concept))
        return tuple(found)


@dataclass(frozen=True)
class SceneSpec:
    """What to draw from.

    Args:
        frames: 1 for pictures, 4 for one chunk, more for longer clips.
        concepts: the shapes and digits that may appear; leaving some out of the clips is how transfer is tested.
        flash_frames: None, or for how many frames a digit flashes.
    """

    frames: int = 1
    concepts: tuple[str, ...] = SHAPES + DIGITS
    flash_frames: int | None = None

    @property
    def standing(self) -> tuple[str, ...]:
        """What may stand in a cell: beside a flash only shapes, so that a digit seen is the one that flashed."""
        return tuple(c for c in self.concepts if self.flash_frames is None or c in SHAPES)

    def __post_init__(self) -> None:
        if not self.standing or not set(self.concepts) <= {*SHAPES, *DIGITS}:
            raise ValueError(f"concepts must be some of {SHAPES + DIGITS}, with a flash shapes, got {self.concepts}")
        if self.frames < 1 or not (self.flash_frames is None or 1 <= self.flash_frames <= self.frames):
            raise ValueError(f"a flash lasts 1 to {self.frames} frames of the clip, got {self.flash_frames}")


def sample_scenes(spec: SceneSpec, n: int, seed: int) -> Iterator[Scene]:
    """n scenes; the same (spec, seed) gives the same scenes, and different seeds share none but by coincidence."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        flash = None
        if spec.flash_frames is not None:
            first = int(rng.integers(spec.frames - spec.flash_frames + 1))
            flash = (int(rng.integers(4)), DIGITS[rng.integers(len(DIGITS))], first, spec.flash_frames)
        things = tuple(_sample_thing(rng, spec) for _ in CELLS)
        yield Scene(things, spec.frames, flash, int(rng.integers(2**31)))


def _sample_thing(rng: np.random.Generator, spec: SceneSpec) -> Thing:
    row, column = (int(rng.integers(CELL - GLYPH + 1)) for _ in range(2))
    motion = rng.choice(list(DIRECTIONS)) if spec.frames > 1 else "still"
    return Thing(str(rng.choice(spec.standing)), str(rng.choice(list(COLOURS))), str(motion), (row, column))


def draw(scene: Scene) -> np.ndarray:
    """The scene's frames, [frames, 32, 32, 3] uint8: coloured objects on near-black, with a little sensor noise."""
    rng = np.random.default_rng(scene.noise)
    canvas = rng.normal(24, 6, (scene.frames, 2 * CELL, 2 * CELL, 3)).astype(np.float32)
    for cell, thing in enumerate(scene.things):
        for frame in range(scene.frames):
            _paste(canvas[frame], cell, thing.concept, thing.colour, *thing.position(frame, scene.frames))
    if scene.flash:
        cell, digit, first, lasts = scene.flash
        for frame in range(first, first + lasts):
            canvas[frame, CELL * (cell // 2) :, CELL * (cell % 2) :][:CELL, :CELL] = 24
            _paste(canvas[frame], cell, digit, None, (CELL - GLYPH) // 2, (CELL - GLYPH) // 2)
    return canvas.clip(0, 255).astype(np.uint8)


def _paste(frame: np.ndarray, cell: int, concept: str, colour: str | None, row: int, column: int) -> None:
    top, left = CELL * (cell // 2) + row, CELL * (cell % 2) + column
    window = frame[top : top + GLYPH, left : left + GLYPH]
    paint = np.array(COLOURS[colour] if colour else (255, 255, 255), np.float32)
    mask = glyph(concept)[..., None]
    window += mask * (paint - window)


@cache
def glyph(concept: str) -> np.ndarray:
    """[8, 8] coverage of a shape or digit in [0, 1], drawn large and averaged down."""
    scale = 8
    side = GLYPH * scale
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    box, third = (0, 0, side - 1, side - 1), side // 3
    if concept == "disc":
        pen.ellipse(box, fill=255)
    elif concept == "ring":
        pen.ellipse(box, outline=255, width=side // 5)
    elif concept == "square":
        pen.rectangle(box, fill=255)
    elif concept == "triangle":
        pen.polygon([(side // 2, 0), (side - 1, side - 1), (0, side - 1)], fill=255)
    elif concept == "cross":
        pen.rectangle((third, 0, 2 * third, side), fill=255)
        pen.rectangle((0, third, side, 2 * third), fill=255)
    else:
        font = ImageFont.load_default(side * 1.25)
        pen.text((side / 2, side / 2), concept, fill=255, font=font, anchor="mm", stroke_width=side // 40)
    return np.asarray(image.reduce(scale), np.float32) / 255
