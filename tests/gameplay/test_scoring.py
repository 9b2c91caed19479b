"""Matching and scores against trying every pairing, and cases counted by hand."""

import json
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25lite.gameplay.events import KINDS, Event
from k25lite.gameplay.scoring import Matching, match, score, temporal_iou, write_metrics


def fights(*starts, video="a", kind="fight"):
    return [Event(video, float(start), start + 3.0, kind) for start in starts]


def every_pairing(true, found):
    for size in range(min(len(true), len(found)) + 1):
        for chosen in combinations(range(len(true)), size):
            for partners in permutations(range(len(found)), size):
                yield list(zip(chosen, partners, strict=True))


STARTS = st.lists(st.integers(0, 40).map(lambda n: n / 4), max_size=4)


@given(STARTS, STARTS, st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]))
def test_the_best_of_all_pairings_counts(true, found, tolerance):
    matching = match(fights(*true), fights(*found), tolerance)
    allowed = [
        pairing
        for pairing in every_pairing(true, found)
        if all(abs(true[i] - found[j]) <= tolerance for i, j in pairing)
    ]
    most = max(map(len, allowed))
    nearest = min(sum(abs(true[i] - found[j]) for i, j in pairing) for pairing in allowed if len(pairing) == most)
    assert len(matching.pairs) == most
    assert sum(abs(t.start - f.start) for t, f in matching.pairs) == pytest.approx(nearest)
    assert sorted([*(t for t, _ in matching.pairs), *matching.missed]) == sorted(fights(*true))
    assert sorted([*(f for _, f in matching.pairs), *matching.wrong]) == sorted(fights(*found))


EVENTS = st.lists(
    st.builds(
        lambda video, start, length, kind: Event(video, start, start + length, kind),
        st.sampled_from("abc"),
        st.floats(0, 60),
        st.floats(0, 9),
        st.sampled_from(KINDS),
    ),
    max_size=12,
)


@given(EVENTS, EVENTS)
def test_scores_keep_their_bounds_and_symmetries(true, found):
    metrics = score(true, found)
    swapped = score(found, true)
    for kind, scores in metrics["per_kind"].items():
        assert 0 <= scores["f1"] <= 1
        assert scores["precision"] == swapped["per_kind"][kind]["recall"]
        assert scores["f1"] == swapped["per_kind"][kind]["f1"]
    f1 = [scores["f1"] for scores in metrics["per_kind"].values()]
    assert metrics["macro_f1"] == (pytest.approx(sum(f1) / len(f1)) if f1 else None)
    assert score(true[::-1], found[::-1]) == metrics
    loosest, loose, strict = (metrics["tolerances"][seconds]["per_kind"] for seconds in ("5", "2", "1"))
    for kind in loose:
        assert strict[kind]["matched"] <= loose[kind]["matched"] <= loosest[kind]["matched"]
    for part in ("true", "found", "matched"):
        for kind, scores in metrics["per_kind"].items():
            videos = [video["per_kind"].get(kind, {part: 0}) for video in metrics["videos"].values()]
            assert scores[part] == sum(video[part] for video in videos)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


@given(EVENTS)
def test_the_truth_itself_scores_one(true):
    metrics = score(true, true)
    assert all(scores["f1"] == 1 for scores in metrics["per_kind"].values())
    assert metrics["macro_f1"] == (1.0 if true else None)


def test_scores_by_hand():
    true = [*fights(10, 20, 30), *fights(5, kind="death"), *fights(50, video="b")]
    found = [*fights(11.5, 21.9, 26, 100), *fights(50, kind="boss"), *fights(50, video="c")]
    metrics = score(true, found)
    fight = metrics["per_kind"]["fight"]
    assert (fight["true"], fight["found"], fight["matched"]) == (4, 5, 2)
    assert (fight["precision"], fight["recall"]) == (0.4, 0.5)
    assert fight["f1"] == pytest.approx(4 / 9)
    assert fight["mean_iou"] == pytest.approx((1.5 / 4.5 + 1.1 / 4.9) / 2)
    assert metrics["per_kind"]["death"]["f1"] == metrics["per_kind"]["boss"]["f1"] == 0
    assert "level" not in metrics["per_kind"]  # neither true nor found
    assert metrics["macro_f1"] == pytest.approx(4 / 27)
    assert metrics["tolerances"]["1"]["per_kind"]["fight"]["matched"] == 0
    assert metrics["tolerances"]["5"]["per_kind"]["fight"]["matched"] == 3
    assert metrics["videos"]["a"]["per_kind"]["fight"]["f1"] == pytest.approx(4 / 7)
    assert metrics["videos"]["b"]["macro_f1"] == 0


def test_one_true_event_is_found_once():
    matching = match(fights(10), fights(9.5, 10.2))
    assert [(t.start, f.start) for t, f in matching.pairs] == [(10, 10.2)]
    assert [event.start for event in matching.wrong] == [9.5]


def test_pairs_come_before_nearness():
    matching = match(fights(10, 12), fights(12, 14), tolerance=2)
    assert sorted((t.start, f.start) for t, f in matching.pairs) == [(10, 12), (12, 14)]


def test_the_tolerance_itself_is_near_enough():
    assert len(match(fights(0.1), fights(2.1)).pairs) == 1  # 2.1 - 0.1 is 2.0 but for rounding
    assert not match(fights(0.1), fights(2.101)).pairs


def test_videos_that_were_not_analysed_do_not_count():
    true = [*fights(1), *fights(1, video="b")]
    assert score(true, fights(1))["per_kind"]["fight"]["recall"] == 0.5
    metrics = score(true, fights(1), videos=["a", "quiet"])
    assert metrics["macro_f1"] == 1
    assert metrics["videos"]["quiet"] == {"macro_f1": None, "per_kind": {}}
    with pytest.raises(ValueError, match="found in a"):
        score(true, fights(1), videos=["b"])


def test_other_kinds_are_left_out_and_other_fields_kept():
    @dataclass(frozen=True, order=True)
    class Found(Event):
        confidence: float = 0.0

    found = [Found("a", 1.0, 4.0, "fight", confidence=0.5), Found("a", 1.0, 2.0, "kill")]
    matching = match([*fights(1), *fights(9, kind="low_health")], found)
    assert matching == Matching([(fights(1)[0], found[0])])


@pytest.mark.parametrize("change", [{"end": 0.0}, {"start": float("nan")}, {"end": float("inf")}])
def test_impossible_times_are_refused(change):
    bad = replace(fights(1)[0], **change)
    for sides in (([bad], []), ([], [bad])):
        with pytest.raises(ValueError, match="finite times"):
            match(*sides)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_impossible_tolerances_are_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        match([], [], tolerance)


def test_intersection_over_union():
    one = Event("a", 0.0, 4.0, "boss")
    assert temporal_iou(one, replace(one, start=2.0, end=6.0)) == pytest.approx(2 / 6)
    assert temporal_iou(one, replace(one, start=5.0, end=6.0)) == 0
    moment = Event("a", 1.0, 1.0, "boss")
    assert temporal_iou(moment, moment) == 1


def test_metrics_are_written_as_they_are(tmp_path):
    metrics = score(fights(1), fights(1.5))
    write_metrics(tmp_path / "metrics.json", metrics)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
