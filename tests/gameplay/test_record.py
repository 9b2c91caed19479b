"""Recording, against the game itself: real footage, real kills."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from k25lite.cli import app
from k25lite.gameplay import doom
from k25lite.gameplay import record as recorder
from k25lite.gameplay.encounters import MONSTERS
from k25lite.gameplay.events import BOSS_AREA, BOSSES, KINDS, NOTED, Box, find_events, states
from k25lite.gameplay.record import record

needs_game = pytest.mark.skipif(find_spec("vizdoom") is None, reason="needs the game: pip install 'k25lite[game]'")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which ends the game with its parent")

# Three videos of 17 s, each on two maps or more: about a second of work each.
ARGUMENTS = {"videos": 3, "minutes": 0.85, "seed": 0, "map_seconds": 8.0, "workers": 1}
SHIPPED = Path(__file__).parents[2] / "data" / "gameplay"


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """The directory of an uninterrupted recording."""
    return record(tmp_path_factory.mktemp("recording"), **ARGUMENTS, progress=False).parent


def entries(directory):
    return json.loads((directory / "manifest.json").read_text())["videos"]


def events(directory):
    return [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]


def content(directory):
    """The files of a recording, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def check_files(directory):
    """Files, manifest and events agree with one another."""
    assert {path.name for path in directory.iterdir()} - {"states.csv"} == {"events.jsonl", "manifest.json"} | {
        entry["video"] for entry in entries(directory)
    }
    for entry in entries(directory):
        data = (directory / entry["video"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        with av.open(str(directory / entry["video"])) as container:
            [stream] = container.streams
            frames = list(container.decode(stream))
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", entry["width"], entry["height"])
        assert float(stream.average_rate) == entry["fps"] == 8.75
        assert len(frames) == entry["frames"] == round(entry["seconds"] * 8.75)
        assert [frame.time for frame in frames] == pytest.approx([i / 8.75 for i in range(len(frames))], abs=1e-4)
        keys = [i for i, frame in enumerate(frames) if frame.key_frame]
        assert max(np.diff([*keys, len(frames)])) <= 18
        assert data.find(b"moov") < data.find(b"mdat"), "the index belongs in front, so that players can stream"
        mine = [event for event in events(directory) if event["video"] == entry["video"]]
        assert all(0 <= event["start"] < event["end"] <= entry["seconds"] for event in mine)
        assert sum(event["kind"] == "level" for event in mine) == len(entry["maps"]) - 1
    for event in events(directory):
        assert event["kind"] in KINDS + NOTED
        assert list(event) in (["video", "start", "end", "kind"], ["video", "start", "end", "kind", "detail"])


@needs_game
def test_files_manifest_and_events_agree(recording):
    check_files(recording)
    assert [entry["frames"] for entry in entries(recording)] == [149, 149, 149]  # 17 s x 8.75 = 148.75
    header, *rows = (recording / "states.csv").read_text().splitlines()
    assert header == "video,second,map,health,armor,ammo,kills"
    seconds = [(entry["video"], str(second)) for entry in entries(recording) for second in range(18)]  # 17.03 s
    assert [tuple(row.split(",")[:2]) for row in rows] == seconds
    for entry in entries(recording):
        bosses = {event.get("detail") for event in events(recording) if event["kind"] == "boss"}
        assert bosses <= set(doom.BOSSES) | {f"{a}, {b}" for a in doom.BOSSES for b in doom.BOSSES}
        mine = [event for event in events(recording) if event["video"] == entry["video"]]
        assert [event["detail"] for event in mine if event["kind"] == "level"] == entry["maps"][1:]
        assert {event["detail"] for event in mine if event["kind"] == "death"} <= set(entry["maps"])


def test_shipped_clips_are_whole():
    check_files(SHIPPED)
    assert sum(entry["bytes"] for entry in entries(SHIPPED)) <= 3_000_000
    assert {event["kind"] for event in events(SHIPPED)} >= set(KINDS)


@needs_game
def test_shipped_clips_are_played_again_from_their_seeds(tmp_path):
    manifest = json.loads((SHIPPED / "manifest.json").read_text())
    if manifest["parameters"]["vizdoom"] != (here := doom.require_vizdoom().__version__):
        pytest.skip(f"needs vizdoom {manifest['parameters']['vizdoom']}, not {here}")
    for entry in manifest["videos"]:
        (work := tmp_path / entry["video"]).mkdir()
        session = doom.play(
            work, entry["frames"], maps=cycle(entry["maps"]), seed=entry["seed"], width=320, map_seconds=16.0
        )
        found = find_events(entry["video"], [step for _, step in session], entry["fps"])
        shipped = [event for event in events(SHIPPED) if event["video"] == entry["video"] and event["kind"] in KINDS]
        assert [(e.start, e.end, e.kind) for e in found if e.kind in KINDS] == [
            (e["start"], e["end"], e["kind"]) for e in shipped
        ]


@needs_game
def test_frames_and_events_are_those_of_the_game(recording, tmp_path, monkeypatch):
    """The same play again: its pictures against the decoded frames, other counts of the game against the events."""
    from vizdoom import GameVariable

    running = doom.running_game
    games = []

    @contextmanager
    def spy(*args, **kwargs):
        with running(*args, **kwargs) as game:
            games.append(game)
            yield game

    monkeypatch.setattr(doom, "running_game", spy)
    names = [
        "HEALTH",
        "ARMOR",
        "ITEMCOUNT",
        *(f"{kind}{i}" for kind in ("AMMO", "WEAPON") for i in range(10)),
    ]
    entry = entries(recording)[0]
    maps = cycle(list(dict.fromkeys(entry["maps"])))
    session = doom.play(tmp_path, entry["frames"], maps=maps, seed=entry["seed"], width=160, map_seconds=8.0)
    pictures, steps, possessions, ammo, deaths, kills = [], [], [], [], [], []
    for picture, step in session:
        pictures.append(picture.astype(float))
        steps.append(step)
        possessions.append([games[0].get_game_variable(getattr(GameVariable, name)) for name in names])
        ammo.append(games[0].get_game_variable(GameVariable.SELECTED_WEAPON_AMMO))
        deaths.append(games[0].get_game_variable(GameVariable.DEATHCOUNT))
        kills.append(games[0].get_game_variable(GameVariable.KILLCOUNT))

    with av.open(str(recording / entry["video"])) as container:
        decoded = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    error = np.mean([np.abs(a - b).mean() for a, b in zip(pictures, decoded, strict=True)])
    shifted = np.mean([np.abs(a - b).mean() for a, b in zip(pictures[:-1], decoded[1:], strict=True)])
    assert 2 * error < shifted, "frame i of the file is picture i of the game"

    found = find_events(entry["video"], steps, 8.75)
    assert [event.as_dict() for event in found] == [e for e in events(recording) if e["video"] == entry["video"]]

    rows = [line.split(",") for line in (recording / "states.csv").read_text().splitlines()]
    mine = [row[1:] for row in rows if row[0] == entry["video"]]
    assert mine == [[str(value) for value in row] for row in states(steps, 8.75)]
    for second, _, *values, _ in mine:
        i = math.floor(int(second) * 8.75)
        health, armor = possessions[i][:2]
        assert [int(value) for value in values] == [max(0, health), armor, ammo[i]]  # a blow may leave health below 0
    killing = [i for i in range(1, len(steps)) if steps[i].map == steps[i - 1].map and kills[i] > kills[i - 1]]
    assert [event.start for event in found if event.kind == "kill"] == [round(i / 8.75, 3) for i in killing]
    assert steps[-1].kills == sum(kills[i] - kills[i - 1] for i in killing) > 0, (
        "this seed kills nothing: choose another"
    )
    seen_to_die = [name for event in found if event.kind == "kill" for name in event.detail.split(", ") if name]
    assert 0 < len(seen_to_die) <= steps[-1].kills

    # Weapons are handed out at the start of each life and map; after that, what the player has grows by pickups alone.
    lives = [
        i for i in range(1, len(steps)) if (steps[i].map, steps[i].alive) != (steps[i - 1].map, steps[i - 1].alive)
    ]
    settled = [i for i in range(3, len(steps)) if not {i - 2, i - 1, i} & set(lives)]
    gains = [
        i for i in settled if any(now > then for then, now in zip(possessions[i - 1], possessions[i], strict=True))
    ]
    assert gains == [i for i in settled if steps[i].pickups]
    assert gains, "this seed picks nothing up: choose another"
    died = [i for i in range(1, len(steps)) if deaths[i] > deaths[i - 1]]
    assert [event.start for event in found if event.kind == "death"] == [round(i / 8.75, 3) for i in died]
    assert died, "this seed does not die: choose another"


@needs_game
def test_pickup_messages_come_from_the_levels():
    messages = doom.pickup_messages()
    assert {"Picked up some bullets.", "Took a health refill.", "Got the minigun!"} <= messages.keys()
    assert not {"Blue key needed.", "A secret is revealed!"} & messages.keys()


@needs_game
def test_an_item_walked_into_is_named(tmp_path):
    """Items summoned one by one in front of a player who walks on."""
    messages = doom.pickup_messages()
    items = ["Stimpack", "RedSkull", "YellowCard", "CellPack", "SuperShotgun", "BlueArmor", "Medikit"]
    need = {"Stimpack": 5, "Medikit": 90}  # at full health they stay where they are
    forward = [float(name == "MOVE_FORWARD") for name in doom.BUTTONS]
    with doom.running_game(tmp_path, first_map="MAP01", seed=1, width=160) as game:
        for item in items:
            found = []
            game.new_episode()
            if item in need:
                game.send_game_command(f"take health {need[item]}")
            game.send_game_command(f"summon {item}")
            for _ in range(6):
                game.make_action(forward, doom.TICS_PER_FRAME)
                found += game.get_state().notifications_buffer.splitlines()
            assert [messages[line] for line in found if line in messages] == [item]


class Bar:
    """Instead of tqdm: `updates` are the numbers of frames it hears of, whatever bar it is."""

    updates: list[int]

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None

    def update(self, frames):
        self.updates.append(frames)


@needs_game
def test_number_of_workers_changes_nothing(recording, tmp_path, monkeypatch):
    Bar.updates = []
    monkeypatch.setattr(recorder, "tqdm", Bar)
    monkeypatch.setattr(recorder, "POLL_SECONDS", 0.005)  # a quick machine is through with a video in half a second
    record(tmp_path, **ARGUMENTS | {"workers": 2})
    assert content(tmp_path) == content(recording)
    assert sum(Bar.updates) == 3 * 149
    assert any(0 < frames < 149 for frames in Bar.updates), "the bar moves while a video is recorded, not only after"


def games_of(out):
    """Process ids of the games, and their launchers, whose files are in `out`."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (directory / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if str(out).encode() in arguments and b"viz_controlled" in arguments:
            found.add(int(directory.name))
    return found


def descendants_of(process):
    """Process ids of its children, their children and so on."""
    children = [
        int(pid) for path in Path(f"/proc/{process}/task").glob("*/children") for pid in path.read_text().split()
    ]
    return set(children).union(*map(descendants_of, children))


def runs(process):
    """It exists, and not only as a zombie."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def wait_until(condition, what, seconds=30):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)
    return value


@needs_game
@needs_linux
@pytest.mark.parametrize(
    ("how", "workers"),
    [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGTERM, 2)],
    ids=["kill", "kill-2-workers", "term-2-workers"],
)
def test_killed_recording_leaves_no_game_and_goes_on(how, workers, recording, tmp_path):
    out = tmp_path / "out"
    script = tmp_path / "script.py"
    call = f"record({str(out)!r}, **{ARGUMENTS | {'workers': workers}}, progress=False)"
    script.write_text(f"from k25lite.gameplay.record import record\nif __name__ == '__main__':\n    {call}\n")
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    try:
        # between the end of one video and the end of all: another one is half written
        finished = wait_until(lambda: list(out.glob("parts/*.mp4.json")), "the first video")[0].name.removesuffix(
            ".json"
        )
        wait_until(lambda: list(out.glob("parts/*/video.mp4")), "a video half written")
        games = wait_until(lambda: games_of(out), "a game")
        descendants = games | descendants_of(process.pid)
        process.send_signal(how)
        assert process.wait(30) == -how
        wait_until(lambda: not games_of(out), f"the end of the games {games}", seconds=30)
        wait_until(lambda: not any(map(runs, descendants)), "the end of the workers", seconds=30)
    finally:
        process.kill()
    assert not (out / "manifest.json").exists()
    for path in out.glob("*.mp4"):  # no half-written video bears a final name
        assert path.read_bytes() == (recording / path.name).read_bytes()
    instances = [path.read_text() for path in out.glob("parts/*/instance")]
    written = (out / finished).stat().st_mtime_ns

    record(out, **ARGUMENTS, progress=False)
    assert content(out) == content(recording)
    assert (out / finished).stat().st_mtime_ns == written, "a finished video was recorded again"
    assert not [name for name in os.listdir("/dev/shm") if any(instance in name for instance in instances)]


@needs_game
@needs_linux
def test_interrupt_does_not_wait_for_the_videos_in_progress(tmp_path):
    script = tmp_path / "script.py"
    call = f"record({str(tmp_path / 'out')!r}, videos=2, minutes=600, workers=2, progress=False)"
    script.write_text(f"from k25lite.gameplay.record import record\nif __name__ == '__main__':\n    {call}\n")
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(list((tmp_path / "out").glob("parts/*/video.mp4"))) == 2, "two videos half written")
        descendants = descendants_of(process.pid)
        process.send_signal(
            signal.SIGINT
        )  # to this process alone, as a notebook does; a terminal tells the workers too
        assert process.wait(20) == -signal.SIGINT
    finally:
        process.kill()
    assert len(descendants) >= 4, "two workers and two games"
    wait_until(lambda: not any(map(runs, descendants)), "the end of workers and games", seconds=5)


