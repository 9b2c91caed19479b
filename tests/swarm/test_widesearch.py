"""The WideSearch metric: its rules by hand, the holes of the compatible mode, and that no trick gains in the strict one."""

import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from k25lite.cli import app
from k25lite.swarm import tables
from k25lite.swarm.widesearch import (
    NUMBERS,
    Evaluation,
    Response,
    Task,
    evaluate,
    load_responses,
    load_tasks,
    score,
)

MODES = ("compatible", "strict")
EXACT = {"preprocess": ["norm_str"], "metric": ["exact_match"]}
COUNT = {"preprocess": ["extract_number"], "metric": ["number_near"], "criterion": 0.05}
DATE = {"preprocess": ["norm_date"], "metric": ["date_near"]}


def task(rows, columns=("Name", "Count"), key=("Name",), **rules):
    """A task whose columns are compared exactly unless a rule says otherwise."""
    names = [name.lower().replace(" ", "") for name in columns]
    pipeline = {name: rules.get(name, EXACT) for name in names}
    evaluation = {"required": names, "unique_columns": list(key), "eval_pipeline": pipeline}
    gold = pd.DataFrame(rows, columns=columns, dtype=object)
    return Task("ws_1", "Which?", "en", Evaluation.model_validate(evaluation), gold)


def markdown(rows, columns=("Name", "Count")):
    lines = [columns, ["---"] * len(columns), *rows]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return f"Here it is.\n```markdown\n{table}\n```\nThat is all."


def numbers(result):
    """Precision, recall and F1 of rows, then of items."""
    return [getattr(result, name) for name in NUMBERS[1:]]


FRUIT = [["Apple", "10"], ["Pear", "20"], ["Fig", "30"], ["Plum", "40"]]


# Parsing


def test_the_first_markdown_block_counts_before_any_other_table():
    text = "| a | b |\n| 1 | 2 |\n" + markdown([["x", "1"]]) + markdown([["y", "2"]])
    assert tables.parse_table(text).to_dict("records") == [{"name": "x", "count": "1"}]


def test_without_a_block_the_first_run_of_pipe_lines_counts():
    text = "Words.\n| First Name | b |\n|:---|---:|\n| x  y |  |\n\n| z | 4 |\n"
    for parse, missing in ((tables.parse_table, ""), (tables.parse_table_compatible, "nan")):
        assert parse(text).to_dict("records") == [{"firstname": "x  y", "b": missing}]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no table",
        "a | b | c",  # fewer than four pipes
        "```markdown\n```",
        "```markdown\nnothing\n```\n| name | count |\n| Apple | 10 |",  # a block is there, though without a table
        "```markdown\n| name | count |\n| Apple | 10 |",  # never closed, and then its lines count, but as ...
        "| Name | name |\n|---|---|\n| a | b |",
        "||||||",
        "|---|---|---|",
        '```markdown\n| name | count |\n| "never closed | 3 |\n```',
        "| a" * 100_000,
        "| name | count |\n|" + "a |" * 100_000,
        "\ud800 | \x00 | | | |",
    ],
)
def test_what_cannot_be_read_scores_nothing_and_does_not_raise(text):
    for mode in MODES:
        result = score(task([["Pear", "20"]]), text, mode)
        assert (result.success, *numbers(result)) == (0,) * 7
        assert score(task(FRUIT), None, mode).note == "no readable table"


def test_short_rows_are_filled_and_a_row_with_too_many_cells_is_wrong_or_makes_the_table_unreadable():
    text = "| name | count |\n|---|---|\n| Apple |\n| Pear | 20 | 30 |"
    assert tables.parse_table(text).to_numpy().tolist() == [["Apple", ""], ["", ""]]
    assert tables.parse_table_compatible(text) is None  # as in pandas


