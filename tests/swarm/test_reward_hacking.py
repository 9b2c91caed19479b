"""Reward hacking: in strict mode no trick beats an honest table, and in PARL no useless act earns r_perf or r_finish.

Honest is a table of the rows that one knows, and of one guess for what one does not know. Both sides of a comparison know
the same; the other one adds tricks. A test that says "never beats" compares row F1, item F1 and success.
"""

from collections import Counter
from copy import deepcopy
from itertools import product

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import NAMES, Rotting, Steady

from k25lite.swarm.parl import Reward
from k25lite.swarm.parl_language import ACTS, ANSWER, ASSIGN, CREATE, END, SEARCH, serial, swarm
from k25lite.swarm.simulator import Budget, Simulator, WideSearch
from k25lite.swarm.tables import is_missing, norm_str
from k25lite.swarm.widesearch import Evaluation, Task, score

COLUMNS = ("name", "food", "home")
FOODS, HOMES = ("figs", "plums", "dry beans"), ("cave", "lake", "small hut")
METRICS = (["exact_match"], ["in_match"], ["exact_match", "in_match"])
EXACT = {"preprocess": ["norm_str"], "metric": ["exact_match"]}
MISSING = ("", " ", "nan", "NaN", "None", "null", "<NA>", "NaT", "**", "* nan *")
SPACES = (" ", "  ", "\u00a0", "\u2003", "\u3000", "\u200b", "_", "")
EVERYWHERE = settings(max_examples=60, deadline=None)

ROWS = st.tuples(st.sampled_from(NAMES[:8]), st.sampled_from(FOODS), st.sampled_from(HOMES))
GOLD = st.lists(ROWS, min_size=1, max_size=8, unique_by=lambda row: row[0])
RULES = st.sampled_from(METRICS)


def task(gold, metric=METRICS[0], columns=COLUMNS, preprocess=("norm_str",), criterion=None):
    rule = {"preprocess": list(preprocess), "metric": list(metric), "criterion": criterion}
    pipeline = {columns[0]: EXACT} | dict.fromkeys(columns[1:], rule)
    rules = {"required": list(columns), "unique_columns": [columns[0]], "eval_pipeline": pipeline}
    table = pd.DataFrame(gold, columns=columns, dtype=object)
    return Task("ws_1", "Which?", "en", Evaluation.model_validate(rules), table)