@needs_game
@needs_linux
def test_crash_of_the_game_is_reported_and_recording_goes_on(recording, tmp_path):
    caught = []

    class Killer(Bar):
        """Kills the game at the tenth frame of the second video."""

        def update(self, frames):
            super().update(frames)
            if sum(self.updates) == 149 + 10:
                caught.extend(games_of(tmp_path))
                for game in caught:
                    os.kill(game, signal.SIGKILL)

    Killer.updates = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "tqdm", Killer)
        with pytest.raises(RuntimeError, match=r"the game crashed while gameplay_0001\.mp4 was recorded"):
            record(tmp_path, **ARGUMENTS)
    assert len(caught) == 1
    record(tmp_path, **ARGUMENTS, progress=False)
    assert content(tmp_path) == content(recording)


@needs_game
def test_finished_recording_is_kept_and_a_lost_video_replaced(recording, tmp_path, monkeypatch):
    for name, data in content(recording).items():
        (tmp_path / name).write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "play", lambda *args, **kwargs: pytest.fail("played although all was recorded"))
        assert record(tmp_path, **ARGUMENTS, progress=False) == tmp_path / "manifest.json"
    (tmp_path / "gameplay_0001.mp4").unlink()
    (tmp_path / "gameplay_0002.mp4").write_bytes(b"cut short")
    record(tmp_path, **ARGUMENTS, progress=False)
    assert content(tmp_path) == content(recording)