def test_the_compatible_reading_guesses_types_and_the_strict_one_does_not():
    text = markdown([["007", "1.50"], ["8", "N/A"]])
    assert tables.parse_table_compatible(text).to_numpy().tolist() == [["7", "1.5"], ["8", "nan"]]
    assert tables.parse_table(text).to_numpy().tolist() == [["007", "1.50"], ["8", "N/A"]]
    gold = task([["007", "1.50"], ["8", "N/A"]], count={"metric": ["exact_match"]})
    assert score(gold, markdown([["7", "1.5"], ["8", ""]]), "compatible").success == 1
    assert score(gold, markdown([["7", "1.5"], ["8", ""]]), "strict").item_f1 == pytest.approx(1 / 4)  # the key "8"


@given(st.text(alphabet="|-` \n\rmarkdown1%,.\"'é", max_size=200))
@settings(max_examples=60, deadline=None)
def test_no_text_makes_an_answer_raise_or_leave_the_range(text):
    for answer in (text, f"```markdown\n| name | count |\n{text}\n```"):
        for mode in MODES:
            result = score(task(FRUIT, count=COUNT), answer, mode)
            assert all(0 <= number <= 1 for number in numbers(result))


# Cells


@pytest.mark.parametrize(
    ("step", "cell", "prepared"),
    [
        ("norm_str", "  Big *Apple* ", "bigapple"),
        ("extract_number", "about 1,234.5 km in 2 days", "1234.5"),
        ("extract_number", "-3% of 7", "-3%"),
        ("extract_number", ".5", ".5"),
        ("extract_number", "none at all", "NULL"),
        ("norm_date", "March 2024", "2024-03-01"),
        ("norm_date", "5 March 2024", "2024-03-05"),
        ("norm_date", "2024年3月5日", "2024-03-05"),
        ("norm_date", "foo bar", "foo bar"),
    ],
)
def test_preprocessing(step, cell, prepared):
    assert tables.prepare(cell, (step,)) == prepared


CELLS = [  # metric, answer, gold, criterion, compatible, strict
    ("exact_match", "APPLE", "apple", None, True, True),
    ("exact_match", "apples", "apple", None, False, False),
    ("in_match", "York", "New York", None, True, True),
    ("in_match", "New York", "York", None, False, False),
    ("in_match", "ew Yor", "New York", None, True, False),
    ("in_match", "3.1", "3.14", None, True, False),
    ("in_match", "of", "University of Tokyo", None, True, False),
    ("in_match", "东京", "日本东京", None, True, True),
    ("in_match", "京", "日本东京", None, True, False),
    ("in_match", "+", "++", None, True, False),
    ("in_match", "", "York", None, True, False),
    ("url_match", "see http://a.com/x and https://b.org", "https://b.org/y http://a.com", None, True, True),
    ("url_match", "http://a.com", "http://a.com http://b.org", None, False, False),
    ("url_match", "http://A.com", "http://a.com", None, False, True),
    ("url_match", "x", "y", None, True, False),
    ("url_match", "x", "http://a.com", None, False, False),
    ("url_match", "http://[a]/", "http://a.com", None, False, False),
    ("number_near", "105", "100", 0.05, True, True),
    ("number_near", "106", "100", 0.05, False, False),
    ("number_near", "-95", "-100", 0.05, True, True),
    ("number_near", "12%", "0.12", 0.0, True, True),
    ("number_near", "0.1", "0", 0.5, False, False),
    ("number_near", "NULL", "NULL", 0.05, True, False),
    ("number_near", "NULL", "unknown", 0.05, False, False),
    ("number_near", "nan", "nan", 0.05, False, False),
    ("number_near", "7", "inf", 0.05, True, False),
    ("date_near", "2024-03-01", "2024-04-01", None, True, True),
    ("date_near", "2024-03-01", "2024-04-02", None, False, False),
    ("date_near", "2024-02-29", "unknown", None, False, False),
    ("date_near", "unknown", "foo bar", None, True, False),
]


@pytest.mark.parametrize(("metric", "answer", "gold", "criterion", "compatible", "strict"), CELLS)
def test_metrics_of_cells_and_the_holes_of_the_compatible_ones(metric, answer, gold, criterion, compatible, strict):
    assert tables.METRICS[metric](answer, gold, criterion) is compatible
    assert tables.matches_strictly(metric, answer, gold, criterion) is strict


