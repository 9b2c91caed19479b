"""The library of the Lite World: short documents to search and read, from which `k25lite.world.wide_tasks` makes tasks.

Every person has an article. What it leaves out, or what has changed since, stands in registers; some are told of under a
second name; some things are told nowhere; pages about pets and tales name the same people and things and answer nothing.
`RULES` says how to read all this, and the documents alone suffice to follow it.

Simplified: a fact has one value at a time, a sentence tells one fact, and names are two words of the world's names, so that
every library, of any size, is written in the same vocabulary and namesakes abound.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import isqrt
from random import Random

import pandas as pd

from k25lite.world.entities import RELATIONS, entity_names
from k25lite.world.families import PICTURED, UNPICTURED
from k25lite.world.scenes import COLOURS, SHAPES

UNKNOWN = "unknown"
# relation: (how it is stated, how it is asked, its values); few trades have many people, so that tables differ in length
ATTRIBUTES = RELATIONS | {
    "trade": (
        "{} works as a",
        "what does {} work as ?",
        tuple("smith baker weaver sailor mason hunter scribe miller".split()),
    )
}
# Sentences with the same words that answer nothing.
IDLE = {
    "home": "{} once saw the",
    "food": "{} sells",
    "fear": "{} dreams of",
    "music": "{} owns a",
    "trade": "{} knows a",
}
PETS = ("cat", "dog", "goat")
# Words of documents and tasks beyond `k25lite.world.families.vocabulary`.
WORDS = tuple(
    "home food music trade works work as a smith baker weaver sailor mason hunter scribe miller saw sells dreams of owns "
    "knows wears year page register names also called formerly this tells tale and cat dog goat list every person who with "
    "unknown".split()
)
RULES = """How the library is to be read:
1. A person has an article, whose title is the person's name. Other documents may tell of the person too.
2. A sentence tells of whoever stands before its verb: what the cat of someone eats, that one does not.
3. "X is also called Y" gives a second name. Tables list the person once, as X, which is the title of the article.
4. A document's year stands in its first sentence. Where documents disagree, the latest year is right.
5. What a sentence says that begins with "formerly" is so no longer.
6. What no document tells is unknown; who does not certainly belong into a table is left out of it."""
PAGE = 8  # entries of a page of a register, at most


@dataclass(frozen=True)
class Shares:
    """How facts are told, as shares of all facts; what they leave of 1 stands in the article and is right.

    Attributes:
        missing: told nowhere. elsewhere: told in a register only.
        outdated: the article is right, and an earlier register says otherwise.
        updated: the article is wrong, and a later register is right.
        former: the article says both, the wrong value behind "formerly".
        confirmed: the article is right, and a register agrees.
        alias: of people: have a second name, under which alone one of their facts is told.
        alias_apart: of second names: stand in the register of names, and not in the article.

    Raises:
        ValueError: a share is not one.
    """

    missing: float = 0.05
    elsewhere: float = 0.1
    outdated: float = 0.05
    updated: float = 0.05
    former: float = 0.05
    confirmed: float = 0.1
    alias: float = 0.2
    alias_apart: float = 0.5

    def __post_init__(self) -> None:
        shares = asdict(self)
        if not all(0 <= share <= 1 for share in shares.values()) or sum(self.of_facts.values()) > 1 + 1e-9:
            raise ValueError(f"shares are from 0 to 1, those of facts together too, got {shares}")

    @property
    def of_facts(self) -> dict[str, float]:
        return {how: share for how, share in asdict(self).items() if not how.startswith("alias")}


@dataclass(frozen=True)
class Person:
    """Someone whom the library tells of.

    Attributes:
        name: also the title of the article. alias: the second name, or "".
        facts: relation -> value, as the documents have it: `UNKNOWN` if no document tells.
        told: relation -> one of the fields of `Shares`, or "plain".
        sources: relation -> title of the document that settles it; "alias" -> of the one that tells the second name.
    """

    name: str
    alias: str
    facts: dict[str, str]
    told: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [self.name, self.alias] if self.alias else [self.name]


class Library:
    """One library, the same on every platform for the same arguments.

    Example:
        >>> library = Library(0, people=200)
        >>> library.documents[library.people[0].name]
        'year 4 . ...'

    Args:
        people: 20 to 2000.
        idle: sentences of each article that answer nothing, or tell of somebody else.
        distractors: documents that answer nothing, as a share of the people.

    Attributes:
        people: tuple of `Person`. documents: title -> text, in an order that tells nothing.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, seed: int, people: int = 400, idle: int = 2, distractors: float = 0.5, shares: Shares | None = None
    ):
        if not (20 <= people <= 2000 and idle >= 0 and 0 <= distractors <= 10):
            raise ValueError("20 to 2000 people, 0 or more idle sentences, 0 to 10 times as many distractors as people")
        self.seed, self.idle, self.shares = seed, idle, shares or Shares()
        self._random = Random(f"k25lite library {seed}")
        self.people = self._make_people(people)
        self._documents: dict[str, list[str]] = {}
        self._entries: defaultdict[str, list[tuple[str, dict[str, str], str]]] = defaultdict(list)
        for person in self.people:
            self._write_article(person)
        self._write_registers()
        self._write_distractors(round(distractors * people))
        titles = list(self._documents)
        self._random.shuffle(titles)
        self.documents = {title: " . ".join(self._documents[title]) + " ." for title in titles}

    def _make_people(self, count: int) -> tuple[Person, ...]:
        random, hows = self._random, self.shares.of_facts
        weights = [*hows.values(), max(0.0, 1 - sum(hows.values()))]
        side = isqrt(5 * count) + 1  # of a square of pairs of names, of which up to two fifths are taken
        words = random.sample(entity_names(PICTURED + UNPICTURED), 2 * side)
        # Names stay different without the space between their words, which metrics remove.
        pairs = {first + last: f"{first} {last}" for first in words[:side] for last in words[side:]}
        names = random.sample(list(pairs.values()), 2 * count)
        trades = random.sample(ATTRIBUTES["trade"][2], len(ATTRIBUTES["trade"][2]))
        people = []
        for name, alias in zip(names[:count], names[count:], strict=True):
            has_alias = random.random() < self.shares.alias
            told = dict(zip(ATTRIBUTES, random.choices([*hows, "plain"], weights, k=len(ATTRIBUTES)), strict=True))
            if has_alias:
                told[random.choice(list(ATTRIBUTES))] = "elsewhere"
            facts = {relation: random.choice(ATTRIBUTES[relation][2]) for relation in RELATIONS}
            facts["trade"] = random.choices(trades, [1 / rank for rank in range(1, len(trades) + 1)])[0]
            facts |= {relation: UNKNOWN for relation in ATTRIBUTES if told[relation] == "missing"}
            people.append(Person(name, alias if has_alias else "", facts, told))
        return tuple(people)

    def _write_article(self, person: Person) -> None:
        random, year, name = self._random, self._random.randint(3, 7), person.name
        sentences = [self._idle_sentence(person) for _ in range(self.idle)]
        for relation, value in person.facts.items():
            how, other = person.told[relation], random.choice([v for v in ATTRIBUTES[relation][2] if v != value])
            if how not in ("missing", "elsewhere"):
                sentences.append(state(name, relation, other if how == "updated" else value))
                person.sources[relation] = name
            if how == "former":
                sentences.append(f"formerly {state(name, relation, other)}")
            elif how in ("elsewhere", "outdated", "updated", "confirmed"):
                years = {"outdated": (1, year - 1), "updated": (year + 1, 9)}
                register = f"{relation} register of year {random.randint(*years.get(how, (1, 9)))}"
                who = person.names[-1] if how == "elsewhere" else random.choice(person.names)
                entry = state(who, relation, other if how == "outdated" else value)
                settles = person.sources if how in ("elsewhere", "updated") else {}
                self._entries[register].append((entry, settles, relation))
        if person.alias:
            also = f"{name} is also called {person.alias}"
            if random.random() < self.shares.alias_apart:
                self._entries[f"names register of year {random.randint(1, 9)}"].append((also, person.sources, "alias"))
            else:
                sentences.append(also)
                person.sources["alias"] = name
        random.shuffle(sentences)
        self._documents[name] = [f"year {year}", f"this page tells of {name}", *sentences]

    def _idle_sentence(self, person: Person) -> str:
        """About things that nobody asks for; or a fact of somebody else, if the own article is right about it."""
        random = self._random
        if random.random() < 0.25:
            other = random.choice(self.people)
            known = [r for r, how in other.told.items() if how not in ("missing", "elsewhere", "updated")]
            if known and other is not person:
                relation = random.choice(known)
                return state(random.choice(other.names), relation, other.facts[relation])
        if random.random() < 0.2:
            return f"{person.name} wears a {random.choice(list(COLOURS))}-{random.choice(SHAPES)}"
        relation = random.choice(list(IDLE))
        return f"{IDLE[relation].format(person.name)} {random.choice(ATTRIBUTES[relation][2])}"

    def _write_registers(self) -> None:
        for register in sorted(self._entries):
            entries, head = self._entries[register], register.partition(" of ")[2]
            self._random.shuffle(entries)
            pages = -(-len(entries) // PAGE)
            for page in range(pages):
                title = f"{register} page {page + 1}"
                sentences = [head]
                for entry, settles, what in entries[page::pages]:
                    sentences.append(entry)
                    settles[what] = title
                while len(sentences) < 5:
                    sentences.append(self._idle_sentence(self._random.choice(self.people)))
                self._documents[title] = sentences

    def _write_distractors(self, count: int) -> None:
        random = self._random
        things = [value for _, _, values in ATTRIBUTES.values() for value in values]
        for number in range(1, count + 1):
            whose = random.choice(random.choice(self.people).names)
            title = f"{random.choice(PETS)} of {whose}"
            if number % 2 and title not in self._documents:
                told = random.sample(list(ATTRIBUTES), 4)
                values = [random.choice(ATTRIBUTES[relation][2]) for relation in told]
                sentences = [state(f"the {title}", *fact) for fact in zip(told, values, strict=True)]
            else:
                title = f"tale {number}"
                sentences = [f"this tale tells of {whose} and {random.choice(things)}"]
                sentences += [f"the tale tells of {' , '.join(random.sample(things, 3))}" for _ in range(2)]
            self._documents[title] = [f"year {random.randint(1, 9)}", *sentences]

    @cached_property
    def table(self) -> pd.DataFrame:
        """[people, 1 + attributes], sorted by "name": all that the documents tell."""
        rows = [{"name": person.name, **person.facts} for person in self.people]
        return pd.DataFrame(rows, dtype=object).sort_values("name", ignore_index=True)

    def card(self) -> str:
        """What this library is and how to read it, in Markdown."""
        told = Counter(how for person in self.people for how in person.told.values())
        second = sum(bool(person.alias) for person in self.people)
        return "\n".join(
            [
                f"# A library of the Lite World, seed {self.seed}",
                "",
                f"Generated by k25lite: {len(self.people)} people, {second} of them with a second name, and "
                f"{len(self.documents)} documents. All of it is invented; there is no other source.",
                "",
                RULES,
                "",
                "| facts | how they are told |",
                "|---|---|",
                *(f"| {count} | {how} |" for how, count in sorted(told.items())),
                "",
            ]
        )


def state(who: str, relation: str, value: str) -> str:
    return f"{ATTRIBUTES[relation][0].format(who)} {value}"
