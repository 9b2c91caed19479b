"""From how probable each kind is in each second to events with a start and an end, and to the pictures that show them.

The rules of `events` hold for what is found as well: interruptions shorter than FIGHT_GAP and BOSS_GAP are bridged, a death
or another map ends a fight, and what lies in a boss event is no fight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from k25lite.gameplay.events import BOSS_GAP, FIGHT_GAP, KINDS, Event
from k25lite.gameplay.footage import CHUNK_SECONDS, ROUNDING
from k25lite.gameplay.scoring import TOLERANCES, match


@dataclass(frozen=True)
class SpanRule:
    """When the probabilities of one kind are an event.

    Attributes:
        begin: an event has at least one piece of this probability.
        stay: and goes on as far as the probability does not fall below this share of `begin`.
        gap: seconds; interruptions as long as this are bridged.
        shortest: seconds; shorter events are dropped.
        shift: seconds added to each start and end: a probability may rise before or after the event begins.
    """

    begin: float = 0.5
    stay: float = 1.0
    gap: float = 0.0
    shortest: float = 0.0
    shift: float = 0.0


# What `choose_rules` tries.
CHOICES: dict[str, tuple[float, ...]] = {
    "begin": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "stay": (0.25, 0.5, 0.75, 1.0),
    "gap": (0.0, 1.0, 2.0, 3.0, 5.0, 10.0),
    "shortest": (0.0, 1.0, 2.0, 3.0),
    "shift": (-0.9, -0.6, -0.3, 0.0, 0.3, 0.6),
}
# Fights are found last: deaths, other maps and bosses end them.
ORDER = ("death", "level", "pickup", "boss", "fight")


class Span(NamedTuple):
    """An event that was found; seconds; the confidence is the mean of the probabilities of its pieces."""

    kind: str
    start: float
    end: float
    confidence: float


def find_spans(
    times: np.ndarray, probabilities: np.ndarray, rules: Mapping[str, SpanRule], seconds: float = CHUNK_SECONDS
) -> list[Span]:
    """The events of one video, in order of their start.

    Args:
        times: [n] seconds, increasing: where each piece begins. Pieces may be missing.
        probabilities: [n, KINDS].
        rules: one for each of KINDS.
        seconds: how long a piece is.

    Raises:
        ValueError: shapes that do not fit, times that do not increase, or a kind without a rule.
    """
    times, probabilities = np.asarray(times, float), np.asarray(probabilities, float)
    if times.ndim != 1 or probabilities.shape != (len(times), len(KINDS)):
        raise ValueError(
            f"needed: times [n], probabilities [n, {len(KINDS)}], got {times.shape}, {probabilities.shape}"
        )
    if (np.diff(times) <= 0).any():
        raise ValueError("times must increase")
    if missing := set(KINDS) - set(rules):
        raise ValueError(f"there is no rule for {', '.join(sorted(missing))}")
    found: dict[str, list[Span]] = {}
    for kind in ORDER:
        interruptions = [span.start for before in ("death", "level") for span in found.get(before, [])]
        cuts = interruptions if kind in ("boss", "fight") else []
        found[kind] = _spans(kind, times, probabilities[:, KINDS.index(kind)], rules[kind], seconds, cuts)
    for boss in found["boss"]:
        parts = [part for fight in found["fight"] for part in _outside(fight, boss)]
        found["fight"] = [part for part in parts if part.end - part.start >= rules["fight"].shortest]
    return sorted((span for spans in found.values() for span in spans), key=lambda span: (span.start, span.kind))


def _spans(
    kind: str, times: np.ndarray, probabilities: np.ndarray, rule: SpanRule, seconds: float, cuts: Iterable[float]
) -> list[Span]:
    active = np.flatnonzero(probabilities >= rule.begin * rule.stay)
    if not len(active):
        return []
    # An event ends where the next piece is too far, or a cut lies between.
    pause = np.diff(times[active]) - seconds > rule.gap + ROUNDING
    passed = np.diff(np.searchsorted(np.sort(list(cuts)), times[active] - ROUNDING)) > 0
    spans = []
    for run in np.split(active, np.flatnonzero(pause | passed) + 1):
        start = max(0.0, float(times[run[0]]) + rule.shift)
        end = float(times[run[-1]]) + seconds + rule.shift
        if probabilities[run].max() >= rule.begin and end > start and end - start >= rule.shortest - ROUNDING:
            spans.append(Span(kind, start, end, float(probabilities[run].mean())))
    return spans


def _outside(span: Span, cut: Span) -> list[Span]:
    before, after = (span.start, min(span.end, cut.start)), (max(span.start, cut.end), span.end)
    return [span._replace(start=start, end=end) for start, end in (before, after) if start < end]


def key_moments(times: np.ndarray, scores: np.ndarray, thumbnails: np.ndarray, count: int) -> list[int]:
    """Which pictures show an event: the likeliest, then those that are both likely and unlike the ones chosen.

    Each next picture has the greatest product of its score and its smallest difference, the mean over the thumbnail, from
    a chosen one. Pictures that show nothing new are left out.

    Args:
        times: [n] seconds, in any order.
        scores: [n] from 0 to 1.
        thumbnails: [n, ...], small pictures of one shape.
        count: how many at most.

    Returns:
        Indices, in the order of their times.

    Raises:
        ValueError: shapes that do not fit, a negative score, or a `count` below 1.
    """
    times, scores, pictures = np.asarray(times, float), np.asarray(scores, float), np.asarray(thumbnails, float)
    if times.ndim != 1 or not times.shape == scores.shape == pictures.shape[:1]:
        raise ValueError(
            f"times, scores and thumbnails must be equally many, got {times.shape}, {scores.shape}, {pictures.shape}"
        )
    if count < 1 or not (scores >= 0).all():
        raise ValueError(f"count must be at least 1 and no score negative, got {count} and scores {scores}")
    if not len(times):
        return []
    flat = pictures.reshape(len(times), -1)
    chosen: list[int] = []
    worth = scores.copy()
    novelty = np.full(len(times), np.inf)
    while len(chosen) < count and (not chosen or worth.max() > 0):
        chosen.append(int(worth.argmax()))
        novelty = np.minimum(novelty, np.abs(flat - flat[chosen[-1]]).mean(1))
        worth = scores * novelty
    return sorted(chosen, key=lambda index: times[index])


@dataclass(frozen=True)
class Scored:
    """One video as a detector sees it, and what is true of it."""

    times: np.ndarray
    probabilities: np.ndarray
    events: Sequence[Event]


def choose_rules(videos: Sequence[Scored]) -> dict[str, SpanRule]:
    """The rules that find the events of these videos best: by kind, the greatest mean F1 over TOLERANCES.

    One attribute of one rule at a time, twice over, beginning with the gaps of `events`.
    """
    rules = {kind: SpanRule(gap={"fight": FIGHT_GAP, "boss": BOSS_GAP}.get(kind, 0.0)) for kind in KINDS}
    true = [Event(str(n), e.start, e.end, e.kind) for n, video in enumerate(videos) for e in video.events]
    wanted = {kind: [event for event in true if event.kind == kind] for kind in KINDS}

    def f1(kind: str, rule: SpanRule) -> float:
        found = [
            Event(str(n), span.start, span.end, kind)
            for n, video in enumerate(videos)
            for span in find_spans(video.times, video.probabilities, rules | {kind: rule})
            if span.kind == kind
        ]
        return sum(match(wanted[kind], found, seconds).scores()["f1"] or 0.0 for seconds in TOLERANCES)

    for kind in ORDER:
        for name, values in 2 * list(CHOICES.items()):
            candidates = [rules[kind], *(replace(rules[kind], **{name: value}) for value in values)]
            rules[kind] = max(candidates, key=partial(f1, kind))
    return rules
