import colorsys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25lite.world.scenes import (
    CELL,
    CELLS,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    GLYPH,
    SHAPES,
    TOKEN,
    WORDS,
    Scene,
    SceneSpec,
    Thing,
    draw,
    sample_scenes,
)

CONCEPTS = SHAPES + DIGITS
SPECS = {
    "pictures": SceneSpec(),
    "clips": SceneSpec(frames=4),
    "long clips": SceneSpec(frames=12),
    "one-frame flashes": SceneSpec(frames=8, flash_frames=1),
    "longer flashes": SceneSpec(frames=8, flash_frames=3),
}
HUES = {
    "red": 0,
    "yellow": 60,
    "green": 120,
    "cyan": 180,
    "blue": 240,
    "magenta": 300,
}  # degrees, as every painter has them
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}  # (row, column)

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def cells(frames: np.ndarray) -> np.ndarray:
    """[frames, 32, 32, 3] -> [4 cells, frames, 16, 16, 3], cut by hand."""
    return np.stack([frames[:, :16, :16], frames[:, :16, 16:], frames[:, 16:, :16], frames[:, 16:, 16:]])


def brightness(frames: np.ndarray) -> np.ndarray:
    """Of the strongest channel, from 0 on the background to about 1; sensor noise is cut away."""
    return np.clip((frames.max(-1).astype(float) - 60) / 180, 0, None)


def hue_of(cell: np.ndarray) -> str:
    """The name of the hue nearest to that of the most saturated pixels of one cell."""
    pixels = cell.reshape(-1, 3).astype(float)
    strongest = pixels[np.argsort(pixels.max(1) - pixels.min(1))[-4:]]
    degrees = 360 * colorsys.rgb_to_hsv(*strongest.mean(0) / 255)[0]
    return min(HUES, key=lambda name: abs((degrees - HUES[name] + 180) % 360 - 180))


def centroid(cell: np.ndarray) -> np.ndarray:
    light = brightness(cell)
    return np.array([(light * axis).sum() for axis in np.indices(light.shape)]) / light.sum()


def motion_of(first: np.ndarray, last: np.ndarray) -> str:
    moved = centroid(last) - centroid(first)
    return max(STEPS, key=lambda name: np.dot(moved, STEPS[name]) if name != "still" else 2.0)


def portrait(concept: str) -> np.ndarray:
    """[16, 16] a concept in the middle of its cell; the mean of many frames is as good as free of noise."""
    thing = Thing(concept, "yellow", "still", (4, 4))
    return brightness(draw(Scene((thing,) * 4, 64, None, 0))[:, :16, :16].mean(0))


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference over a glyph's area, at the offset that makes it least."""
    shifted = (np.roll(one, (row, column), (0, 1)) for row in range(-8, 9) for column in range(-8, 9))
    return min(float(np.abs(each - other).sum()) for each in shifted) / GLYPH**2


PORTRAITS = {concept: portrait(concept) for concept in CONCEPTS}


def concept_of(cell: np.ndarray, among: tuple[str, ...]) -> str:
    light = brightness(cell)
    light /= np.sort(light.ravel())[-4:].mean()
    return min(among, key=lambda concept: apart(PORTRAITS[concept] / PORTRAITS[concept].max(), light))


def flashed(scene: Scene, cell: int, frame: int) -> bool:
    return scene.flash is not None and cell == scene.flash[0] and 0 <= frame - scene.flash[2] < scene.flash[3]


@every_spec
def test_a_seed_fixes_every_scene_and_pixel(spec):
    one, other = list(sample_scenes(spec, 6, seed=3)), list(sample_scenes(spec, 6, seed=3))
    assert one == other
    assert all(np.array_equal(draw(a), draw(b)) for a, b in zip(one, other, strict=True))
    assert one[:2] == list(sample_scenes(spec, 2, seed=3))  # more scenes continue the same stream


@every_spec
def test_other_seeds_give_other_scenes(spec):
    pictures = [draw(scene).tobytes() for seed in range(4) for scene in sample_scenes(spec, 25, seed)]
    assert len(set(pictures)) == 100
    assert len({scene.noise for scene in sample_scenes(spec, 100, seed=0)}) == 100


@every_spec
def test_frames_have_the_stated_shape_and_a_background_of_their_own_noise(spec):
    (scene,) = sample_scenes(spec, 1, seed=0)
    frames = draw(scene)
    assert frames.shape == (spec.frames, 32, 32, 3)
    assert frames.dtype == np.uint8
    assert not np.array_equal(frames, draw(replace(scene, noise=scene.noise + 1)))
    assert len({frame.tobytes() for frame in frames}) == spec.frames


