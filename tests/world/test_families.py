"""The Lite World: nothing that a test asks is ever taught, every answer is true, and a seed fixes everything."""

import hashlib
import json
import subprocess
import sys
from random import Random

import numpy as np
import pytest

from k25lite.world import families
from k25lite.world.entities import RELATIONS, make_entities
from k25lite.world.families import FAMILIES, VISION_FAMILIES, LiteWorld, is_held_out
from k25lite.world.pictures import TRAINING_DIGITS, draw_board, draw_entity, draw_handwriting, draw_string
from k25lite.world.scenes import COLOURS, Thing

DOCUMENTS = 600


@pytest.fixture(scope="module")
def world():
    return LiteWorld(0)


def draw_many(world, family, test=False, count=DOCUMENTS):
    random = Random(f"{family} {test}")
    make = world.question if test else world.document
    return [make(family, random) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_question_each_and_pictures_only_where_they_belong(world, family):
    for question in draw_many(world, family, test=True, count=100):
        assert len(question.turns) == 1
        marks = sum(question.turns[0][0].count(mark) for mark in ("<image>", "<video>"))
        assert marks == len(question.media) == (family in (*VISION_FAMILIES, "handwriting", "video"))
        for item in question.media:
            assert item.dtype == np.uint8
            assert item.shape[0] in (1, 4)
            assert item.shape[1] % 16 == item.shape[2] % 16 == 0


@pytest.mark.parametrize("family", ["text_reasoning", "code", "ocr"])
def test_no_content_of_a_test_is_in_a_training_document(world, family):
    def contents(documents):
        return {d.turns[0][1] if family == "ocr" else d.turns[0][0] for d in documents}

    assert not contents(draw_many(world, family, count=3000)) & contents(draw_many(world, family, test=True))


@pytest.mark.parametrize("family", ["vision_reasoning", "video"])
def test_no_board_of_a_test_is_in_a_training_document_or_a_caption(world, family, monkeypatch):
    boards = []
    draw = families.draw_board
    monkeypatch.setattr(
        families, "draw_board", lambda things, *a, **k: boards.append(words(things)) or draw(things, *a, **k)
    )

    def words(things):
        return tuple(f"{t.colour}-{t.concept}" if t else "none" for t in things)

    draw_many(world, family, count=1000)
    random = Random(0)
    for _ in range(1000):
        world.captions(random)
    taught = set(boards)
    boards.clear()
    draw_many(world, family, test=True)
    assert len(boards) == DOCUMENTS
    assert not taught & set(boards)


def test_boards_are_held_out_from_lists_and_clips_too(world):
    def lists(test, count):
        return {
            tuple(d.turns[0][0].split()[:4])
            for d in draw_many(world, "text_reasoning", test, count)
            if "list" in d.kind
        }

    seen, asked = lists(False, 3000), lists(True, 1000)
    assert len(seen) > 100
    assert len(asked) > 100
    assert not seen & asked
    for listing in asked:
        assert is_held_out(str(list(listing)))


def test_a_fact_asked_of_a_picture_is_only_ever_told_in_words(world):
    """Training names pictures and says nothing else of them; every fact that is asked of a picture is told of the name."""
    words = {stated.format("<image>") for stated, _, _ in RELATIONS.values()}
    words |= {asked.format("<image>") for _, asked, _ in RELATIONS.values()}
    for document in draw_many(world, "vision_knowledge", count=3000):
        assert not {prompt for prompt, _ in document.turns} & words, document.turns
        assert document.turns[0][0] == "<image> shows"
    tests = draw_many(world, "vision_knowledge", test=True)
    assert {d.turns[0][0] for d in tests} <= words
    assert {d.kind for d in tests} == set(RELATIONS)
    stated = {turn for d in draw_many(world, "text_knowledge", count=20_000) if d.kind == "stated" for turn in d.turns}
    for entity in world.pictured:
        for relation in RELATIONS:
            assert (RELATIONS[relation][0].format(entity.name), entity.facts[relation]) in stated


def test_a_fact_asked_in_words_was_never_asked_in_training(world):
    taught = {d.turns[0][0] for d in draw_many(world, "text_knowledge", count=20_000) if d.kind != "stated"}
    asked = {d.turns[0][0] for d in draw_many(world, "text_knowledge", test=True)}
    assert not taught & asked


def test_answers_of_sums_code_and_lists_are_true(world):
    for document in draw_many(world, "text_reasoning") + draw_many(world, "code"):
        for prompt, answer in document.turns:
            if document.kind == "sum":
                assert eval(prompt.strip("= ")) == int(answer)
            elif document.family == "code":
                assert str(eval(prompt.removesuffix("->"))) == answer
    documents = [d for d in draw_many(world, "text_reasoning", count=5000) if d.kind == "list: count"]
    assert documents
    for document in documents[:200]:
        prompt, answer = document.turns[0]
        *things, _, _, word, _ = prompt.split()
        assert len(things) == 4
        assert sum(word in thing.split("-") for thing in things) == int(answer)


def test_a_board_of_two_colours_shows_where_they_are():
    random = Random(0)
    things = [Thing("disc", "red", "still", (2, 2)), None, None, Thing("square", "blue", "right", (2, 0))]
    clip = draw_board(things, 2, random, frames=4)
    assert clip.shape == (4, 32, 32, 3)
    red, blue = (np.abs(clip.astype(int) - COLOURS[c]).sum(-1) < 60 for c in ("red", "blue"))
    assert red[:, :16, :16].any()
    assert not red[:, 16:].any()
    places = [np.nonzero(frame)[1].mean() for frame in blue]
    assert places == sorted(places)
    assert places[-1] - places[0] == pytest.approx(8, abs=0.5)


def test_entities_look_and_are_called_differently():
    entities = make_entities(3, 48, 100)
    assert len({e.name for e in entities}) == 148
    assert len({(e.sprite.tobytes(), e.colours) for e in entities[:48]}) == 48
    with pytest.raises(ValueError, match="no sprite"):
        draw_entity(entities[100], Random(0))


def test_test_handwriting_is_on_other_pieces_of_paper(monkeypatch):
    from k25lite.world import pictures

    images, labels = pictures._digits()
    used = {True: set(), False: set()}

    class Spy(Random):
        test = False

        def randrange(self, *bounds):
            value = super().randrange(*bounds)
            if bounds in ((0, TRAINING_DIGITS), (TRAINING_DIGITS, len(labels))):
                used[self.test].add(value)
            return value

    for Spy.test in (False, True):
        random = Spy(1)
        for _ in range(2000):
            draw_handwriting(2, random, test=Spy.test)
    assert used[False]
    assert used[True]
    assert not used[False] & used[True]
    kept = {images[i].tobytes() for i in used[True]}
    assert sum(images[i].tobytes() in kept for i in used[False]) == 0, "the set holds no duplicates across the split"


def test_a_printed_string_has_one_character_to_a_box():
    random = Random(0)
    for _ in range(50):
        ink = draw_string("MI8W", random).astype(int).max(-1) > 110
        assert ink.shape == (16, 64)
        assert not ink[0].any(), "cut at the top"
        assert not ink[-1].any(), "cut at the bottom"
        for box in np.split(ink, 4, axis=1):
            assert box.sum() > 8


DIGEST = """
import hashlib
from random import Random
from k25lite.world import families
from k25lite.world.families import FAMILIES, LiteWorld
world, digest = LiteWorld(7), hashlib.sha256()
for family in FAMILIES:
    random = Random(family)
    for _ in range(50):
        document = world.document(family, random)
        digest.update(repr(document.turns).encode())
        for item in document.media:
            digest.update(item.tobytes())
print(digest.hexdigest())
"""


def test_the_same_on_every_platform_and_whatever_the_hash_seed():
    """The text against a constant; pixels, which depend on how the pinned Pillow draws fonts, across processes."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert len(digests) == 1
    world = LiteWorld(7)
    turns = [world.document(family, Random(family)).turns for family in FAMILIES]
    texts = [" ".join(f"{prompt} {answer} ." for prompt, answer in each) for each in turns]
    assert hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16] == "5761787c024523a4"
