"""The WideSearch table metric: how much of a gold table an answer's table holds, counted in rows and in items.

Source: WideSearch evaluation, 2025. Two modes, named in every output:

- *compatible* gives the numbers of the public evaluation on the same files. Its holes come with it: one gold row in ten
  spellings scores an item F1 of 1 or more, several metrics on a column push F1 above 1, two cells without a date are the
  same date.
- *strict* is for rewards. Rows are matched one to one, and the metrics of a column are averaged. Of more rows of a key than
  gold has, the worst count, so that guessing several times never beats guessing once. A cell that is missing is wrong, and
  so is one that cannot be parsed, unless it says the same as gold. A cell that gold leaves empty is not asked: its row's
  other cells share its weight. The order of rows and columns does not matter; scores stay in [0, 1]; the gold table itself
  scores 1.

Not covered: the models that judge cells and align names. Both are callables that the caller gives.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from k25lite.results import write_whole
from k25lite.swarm import tables
from k25lite.swarm.widesearch_files import Evaluation as Evaluation
from k25lite.swarm.widesearch_files import Response as Response
from k25lite.swarm.widesearch_files import Rule as Rule
from k25lite.swarm.widesearch_files import Task as Task
from k25lite.swarm.widesearch_files import load_responses as load_responses
from k25lite.swarm.widesearch_files import load_tasks as load_tasks

Mode = Literal["compatible", "strict"]
Judge = Callable[[Sequence[str], Sequence[str], Any], Sequence[float]]  # (answers, golds, criterion) -> 0 or 1 for each
Align = Callable[[Sequence[str], Sequence[str]], Mapping[str, str]]  # (the answer's names, gold's) -> gold's for some
Groups = list[tuple[list[int], list[int]]]  # rows of gold and rows of the answer that share a key

NUMBERS = ("success", "row_precision", "row_recall", "row_f1", "item_precision", "item_recall", "item_f1")
AVERAGES = {"avg": "mean", "max": "max", "min": "min"}  # over the trials of a task
ROW_WEIGHT = 1e-6  # beside an item: among assignments with the most items, the one with the most rows
SPARE_ROWS = 100  # beyond ten times those of gold; a table with more scores 0 in strict mode


@dataclass(frozen=True)
class Score:
    """What an answer scored: 0 throughout if it has no table with the required columns.

    Attributes:
        success: 1 if everything is right, else 0.
        row_precision, row_recall, row_f1: of whole rows. item_precision, item_recall, item_f1: of cells.
        note: why everything is 0; empty if there is nothing to say.
    """

    success: int = 0
    row_precision: float = 0.0
    row_recall: float = 0.0
    row_f1: float = 0.0
    item_precision: float = 0.0
    item_recall: float = 0.0
    item_f1: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The scores of all trials of all tasks.

    Attributes:
        n: trials per task.
        averages: "avg@N", "max@N", "min@N" -> number -> its mean, max or min over a task's N trials, averaged over tasks.
        trials: per trial `instance_id, trial, success, row_precision, ..., item_f1`.
        notes: `instance_id, trial, note` of the trials that have one.
    """

    mode: Mode
    n: int
    averages: dict[str, dict[str, float]]
    trials: list[dict[str, Any]]
    notes: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON, whole or not at all; folders are made as needed."""
        return write_whole(Path(path), json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def table(self) -> str:
        """The averages for people, and the first few notes."""
        averages = pd.DataFrame(self.averages).rename(columns=lambda name: name.replace("N", str(self.n)))
        shown = [f"{note['instance_id']}, trial {note['trial']}: {note['note']}" for note in self.notes[:5]]
        if len(self.notes) > len(shown):
            shown.append(f"and {len(self.notes) - len(shown)} more notes (see --json)")
        title = f"WideSearch, {self.mode} mode: {len(self.trials) // self.n} tasks, {self.n} trials each"
        return "\n".join([title, averages.to_string(float_format="{:.4f}".format), *shown])


def score(
    task: Task,
    response: str | None,
    mode: Mode = "compatible",
    *,
    judge: Judge | None = None,
    align: Align | None = None,
) -> Score:
    """Score one answer.

    Args:
        response: the text with a table in it. Nothing in it raises: what cannot be read scores 0.
        judge: scores the columns with `llm_judge`, each in one call.
        align: maps the answer's columns to the required ones where they differ, and the answer's keys to gold's in key
            columns with `exact_match` or `llm_judge`. Without it names stay as they are.

    Raises:
        ValueError: no such mode; a column needs a judge and there is none; the judge gave something else than a 0 or 1 for
            each pair; or, in strict mode, a gold row has no key, or all are empty.
    """
    if mode not in ("compatible", "strict"):
        raise ValueError(f"no mode {mode!r}; there are compatible and strict")
    for column in task.evaluation.compared:
        if judge is None and "llm_judge" in task.evaluation.rule(column).metric:
            raise ValueError(f"task {task.instance_id}: column {column!r} is scored by llm_judge, which needs a judge")
    read = tables.parse_table if mode == "strict" else tables.parse_table_compatible
    answer = None if response is None else read(response)
    if answer is None:
        return Score(note="no readable table")
    required = task.evaluation.required
    if align and set(answer.columns) != set(required):
        answer = answer.rename(columns=dict(align(list(answer.columns), list(required))))
    if set(answer.columns) != set(required) or not answer.columns.is_unique:
        found = shorten(", ".join(answer.columns), 200)
        return Score(note=f"columns {found} instead of {', '.join(required)}")
    return (_strict if mode == "strict" else _compatible)(task, answer, judge, align)


def _compatible(task: Task, answer: pd.DataFrame, judge: Judge | None, align: Align | None) -> Score:
    rules, key = task.evaluation, list(task.evaluation.unique_columns)
    gold = tables.guessed_types(task.gold).drop_duplicates(key)
    answer = _aligned(answer.drop_duplicates(key), gold, rules, align)
    try:
        for table, (column, rule) in product((gold, answer), rules.eval_pipeline.items()):
            table[column] = [tables.prepare(cell, rule.preprocess) for cell in table[column]]
        groups = _groups(_keys(gold, key), _keys(answer, key))
        pairs = [pair for golds, answers in groups for pair in product(golds, answers)]
        scores = [np.ones(len(pairs))] * len(key)
        for column in rules.compared:
            golds, answers, rule = list(gold[column]), list(answer[column]), rules.rule(column)
            cells = [(answers[j], golds[i]) for i, j in pairs]
            for metric in rule.metric:
                if metric == "llm_judge":
                    scores.append(_judged(judge, column, rule, cells))
                else:
                    compare = tables.METRICS[metric]
                    scores.append(np.array([compare(*pair, rule.criterion) for pair in cells], dtype=float))
    except tables.UnreadableCell as error:
        return Score(note=f"the public evaluation stops at this answer: {error}")
    both = np.stack(scores)  # [key columns and metrics, pairs]
    rows, items = float(both.min(axis=0).sum()), float(both.sum())
    return _score(rows, items, len(answer), len(gold), len(rules.required), _identical(gold, answer, rules))


def _strict(task: Task, answer: pd.DataFrame, judge: Judge | None, align: Align | None) -> Score:
    rules, key, width = task.evaluation, list(task.evaluation.unique_columns), len(task.evaluation.required)
    gold = task.gold[~task.gold.map(tables.is_missing).all(axis=1)]
    if gold.empty:
        raise ValueError(f"task {task.instance_id}: all gold rows are empty")
    if gold[key].map(tables.is_missing).all(axis=1).any():
        raise ValueError(f"task {task.instance_id}: a gold row has no key ({', '.join(key)})")
    if len(answer) > (limit := 10 * len(gold) + SPARE_ROWS):
        return Score(note=f"{len(answer)} rows, more than the {limit} that are compared")
    answer = _aligned(answer, gold, rules, align)
    groups = _groups(_keys(gold, key, rules), _keys(answer, key, rules))
    pairs = [pair for golds, answers in groups for pair in product(golds, answers)]
    asked = np.ones((len(pairs), len(rules.compared)), dtype=bool)
    scores = np.zeros(asked.shape)
    for c, column in enumerate(rules.compared):
        golds, answers = list(gold[column]), list(answer[column])
        cells = [(answers[j], golds[i]) for i, j in pairs]
        asked[:, c] = [not tables.is_missing(target) for _, target in cells]
        scores[:, c] = _column(rules.rule(column), column, cells, judge)
    items = width * (len(key) + (asked * scores).sum(axis=1)) / (len(key) + asked.sum(axis=1))  # [pairs]
    rows = np.where(asked, scores, 1.0).min(axis=1, initial=1.0)
    right, at = np.zeros(2), 0  # rows, items
    for golds, answers in groups:
        size = (len(golds), len(answers))
        each = np.stack([rows, items])[:, at : at + size[0] * size[1]].reshape(2, *size)
        at += size[0] * size[1]
        if size[0] < size[1]:
            right += [worth[linear_sum_assignment(worth)].sum() for worth in each]
        else:
            best = linear_sum_assignment(each[1] + ROW_WEIGHT * each[0], maximize=True)
            right += each[:, *best].sum(axis=1)
    return _score(right[0], right[1], len(answer), len(gold), width)


def _column(rule: Rule, column: str, cells: list[tuple[str, str]], judge: Judge | None) -> np.ndarray:
    """Strict scores of (answer, gold) cells: the mean over the column's metrics, and 1 for cells that say the same."""
    same = np.array([tables.say_the_same(*pair) for pair in cells], dtype=bool)
    total = np.zeros(len(cells))
    for metric in rule.metric:
        # Words end at spaces, which norm_str removes.
        steps = tuple(step for step in rule.preprocess if (metric, step) != ("in_match", "norm_str"))
        prepared = [tuple(tables.prepare_strict(cell, steps) for cell in pair) for pair in cells]
        open_pairs = [n for n, pair in enumerate(prepared) if not same[n] and None not in pair]
        here = [(str(answer), str(target)) for answer, target in (prepared[n] for n in open_pairs)]
        if metric == "llm_judge":
            total[open_pairs] += _judged(judge, column, rule, here)
        else:
            total[open_pairs] += [tables.matches_strictly(metric, *pair, rule.criterion) for pair in here]
    return np.where(same, 1.0, total / len(rule.metric))


