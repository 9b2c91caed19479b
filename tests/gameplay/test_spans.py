"""Probabilities into events, and the choice of rules and pictures, on cases that can be counted by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25lite.gameplay.events import KINDS, Event
from k25lite.gameplay.scoring import score
from k25lite.gameplay.spans import Scored, SpanRule, choose_rules, find_spans, key_moments

RULES = {kind: SpanRule() for kind in KINDS}


def probabilities(**kinds):
    """[n, KINDS] from one string of digits, tenths, for some kinds."""
    n = len(next(iter(kinds.values())))
    scores = np.zeros((n, len(KINDS)))
    for kind, digits in kinds.items():
        scores[:, KINDS.index(kind)] = [int(digit) / 10 for digit in digits]
    return scores


def spans(rules=None, times=None, **kinds):
    scores = probabilities(**kinds)
    times = np.arange(len(scores)) if times is None else np.array(times)
    return [(s.kind, s.start, s.end) for s in find_spans(times, scores, RULES | (rules or {}), seconds=1.0)]


def test_an_event_begins_high_and_goes_on_lower():
    rule = {"boss": SpanRule(begin=0.8, stay=0.5)}
    assert spans(rule, boss="0148439000") == [("boss", 2, 5), ("boss", 6, 7)]
    assert spans(rule, boss="0047700000") == []


def test_the_confidence_is_the_mean():
    (span,) = find_spans(np.arange(4.0), probabilities(boss="0680"), RULES, seconds=1.0)
    assert span.confidence == pytest.approx(0.7)


def test_gaps_are_bridged_and_short_events_dropped():
    digits = "9009900090"
    assert spans({"pickup": SpanRule(gap=2)}, pickup=digits) == [("pickup", 0, 5), ("pickup", 8, 9)]
    assert spans({"pickup": SpanRule(gap=3)}, pickup=digits) == [("pickup", 0, 9)]
    assert spans({"pickup": SpanRule(shortest=2)}, pickup=digits) == [("pickup", 3, 5)]


def test_a_piece_that_is_missing_is_a_gap():
    assert spans({"boss": SpanRule(gap=1)}, times=[0, 1, 3, 6], boss="9999") == [("boss", 0, 4), ("boss", 6, 7)]


def test_shifts_move_both_ends_but_not_before_the_video():
    assert spans({"boss": SpanRule(shift=-1.5)}, boss="9009") == [("boss", 1.5, 2.5)]
    assert spans({"boss": SpanRule(shift=-1.5)}, boss="9990") == [("boss", 0, 1.5)]
    assert spans({"boss": SpanRule(shift=0.5)}, boss="9009") == [("boss", 0.5, 1.5), ("boss", 3.5, 4.5)]


def test_a_death_and_another_map_end_fights():
    rules = {"fight": SpanRule(gap=5), "boss": SpanRule(gap=9)}
    assert spans(rules, fight="990099") == [("fight", 0, 6)]
    apart = [("fight", 0, 2), ("death", 2, 3), ("fight", 4, 6)]
    assert spans(rules, fight="990099", death="009000") == apart
    assert spans(rules, boss="900009", level="000900") == [("boss", 0, 1), ("level", 3, 4), ("boss", 5, 6)]


def test_what_lies_in_a_boss_event_is_no_fight():
    rules = {"fight": SpanRule(shortest=2)}
    assert spans(rules, fight="99999999", boss="00099000") == [("fight", 0, 3), ("boss", 3, 5), ("fight", 5, 8)]
    assert spans(rules, fight="99999990", boss="09999900") == [("boss", 1, 6)]  # what is left of the fight is too short


SCORES = st.lists(st.lists(st.floats(0, 1), min_size=len(KINDS), max_size=len(KINDS)), max_size=25)


@given(SCORES, st.floats(0.05, 0.95), st.floats(0, 1), st.floats(0, 4), st.floats(0, 3), st.floats(-3, 3))
def test_spans_are_in_order_apart_and_as_long_as_asked(scores, begin, stay, gap, shortest, shift):
    rules = dict.fromkeys(KINDS, SpanRule(begin, stay, gap, shortest, shift))
    times = np.arange(len(scores), dtype=float)
    found = find_spans(times, np.array(scores).reshape(-1, len(KINDS)), rules, seconds=1.0)
    assert [span.start for span in found] == sorted(span.start for span in found)
    for kind in KINDS:
        mine = [span for span in found if span.kind == kind]
        for span in mine:
            assert 0 <= span.start < span.end <= len(scores) + max(shift, 0)
            assert span.end - span.start >= shortest - 0.01
            assert begin * stay <= span.confidence + 1e-9 or gap > 0
        assert all(one.end <= other.start for one, other in itertools.pairwise(mine))
    for boss in (span for span in found if span.kind == "boss"):
        assert all(s.end <= boss.start or boss.end <= s.start for s in found if s.kind == "fight")


@pytest.mark.parametrize(
    ("times", "scores", "rules", "message"),
    [
        ([0.0], np.zeros((1, 3)), RULES, "probabilities"),
        ([0.0, 0.0], np.zeros((2, len(KINDS))), RULES, "increase"),
        ([0.0], np.zeros((1, len(KINDS))), {}, "no rule for boss"),
    ],
)
def test_bad_arguments_are_refused(times, scores, rules, message):
    with pytest.raises(ValueError, match=message):
        find_spans(np.array(times), scores, rules)


def test_chosen_rules_find_what_the_given_ones_do_not():
    rng = np.random.default_rng(0)
    videos = []
    for _ in range(4):
        times = np.arange(300.0)
        scores = rng.uniform(0, 0.25, (300, len(KINDS)))  # fights are seen at 0.4 only, bosses late and with pauses
        events = [
            Event("v", float(start), start + 12.0, kind) for start, kind in ((30, "fight"), (90, "boss"), (200, "boss"))
        ]
        for event in events:
            inside = slice(int(event.start) + (event.kind == "boss"), int(event.end))
            scores[inside, KINDS.index(event.kind)] = 0.4
            scores[int(event.start) + 4 : int(event.start) + 8, KINDS.index(event.kind)] = 0.1
        videos.append(Scored(times, scores, events))

    def macro(rules):
        found = [
            Event(f"{n}", s.start, s.end, s.kind)
            for n, v in enumerate(videos)
            for s in find_spans(v.times, v.probabilities, rules, 1.0)
        ]
        true = [Event(f"{n}", e.start, e.end, e.kind) for n, v in enumerate(videos) for e in v.events]
        return score(true, found)["macro_f1"]

    assert macro(RULES) == 0
    assert macro(choose_rules(videos)) == 1


def test_key_moments_are_likely_and_different():
    grey = np.array([0, 0, 0, 100, 100, 200], np.uint8)
    pictures = np.broadcast_to(grey[:, None, None, None], (6, 4, 5, 3))
    scores = np.array([0.5, 0.9, 0.8, 0.6, 0.7, 0.1])
    times = np.arange(6.0)
    assert key_moments(times, scores, pictures, 1) == [1]
    assert key_moments(times, scores, pictures, 2) == [1, 4]
    assert key_moments(times, scores, pictures, 6) == [1, 4, 5]  # the others show nothing new
    assert key_moments(times[::-1], scores, pictures, 2) == [4, 1]  # in the order of their times


@given(st.integers(0, 8), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=50)
def test_key_moments_are_as_many_as_asked_and_hold_the_likeliest(n, count, seed):
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.1, 1, n)
    chosen = key_moments(np.arange(n), scores, rng.integers(0, 256, (n, 6), dtype=np.uint8), count)
    assert len(chosen) == len(set(chosen)) == min(n, count)
    assert not n or int(scores.argmax()) in chosen


@pytest.mark.parametrize(
    ("scores", "count", "message"), [([0.5], 1, "equally many"), ([0.5, -1], 1, "negative"), ([1, 1], 0, "count")]
)
def test_moments_that_cannot_be_chosen(scores, count, message):
    with pytest.raises(ValueError, match=message):
        key_moments(np.arange(2), np.array(scores), np.zeros((2, 3)), count)