@needs_game
def test_encounters_show_monsters_of_many_kinds_where_the_boxes_say(tmp_path):
    """And equal seeds give equal ones; a finished recording is taken as it is, a lost video replaced, with its boxes."""
    arguments = {"videos": 2, "minutes": 1.2, "seed": 3, "map_seconds": 12.0, "boxes": True, "encounters": True}
    made = record(tmp_path / "one", **arguments, progress=False).parent
    boxes = pd.read_csv(made / "boxes.csv")
    assert list(boxes.columns) == ["video", "frame", *Box._fields]
    assert set(boxes.monster) <= set(MONSTERS)
    assert boxes.monster.nunique() > 10
    corners = boxes[["left", "top", "right", "bottom"]]
    assert ((corners >= 0) & (corners <= 1)).all(None)
    assert ((boxes.right > boxes.left) & (boxes.bottom > boxes.top)).all()
    frames = sum(entry["frames"] for entry in entries(made))
    with_boss = boxes[boxes.monster.isin(BOSSES)].groupby(["video", "frame"]).ngroups
    assert with_boss / frames > 0.2
    area = (boxes.right - boxes.left) * (boxes.bottom - boxes.top)
    sights = [event for event in events(made) if event["kind"] == "sight"]
    large = boxes[boxes.monster.isin(BOSSES) & (area >= BOSS_AREA)]
    for frame in large[large.video == "gameplay_0000.mp4"].frame.unique():
        second = frame / 8.75
        inside = [s for s in sights if s["video"] == "gameplay_0000.mp4" and s["start"] - 1e-3 <= second < s["end"]]
        dead = [e for e in events(made) if e["kind"] == "death" and e["start"] - 1e-3 <= second < e["end"]]
        assert inside or dead, "where a boss has a large box the player, if alive, sees one"

    again = record(tmp_path / "two", **arguments, progress=False, workers=1).parent
    assert content(again) == content(made)
    (again / "gameplay_0001.mp4").unlink()
    record(again, **arguments, progress=False)
    assert content(again) == content(made)


