"""Search: what BM25 says is found, whatever a model writes is survived, and fifty agents at once get what one would."""

import asyncio
import json
import math
import pickle
import random
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import boss, subs, told

from k25lite.swarm import Orchestrator, Reply, ScriptedPolicy, Tool, Trace, call
from k25lite.swarm.search import TITLE_WEIGHT, WORDS, Found, Hit, SearchEngine, tools
from k25lite.world.entities import entity_names
from k25lite.world.families import vocabulary
from k25lite.world.library import WORDS as LIBRARY_WORDS
from k25lite.world.library import Library

SMALL = {
    "Ada Kiru": "ada kiru eats figs .",
    "bo kiru": "bo kiru lives in the harbour . bo kiru fears thunder .",
    "tale 12": "the tale tells of harbours , figs and thunder .",
}


@pytest.fixture(scope="module")
def library():
    return Library(0, people=150)


@pytest.fixture(scope="module")
def engine(library):
    return SearchEngine(library.documents)


def all_titles(engine, query):
    titles, page, more = [], 1, True
    while more:
        found = engine.search(query, page)
        titles += [hit.title for hit in found.hits]
        page, more = page + 1, found.more
    return titles


def ask(tool, **arguments):
    return asyncio.run(Tool(tool)(json.dumps(arguments)))


def bm25(documents: dict[str, str], query: list[str]) -> dict[str, float]:
    """Title -> score of all documents that hold all the words, or else any: by the formula, over every document.

    Words weigh more in titles, and a document is as long as title and text together, as FTS5 documents it.
    """
    k1, b = 1.2, 0.75
    terms = list(dict.fromkeys(query))
    length = {title: len(f"{title} {text}".split()) for title, text in documents.items()}
    mean = sum(length.values()) / len(documents)
    holds = {term: [t for t, text in documents.items() if term in f"{t} {text}".split()] for term in terms}
    terms = [term for term in terms if holds[term]]
    scores = dict.fromkeys(documents, 0.0)
    for term in terms:
        weight = math.log((len(documents) - len(holds[term]) + 0.5) / (len(holds[term]) + 0.5))
        for title in holds[term]:
            often = TITLE_WEIGHT * title.split().count(term) + documents[title].split().count(term)
            norm = k1 * (1 - b + b * length[title] / mean)
            scores[title] += max(weight, 1e-6) * often * (k1 + 1) / (often + norm)
    found = set(documents).intersection(*(holds[term] for term in terms)) if terms else set()
    found = found or {title for term in terms for title in holds[term]}
    return {title: scores[title] for title in found}


def test_everybody_is_found_by_name_and_read_by_title(library, engine):
    for person in library.people:
        assert engine.search(person.name).hits[0].title == person.name
        assert engine.search(f'"{person.name.upper()}" ?').hits[0].title == person.name
    for title, text in library.documents.items():
        assert engine.read(title) == engine.read(f"  {title.upper()}\n") == text
        assert title in all_titles(engine, title)
    assert engine.read("nobody") is None


@pytest.mark.parametrize("seed", range(12))
def test_ranking_is_that_of_the_formula(seed):
    # Names end in vowels that English stemming leaves alone.
    words, draw = [name for name in entity_names(80) if name[-1] in "aou"][:14], random.Random(seed)

    def some(least, most):
        return draw.choices(words, range(1, len(words) + 1), k=draw.randint(least, most))

    documents = {f"{' '.join(some(1, 2))} {number}": " ".join(some(3, 30)) for number in range(40)}
    engine = SearchEngine(documents, page_size=7)
    for _ in range(20):
        query = some(1, 4) + draw.sample(["zzz", "qqq"], draw.randint(0, 1))
        scores, found = bm25(documents, query), all_titles(engine, " ".join(query))
        assert len(found) == len(set(found))
        assert set(found) == set(scores)
        in_order = [scores[title] for title in found]
        assert all(after <= before + 1e-9 for before, after in pairwise(in_order))


def test_all_words_before_some_and_words_that_nobody_uses_are_passed_over():
    engine = SearchEngine(SMALL)
    assert all_titles(engine, "kiru figs") == ["Ada Kiru"]
    assert set(all_titles(engine, "ada harbour")) == {"Ada Kiru", "bo kiru", "tale 12"}, "nothing holds both"
    assert all_titles(engine, "where does bo kiru live ?") == ["bo kiru"]
    assert all_titles(engine, "Fíg eating") == ["Ada Kiru"], "accents and endings do not matter"
    assert all_titles(engine, "xyzzy") == []


def test_of_equals_the_first_given_comes_first():
    titles = [f"page {letter}" for letter in "qwertyuiopasdfghjklm"]
    assert all_titles(SearchEngine(dict.fromkeys(titles, "figs and plums")), "plums") == titles


