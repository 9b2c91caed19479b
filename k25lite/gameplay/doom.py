"""The game: a ViZDoom process with the levels of Freedoom: Phase 2, or one of ViZDoom's scenarios, read frame by frame.

Multiplayer mode with one player (`-host 1`): in single-player mode death ends the episode at once, and no frame of it
could be recorded. `Mode.PLAYER` is synchronous, the game waits for the player, so that equal seeds and actions give
equal pictures.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from zipfile import ZipFile

import numpy as np

from k25lite.gameplay.encounters import EVERY, Encounters
from k25lite.gameplay.events import BOSS_AREA, BOSSES, MONSTER_AREA, Box, Step
from k25lite.gameplay.player import BUTTONS, EYE_LINE, Player, Sight, Sprite

TICS_PER_SECOND = 35
TICS_PER_FRAME = 4  # 8.75 frames per second: a quarter of the data, and the shortest event still has 8 frames
MAPS = tuple(f"MAP{number:02d}" for number in range(1, 33))
# Arenas that come with ViZDoom, by the names of their files: others have nothing to meet, or are for several players.
SCENARIOS = ("DEADLY_CORRIDOR", "DEATHMATCH", "DEFEND_THE_CENTER", "DEFEND_THE_LINE", "HEALTH_GATHERING_SUPREME")
WIDTHS = (160, 320, 640)  # of the picture in pixels, at 4:3
COUNTERS = ("DAMAGECOUNT", "DAMAGE_TAKEN", "KILLCOUNT")  # of the player, on this map
VARIABLES = (*COUNTERS, "HEALTH", "ARMOR", "SELECTED_WEAPON_AMMO", "POSITION_X", "POSITION_Y", "ANGLE")
DEAD_FRAMES = 18  # about 2 s
ARMS = (("Shotgun", "Shell 30"), ("SuperShotgun", "Shell 40"), ("Chaingun", "Clip 150"), ("PlasmaRifle", "Cell 120"))
REARM = 0.4  # share of encounters with another weapon: what a weapon fires hides what it hits
BOSS_TRIES = 3  # a boss that found no room where the player looks is summoned again
FRAMES_BETWEEN_TRIES = 18  # about 2 s: the player looks elsewhere by then

# Left alone, the game outlives a killed Python: it waits for its next command for ever, deaf to SIGTERM. Linux ends a
# process with its parent if the process itself asks for it, hence a launcher, which asks and then becomes the game. It
# also moves to the work directory, where the game leaves its files, and to a process group of its own: Ctrl-C is for
# Python, which then closes the game.
_LAUNCHER = """
import ctypes, os, signal, sys
launcher, parent, work, game = sys.argv[1:5]
os.unlink(launcher)
os.chdir(work)
with open("instance", "w") as file:  # names the shared memory: for remove_leftovers
    file.write(sys.argv[sys.argv.index("+viz_instance_id") + 1])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(parent):  # it ended before we could ask
    sys.exit(1)
