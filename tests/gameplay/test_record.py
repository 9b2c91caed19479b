"""Recording, against the game itself: real footage, real kills."""

import hashlib
import json
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
import pytest

from k25lite.gameplay import doom
from k25lite.gameplay import record as recorder
from k25lite.gameplay.events import KINDS, find_events
from k25lite.gameplay.record import record

needs_game = pytest.mark.skipif(find_spec("vizdoom") is None, reason="needs the game: pip install 'k25lite[game]'")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which ends the game with its parent")

# Three videos of 17 s, each on two maps or more: about a second of work each.
ARGUMENTS = {"videos": 3, "minutes": 0.85, "seed": 0, "map_seconds": 8.0}
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
    assert {path.name for path in directory.iterdir()} == {"events.jsonl", "manifest.json"} | {
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
    assert {event["kind"] for event in events(directory)} <= set(KINDS)
    assert all(list(event) == ["video", "start", "end", "kind"] for event in events(directory))


@needs_game
def test_files_manifest_and_events_agree(recording):
    check_files(recording)
    assert [entry["frames"] for entry in entries(recording)] == [149, 149, 149]  # 17 s x 8.75 = 148.75


def test_shipped_clips_are_whole():
    check_files(SHIPPED)
    assert sum(entry["bytes"] for entry in entries(SHIPPED)) <= 3_000_000
    assert {event["kind"] for event in events(SHIPPED)} == set(KINDS)


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
    names = ["HEALTH", "ARMOR", "ITEMCOUNT", *(f"{kind}{i}" for kind in ("AMMO", "WEAPON") for i in range(10))]
    entry = entries(recording)[0]
    maps = cycle(list(dict.fromkeys(entry["maps"])))
    session = doom.play(tmp_path, entry["frames"], maps=maps, seed=entry["seed"], width=160, map_seconds=8.0)
    pictures, steps, possessions, deaths = [], [], [], []
    for picture, step in session:
        pictures.append(picture.astype(float))
        steps.append(step)
        possessions.append([games[0].get_game_variable(getattr(GameVariable, name)) for name in names])
        deaths.append(games[0].get_game_variable(GameVariable.DEATHCOUNT))

    with av.open(str(recording / entry["video"])) as container:
        decoded = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    error = np.mean([np.abs(a - b).mean() for a, b in zip(pictures, decoded, strict=True)])
    shifted = np.mean([np.abs(a - b).mean() for a, b in zip(pictures[:-1], decoded[1:], strict=True)])
    assert 2 * error < shifted, "frame i of the file is picture i of the game"

    found = find_events(entry["video"], steps, 8.75)
    assert [event.as_dict() for event in found] == [e for e in events(recording) if e["video"] == entry["video"]]

    # Weapons are handed out at the start of each life and map; after that, what the player has grows by pickups alone.
    lives = [
        i for i in range(1, len(steps)) if (steps[i].map, steps[i].alive) != (steps[i - 1].map, steps[i - 1].alive)
    ]
    settled = [i for i in range(3, len(steps)) if not {i - 2, i - 1, i} & set(lives)]
    gains = [
        i for i in settled if any(now > then for then, now in zip(possessions[i - 1], possessions[i], strict=True))
    ]
    assert gains == [i for i in settled if steps[i].pickup]
    assert gains, "this seed picks nothing up: choose another"
    died = [i for i in range(1, len(steps)) if deaths[i] > deaths[i - 1]]
    assert [event.start for event in found if event.kind == "death"] == [round(i / 8.75, 3) for i in died]
    assert died, "this seed does not die: choose another"


@needs_game
def test_pickup_messages_come_from_the_levels():
    messages = doom.pickup_messages()
    assert {"Picked up some bullets.", "Took a health refill.", "Got the minigun!"} <= messages
    assert not {"Blue key needed.", "A secret is revealed!"} & messages


@needs_game
def test_number_of_workers_changes_nothing(recording, tmp_path):
    record(tmp_path, **ARGUMENTS, workers=2, progress=False)
    assert content(tmp_path) == content(recording)


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


def wait_until(condition, what, seconds=30):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)
    return value


@needs_game
@needs_linux
@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 1), (signal.SIGTERM, 2)], ids=["kill", "term-2-workers"])
def test_killed_recording_leaves_no_game_and_goes_on(how, workers, recording, tmp_path):
    out = tmp_path / "out"
    script = tmp_path / "script.py"
    call = f"record({str(out)!r}, **{ARGUMENTS}, workers={workers}, progress=False)"
    script.write_text(f"from k25lite.gameplay.record import record\nif __name__ == '__main__':\n    {call}\n")
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    try:
        # between the end of one video and the end of all: another one is half written
        finished = wait_until(lambda: list(out.glob("parts/*.mp4.json")), "the first video")[0].name.removesuffix(
            ".json"
        )
        wait_until(lambda: list(out.glob("parts/*/video.mp4")), "a video half written")
        games = wait_until(lambda: games_of(out), "a game")
        process.send_signal(how)
        assert process.wait(10) == -how
        wait_until(lambda: not games_of(out), f"the end of the games {games}", seconds=5)
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
def test_crash_of_the_game_is_reported_and_recording_goes_on(recording, tmp_path):
    caught = []

    class Bar:
        """Kills the game at the tenth frame of the second video."""

        def __init__(self, *args, **kwargs):
            self.frames = 0

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def update(self, frames):
            self.frames += frames
            if self.frames == 149 + 10:
                caught.extend(games_of(tmp_path))
                for game in caught:
                    os.kill(game, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "tqdm", Bar)
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
def test_other_parameters_are_refused_in_one_line(recording, tmp_path):
    before = content(recording)
    with pytest.raises(ValueError, match=r"holds a recording with seed 0, not 6; width 160, not 320: choose") as error:
        record(recording, **ARGUMENTS | {"seed": 6}, width=320, progress=False)
    assert "\n" not in str(error.value)
    assert content(recording) == before


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
