"""The library: its documents alone, read by its rules, give every table; and it is full of ways to get them wrong."""

import hashlib
import json
import re
from collections import Counter, defaultdict

import pandas as pd
import pytest

from k25lite.processing import build_tokenizer
from k25lite.swarm.search import SearchEngine
from k25lite.world.entities import RELATIONS
from k25lite.world.families import is_held_out, vocabulary
from k25lite.world.library import ATTRIBUTES, RULES, UNKNOWN, WORDS, Library, Shares
from k25lite.world.wide_tasks import SPLITS, TRAIN_ROWS, make_task, make_tasks, split_of, write_library

# Written by hand from RULES, and from nothing that the library is generated with.
NAME = "([a-z]+ [a-z]+)"
VERBS = {
    "home": "lives in the",
    "food": "eats",
    "fear": "fears",
    "music": "plays the",
    "trade": "works as a",
}


def read_by_the_rules(
    documents: dict[str, str], years: bool = True, formerly: bool = True, names: bool = True, whole: bool = True
) -> dict[str, dict[str, str]]:
    """Name -> relation -> value, by regular expressions. Each rule can be left out, as a careless reader would.

    Args:
        years: the latest is right; otherwise what is read last. formerly: heed it. names: heed second names.
        whole: who stands before the verb is all that stands there.
    """
    called: dict[str, str] = {}
    facts: defaultdict[tuple[str, str], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for text in documents.values():
        assert text.endswith(" .")
        sentences = text.removesuffix(" .").split(" . ")
        year = re.fullmatch("year ([1-9])", sentences[0])
        assert year
        for sentence in sentences[1:]:
            if also := re.fullmatch(f"{NAME} is also called {NAME}", sentence):
                assert called.setdefault(also[2], also[1]) == also[1]
            for relation, verb in VERBS.items():
                before = "" if whole else "(?:the [a-z]+ of )?"
                told = re.fullmatch(f"(formerly )?{before}{NAME} {verb} ([a-z]+)", sentence)
                if told and not (formerly and told[1]):
                    when = int(year[1]) if years else 0
                    facts[told[2], relation][when] |= {told[3]}
    people: defaultdict[str, dict[str, str]] = defaultdict(dict)
    merged: defaultdict[tuple[str, str], defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for (who, relation), told_in in facts.items():
        for when, values in told_in.items():
            merged[called.get(who, who) if names else who, relation][when] |= values
    careful = years and formerly and names and whole
    for (who, relation), told_in in merged.items():
        latest = told_in[max(told_in)]
        assert len(latest) == 1 or not careful, f"the rules leave open of {who}: {latest}"
        people[who][relation] = min(latest)
    return people


def as_table(people: dict[str, dict[str, str]], names: list[str]) -> pd.DataFrame:
    rows = [{"name": who} | {r: people.get(who, {}).get(r, UNKNOWN) for r in VERBS} for who in sorted(names)]
    return pd.DataFrame(rows, dtype=object)


@pytest.fixture(scope="module")
def library():
    return Library(0, people=1000)


def test_the_same_on_every_platform():
    library = Library(7, people=40)
    told = json.dumps([list(library.documents.items()), library.table.to_dict("records")])
    tasks = json.dumps([task.record() for task in make_tasks(library, count=5, rows=(3, 30))])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "4d076c8871d3e91e"
    assert hashlib.sha256(tasks.encode()).hexdigest()[:16] == "d0ddbb91038be1c0"
    assert Library(8, people=40).documents.keys() != library.documents.keys()


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"missing": 1, "elsewhere": 0, "outdated": 0, "updated": 0, "former": 0, "confirmed": 0},
        {"missing": 0, "elsewhere": 1, "outdated": 0, "updated": 0, "former": 0, "confirmed": 0, "alias": 1},
        {"missing": 0, "elsewhere": 0, "outdated": 0.5, "updated": 0.5, "former": 0, "confirmed": 0, "alias": 1},
        {"missing": 0.2, "elsewhere": 0.2, "outdated": 0, "updated": 0, "former": 0.3, "confirmed": 0.3, "alias": 0.5},
    ],
    ids=["usual", "missing", "elsewhere", "conflicting", "former"],
)
@pytest.mark.parametrize(("people", "idle", "distractors"), [(300, 2, 0.5), (20, 6, 10), (100, 0, 0)])
def test_the_rules_and_the_documents_give_every_fact(shares, people, idle, distractors):
    library = Library(3, people, idle, distractors, Shares(**shares))
    names = [person.name for person in library.people]
    assert set(names) <= library.documents.keys()
    found = read_by_the_rules(library.documents)
    assert set(found) <= set(names), "and tell of nobody else"
    pd.testing.assert_frame_equal(as_table(found, names), library.table)