@needs_game
def test_without_being_asked_for_there_are_no_boxes(recording):
    assert not (recording / "boxes.csv").exists()


@needs_game
def test_maps_are_those_asked_for(tmp_path):
    wanted = {"videos": 1, "minutes": 0.1, "map_seconds": 1.0, "progress": False}
    manifest = record(tmp_path, **wanted, maps=["MAP07", "MAP03", "MAP12"])
    assert json.loads(manifest.read_text())["parameters"]["maps"] == ["MAP03", "MAP07", "MAP12"]
    assert {name for entry in entries(tmp_path) for name in entry["maps"]} == {"MAP03", "MAP07", "MAP12"}
    before = content(tmp_path)
    assert record(tmp_path, **wanted, maps=["MAP12", "MAP03", "MAP07"]) == manifest
    with pytest.raises(ValueError, match=r"with maps \['MAP03', 'MAP07', 'MAP12'\], not all: choose"):
        record(tmp_path, **wanted)
    assert content(tmp_path) == before
    (tmp_path / "states.csv").unlink()  # as if recorded before there was one
    record(tmp_path, **wanted, maps=["MAP03", "MAP07", "MAP12"])
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "maps"),
    [
        ("MAP01", "01"),
        ("map02, MAP05-MAP07", "02 05 06 07"),
        ("MAP31 - MAP32,MAP01", "31 32 01"),
        ("MAP04-MAP04", "04"),
    ],
)
def test_maps_are_named_one_by_one_or_by_range(text, maps):
    assert doom.parse_maps(text) == [f"MAP{number}" for number in maps.split()]