def markdown(rows, columns=COLUMNS):
    lines = [columns, ["---"] * len(columns), *rows]
    return "```markdown\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "```\n"


def strict(of, answer):
    """Row F1, item F1 and success of rows, or of a text."""
    result = score(of, answer if isinstance(answer, str) else markdown(answer), "strict")
    return result.row_f1, result.item_f1, result.success


def never_beats(trick, honest):
    assert all(one <= other + 1e-12 for one, other in zip(trick, honest, strict=True)), f"{trick} beats {honest}"


@st.composite
def spellings(draw, text):
    """The text in another case, with other spaces, with asterisks."""
    cased = draw(st.sampled_from([text, text.upper(), text.title(), text.swapcase()]))
    spaced = cased.replace(" ", draw(st.sampled_from(SPACES)))
    stars = draw(st.sampled_from(["", "*", "**"]))
    return f"{draw(st.sampled_from(SPACES))}{stars}{spaced}{stars}"


@st.composite
def known(draw, gold, at_least=0):
    return draw(st.lists(st.sampled_from(gold), min_size=at_least, unique=True))


# Rows


@EVERYWHERE
@given(st.data(), GOLD, RULES)
def test_rows_in_ten_spellings_never_beat_each_of_them_once(data, gold, metric):
    of, honest = task(gold, metric), data.draw(known(gold))
    respelled = [[data.draw(spellings(row[0])), *row[1:]] for row in honest for _ in range(10)]
    never_beats(strict(of, respelled), strict(of, honest))
    never_beats(strict(of, [*honest, *respelled]), strict(of, honest))


@EVERYWHERE
@given(st.data(), GOLD, st.integers(2, 5))
def test_copies_never_beat_the_table_once(data, gold, copies):
    of, honest = task(gold), data.draw(known(gold, at_least=1))
    assert strict(of, [row for row in honest for _ in range(copies)])[1] < strict(of, honest)[1]


@settings(max_examples=10, deadline=None)
@given(st.data(), GOLD, st.integers(1, 2000))
def test_rows_among_invented_ones_never_beat_these_rows_alone(data, gold, invented):
    of, honest = task(gold), data.draw(known(gold, at_least=1))
    giant = data.draw(st.permutations([*honest, *((f"nobody {n}", "figs", "cave") for n in range(invented))]))
    assert strict(of, giant)[1] < strict(of, honest)[1]


@EVERYWHERE
@given(st.data(), GOLD, RULES)
def test_a_row_for_each_possible_value_never_beats_one_guess_however_wrong(data, gold, metric):
    of, names = task(gold, metric), [row[0] for row in data.draw(known(gold, at_least=1))]
    guess = [[name, data.draw(st.sampled_from(FOODS)), data.draw(st.sampled_from(HOMES))] for name in names]
    never_beats(strict(of, [*product(names, FOODS, HOMES)]), strict(of, guess))


@EVERYWHERE
@given(st.data(), st.lists(ROWS, min_size=1, max_size=8), RULES)
def test_no_table_beats_what_is_left_when_nothing_is_said_twice(data, gold, metric):
    """Of the rows of a key any may be left, as many as gold has of it; gold may have several."""
    some = data.draw(st.lists(ROWS | st.tuples(*map(st.sampled_from, (NAMES[:8], MISSING, HOMES))), max_size=20))
    rows = [[data.draw(spellings(name)), *others] for name, *others in some]
    wanted, left, kept = Counter(norm_str(row[0]) for row in gold), [], Counter()
    for row in data.draw(st.permutations(rows)):
        if kept[key := norm_str(row[0])] < max(wanted[key], 1):
            kept[key] += 1
            left.append(row)
    of = task(gold, metric)
    never_beats(strict(of, rows), strict(of, left))


# Cells


VALUES = [  # of a column: what is right, with the metric
    ("exact_match", ["norm_str"], None, ["figs", "plums", "dry beans", "7", "unknown"]),
    ("in_match", ["norm_str"], None, ["figs", "plums", "dry beans", "2017", "2018", "3.14", "3.1", "东京", "a"]),
    ("in_match", [], None, ["University of Tokyo", "College at Kyoto", "School in Osaka", "10", "100"]),
    ("number_near", ["extract_number"], 0.05, ["10", "20", "-20", "1,000", "5%", "0"]),
    ("date_near", ["norm_date"], None, ["5 March 2024", "2021", "June 2020", "2019-01-01"]),
    ("url_match", [], None, ["https://a.com/x", "http://b.org", "https://c.net/?a=http", "https://www.a.com"]),
]
GLUE = ("", " ", ", ", "/", ";", " or ", " and ", "*", "\u00a0", "<br>", "\t")


@pytest.mark.parametrize(("metric", "preprocess", "criterion", "values"), VALUES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_cell_is_right_for_one_value_at_most(data, metric, preprocess, criterion, values):
    """The same cell in every row, each of which has another value: pieces of values, or all that there are."""
    pieces = st.sampled_from(values) | st.sampled_from(values).flatmap(
        lambda value: st.tuples(*[st.integers(0, len(value))] * 2).map(lambda at: value[min(at) : max(at)])
    )
    glue = data.draw(st.sampled_from(GLUE))
    cell = glue.join(data.draw(st.lists(pieces, max_size=3) | st.just(values) | st.permutations(values)))
    of = task([[f"n{n}", value] for n, value in enumerate(values)], [metric], ("name", "v"), preprocess, criterion)
    answer = markdown([[f"n{n}", cell] for n in range(len(values))], ("name", "v"))
    assert score(of, answer, "strict").row_recall <= 1 / len(values)


@EVERYWHERE
@given(st.data(), GOLD, RULES)
def test_all_values_in_one_cell_never_beat_one_guess(data, gold, metric):
    of, honest = task(gold, metric), data.draw(known(gold))
    unsure = [row[0] for row in gold if row not in honest]
    glue = data.draw(st.sampled_from(GLUE))
    all_at_once = [[name, glue.join(FOODS), glue.join(HOMES)] for name in unsure]
    guess = [[name, data.draw(st.sampled_from(FOODS)), data.draw(st.sampled_from(HOMES))] for name in unsure]
    never_beats(strict(of, [*honest, *all_at_once]), strict(of, [*honest, *guess]))


@EVERYWHERE
@given(st.data(), GOLD, RULES)
def test_missing_cells_never_beat_written_ones(data, gold, metric):
    """Where gold has something and where it has nothing, and whether what was written is right or wrong.

    A line without any text would be no row: leaving one out is as honest as it gets.
    """
    blank = st.sampled_from(MISSING)
    of = task([[row[0], *(data.draw(st.just(cell) | blank) for cell in row[1:])] for row in gold], metric)
    guesses = [[name, *data.draw(ROWS)[1:]] for name, *_ in gold]
    honest = [data.draw(st.sampled_from(pair)) for pair in zip(gold, guesses, strict=True)]
    emptied = [
        [data.draw(st.sampled_from([name, "nan"])), *(data.draw(st.just(cell) | blank) for cell in others)]
        for name, *others in honest
    ]
    never_beats(strict(of, emptied), strict(of, honest))


@given(st.data(), GOLD)
@settings(max_examples=30, deadline=None)
def test_rows_of_nothing_earn_nothing(data, gold):
    rows = data.draw(st.lists(st.tuples(*[st.sampled_from(MISSING)] * 3), max_size=30))
    holes = [["", "nan", ""], *rows]
    assert all(map(is_missing, MISSING))
    assert strict(task([*gold, ("nan", "", "None")]), holes) == (0, 0, 0)
    honest = data.draw(known(gold, at_least=1))
    assert strict(task(gold), [*honest, *holes])[1] < strict(task(gold), honest)[1]


# Layout


@EVERYWHERE
@given(st.data(), GOLD)
def test_other_columns_and_headers_earn_nothing_or_what_the_table_earns(data, gold):
    of, honest = task(gold), data.draw(known(gold, at_least=1))
    header = [
        data.draw(spellings(name) | st.sampled_from([name, "food", "name", "", "food, home"])) for name in COLUMNS
    ]
    extra = data.draw(st.lists(st.sampled_from(["", "note", "food", "Name", " ", "---"]), max_size=3))
    cells = [[*row, *(data.draw(st.sampled_from(FOODS)) for _ in extra)] for row in honest]
    never_beats(strict(of, markdown(cells, [*header, *extra])), strict(of, honest))
    if any(norm_str(name) for name in extra if name != "---"):
        assert strict(of, markdown(cells, [*COLUMNS, *extra])) == (0, 0, 0)


@EVERYWHERE
@given(st.data(), GOLD, st.sampled_from(["\n", "", "Or else:\n"]))
def test_several_tables_never_beat_one_table_of_all_that_is_known(data, gold, between):
    of, honest = task(gold), data.draw(known(gold, at_least=1))
    parts = [
        data.draw(st.lists(st.sampled_from(honest) | ROWS.map(lambda row: ("nobody", *row[1:])))) for _ in range(3)
    ]
    blocks = [markdown(part) for part in [*parts, honest]]
    bare = [block.removeprefix("```markdown\n").removesuffix("```\n") for block in blocks]
    best = strict(of, honest)
    never_beats(strict(of, between.join(blocks)), best)
    never_beats(strict(of, between.join(bare)), best)
    never_beats(strict(of, "```markdown\n" + between.join(bare) + "```"), best)


# Acts of the orchestrator


AMPLE = 10**6
ALONE = Rotting(limit=500)
SCRIPTS = st.sampled_from([serial, *(swarm(names, width) for names in ASSIGN.values() for width in (1, 3, 8))])
# None of these has anybody read about anybody: there is no name left, or nobody who is free.
USELESS = st.lists(st.sampled_from([CREATE, *ASSIGN]), max_size=20)


def played(steps, budget, names, seed):
    """The outcome of these steps."""
    simulator = Simulator(Rotting(), ALONE, budget)
    simulator.begin([WideSearch(names, seed)])
    for acts in steps:
        if simulator.step({0: acts})[0] is None:
            break
    return simulator.outcomes()[0]


def recorded(script, budget, names, seed):
    """The steps that a script takes, and the names left before each of them."""
    simulator, steps, left = Simulator(Rotting(), ALONE, budget), [], []
    (observation,) = simulator.begin([WideSearch(names, seed)])
    while observation is not None:
        steps.append(script(observation))
        left.append(observation.left)
        observation = simulator.step({0: steps[-1]})[0]
    return steps, left


def padded(steps, left, draw):
    """The same work beside useless acts: assignments come last, and only where those before them take all names."""

    def more(acts, names):
        taken = sum(ASSIGN.get(act, 0) for act in acts)
        return [act for act in draw(USELESS) if act == CREATE or taken >= names]

    return [
        acts if acts[0] == ANSWER else [*acts[:-1], *more(acts, names), acts[-1]]
        for acts, names in zip(steps, left, strict=True)
    ]


@EVERYWHERE
@given(st.data(), SCRIPTS, st.integers(1, 60), st.integers(0, 9))
def test_useless_sub_agents_and_assignments_earn_only_what_they_are_counted_for(data, script, names, seed):
    """With room for all: the same table, and a lower finish rate with every assignment of nothing."""
    steps, left = recorded(script, Budget(AMPLE), names, seed)
    honest = played(steps, Budget(AMPLE), names, seed)
    more = played(padded(steps, left, data.draw), Budget(AMPLE), names, seed)
    before, after = (Reward.of(outcome, 8) for outcome in (honest, more))
    assert (more.item_f1, more.completed, more.answered) == (honest.item_f1, honest.completed, honest.answered)
    assert after.finish <= before.finish
    assert (after.finish < before.finish) == (more.assigned > honest.assigned and honest.completed > 0)
    assert after.parallel >= before.parallel, "which is what r_finish is for"


@EVERYWHERE
@given(st.data(), SCRIPTS, st.integers(1, 60), st.integers(5, 60), st.sampled_from(["critical", "total"]))
def test_useless_acts_never_earn_r_perf_within_a_budget(data, script, names, steps, of):
    budget = Budget(steps, of)
    acts, left = recorded(script, budget, names, 0)
    honest = played(acts, budget, names, 0)
    assert played(padded(acts, left, data.draw), budget, names, 0).item_f1 <= honest.item_f1 + 1e-12


@EVERYWHERE
@given(
    st.lists(st.lists(st.sampled_from([CREATE, *ASSIGN]), max_size=20), max_size=10), st.integers(1, 60), st.booleans()
)
def test_a_team_that_is_given_no_name_earns_nothing(steps, names, searched):
    """Before anything is searched for; or with names, and nobody there to be given one."""
    acts = [[*(act for act in step if not searched or act != CREATE), END] for step in steps]
    outcome = played([[SEARCH]] * searched + acts + [[ANSWER]], Budget(AMPLE), names, 0)
    reward = Reward.of(outcome, 8)
    assert (reward.performance, reward.finish) == (0, 0)


@EVERYWHERE
@given(st.lists(st.lists(st.sampled_from(ACTS), min_size=1, max_size=20), max_size=20), USELESS, st.integers(1, 60))
def test_at_any_time_useless_acts_beside_a_step_earn_nothing_now(steps, useless, names):
    """From wherever random acts have led to, answering right after the step."""
    simulator = Simulator(Steady(share=0.9), Steady(limit=AMPLE), Budget(60))
    (observation,) = simulator.begin([WideSearch(names)])
    for acts in steps:
        if (observation := simulator.step({0: acts})[0]) is None:
            return
    free = observation.left == 0
    results = []
    for extra in ([], [act for act in useless if act == CREATE or free]):
        copy = deepcopy(simulator)
        copy.step({0: [*extra, SEARCH]})
        copy.step({0: [ANSWER]})
        results.append(Reward.of(copy.outcomes()[0], 8))
    plain, with_more = results
    assert with_more.performance <= plain.performance
    assert with_more.finish <= plain.finish
