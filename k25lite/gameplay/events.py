"""What happened when: from the state of the game at each frame to the events of a video, and its state at each second.

The state is read from the game, never from its pictures: counters of damage and kills, health, the map, the game's
messages about items, and the class and visible box of every monster in view. An event is an interval of seconds in its
video, with a `detail` where one is known. KINDS are the events that can be seen in pictures, and for which a search
through pictures is scored:

fight   Player and ordinary monsters exchange damage, from the first hit to the last; hits at most FIGHT_GAP apart are
        one fight. A hit counts only if an ordinary monster was in view within SIGHT_MEMORY, so that slime or a shot-up
        barrel alone is no fight. Fights shorter than SHORTEST_FIGHT are dropped: one stray shot is nothing to see.
boss    A living boss is in view of the living player, from the first sight to the last; sights at most BOSS_GAP apart
        are one event, for the player turns away to dodge. Bosses are the classes with 1,000 hit points and more. In
        view means BOSS_AREA of the picture: smaller is a few pixels at the horizon. Shorter than SHORTEST_FIGHT is
        dropped as well.
pickup  An item is picked up: PICKUP_SECONDS from that moment, in which the picture flashes and the message appears.
        Pickups whose intervals touch are one event.
death   The player is dead: until it respawns, the map changes or the video ends.
level   Another map begins: its first LEVEL_SECONDS, or all of a shorter stay. The map on which a video opens is no event,
        for nothing changes.

NOTED are for reports, questions and training, and are not scored:

sight       A living boss is in view of the living player, without a break: what there is to see of a boss event.
kill        The game counts a kill of the player, or several: that one frame.
low_health  The player lives with LOW_HEALTH or less: until it is better off or dead, or the map changes.

Details: of boss, sight and kill the classes of monsters (a kill out of sight has none), of pickup the classes of items in
their order, of death and level the map.

A death or another map ends a fight. What lies within a boss event is taken out of the fights, so that these two never
overlap; other kinds may. Times are exact to one frame. The frame at `end` is the first that no longer belongs to the
event.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil, inf
from typing import NamedTuple

KINDS = ("fight", "boss", "pickup", "death", "level")
NOTED = ("kill", "low_health", "sight")
STATE = ("second", "map", "health", "armor", "ammo", "kills")  # ammo: for the weapon in hand; kills: in this video
BOSSES = ("BaronOfHell", "Cyberdemon", "SpiderMastermind")  # 1,000, 4,000 and 3,000 hit points
BOSS_AREA = 0.003  # of the picture: 58 of 160x120 pixels
MONSTER_AREA = 0.0005  # of the picture: 10 of 160x120 pixels; what is smaller is one spot among others
SIGHT_MEMORY = 1.0  # seconds: a shot is in the air, or the shooter has just stepped behind a wall
FIGHT_GAP = 3.0  # seconds: longer than reloading and a dodge, shorter than the way to the next room
BOSS_GAP = 10.0  # seconds
SHORTEST_FIGHT = 1.0  # seconds
PICKUP_SECONDS = 1.0
LEVEL_SECONDS = 2.0
LOW_HEALTH = 25  # of 100: the game has a special message for a medikit found in this need

Span = tuple[float, float]  # frames, end exclusive


class Box(NamedTuple):
    """Where a monster is to be seen, in parts of the width and of the height of the picture."""

    monster: str  # its class
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Step:
    """What the game says about one frame."""

    map: str
    alive: bool = True
    hit: bool = False  # the player dealt or took damage since the frame before
    monster: bool = False  # a living ordinary monster is in view
    bosses: tuple[str, ...] = ()  # classes of the living bosses in view
    pickups: tuple[str, ...] = ()  # classes of the items picked up since the frame before
    killed: tuple[str, ...] = ()  # classes of the monsters that died in view since the frame before
    kills: int = 0  # of the player in this video so far
    health: int = 100
    armor: int = 0
    ammo: int = 0  # for the weapon in hand
    boxes: tuple[Box, ...] = ()  # of the living monsters in view


@dataclass(frozen=True, order=True)
class Event:
    """One line of events.jsonl; `start` and `end` in seconds of that video."""

    video: str
    start: float
    end: float
    kind: str
    detail: str = ""

    def as_dict(self) -> dict[str, str | float]:
        return {name: value for name, value in asdict(self).items() if value != ""}


def find_events(video: str, steps: Sequence[Step], fps: float) -> list[Event]:
    """The events of one video of `len(steps)` frames, in order of their start; definitions above."""
    stretch = [0] * len(steps)  # a number for each stretch of frames of one life on one map
    changes, hits, bosses, kills = [], [], [], []
    seen: float = -inf
    for i, step in enumerate(steps):
        before = steps[max(i - 1, 0)]
        stretch[i] = stretch[max(i - 1, 0)] + ((step.map, step.alive) != (before.map, before.alive))
        if step.map != before.map:
            changes.append(i)
            seen = -inf  # a monster of the map before cannot hit
        if step.monster:
            seen = i
        if step.alive and step.hit and i - seen <= SIGHT_MEMORY * fps:
            hits.append(i)
        if step.alive and step.bosses:
            bosses.append(i)
        if step.kills > before.kills:
            kills.append(i)

    shortest = SHORTEST_FIGHT * fps
    boss = [span for span in _join(bosses, BOSS_GAP * fps, stretch) if span[1] - span[0] >= shortest]
    fight = _without(_join(hits, FIGHT_GAP * fps, stretch), boss)
    found: dict[str, list[Span]] = {
        "fight": [span for span in fight if span[1] - span[0] >= shortest],
        "boss": boss,
        "pickup": _merge((i, i + PICKUP_SECONDS * fps) for i, step in enumerate(steps) if step.pickups),
        "death": _join((i for i, step in enumerate(steps) if not step.alive), 1, stretch),
        "level": [(i, min(i + LEVEL_SECONDS * fps, j)) for i, j in pairwise([*changes, len(steps)])],
        "sight": _join(bosses, 1, stretch),
        "kill": [(i, i + 1) for i in kills],
        "low_health": _join(
            (i for i, step in enumerate(steps) if step.alive and step.health <= LOW_HEALTH), 1, stretch
        ),
    }
    return sorted(
        Event(
            video,
            round(start / fps, 3),
            round(min(end, len(steps)) / fps, 3),
            kind,
            _detail(kind, steps[int(start) : ceil(end)]),
        )
        for kind, spans in found.items()
        for start, end in spans
    )


def states(steps: Sequence[Step], fps: float) -> list[tuple[int, str, int, int, int, int]]:
    """What the frame shown at each full second of a video says, in the order of STATE."""
    rows = []
    for second in range(ceil(len(steps) / fps)):
        step = steps[int(second * fps)]
        rows.append((second, step.map, step.health, step.armor, step.ammo, step.kills))
    return rows


def _detail(kind: str, steps: Sequence[Step]) -> str:
    names: Iterable[str] = ()
    if kind in ("death", "level"):
        names = [steps[0].map]
    elif kind in ("boss", "sight"):
        names = dict.fromkeys(name for step in steps for name in step.bosses)
    elif kind == "pickup":
        names = [name for step in steps for name in step.pickups]
    elif kind == "kill":
        names = steps[0].killed
    return ", ".join(names)


def _join(frames: Iterable[int], gap: float, stretch: Sequence[int]) -> list[Span]:
    """Spans of frames (end exclusive): neighbours lie at most `gap` frames apart, in one stretch."""
    spans: list[Span] = []
    last = -1
    for i in frames:
        if spans and i - last <= gap and stretch[i] == stretch[last]:
            spans[-1] = (spans[-1][0], i + 1)
        else:
            spans.append((i, i + 1))
        last = i
    return spans


def _merge(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _without(spans: list[Span], cuts: list[Span]) -> list[Span]:
    for low, high in cuts:
        spans = [
            part
            for start, end in spans
            for part in ((start, min(end, low)), (max(start, high), end))
            if part[0] < part[1]
        ]
    return spans
