"""Pictures and clips of the Lite World: entities, boards of shapes, printed strings, handwritten digits; uint8 RGB.

One vision token of the lite encoder covers 16 x 16 pixels (patches of 8, merged 2 x 2): an entity and a board's cell take
one token each, so that the language model meets one object as one token. Printed strings keep to no such grid. Noise is
drawn as integers, which are the same on every platform.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from k25lite.world.entities import SPRITE_SIDE, Entity
from k25lite.world.scenes import CELL, COLOURS, GLYPH, Thing, glyph

BACKGROUND, NOISE = 24, 12
PAINTS = np.array(list(COLOURS.values()), np.int16)
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "DejaVuSerif-Italic")
FONT_SIZES = (12, 13, 14)  # pixels
TRAINING_DIGITS = 1400  # of the 1,797 handwritten digits; the rest is for tests


def draw_entity(entity: Entity, random: Random) -> np.ndarray:
    """Its sprite somewhere in a cell, [16, 16, 3].

    Raises:
        ValueError: it has no sprite.
    """
    if entity.sprite is None:
        raise ValueError(f"{entity.name} has no sprite")
    canvas = _background(random, CELL, CELL)
    side = 2 * SPRITE_SIDE
    top, left = random.randrange(CELL - side + 1), random.randrange(CELL - side + 1)
    look = entity.sprite.repeat(2, 0).repeat(2, 1)[..., None]
    window = canvas[top : top + side, left : left + side]
    for index, colour in enumerate(entity.colours, start=1):
        window[:] = np.where(look == index, PAINTS[colour] + window - BACKGROUND, window)
    return canvas.clip(0, 255).astype(np.uint8)


def draw_board(things: Sequence[Thing | None], columns: int, random: Random, frames: int = 1) -> np.ndarray:
    """What stands in each cell, row by row, None for an empty one: [frames, 16 rows, 16 columns, 3]."""
    rows = len(things) // columns
    canvas = np.stack([_background(random, CELL * rows, CELL * columns) for _ in range(frames)])
    for index, thing in enumerate(things):
        row, column = divmod(index, columns)
        for frame in range(frames if thing else 0):
            assert thing
            top, left = thing.position(frame, frames)
            window = canvas[frame, CELL * row + top :, CELL * column + left :][:GLYPH, :GLYPH]
            paint = np.array(COLOURS[thing.colour], np.int16)
            window += (glyph(thing.concept)[..., None] * (paint - window)).astype(np.int16)
    return canvas.clip(0, 255).astype(np.uint8)


def draw_string(text: str, random: Random) -> np.ndarray:
    """Print in boxes, as on a form, one character to each: [16, 16 characters, 3]. Font, size, ink and place vary."""
    font = _font(random.choice(FONTS), random.choice(FONT_SIZES))
    mask = Image.new("L", (CELL * len(text), CELL))
    for index, character in enumerate(text):
        place = (CELL * index + random.randrange(7, 10), random.randrange(11, 15))
        ImageDraw.Draw(mask).text(place, character, fill=255, font=font, anchor="ms")
    canvas = _background(random, *mask.size[::-1])
    paint = np.array([random.randrange(140, 256) for _ in range(3)], np.int16)
    canvas += (np.asarray(mask, np.float32)[..., None] / 255 * (paint - canvas)).astype(np.int16)
    return canvas.clip(0, 255).astype(np.uint8)


def draw_handwriting(length: int, random: Random, *, test: bool = False) -> tuple[str, np.ndarray]:
    """A number in real handwriting and its picture, [16, 16 length, 3]: digits of scikit-learn's set (UCI, 43 writers).

    Training and test digits are different pieces of paper.
    """
    images, labels = _digits()
    low, high = (TRAINING_DIGITS, len(labels)) if test else (0, TRAINING_DIGITS)
    chosen = [random.randrange(low, high) for _ in range(length)]
    canvas = _background(random, CELL, CELL * length)
    ink = np.concatenate([images[i].repeat(2, 0).repeat(2, 1) for i in chosen], axis=1)
    canvas += (ink[..., None].astype(np.int16) * 13).clip(0, 200)
    return "".join(str(labels[i]) for i in chosen), canvas.clip(0, 255).astype(np.uint8)


def _background(random: Random, height: int, width: int) -> np.ndarray:
    """[height, width, 3] int16: dark, with sensor noise."""
    noise = np.frombuffer(random.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
    return (noise.astype(np.int16) % (2 * NOISE + 1)) + BACKGROUND - NOISE


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships these fonts in its wheel, so that they are the same everywhere.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # takes two seconds to import, and most processes draw no digit

    digits = load_digits()
    return digits.images.astype(np.uint8), digits.target