def test_a_time_zone_on_one_side_stops_the_public_evaluation_and_not_the_strict_one():
    gold = task([["Apple", "2024-03-05"]], count={"metric": ["date_near"]})
    answer = markdown([["Apple", "2024-03-05T10:00:00+02:00"]])
    stopped = score(gold, answer, "compatible")
    assert numbers(stopped) == [0] * 6
    assert "stops" in stopped.note
    assert score(gold, answer, "strict").success == 1


def test_strict_dates_do_not_depend_on_the_day_of_scoring():
    assert tables.prepare_strict("2024", ("norm_date",)) == "2024-01-01"
    for relative in ("yesterday", "March 5", "nan"):
        assert not tables.matches_strictly("date_near", relative, relative)


# Rows and items by hand


@pytest.mark.parametrize("mode", MODES)
def test_a_partly_right_table_by_hand(mode):
    answer = markdown([["apple*", "10.4"], ["Pear", "25"], ["Kiwi", "1"]])  # right; wrong count; no such row
    result = score(task(FRUIT, count=COUNT), answer, mode)
    rows, items = (1 / 3, 1 / 4), (3 / 6, 3 / 8)
    assert numbers(result) == pytest.approx([*rows, 2 / 7, *items, 2 * 3 / 14])
    assert result.success == 0


@pytest.mark.parametrize("mode", MODES)
def test_column_names_must_be_the_same_but_for_case_and_spaces(mode):
    gold = task([["a", "1"]], ("First Name", "Count"), ["firstname"])
    assert score(gold, markdown([["a", "1"]], ("first name", " COUNT ")), mode).success == 1
    for columns in (("Name", "Count"), ("First Name", "Count", "More"), ("First Name",)):
        row = ["a", "1", "2"][: len(columns)]
        wrong = score(gold, markdown([row], columns), mode)
        assert numbers(wrong) == [0] * 6
        assert "instead of firstname, count" in wrong.note


@pytest.mark.parametrize("mode", MODES)
def test_a_key_of_two_columns(mode):
    gold = task([["a", "x", "1"], ["a", "y", "2"]], ("n", "m", "v"), ("n", "m"))
    result = score(gold, markdown([["a", "x", "1"], ["a", "z", "2"]], ("n", "m", "v")), mode)
    assert numbers(result) == pytest.approx([1 / 2] * 6)


def test_duplicate_keys_are_dropped_before_normalising_in_compatible_mode_and_count_in_strict_mode():
    rows = [["Apple", "10"], ["Apple", "11"], ["Pear", "20"], ["Fig", "30"], ["Plum", "40"]]
    assert numbers(score(task(FRUIT), markdown(rows), "compatible")) == [1] * 6
    contradicted = [3 / 5, 3 / 4, 2 / 3, 7 / 10, 7 / 8, 7 / 9]  # the worse one of the two apples counts
    assert numbers(score(task(FRUIT), markdown(rows), "strict")) == pytest.approx(contradicted)


def test_success_is_1_for_identical_tables_though_a_metric_fails_or_counts_twice():
    nan = task([["Apple", "10"], ["Pear", ""]], count={"metric": ["number_near"], "criterion": 0.1})
    result = score(nan, markdown([["Pear", ""], ["Apple", "10"]]), "compatible")
    assert (result.success, result.item_f1) == (1, 3 / 4)  # "nan" is not near "nan"
    twice = task(FRUIT, count={"metric": ["exact_match", "in_match"]})
    assert score(twice, markdown(FRUIT), "compatible").success == 1


# The holes


def spellings(name, n):
    return [f"{name}{'*' * stars}" for stars in range(n)]


def test_one_row_in_ten_spellings_scores_fully_in_compatible_mode_and_as_one_row_in_strict_mode():
    gold = task([[f"Fruit {n}", str(n)] for n in range(10)])
    answer = markdown([[name, "0"] for name in spellings("Fruit 0", 10)])
    assert score(gold, answer, "compatible").item_f1 == 1.0
    honest = score(gold, markdown([["Fruit 0", "0"]]), "strict")
    assert score(gold, answer, "strict").item_f1 == pytest.approx(0.1)
    assert honest.item_f1 == pytest.approx(2 * 0.1 / 1.1)