def _judged(judge: Judge | None, column: str, rule: Rule, cells: list[tuple[str, str]]) -> np.ndarray:
    if judge is None or not cells:
        return np.zeros(len(cells))
    answers, golds = zip(*cells, strict=True)
    scores = np.asarray(judge(list(answers), list(golds), rule.criterion), dtype=float)
    if scores.shape != (len(cells),) or not np.isin(scores, (0, 1)).all():
        raise ValueError(f"column {column!r}: a judge gives a 0 or 1 for each of {len(cells)} pairs, not {scores}")
    return scores


def _aligned(answer: pd.DataFrame, gold: pd.DataFrame, rules: Evaluation, align: Align | None) -> pd.DataFrame:
    answer = answer.copy()
    for column in rules.unique_columns:
        if align and {"exact_match", "llm_judge"} & set(rules.rule(column).metric):
            names = align(list(answer[column]), list(gold[column]))
            answer[column] = [names.get(cell, cell) for cell in answer[column]]
    return answer


def _keys(table: pd.DataFrame, key: list[str], strict: Evaluation | None = None) -> list[tuple[str, ...]]:
    """Each row's key. With rules, prepared after them and normalised; a missing part is "", and so is no number at all."""
    columns = [list(table[column]) for column in key]
    if strict:
        columns = [
            [tables.strict_key(cell, strict.rule(column).preprocess) for cell in cells]
            for column, cells in zip(key, columns, strict=True)
        ]
    return list(zip(*columns, strict=True))


