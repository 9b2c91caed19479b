"""The sub-agent's language, the script it learns from, and what a stage leaves."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25lite.swarm import Agent, Limits, Reply, ScriptedPolicy, Trace
from k25lite.swarm.agent import Work
from k25lite.swarm.calibration import Calibration
from k25lite.swarm.limits import Account
from k25lite.swarm.search import tools
from k25lite.swarm.subagent import (
    ANSWER,
    LETTERS,
    Subagent,
    assignment,
    parse,
    render,
    row_of,
    rows_of,
    search_engine,
    subagent_policy,
    subagent_tokenizer,
    table_of,
    turns,
    work_prompt,
    written,
)
from k25lite.swarm.subagent_training import (
    CALIBRATION,
    SIZES,
    Size,
    SubagentRun,
    curriculum,
    demonstrate,
    demonstrations,
    renamed,
    subagent_stage,
    told,
    words_alike,
)
from k25lite.swarm.tables import parse_table
from k25lite.swarm.tools import as_tools
from k25lite.world.entities import entity_names
from k25lite.world.library import ATTRIBUTES, UNKNOWN, Library

TINY = Size((4, 2, 2, 2), 20, trials=1, alone_trials=2, names=(1, 4), alone_names=(1, 3))
NAMES = [f"{first} {last}" for first, last in zip(entity_names(40)[::2], entity_names(40)[1::2], strict=True)]
ARTICLE = (
    "year 4 . this page tells of ada bo . formerly ada bo eats plums . ada bo is also called cy di . "
    "the cat of ada bo eats figs . ada bo eats trout . cy di lives in the cave . ada bo sells beans ."
)

names = st.sampled_from(NAMES)
facts = st.dictionaries(st.sampled_from(list(ATTRIBUTES)), st.sampled_from(["figs", "cave", UNKNOWN]), min_size=1)


def run(policy, library, prompt, steps=50):
    limits = Limits(steps=steps)
    agent = Agent("sub-agent", policy, tools=as_tools(tools(search_engine(library.documents))), limits=limits)
    return asyncio.run(Work(agent, "0", Trace(), Account(limits)).run(prompt))


def demonstration(count):
    """Messages of a whole conversation, as the runtime passes them on."""
    seen = []

    def watch(messages):
        reply = demonstrate(messages)
        seen[:] = [*messages, reply.message]
        return reply

    library = Library(11, people=40)
    run(ScriptedPolicy(watch), library, work_prompt([p.name for p in library.people[:count]], ["food", "fear"]))
    return seen


def test_a_sentence_tells_of_whoever_stands_before_its_verb():
    assert told(ARTICLE, "ada bo", "food") == "trout"
    assert told(ARTICLE, "ada bo", "home") == UNKNOWN
    assert told(ARTICLE, "cy di", "home") == "cave"
    assert told(ARTICLE, "da bo", "food") == UNKNOWN


def test_the_script_reads_everybody_and_says_what_the_articles_say():
    library = Library(3, people=60)
    people = library.people[:8]
    result = run(Subagent(ScriptedPolicy(demonstrate)), library, work_prompt([p.name for p in people], ATTRIBUTES))
    rows = rows_of(result.answer)
    assert list(rows) == [person.name for person in people]
    for person in people:
        for relation, cell in zip(ATTRIBUTES, rows[person.name], strict=True):
            if person.told[relation] in ("plain", "outdated", "former", "confirmed", "missing"):
                assert cell == person.facts[relation]
            elif person.told[relation] == "elsewhere":
                assert cell == UNKNOWN
    assert result.steps == len(people) + 1


def test_an_assignment_that_is_too_large_fails():
    library = Library(3, people=60)
    people = [person.name for person in library.people[:6]]
    result = run(Subagent(ScriptedPolicy(demonstrate)), library, work_prompt(people, ["food"]), steps=4)
    assert (result.status, result.reason, result.steps) == ("failed", "limit of steps reached", 4)


def test_of_whom_no_page_tells_nothing_is_known():
    result = run(Subagent(ScriptedPolicy(demonstrate)), Library(3, people=20), work_prompt(["ada bo"], ["food"]))
    assert (result.answer, result.steps) == ("ada bo : food unknown", 2)


def test_every_demonstration_is_in_the_vocabulary_and_is_what_the_runtime_sees():
    words = subagent_tokenizer()
    for document in demonstrations(1, 30, 4):
        assert words.unk_token_id not in words(document.text)["input_ids"]
    messages = demonstration(4)
    *before, (prompt, answer) = turns(messages)
    assert render(messages[:-1]) == " ".join([*(f"{read} {reply} ." for read, reply in before), prompt])
    assert render(messages) == f"{render(messages[:-1])} {answer} ."


def test_what_is_written_is_parsed_as_what_was_meant():
    messages = demonstration(5)
    letters = assignment(messages[0]["content"])[1]
    for message in messages[1::2]:
        reply = parse(written(message, letters))
        meant = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
        assert [(c.name, json.loads(c.arguments)) for c in reply.calls] == meant
        assert reply.content == message["content"]


def test_replies_survive_the_tokenizer():
    words = subagent_tokenizer()
    for _, reply in turns(demonstration(5)):
        ids = words(reply, add_special_tokens=False)["input_ids"]
        assert parse(words.decode(ids)) == parse(reply)


@given(st.text(alphabet=st.sampled_from("ab :;,.\n|") | st.characters()))
def test_whatever_is_written_is_a_reply(text):
    reply = parse(text)
    assert len(reply.calls) <= 1
    table = parse_table(table_of(rows_of(reply.content), ["food"]))
    assert table is not None
    assert list(table.columns) == ["name", "food"]


@given(st.dictionaries(names, facts, min_size=1, max_size=6))
def test_rows_come_back_from_an_answer(people):
    answer = "\n".join(row_of(name, known) for name, known in people.items())
    rows = rows_of(answer)
    assert rows == {name: list(known.values()) for name, known in people.items()}
    reply = Reply(answer)
    for first in (0, 30):  # letters begin again after the last one
        letters = assignment(work_prompt(people, ["food"], first))[1]
        assert parse(written(reply.message, letters)) == reply


def test_malformed_lines_are_left_out():
    answer = (
        "a b : food figs , home cave\nc d food figs\ne f : food\n: food figs\na b : food beans , home tower\ng h : figs"
    )
    assert rows_of(answer) == {"a b": ["figs", "cave"]}


def test_a_table_is_read_by_the_metric_and_has_no_rows_of_another_width():
    table = parse_table(table_of({"a b": ["figs", "cave"], "c d": ["figs"]}, ["food", "home"]))
    assert table.to_dict("records") == [{"name": "a b", "food": "figs", "home": "cave"}]


def test_an_assignment_is_read_as_it_was_written():
    prompt = work_prompt(["ada bo", "cy di", "ada bo"], ["food", "home"], len(LETTERS) - 1)
    assert prompt == "food , home of 9 ada bo A cy di B answer"
    assert assignment(prompt) == (["food", "home"], {"ada bo": "9", "cy di": "A", ANSWER: "B"})


@pytest.mark.parametrize(
    ("people", "columns", "message"),
    [
        ([], ["food"], "names of two words"),
        (["a"], ["food"], "names of two words"),
        (["a b ; c d"], ["food"], "names of two words"),
        (["a b"], [], "columns are some of"),
        (["a b"], ["colour"], "columns are some of"),
    ],
)
def test_an_assignment_that_makes_no_sense_is_refused(people, columns, message):
    with pytest.raises(ValueError, match=message):
        work_prompt(people, columns)


def test_renaming_changes_words_and_nothing_that_matters():
    rows, _ = curriculum(0, TINY)
    (row, *_), alike = rows["up to 3"], words_alike()
    other = renamed(row, np.random.default_rng(5))
    kinds = np.arange(len(subagent_tokenizer()))
    for number, group in enumerate(alike):
        kinds[group] = -1 - number
    np.testing.assert_array_equal(kinds[row.input_ids], kinds[other.input_ids])
    assert (row.input_ids != other.input_ids).sum() > 50
    # Equal words stay equal, different ones different: the new ids are a function of the old ones, and the other way round.
    pairs = set(zip(row.input_ids.tolist(), other.input_ids.tolist(), strict=True))
    assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})
    np.testing.assert_array_equal(row.labels == -100, other.labels == -100)
    asked = other.labels != -100
    np.testing.assert_array_equal(other.labels[asked], other.input_ids[asked])


def test_a_curriculum_uses_every_row_once_and_begins_with_one_name():
    rows, steps = curriculum(0, TINY)
    used = [pair for step in steps for pair in step]
    assert sorted(used) == sorted((stream, i) for stream, part in rows.items() for i in range(len(part)))
    assert [step[0][0] for step in steps] == ["up to 1"] * 4 + [
        f"up to {most}" for most in (3, 6, 12) for _ in range(2)
    ]


def test_a_profile_must_be_known():
    with pytest.raises(ValueError, match="a profile is one of smoke, lite, full, anew, got 'tiny'"):
        SubagentRun(0, "tiny")


def test_a_stage_leaves_a_policy_that_works_in_the_runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("K25LITE_STAGES", str(tmp_path))
    monkeypatch.setitem(SIZES, "anew", TINY)
    folder = subagent_stage(SubagentRun(0, "anew"), progress=False)
    assert subagent_stage(SubagentRun(0, "anew")) == folder
    for name, limit, trials in (("team", 12, TINY.trials), ("alone", 400, TINY.alone_trials)):
        calibration = Calibration.load(folder / CALIBRATION, name)
        assert calibration.limit == limit
        assert all(len(part) == trials for part in calibration.trials)
    library = Library(1, people=20)
    policy = subagent_policy(folder, max_new_tokens=20)
    result = run(policy, library, work_prompt([library.people[0].name], ["food"]), steps=3)
    assert not result.reason.startswith("policy: "), result.reason
    assert result.tokens > 0