def test_fewer_gold_rows_than_spellings_push_recall_above_1_in_compatible_mode():
    answer = markdown([[name, "10"] for name in spellings("Apple", 10)])
    assert score(task(FRUIT), answer, "compatible").item_recall == 10 / 4
    assert score(task(FRUIT), answer, "strict").item_recall == 1 / 4


def test_several_metrics_on_a_column_push_f1_above_1_in_compatible_mode_and_are_averaged_in_strict_mode():
    gold = task(FRUIT, count={"metric": ["exact_match", "in_match"]})
    assert score(gold, markdown(FRUIT), "compatible").item_f1 == 1.5
    assert score(gold, markdown(FRUIT), "strict").item_f1 == 1
    gold = task([["Apple", "10 of 20"]], count={"metric": ["exact_match", "in_match"]})
    partly = score(gold, markdown([["Apple", "of 20"]]), "strict")  # in "10 of 20", not equal to it
    assert numbers(partly) == pytest.approx([1 / 2] * 3 + [3 / 4] * 3)


def test_a_metric_named_twice_counts_once():
    gold = task(FRUIT, count={"metric": ["exact_match", "exact_match"]})
    assert score(gold, markdown(FRUIT), "compatible").item_f1 == 1


def test_an_unparsable_date_equals_another_in_compatible_mode_only():
    gold = task([["Apple", "foo bar"]], count=DATE)
    assert score(gold, markdown([["Apple", "unknown"]]), "compatible").item_f1 == 1
    assert score(gold, markdown([["Apple", "unknown"]]), "strict").item_f1 == 0.5
    assert score(gold, markdown([["Apple", "Foo Bar"]]), "strict").item_f1 == 1  # it says what gold says


def test_two_cells_without_a_number_are_equal_in_compatible_mode_only():
    gold = task([["Apple", "many"]], count=COUNT)
    assert score(gold, markdown([["Apple", "few"]]), "compatible").success == 1
    assert score(gold, markdown([["Apple", "few"]]), "strict").item_f1 == 0.5
    keys = task([["many", "1"], ["few", "2"]], name={"preprocess": ["extract_number"]})  # NULL is no common key
    assert score(keys, markdown([["some", "1"]]), "compatible").item_recall > 0
    assert score(keys, markdown([["some", "1"]]), "strict").item_recall == 0


# Strict mode


def test_rows_with_the_same_key_are_matched_so_that_most_items_are_right():
    gold = task([["Apple", "1", "x"], ["apple", "2", "y"]], ("name", "n", "v"))
    answer = markdown([["Apple", "2", "y"], ["apple", "1", "z"]], ("name", "n", "v"))
    assert numbers(score(gold, answer, "strict")) == pytest.approx([1 / 2] * 3 + [5 / 6] * 3)


def test_among_equally_many_items_the_matching_with_more_whole_rows_counts():
    gold = task([["a", "1", "1"], ["A", "2", "2"]], ("name", "n", "v"))
    for rows in ([["a", "1", "1"], ["A", "1", "2"]], [["a", "1", "2"], ["A", "1", "1"]]):
        result = score(gold, markdown(rows, ("name", "n", "v")), "strict")
        assert (result.row_precision, result.item_precision) == pytest.approx((1 / 2, 5 / 6))


def test_a_missing_cell_never_matches_and_a_cell_that_gold_leaves_empty_is_not_asked():
    gold = task([["Apple", "1", "x"], ["Pear", "", "y"]], ("name", "n", "v"))
    full = [["Apple", "1", "x"], ["Pear", "nan", "y"]]
    assert score(gold, markdown(full, ("name", "n", "v")), "strict").success == 1
    for missing in ("", "nan", "NaN", "None", "null", "<NA>"):
        rows = [["Apple", missing, "x"], ["Pear", "", missing]]  # 2 of 3 cells, and 1 of the 2 that are asked
        result = score(gold, markdown(rows, ("name", "n", "v")), "strict")
        assert numbers(result) == pytest.approx([0] * 3 + [(2 + 3 / 2) / 6] * 3)
        assert numbers(score(gold, markdown([[missing, "1", "x"]], ("name", "n", "v")), "strict")) == [0] * 6


