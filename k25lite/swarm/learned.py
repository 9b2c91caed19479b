"""The learned orchestrator at work on real tasks: its acts become calls of the runtime's tools, and what they say tokens.

The policy, or a script in its place, decides what to do; the scaffold, which is the same for all, fills in with what or
whom. It takes down the names in hits that state a wanted fact, gives the next of them to whoever is to read, has the wanted
facts filled in beside the columns, leaves out who turns out not to belong, and puts the rows together. What the
orchestrator reads itself is worked on by the frozen sub-agent in the orchestrator's own context.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from k25lite.swarm.parl_language import (
    ACTS,
    ANSWER,
    ASSIGN,
    CREATE,
    END,
    READ,
    SEARCH,
    Acts,
    Dialogue,
    Observation,
    Script,
    closes,
)
from k25lite.swarm.parl_rollout import WINDOW, only_acts
from k25lite.swarm.policy import Message, Policy, Reply, ToolCall
from k25lite.swarm.simulator import PUBLISHED, Budget
from k25lite.swarm.subagent import SUB_LIMITS, row_of, rows_of, table_of, work_prompt
from k25lite.world.library import ATTRIBUTES, state

SUB_STEPS: int = SUB_LIMITS.steps  # type: ignore[assignment]  # it has this limit
LOOKUP = "lookup"  # a call that goes on with a READ
NOTHING = "nothing more"  # the last line of a summary, which may have no other
MEMBER = "Read about the people of your assignment and list them."


@dataclass(frozen=True)
class Question:
    """What a task asks for: relation -> value that must hold, and relations to list."""

    wanted: dict[str, str]
    columns: tuple[str, ...]

    @classmethod
    def read(cls, query: str) -> Question:
        """
        Raises:
            ValueError: this is no query of a `k25lite.world.wide_tasks.Task`.
        """
        asked = re.match(r"list every person who (.+?) with ([a-z ,]+)$", query, re.MULTILINE)
        facts = {state("", relation, value).strip(): (relation, value) for relation, value in _facts()}
        told = asked[1].split(" and ") if asked else []
        columns = tuple(asked[2].strip().split(" , ")) if asked else ()
        if not asked or not set(told) <= facts.keys() or not set(columns) <= ATTRIBUTES.keys():
            raise ValueError(f"a task is to list every person who ... with ..., got {query[:80]!r}")
        return cls(dict(facts[fact] for fact in told), columns)

    @property
    def query(self) -> str:
        """What to search for."""
        return " ".join(state("", *fact).strip() for fact in self.wanted.items())

    @property
    def work(self) -> list[str]:
        """What to find out of everybody."""
        return [*self.wanted, *self.columns]

    def names(self, hits: str) -> list[str]:
        """Of whom a wanted fact is stated, as a page of hits has them; not of their pets, and not of the past."""
        facts = "|".join(re.escape(state("", *fact)) for fact in self.wanted.items())
        found = re.findall(rf"\b(formerly |of )?([a-z]+ [a-z]+)(?:{facts})\b", hits)
        return [name for before, name in found if not before]

    def table(self, rows: Mapping[str, Sequence[str]]) -> str:
        """The answer, of those rows that hold all that is wanted."""
        values, width = [*self.wanted.values()], len(self.wanted)
        kept = {name: cells[width:] for name, cells in rows.items() if list(cells[:width]) == values}
        return table_of(kept, self.columns)


def _facts() -> Iterator[tuple[str, str]]:
    return ((relation, value) for relation, (_, _, values) in ATTRIBUTES.items() for value in values)


@dataclass
class Book:
    """All that a conversation says about how far the task is.

    Attributes:
        left: names that nobody works on. own: those that the orchestrator reads itself. reading: what was said meanwhile.
        rows: that came back. team: sub-agents. page: the next one of the hits, if there is `more`.
        spent: of the budget, as far as one can tell: what sub-agents took is not in what they say.
        dialogue: as the policy reads it, without the observation to come.
    """

    question: Question
    budget: Budget
    steps_of_a_name: float
    more: bool = True
    page: int = 1
    seen: set[str] = field(default_factory=set)
    left: deque[str] = field(default_factory=deque)
    own: list[str] = field(default_factory=list)
    reading: list[Message] = field(default_factory=list)
    last_began: int = 0  # where in `reading` the last name begins
    lookups: int = 0  # of the last name read
    is_reading: bool = False
    rows: dict[str, list[str]] = field(default_factory=dict)
    team: int = 0
    spent: int = 0
    dialogue: Dialogue = field(default_factory=Dialogue)
    done: int = 0
    failed: int = 0

    @classmethod
    def read(cls, messages: Sequence[Message], budget: Budget, steps_of_a_name: float) -> Book:
        task = next(message["content"] for message in messages if message["role"] == "user")
        book = cls(Question.read(task), budget, steps_of_a_name)
        told = {message["tool_call_id"]: message["content"] for message in messages if message["role"] == "tool"}
        for message in messages[1:]:
            if message["role"] == "user":  # a summary of what was found before
                book.rows |= rows_of(message["content"])
                book.seen |= book.rows.keys()
        for message in messages:
            if calls := message.get("tool_calls"):
                acts = [call["id"].partition(" ")[2] for call in calls]
                if acts != [LOOKUP]:
                    book.observe()
                book.enter(message, acts, [told[call["id"]] for call in calls])
        return book

    def observe(self, is_last: bool = False) -> None:
        """Take down what the policy reads before its next step."""
        steps = 1 if is_last else max(2, self.budget.steps - self.spent)
        self.dialogue.observations.append(
            Observation(self.more, len(self.left), self.team, steps, self.done, self.failed)
        )

    def enter(self, message: Message, acts: Acts, contents: Sequence[str]) -> None:
        """A step: its calls, by the acts they stand for, and what came back."""
        self.spent += 1
        if acts == [LOOKUP]:
            self.lookups += 1
            return self._read_on(message, contents[0])
        self.dialogue.steps.append(acts if closes(acts) else [*acts, END])
        self.done, self.failed, self.is_reading = 0, 0, False
        assigned = self.assignments(acts)
        came_back = [content for act, content in zip(acts, contents, strict=True) if act in ASSIGN]
        steps = [*map(self._come_back, assigned, came_back)]
        self.spent += sum(steps) if self.budget.of == "total" else max(steps, default=0)
        if acts[-1] == SEARCH:
            self.search(contents[-1])
        if acts[-1] == READ and self.left:
            self.own.append(self.left.popleft())
            self.last_began, self.lookups, self.is_reading = len(self.reading), 0, True
            self._read_on(message, contents[-1])

    def assignments(self, acts: Acts) -> list[list[str] | None]:
        """The names of each assignment in a step, taken from those left; None where there is no sub-agent to have them."""
        found: list[list[str] | None] = []
        for act in acts:
            self.team += act == CREATE
            if act in ASSIGN:
                is_free = len(found) - found.count(None) < self.team
                taken = min(ASSIGN[act], len(self.left))
                found.append([self.left.popleft() for _ in range(taken)] if is_free else None)
        return found

    def _come_back(self, names: list[str] | None, content: str) -> int:
        """One assignment; the steps that it will have taken."""
        failed, rows = content.startswith(("failed: ", "error: ")), rows_of(content)
        if names and rows and not failed:
            self.done += 1
            self.rows |= {name: cells for name, cells in rows.items() if name in names}
        else:
            self.failed += 1
            self.left.extend(names or ())
        if names is None:
            return 0
        expected = 1 + round(self.steps_of_a_name * len(names))
        return SUB_STEPS if failed else min(SUB_STEPS, expected)

    def search(self, hits: str) -> None:
        """A page of hits."""
        new = [name for name in dict.fromkeys(self.question.names(hits)) if name not in self.seen]
        self.seen.update(new)
        self.left.extend(new)
        self.page += 1
        self.more = hits.endswith(f"more on page {self.page}")

    def _read_on(self, message: Message, content: str) -> None:
        call = message["tool_calls"][-1]
        self.reading += [
            {**message, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": content},
        ]

    def assignment(self, ahead: bool = False) -> list[Message]:
        """The own reading as the conversation of a sub-agent; `ahead` with the name that would come next."""
        names = [*self.own, *([self.left[0]] if ahead and self.left else [])]
        return [{"role": "user", "content": work_prompt(names, self.question.work)}, *self.reading]


class LearnedPolicy:
    """The policy of an orchestrator for wide search in the library of the Lite World.

    It keeps no state: what it knows is read from the conversation, in which the ids of calls name the acts they stand for.
    The runtime tells nothing of the steps that sub-agents took, so what is left of the budget is an estimate, but for the
    last step, in which no tools are offered.

    Args:
        decide: a trained language model, or a script such as `serial` and `swarm()`.
        worker: the frozen sub-agent, for what the orchestrator reads itself.
        steps_of_a_name: that a sub-agent takes on average, as its calibration says.
        budget: that the run is given.
        temperature: 0 takes the likeliest act. seed: of the samples; the same conversation has the same answer.
    """

    def __init__(
        self,
        decide: PreTrainedModel | Script,
        worker: Policy,
        steps_of_a_name: float,
        budget: Budget = PUBLISHED,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        if steps_of_a_name <= 0 or temperature < 0:
            raise ValueError(
                f"steps_of_a_name is above 0, temperature is not below, got {steps_of_a_name} and {temperature}"
            )
        self.decide, self.worker, self.budget = decide, worker, budget
        self.steps_of_a_name, self.temperature, self.seed = steps_of_a_name, temperature, seed

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Reply:
        """
        Raises:
            ValueError: the task is none of wide search, or the conversation has outgrown the language model's window.
        """
        book = Book.read(messages, self.budget, self.steps_of_a_name)
        step = sum(message["role"] == "assistant" for message in messages)
        if messages[-1]["role"] == "user" and len(messages) > 1 and book.dialogue.steps:  # asked what was found so far
            rows, reply = await self._rows(book)
            known = (row_of(name, dict(zip(book.question.work, cells, strict=False))) for name, cells in rows.items())
            return replace(reply, content="\n".join([*known, NOTHING]), calls=())
        note = Reply()
        if book.is_reading and tools:
            note = await self.worker(book.assignment(ahead=True), tools)
            is_lookup = bool(note.calls) and note.calls[0].name == "search"
            if is_lookup and book.lookups < 2 * len(book.question.work):
                return replace(note, calls=(ToolCall(f"{step} {LOOKUP}", "search", note.calls[0].arguments),))
        book.observe(is_last=not tools)
        acts = await self._acts(book.dialogue)
        if acts[0] == ANSWER:
            rows, reply = await self._rows(book)
            return replace(_with_use_of(note, reply), content=book.question.table(rows), calls=())
        if acts[-1] == READ and book.own and book.left and not note.tokens:
            note = await self.worker(book.assignment(ahead=True), tools)
        last = note.content.rpartition("\n")[2] if acts[-1] == READ else ""
        return replace(note, content=last, calls=tuple(self._calls(book, acts, step)))

    async def _acts(self, dialogue: Dialogue) -> Acts:
        if isinstance(self.decide, PreTrainedModel):
            return await asyncio.to_thread(write_acts, self.decide, dialogue, self.temperature, self.seed)
        return self.decide(dialogue.observations[-1])

    async def _rows(self, book: Book) -> tuple[dict[str, list[str]], Reply]:
        """All rows that came back or were read; and what the frozen sub-agent said about its own, with all its tokens."""
        rows, reply = dict(book.rows), Reply()
        if book.own:
            reply = await self.worker(book.assignment(), [])
            if reply.calls:  # the last step came before it was done with the last name
                book.own.pop()
                del book.reading[book.last_began :]
                reply = _with_use_of(reply, await self.worker(book.assignment(), []) if book.own else Reply())
            rows |= {name: cells for name, cells in rows_of(reply.content).items() if name in book.own}
        return rows, reply

    def _calls(self, book: Book, acts: Acts, step: int) -> Iterator[ToolCall]:
        """The calls that the acts stand for; what is said behind calls, or only closes a step, is none."""
        team, free = book.team, 1
        assignments = iter(book.assignments(acts))
        for place, act in enumerate(acts):
            if act == CREATE:
                team += 1
                given: dict[str, Any] = {"name": f"reader {team}", "system_prompt": MEMBER}
            elif act in ASSIGN:
                names = next(assignments)
                given = {"agent": f"reader {free}", "prompt": _prompt(names or (), book.question.work)}
                free += names is not None
            elif act == SEARCH:
                given = {"query": book.question.query, "page": book.page}
            elif act == READ:
                given = {"title": book.left[0] if book.left else ""}
            else:
                continue
            yield ToolCall(f"{step}.{place} {act}", TOOLS.get(act, "assign_task"), json.dumps(given))


def _with_use_of(before: Reply, reply: Reply) -> Reply:
    """The reply, at the price of both: one step may take several replies of the frozen sub-agent."""
    read, written = before.prompt_tokens + reply.prompt_tokens, before.completion_tokens + reply.completion_tokens
    return replace(reply, prompt_tokens=read, completion_tokens=written, cost=before.cost + reply.cost)


TOOLS = {CREATE: "create_subagent", SEARCH: "search", READ: "read"}


def _prompt(names: Iterable[str], columns: Sequence[str]) -> str:
    """An assignment; one of nobody is possible, and of no use."""
    names = list(names)
    return work_prompt(names, columns) if names else f"{' , '.join(columns)} of"


@torch.no_grad()
def write_acts(model: PreTrainedModel, dialogue: Dialogue, temperature: float = 0.0, seed: int = 0) -> Acts:
    """The next step of a dialogue.

    Raises:
        ValueError: there is no room for it in the window that the model was trained with.
    """
    ids, cache, acts = dialogue.ids, DynamicCache(config=model.config), list[str]()
    dice = torch.Generator().manual_seed(int.from_bytes(blake2b(f"{seed} {ids}".encode(), digest_size=7).digest()))
    read = torch.tensor([ids])
    while not closes(acts):
        if len(ids) + len(acts) >= WINDOW:
            raise ValueError(f"an episode has at most {WINDOW} tokens")
        logits = only_acts(model(read, past_key_values=cache, use_cache=True).logits[0, -1])
        if temperature:
            act = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=dice))
        else:
            act = int(logits.argmax())
        acts.append(ACTS[act])
        read = torch.tensor([[act]])
    return acts