@pytest.mark.parametrize("rule", ["years", "formerly", "names", "whole"])
def test_a_reader_who_neglects_a_rule_errs(library, rule):
    found = read_by_the_rules(library.documents, **{rule: False})
    wrong = (as_table(found, [person.name for person in library.people]) != library.table).to_numpy().sum()
    assert wrong > 50


def test_a_reader_of_articles_alone_errs(library):
    articles = {person.name: library.documents[person.name] for person in library.people}
    wrong = as_table(read_by_the_rules(articles), list(articles)) != library.table
    assert 0.1 < wrong.drop(columns="name").to_numpy().mean() < 0.4


def test_facts_are_told_as_often_as_the_shares_say_and_where_the_sources_say(library):
    told = Counter(how for person in library.people if not person.alias for how in person.told.values())
    for how, share in library.shares.of_facts.items():
        assert told[how] / told.total() == pytest.approx(share, abs=0.015)
    assert sum(bool(person.alias) for person in library.people) == pytest.approx(200, abs=40)
    for person in library.people:
        known = {relation for relation, value in person.facts.items() if value != UNKNOWN}
        assert person.sources.keys() == known | ({"alias"} if person.alias else set())
        for relation in known:
            stated = [f". {name} {VERBS[relation]} {person.facts[relation]} ." for name in person.names]
            assert any(sentence in library.documents[person.sources[relation]] for sentence in stated)
        if person.alias:
            assert f"{person.name} is also called {person.alias} ." in library.documents[person.sources["alias"]]
    assert 0.3 < sum(person.sources.get("alias") == person.name for person in library.people) / 200 < 0.7


def test_of_whoever_has_a_second_name_something_is_told_under_it_alone(library):
    without = read_by_the_rules(library.documents, names=False)
    with_alias = [person for person in library.people if person.alias]
    assert with_alias
    for person in with_alias:
        known = {relation for relation, value in person.facts.items() if value != UNKNOWN}
        assert known - without[person.name].keys()


def test_names_differ_even_without_spaces_and_namesakes_abound(library):
    names = [name for person in library.people for name in person.names]
    assert len({name.replace(" ", "") for name in names}) == len(names)
    first = Counter(name.split()[0] for name in names)
    assert sum(first.values()) / len(first) > 5


def test_noise_can_be_chosen_and_changes_no_fact():
    quiet, loud = Library(1, people=100, idle=0, distractors=0), Library(1, people=100, idle=6, distractors=2)
    pd.testing.assert_frame_equal(quiet.table, loud.table)
    assert len(loud.documents) - len(quiet.documents) == pytest.approx(200, abs=30)
    assert not any(title.startswith(("tale", "cat", "dog", "goat")) for title in quiet.documents)
    lengths = [[len(of.documents[person.name].split(" . ")) for person in of.people] for of in (quiet, loud)]
    assert sum(lengths[1]) - sum(lengths[0]) == pytest.approx(600, abs=40)


