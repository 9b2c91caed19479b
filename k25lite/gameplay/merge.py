"""What many sub-agents saw, as one list of events: those cut by a border become one, doubles go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from k25lite.gameplay.segments import Segment

KEYFRAMES = 3  # shown of an event at most


@dataclass(frozen=True, order=True)
class Found:
    """An event that was found, with its evidence.

    Attributes:
        start, end: seconds in that video. confidence: 0 to 1.
        keyframes: seconds of the frames that show it best, in order.
    """

    video: str
    start: float
    end: float
    kind: str
    confidence: float = 1.0
    keyframes: tuple[float, ...] = ()


def merge(parts: Iterable[tuple[Segment, Sequence[Found]]], gap: float = 0.0) -> list[Found]:
    """The events of all segments, in order.

    A segment answers for what reaches into it; what it saw only in its margin is its neighbour's. Events of one kind that
    overlap are one, and so are those of two segments that come within `gap` seconds of each other. The one event keeps the
    highest confidence, and the key frames of whoever was most confident first.

    Raises:
        ValueError: an event is of another video than its segment, or ends before it starts.
    """
    pieces: dict[tuple[str, str], list[tuple[Found, Segment]]] = defaultdict(list)
    for segment, events in parts:
        for event in events:
            if event.video != segment.video or event.end < event.start:
                raise ValueError(f"{event} is no event of {segment}")
            if event.start < segment.end and (event.end > segment.start or event.start >= segment.start):
                pieces[event.video, event.kind].append((event, segment))
    merged: list[Found] = []
    for of_kind in pieces.values():
        of_kind.sort()
        group, seen_by = [of_kind[0][0]], {of_kind[0][1]}
        for event, segment in of_kind[1:]:
            end = max(piece.end for piece in group)
            if event.start < end or (seen_by != {segment} and event.start <= end + gap):
                group.append(event)
                seen_by.add(segment)
            else:
                merged.append(_union(group))
                group, seen_by = [event], {segment}
        merged.append(_union(group))
    return sorted(merged)


def _union(pieces: Sequence[Found]) -> Found:
    if len(pieces) == 1:
        return pieces[0]
    first = min(pieces)
    best = sorted(pieces, key=lambda piece: (-piece.confidence, piece))
    keyframes = list(dict.fromkeys(time for piece in best for time in piece.keyframes))[:KEYFRAMES]
    end = max(piece.end for piece in pieces)
    return replace(first, end=end, confidence=best[0].confidence, keyframes=tuple(sorted(keyframes)))