os.setpgid(0, 0)
log = os.open("game.log", os.O_WRONLY | os.O_CREAT)
os.dup2(log, 1)
os.dup2(log, 2)
os.execv(game, [game, *sys.argv[5:]])
"""


def require_vizdoom() -> Any:
    """The module vizdoom; ModuleNotFoundError, with the way to install it, if there is none."""
    try:
        import vizdoom
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("recording needs the game: pip install 'k25lite[game]'", name="vizdoom") from error
    return vizdoom


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when `parent`, which started it, ends, however that is. Elsewhere: nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


@contextmanager
def running_game(work: Path, *, first_map: str, seed: int, width: int, encounters: bool = False) -> Iterator[Any]:
    """A running `vizdoom.DoomGame`, closed at the end; its files go to the directory `work`.

    It can go on to others of MAPS; a scenario is a game of its own.

    With `encounters` it tells of all objects of a map, and writes no messages: these would name what is removed.

    On Linux the game never outlives this process. What a game killed in this way leaves behind: see
    `remove_leftovers`.
    """
    vizdoom = require_vizdoom()
    work = work.resolve()
    package = Path(vizdoom.__file__).parent
    game = vizdoom.DoomGame()
    game.set_doom_game_path(str(package / "freedoom2.wad"))
    game.set_doom_config_path(str(work / "game.ini"))
    if first_map in SCENARIOS:
        game.set_doom_scenario_path(str(package / "scenarios" / f"{first_map.lower()}.wad"))
    game.set_doom_map(MAPS[0] if first_map in SCENARIOS else first_map)
    game.set_seed(seed)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_doom_skill(3)
    game.set_episode_timeout(0)
    game.add_game_args("-host 1 +sv_cheats 1")  # cheats: to summon bosses and hand out weapons
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{width}X{width * 3 // 4}"))
    game.set_render_hud(True)
    game.set_render_messages(not encounters)
    game.set_objects_info_enabled(encounters)
    game.set_labels_buffer_enabled(True)
    game.set_depth_buffer_enabled(True)
    game.set_notifications_buffer_enabled(True)
    game.set_notifications_buffer_size(TICS_PER_FRAME)  # each message once: those since the frame before
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in BUTTONS])
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in VARIABLES])
    if os.name == "posix":
        game.set_vizdoom_path(_write_launcher(package / "vizdoom", work))
    game.init()
    try:
        yield game
    finally:
        game.close()


def _write_launcher(game: Path, work: Path) -> str:
    # In the system's temporary directory, because the output may lie on a drive from which nothing can be run.
    descriptor, launcher = tempfile.mkstemp(prefix="k25lite-game-", suffix=".sh")
    command = [sys.executable, "-ISc", _LAUNCHER, launcher, str(os.getpid()), str(work), str(game)]
    with open(descriptor, "w") as file:
        file.write(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    os.chmod(launcher, 0o700)
    return launcher


def remove_leftovers(work: Path) -> None:
    """Remove the work directory of a game, if there, and the 10 MB of shared memory that a killed game leaves."""
    if (work / "instance").exists():
        instance = (work / "instance").read_text()
        for name in ("ViZDoomSM", "ViZDoomMQDoom", "ViZDoomMQCtr"):
            Path("/dev/shm", name + instance).unlink(missing_ok=True)
    if work.exists():
        shutil.rmtree(work)


def parse_maps(text: str) -> list[str]:
    """The places that `text` names one by one or by range: "MAP01,MAP05-MAP08,DEATHMATCH" are six; else ValueError."""
    maps: list[str] = []
    for part in text.upper().split(","):
        first, dash, last = (name.strip() for name in part.partition("-"))
        if not dash and first in SCENARIOS:
            maps.append(first)
            continue
        if not dash:
            last = first
        if first not in MAPS or last not in MAPS[MAPS.index(first) :]:
            places = f"{MAPS[0]} to {MAPS[-1]} and {', '.join(SCENARIOS)}"
            raise ValueError(f"maps are {places}, as in MAP01,MAP05-MAP08, not {text!r}")
        maps += MAPS[MAPS.index(first) : MAPS.index(last) + 1]
    return maps


def pickup_messages() -> dict[str, str]:
    """What the game says when an item is picked up, and the class of that item.

    The game's definitions of items name their messages (GOTCLIP); the file of levels says what these read.
    """
    package = Path(require_vizdoom().__file__).parent
    with ZipFile(package / "vizdoom.pk3") as archive:
        files = [archive.read(path).decode("latin-1") for path in archive.namelist() if path.startswith("actors/doom/")]
    items: dict[str, str] = {}
    for actor in re.split(r"(?im)^actor\s+", "".join(files))[1:]:
        items |= dict.fromkeys(re.findall(r'"\$(GOT\w+)"', actor), actor.split()[0])
    items["GOTREDSKULL"] = items["GOTREDSKUL"]  # so spelled in the levels alone

    data = (package / "freedoom2.wad").read_bytes()
    count, directory = struct.unpack_from("<ii", data, 4)
    for start, size, name in struct.iter_unpack("<ii8s", data[directory : directory + 16 * count]):
        if name == b"DEHACKED":
            strings = re.findall(r"^(GOT\w+) = (.+)$", data[start : start + size].decode("latin-1"), re.MULTILINE)
            return {message.strip(): items[name] for name, message in strings}
    raise ValueError("freedoom2.wad has no lump DEHACKED to tell which messages mean a pickup")


def play(
    work: Path,
    frames: int,
    *,
    maps: Iterator[str],
    seed: int,
    width: int,
    map_seconds: float,
    encounters: bool = False,
) -> Generator[tuple[np.ndarray, Step], None, None]:
    """Play `frames` frames; yield each picture (uint8, [height, width, 3], RGB) and what the game says about it.

    The player stays 0.5 to 1.5 times `map_seconds` on each of `maps` and meets a boss there, if one finds room to
    appear. With `encounters` it also meets one monster after another: see that module.
    """
    rng = Random(seed)
    items = pickup_messages()
    picture_area = width * width * 3 // 4
    player = Player(Random(rng.random()), width, TICS_PER_FRAME)
    name = next(maps)
    seed = rng.randrange(2**31)
    with ExitStack() as stack:
        start = partial(running_game, work, width=width, encounters=encounters)
        game = stack.enter_context(start(first_map=name, seed=seed))
        meetings = Encounters(game, rng) if encounters else None
        frames_left = dead_frames = tries = boss_in = kills = 0
        before: list[float] | None = None  # the counters at the frame before
        living: dict[int, str] = {}  # classes of the monsters in view one frame before
        for number in range(frames):
            if frames_left == 0 or game.is_episode_finished():  # the latter: the player has found the exit
                if number:
                    last, name = name, next(maps)
                    if {last, name} <= set(MAPS):
                        game.set_doom_map(name)
                        game.new_episode()
                    else:
                        stack.close()
                        game = stack.enter_context(start(first_map=name, seed=rng.randrange(2**31)))
                    player.start_map()
                    meetings = Encounters(game, rng) if encounters else None
                stay = rng.uniform(0.5, 1.5) * map_seconds * TICS_PER_SECOND / TICS_PER_FRAME
                frames_left, dead_frames = max(1, round(stay)), 0
                tries, boss_in = BOSS_TRIES, round(rng.uniform(0.3, 0.7) * stay)
                before, living = None, {}  # the counters start anew, and so do the numbers of the monsters
                _arm(game, rng)
            elif dead_frames == DEAD_FRAMES:
                game.respawn_player()
                dead_frames = 0
                _arm(game, rng)

            state = game.get_state()
            *counts, health, armor, ammunition, x, y, _ = state.game_variables.tolist()
            before = before or counts
            kills += int(counts[2] - before[2])
            messages = state.notifications_buffer.splitlines()
            sprites = [Sprite.of_label(label, (x, y)) for label in state.labels]
            monsters = [sprite for sprite in sprites if sprite.is_monster]
            bosses = {s.name for s in monsters if s.name in BOSSES and s.area >= BOSS_AREA * picture_area}
            step = Step(
                map=name,
                alive=not game.is_player_dead(),
                hit=counts[:2] != before[:2],
                monster=any(s.name not in BOSSES and s.area >= MONSTER_AREA * picture_area for s in monsters),
                bosses=tuple(sorted(bosses)),
                pickups=tuple(items[line] for line in map(str.strip, messages) if line in items),
                killed=tuple(living[s.id] for s in sprites if s.id in living and not s.is_monster),
                kills=kills,
                health=max(0, int(health)),
                armor=int(armor),
                ammo=int(ammunition),
                boxes=tuple(_box(monster, width) for monster in monsters),
            )
            yield state.screen_buffer, step

            if meetings and step.alive and number % EVERY == EVERY - 1:
                if rng.random() < REARM:
                    _arm(game, rng)
                meetings.begin()
            before, living = counts, {monster.id: monster.name for monster in monsters}
            frames_left, boss_in = frames_left - 1, boss_in - 1
            if step.bosses:
                tries = 0
            if step.alive:
                depth = state.depth_buffer[round(EYE_LINE * state.depth_buffer.shape[0])]
                buttons = player.act(Sight(sprites, depth, (x, y), health, ammunition))
                if tries and boss_in <= 0:
                    game.send_game_command(f"summon {rng.choice(BOSSES)}")
                    tries, boss_in = tries - 1, FRAMES_BETWEEN_TRIES
            else:
                dead_frames += 1
                buttons = [0.0] * len(BUTTONS)
            game.make_action(buttons, TICS_PER_FRAME)


def _box(sprite: Sprite, width: int) -> Box:
    height, right, bottom = width * 3 // 4, sprite.left + sprite.width, sprite.top + sprite.height
    return Box(sprite.name, sprite.left / width, sprite.top / height, right / width, bottom / height)


def _arm(game: Any, rng: Random) -> None:
    weapon, ammunition = rng.choice(ARMS)
    for command in (f"give {weapon}", f"give {ammunition}", f"use {weapon}"):
        game.send_game_command(command)
