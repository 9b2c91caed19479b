"""The oracle is always the board, or the string, that was drawn."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25lite.training import vision_tools as tools
from k25lite.training.vision_tools import ON_BOARDS, ON_PIXELS, TOOLS
from k25lite.world.families import CHARACTERS, vocabulary
from k25lite.world.pictures import draw_board, draw_string
from k25lite.world.scenes import CELL, CELLS, COLOURS, GLYPH, SHAPES, Thing, glyph

THINGS = [f"{colour}-{shape}" for colour in COLOURS for shape in SHAPES]
NAMES = [*COLOURS, *SHAPES, *THINGS]
BOARD = ["red-disc", "none", "blue-ring", "red-square"]

boards = st.tuples(st.lists(st.sampled_from([*THINGS, "none"]), min_size=4, max_size=4), st.integers(0, 2**32))


def draw(words, seed=0, columns=2, margin=0):
    """A board of these words, and the things that stand on it, at least `margin` pixels from the border of their cells."""
    random = Random(seed)
    things = []
    for word in words:
        colour, _, shape = word.partition("-")
        place = random.randint(margin, CELL - GLYPH - margin), random.randint(margin, CELL - GLYPH - margin)
        things.append(None if word == "none" else Thing(shape, colour, "still", place))
    return draw_board(things, columns, random)[0], things


def random_words(random, count=4):
    return [random.choice(THINGS) if random.random() < 0.8 else "none" for _ in range(count)]


def test_at_least_995_of_1000_things_are_recognised():
    random, right = Random(0), 0
    for seed in range(400):
        words = random_words(random)
        right += sum(np.array([tools.thing(crop) for crop in tools.cells(draw(words, seed)[0])]) == words)
    assert right >= 0.995 * 1600


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_recognised_in_every_place_of_its_cell(shape):
    for index in range(81):
        img = draw_board([Thing(shape, list(COLOURS)[index % 6], "still", divmod(index, 9))], 1, Random(index))[0]
        assert tools.shape(img) == shape


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_boards_of_other_sizes_are_counted_and_searched(columns):
    words = ["red-disc", "blue-ring", "none", "red-cross", "green-disc", "red-disc"]
    img, _ = draw(words, columns=columns)
    assert [tools.count(img, word) for word in ("red", "disc", "red-disc", "none", "cyan")] == [3, 3, 2, 1, 0]
    assert tools.more(img, "red", "disc") == "same"
    assert tools.thing(img) == "red-disc"
    left, top, _, _ = tools.box(img, "green")
    assert (top // CELL, left // CELL) == divmod(4, columns)


def test_printed_strings_are_read_exactly():
    random, right = Random(1), 0
    for _ in range(200):
        text = "".join(random.choice(CHARACTERS) for _ in range(6))
        right += tools.read(draw_string(text, random)) == text
    assert right >= 0.99 * 200


@pytest.mark.parametrize("length", [1, 2, 11])
def test_strings_of_other_lengths_are_read(length):
    random, right = Random(2), 0
    for _ in range(50):
        text = "".join(random.choice(CHARACTERS) for _ in range(length))
        right += tools.read(draw_string(text, random)) == text
    assert right >= 48


def test_a_blank_picture_shows_nothing():
    img, _ = draw(["none"] * 4)
    assert (tools.read(img[:16]), tools.colour(img), tools.shape(img), tools.thing(img)) == ("none",) * 4
    assert tools.components(tools.mask(img, "red")) == []


@given(boards, st.sampled_from(NAMES))
@settings(deadline=None, max_examples=150)
def test_a_box_holds_its_thing_and_nothing_else(board, word):
    words, seed = board
    img, things = draw(words, seed)
    standing = [index for index, seen in enumerate(words) if word in (seen, *seen.split("-"))]
    box = tools.box(img, word)
    if not standing:
        assert box is None
        return
    row, column = divmod(standing[0], 2)
    start = things[standing[0]].start
    top, left = CELL * row + start[0], CELL * column + start[1]
    assert np.abs(np.array(box) - (left, top, left + GLYPH, top + GLYPH)).max() <= 1
    x, y = tools.center(box)
    assert (x // CELL, y // CELL) == (column, row)
    assert tools.thing(img[box[1] : box[3], box[0] : box[2]]) == words[standing[0]]


@given(boards, st.sampled_from(list(COLOURS)))
@settings(deadline=None, max_examples=100)
def test_a_mask_covers_the_glyphs_of_its_colour(board, colour):
    words, seed = board
    img, things = draw(words, seed)
    wanted = np.zeros(img.shape[:2])
    for index, thing in enumerate(things):
        if thing and thing.colour == colour:
            row, column = np.array(divmod(index, 2)) * CELL + thing.start
            wanted[row : row + GLYPH, column : column + GLYPH] = glyph(thing.concept)
    mask = tools.mask(img, colour)
    assert mask[wanted > 0.6].all(), "covered, though not wholly"
    assert not mask[wanted < 0.4].any(), "neither background nor another colour"
    assert tools.area(mask) == mask.sum()


@given(boards, st.sampled_from(list(COLOURS)))
@settings(deadline=None, max_examples=100)
def test_components_are_the_things_of_a_mask_row_by_row(board, colour):
    words, seed = board
    img, _ = draw(words, seed, margin=1)
    found = tools.components(tools.mask(img, colour))
    cells = [2 * (top // CELL) + left // CELL for left, top, _, _ in found]
    assert cells == [index for index, word in enumerate(words) if word.startswith(colour)]


def test_things_of_one_colour_that_touch_are_one_component_and_two_things():
    things = [Thing("square", "red", "still", (4, 8)), Thing("square", "red", "still", (4, 0))]
    img = draw_board(things, 2, Random(0))[0]
    assert tools.components(tools.mask(img, "red")) == [(8, 4, 24, 12)]
    assert tools.count(img, "red") == 2


@given(boards, st.sampled_from([*NAMES, "none"]), st.sampled_from([*NAMES, "none"]), st.sampled_from(CELLS))
@settings(deadline=None, max_examples=200)
def test_a_told_board_gives_the_answers_of_its_picture(board, a, b, where):
    words, seed = board
    img, _ = draw(words, seed)
    for ask in (
        lambda board: tools.find(board, a),
        lambda board: tools.count(board, a),
        lambda board: tools.count(tools.cells(board), a),
        lambda board: tools.count([tools.colour(cell) for cell in tools.cells(board)], a),
        lambda board: tools.more(board, a, b),
        lambda board: [tools.thing(cell) for cell in tools.cells(board)],
        lambda board: tools.colour(tools.cell(board, where)),
        lambda board: tools.shape(tools.cell(board, where)),
        *(tools.colour, tools.shape, tools.thing),
    ):
        assert ask(img) == ask(words) == ask(tuple(words))


def test_a_told_board_by_hand():
    assert tools.find(BOARD, "red") == "top-left"
    assert tools.find(BOARD, "square") == "bottom-right"
    assert tools.find(BOARD, "none") == "top-right"
    assert tools.find(BOARD, "green") == "none"
    assert tools.cell(BOARD, "bottom-left") == "blue-ring"
    assert tools.more(BOARD, "blue", "red") == "red"
    assert tools.more(BOARD, "blue", "square") == "same"
    assert (tools.colour(BOARD), tools.shape(BOARD), tools.thing(BOARD)) == ("red", "disc", "red-disc")
    assert tools.count(["red", "blue", "red"], "red") == 2
    assert tools.read("K7QX2B") == "K7QX2B"


def test_neighbours_are_those_of_the_board():
    steps = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for index, where in enumerate(CELLS):
        for direction, step in steps.items():
            row, column = np.add(divmod(index, 2), step)
            wanted = CELLS[2 * row + column] if {row, column} <= {0, 1} else "none"
            assert tools.beside(where, direction) == wanted


def test_every_tool_is_listed_once():
    assert set(TOOLS.values()) == {*ON_BOARDS, *ON_PIXELS, tools.beside, tools.read}
    assert list(TOOLS) == [tool.__name__ for tool in TOOLS.values()]
    assert tools.WORDS.issubset(vocabulary()), "the world's words, no others"


@pytest.mark.parametrize("told", [BOARD, tuple(BOARD), "red-disc"])
@pytest.mark.parametrize("call", ["mask(img, 'red')", "components(img)", "area(img)"])
def test_what_is_told_has_no_pixels(call, told):
    with pytest.raises(TypeError, match="this needs"):
        eval(call, {**TOOLS, "img": told})


@pytest.mark.parametrize(
    "call",
    [
        "cell(img, 'middle')",
        "cell(img, 3)",
        "cells(img[:16])",
        "cells(None)",
        "cells(['red-disc'])",
        "cells(['red-disc', 'none', 'none', 'pink-disc'])",
        "mask(img, 'disc')",
        "mask(img[0], 'red')",
        "colour(img > 3)",
        "colour(img[:0])",
        "shape(None)",
        "thing(4)",
        "components(img)",
        "area([1])",
        "box(img, 'pink')",
        "center(None)",
        "center((1, 2, 3))",
        "count(img, 'pink')",
        "count(3, 'red')",
        "count([3], 'red')",
        "find(img, ['red'])",
        "find(img[:, :16], 'red')",
        "find(['red-disc'] * 3, 'red')",
        "more(img, 'red', None)",
        "beside('top-left', 'still')",
        "beside('middle', 'left')",
        "beside(None, 'left')",
        "read(img)",
        "read(img[:16, :20])",
        "read(None)",
    ],
)
def test_bad_arguments_get_one_short_clause(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        eval(call, {**TOOLS, "img": draw(BOARD)[0]})
    assert len(str(caught.value)) < 90
    assert "\n" not in str(caught.value)
