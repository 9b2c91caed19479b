"""The functions a program may call on a picture: the vision tools of zero-vision SFT (report, section 2.2).

They look at pixels alone, of the boards and printed strings of `k25lite.world.pictures`; handwriting and sprites are not
read. Zero-vision SFT has no pictures, so that a board of 2 x 2 cells may also be *told*, as four words row by row
(`["red-disc", "none", "blue-ring", "none"]`), a cell as its word, and a printed string as itself: the same program then
gives the same answer; only the box of a thing is that of its cell. What is told has no pixels to mask or to measure.

A picture is uint8 [height, width, 3], a box (left, top, right, bottom) in pixels, right and bottom exclusive. A word names
a colour ("red"), a shape ("disc"), a thing ("red-disc"), or nothing ("none"). What a function cannot take raises TypeError
or ValueError with one short clause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import cache
from itertools import product
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from k25lite.world.families import CHARACTERS
from k25lite.world.pictures import BACKGROUND, FONT_SIZES, FONTS, PAINTS
from k25lite.world.scenes import CELL, CELLS, COLOURS, GLYPH, SHAPES, glyph

Box: TypeAlias = tuple[int, int, int, int]
Board: TypeAlias = np.ndarray | list[str] | tuple[str, ...]

WORDS = {"none", *COLOURS, *SHAPES, *(f"{colour}-{shape}" for colour in COLOURS for shape in SHAPES)}
STEPS = {"left": ("right", "left"), "right": ("left", "right"), "up": ("bottom", "top"), "down": ("top", "bottom")}
GLYPHS = np.stack([glyph(shape) >= 0.5 for shape in SHAPES])
CENTRES = np.arange(1, 2 * GLYPH, 2)  # of a glyph's pixels, in half pixels
OFF_COLOUR = 40  # levels by which a pixel may miss the mixtures of a paint with the background; noise reaches 25
LEAST_AREA = 6  # pixels of a thing; the smallest glyph has 32


def cell(img: Board, where: str) -> np.ndarray | str:
    """The crop [16, 16, 3] of a 2 x 2 board's cell, by its name; of a told board the cell's word."""
    return cells(img)[CELLS.index(_known(where, CELLS, "cell"))]


def cells(img: Board) -> list[Any]:
    """The four crops [16, 16, 3] of a 2 x 2 board's cells, row by row; of a told board the words."""
    if isinstance(img, list | tuple) and len(img) == len(CELLS):
        return [_word(word) for word in img]
    if not isinstance(img, np.ndarray) or _picture(img).shape[:2] != (2 * CELL, 2 * CELL):
        raise ValueError("this needs a board of 2 x 2 cells, a picture or four words")
    return _crops(img)


def mask(img: np.ndarray, colour: str) -> np.ndarray:
    """Boolean [height, width]: the pixels at least half covered by that colour, whatever they share with the background."""
    return _paints(img) == list(COLOURS).index(_known(colour, COLOURS, "colour"))


def colour(img: Board | str) -> str:
    """The colour of the largest coloured thing, or "none"; of a board's things the most frequent colour, or the first."""
    return _commonest(part for thing in _things(img) for part in thing.split("-") if part in COLOURS)


def shape(img: Board | str) -> str:
    """The shape of the largest coloured thing, or "none"; of a board's things the most frequent shape, or the first."""
    return _commonest(part for thing in _things(img) for part in thing.split("-") if part in SHAPES)


def thing(img: Board | str) -> str:
    """The largest coloured thing, as "red-disc", or "none"; of a board the most frequent thing, or the first."""
    return _commonest(thing for thing in _things(img) if thing != "none")