def test_scenarios_are_named_among_maps():
    assert doom.parse_maps("map03, Deathmatch,MAP05-MAP06") == ["MAP03", "DEATHMATCH", "MAP05", "MAP06"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MAP33",
        "MAP1",
        "E1M1",
        "MAP05-MAP03",
        "MAP01-",
        "-MAP05",
        "MAP01,,MAP02",
        "1-5",
        "DEATHMATCH-MAP05",
        "BASIC",
    ],
)
def test_names_of_maps_that_do_not_exist_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="as in MAP01,MAP05-MAP08, not"):
        doom.parse_maps(text)
    failed = CliRunner().invoke(app, ["record", "--out", str(tmp_path / "out"), "--maps", text or ","])
    assert failed.exit_code == 2
    assert failed.stderr.startswith("k25lite: maps are MAP01 to MAP32")
    assert len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@needs_game
def test_a_disk_too_small_is_refused_before_anything_is_written(recording, tmp_path):
    with pytest.raises(ValueError, match=r"^recording needs about 6000000\.0 GB in .*, which has [0-9.]+ GB left$"):
        record(tmp_path / "out", minutes=1e10)  # 600 billion seconds of 10 kB
    assert not (tmp_path / "out").exists()
    for directory in (recording, SHIPPED):  # the estimate is that of real footage
        for entry in entries(directory):
            assert 0.3 < entry["bytes"] / (entry["seconds"] * recorder.BYTES_PER_SECOND[entry["width"]]) < 2


