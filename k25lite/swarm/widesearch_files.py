"""The files of WideSearch: tasks, their gold tables and the answers to them, read and checked.

Source: WideSearch evaluation, 2025. A task's rules are checked when it is loaded, so that scoring meets no broken ones.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import pandas as pd
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from k25lite.swarm.tables import normalise_header

Model = TypeVar("Model", bound=BaseModel)
Preprocess = Literal["norm_str", "extract_number", "norm_date"]
Metric = Literal["exact_match", "in_match", "url_match", "number_near", "date_near", "llm_judge"]


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _headers(names: tuple[str, ...]) -> tuple[str, ...]:
    headers = tuple(map(normalise_header, names))
    if len(set(headers)) < len(headers):
        raise ValueError(f"a column is named twice: {', '.join(headers)}")
    return headers


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _encodable(value: Any) -> Any:
    """Text that can be written to a file: half a surrogate pair, which a cut-off answer may end in, becomes "?"."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


class Rule(BaseModel):
    """How the cells of a column are compared.

    Attributes:
        preprocess: in this order, on both sides. metric: each scores a cell 0 or 1.
        criterion: the relative tolerance of `number_near`, the rubric of `llm_judge`.
    """

    model_config = ConfigDict(frozen=True)

    preprocess: tuple[Preprocess, ...] = ()
    metric: Annotated[tuple[Metric, ...], AfterValidator(_each_once)] = ()
    criterion: float | str | None = None

    @model_validator(mode="after")
    def _has_tolerance(self) -> Self:
        if "number_near" in self.metric and not (isinstance(self.criterion, float) and 0 <= self.criterion < math.inf):
            raise ValueError(f"number_near needs a tolerance, 0 or more, as its criterion, not {self.criterion!r}")
        return self


class Evaluation(BaseModel):
    """What an answer is held to; the names of columns are normalised.

    Attributes:
        required: the columns of the table. unique_columns: those among them that identify a row, its key.
        eval_pipeline: column -> rule, for every required column; a key column may go without, or without a metric.

    Raises:
        ValueError: a rule is missing or nonsense, or columns do not fit together.
    """

    model_config = ConfigDict(frozen=True)

    required: Annotated[tuple[str, ...], AfterValidator(_headers), Field(min_length=1)]
    unique_columns: Annotated[tuple[str, ...], AfterValidator(_headers), Field(min_length=1)]
    eval_pipeline: dict[str, Rule]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        rules = dict(zip(_headers(tuple(self.eval_pipeline)), self.eval_pipeline.values(), strict=True))
        object.__setattr__(self, "eval_pipeline", rules)
        for name in (*self.unique_columns, *rules):
            if name not in self.required:
                raise ValueError(f"column {name!r} is not a required one ({', '.join(self.required)})")
        for name in self.compared:
            if name not in rules or not rules[name].metric:
                raise ValueError(f"column {name!r} has no metric")
        return self

    @property
    def compared(self) -> list[str]:
        """The required columns that are no keys."""
        return [name for name in self.required if name not in self.unique_columns]

    def rule(self, column: str) -> Rule:
        """How a column's cells are compared."""
        return self.eval_pipeline.get(column, Rule())


@dataclass(frozen=True, eq=False)
class Task:
    """A question and its gold table.

    Attributes:
        language: "en" or "zh".
        gold: strings as they stand in the file, "" where nothing does; cut to the required columns, in their order.

    Raises:
        ValueError: gold has no rows, lacks a required column or has one twice.
    """

    instance_id: str
    query: str
    language: str
    evaluation: Evaluation
    gold: pd.DataFrame

    def __post_init__(self) -> None:
        gold = self.gold.rename(columns=normalise_header)
        for name in self.evaluation.required:
            if list(gold.columns).count(name) != 1:
                raise ValueError(f"line 1: required column {name!r} is not there once ({', '.join(gold.columns)})")
        if not len(gold):
            raise ValueError("line 2: the gold table has no rows")
        gold = gold.loc[:, list(self.evaluation.required)].reset_index(drop=True).astype(object)
        object.__setattr__(self, "gold", gold.where(gold.notna(), "").map(str))


class Response(BaseModel):
    """An answer to a task: a text with a table in it, or None where a trial brought none."""

    model_config = ConfigDict(frozen=True)

    instance_id: str
    trial: int = Field(ge=0, strict=True)
    response: Annotated[str | None, BeforeValidator(_encodable)]


class _TaskLine(BaseModel):
    instance_id: str = Field(min_length=1)
    query: str
    language: str
    evaluation: Annotated[Evaluation, BeforeValidator(_from_json)]


def load_tasks(tasks_file: str | os.PathLike[str], gold_dir: str | os.PathLike[str]) -> list[Task]:
    """Read the public benchmark's files: a line of JSON per task, its gold table in gold_dir/<instance_id>.csv.

    A line has instance_id, query, language and evaluation, which is an object or the text of one.

    Raises:
        ValueError: something in them is broken; the message names file and line.
        FileNotFoundError: a file is missing.
    """
    tasks: dict[str, Task] = {}
    for where, line in _read_lines(Path(tasks_file), _TaskLine):
        if line.instance_id in tasks:
            raise ValueError(f"{where}: a second task {line.instance_id!r}")
        path = Path(gold_dir, f"{line.instance_id}.csv")
        if not path.is_file():
            raise FileNotFoundError(f"{where}: no gold table {path}")
        try:
            gold = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            if not isinstance(gold.index, pd.RangeIndex):  # pandas takes a surplus first cell for a row's name
                raise ValueError("line 2: more cells than the header has names")
            tasks[line.instance_id] = Task(line.instance_id, line.query, line.language, line.evaluation, gold)
        except ValueError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return list(tasks.values())


def load_responses(path: str | os.PathLike[str]) -> list[Response]:
    """Read answers: a line of JSON per trial with instance_id, trial (0 or more) and response (text, or null).

    Raises:
        ValueError: a line is broken, or a trial is there twice; the message names file and line.
        FileNotFoundError: no such file.
    """
    responses: dict[tuple[str, int], Response] = {}
    for where, line in _read_lines(Path(path), Response):
        if (line.instance_id, line.trial) in responses:
            raise ValueError(f"{where}: a second trial {line.trial} of task {line.instance_id!r}")
        responses[line.instance_id, line.trial] = line
    return list(responses.values())


def _read_lines(path: Path, model: type[Model]) -> Iterator[tuple[str, Model]]:
    """The lines of a JSONL file, each with its place in it, as an error names it."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    found = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            found, where = True, f"{path}:{number}"
            try:
                yield where, model.model_validate(_object(line))
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                raise ValueError(f"{where}: {place}: {first['msg']}".replace(": : ", ": ")) from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    if not found:
        raise ValueError(f"{path}: empty")


def _object(line: bytes) -> Mapping[str, Any]:
    value = json.loads(line.decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