@every_spec
def test_the_colour_answered_is_the_hue_seen(spec):
    assert set(COLOURS) == set(HUES)
    for scene in sample_scenes(spec, 12, seed=1):
        for cell, frames in enumerate(cells(draw(scene))):
            visible = next(frame for frame in range(spec.frames) if not flashed(scene, cell, frame))
            assert hue_of(frames[visible]) == scene.things[cell].colour


@pytest.mark.parametrize("spec", [SPECS["clips"], SPECS["long clips"]], ids=["clips", "long clips"])
def test_the_motion_answered_is_the_way_the_light_goes(spec):
    assert {name: tuple(np.sign(step)) for name, step in DIRECTIONS.items()} == STEPS
    seen = set()
    for scene in sample_scenes(spec, 12, seed=2):
        said = {q.where: q.answer for q in scene.questions if q.asked == "move"}
        for where, frames in zip(CELLS, cells(draw(scene)), strict=True):
            assert motion_of(frames[0], frames[-1]) == said[where]
            seen.add(said[where])
    assert seen == set(STEPS)


def test_what_is_answered_is_what_stands_in_the_cell():
    seen = set()
    for scene in sample_scenes(SceneSpec(), 12, seed=3):
        said = {q.where: q.answer for q in scene.questions if q.asked == "what"}
        for where, frames in zip(CELLS, cells(draw(scene)), strict=True):
            assert concept_of(frames[0], CONCEPTS) == said[where]
            seen.add(said[where])
    assert seen == set(CONCEPTS)


def test_shapes_look_like_their_names():
    def lit(concept: str, row: int, column: int) -> bool:
        return bool(PORTRAITS[concept][4 + row, 4 + column] > 0.5)

    corners = {"top": (0, 0), "other top": (0, 7), "bottom": (7, 0), "other bottom": (7, 7)}
    lit_corners = {shape: {name for name, place in corners.items() if lit(shape, *place)} for shape in SHAPES}
    assert lit_corners["square"] == set(corners)
    assert lit_corners["triangle"] == {"bottom", "other bottom"}
    assert not any(lit_corners[shape] for shape in ("disc", "cross", "ring"))
    assert {shape for shape in SHAPES if not lit(shape, 4, 4)} == {"ring"}
    assert lit("disc", 1, 1)  # a disc bulges where a cross leaves a notch
    assert not lit("cross", 1, 1)


@pytest.mark.parametrize(("one", "other"), combinations(CONCEPTS, 2), ids="-".join)
def test_no_two_glyphs_can_be_mistaken_at_any_offset(one, other):
    noise = 6 / 180  # of the sensor, on the same scale
    assert apart(PORTRAITS[one], PORTRAITS[other]) > 3 * noise


@pytest.mark.parametrize("frames", [1, 4])
@given(concepts=st.lists(st.sampled_from(CONCEPTS), min_size=1, unique=True), seed=st.integers(0, 2**32))
def test_concepts_left_out_never_appear(frames, concepts, seed):
    shown = {t.concept for s in sample_scenes(SceneSpec(frames, tuple(concepts)), 20, seed) for t in s.things}
    assert shown <= set(concepts)


def test_concepts_left_out_never_appear_beside_a_flash():
    spec = SceneSpec(8, concepts=("disc", "ring"), flash_frames=1)
    assert {thing.concept for scene in sample_scenes(spec, 20, 0) for thing in scene.things} == {"disc", "ring"}


def test_all_concepts_colours_motions_and_flashes_appear_about_equally_often():
    clips = [thing for scene in sample_scenes(SceneSpec(frames=4), 500, seed=4) for thing in scene.things]
    flashes = [scene.flash for scene in sample_scenes(SPECS["longer flashes"], 2000, seed=5)]
    for values, drawn in (
        (CONCEPTS, [thing.concept for thing in clips]),
        (COLOURS, [thing.colour for thing in clips]),
        (DIRECTIONS, [thing.motion for thing in clips]),
        (range(4), [flash[0] for flash in flashes]),
        (DIGITS, [flash[1] for flash in flashes]),
        (range(6), [flash[2] for flash in flashes]),  # the last of 8 frames where three still fit is the sixth
    ):
        counts = np.array([drawn.count(value) for value in values])
        expected = len(drawn) / len(counts)
        assert counts.sum() == len(drawn)
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


