"""The scripted player: shoots the nearest monster in view, else fetches the nearest item, else explores.

It plays from what a player sees: labelled sprites, depths at eye height, its own health, ammunition and position. It
is no strong player and need not be: its deaths, detours and missed shots are what real footage is made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import atan, degrees, hypot, inf
from random import Random
from typing import Any

import numpy as np

BUTTONS = (
    "ATTACK",
    "USE",
    "SPEED",
    "MOVE_FORWARD",
    "MOVE_BACKWARD",
    "MOVE_RIGHT",
    "MOVE_LEFT",
    "TURN_LEFT_RIGHT_DELTA",
)
ITEMS = frozenset({"Ammo", "Armor", "Health", "Key", "Powerup", "Weapon"})  # categories of labels
ITEM_RANGE = 600.0  # map units; the player is 32 wide and walks 8 per tic
PATIENCE = 30  # steps spent on one item before it is given up as out of reach
TURN = 6.0  # degrees per tic at most: a faster turn leaves nothing in common between neighbouring frames
AIM = 4.0  # degrees off the target at which to shoot
WALL = 3  # units of depth (0 to 63): an arm's length
EYE_LINE = 0.42  # of the height of the picture: the middle of the view, which ends at the status bar, 168 of 200 lines
PUSH = 6  # steps in front of a wall before turning away: a door opens in that time


@dataclass(frozen=True)
class Sprite:
    """A labelled thing in view: the box around its pixels that can be seen, and its `distance` in map units."""

    id: int
    name: str
    category: str
    left: int
    top: int
    width: int
    height: int
    distance: float

    @property
    def x(self) -> float:
        """The column of its middle."""
        return self.left + self.width / 2

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def is_monster(self) -> bool:
        """Alive: the game calls a monster `Dead...` from the moment it dies."""
        return self.category == "Monster" and not self.name.startswith("Dead")

    @classmethod
    def of_label(cls, label: Any, position: tuple[float, float]) -> Sprite:
        distance = hypot(label.object_position_x - position[0], label.object_position_y - position[1])
        box = label.x, label.y, label.width, label.height
        return cls(label.object_id, label.object_name, label.object_category, *box, distance)


@dataclass(frozen=True)
class Sight:
    """What the player knows at one step."""

    sprites: list[Sprite]
    depth: np.ndarray  # [width]: depth at eye height, 0 to 63, larger is farther
    position: tuple[float, float]
    health: float
    ammunition: float  # for the weapon in hand


class Player:
    """The player of one video: it acts once per step of `tics` tics; equal seeds and sights give equal actions."""

    def __init__(self, rng: Random, width: int, tics: int):
        self.rng, self.width, self.tics = rng, width, tics
        self.start_map()

    def start_map(self) -> None:
        """Forget the map before."""
        self.position = (inf, inf)
        self.turn_left_to_make, self.steps_to_next_turn = 0.0, 0
        self.steps_at_wall = 0
        self.strafe, self.steps_to_next_strafe = 0, 0
        self.efforts: dict[int, int] = {}  # item id -> steps spent on it

    def act(self, sight: Sight) -> list[float]:
        """The values of BUTTONS to hold for the next `tics` tics."""
        moved = hypot(sight.position[0] - self.position[0], sight.position[1] - self.position[1])
        self.position = sight.position
        blocked = moved < 2 * self.tics
        monsters = [s for s in sight.sprites if s.is_monster and s.width >= self.width / 80]
        if monsters:
            return self._fight(min(monsters, key=lambda s: s.distance), sight.ammunition)
        items = [s for s in sight.sprites if self._wanted(s, sight.health)]
        if items:
            return self._fetch(min(items, key=lambda s: s.distance), blocked)
        return self._explore(sight.depth, blocked)

    def _angle(self, x: float) -> float:
        """Degrees from straight ahead to column `x`, right positive; the field of view is 90 degrees."""
        return degrees(atan(2 * x / self.width - 1))

    def _fight(self, target: Sprite, ammunition: float) -> list[float]:
        if self.steps_to_next_strafe <= 0:
            self.strafe, self.steps_to_next_strafe = self.rng.choice((-1, 0, 1)), self.rng.randint(4, 12)
        self.steps_to_next_strafe -= 1
        angle = self._angle(target.x)
        near, far = (150, 350) if ammunition > 0 else (0, 40)  # fists reach 64
        return self._buttons(
            angle,
            attack=abs(angle) < AIM + degrees(atan(target.width / self.width)),
            forward=target.distance > far,
            backward=target.distance < near,
            right=self.strafe,
        )

    def _wanted(self, sprite: Sprite, health: float) -> bool:
        if sprite.category not in ITEMS or sprite.distance > ITEM_RANGE or self.efforts.get(sprite.id, 0) > PATIENCE:
            return False
        return health < 100 or sprite.name not in ("Medikit", "Stimpack")  # which stay where they are at full health

    def _fetch(self, target: Sprite, blocked: bool) -> list[float]:
        self.efforts[target.id] = self.efforts.get(target.id, 0) + 1
        sidestep = self.rng.choice((-1, 1)) if blocked else 0
        return self._buttons(self._angle(target.x), forward=True, use=blocked, right=sidestep)

    def _explore(self, depth: np.ndarray, blocked: bool) -> list[float]:
        middle, body = len(depth) // 2, len(depth) // 16
        ahead = depth[middle - body : middle + body].min()
        self.steps_at_wall = self.steps_at_wall + 1 if ahead <= WALL or blocked else 0
        if 0 < self.steps_at_wall <= PUSH:
            return self._buttons(0.0, forward=True, use=self.steps_at_wall == 1)
        if self.steps_at_wall and abs(self.turn_left_to_make) < 1:
            deeper = 1 if depth[middle:].sum() > depth[:middle].sum() else -1
            self.turn_left_to_make, self.steps_to_next_turn = deeper * self.rng.uniform(60, 150), 15
        elif self.steps_to_next_turn <= 0:  # doors and corridors are where the view is deep
            weights = np.exp((depth.astype(float) - depth.max()) / 8)
            column = self.rng.choices(range(len(depth)), weights.tolist())[0]
            self.turn_left_to_make, self.steps_to_next_turn = self._angle(column + 0.5), self.rng.randint(10, 25)
        self.steps_to_next_turn -= 1
        turn = max(-TURN * self.tics, min(TURN * self.tics, self.turn_left_to_make))
        self.turn_left_to_make -= turn
        return self._buttons(turn, forward=abs(self.turn_left_to_make) < 45, run=ahead > 2 * WALL)

    def _buttons(
        self,
        angle: float,
        *,
        attack: bool = False,
        use: bool = False,
        run: bool = False,
        forward: bool = False,
        backward: bool = False,
        right: int = 0,
    ) -> list[float]:
        turn = max(-TURN, min(TURN, angle / self.tics))
        return [float(held) for held in (attack, use, run, forward, backward, right > 0, right < 0)] + [turn]