def test_a_gold_row_without_a_key_is_refused_and_an_empty_one_is_none():
    with pytest.raises(ValueError, match="ws_1: a gold row has no key"):
        score(task([["", "1"]]), markdown(FRUIT), "strict")
    assert score(task([*FRUIT, ["", ""]]), markdown(FRUIT), "strict").success == 1
    with pytest.raises(ValueError, match="ws_1: all gold rows are empty"):
        score(task([["", ""]]), markdown(FRUIT), "strict")


@pytest.mark.parametrize(("rows", "right"), [(140, 1), (141, 0)])
def test_a_table_with_far_more_rows_than_gold_scores_nothing_and_nobody_judges_it(rows, right):
    compared = []

    def judge(answers, golds, criterion):
        compared.extend(answers)
        return [1] * len(answers)

    answer = markdown([["Apple", f"any {n}"] for n in range(rows)])
    result = score(judged_task(), answer, "strict", judge=judge)
    assert (len(compared), result.row_recall) == (140 * right, right / 4)
    assert result.note == ("" if right else "141 rows, more than the 140 that are compared")


def test_a_long_cell_is_no_date_in_strict_mode():
    date = "5 March 2024"
    assert tables.matches_strictly("date_near", date, "2024-03-05")
    assert not tables.matches_strictly("date_near", f"{date}{' ' * 100_000}", "2024-03-05")


NAMES = st.sampled_from(["Apple", "Pear", "Fig", "apple", "A p p l e", "*Fig*", "Plum", "Kiwi", "Date"])
COUNTS = st.sampled_from(["1", "2", "2.05", "1,000", "5%", "many", "few", "", "nan", "2024"])
ROWS = st.tuples(NAMES, COUNTS, COUNTS)
GOLD = st.lists(ROWS, min_size=1, max_size=6)
COLUMNS = ("name", "n", "v")
SEVERAL = {"preprocess": ["norm_str"], "metric": ["exact_match", "in_match"]}


def strict(gold, rows, columns=COLUMNS):
    return score(task(gold, COLUMNS, n=COUNT, v=SEVERAL), markdown(rows, columns), "strict")


