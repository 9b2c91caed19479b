"""Tasks of wide search: list everybody in a library for whom something holds, and fill in what else is known of them.

A task is held out by what it asks (which relations) or by how long its table is, so that two ways to generalise can be told
apart. Which people there are is a matter of the library's seed. Tasks are files in the public layout of WideSearch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from os import PathLike
from pathlib import Path
from random import Random

import pandas as pd

from k25lite.world.families import is_held_out
from k25lite.world.library import ATTRIBUTES, RULES, UNKNOWN, Library, state

SPLITS = ("train", "attributes", "sizes", "both")
TRAIN_ROWS = 80  # of the longest table to train with; longer ones are held out


@dataclass(frozen=True, eq=False)
class Task:
    """One table to fill.

    Attributes:
        wanted: relation -> value, of one relation or more. columns: relations to list, beside the name.
        gold: [people, 1 + columns], sorted by "name", which is the key; `UNKNOWN` where no document tells.
    """

    instance_id: str
    wanted: dict[str, str]
    columns: tuple[str, ...]
    gold: pd.DataFrame

    @property
    def split(self) -> str:
        return split_of(self.wanted, self.columns, len(self.gold))

    @property
    def query(self) -> str:
        wanted = " and ".join(state("", *fact).strip() for fact in self.wanted.items())
        return f"list every person who {wanted} with {' , '.join(self.columns)}"

    def record(self, explained: bool = False) -> dict[str, str]:
        """The task in the public file format, in which `evaluation` is a text of JSON.

        Args:
            explained: for models that know nothing of the library: with its rules, and how to answer.
        """
        required = ["name", *self.columns]
        pipeline = {column: {"preprocess": ["norm_str"], "metric": ["exact_match"]} for column in required}
        evaluation = {"required": required, "unique_columns": ["name"], "eval_pipeline": pipeline}
        form = f"Answer with one table in a ```markdown block, its columns: {', '.join(required)}."
        return {
            "instance_id": self.instance_id,
            "query": f"{self.query}\n\n{RULES}\n\n{form}" if explained else self.query,
            "language": "en",
            "evaluation": json.dumps(evaluation),
        }


def split_of(wanted: Iterable[str], columns: Iterable[str], rows: int) -> str:
    """Where a table belongs: "train", or by what is new in it: its "attributes", its size ("sizes"), or "both"."""
    relations = [[relation for relation in ATTRIBUTES if relation in some] for some in (set(wanted), set(columns))]
    is_new = is_held_out(f"{' '.join(relations[0])} : {' '.join(relations[1])}")
    return SPLITS[is_new + 2 * (rows > TRAIN_ROWS)]


def make_task(library: Library, wanted: Mapping[str, str], columns: Sequence[str], instance_id: str = "lite") -> Task:
    """The task of listing `columns` of those for whom all that is `wanted` holds, however many they are.

    Raises:
        ValueError: no relation, no value of one, one relation twice, or none wanted or to list.
    """
    known = all(relation in ATTRIBUTES and value in ATTRIBUTES[relation][2] for relation, value in wanted.items())
    is_once = len({*wanted, *columns}) == len(wanted) + len(columns)
    if not (wanted and columns and known and is_once and set(columns) <= ATTRIBUTES.keys()):
        raise ValueError(f"relations are {', '.join(ATTRIBUTES)}; got {wanted} wanted, and {columns} to list")
    holds = (library.table[list(wanted)] == list(wanted.values())).all(axis=1)
    gold = library.table.loc[holds, ["name", *columns]].reset_index(drop=True)
    return Task(instance_id, dict(wanted), tuple(columns), gold)


def make_tasks(
    library: Library, split: str = "train", count: int = 10, rows: tuple[int, int] = (10, 200), seed: int = 0
) -> list[Task]:
    """Different tasks of a split, with one or two relations wanted and one to three to list.

    The same list of people is wanted again only when every other one has been, and the lengths of tables spread over
    `rows` as evenly as the library allows.

    Raises:
        ValueError: no such split, or this library has fewer such tasks.
    """
    if split not in SPLITS:
        raise ValueError(f"a split is one of {', '.join(SPLITS)}, got {split!r}")
    random = Random(f"k25lite tasks {library.seed} {split} {seed}")
    found = [
        (wanted, length, random.sample(columns, len(columns)))
        for wanted, length in _lists(library)
        if rows[0] <= length <= rows[1] and (columns := _columns(wanted, length, split))
    ]
    if (possible := sum(len(columns) for _, _, columns in found)) < count:
        raise ValueError(f"{count} tasks of {rows[0]} to {rows[1]} rows for {split!r}: this library has {possible}")
    lengths = [length for _, length, _ in found]
    tasks: list[Task] = []
    uses = Counter[int]()
    while len(tasks) < count:
        target = random.uniform(min(lengths), max(lengths))
        left = [index for index, (_, _, columns) in enumerate(found) if uses[index] < len(columns)]
        nearest = min(left, key=lambda index: (uses[index], abs(lengths[index] - target)))
        wanted, _, columns = found[nearest]
        name = f"lite_{library.seed}_{split}_{seed}_{len(tasks):03d}"
        tasks.append(make_task(library, wanted, columns[uses[nearest]], name))
        uses[nearest] += 1
    return tasks


def write_library(folder: str | PathLike[str], library: Library, tasks: Iterable[Task] = ()) -> Path:
    """A library and tasks as files: documents.jsonl, tasks.jsonl, gold/<instance_id>.csv, README.md.

    Raises:
        ValueError: two tasks have the same id. OSError: the folder cannot be written.
    """
    folder, tasks = Path(folder), list(tasks)
    if len({task.instance_id for task in tasks}) < len(tasks):
        raise ValueError("two tasks have the same instance_id")
    (folder / "gold").mkdir(parents=True, exist_ok=True)
    documents = [{"title": title, "text": text} for title, text in library.documents.items()]
    for name, records in (("documents", documents), ("tasks", [task.record() for task in tasks])):
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    for task in tasks:
        task.gold.to_csv(folder / "gold" / f"{task.instance_id}.csv", index=False, lineterminator="\n")
    splits = ", ".join(f"{count} {split}" for split, count in Counter(task.split for task in tasks).items())
    card = f"""{library.card()}
Tasks here: {splits or "none"}. In `train`, tables have at most {TRAIN_ROWS} rows, and no combination of relations that is
held out; in `attributes` such combinations, in `sizes` longer tables, in `both` both.
"""
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
    return folder


def _lists(library: Library) -> list[tuple[dict[str, str], int]]:
    """All that can be wanted, one or two relations with their values, and of how many people it holds."""
    counts = Counter(
        facts
        for person in library.people
        for number in (1, 2)
        for facts in combinations(person.facts.items(), number)
        if all(value != UNKNOWN for _, value in facts)
    )
    return [(dict(facts), length) for facts, length in counts.items()]


def _columns(wanted: dict[str, str], rows: int, split: str) -> list[tuple[str, ...]]:
    """What can be listed so that the task belongs to the split."""
    others = [relation for relation in ATTRIBUTES if relation not in wanted]
    return [
        columns
        for number in (1, 2, 3)
        for columns in combinations(others, number)
        if split_of(wanted, columns, rows) == split
    ]