def test_documents_and_tasks_are_short_and_in_the_declared_words(library):
    words = [*vocabulary(), *WORDS]
    assert len(set(words)) == len(words), "no word is declared twice"
    tokenizer = build_tokenizer(words)
    queries = [make_task(library, {"trade": "smith"}, [relation]).query for relation in RELATIONS]
    asked = [asked.format("") for _, asked, _ in ATTRIBUTES.values()]
    texts = [*library.documents, *library.documents.values(), *queries, *asked, UNKNOWN]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert set(WORDS) <= {word for text in texts for word in text.split()} | ATTRIBUTES.keys()
    lengths = [len(row) for row in tokenizer(list(library.documents.values()), add_special_tokens=False)["input_ids"]]
    assert 20 <= min(lengths) <= max(lengths) <= 120


@pytest.mark.parametrize(
    "change",
    [{"people": 19}, {"people": 2001}, {"idle": -1}, {"distractors": -0.1}, {"distractors": float("nan")}],
)
def test_what_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match="20 to 2000 people"):
        Library(0, **change)


@pytest.mark.parametrize("shares", [{"missing": 0.9, "elsewhere": 0.2}, {"alias": 1.1}, {"former": -0.1}])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="shares are from 0 to 1"):
        Shares(**shares)


def test_the_largest_library_with_second_names_for_all():
    library = Library(0, people=2000, idle=0, distractors=0, shares=Shares(alias=1))
    assert len({name for person in library.people for name in person.names}) == 4000


@pytest.mark.parametrize("split", SPLITS)
def test_gold_tables_follow_from_the_documents(library, split):
    facts = as_table(read_by_the_rules(library.documents), [person.name for person in library.people])
    tasks = make_tasks(library, split, count=15)
    assert len({task.instance_id for task in tasks}) == len({task.query for task in tasks}) == 15
    for task in tasks:
        wanted = " and ".join(f"{VERBS[relation]} {value}" for relation, value in task.wanted.items())
        assert task.query == f"list every person who {wanted} with {' , '.join(task.columns)}"
        rows = facts
        for relation, value in task.wanted.items():
            rows = rows[rows[relation] == value]
        expected = rows[["name", *task.columns]].reset_index(drop=True)
        pd.testing.assert_frame_equal(task.gold, expected)
        assert 10 <= len(task.gold) <= 200
        assert task.gold["name"].is_unique
        assert task.split == split


def test_no_split_leaks_into_another(library):
    sets: dict[str, set[tuple[frozenset[str], frozenset[str]]]] = {}
    rows: dict[str, set[int]] = {}
    for split in SPLITS:
        tasks = make_tasks(library, split, count=40)
        sets[split] = {(frozenset(task.wanted), frozenset(task.columns)) for task in tasks}
        rows[split] = {len(task.gold) for task in tasks}
    assert not (sets["train"] | sets["sizes"]) & (sets["attributes"] | sets["both"])
    assert max(rows["train"] | rows["attributes"]) <= TRAIN_ROWS < min(rows["sizes"] | rows["both"])
    assert len(sets["attributes"]) > 5
    assert len(sets["train"]) > 20


def test_the_order_of_relations_does_not_move_a_task_to_another_split():
    assert is_held_out("food trade : fear music")
    assert split_of(["trade", "food"], ["music", "fear"], 20) == "attributes"
    assert split_of(["food", "trade"], ["fear", "music"], 81) == "both"
    assert split_of(["home"], ["fear", "music"], 80) == "train"
    assert split_of(["home"], ["fear", "music"], 81) == "sizes"


def test_lengths_of_tables_can_be_chosen_and_spread(library):
    lengths = [len(task.gold) for task in make_tasks(library, count=30, rows=(20, 60))]
    assert min(lengths) < 28
    assert max(lengths) > 50
    assert set(lengths) <= set(range(20, 61))
    assert [t.query for t in make_tasks(library, seed=1)] != [t.query for t in make_tasks(library, seed=2)]


