"""Tasks for tools: what is demonstrated is true, of words and of pixels, and what is tested is never taught."""

from random import Random

import pytest

from k25lite.processing import build_tokenizer
from k25lite.training.programs import LONGEST_PROGRAM
from k25lite.training.tasks import BOARD_KINDS, KINDS, PROGRAM_WORDS, as_code, make_task, observe
from k25lite.world.families import is_held_out, vocabulary
from k25lite.world.scenes import CELLS
from k25lite.world.streams import make_rows, pieces


def draw_tasks(kind, count=60, test=False):
    random = Random(f"{kind} {test}")
    return [make_task(kind, random, test) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_programs_give_the_same_answer_on_pixels_as_on_words(kind):
    random = Random(1)
    for task in draw_tasks(kind, 20):
        picture, answer = task.draw(random)
        for program, told in zip(task.programs, task.observations, strict=True):
            seen = observe(program, picture)
            if kind == "box":  # a told thing fills its cell
                (left, top, right, bottom), cell = ([int(x) for x in s.split(" , ")] for s in (seen, told))
                assert cell[0] <= left < right <= cell[2]
                assert cell[1] <= top < bottom <= cell[3]
                assert task.is_right(seen, answer)
            else:
                assert seen == told, task
                assert task.is_right(task.answer, answer)


def by_hand(question, board):
    """The answer of a question about a told board, worked out without any tool."""
    parts = [set(word.split("-")) | {word} for word in board]
    match question.removesuffix(" ?").split():
        case ["how", "many", "not", word]:
            return str(sum(word not in part for part in parts))
        case ["how", "many", "like", cell]:
            colour = board[CELLS.index(cell)].split("-")[0]
            return str(sum(colour in part for part in parts))
        case ["how", "many", a, "plus", b]:
            return str(sum((a in part) + (b in part) for part in parts))
        case ["how", "many", word]:
            return str(sum(word in part for part in parts))
        case ["more", a, b]:
            more = sum((a in part) - (b in part) for part in parts)
            return "same" if more == 0 else a if more > 0 else b
        case ["where", "is", word]:
            return CELLS[[word in part for part in parts].index(True)]
        case ["what", "is", direction, "of", word]:
            row, column = divmod(board.index(word), 2)
            row += {"up": -1, "down": 1}.get(direction, 0)
            column += {"left": -1, "right": 1}.get(direction, 0)
            return board[2 * row + column]
        case ["what", "is", cell]:
            return board[CELLS.index(cell)]
        case [("colour" | "shape") as part, "of", cell]:
            word = board[CELLS.index(cell)]
            return word if word == "none" else word.split("-")[part == "shape"]
        case ["box", "of", word]:
            row, column = divmod(board.index(word), 2)
            return " , ".join(str(16 * side) for side in (column, row, column + 1, row + 1))
    raise AssertionError(question)


@pytest.mark.parametrize("kind", BOARD_KINDS)
def test_answers_are_those_worked_out_by_hand(kind):
    for task in draw_tasks(kind):
        assert task.answer == by_hand(task.question, list(task.content)), task


def test_answers_about_strings():
    for task in draw_tasks("read"):
        assert task.answer == task.content
    for task in draw_tasks("character"):
        assert task.answer == task.content[int(task.question.split()[1])]


@pytest.mark.parametrize("kind", KINDS)
def test_contents_of_tests_are_held_out_as_in_the_world(kind):
    def content(task):
        return task.content if isinstance(task.content, str) else str(list(task.content))

    assert all(is_held_out(content(task)) for task in draw_tasks(kind, 20, test=True))
    assert not any(is_held_out(content(task)) for task in draw_tasks(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_demonstrations_are_written_in_known_words_and_come_back_as_programs(kind):
    tokenizer = build_tokenizer([*vocabulary(), *PROGRAM_WORDS])
    random = Random(2)
    for task in draw_tasks(kind, 20):
        for shown in (False, True):
            document = task.document(random, shown)
            ids = tokenizer(" ".join(pieces(document)))["input_ids"]
            assert tokenizer.unk_token_id not in ids, document.turns
            assert len(ids) <= 64, document.turns
        for program in task.programs:
            code = as_code(tokenizer.decode(tokenizer(program)["input_ids"]))
            assert observe(code, task.content) == task.observations[task.programs.index(program)]
            assert len(code) < LONGEST_PROGRAM


def test_told_demonstrations_hold_no_picture_and_shown_ones_hold_one():
    tokenizer = build_tokenizer([*vocabulary(), *PROGRAM_WORDS])
    random = Random(3)
    for shown in (False, True):
        documents = (make_task(random.choice(list(KINDS)), random, False).document(random, shown) for _ in range(10**6))
        rows = make_rows(documents, 20, 64, tokenizer)
        media = tokenizer.convert_tokens_to_ids("<media>")
        assert all(bool(row.media) is shown for row in rows)
        assert all((media in row.input_ids) is shown for row in rows)


def test_the_same_seed_gives_the_same_tasks():
    assert draw_tasks("beside") == draw_tasks("beside")