@given(GOLD, st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_gold_table_scores_1_in_any_order(gold, order):
    rows = order.sample(gold, len(gold))
    at = order.sample(range(3), 3)
    result = strict(gold, [[row[i] for i in at] for row in rows], [COLUMNS[i] for i in at])
    assert (result.success, *numbers(result)) == (1,) * 7


@given(GOLD, GOLD, st.randoms())
@settings(max_examples=60, deadline=None)
def test_scores_stay_in_the_range_and_no_order_changes_them(gold, rows, order):
    result = strict(gold, rows)
    assert all(0 <= number <= 1 for number in numbers(result))
    at = order.sample(range(3), 3)
    mixed = [[row[i] for i in at] for row in order.sample(rows, len(rows))]
    other = strict(order.sample(gold, len(gold)), mixed, [COLUMNS[i] for i in at])
    assert numbers(other) == pytest.approx(numbers(result), abs=1e-12)


@given(GOLD, GOLD, st.data())
@settings(max_examples=50, deadline=None)
def test_a_further_copy_of_a_row_of_a_key_that_is_taken_lowers_precision(gold, rows, data):
    copied = data.draw(st.sampled_from(rows))
    wanted = sum(tables.norm_str(row[0]) == tables.norm_str(copied[0]) for row in gold)
    rows = [*rows, *[copied] * wanted]  # so that every gold row of this key has its match
    alone, more = strict(gold, rows), strict(gold, [*rows, copied])
    assert more.item_recall == pytest.approx(alone.item_recall)
    assert more.item_precision <= alone.item_precision


# Judges and alignment


def judged_task():
    return task(FRUIT, count={"preprocess": ["norm_str"], "metric": ["llm_judge"], "criterion": "roughly"})


@pytest.mark.parametrize("mode", MODES)
def test_without_a_judge_the_column_is_named(mode):
    with pytest.raises(ValueError, match="task ws_1: column 'count' is scored by llm_judge"):
        score(judged_task(), "no table", mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_judge_is_asked_once_per_column(mode):
    asked = []

    def judge(answers, golds, criterion):
        asked.append(criterion)
        return [int(answer == "ten" and gold == "10") for answer, gold in zip(answers, golds, strict=True)]

    rows = [["Apple", "TEN"], ["Pear", "2"], ["Fig", "x"]]
    result = score(judged_task(), markdown(rows), mode, judge=judge)
    assert asked == ["roughly"]
    assert (result.row_precision, result.item_precision) == pytest.approx((1 / 3, 4 / 6))
    assert score(judged_task(), markdown([["Kiwi", "1"]]), mode, judge=judge).item_f1 == 0
    assert asked == ["roughly"]


@pytest.mark.parametrize("verdict", [[1], [0.5, 1], [float("nan")] * 2])
def test_a_judge_that_gives_something_else_is_refused(verdict):
    rows = [["Apple", "a"], ["Pear", "b"]]
    with pytest.raises(ValueError, match=r"column 'count': a judge gives a 0 or 1 for each of 2 pairs"):
        score(judged_task(), markdown(rows), "strict", judge=lambda *_: verdict)


@pytest.mark.parametrize("mode", MODES)
def test_an_aligner_maps_columns_and_keys(mode):
    names = {"fruit": "name", "number": "count", "Pomme": "Apple"}
    calls = []

    def align(answer, gold):
        calls.append((answer, gold))
        return {name: names[name] for name in answer if name in names}

    answer = markdown([["Pomme", "10"], ["Pear", "20"]], ("Fruit", "Number"))
    assert score(task(FRUIT[:2]), answer, mode).item_f1 == 0
    assert score(task(FRUIT[:2]), answer, mode, align=align).success == 1
    assert calls == [(["fruit", "number"], ["name", "count"]), (["Pomme", "Pear"], ["Apple", "Pear"])]
    assert (
        score(task(FRUIT[:2], name={}), answer, mode, align=align).item_f1 == 0.5
    )  # keys are aligned for some metrics


def test_an_aligner_that_maps_two_columns_to_one_scores_nothing():
    answer = markdown([["a", "1", "2"]], ("Name", "n", "v"))
    for mode in MODES:
        assert score(task(FRUIT), answer, mode, align=lambda *_: {"n": "count", "v": "count"}).item_f1 == 0


def test_there_is_no_third_mode():
    with pytest.raises(ValueError, match="no mode 'lenient'"):
        score(task(FRUIT), markdown(FRUIT), "lenient")


# Averages


def answers(shares, name="ws_1"):
    """Trials that hold so many of the four fruits."""
    return [Response(instance_id=name, trial=n, response=markdown(FRUIT[:share])) for n, share in enumerate(shares)]


def named(name):
    return Task(name, "Which?", "en", task(FRUIT).evaluation, task(FRUIT).gold)


def test_averages_are_taken_over_trials_and_then_over_tasks():
    report = evaluate([named("a"), named("b")], [*answers([4, 2], "a"), *answers([1, 1], "b")], "strict")
    assert (report.mode, report.n) == ("strict", 2)
    assert [row["instance_id"] for row in report.trials] == ["a", "a", "b", "b"]
    assert set(report.trials[0]) == {"instance_id", "trial", *NUMBERS}
    recalls = {name: values["row_recall"] for name, values in report.averages.items()}
    assert recalls == {"avg@N": (0.75 + 0.25) / 2, "max@N": (1 + 0.25) / 2, "min@N": (0.5 + 0.25) / 2}
    assert report.averages["max@N"]["success"] == 0.5
    assert report.averages["avg@N"]["success"] == 0.25


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ([], "no answers"),
        ([*answers([4, 4], "a"), *answers([4], "b")], "task 'b' lacks trial 1"),
        (answers([4], "a"), "task 'b' lacks trial 0"),
        (answers([4], "c"), "'c', which is not among the tasks"),
        (answers([4], "a") * 2, "trial 0 of task 'a' is there twice"),
    ],
)
def test_missing_and_surplus_trials_are_refused(responses, message):
    with pytest.raises(ValueError, match=message):
        evaluate([named("a"), named("b")], responses)


