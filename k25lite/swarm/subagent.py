"""The frozen sub-agent of wide search: a small language model that reads about the people of its assignment, one by one.

It is told names and columns. It reads an article, notes the person's row and reads the next. Names are lettered, so that
the next thing to write can always be found by what was written last. What it writes, articles left out:

    home , food of A trel mora B vano kest C answer
    A trel mora
    A trel mora : home glacier , food figs ⏎ B vano kest
    B vano kest : home cave , food plums ⏎ C answer

Its answer is all of its notes. Nothing of its errors is made up: which name comes next, and which value stands where, it
finds by attention over all that it has read, which has learnt that from a few names at a time.

Simplified: it reads articles and searches for nothing, so that what only a register tells stays unknown to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from k25lite.model import K25Lite
from k25lite.processing import build_tokenizer
from k25lite.swarm.limits import Limits
from k25lite.swarm.local import LocalPolicy
from k25lite.swarm.policy import Message, Policy, Reply, call
from k25lite.swarm.search import WORDS as SEARCH_WORDS
from k25lite.swarm.search import SearchEngine
from k25lite.world.families import CHARACTERS, vocabulary
from k25lite.world.library import ATTRIBUTES
from k25lite.world.library import WORDS as LIBRARY_WORDS

SUB_LIMITS = Limits(steps=12)  # of an assignment: more names than this allows are a failure
WINDOW = 8192  # tokens
MAX_REPLY = 40  # tokens; a row takes up to 18
MARKS = {"user": "<user>", "tool": "<system>"}  # before what an assignment and a tool say
END = "."  # of a reply; <eos> ends a conversation

LETTERS = CHARACTERS  # of names, again from the first one after the last
ANSWER = "answer"  # the last thing to do

_NAME = "[a-z]+ [a-z]+"
_LETTER = f"[{LETTERS}]"
_TODO = re.compile(f"({_LETTER}) ({_NAME}|{ANSWER})")
_ROW = re.compile(f"(?:{_LETTER} )?({_NAME} : .+)")
_CELL = re.compile(f"(?:{'|'.join(ATTRIBUTES)}) ([a-z]+)")


def search_engine(documents: Mapping[str, str]) -> SearchEngine:
    """The engine that the sub-agent is used to: pages and snippets are short, as its window is."""
    return SearchEngine(documents, page_size=3, snippet_words=12)


@cache
def subagent_tokenizer() -> PreTrainedTokenizerFast:
    """The words of the world, of its libraries and of the tools, and the newline between rows."""
    return build_tokenizer([*vocabulary(), *LIBRARY_WORDS, *SEARCH_WORDS, ANSWER, "\n"])


def work_prompt(names: Iterable[str], columns: Iterable[str], first: int = 0) -> str:
    """An assignment: to fill these columns for these people.

    Args:
        first: where in `LETTERS` they begin.

    Raises:
        ValueError: no name, no column, a name that is not two words, or a column that is no relation of the world.
    """
    names, columns = list(dict.fromkeys(names)), list(columns)
    if not names or not all(re.fullmatch(_NAME, name) for name in names):
        raise ValueError(f"an assignment needs names of two words each, got {names}")
    if not columns or not set(columns) <= ATTRIBUTES.keys():
        raise ValueError(f"columns are some of {', '.join(ATTRIBUTES)}, got {columns}")
    todo = (f"{LETTERS[(first + i) % len(LETTERS)]} {what}" for i, what in enumerate([*names, ANSWER]))
    return f"{' , '.join(columns)} of {' '.join(todo)}"


def assignment(prompt: str) -> tuple[list[str], dict[str, str]]:
    """The columns, and the letter of every name and of the answer, of what `work_prompt` made."""
    wanted, _, todo = prompt.partition(" of ")
    return wanted.split(" , "), {what: letter for letter, what in _TODO.findall(todo)}


def row_of(name: str, facts: Mapping[str, str]) -> str:
    """A line of a note or an answer; facts are column -> value, in the order of the columns."""
    return f"{name} : {' , '.join(f'{column} {value}' for column, value in facts.items())}"


def rows_of(answer: str) -> dict[str, list[str]]:
    """Name -> cells in the order of the columns; malformed lines are left out, and all but the first row of a name."""
    rows: dict[str, list[str]] = {}
    for line in answer.splitlines():
        if row := _ROW.fullmatch(line.strip()):
            name, _, listed = row[1].partition(" : ")
            cells = [_CELL.fullmatch(cell) for cell in listed.split(" , ")]
            if all(cells):
                rows.setdefault(name, [cell[1] for cell in cells if cell])
    return rows


def table_of(rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    """The rows as a Markdown table, as the metric reads it; rows with more or fewer cells than columns are left out."""
    lines = [["name", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *cells] for name, cells in rows.items() if len(cells) == len(columns)]
    return "\n".join(["```markdown", *(f"| {' | '.join(line)} |" for line in lines), "```"])


def turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """What the model reads and what it then writes, again and again; what it has yet to write is "".

    Its tools and a system prompt it knows without being told.
    """
    found: list[tuple[str, str]] = []
    read, letters = "", dict[str, str]()
    for message in messages:
        if message["role"] == "assistant":
            found.append((f"{read} <assistant>", written(message, letters)))
        else:
            read = f"{MARKS.get(message['role'], '')} {message['content']}"
            letters = assignment(message["content"])[1] if message["role"] == "user" else letters
    return found if messages[-1]["role"] == "assistant" else [*found, (f"{read} <assistant>", "")]


def written(message: Message, letters: Mapping[str, str]) -> str:
    """A reply as the model writes it: a note, and the name to read next, or that there is none; with their letters."""

    def lettered(what: str) -> str:
        return " ".join([*letters.get(what.partition(" : ")[0], ""), what])

    calls = message.get("tool_calls")
    following = json.loads(calls[0]["function"]["arguments"])["title"] if calls else ANSWER
    return "\n".join([*map(lettered, message["content"].splitlines()), lettered(following)])


def render(messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
    """The conversation as the model reads it."""
    return " ".join(f"{prompt} {reply} {END}" if reply else prompt for prompt, reply in turns(messages))


def parse(text: str) -> Reply:
    """The reply that the model wrote: notes, and a name to read or none. What it should not have written is a note, too."""
    lines = [line.strip() for line in text.strip().split("\n")]
    following = _TODO.fullmatch(lines[-1])
    notes = "\n".join(
        row[1] if (row := _ROW.fullmatch(line)) else line for line in (lines[:-1] if following else lines)
    )
    if following and following[2] != ANSWER:
        return Reply(notes, (call("read", title=following[2]),))
    return Reply(notes)


class Subagent:
    """The policy: a language model, whose notes are its answer.

    Args:
        model: writes the next note and call.
    """

    def __init__(self, model: Policy):
        self.model = model

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Reply:
        """Raises what the model raises."""
        reply = await self.model(messages, tools)
        if reply.calls:
            return reply
        notes = [message["content"] for message in messages if message["role"] == "assistant" and message["content"]]
        return replace(reply, content="\n".join([*notes, reply.content]).strip())


def subagent_policy(folder: Path, **options: Any) -> Subagent:
    """The trained sub-agent in this folder; `options` are those of `LocalPolicy`."""
    model, words = K25Lite.from_pretrained(folder), subagent_tokenizer()
    model.generation_config.eos_token_id = [words.eos_token_id, words.convert_tokens_to_ids(END)]
    known: dict[str, Any] = {"max_new_tokens": MAX_REPLY, "render": render, "parse": parse}
    return Subagent(LocalPolicy(model, words, **known | options))
