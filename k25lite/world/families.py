"""The families of questions, their training documents and their held-out tests.

Text and pictures speak of the same things in the same words: a picture stands where a name, a list of things, or a string
would stand in a sentence. Each family holds out what its tests ask:

- *vision_knowledge*: a fact about a pictured entity. Training tells facts of names alone; pictures it only ever names.
- *vision_reasoning*: count, compare, locate on boards that no training document shows.
- *ocr*: printed strings that no training document shows. *handwriting*: digits written on other pieces of paper.
- *video*: which way a thing moves, what it is and its colour, on boards that no training document shows.
- *text_knowledge*: a question about a fact that was stated, but never asked for.
- *text_reasoning*: sums, boards told as lists, chains to follow. *code*: the value of a Python expression. Other ones.

Simplified: the language is a few hundred fixed phrases, and a question has one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import ClassVar, TypeVar
from zlib import crc32

import numpy as np

from k25lite.world.entities import RELATIONS, entity_names, make_entities
from k25lite.world.pictures import draw_board, draw_entity, draw_handwriting, draw_string
from k25lite.world.scenes import CELL, CELLS, COLOURS, DIRECTIONS, GLYPH, SHAPES, Thing

TEXT_FAMILIES = ("text_knowledge", "text_reasoning", "code")
VISION_FAMILIES = ("vision_knowledge", "vision_reasoning", "ocr")
EXTRA_FAMILIES = ("handwriting", "video")  # learnt and measured too, but no column of Table 1
FAMILIES = VISION_FAMILIES + TEXT_FAMILIES + EXTRA_FAMILIES

CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # without those that look alike: 0 and O, 1 and I
LENGTH, DIGITS = 6, 3  # of printed strings, and of written numbers
PICTURED, UNPICTURED = 48, 600  # entities that have a picture, and that are known from text alone
CHAIN = entity_names(PICTURED + UNPICTURED + 12)[-12:]  # names without facts, to point at each other
Turn = tuple[str, str]  # (prompt, answer)
T = TypeVar("T")
# Of the pictures that the ViT stage captions.
CAPTION_MIX = {"vision_knowledge": 0.2, "vision_reasoning": 0.2, "ocr": 0.35, "handwriting": 0.1, "video": 0.15}
TEST_SHARE = 8  # one content in so many is for tests


@dataclass(frozen=True)
class Document:
    """Something to learn from or, with one turn, to be tested on.

    Attributes:
        kind: what is asked, finer than the family.
        turns: (prompt, answer), one after another; `<image>` and `<video>` mark where the media go.
        media: pictures and chunks in order, each [t, h, w, 3] uint8.
        apart: the turns do not see each other, as if they were documents; so it is with the captions of one picture.
    """

    family: str
    kind: str
    turns: tuple[Turn, ...]
    media: tuple[np.ndarray, ...] = ()
    apart: bool = False

    @property
    def text(self) -> str:
        end = " <eos>" if self.apart else " ."
        return " ".join(f"{prompt} {answer}{end}" for prompt, answer in self.turns)


def is_held_out(content: str) -> bool:
    """Whether a content belongs to the tests; by checksum, so that it does on every platform and in every world."""
    return crc32(content.encode()) % TEST_SHARE == 0


class LiteWorld:
    """One world: its entities, and documents without end.

    Args:
        seed: of the entities. Documents draw from the `random` they are given.
    """

    def __init__(self, seed: int):
        self.entities = make_entities(seed, PICTURED, UNPICTURED)
        self.pictured = self.entities[:PICTURED]

    def document(self, family: str, random: Random) -> Document:
        """A training document of a family."""
        return self._makers[family](self, random, False)

    def question(self, family: str, random: Random) -> Document:
        """A test question of a family, its content held out from every training document."""
        return self._makers[family](self, random, True)

    def captions(self, random: Random) -> Document:
        """A picture or clip with a one-word caption of each of its objects, as with grounding boxes: for the ViT stage.

        In a clip the word is what the object is, or how it moves.
        """
        family = random.choices(list(CAPTION_MIX), weights=list(CAPTION_MIX.values()))[0]
        words: Sequence[str]
        if family in ("vision_reasoning", "video"):
            moving = family == "video"
            things = _board(random, False, moving)
            words = [
                random.choice((_word(thing), thing.motion)) if moving and thing else _word(thing) for thing in things
            ]
            picture = draw_board(things, 2, random, frames=4 if moving else 1)
        elif family == "vision_knowledge":
            entity = random.choice(self.pictured)
            words, picture = [entity.name], draw_entity(entity, random)[None]
        elif family == "ocr":
            words = printed_string(random, test=False)
            picture = draw_string(words, random)[None]
        else:
            words, digits = draw_handwriting(DIGITS, random)
            picture = digits[None]
        return Document("captions", family, tuple(("<media>", word) for word in words), (picture,), apart=True)

    def _text_knowledge(self, random: Random, test: bool) -> Document:
        entity = random.choice(self.entities)
        if not test and random.random() < 0.75:
            facts = [(RELATIONS[r][0].format(entity.name), entity.facts[r]) for r in RELATIONS]
            return Document("text_knowledge", "stated", tuple(random.sample(facts, 2)))
        relation = random.choice(entity.untold if test else entity.told)
        asked = RELATIONS[relation][1]
        turn = (asked.format(entity.name), entity.facts[relation])
        return Document("text_knowledge", relation, (turn,))

    def _vision_knowledge(self, random: Random, test: bool) -> Document:
        entity, relations = random.choice(self.pictured), random.sample(list(RELATIONS), 2)
        picture = (draw_entity(entity, random)[None],)
        if test:
            turn = (RELATIONS[relations[0]][0].format("<image>"), entity.facts[relations[0]])
            return Document("vision_knowledge", relations[0], (turn,), picture)
        if random.random() < 0.7:  # as in an illustrated article: a picture, whose it is, and facts told of the name
            told = ((RELATIONS[relation][0].format(entity.name), entity.facts[relation]) for relation in relations)
            return Document("vision_knowledge", "article", (("<image> shows", entity.name), *told), picture)
        group = random.sample(self.pictured, random.choice((1, 4)))
        pictures = np.concatenate([draw_entity(entity, random) for entity in group], axis=1)[None]
        turn = ("<image> shows", " ".join(entity.name for entity in group))
        return Document("vision_knowledge", "names", (turn,), (pictures,))

    def _vision_reasoning(self, random: Random, test: bool) -> Document:
        things = _board(random, test)
        picture = (draw_board(things, 2, random),)
        if test or random.random() < 0.5:
            asked = _about_board("<image>", things, random, 1 if test else 2)
            return Document("vision_reasoning", asked[0][0], tuple(turn for _, turn in asked), picture)
        turns = [turn for _, turn in _about_board("", things, random, 2)]
        listed = ("<image> shows", " ".join(_word(thing) for thing in things))
        return Document("vision_reasoning", "listed", (listed, *turns), picture)

    def _ocr(self, random: Random, test: bool) -> Document:
        text = printed_string(random, test)
        return Document(
            "ocr", f"{len(text)} characters", (("<image> reads", text),), (draw_string(text, random)[None],)
        )

    def _handwriting(self, random: Random, test: bool) -> Document:
        number, picture = draw_handwriting(DIGITS, random, test=test)
        return Document("handwriting", "digits", (("<image> reads", number),), (picture[None],))

    def _video(self, random: Random, test: bool) -> Document:
        things = _board(random, test, moving=True)
        clip = (draw_board(things, 2, random, frames=4),)
        asked = [
            (f"{cell} {verb}", answer)
            for cell, thing in zip(CELLS, things, strict=True)
            if thing
            for verb, answer in (("is", _word(thing)), ("moves", thing.motion))
        ]
        (prompt, answer), *more = random.sample(asked, 1 if test else min(4, len(asked)))
        kind = prompt.split()[1]
        if test or random.random() < 0.5:
            return Document("video", kind, ((f"<video> {prompt}", answer), *more), clip)
        shows = ("<video> shows", " ".join(_word(thing) for thing in things))
        return Document("video", "listed", (shows, (prompt, answer), *more), clip)

    def _text_reasoning(self, random: Random, test: bool) -> Document:
        kind = random.choice(("sum", "list", "list", "list", "chain"))
        if kind == "sum":
            sum_ = _draw(lambda: f"{random.randrange(100)} + {random.randrange(100)}", test)
            value = sum(int(term) for term in sum_.split(" + "))
            return Document("text_reasoning", kind, ((f"{sum_} =", str(value)),))
        if kind == "list":
            things = _board(random, test)
            told = " ".join(_word(thing) for thing in things)
            turns = _about_board(told, things, random, 1 if test else 3)
            return Document("text_reasoning", f"list: {turns[0][0]}", tuple(turn for _, turn in turns))
        names = _draw(lambda: random.sample(CHAIN, 3), test)
        links = [f"{a} to {b}" for a, b in random.sample(list(pairwise(names)), 2)]
        hops = random.choice((1, 2))
        asked = f"{' , '.join(links)} ; {names[0]} {'twice' if hops == 2 else 'once'}"
        return Document("text_reasoning", f"chain of {hops}", ((asked, names[hops]),))

    def _code(self, random: Random, test: bool) -> Document:
        kind, expression = _draw(lambda: _expression(random), test)
        value = str(eval(expression, {"__builtins__": {}}, CODE_NAMES))
        return Document("code", kind, ((f"{expression} ->", value),))

    _makers: ClassVar[dict[str, Callable[[LiteWorld, Random, bool], Document]]] = {
        "vision_knowledge": _vision_knowledge,
        "vision_reasoning": _vision_reasoning,
        "ocr": _ocr,
        "text_knowledge": _text_knowledge,
        "text_reasoning": _text_reasoning,
        "code": _code,
        "handwriting": _handwriting,
        "video": _video,
    }


CODE_NAMES = {"max": max, "min": min, "len": len, "sum": sum, "sorted": sorted, "abs": abs}


def _expression(random: Random) -> tuple[str, str]:
    """The kind of a small Python expression, and the expression with a space between its tokens."""
    kind = random.choice(("reduce", "reduce", "index", "sort", "arithmetic", "string"))
    digits = [str(random.randrange(10)) for _ in range(random.randint(2, 4))]
    listed = f"[ {' , '.join(digits)} ]"
    a, b, c = (random.randrange(1, 10) for _ in range(3))
    word = "".join(random.choice(CHARACTERS[:8]) for _ in range(random.randint(3, 5)))
    forms = {
        "reduce": [f"{name} ( {listed} )" for name in ("max", "min", "len", "sum")],
        "index": [f"{listed} [ {sign}{random.randrange(1, len(digits))} ]" for sign in ("", "- ")],
        "sort": [f"sorted ( {listed} ) [ {random.randrange(len(digits))} ]"],
        "arithmetic": [f"{a} + {b} * {c}", f"( {a} + {b} ) * {c}", f"{a} * {b} - {c}", f"abs ( {a} - {b} ) + {c}"],
        "string": [f"'{word}' [ {random.randrange(len(word))} ]", f"len ( '{word}' )"],
    }
    return kind, random.choice(forms[kind])


def _draw(make: Callable[[], T], test: bool) -> T:
    """Draw until the content is one for tests, or one for training."""
    while is_held_out(str(content := make())) is not test:
        pass
    return content


def board_words(random: Random, test: bool) -> list[str]:
    """What stands in the four cells of a board, each empty with probability 1/5, not all of them."""

    def draw() -> list[str]:
        return [_none(random) or f"{random.choice(list(COLOURS))}-{random.choice(SHAPES)}" for _ in CELLS]

    words = _draw(draw, test)
    while set(words) == {"none"}:
        words = _draw(draw, test)
    return words


def _board(random: Random, test: bool, moving: bool = False) -> list[Thing | None]:
    """Four cells. Held out is the list of what stands where, whatever moves how."""
    things: list[Thing | None] = []
    for word in board_words(random, test):
        start = (random.randrange(CELL - GLYPH + 1), random.randrange(CELL - GLYPH + 1))
        motion = random.choice(list(DIRECTIONS)) if moving else "still"
        colour, _, shape = word.partition("-")
        things.append(None if word == "none" else Thing(shape, colour, motion, start))
    return things


def printed_string(random: Random, test: bool) -> str:
    return _draw(lambda: "".join(random.choice(CHARACTERS) for _ in range(LENGTH)), test)


def _none(random: Random) -> str:
    return "none" if random.random() < 0.2 else ""


def _word(thing: Thing | None) -> str:
    """A thing as one word, as it is one vision token."""
    return f"{thing.colour}-{thing.concept}" if thing else "none"


def _about_board(board: str, things: list[Thing | None], random: Random, count: int) -> list[tuple[str, Turn]]:
    """`count` different turns about a board, each with its kind; the first one opens with the board.

    All questions have four words, so that a board's cells stand equally far from every answer, told as from pictures.
    """
    present = [thing for thing in things if thing]
    words = [_word(thing) for thing in things]
    unique = [word for word in dict.fromkeys(words) if words.count(word) == 1 and word != "none"]
    asked: dict[str, tuple[str, str]] = {}
    while len(asked) < count:
        kind = random.choice(("count", "compare", "locate", "is") if unique else ("count", "compare", "is"))
        if kind == "count":
            word = random.choice([*COLOURS, *SHAPES])
            asked[f"how many {word} ?"] = kind, str(_count(word, present))
        elif kind == "compare":
            a, b = random.sample(list(random.choice((tuple(COLOURS), SHAPES))), 2)
            more = _count(a, present) - _count(b, present)
            asked[f"more {a} {b} ?"] = kind, "same" if more == 0 else a if more > 0 else b
        elif kind == "locate":
            word = random.choice(unique)
            asked[f"where is {word} ?"] = kind, CELLS[words.index(word)]
        else:
            cell = random.randrange(len(CELLS))
            asked[f"what is {CELLS[cell]} ?"] = kind, words[cell]
    prompts = [f"{board} {prompt}".strip() if index == 0 else prompt for index, prompt in enumerate(asked)]
    return [(kind, (prompt, answer)) for prompt, (kind, answer) in zip(prompts, asked.values(), strict=True)]


def _count(word: str, things: list[Thing]) -> int:
    return sum(word in (thing.colour, thing.concept) for thing in things)


def vocabulary() -> list[str]:
    """Every word the world is told in, in a fixed order."""
    words: dict[str, None] = dict.fromkeys("0123456789" + CHARACTERS[:24] + ".,:;?+-*=<>()[]'")
    phrases = [text for stated, asked, _ in RELATIONS.values() for text in (stated, asked)]
    phrases += [
        "<image> shows is reads moves to once twice",
        "how many more same where what none ->",
        " ".join(CODE_NAMES),
    ]
    words |= dict.fromkeys(word for phrase in phrases for word in phrase.split() if word.isalpha())
    words |= dict.fromkeys(value for _, _, values in RELATIONS.values() for value in values)
    words |= dict.fromkeys([*COLOURS, *SHAPES, *DIRECTIONS, *CELLS])
    words |= dict.fromkeys(f"{colour}-{shape}" for colour in COLOURS for shape in SHAPES)
    words |= dict.fromkeys(entity_names(PICTURED + UNPICTURED + 12))
    return list(words)