# Files and the command


EVALUATION = {
    "required": ["Name", "Count"],
    "unique_columns": ["name"],
    "eval_pipeline": {"name": EXACT, "count": COUNT},
}
TASK_LINE = {"instance_id": "ws_1", "query": "Which?", "language": "en", "evaluation": EVALUATION}


@pytest.fixture
def files(tmp_path):
    """One task, its gold table with a column too many, and two trials."""
    (tmp_path / "gold").mkdir()
    (tmp_path / "gold" / "ws_1.csv").write_text("\ufeffName,More, Count \nApple,x,10\nPear,,20\n", encoding="utf-8")
    (tmp_path / "tasks.jsonl").write_text(json.dumps(TASK_LINE) + "\n")
    trials = [markdown([["Apple", "10"], ["Pear", "20"]]), "I found nothing."]
    lines = [json.dumps({"instance_id": "ws_1", "trial": n, "response": text}) for n, text in enumerate(trials)]
    (tmp_path / "responses.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def command(folder, *arguments):
    paths = ["--tasks", folder / "tasks.jsonl", "--gold", folder / "gold", "--responses", folder / "responses.jsonl"]
    return CliRunner().invoke(app, ["widesearch", "score", *map(str, [*paths, *arguments])])


def test_the_public_files_are_read(files):
    (loaded,) = load_tasks(files / "tasks.jsonl", files / "gold")
    assert (loaded.instance_id, loaded.language, loaded.evaluation.required) == ("ws_1", "en", ("name", "count"))
    assert loaded.gold.to_dict("records") == [{"name": "Apple", "count": "10"}, {"name": "Pear", "count": "20"}]
    as_text = {**TASK_LINE, "evaluation": json.dumps(EVALUATION)}
    (files / "tasks.jsonl").write_text(json.dumps(as_text))
    assert load_tasks(files / "tasks.jsonl", files / "gold")[0].evaluation == loaded.evaluation


def test_an_answer_cut_within_a_character_is_read(tmp_path):
    line = {"instance_id": "a", "trial": 0, "response": "| \ud83d | \u2028 |"}
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + '\n{"instance_id": "a", "trial": 1, "response": null}')
    assert [each.response for each in load_responses(tmp_path / "r.jsonl")] == ["| ? | \u2028 |", None]


def evaluation(**changes):
    return json.dumps({**TASK_LINE, "evaluation": {**EVALUATION, **changes}})