@given(
    motion=st.sampled_from(list(DIRECTIONS)),
    frames=st.integers(2, 16),
    start=st.tuples(*[st.integers(0, CELL - GLYPH)] * 2),
)
def test_things_cross_their_cell_and_never_leave_it(motion, frames, start):
    thing = Thing("disc", "red", motion, start)
    path = np.array([thing.position(frame, frames) for frame in range(frames)])
    assert path.min() >= 0
    assert path.max() <= CELL - GLYPH
    for axis, step in enumerate(STEPS[motion]):
        if step == 0:
            assert (path[:, axis] == start[axis]).all()
        else:
            assert (np.diff(path[:, axis]) * step >= 0).all()
            assert (path[-1, axis] - path[0, axis]) * step == CELL - GLYPH


@given(start=st.tuples(*[st.integers(0, CELL - GLYPH)] * 2))
def test_in_a_picture_a_thing_stands_where_it_starts(start):
    assert Thing("disc", "red", "still", start).position(0, 1) == start


@given(
    thing=st.builds(
        Thing,
        st.sampled_from(CONCEPTS),
        st.sampled_from(list(COLOURS)),
        st.sampled_from(list(DIRECTIONS)),
        st.tuples(*[st.integers(0, CELL - GLYPH)] * 2),
    ),
    cell=st.integers(0, 3),
)
def test_a_thing_changes_no_pixel_of_another_cell(thing, cell):
    board = [Thing("ring", "cyan", "up", (3, 5))] * 4
    before = Scene(tuple(board), 4, None, 7)
    board[cell] = thing
    same = (cells(draw(before)) == cells(draw(replace(before, things=tuple(board))))).all((1, 2, 3, 4))
    assert same[np.arange(4) != cell].all()


@pytest.mark.parametrize("lasts", [1, 3, 8])
def test_a_flash_is_white_and_there_in_exactly_its_frames(lasts):
    for scene in sample_scenes(SceneSpec(frames=8, flash_frames=lasts), 12, seed=6):
        cell, digit, first, frames = scene.flash
        assert frames == lasts
        assert 0 <= first <= 8 - lasts
        lit, dark = cells(draw(scene)), cells(draw(replace(scene, flash=None)))
        for c in range(4):
            for frame in range(8):
                white = lit[c, frame].min(-1).max() > 200  # no colour of the world is bright in all three channels
                assert white == flashed(scene, c, frame)
                assert np.array_equal(lit[c, frame], dark[c, frame]) == (not white)
        assert concept_of(lit[cell, first], DIGITS) == digit
        assert hue_of(dark[cell, first]) == scene.things[cell].colour  # without the flash, the thing would be seen


def test_boards_with_a_flash_show_no_other_digit():
    scenes = sample_scenes(SPECS["one-frame flashes"], 100, seed=7)
    assert {thing.concept for scene in scenes for thing in scene.things} == set(SHAPES)


@every_spec
def test_questions_are_those_that_the_scene_can_answer(spec):
    asked = {"flash"} if spec.flash_frames else {"what", "colour"} | ({"move"} if spec.frames > 1 else set())
    kinds = {"what": "still", "colour": "still", "move": "motion", "flash": "flash"}
    for scene in sample_scenes(spec, 10, seed=8):
        assert sorted((q.where, q.asked) for q in scene.questions) == sorted((c, a) for c in CELLS for a in asked)
        assert all(q.kind == kinds[q.asked] for q in scene.questions)
        for question in scene.questions:
            thing = scene.things[CELLS.index(question.where)]
            assert question.concept == ("" if question.asked == "flash" else thing.concept)
            truth = {"what": thing.concept, "colour": thing.colour, "move": thing.motion}
            assert question.answer == truth.get(question.asked, question.answer)
        if spec.flash_frames:
            answers = {q.where: q.answer for q in scene.questions if q.asked == "flash"}
            assert answers.pop(CELLS[scene.flash[0]]) in DIGITS
            assert list(answers.values()) == ["none"] * 3


def test_words_are_unique_and_cover_every_question_and_answer():
    assert len(TOKEN) == len(WORDS) == len(set(WORDS))
    assert [WORDS[TOKEN[word]] for word in WORDS] == list(WORDS)
    spoken = {
        word
        for spec in SPECS.values()
        for scene in sample_scenes(spec, 60, seed=9)
        for question in scene.questions
        for word in (question.asked, question.answer)
    }
    assert spoken == set(WORDS) - {"<pad>", "<start>"}
