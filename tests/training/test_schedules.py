"""Budgets are equal because every strategy consumes the same rows; and the learning rate moves as drawn."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25lite.training.schedules import EARLY, LATE, MID, STRATEGIES, LearningRate, Mix, plan, rows_in


@given(st.integers(90, 2000), st.integers(1, 16), st.none() | st.integers(1, 16), st.sampled_from([EARLY, MID, LATE]))
def test_every_strategy_consumes_every_row_exactly_once(text, per_step, after, mix):
    vision = round(text / 9)
    steps = plan(mix, text, vision, per_step, after)
    rows = Counter(row for step in steps for row in step)
    assert rows == Counter([("text", i) for i in range(text)] + [("vision", i) for i in range(vision)])
    for stream in ("text", "vision"):
        order = [index for step in steps for name, index in step if name == stream]
        assert order == sorted(order), "each stream in its own order, whatever the strategy"


@pytest.mark.parametrize("name", STRATEGIES)
def test_vision_begins_where_it_should_and_lies_evenly(name):
    mix = STRATEGIES[name]
    rows = [stream for step in plan(mix, 9000, 1000, 10) for stream, _ in step]
    before, after = rows[: round(mix.injection * 10_000)], rows[round(mix.injection * 10_000) :]
    assert before.count("vision") == 0
    assert after.count("vision") / len(after) == pytest.approx(mix.ratio)
    window = 40
    shares = [after[i : i + window].count("vision") for i in range(0, len(after) - window, window)]
    assert max(shares) - min(shares) <= 1


def test_the_three_strategies_of_table_1_have_one_budget():
    assert {round(mix.vision_share, 12) for mix in STRATEGIES.values()} == {0.1}


def test_text_only_consumes_the_text_rows_alone():
    assert [row for step in plan(None, 25, 5, 10) for row in step] == [("text", i) for i in range(25)]


def test_smaller_steps_after_injection_give_as_many_vision_updates_as_early():
    def updates(steps):
        return sum(any(stream == "vision" for stream, _ in step) for step in steps)

    early = updates(plan(EARLY, 900, 100, 10))
    assert updates(plan(LATE, 900, 100, 10)) < early / 4
    assert updates(plan(LATE, 900, 100, 10, after=2)) == pytest.approx(early, rel=0.02)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5])
def test_a_ratio_outside_0_and_1_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        Mix(0.5, ratio)


@pytest.mark.parametrize("injection", [1.0, 1.2, -0.1])
def test_an_injection_after_the_end_is_refused(injection):
    with pytest.raises(ValueError, match="injected"):
        Mix(injection, 0.1)


def test_a_budget_that_cannot_be_met_is_refused():
    with pytest.raises(ValueError, match=r"50% after 80% of training needs 0\.100"):
        plan(LATE, 500, 500, 10)


def test_the_learning_rate_warms_up_stays_and_decays():
    rate = LearningRate(1.0, warmup=0.1, decay=0.2, floor=0.1)
    assert [rate(p) for p in (0.05, 0.1, 0.5, 0.8, 0.9, 1.0)] == pytest.approx([0.5, 1, 1, 1, 0.55, 0.1])
    cosine = LearningRate(1.0, "cosine", warmup=0.1, floor=0.1)
    assert [cosine(p) for p in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1, 0.55, 0.1])
    again = LearningRate(1.0, warmup=0.1, decay=0.2, floor=0.1, rewarm=0.5)
    assert [again(p) for p in (0.05, 0.4, 0.475, 0.525, 0.7, 0.95)] == pytest.approx([0.5, 1, 1, 0.5, 1, 0.55])


@pytest.mark.parametrize("wrong", [{"peak": 0.0}, {"rewarm": 1.0}, {"rewarm": -0.1}])
def test_a_learning_rate_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="learning rate"):
        LearningRate(**{"peak": 1.0} | wrong)


def test_rows_in_counts_the_last_partial_step():
    assert rows_in(plan(None, 25, 0, 10)) == [0, 10, 20, 25]
