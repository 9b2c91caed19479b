"""How well the events found in videos agree with the true ones.

An event is found if one of its kind begins, in the same video, at most `tolerance` seconds before or after it, and each
answers for one other at most. Of all ways to pair them, one with the most pairs counts, and among these the one with the
smallest differences. This is how action spotting is scored, with starts for the moments of actions; how well pairs also
agree in length is told by their temporal intersection over union. Precision, recall and F1 are over all events of a kind
in all videos; the macro-F1 is the mean of the F1 of the kinds that occur.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from k25lite.gameplay.events import KINDS, Event
from k25lite.results import write_whole

TOLERANCE = 2.0  # seconds
TOLERANCES = (1.0, 2.0, 5.0)


@dataclass
class Matching:
    """Which events are which.

    Attributes:
        pairs: (true, found).
        missed: true events that were not found.
        wrong: found events that are not true.
    """

    pairs: list[tuple[Event, Event]] = field(default_factory=list)
    missed: list[Event] = field(default_factory=list)
    wrong: list[Event] = field(default_factory=list)

    def of(self, **fields: str) -> Matching:
        """The part with these values of `video` or `kind`."""

        def chosen(event: Event) -> bool:
            return all(getattr(event, name) == value for name, value in fields.items())

        return Matching(
            [pair for pair in self.pairs if chosen(pair[0])],
            [event for event in self.missed if chosen(event)],
            [event for event in self.wrong if chosen(event)],
        )

    def scores(self) -> dict[str, float | int | None]:
        """precision, recall, f1; mean_iou of the pairs, None without any; and the numbers true, found, matched.

        What would be divided by zero is 0.
        """
        matched = len(self.pairs)
        true, found = matched + len(self.missed), matched + len(self.wrong)
        return {
            "precision": matched / max(found, 1),
            "recall": matched / max(true, 1),
            "f1": 2 * matched / max(true + found, 1),
            "mean_iou": sum(temporal_iou(*pair) for pair in self.pairs) / matched if matched else None,
            "true": true,
            "found": found,
            "matched": matched,
        }

    def per_kind(self) -> dict[str, Any]:
        """{"macro_f1", "per_kind": {kind: scores}} over the kinds that occur; macro_f1 is None if none does."""
        events = [*(true for true, _ in self.pairs), *self.missed, *self.wrong]
        kinds = sorted({event.kind for event in events}, key=KINDS.index)
        scores = {kind: self.of(kind=kind).scores() for kind in kinds}
        macro = sum(score["f1"] or 0.0 for score in scores.values()) / len(scores) if scores else None
        return {"macro_f1": macro, "per_kind": scores}


def match(true: Iterable[Event], found: Iterable[Event], tolerance: float = TOLERANCE) -> Matching:
    """Pair true and found events; definition above. Kinds outside of KINDS are left out.

    Raises:
        ValueError: `tolerance` is negative or no number, or an event ends before it starts or has no finite times.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a number of seconds from 0, got {tolerance}")
    groups: dict[tuple[str, str], tuple[list[Event], list[Event]]] = defaultdict(lambda: ([], []))
    for side, events in enumerate((true, found)):
        for event in sorted(events, key=lambda event: (event.start, event.end)):  # which of equal pairings: always one
            if not -math.inf < event.start <= event.end < math.inf:
                raise ValueError(f"an event must have finite times and not end before it starts: {event}")
            if event.kind in KINDS:
                groups[event.video, event.kind][side].append(event)
    matching = Matching()
    for _, (trues, founds) in sorted(groups.items()):
        pairs = _pairs([event.start for event in trues], [event.start for event in founds], tolerance)
        matching.pairs += [(trues[i], founds[j]) for i, j in pairs]
        matching.missed += [event for i, event in enumerate(trues) if i not in {i for i, _ in pairs}]
        matching.wrong += [event for j, event in enumerate(founds) if j not in {j for _, j in pairs}]
    return matching


def score(
    true: Iterable[Event],
    found: Iterable[Event],
    *,
    videos: Collection[str] | None = None,
) -> dict[str, Any]:
    """The contents of metrics.json: scores at TOLERANCE, and over all videos also at each of TOLERANCES.

    Args:
        videos: what was analysed; true events of other videos are left out. None: the videos of all events.

    Returns:
        {"macro_f1", "per_kind": {kind: scores}, "tolerance_s", "tolerances": {seconds: {"macro_f1", "per_kind"}},
        "videos": {video: {"macro_f1", "per_kind"}}}; scores as in `Matching.scores`.

    Raises:
        ValueError: as `match`; or something was found in a video that is not of `videos`.
    """
    true, found = list(true), list(found)
    if videos is None:
        videos = {event.video for event in (*true, *found)}
    if strange := {event.video for event in found} - set(videos):
        raise ValueError(f"events were found in {min(strange)}, which is not one of the videos to score")
    true = [event for event in true if event.video in videos]
    matching = match(true, found)
    return {
        **matching.per_kind(),
        "tolerance_s": TOLERANCE,
        "tolerances": {f"{seconds:g}": match(true, found, seconds).per_kind() for seconds in TOLERANCES},
        "videos": {video: matching.of(video=video).per_kind() for video in sorted(videos)},
    }


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    write_whole(path, json.dumps(metrics, indent=1, allow_nan=False) + "\n")


def temporal_iou(one: Event, other: Event) -> float:
    """Seconds in both over seconds in either; 1 for two equal moments."""
    common = max(0.0, min(one.end, other.end) - max(one.start, other.start))
    either = (one.end - one.start) + (other.end - other.start) - common
    return common / either if either else float(one.start == other.start)


def _pairs(true: Sequence[float], found: Sequence[float], tolerance: float) -> list[tuple[int, int]]:
    distance = np.abs(np.subtract.outer(true, found))
    # One more pair outweighs any sum of differences.
    worth = tolerance * min(distance.shape) + 1
    near = distance <= tolerance + 1e-9  # a difference of two decimal fractions is not exact
    rows, columns = linear_sum_assignment(np.where(near, distance - worth, 0.0))
    return [(i, j) for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if near[i, j]]
