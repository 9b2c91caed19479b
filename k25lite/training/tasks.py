"""Questions about a picture that are answered by programs: told in words for zero-vision SFT, or shown.

Source: Kimi K2.5 report, section 2.2. A demonstration is a conversation, think -> program -> observation -> answer; what is
in brackets the model has to write:

    img = red-disc none blue-ring none how many red ?
    [<think> how many red </think> run count ( img , ' red ' ) .] sees 1 [1 .]

In place of the four words there may be the picture they tell; everything else is the same. "img =" says that there are
tools: without it the jointly trained model is asked the same questions, and answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

import numpy as np

from k25lite.training.programs import evaluate, words
from k25lite.training.rewards import box_f1, exact
from k25lite.training.vision_tools import beside
from k25lite.world.families import LENGTH, Document, board_words, printed_string
from k25lite.world.pictures import draw_board, draw_string
from k25lite.world.scenes import CELL, CELLS, COLOURS, GLYPH, SHAPES, Thing

Content = tuple[str, ...] | str  # a board as four words, or a printed string
Asked = tuple[str, tuple[str, ...]]  # a question, and programs; {0} is what the first one gave
TOOLS, RUN, SEES = "img =", "run", "sees"
DIRECTIONS = ("left", "right", "up", "down")
LONGEST_OBSERVATION = 8  # words that the model is shown


@dataclass(frozen=True)
class Task:
    """A question of some kind about a content, the programs of a demonstration, and the answer."""

    kind: str
    content: Content
    question: str
    programs: tuple[str, ...]
    observations: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.observations[-1]

    @property
    def told(self) -> str:
        return " ".join(self.content)

    def draw(self, random: Random) -> tuple[np.ndarray, str]:
        """Its content as a picture [height, width, 3] uint8, and the answer to it; places, fonts and noise vary."""
        if isinstance(self.content, str):
            return draw_string(self.content, random), self.answer
        things = [_thing(word, random) for word in self.content]
        answer = self.answer
        if self.kind == "box":  # what is told of a thing is its cell
            index = self.content.index(self.question.split()[2])
            (y, x), start = divmod(index, 2), things[index].start  # type: ignore[union-attr]
            top, left = CELL * y + start[0], CELL * x + start[1]
            answer = f"{left} , {top} , {left + GLYPH} , {top + GLYPH}"
        return draw_board(things, 2, random)[0], answer

    def document(self, random: Random, shown: bool) -> Document:
        """The demonstration: every second one thinks first, in the words of the question."""
        think = f"<think> {self.question.removesuffix(' ?')} </think> " if random.random() < 0.5 else ""
        picture = self.draw(random)[0] if shown else None
        observations = self._observe(picture, random)
        acts = [f"{think}{RUN} {program}" for program in self.programs] + [observations[-1]]
        seen = [f"{SEES} {observation}" for observation in observations]
        prompts = [f"{TOOLS} {self.told if picture is None else '<image>'} {self.question}", *seen]
        media = () if picture is None else (picture[None],)
        return Document("tools", self.kind, tuple(zip(prompts, acts, strict=True)), media)

    def _observe(self, picture: np.ndarray | None, random: Random) -> tuple[str, ...]:
        """What its programs see: of something told as well, except where a box is, which only pixels say."""
        if picture is None and self.kind == "box":
            picture = self.draw(random)[0]
        return self.observations if picture is None else run_all(self.programs, picture)

    def is_right(self, answer: str, truth: str) -> bool:
        """Whether an answer is the truth; a box is if the two overlap by half."""
        if self.kind == "box":
            return box_f1(answer, [[int(side) for side in truth.split(" , ")]]) >= 0.5
        return exact(answer, truth) == 1.0


def _counts(names: Sequence[str]) -> Callable[[Content, Random], Asked]:
    def ask(content: Content, random: Random) -> Asked:
        word = random.choice(names)
        return f"how many {word} ?", (f"count ( img , ' {word} ' )",)

    return ask


def _compares(names: Sequence[str]) -> Callable[[Content, Random], Asked]:
    def ask(content: Content, random: Random) -> Asked:
        a, b = random.sample(names, 2)
        return f"more {a} {b} ?", (f"more ( img , ' {a} ' , ' {b} ' )",)

    return ask


def _at_cell(asked: str, program: str) -> Callable[[Content, Random], Asked]:
    def ask(content: Content, random: Random) -> Asked:
        where = random.choice(CELLS)
        return asked.format(where), tuple(step.replace("@", f"' {where} '") for step in program.split(" ; "))

    return ask


def _where(part: int) -> Callable[[Content, Random], Asked | None]:
    """Where a thing is, by its whole word (part 2), its colour (0) or its shape (1), if there is just one."""

    def ask(content: Content, random: Random) -> Asked | None:
        names = [word if part == 2 else word.split("-")[part] for word in content if word != "none"]
        once = [name for name in names if names.count(name) == 1]
        if not once:
            return None
        word = random.choice(once)
        return f"where is {word} ?", (f"find ( img , ' {word} ' )",)

    return ask


def _beside(content: Content, random: Random) -> Asked | None:
    once = [word for word in content if word != "none" and content.count(word) == 1]
    if not once:
        return None
    word, direction = random.choice(once), random.choice(DIRECTIONS)
    if beside(CELLS[content.index(word)], direction) == "none":
        return None
    find = f"find ( img , ' {word} ' )"
    return f"what is {direction} of {word} ?", (
        find,
        f"thing ( cell ( img , beside ( ' {{0}} ' , ' {direction} ' ) ) )",
    )


def _both(content: Content, random: Random) -> Asked:
    a, b = random.sample([*COLOURS, *SHAPES], 2)
    return f"how many {a} plus {b} ?", (f"count ( img , ' {a} ' ) + count ( img , ' {b} ' )",)


def _others(content: Content, random: Random) -> Asked:
    word = random.choice(list(COLOURS))
    return f"how many not {word} ?", (f"4 - count ( img , ' {word} ' )",)


def _box(content: Content, random: Random) -> Asked | None:
    if (asked := _where(2)(content, random)) is None:
        return None
    _, (program,) = asked
    return asked[0].replace("where is", "box of"), (program.replace("find", "box"),)


def _character(content: Content, random: Random) -> Asked:
    place = random.randrange(LENGTH)
    return f"character {place} ?", (f"read ( img ) [ {place} ]",)


BOARD_KINDS: dict[str, Callable[[Content, Random], Asked | None]] = {
    "count colour": _counts(list(COLOURS)),
    "count shape": _counts(SHAPES),
    "count both": _both,
    "count like": _at_cell("how many like {} ?", "colour ( cell ( img , @ ) ) ; count ( img , ' {0} ' )"),
    "count not": _others,
    "compare colours": _compares(list(COLOURS)),
    "compare shapes": _compares(SHAPES),
    "where thing": _where(2),
    "where colour": _where(0),
    "box": _box,
    "what": _at_cell("what is {} ?", "thing ( cell ( img , @ ) )"),
    "colour": _at_cell("colour of {} ?", "colour ( cell ( img , @ ) )"),
    "shape": _at_cell("shape of {} ?", "shape ( cell ( img , @ ) )"),
    "beside": _beside,
}
STRING_KINDS: dict[str, Callable[[Content, Random], Asked | None]] = {
    "read": lambda content, random: ("reads ?", ("read ( img )",)),
    "character": _character,
}
KINDS = {**BOARD_KINDS, **STRING_KINDS}
# Asked about pictures, without tools, in the joint training already.
KNOWN = ("count colour", "count shape", "compare colours", "compare shapes", "where thing", "what", "read")
NEVER = ("count not", "character")  # never learnt, neither from demonstrations nor from rewards
ABILITIES = {
    "count": ("count colour", "count shape", "count both", "count like"),
    "compare": ("compare colours", "compare shapes"),
    "recognise": ("what", "colour", "shape", "beside"),
    "locate": ("where thing", "where colour"),
    "ground": ("box",),
    "read": ("read",),
}
# What a program may be written in beside the words of the world.
PROGRAM_WORDS = tuple(
    "run sees img count find thing cell colour shape beside read box plus like not character of".split()
)


def make_task(kind: str, random: Random, test: bool) -> Task:
    """A task of a kind; contents of tests are those that no training task, and no document of the world, has."""
    while True:
        content = _content(kind, random, test)
        if (asked := KINDS[kind](content, random)) is not None:
            break
    question, templates = asked
    programs: list[str] = []
    for template in templates:
        programs.append(template.format(*run_all(programs, content)))
    return Task(kind, content, question, tuple(programs), run_all(programs, content))


def run_all(programs: Sequence[str], image: Content | np.ndarray) -> tuple[str, ...]:
    """What each of some trusted programs gives; for what a model wrote there is the sandbox."""
    return tuple(observe(program, image) for program in programs)


def observe(program: str, image: Content | np.ndarray) -> str:
    """What a trusted program gives, in words."""
    told = list(image) if isinstance(image, tuple) else image
    return " ".join(islice(words(evaluate(as_code(program), told)), LONGEST_OBSERVATION))


def as_code(program: str) -> str:
    """A program as the model writes it, a space between tokens, as Python: quotes close around their word."""
    return re.sub(r"' ([^']*?) '", r"'\1'", program)


def _content(kind: str, random: Random, test: bool) -> Content:
    return printed_string(random, test) if kind in STRING_KINDS else tuple(board_words(random, test))


def _thing(word: str, random: Random) -> Thing | None:
    if word == "none":
        return None
    colour, _, shape = word.partition("-")
    return Thing(shape, colour, "still", (random.randrange(CELL - GLYPH + 1), random.randrange(CELL - GLYPH + 1)))
