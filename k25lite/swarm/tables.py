"""Tables in answers: finding them in a text, reading their cells, normalising and comparing cells.

Source: WideSearch evaluation, 2025. There are two readings of everything. The *compatible* one repeats what that evaluation
computes, its holes included: pandas guesses the types of columns ("007" becomes "7"), and a cell that cannot be parsed
equals another such cell. The *strict* one, for rewards, keeps cells as they were written, and what cannot be parsed equals
nothing but its own text.
Not covered: escaped pipes within a cell, HTML tables, dates in other languages than English and Chinese (strict only).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import cache, lru_cache
from io import StringIO
from typing import Any
from urllib.parse import urlsplit

import pandas as pd

NULL = "NULL"  # what `extract_number` makes of a cell without a number
MISSING = frozenset({"", "nan", "nat", "<na>", "none", "null"})  # how programs write a cell that is not there
LONGEST_DATE = (
    100  # characters; longer cells are no dates in the strict reading, and a parser would work on them for long
)
WIDEST = 1000  # columns; a wider table is not read, for pandas would work on it for long
NEAR_DAYS = 31
FIRST_DAY = {"PREFER_DAY_OF_MONTH": "first"}

FENCE = "```"
PIPE_LINES = re.compile(r"(?:\|.*\n?)+")
NUMBER = re.compile(r"[-+]?(?:\d*\.\d+|\d+\.?)%?")
WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+(?:[.,]\d+)*")  # Chinese has no spaces: every character is one
URL = re.compile(r"https?://[!$-_a-z]+")  # as broad as in the public evaluation: no ~ and no #, but brackets and <>


class UnreadableCell(Exception):
    """The public evaluation stops at such a cell, and the whole answer scores 0."""


def normalise_header(name: object) -> str:
    """The name of a column as both sides are compared: stripped, in lower case, without spaces."""
    return str(name).strip().lower().replace(" ", "")


def table_lines(text: str) -> list[str]:
    """The lines of an answer's table, the header first, separators left out; none if there is no table.

    The first block fenced as markdown counts. Without one, and with at least four pipes, the first run of lines that
    begin with a pipe does (the first of them may begin within its line).
    """
    opening = f"{FENCE}markdown"
    start = text.find(opening)
    end = text.find(FENCE, start + len(opening))
    if start >= 0 and end >= 0:
        body = text[start + len(opening) : end]
    elif text.count("|") >= 4 and (run := PIPE_LINES.search(text)):
        body = run[0]
    else:
        return []
    first, *rest = body.strip().split("\n")
    lines = [line.strip() for line in (first.replace(" ", "").lower(), *rest)]
    return [line for line in lines if "|" in line and not set(line) <= set("|- :")]


def parse_table(text: str) -> pd.DataFrame | None:
    """The table of an answer, every cell as it was written.

    Returns:
        Strings under normalised headers, "" where a row is too short; a row with too many cells is empty throughout,
        for nobody knows which of them is meant. Columns without a name are dropped. None if there is no table or two of
        its columns share a name. Nothing that a model writes raises.
    """
    lines = table_lines(text)
    if not lines or lines[0].count("|") > WIDEST:
        return None
    header, *rows = ([cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] for line in lines)
    names = [normalise_header(name) for name in header]
    width = len(names)
    cells = [[*row, *[""] * (width - len(row))][:width] if not any(row[width:]) else [""] * width for row in rows]
    table = pd.DataFrame(cells, columns=names, dtype=object)
    return _with_unique_names(table.loc[:, [name != "" for name in names]])


def parse_table_compatible(text: str) -> pd.DataFrame | None:
    """The table of an answer as the public evaluation reads it: through pandas, which guesses types and honours quotes.

    Returns:
        Strings under normalised headers, "nan" for what is missing; None if pandas refuses the table.
    """
    lines = table_lines(text)
    if any(line.count("|") > WIDEST for line in lines):
        return None
    try:
        table = pd.read_csv(
            StringIO("\n".join("|".join(c.strip() for c in line.split("|")) for line in lines)), sep="|"
        )
    except (ValueError, OverflowError):
        return None
    table = table.loc[:, [not str(name).startswith("Unnamed") for name in table.columns]]
    table.columns = [normalise_header(name) for name in table.columns]
    return _with_unique_names(as_strings(table))


def as_strings(table: pd.DataFrame) -> pd.DataFrame:
    """Every cell as Python prints it, "nan" for what is missing."""
    return table.astype(object).map(str)


def guessed_types(table: pd.DataFrame) -> pd.DataFrame:
    """Strings, once pandas has guessed the types of their columns, as it does when it reads the public gold files."""
    return as_strings(pd.read_csv(StringIO(table.to_csv(index=False))))


def is_missing(cell: str) -> bool:
    """Whether a cell is empty, or what a program writes for one that is: nan, NaT, <NA>, None, null."""
    return norm_str(cell) in MISSING


def _with_unique_names(table: pd.DataFrame) -> pd.DataFrame | None:
    return table.reset_index(drop=True) if len(table.columns) and table.columns.is_unique else None


def norm_str(cell: str) -> str:
    """In lower case, stripped, without spaces and asterisks."""
    return cell.lower().strip().replace(" ", "").replace("*", "")


def extract_number(cell: str) -> str:
    """The first number, commas removed, with its percent sign if it has one; "NULL" if there is none."""
    found = NUMBER.search(cell.replace(",", ""))
    return found[0] if found else NULL


def norm_date(cell: str) -> str:
    """As YYYY-MM-DD; unchanged if dateparser finds no date. A month alone is its first day."""
    date = _date(cell)
    return cell if date is None else date.strftime("%Y-%m-%d")


def _norm_date_strict(cell: str) -> str:
    date = _date_strict(cell)
    return cell if date is None else f"{date:%Y-%m-%d}"


PREPROCESS: dict[str, Callable[[str], str]] = {
    "norm_str": norm_str,
    "extract_number": extract_number,
    "norm_date": norm_date,
}


@lru_cache(maxsize=65536)
def prepare(cell: str, steps: Sequence[str]) -> str:
    """A cell after its column's preprocessing, in the given order (a tuple).

    Raises:
        UnreadableCell: a text that makes dateparser fail.
    """
    for step in steps:
        cell = PREPROCESS[step](cell)
    return cell


@lru_cache(maxsize=65536)
def prepare_strict(cell: str, steps: Sequence[str]) -> str | None:
    """The same for the strict reading: None if the cell is missing or has no number where one is extracted."""
    if is_missing(cell):
        return None
    for step in steps:
        cell = _norm_date_strict(cell) if step == "norm_date" else PREPROCESS[step](cell)
        if step == "extract_number" and cell == NULL:
            return None
    return cell


def strict_key(cell: str, steps: Sequence[str]) -> str:
    """What identifies a row in the strict reading: prepared and without case, spaces, asterisks; "" if missing.

    A cell that cannot be prepared stands for itself, so that two of them are not the same row.
    """
    prepared = prepare_strict(cell, steps)
    return norm_str(prepared if prepared is not None else "" if is_missing(cell) else cell)


def say_the_same(answer: str, gold: str) -> bool:
    """Whether both are there and differ at most in case, spaces and asterisks."""
    return norm_str(answer) == norm_str(gold) and not is_missing(gold)


def exact_match(answer: str, gold: str, criterion: Any = None) -> bool:
    """Equal but for case."""
    return answer.lower() == gold.lower()


def in_match(answer: str, gold: str, criterion: Any = None) -> bool:
    """The answer is a part of the gold cell."""
    return answer in gold


def url_match(answer: str, gold: str, criterion: Any = None) -> bool:
    """Equal sets of host names. Without any on both sides the URLs are compared: two cells without a URL are equal."""
    answers, golds = set(URL.findall(answer)), set(URL.findall(gold))
    hosts = [{host for url in urls if (host := _host(url))} for urls in (answers, golds)]
    return hosts[0] == hosts[1] if any(hosts) else answers == golds


def number_near(answer: str, gold: str, criterion: float) -> bool:
    """|answer - gold| <= |gold| * criterion, with % read as /100; the same text if neither is a number."""
    number, target = _number(answer), _number(gold)
    if number is None or target is None:
        return number is target and answer == gold
    return abs(number - target) <= abs(target) * criterion


def date_near(answer: str, gold: str, criterion: Any = None) -> bool:
    """At most 31 days apart; two cells without a date are equal.

    Raises:
        UnreadableCell: one of them has a time zone and the other has not.
    """
    date, target = (_date_or_none(cell) for cell in (answer, gold))
    if date is None or target is None:
        return date is target
    if (date.tzinfo is None) != (target.tzinfo is None):
        raise UnreadableCell(f"a time zone in one of {answer!r} and {gold!r}")
    return abs((date - target).days) <= NEAR_DAYS


METRICS: dict[str, Callable[[str, str, Any], bool]] = {
    "exact_match": exact_match,
    "in_match": in_match,
    "url_match": url_match,
    "number_near": number_near,
    "date_near": date_near,
}


def matches_strictly(metric: str, answer: str, gold: str, criterion: Any = None) -> bool:
    """A metric of `METRICS` between two prepared cells, False if one of them is not what the metric compares.

    A part of a gold cell is whole words in a row, at least half of its letters: a single one is in almost everything.
    """
    if metric == "in_match":
        words, wanted = (WORD.findall(cell.lower()) for cell in (answer, gold))
        runs = (wanted[start : start + len(words)] for start in range(len(wanted)))
        return words in runs and 2 * len("".join(words)) >= len("".join(wanted))
    if metric == "url_match":
        hosts, targets = ({_host(url).lower() for url in URL.findall(cell)} - {""} for cell in (answer, gold))
        return bool(targets) and hosts == targets
    if metric == "number_near":
        numbers = [number for cell in (answer, gold) if (number := _number(cell)) is not None and math.isfinite(number)]
        return len(numbers) == 2 and number_near(answer, gold, criterion)
    if metric == "date_near":
        date, target = _date_strict(answer), _date_strict(gold)
        return date is not None and target is not None and abs(date - target) <= timedelta(days=NEAR_DAYS)
    return answer != "" and METRICS[metric](answer, gold, criterion)


def _number(cell: str) -> float | None:
    try:
        return float(cell.replace("%", "")) / (100.0 if "%" in cell else 1.0)
    except ValueError:
        return None


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:  # brackets that hold no IPv6 address
        host = url.partition("://")[2].partition("/")[0]
        host = host.partition("@")[2] or host
        return host[1 : host.find("]")] if host.startswith("[") and "]" in host else host


@lru_cache(maxsize=65536)
def _date(cell: str) -> datetime | None:
    import dateparser  # here, because it loads for a second

    try:
        return dateparser.parse(cell, settings=FIRST_DAY)
    except Exception as error:  # it fails on odd texts in many ways
        raise UnreadableCell(f"no date parser for {cell[:40]!r}") from error


def _date_or_none(cell: str) -> datetime | None:
    try:
        return _date(cell)
    except UnreadableCell:
        return None


@lru_cache(maxsize=65536)
def _date_strict(cell: str) -> datetime | None:
    """A date with its year, whatever the day of scoring: no "yesterday", and a year alone is its first day."""
    if len(cell) > LONGEST_DATE:
        return None
    try:
        date = _strict_dates().get_date_data(cell).date_obj
    except Exception:  # as it does above
        return None
    return None if date is None else date.replace(tzinfo=None)


@cache
def _strict_dates() -> Any:
    from dateparser.date import DateDataParser

    settings = {**FIRST_DAY, "PREFER_MONTH_OF_YEAR": "first", "REQUIRE_PARTS": ["year"], "PARSERS": ["absolute-time"]}
    return DateDataParser(languages=["en", "zh"], settings=settings)
