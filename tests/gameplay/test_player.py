"""The scripted player, shown one sight at a time."""

from random import Random

import numpy as np
import pytest

from k25lite.gameplay.player import BUTTONS, PATIENCE, PUSH, TURN, Player, Sight, Sprite

WIDTH = 160
OPEN = np.full(WIDTH, 40)


def sprite(name="Zombieman", category="Monster", x=80.0, distance=200.0, id=1, width=10):
    return Sprite(id, name, category, left=x - width / 2, top=40, width=width, height=20, distance=distance)


def act(player, *sprites, depth=OPEN, position=(0.0, 0.0), health=100.0, ammunition=50.0):
    return dict(zip(BUTTONS, player.act(Sight(list(sprites), depth, position, health, ammunition)), strict=True))


@pytest.fixture
def player():
    return Player(Random(0), WIDTH, tics=4)


def test_shoots_what_is_ahead_and_turns_to_what_is_not(player):
    ahead = act(player, sprite(x=80))
    assert ahead["ATTACK"]
    assert ahead["TURN_LEFT_RIGHT_DELTA"] == pytest.approx(0)
    # a quarter of the picture to the right of the middle is atan(1/2) = 26.57 degrees, more than four tics of 6 degrees
    right = act(player, sprite(x=120))
    assert not right["ATTACK"]
    assert right["TURN_LEFT_RIGHT_DELTA"] == TURN
    # 8 columns to the left are atan(1/10) = 5.71 degrees, made in four tics
    assert act(player, sprite(x=72))["TURN_LEFT_RIGHT_DELTA"] == pytest.approx(-5.711 / 4, abs=1e-3)


def test_picks_the_nearest_living_monster(player):
    dead = sprite("DeadZombieman", x=150, distance=50, id=1)
    near, far = sprite(x=20, distance=100, id=2), sprite(x=150, distance=300, id=3)
    assert act(player, dead, far, near)["TURN_LEFT_RIGHT_DELTA"] < 0


def test_closes_in_without_ammunition(player):
    assert act(player, sprite(distance=100))["MOVE_BACKWARD"]
    assert act(player, sprite(distance=100), ammunition=0)["MOVE_FORWARD"]


def test_fetches_an_item_until_it_loses_patience(player):
    clip = sprite("Clip", "Ammo", x=140, distance=100)
    toward = [act(player, clip, position=(10.0 * i, 0.0)) for i in range(PATIENCE + 1)]
    assert all(a["MOVE_FORWARD"] and a["TURN_LEFT_RIGHT_DELTA"] == TURN for a in toward)
    away = act(player, clip, sprite("Clip", "Ammo", x=20, distance=300, id=2), position=(400.0, 0.0))
    assert away["TURN_LEFT_RIGHT_DELTA"] == -TURN, "it still goes for the clip that it could not reach"
    player.start_map()
    assert act(player, clip)["TURN_LEFT_RIGHT_DELTA"] == TURN, "numbers of items mean other items on another map"


def test_leaves_a_medikit_lying_only_at_full_health(player):
    medikit = sprite("Medikit", "Health", x=140, distance=100)
    assert act(player, medikit, health=60)["TURN_LEFT_RIGHT_DELTA"] == TURN
    level = np.full(WIDTH, 10)
    level[:8] = 60  # nothing draws it to the right
    assert act(player, medikit, depth=level, position=(50.0, 0.0))["TURN_LEFT_RIGHT_DELTA"] < 0


def test_explores_where_the_view_is_deep():
    depth = np.full(WIDTH, 10)
    depth[:40] = 60
    turns = [act(Player(Random(seed), WIDTH, tics=4), depth=depth)["TURN_LEFT_RIGHT_DELTA"] for seed in range(50)]
    assert all(turn < 0 for turn in turns)


def test_tries_a_wall_for_a_door_then_turns_to_the_deeper_side(player):
    depth = np.full(WIDTH, 2)
    depth[120:] = 30
    at_wall = [act(player, depth=depth) for _ in range(PUSH + 1)]
    assert [a["USE"] for a in at_wall] == [1.0] + [0.0] * PUSH, "a switch must be let go to be pressed again"
    assert all(a["TURN_LEFT_RIGHT_DELTA"] == 0 for a in at_wall[:PUSH])
    assert at_wall[PUSH]["TURN_LEFT_RIGHT_DELTA"] == TURN


def test_equal_seeds_give_equal_actions():
    rng = np.random.default_rng(0)
    depths = rng.integers(0, 64, (200, WIDTH))
    runs = []
    for seed in (1, 1, 2):
        player = Player(Random(seed), WIDTH, tics=4)
        runs.append([act(player, depth=depth, position=(float(8 * i), 0.0)) for i, depth in enumerate(depths)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