BROKEN = [  # file, its content, what the one line says
    ("tasks.jsonl", "", "tasks.jsonl: empty"),
    ("tasks.jsonl", "{", "tasks.jsonl:1: Expecting"),
    ("tasks.jsonl", "[]", "tasks.jsonl:1: not a JSON object"),
    ("tasks.jsonl", json.dumps(TASK_LINE) + "\n" + json.dumps(TASK_LINE), "tasks.jsonl:2: a second task 'ws_1'"),
    ("tasks.jsonl", json.dumps({**TASK_LINE, "instance_id": "ws_2"}), "tasks.jsonl:1: no gold table"),
    ("tasks.jsonl", json.dumps({**TASK_LINE, "evaluation": "{"}), "tasks.jsonl:1: evaluation:"),
    ("tasks.jsonl", json.dumps({"instance_id": "ws_1"}), "tasks.jsonl:1: query: Field required"),
    ("tasks.jsonl", evaluation(required="name"), "evaluation.required:"),
    ("tasks.jsonl", evaluation(required=["name", "Name"]), "a column is named twice"),
    ("tasks.jsonl", evaluation(unique_columns=[]), "evaluation.unique_columns:"),
    ("tasks.jsonl", evaluation(unique_columns=["id"]), "column 'id' is not a required one"),
    ("tasks.jsonl", evaluation(eval_pipeline={"name": EXACT}), "column 'count' has no metric"),
    ("tasks.jsonl", evaluation(eval_pipeline={"count": {"metric": ["near"]}}), "eval_pipeline.count.metric.0:"),
    ("tasks.jsonl", evaluation(eval_pipeline={"count": {"metric": ["number_near"]}}), "needs a tolerance"),
    (
        "tasks.jsonl",
        evaluation(required=["name", "count", "cost"]),
        "tasks.jsonl:1: evaluation: Value error, column 'cost'",
    ),
    ("gold/ws_1.csv", "", "ws_1.csv: No columns"),
    ("gold/ws_1.csv", "Name\nApple\n", "ws_1.csv: line 1: required column 'count'"),
    ("gold/ws_1.csv", "Name,Count,count\nApple,1,2\n", "ws_1.csv: line 1: required column 'count'"),
    ("gold/ws_1.csv", "Name,Count\n", "ws_1.csv: line 2: the gold table has no rows"),
    ("gold/ws_1.csv", "Name,Count\nApple,1\nPear,2,3\n", "line 3"),
    ("gold/ws_1.csv", "Name,Count\nx,Apple,1\ny,Pear,2\n", "line 2: more cells"),
    ("responses.jsonl", " \n", "responses.jsonl: empty"),
    ("responses.jsonl", '{"instance_id": "ws_1", "trial": "a", "response": "x"}', "responses.jsonl:1: trial:"),
    ("responses.jsonl", '{"instance_id": "ws_1", "trial": 0}', "responses.jsonl:1: response: Field required"),
    ("responses.jsonl", '{"instance_id": "ws_2", "trial": 0, "response": "x"}', "'ws_2', which is not among the tasks"),
]


@pytest.mark.parametrize(("file", "content", "message"), BROKEN)
def test_a_broken_file_is_one_line_that_names_it(files, file, content, message):
    (files / file).write_text(content)
    result = command(files, "--json", files / "out.json")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (files / "out.json").exists()


def test_a_missing_file_or_function_is_one_line(files):
    for arguments, message in (
        (["--responses", files / "none.jsonl"], "no file"),
        (["--judge", "nowhere:nothing"], "no function 'nowhere:nothing'"),
    ):
        result = command(files, *arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr


def test_a_judge_may_be_given_by_name(files):
    rule = {"metric": ["llm_judge"], "criterion": "any"}
    (files / "tasks.jsonl").write_text(evaluation(eval_pipeline={"count": rule}))
    without = command(files)
    assert (without.exit_code, without.stderr.count("\n")) == (2, 1)
    assert "column 'count' is scored by llm_judge" in without.stderr
    assert command(files, "--judge", f"{__name__}:kind_judge").exit_code == 0


def kind_judge(answers, golds, criterion):
    return [1] * len(answers)


@pytest.mark.parametrize("mode", MODES)
def test_the_command_prints_the_averages_and_writes_the_trials(files, mode):
    result = command(files, "--mode", mode, "--json", files / "out" / "scores.json")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"WideSearch, {mode} mode: 1 tasks, 2 trials each"
    assert lines[1].split() == ["avg@2", "max@2", "min@2"]
    assert {line.split()[0]: line.split()[1:] for line in lines[2:9]} == {
        name: ["0.5000", "1.0000", "0.0000"] for name in NUMBERS
    }
    assert lines[9] == "ws_1, trial 1: no readable table"
    written = json.loads((files / "out" / "scores.json").read_text())
    assert (written["mode"], written["n"]) == (mode, 2)
    assert written["trials"][0] == {"instance_id": "ws_1", "trial": 0, **dict.fromkeys(NUMBERS, 1)}
    assert written["averages"]["avg@N"] == dict.fromkeys(NUMBERS, 0.5)


def test_help_has_an_example():
    shown = CliRunner().invoke(app, ["widesearch", "score", "--help"], env={"COLUMNS": "200"})
    assert "k25lite widesearch score --tasks tasks.jsonl" in shown.stdout