def _groups(gold: list[tuple[str, ...]], answer: list[tuple[str, ...]]) -> Groups:
    """Positions of rows that share a key, per key that is on both sides."""
    places: dict[tuple[str, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, keys in enumerate((gold, answer)):
        for place, name in enumerate(keys):
            places[name][side].append(place)
    return [group for group in places.values() if all(group)]


def _identical(gold: pd.DataFrame, answer: pd.DataFrame, rules: Evaluation) -> bool:
    """Row by row once sorted; columns in another order make another table, as in the public evaluation."""
    same_shape = len(gold) == len(answer) and list(gold.columns) == list(answer.columns)
    by = list(rules.required)
    return same_shape and bool((gold.sort_values(by).to_numpy() == answer.sort_values(by).to_numpy()).all())


def _score(rows: float, items: float, predicted: int, expected: int, width: int, identical: bool = False) -> Score:
    """From true positives in rows and items, and the numbers of rows of the answer and of gold."""
    by_row, by_item = _ratios(rows, predicted, expected), _ratios(items, predicted * width, expected * width)
    return Score(int(identical or {*by_row, *by_item} == {1.0}), *by_row, *by_item)


def _ratios(right: float, predicted: int, expected: int) -> tuple[float, float, float]:
    """Precision, recall, F1."""
    precision, recall = (float(right) / predicted if predicted else 0.0), float(right) / expected
    both = precision + recall
    return precision, recall, 2 * precision * recall / both if both > 1e-9 else 0.0


def evaluate(
    tasks: Iterable[Task],
    responses: Iterable[Response],
    mode: Mode = "compatible",
    *,
    judge: Judge | None = None,
    align: Align | None = None,
) -> Report:
    """Score every trial of every task and average: over a task's trials, then over tasks.

    Raises:
        ValueError: there are no tasks or answers, a task lacks a trial that another has, an answer belongs to no task or
            comes twice, or what `score` refuses.
    """
    known = {task.instance_id: task for task in tasks}
    answers: dict[tuple[str, int], str | None] = {}
    for each in responses:
        if each.instance_id not in known:
            raise ValueError(f"an answer belongs to task {each.instance_id!r}, which is not among the tasks")
        if (each.instance_id, each.trial) in answers:
            raise ValueError(f"trial {each.trial} of task {each.instance_id!r} is there twice")
        answers[each.instance_id, each.trial] = each.response
    if not answers:
        raise ValueError("no tasks or no answers to score")
    trials = sorted({trial for _, trial in answers})
    for at in product(known, trials):
        if at not in answers:
            raise ValueError(f"task {at[0]!r} lacks trial {at[1]}, which other tasks have")
    scores = {at: score(known[at[0]], answers[at], mode, judge=judge, align=align) for at in product(known, trials)}
    rows = [{"instance_id": name, "trial": trial, **asdict(each)} for (name, trial), each in scores.items()]
    frame = pd.DataFrame(rows)
    grouped = frame.groupby("instance_id")[list(NUMBERS)]
    averages = {f"{name}@N": getattr(grouped, how)().mean().to_dict() for name, how in AVERAGES.items()}
    columns = ["instance_id", "trial", "note"]
    notes = [{name: row[name] for name in columns} for row in rows if row["note"]]
    return Report(mode, len(trials), averages, frame.drop(columns="note").to_dict("records"), notes)