def test_snippets_show_where_the_words_stand_within_the_length_asked_for():
    text = " . ".join(f"somebody plays the drum number {n}" for n in range(30)) + " . the end of it is a whistle ."
    for words in (4, 20):
        (hit,) = SearchEngine({"long": text}, snippet_words=words).search("whistle").hits
        assert "whistle" in hit.snippet
        assert len(re.findall("[a-z0-9]+", hit.snippet)) <= words
        assert "\n" not in SearchEngine({"a": "b\n\nc"}).search("b").hits[0].snippet


def test_pages_are_parts_of_the_whole(library):
    narrow, wide = SearchEngine(library.documents, page_size=3), SearchEngine(library.documents, page_size=1000)
    for query in ("lives in the harbour", "smith", "tale", library.people[0].name):
        whole = wide.search(query)
        assert not whole.more
        assert all_titles(narrow, query) == [hit.title for hit in whole.hits]
    assert narrow.search("harbour", 10**6) == narrow.search("harbour", 10**400) == Found()
    with pytest.raises(ValueError, match="counted from 1"):
        narrow.search("harbour", 0)


HOSTILE = [
    "", " ", '"', '""', "'", "'; drop table document; --", "AND", "OR NOT AND", "NEAR(figs kiru, 2)", "title : figs",
    "{title text} : figs", "-figs", "^figs", "figs*", "fi*", "(" * 5000, '"figs', "figs AND (", "figs + kiru", "a-b_c",
    "\0", "figs\0kiru", "\ud800", "figs \udfff", "\N{PILE OF POO}", "%s %d {}", "\\", "?1", ":x", "rowid", "_", "²", "中文",
    "x" * 1_000_000, "figs " * 200_000, '"' * 1_000_000, "\0" * 1_000_000, " ".join(map(str, range(100_000))),
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_whatever_a_model_writes_is_an_observation(text):
    engine = SearchEngine(SMALL)
    search, read = tools(engine)
    assert asyncio.run(search(text)).startswith(("nothing found", "Ada Kiru :", "bo kiru :", "tale 12 :"))
    said = asyncio.run(read(text))
    assert said.startswith("no page is called")
    assert len(said) < 500
    if "figs" in text:
        assert engine.search(text).hits
    assert {title: engine.read(title) for title in SMALL} == SMALL, "and harms nothing"


HYPOTHESIS_ENGINE = SearchEngine(SMALL)


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=[]), max_size=60), st.integers(1, 10**30))
def test_no_text_and_no_page_make_the_engine_fail(text, page):
    found = HYPOTHESIS_ENGINE.search(text, page)
    assert all(hit.title in SMALL for hit in found.hits)
    assert HYPOTHESIS_ENGINE.read(text) in (None, *SMALL.values())
    assert HYPOTHESIS_ENGINE.search(f"figs {text}").hits


def test_what_stands_first_in_a_query_of_a_megabyte_is_looked_for():
    assert SearchEngine(SMALL).search("figs " + '")(*:^ ' * 150_000).hits


def test_fifty_threads_get_what_one_would(library, engine):
    queries = [f"{person.name} {word}" for person in library.people for word in ("", "eats", "lives in the")]
    alone = [(engine.search(query), engine.read(query.strip())) for query in queries]
    begin = threading.Barrier(50)

    def work(number):
        begin.wait()
        order = random.Random(number).sample(range(len(queries)), 40)
        return [(index, engine.search(queries[index]), engine.read(queries[index].strip())) for index in order]

    with ThreadPoolExecutor(50) as threads:
        done = [result for results in threads.map(work, range(50)) for result in results]
    assert len(done) == 2000
    assert all((found, text) == alone[index] for index, found, text in done)


def test_fifty_agents_at_once_each_find_and_read_their_person(library, engine):
    people = {person.name: library.documents[person.name] for person in library.people[:50]}

    def script(prompt, step):
        return [Reply(calls=(call("search", query=prompt),)), Reply(calls=(call("read", title=prompt),)), "read"][step]

    swarm = Orchestrator(boss(list(people), "done"), sub_policy=subs(script), sub_tools=tools(engine, latency_s=0.001))
    trace = Trace()
    assert swarm.run_sync("read them all", trace).done
    seen = Counter(event["content"] for event in trace.events if event.get("tool") == "read")
    assert seen == Counter(people.values())
    found = [event["content"] for event in trace.events if event.get("tool") == "search"]
    assert sorted(content.partition(" : ")[0] for content in found) == sorted(people)


def test_what_the_tools_say():
    search, read = tools(SearchEngine(SMALL, page_size=1))
    assert ask(search, query="kiru fears") == "bo kiru : bo kiru lives in the harbour . bo kiru fears thunder ."
    assert ask(search, query="kiru").splitlines()[1:] == ["more on page 2"]
    assert ask(search, query="kiru", page=2).startswith("bo kiru : ")
    assert "more" not in ask(search, query="kiru", page=2)
    assert ask(search, query="kiru", page=3) == "nothing more on page 3"
    assert ask(search, query="xyzzy") == "nothing found , try other words"
    assert ask(read, title="ada kiru") == SMALL["Ada Kiru"]
    assert ask(read, title="kiru figs") == "no page is called kiru figs , perhaps : Ada Kiru"
    assert ask(read, title="xyzzy") == "no page is called xyzzy"
    assert ask(search, query="kiru", page=0).startswith("error: search: page: ")
    assert ask(search).startswith("error: search: query: ")