def test_everybody_is_wanted_once_before_anybody_is_again():
    library = Library(2, people=100)
    tasks = make_tasks(library, count=60, rows=(10, 50))
    uses = Counter(tuple(task.wanted.items()) for task in tasks)
    assert max(uses.values()) - min(uses.values()) <= 1
    with pytest.raises(ValueError, match=r"this library has \d+"):
        make_tasks(library, count=10_000)
    with pytest.raises(ValueError, match="a split is one of"):
        make_tasks(library, "test")


@pytest.mark.parametrize(
    ("wanted", "columns"),
    [
        ({}, ["food"]),
        ({"home": "cave"}, []),
        ({"home": "moon"}, ["food"]),
        ({"age": "3"}, ["food"]),
        ({"home": "cave"}, ["home"]),
        ({"home": "cave"}, ["age"]),
        ({"home": "cave"}, ["food", "food"]),
    ],
)
def test_tasks_that_cannot_be_are_refused(library, wanted, columns):
    with pytest.raises(ValueError, match="relations are home, food, fear, music, trade"):
        make_task(library, wanted, columns)


def test_files_in_the_public_layout(tmp_path):
    library = Library(5, people=200)
    tasks = [*make_tasks(library, count=4), *make_tasks(library, "attributes", count=2)]
    folder = write_library(tmp_path / "a", library, tasks)
    records = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    assert [record["instance_id"] for record in records] == [task.instance_id for task in tasks]
    for record, task in zip(records, tasks, strict=True):
        assert record.keys() == {"instance_id", "query", "language", "evaluation"}
        evaluation = json.loads(record["evaluation"])
        assert evaluation["unique_columns"] == ["name"]
        assert evaluation["required"] == list(evaluation["eval_pipeline"]) == ["name", *task.columns]
        for how in evaluation["eval_pipeline"].values():
            assert how == {"preprocess": ["norm_str"], "metric": ["exact_match"]}
        gold = pd.read_csv(folder / "gold" / f"{record['instance_id']}.csv")
        assert gold.equals(task.gold.astype(gold.dtypes))
    documents = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    assert {document["title"]: document["text"] for document in documents} == library.documents
    assert RULES in (folder / "README.md").read_text()
    again = write_library(tmp_path / "b", Library(5, people=200), tasks)
    for file in folder.rglob("*.*"):
        assert file.read_bytes() == (again / file.relative_to(folder)).read_bytes()
    with pytest.raises(ValueError, match="same instance_id"):
        write_library(tmp_path / "c", library, [tasks[0], tasks[0]])


def test_a_task_can_explain_itself_to_models_that_know_nothing(library):
    task = make_task(library, {"trade": "smith", "home": "cave"}, ["food"])
    assert RULES in task.record(explained=True)["query"]
    assert "name, food" in task.record(explained=True)["query"]
    assert RULES not in task.record()["query"]


def test_search_alone_finds_all_that_a_table_needs():
    """Search for what is wanted, then for everybody who may be meant under every name they have; read what is found."""
    library = Library(4, people=150)
    engine = SearchEngine(library.documents)
    read: dict[str, str] = {}

    def find(query):
        page, more = 1, True
        while more:
            found = engine.search(query, page)
            read.update((hit.title, engine.read(hit.title)) for hit in found.hits)
            page, more = page + 1, found.more

    task = make_task(library, {"home": "harbour"}, ["food", "trade"])
    find("lives in the harbour")
    maybe = {name for text in read.values() for name in re.findall(f"{NAME} lives in the harbour", text)}
    for name in maybe:
        find(f"{name} also called")
    also = {pair for text in read.values() for pair in re.findall(f"{NAME} is also called {NAME}", text)}
    names = maybe | {name for pair in also for name in pair if maybe & set(pair)}
    for name in names:
        find(name)
    facts = as_table(read_by_the_rules(read), [title for title in read if f"tells of {title} ." in read[title]])
    found = facts[facts["home"] == "harbour"]
    pd.testing.assert_frame_equal(found[["name", *task.columns]].reset_index(drop=True), task.gold)
    assert len(read) < len(library.documents)