def components(mask: np.ndarray) -> list[Box]:
    """The boxes of a mask's connected parts of 6 pixels or more, by rows of cells; things that touch are one part."""
    labels, _ = ndimage.label(_mask(mask), structure=np.ones((3, 3), int))
    parts = zip(ndimage.find_objects(labels), np.bincount(labels.ravel())[1:], strict=True)
    boxes = [(x.start, y.start, x.stop, y.stop) for (y, x), area in parts if area >= LEAST_AREA]
    return sorted(boxes, key=lambda box: (center(box)[1] // CELL, box[0], box[1]))


def area(mask: np.ndarray) -> int:
    """How many pixels a mask has."""
    return int(_mask(mask).sum())


def box(img: Board, word: str) -> Box | None:
    """The box of the first thing, by cells, of that colour or shape or both; None if there is none. If told, its cell's."""
    if not isinstance(img, np.ndarray):
        where = find(img, word)
        if where == "none":
            return None
        y, x = (CELL * part for part in divmod(CELLS.index(where), 2))
        return x, y, x + CELL, y + CELL
    columns = max(_picture(img).shape[1] // CELL, 1)
    for index, paints in enumerate(_crops(_paints(img))):
        seen, (left, top, right, bottom) = _see(paints)
        if _names(word, seen) and seen != "none":
            y, x = CELL * (index // columns), CELL * (index % columns)
            return left + x, top + y, right + x, bottom + y
    return None


def center(box: Box) -> tuple[int, int]:
    """The pixel (x, y) in the middle of a box."""
    left, top, right, bottom = box
    return (left + right) // 2, (top + bottom) // 2


def count(things: Board, word: str) -> int:
    """How many are of that colour or shape or both: of a list of words or crops, or of a board's things."""
    return sum(_names(word, thing) for thing in _things(things))


def find(img: Board, word: str) -> str:
    """The name of a 2 x 2 board's first cell where a thing of that colour or shape or both stands, or "none"."""
    cells(img)  # raises for a board of another size
    return next((name for name, seen in zip(CELLS, _things(img), strict=True) if _names(word, seen)), "none")


def more(img: Board, a: str, b: str) -> str:
    """Of two words the one that names more of a board's things, or "same"."""
    difference = sum(_names(a, thing) - _names(b, thing) for thing in _things(img))
    return "same" if difference == 0 else a if difference > 0 else b


def beside(where: str, direction: str) -> str:
    """The name of a 2 x 2 board's cell that lies "left", "right", "up" or "down" of a cell, or "none"."""
    start, end = STEPS[_known(direction, STEPS, "direction")]
    return where.replace(start, end) if start in _known(where, CELLS, "cell") else "none"


def read(img: np.ndarray | str) -> str:
    """A printed string, one character to each box of 16 pixels, from a picture [16, 16 characters, 3]; "none" if blank.

    All boxes share one font and size: those whose templates fit best together.
    """
    if isinstance(img, str):
        return img
    if _picture(img).shape[0] != CELL or img.shape[1] % CELL:
        raise ValueError(f"this needs a row of boxes of {CELL} pixels")
    light = img.astype(np.float32) - BACKGROUND
    ink = np.median(light.reshape(-1, 3)[light.sum(2).argsort(axis=None)[-12:]], axis=0)
    if ink.max() < 60:  # noise reaches 12
        return "none"
    basis, templates, energy = _templates()
    coverage = (light @ (ink / (ink @ ink))).clip(0, 1)
    boxes = coverage.reshape(CELL, -1, CELL).swapaxes(0, 1).reshape(-1, CELL * CELL) @ basis
    alike = (boxes @ templates.T - energy / 2).reshape(len(boxes), len(FONTS) * len(FONT_SIZES), len(CHARACTERS), -1)
    best = alike.max(3)  # over the places: [boxes, styles, characters]
    style = best.max(2).sum(0).argmax()
    return "".join(CHARACTERS[index] for index in best[:, style].argmax(1))


ON_BOARDS = (cell, cells, colour, shape, thing, count, find, more, box)  # pictures or told
ON_PIXELS = (mask, components, area, center)
TOOLS: dict[str, Callable[..., Any]] = {tool.__name__: tool for tool in (*ON_BOARDS, *ON_PIXELS, beside, read)}


def _picture(img: Any) -> np.ndarray:
    if isinstance(img, str | list | tuple):
        raise TypeError("this needs pixels, what is told has none")
    if not isinstance(img, np.ndarray) or img.dtype != np.uint8 or img.ndim != 3 or img.shape[2] != 3 or not img.size:
        raise TypeError("this needs a picture")
    return img


def _mask(mask: Any) -> np.ndarray:
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 2:
        raise TypeError("this needs a mask")
    return mask


def _known(name: Any, names: Collection[str], kind: str) -> str:
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"no {kind} {name[:20] if isinstance(name, str) else type(name).__name__}")
    return name


def _word(word: Any) -> str:
    return _known(word, WORDS, "colour, shape or thing")


def _names(word: str, thing: str) -> bool:
    return _word(word) in (thing, *thing.split("-"))


def _commonest(words: Iterable[str]) -> str:
    return next((word for word, _ in Counter(words).most_common(1)), "none")


def _crops(pixels: np.ndarray) -> list[np.ndarray]:
    """The cells of what is [height, width, ...], or all of it if its sides are not multiples of theirs."""
    height, width = pixels.shape[:2]
    if height % CELL or width % CELL:
        return [pixels]
    return [pixels[y : y + CELL, x : x + CELL] for y in range(0, height, CELL) for x in range(0, width, CELL)]


def _things(img: Any) -> list[str]:
    if isinstance(img, np.ndarray):
        return [_see(paints)[0] for paints in _crops(_paints(img))]
    return [thing(item) for item in img] if isinstance(img, list | tuple) else [_word(img)]


def _see(paints: np.ndarray) -> tuple[str, Box]:
    """The largest thing of the dominant colour, and its box."""
    areas = np.bincount(paints.ravel(), minlength=len(COLOURS) + 1)[: len(COLOURS)]
    index = int(areas.argmax())
    parts = components(paints == index) if areas[index] >= LEAST_AREA else []
    if not parts:
        return "none", (0, 0, 0, 0)
    left, top, right, bottom = max(parts, key=lambda part: (part[2] - part[0]) * (part[3] - part[1]))
    rows, columns = (CENTRES * side // (2 * GLYPH) for side in (bottom - top, right - left))
    unlike = ((paints[top + rows[:, None], left + columns] == index) != GLYPHS).sum((1, 2))
    return f"{list(COLOURS)[index]}-{SHAPES[unlike.argmin()]}", (left, top, right, bottom)


def _paints(img: np.ndarray) -> np.ndarray:
    """[height, width]: the index of the colour that covers at least half of each pixel, else the number of colours."""
    return _paint_table()[tuple(np.moveaxis(_picture(img) >> 3, 2, 0))]


@cache
def _paint_table() -> np.ndarray:
    """[32, 32, 32]: `_paints` by the upper five bits of red, green and blue.

    Under anti-aliasing a pixel lies on the line from the background to a paint; the nearest line tells which.
    """
    light = np.stack(np.meshgrid(*[np.arange(4, 256, 8)] * 3, indexing="ij"), -1) - np.float32(BACKGROUND)
    lines = (PAINTS - BACKGROUND).astype(np.float32)
    coverage = light @ lines.T / (lines**2).sum(1)
    off = np.linalg.norm(light[..., None, :] - coverage[..., None] * lines, axis=-1)
    off[coverage < 0.5] = np.inf
    return np.where(off.min(-1) < OFF_COLOUR, off.argmin(-1), len(COLOURS))


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """48 directions [256, 48]; along them each character in each style and place [5760, 48]; its sum of squares [5760].

    The main directions of the templates tell them apart as all pixels would, in a third of the time.
    """
    folder = f"{matplotlib.get_data_path()}/fonts/ttf"
    styles = [ImageFont.truetype(f"{folder}/{font}.ttf", size) for font in FONTS for size in FONT_SIZES]
    drawn = []
    for style, character, x, y in product(styles, CHARACTERS, range(7, 10), range(11, 15)):  # as `draw_string` may
        drawn.append(Image.new("L", (CELL, CELL)))
        ImageDraw.Draw(drawn[-1]).text((x, y), character, fill=255, font=style, anchor="ms")
    pixels = np.stack([np.asarray(image, np.float32).ravel() / 255 for image in drawn])
    basis = np.linalg.eigh(pixels.T @ pixels).eigenvectors[:, -48:]
    templates = pixels @ basis
    return basis, templates, (templates**2).sum(1)
