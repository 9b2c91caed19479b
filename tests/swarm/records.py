"""Made-up records of a sub-agent, and the sub-agent that they are true of, for the tests of this folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k25lite.swarm import Reply, ScriptedPolicy, call
from k25lite.swarm.policy import Message
from k25lite.swarm.search import Found, Hit
from k25lite.swarm.simulator import WideSearch
from k25lite.swarm.subagent import SUB_LIMITS, row_of

SUB_STEPS: int = SUB_LIMITS.steps
NAMES = [f"{first}{second} {first}o" for first in "bdfgklmnprst" for second in "aeiou"]
COLUMNS = ("food", "home")
QUERY = "list every person who eats figs with home"


@dataclass(frozen=True)
class Steady:
    """A sub-agent that takes `each` steps for a name and one for the answer, up to a limit."""

    each: int = 2
    limit: int = SUB_STEPS
    share: float = 1.0

    def draw(self, names: int, random: np.random.Generator) -> tuple[bool, int, float]:
        needed = self.each * names + 1
        return needed <= self.limit, min(needed, self.limit), self.share


@dataclass(frozen=True)
class Rotting:
    """A sub-agent whose rows get worse with the number of names, and who takes about two steps for each."""

    limit: int = SUB_STEPS

    def draw(self, names: int, random: np.random.Generator) -> tuple[bool, int, float]:
        needed = 1 + names + int(random.binomial(2 * names, 0.6))
        cells = random.binomial(3 * names, 0.97 / (1 + (names / 40) ** 2)) / (3 * names)
        return needed <= self.limit, min(needed, self.limit), float(cells)


def steady_worker(each: int = 2) -> ScriptedPolicy:
    """The policy of a `Steady` sub-agent: it reads about a name, and looks up something each - 1 times."""

    def script(messages: Sequence[Message]) -> Reply:
        task = next(message["content"] for message in messages if message["role"] == "user")
        names = re.findall("[a-z]+ [a-z]+", task.partition(" of")[2])
        step = sum(message["role"] == "assistant" for message in messages)
        place, lookup = divmod(step, each)
        note = f"note {step}"
        if place >= len(names):
            facts = {"food": "figs", "home": "cave"}
            return Reply("\n".join(row_of(name, facts) for name in names) or "nobody")
        if lookup:
            return Reply(note, (call("search", query=f"{names[place]} home register"),))
        return Reply(note, (call("read", title=names[place]),))

    return ScriptedPolicy(script)


class Shelf:
    """An engine that finds so many names, eight to a page."""

    def __init__(self, names: int):
        self.names = NAMES[:names]

    def search(self, query: str, page: int = 1) -> Found:
        if query != "eats figs":
            return Found((Hit("home register", "nothing"),))
        hits = [Hit(name, f"... {name} eats figs . the cat of ru to eats figs") for name in self.names]
        return Found(tuple(hits[8 * page - 8 : 8 * page]), len(hits) > 8 * page)

    def read(self, title: str) -> str | None:
        return f"year 4 . {title} eats figs ." if title in self.names else None


class Even(WideSearch):
    """Eight names on every page, to reckon by hand."""

    @property
    def _found(self):
        return np.arange(8, self.names + 8, 8).clip(max=self.names)