@needs_game
def test_other_parameters_are_refused_in_one_line(recording, tmp_path):
    before = content(recording)
    with pytest.raises(ValueError, match=r"holds a recording with seed 0, not 6; width 160, not 320: choose") as error:
        record(recording, **ARGUMENTS | {"seed": 6}, width=320, progress=False)
    assert "\n" not in str(error.value)
    assert content(recording) == before


@needs_game
@pytest.mark.parametrize("text", ['{"name": "an app"}', '{"parameters": 1, "videos": []}', "[]", "no JSON", ""])
def test_a_manifest_of_something_else_is_refused_in_one_line(tmp_path, text):
    for name in ("manifest.json", "events.jsonl", "states.csv"):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is that of something else: choose") as error:
        record(tmp_path, **ARGUMENTS, progress=False)
    assert "\n" not in str(error.value)
    assert len(list(tmp_path.iterdir())) == 3


@needs_game
def test_two_recordings_into_one_directory_are_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl", reason="needs a system with file locks")
    (tmp_path / "parts").mkdir()
    with open(tmp_path / "parts" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is recording into"):
            record(tmp_path, **ARGUMENTS, progress=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"videos": 0},
        {"minutes": 0},
        {"minutes": float("nan")},
        {"minutes": 1e-6},  # less than one frame
        {"workers": 0},
        {"width": 200},
        {"map_seconds": -1.0},
        {"maps": []},
        {"maps": ["MAP01", "MAP01"]},  # with one map there is no other to change to
        {"maps": ["MAP01", "MAP33"]},
        {"maps": "MAP01"},
    ],
    ids=str,
)
def test_bad_argument_is_named(wrong, tmp_path):
    [name] = wrong
    with pytest.raises(ValueError, match=rf"^{name} must"):
        record(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_missing_game_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'k25lite\[game\]'"):
        record(tmp_path)


@needs_linux
def test_orphaned_worker_ends():
    """A worker whose parent is gone before it could ask to end with it."""
    process = multiprocessing.get_context("spawn").Process(target=doom.end_with_parent, args=(1,))
    process.start()
    process.join(30)
    assert process.exitcode == 1


@needs_game
def test_scenarios_are_recorded_among_maps(tmp_path):
    chosen = ["MAP07", *doom.SCENARIOS]
    options = {"videos": 1, "minutes": 1.5, "seed": 3, "maps": chosen, "map_seconds": 12.0, "progress": False}
    record(tmp_path / "one", **options)
    check_files(tmp_path / "one")
    (entry,) = entries(tmp_path / "one")
    assert len(set(entry["maps"])) >= 5
    changes = [event for event in events(tmp_path / "one") if event["kind"] == "level"]
    assert [event["detail"] for event in changes] == entry["maps"][1:]
    assert any(event["kind"] == "fight" for event in events(tmp_path / "one"))
    record(tmp_path / "other", **options)
    assert content(tmp_path / "one") == content(tmp_path / "other")
    assert not (tmp_path / "one" / "parts").exists()


@needs_game
@pytest.mark.parametrize("scenario", doom.SCENARIOS)
def test_a_scenario_is_another_place_than_any_map(scenario, tmp_path):
    pictures = []
    for name in ("MAP01", scenario):
        work = tmp_path / name
        work.mkdir()
        with doom.running_game(work, first_map=name, seed=1, width=160) as game:
            pictures.append(game.get_state().screen_buffer.copy())
    assert np.abs(pictures[0].astype(float) - pictures[1]).mean() > 5
