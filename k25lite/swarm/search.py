"""A search engine over given documents, and the tools `search` and `read` over this or any other one.

The engine is SQLite's FTS5 with BM25, in memory. A web search takes its place by offering the same two methods
(see `Engine`); agents notice nothing.

Simplified: words and no operators, English stems, no spelling correction.
"""

from __future__ import annotations

import asyncio
import math
import re
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from inspect import isawaitable, iscoroutinefunction
from typing import Annotated, Any, Protocol

from pydantic import Field

from k25lite.swarm.tools import cut, in_thread

# Words of what the tools say on their own, for models with a closed vocabulary.
WORDS = tuple("nothing found try other words more on page no is called perhaps".split())
MAX_TERMS, MAX_CHARACTERS = 32, 10_000  # of a query; what comes later is not looked for
TITLE_WEIGHT = 2.0  # how much more a word counts in the title than in the text
_LAST_PAGE = 10**9
_SCHEMA = """
begin;
create table document (id integer primary key, key text not null unique, title text not null, text text not null);
create virtual table word using fts5
    (title, text, content = 'document', content_rowid = 'id', tokenize = 'porter unicode61 remove_diacritics 2');
"""
_SEARCH = """
select title, snippet(word, 1, '', '', ' ... ', ?) from word where word match ?
order by bm25(word, ?, 1.0), rowid limit ? offset ?
"""


@dataclass(frozen=True, slots=True)
class Hit:
    """A document found: what to `read` it by (a title, or an address), and the part of it that fits the query best."""

    title: str
    snippet: str


@dataclass(frozen=True, slots=True)
class Found:
    """One page of hits, the best first, and whether there is a next page."""

    hits: tuple[Hit, ...] = ()
    more: bool = False


class Engine(Protocol):
    """Anything that searches and reads. Both may also be `async`; those that are not are called in threads, many at a time.

    What they raise the agent is told as an observation.
    """

    def search(self, query: str, page: int = 1) -> Found | Awaitable[Found]:
        """The hits of a page, counted from 1, for whatever a model wrote."""
        ...

    def read(self, title: str) -> str | Awaitable[str | None] | None:
        """The text of a document, or None if there is none by that title or address."""
        ...


class SearchEngine:
    """Full-text search over documents, for any number of threads.

    A query finds the documents that hold all of its words, in title or text; if there are none, those that hold some. Words
    that no document holds are passed over. The best by BM25 come first, of equals the first given. Everything but letters
    and digits only separates words, so no query is malformed.

    Example:
        >>> engine = SearchEngine({"ada": "ada eats figs .", "bo": "bo eats plums ."})
        >>> [hit.title for hit in engine.search("who eats figs?").hits]
        ['ada']

    Args:
        documents: title -> text. Titles are read without regard to case and spacing.
        page_size: hits on a page. snippet_words: of a snippet, 1 to 64.

    Raises:
        ValueError: two titles that read alike, texts that are none, or a number out of range.
    """

    def __init__(self, documents: Mapping[str, str], page_size: int = 10, snippet_words: int = 16):
        if page_size < 1 or not 1 <= snippet_words <= 64:
            raise ValueError("page_size is 1 or more, snippet_words are 1 to 64")
        self.page_size, self.snippet_words = page_size, snippet_words
        # One connection for all: a pool of four served 50 threads no faster on two (busy) cores.
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        try:
            self._fill(documents)
        except (ValueError, sqlite3.Error) as error:
            raise ValueError(f"documents: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew elsewhere, from the documents."""
        documents = dict(self._rows("select title, text from document order by id"))
        return SearchEngine, (documents, self.page_size, self.snippet_words)

    def search(self, query: str, page: int = 1) -> Found:
        """
        Raises:
            ValueError: a page below 1.
        """
        if page < 1:
            raise ValueError("pages are counted from 1")
        words = dict.fromkeys(re.findall(r"[^\W_]+", query[:MAX_CHARACTERS].lower()))
        terms = [term for word in list(words)[:MAX_TERMS] if self._finds(term := f'"{word}"')]
        if not terms:
            return Found()
        match = everything if self._finds(everything := " AND ".join(terms)) else " OR ".join(terms)
        offset = (min(page, _LAST_PAGE) - 1) * self.page_size
        rows = self._rows(_SEARCH, self.snippet_words, match, TITLE_WEIGHT, self.page_size + 1, offset)
        hits = (Hit(title, " ".join(snippet.split())) for title, snippet in rows[: self.page_size])
        return Found(tuple(hits), len(rows) > self.page_size)

    def read(self, title: str) -> str | None:
        rows = self._rows("select text from document where key = ?", _key(title))
        return rows[0][0] if rows else None

    def _finds(self, match: str) -> bool:
        return bool(self._rows("select 1 from word where word match ? limit 1", match))

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        with self._lock, closing(self._connection.execute(statement, values)) as cursor:
            return cursor.fetchall()

    def _fill(self, documents: Mapping[str, str]) -> None:
        keys: dict[str, str] = {}
        for title in documents:
            if (other := keys.setdefault(_key(title), title)) != title:
                raise ValueError(f"two titles read alike: {other!r} and {title!r}")
        self._connection.executescript(_SCHEMA)
        rows = ((_key(title), title, text) for title, text in documents.items())
        self._connection.executemany("insert into document (key, title, text) values (?, ?, ?)", rows)
        self._connection.execute("insert into word (word) values ('rebuild')")
        self._connection.execute("commit")


def tools(engine: Engine, latency_s: float = 0.0) -> list[Callable[..., Awaitable[str]]]:
    """The tools `search` and `read`, to be given to agents.

    Args:
        latency_s: seconds that each call waits first, to simulate an engine that is far away. State it where you state
            times: it is chosen, not measured.

    Raises:
        ValueError: no such time.
    """
    if not 0 <= latency_s < math.inf:
        raise ValueError(f"latency_s is in seconds, 0 or more, got {latency_s}")

    async def search(query: str, page: Annotated[int, Field(ge=1)] = 1) -> str:
        """Search all documents for words. Gives titles, each with a part of its text; read one to see all of it."""
        await asyncio.sleep(latency_s)
        found = await _call(engine.search, query=query, page=page)
        if not found.hits:
            return "nothing found , try other words" if page == 1 else f"nothing more on page {page}"
        lines = [f"{hit.title} : {hit.snippet}" for hit in found.hits]
        return "\n".join([*lines, *([f"more on page {page + 1}"] if found.more else [])])

    async def read(title: str) -> str:
        """Read the document of this title."""
        await asyncio.sleep(latency_s)
        text = await _call(engine.read, title=title)
        if text is not None:
            return text
        found = await _call(engine.search, query=title)
        near = f" , perhaps : {' , '.join(hit.title for hit in found.hits[:3])}" if found.hits else ""
        return f"no page is called {cut(title, 100)}{near}"

    return [search, read]


async def _call(function: Callable[..., Any], **given: Any) -> Any:
    if iscoroutinefunction(function):
        return await function(**given)
    result = await in_thread(function, given)
    return await result if isawaitable(result) else result


def _key(title: str) -> str:
    """A title as it is looked up, whatever a model wrote: half a surrogate pair has no form in UTF-8."""
    return " ".join(title.split()).casefold().encode("utf-8", "replace").decode()
