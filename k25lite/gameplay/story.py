"""The story of a play-through in words, told from its events alone: per segment, per video, and over all of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from k25lite.gameplay.events import KINDS
from k25lite.gameplay.merge import Found

NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
PLURALS = {"boss": "bosses", "boss fight": "boss fights"}
SOON = 6.0  # seconds between the end of a fight and a death that it is taken to have caused
LONGEST_STORY = 12  # chapters told one by one; of a longer video, those in which most happens


def clock(seconds: float) -> str:
    """0:41, 12:05 or 1:02:03."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}" if minutes >= 60 else f"{minutes}:{second:02d}"


def length(seconds: float) -> str:
    """45 seconds, 12 minutes or 1 h 20 min, as one would say it."""
    if round(seconds) < 90:
        return _count(round(seconds), "second")
    minutes = round(seconds / 60)
    if minutes < 90:
        return _count(minutes, "minute")
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes % 60 else _count(minutes // 60, "hour")


def summary(events: Sequence[Found]) -> str:
    """How often there is what: "two fights, a boss and three pickups" """
    counts = Counter(event.kind for event in events)
    known = [kind for kind in KINDS if counts[kind]]
    return _list([_count(counts[kind], kind) for kind in known + sorted(counts.keys() - {*known})]) or "nothing of note"


def tell(events: Sequence[Found], seconds: float) -> list[str]:
    """The story of one video of that length, in chapters: a new one begins with each level.

    Args:
        events: those of the video, in order of their start.
    """
    if not events:
        return [f"Nothing of note happens in {length(seconds)}."]
    killers = _killers(events)
    borders = [0.0, *(event.start for event in events if event.kind == "level" and event.start > 0), seconds]
    chapters = []
    for number, (start, end) in enumerate(pairwise(borders)):
        inside = [e for e in events if start <= e.start and (e.start < end or number == len(borders) - 2)]
        chapters.append((number, start, end, [event for event in inside if event.kind != "level"]))
    told = sorted(sorted(chapters, key=lambda chapter: -len(chapter[3]))[:LONGEST_STORY])
    lines = [_chapter(*chapter, killers) for chapter in told]
    if rest := [chapter for chapter in chapters if chapter not in told]:
        others = [event for chapter in rest for event in chapter[3]]
        lines.append(f"On the other levels, {_count(len(rest), 'stay')} of together {summary(others)}.")
    return lines


def overall(events: Sequence[Found], seconds: Mapping[str, float]) -> str:
    """The whole play-through in a few sentences.

    Args:
        seconds: how long each video is, by its name.
    """
    total = sum(seconds.values())
    if not events:
        return f"In {length(total)} of video nothing of note was found."
    words = [f"In {length(total)} of play, in {_count(len(seconds), 'video')}, there are {summary(events)}."]
    if fights := [event for event in events if event.kind in ("fight", "boss")]:
        longest = max(fights, key=lambda event: event.end - event.start)
        share = sum(event.end - event.start for event in fights) / total
        what, took = "boss fight" if longest.kind == "boss" else "fight", length(longest.end - longest.start)
        words.append(f"Fighting fills {share:.0%} of the time.")
        words.append(f"The longest {what} takes {took}, from {clock(longest.start)} in {longest.video}.")
    of_video = defaultdict[str, list[Found]](list)
    for event in events:
        of_video[event.video].append(event)
    if bosses := sum(event.kind == "boss" for event in events):
        lost = sum(len({k for k in _killers(own).values() if k.kind == "boss"}) for own in of_video.values())
        outcome = (
            f"{_number(lost)} {'ends' if lost == 1 else 'end'} with the player's death" if lost else "none is lost"
        )
        words.append(f"Of {_count(bosses, 'boss fight')}, {outcome}.")
    if deaths := sum(event.kind == "death" for event in events):
        words.append(f"The player dies {_times(deaths)}, every {length(total / deaths)} on average.")
    if len(seconds) > 1:
        busiest = max(of_video, key=lambda video: len(of_video[video]))
        words.append(f"Most happens in {busiest}: {_count(len(of_video[busiest]), 'event')}.")
    return " ".join(words)


def _chapter(number: int, start: float, end: float, events: Sequence[Found], killers: Mapping[Found, Found]) -> str:
    place = "the level the video opens with" if number == 0 else f"level {number + 1}"
    opening = f"{clock(start)} to {clock(end)}, on {place}"
    deeds = []
    if fights := [event for event in events if event.kind == "fight"]:
        longest = max(fights, key=lambda event: event.end - event.start)
        which = ", the longest" if len(fights) > 1 else " of"
        took = f"{length(longest.end - longest.start)} at {clock(longest.start)}"
        deeds.append(f"{_count(len(fights), 'fight')}{which} {took}")
    rest = [event for event in events if event.kind not in ("fight", "boss", "death")]
    deeds += [summary(rest)] * bool(rest)
    sentences = [f"{opening}: {_list(deeds)}." if deeds or events else f"{opening}: nothing of note."]
    if not deeds and events:
        sentences = [f"{opening}."]
    fatal = {fight: death for death, fight in killers.items()}
    for boss in (event for event in events if event.kind == "boss"):
        end_of_it = f"until the player dies at {clock(fatal[boss].start)}" if boss in fatal else "and the player lives"
        sentences.append(f"A boss at {clock(boss.start)}, for {length(boss.end - boss.start)}, {end_of_it}.")
    others = [e for e in events if e.kind == "death" and (e not in killers or killers[e].kind != "boss")]
    if others:
        at = [clock(event.start) for event in others[:4]] + ["later"] * (len(others) > 4)
        sentences.append(f"The player dies {_times(len(others))}, at {_list(at).replace('at later', 'later')}.")
    return " ".join(sentences)


def _killers(events: Sequence[Found]) -> dict[Found, Found]:
    """By each death in one video, the fight in which, or soon after which, it falls; a boss fight before another."""
    killers: dict[Found, Found] = {}
    fights = [event for event in events if event.kind in ("fight", "boss")]
    for death in (event for event in events if event.kind == "death"):
        near = [fight for fight in fights if fight.start < death.start <= fight.end + SOON]
        if near:
            killers[death] = max(near, key=lambda fight: (fight.kind == "boss", fight.end))
    return killers


def _count(count: int, name: str) -> str:
    return f"{_number(count)} {name if count == 1 else PLURALS.get(name, name + 's')}"


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else f"{count:,}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{_number(count)} times")


def _list(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else "".join(items)