def test_the_schemas_that_models_see():
    search, read = (Tool(function).schema["function"] for function in tools(SearchEngine(SMALL)))
    assert (search["name"], read["name"]) == ("search", "read")
    assert search["description"].startswith("Search all documents")
    assert (search["parameters"]["required"], read["parameters"]["required"]) == (["query"], ["title"])
    assert search["parameters"]["properties"]["page"]["minimum"] == 1


def test_all_that_the_tools_say_is_in_declared_words(library, engine):
    search, read = tools(engine)
    name = library.people[0].name
    said = [
        ask(search, query=name),
        ask(search, query="harbour"),
        ask(search, query="xyz"),
        ask(search, query="a", page=99),
    ]
    said += [ask(read, title=f"{name} tale"), ask(read, title=name)]
    words = {word for text in said for word in re.findall("[a-z]+(?:-[a-z]+)?", text)}
    assert words <= {*vocabulary(), *LIBRARY_WORDS, *WORDS}


def test_latency_is_waited_for_by_each_call_and_by_nobody_else(monkeypatch):
    waited = []
    sleep = asyncio.sleep

    async def counted(seconds):
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr("k25lite.swarm.search.asyncio.sleep", counted)
    search, read = tools(SearchEngine(SMALL), latency_s=0.25)

    async def both():
        return await asyncio.gather(search("figs"), read("bo kiru"))

    asyncio.run(both())
    assert waited == [0.25, 0.25]
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="latency_s is in seconds"):
            tools(SearchEngine(SMALL), wrong)


class Web:
    """A web search as a user would plug it in."""

    async def search(self, query: str, page: int = 1) -> Found:
        if query == "down":
            raise ConnectionError("no route to host")
        return Found((Hit("https://example.org/figs", f"all about {query}"),), more=True)

    async def read(self, title: str) -> str | None:
        return "figs are fruit" if title.startswith("https") else None


class BlockingWeb:
    def search(self, query: str, page: int = 1) -> Found:
        assert threading.current_thread() is not threading.main_thread(), "a slow engine would stop all other agents"
        return asyncio.run(Web().search(query, page))

    def read(self, title: str) -> str | None:
        return asyncio.run(Web().read(title))


@pytest.mark.parametrize("web", [Web(), BlockingWeb()], ids=["async", "blocking"])
def test_a_web_search_takes_the_place_of_the_engine(web):
    search, read = tools(web)
    assert ask(search, query="figs") == "https://example.org/figs : all about figs\nmore on page 2"
    assert ask(read, title="https://example.org/figs") == "figs are fruit"
    assert ask(read, title="figs") == "no page is called figs , perhaps : https://example.org/figs"
    assert ask(search, query="down") == "error: search: ConnectionError: no route to host"


def test_an_agent_uses_them_as_any_other_tools():
    policy = ScriptedPolicy(
        [Reply(calls=(call("search", query="who eats figs"), call("read", title="bo kiru"))), "done"]
    )
    seen = []

    def look(messages):
        if messages[-1]["role"] == "tool":
            seen.extend(told(messages))
        return policy.replies[sum(message["role"] == "assistant" for message in messages)]

    assert Orchestrator(ScriptedPolicy(look), tools(SearchEngine(SMALL))).run_sync("who?").answer == "done"
    assert seen == ["Ada Kiru : ada kiru eats figs .", SMALL["bo kiru"]]


def test_a_copy_is_as_good(library):
    first = SearchEngine(library.documents, page_size=4)
    copy = pickle.loads(pickle.dumps(first))
    for query in ("harbour", "works as a smith", library.people[3].name):
        assert copy.search(query, 2) == first.search(query, 2)
        assert copy.read(query) == first.read(query)


def test_what_is_no_library_is_refused():
    with pytest.raises(ValueError, match="two titles read alike: 'A b' and 'a  B'"):
        SearchEngine({"A b": "", "a  B": ""})
    for text in (None, "\ud800"):
        with pytest.raises(ValueError, match="documents: "):
            SearchEngine({"a": text})
    for wrong in ({"page_size": 0}, {"snippet_words": 0}, {"snippet_words": 65}):
        with pytest.raises(ValueError, match="page_size is 1 or more"):
            SearchEngine(SMALL, **wrong)


def test_a_library_without_documents_finds_nothing():
    engine = SearchEngine({})
    assert (engine.search("figs"), engine.read("figs")) == (Found(), None)
