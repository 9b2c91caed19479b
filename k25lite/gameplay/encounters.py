"""Encounters: monsters of every kind, one after another, at places all over a map.

In ordinary play some kinds of monsters hardly appear, and bosses in few places; who learns from it learns the places. Here
the player is put where an item or a monster of the map stands, some monster appears before it, and it is seen from there or
from another such place, near or far. The scripted player then plays on as always, until the next encounter.
"""

from __future__ import annotations

from math import atan2, degrees, hypot
from random import Random
from typing import Any

from k25lite.gameplay.events import BOSSES
from k25lite.gameplay.player import BUTTONS, EYE_LINE, ITEMS

EVERY = 14  # frames, 1.6 s: long enough for shots to be exchanged, too short for most fights to end
MONSTERS = (
    "Zombieman",
    "ShotgunGuy",
    "ChaingunGuy",
    "DoomImp",
    "Demon",
    "Spectre",
    "LostSoul",
    "Cacodemon",
    "PainElemental",
    "HellKnight",
    "Revenant",
    "Arachnotron",
    "Fatso",
    "Archvile",
    "WolfensteinSS",
    *BOSSES,
)  # all that the game has and that move
BOSS_SHARE = 0.45  # of what is summoned, at least: bosses are what is hardest to tell from the rest
NUMBERS, WEIGHTS = (0, 1, 2), (0.08, 0.7, 0.22)  # of monsters in an encounter
ELSEWHERE = 0.85  # share of encounters at another place of the map
CLOSE = 0.25  # share of encounters seen from where the monster appears: close to it
NEAREST, FARTHEST = 100.0, 1500.0  # map units, to the monster from where else it is seen
PLACES = 4  # tries to find one with room for the monster
VIEWS = 6  # tries to find one from which it is in view
TURNS = 4  # directions at a place; the deepest view is taken, for nothing finds room before a wall
AIM = 30.0  # degrees that the monster is off the middle of the picture, at most
IDLE = [0.0] * len(BUTTONS)


class Encounters:
    """One after another on a map of a running game, whose objects must be enabled; equal seeds and games, equal ones."""

    def __init__(self, game: Any, rng: Random):
        self.game, self.rng = game, rng
        self.summoned: list[str] = []

    def begin(self) -> None:
        """Remove the monsters of the encounter before and put the player into another. Takes some tics of the game."""
        game, rng = self.game, self.rng
        for name in self.summoned:
            game.send_game_command(f"remove {name}")
        self.summoned = []
        game.send_game_command("give health")
        number = rng.choices(NUMBERS, WEIGHTS)[0]
        standing = [each for each in game.get_state().objects if each.category in (*ITEMS, "Monster")]
        spots = [(each.position_x, each.position_y) for each in standing]
        for attempt in range(PLACES):
            if spots and rng.random() < ELSEWHERE + attempt:
                self._go_deep(*rng.choice(spots))
            names = [rng.choice(BOSSES) if rng.random() < BOSS_SHARE else rng.choice(MONSTERS) for _ in range(number)]
            for name in names:
                game.send_game_command(f"summon {name}")
            self.summoned += names
            game.make_action(IDLE, 1)
            if self._ended() or not number:
                return
            if found := self._in_view():
                break
        else:
            return
        if rng.random() < CLOSE:
            return
        x, y = rng.choice(found)
        home = self._standpoint()
        near = [spot for spot in spots if NEAREST < hypot(spot[0] - x, spot[1] - y) < FARTHEST]
        for spot in rng.sample(near, min(len(near), VIEWS)):
            self._go(*spot, degrees(atan2(y - spot[1], x - spot[0])) + rng.uniform(-AIM, AIM))
            if self._ended() or self._in_view():
                return
        self._go(*home)

    def _ended(self) -> bool:
        """The player has died, or left the map, of what stood there."""
        return self.game.is_player_dead() or self.game.is_episode_finished()

    def _standpoint(self) -> tuple[float, float, float]:
        """Position, and angle in degrees."""
        x, y, angle = self.game.get_state().game_variables.tolist()[-3:]
        return x, y, angle

    def _in_view(self) -> list[tuple[float, float]]:
        """Positions of monsters of the kinds summoned."""
        labels = self.game.get_state().labels
        return [
            (each.object_position_x, each.object_position_y) for each in labels if each.object_name in self.summoned
        ]

    def _go(self, x: float, y: float, angle: float) -> None:
        self.game.send_game_command(f"warp {x:.0f} {y:.0f}")
        self.game.make_action(IDLE, 1)
        if self._ended():
            return
        turn = (angle - self._standpoint()[2] + 180) % 360 - 180
        self.game.make_action([*IDLE[:-1], -turn], 1)
        if not self._ended():
            self.game.make_action(IDLE, 1)

    def _go_deep(self, x: float, y: float) -> None:
        """To a place, looking where it is deep."""
        depths = {}
        for angle in [self.rng.uniform(0, 360) for _ in range(TURNS)]:
            self._go(x, y, angle)
            if self._ended():
                return
            depth = self.game.get_state().depth_buffer
            height, width = depth.shape
            depths[angle] = float(depth[round(EYE_LINE * height), width * 7 // 16 : width * 9 // 16].mean())
        self._go(x, y, max(depths, key=depths.__getitem__))
