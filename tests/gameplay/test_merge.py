from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25lite.gameplay.merge import Found, merge
from k25lite.gameplay.segments import Segment

KINDS = ("fight", "boss", "pickup")


@st.composite
def videos(draw):
    """Events of which those of one kind keep apart, a gap smaller than their distance, borders, and a margin."""
    gap = draw(st.integers(0, 5))
    events = []
    for kind in KINDS:
        time = 0
        for rest, duration in draw(st.lists(st.tuples(st.integers(gap + 1, 60), st.integers(1, 80)), max_size=8)):
            start = time + rest
            time = start + duration
            events.append(Found("a", start / 8, time / 8, kind, 0.5, ((start + time) / 16,)))
    borders = draw(st.lists(st.integers(1, 8 * 90 - 1), unique=True, max_size=12))
    times = [0.0, *(border / 8 for border in sorted(borders)), 1000.0]
    return sorted(events), times, gap / 8, draw(st.sampled_from([0.0, 0.125, 3.0, 11.0]))


def cut(events, low, high):
    """What is to be seen of events from `low` to `high`, as a sub-agent would tell it."""
    found = []
    for event in events:
        start, end = max(event.start, low), min(event.end, high)
        if start < end:
            keyframes = tuple(time for time in event.keyframes if start <= time <= end)
            found.append(Found(event.video, start, end, event.kind, event.confidence, keyframes))
    return found


@given(videos())
def test_events_cut_at_any_borders_and_merged_are_the_uncut_events(video):
    events, times, gap, margin = video
    parts = [(Segment("a", low, high), cut(events, low - margin, high + margin)) for low, high in pairwise(times)]
    assert merge(parts, gap) == events
    assert merge(reversed(parts), gap) == events


def found(start, end, kind="fight", confidence=0.5, keyframes=(), video="a"):
    return Found(video, start, end, kind, confidence, keyframes)


LEFT, RIGHT = Segment("a", 0.0, 10.0), Segment("a", 10.0, 20.0)


def test_a_cut_event_counts_once_and_keeps_the_best_evidence():
    merged = merge([(LEFT, [found(8, 12, "fight", 0.6, (9.0,))]), (RIGHT, [found(9, 15, "fight", 0.9, (11.0, 14.0))])])
    assert merged == [found(8, 15, "fight", 0.9, (9.0, 11.0, 14.0))]


def test_more_key_frames_than_are_shown_are_those_of_the_most_confident():
    parts = [
        (LEFT, [found(8, 12, "boss", 0.6, (8.5, 9.0, 9.5))]),
        (RIGHT, [found(9, 15, "boss", 0.9, (11.0, 14.0))]),
    ]
    assert merge(parts) == [found(8, 15, "boss", 0.9, (8.5, 11.0, 14.0))]


def test_what_only_the_margin_saw_is_left_to_the_neighbour():
    assert merge([(LEFT, [found(11, 13)]), (RIGHT, [])]) == []
    assert merge([(LEFT, []), (RIGHT, [found(7, 9)])]) == []
    assert merge([(LEFT, [found(10, 13)]), (RIGHT, [found(10, 13)])]) == [found(10, 13)]


def test_events_of_one_segment_are_joined_only_if_they_overlap():
    apart = [found(1, 2), found(2.5, 3)]
    assert merge([(LEFT, apart)], gap=1.0) == apart
    assert merge([(LEFT, [found(1, 3), found(2, 4)])]) == [found(1, 4)]


def test_two_segments_bridge_no_more_than_the_gap():
    parts = [(LEFT, [found(5, 9.5)]), (RIGHT, [found(10.5, 12)])]
    assert merge(parts, gap=1.0) == [found(5, 12)]
    assert merge(parts, gap=0.9) == [found(5, 9.5), found(10.5, 12)]


def test_other_kinds_and_videos_stay_apart():
    other = Segment("b", 0.0, 10.0)
    parts = [(LEFT, [found(1, 3), found(2, 4, "boss")]), (other, [found(2, 4, video="b")])]
    assert merge(parts) == [found(1, 3), found(2, 4, "boss"), found(2, 4, video="b")]
    assert merge([]) == []


@pytest.mark.parametrize("event", [found(1, 2, video="b"), found(3, 2)])
def test_what_cannot_be_an_event_of_the_segment_is_refused(event):
    with pytest.raises(ValueError, match="is no event of"):
        merge([(LEFT, [event])])
