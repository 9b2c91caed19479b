"""The whole analysis on small videos whose colours are its events; what may go wrong on the way really does."""

import asyncio
import base64
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from colours import COLOURS, Broken, ColourModel, Crashing, colour_model, write_truth, write_video
from PIL import Image
from typer.testing import CliRunner

from k25lite.cli import app
from k25lite.gameplay import analyze as module
from k25lite.gameplay import director, remote, segments
from k25lite.gameplay import footage as reading
from k25lite.gameplay.analyze import analyze
from k25lite.gameplay.clips import illustrate
from k25lite.gameplay.remote import Budget, RemoteViewer
from k25lite.gameplay.segments import Footage, find_videos, most_segments, plan, probe
from k25lite.gameplay.viewer import LocalViewer
from k25lite.swarm.critical import summarise
from k25lite.swarm.endpoint import OpenAIPolicy
from k25lite.swarm.limits import Exceeded
from k25lite.swarm.trace import read_trace
from k25lite.vision.media import MediaError

SHOWN = {
    "a.mp4": [
        (5.0, 12.0, "fight"),
        (17.0, 24.0, "boss"),
        (24.5, 27.0, "death"),
        (33.0, 35.0, "level"),
        (41.0, 42.5, "pickup"),
    ],
    "b.mp4": [(3.0, 4.5, "pickup"), (9.0, 21.0, "fight"), (28.0, 30.0, "level")],
}
SECONDS = {"a.mp4": 50.0, "b.mp4": 35.0}


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("footage")
    for name, shown in SHOWN.items():
        write_video(folder / name, shown, SECONDS[name])
    write_truth(folder / "events.jsonl", SHOWN)
    return folder


def shorten(patch):
    patch.setattr(segments, "SHORTEST", 10.0)
    patch.setattr(director, "MARGIN", 3.0)


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def analysed(footage, tmp_path_factory):
    """An analysis to look at, and to compare others with."""
    out = tmp_path_factory.mktemp("analysed")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        analyze([footage], out, truth=footage / "events.jsonl", model=colour_model, workers=1, progress=False)
    return out


def lines(out: Path):
    return [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def kinds(out: Path, video: str):
    return [line["kind"] for line in lines(out) if line["video"] == video]


def test_all_events_are_found_once_with_their_evidence(footage, analysed):
    found = lines(analysed)
    assert [(e["video"], e["kind"]) for e in found] == [(video, kind) for video in SHOWN for _, _, kind in SHOWN[video]]
    for event, (start, end, _) in zip(found, [shown for video in SHOWN for shown in SHOWN[video]], strict=True):
        assert abs(event["start"] - start) < 1
        assert abs(event["end"] - end) < 1
        assert event["confidence"] > 0.5
        assert event["start"] <= min(k["second"] for k in event["keyframes"])
        assert max(k["second"] for k in event["keyframes"]) <= event["end"]
        for keyframe in event["keyframes"]:
            colour = np.asarray(Image.open(analysed / keyframe["image"]))[24:].mean((0, 1))
            assert np.abs(colour - COLOURS[event["kind"]]).max() < 40
        with av.open(str(analysed / event["clip"])) as clip:
            assert clip.streams.video[0].codec_context.name == "h264"
    metrics = json.loads((analysed / "metrics.json").read_text())
    assert metrics["macro_f1"] == 1.0
    assert metrics["tolerance_s"] == 2.0
    assert (analysed / "report" / "index.html").exists()


def test_the_swarm_looked_split_watched_and_cut(analysed):
    run = summarise(read_trace(analysed / "trace.jsonl"))
    prompts = [json.loads(a.prompt) for path, a in run.assignments.items() if path != "0"]
    assert [task["video"] for task in prompts if task["pass"] == "coarse"] == ["a.mp4", "b.mp4"]
    fine = [task for task in prompts if task["pass"] == "fine"]
    assert len(fine) > 4
    for video in SHOWN:
        mine = sorted((task["start"], task["end"]) for task in fine if task["video"] == video)
        assert mine[0][0] == 0.0
        assert mine[-1][1] == pytest.approx(SECONDS[video], abs=0.2)
        assert all(end == start for (_, end), (start, _) in pairwise(mine))
    assert run.critical_steps < run.total_steps
    assert run.root.answer.startswith("In 85 seconds of play")
    for assignment in run.assignments.values():
        if '"fine"' in assignment.prompt:
            assert {"events", "summary"} <= json.loads(assignment.answer).keys()


def test_worker_processes_find_what_one_process_does_and_so_does_one_segment(footage, analysed, tmp_path, monkeypatch):
    analyze([footage], tmp_path / "two", model=colour_model, workers=2, progress=False)
    assert lines(tmp_path / "two") == lines(analysed)
    monkeypatch.setattr(segments, "SHORTEST", 1000.0)
    monkeypatch.setattr(segments, "LONGEST", 1000.0)
    analyze([footage], tmp_path / "uncut", model=colour_model, workers=1, progress=False)
    fine = [e for e in read_trace(tmp_path / "uncut" / "trace.jsonl") if '"fine"' in e.get("prompt", "")]
    assert len(fine) == len(SHOWN)
    assert [e | {"keyframes": 0, "confidence": 0} for e in lines(tmp_path / "uncut")] == [
        e | {"keyframes": 0, "confidence": 0} for e in lines(analysed)
    ]


def test_a_ray_cluster_finds_the_same(footage, analysed, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs the extra `ray`: pip install 'k25lite[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the workers
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a short name, for Ray's sockets
        monkeypatch.setenv("RAY_TMPDIR", folder)
        analyze([footage], tmp_path / "out", model=colour_model, workers=2, ray="local", progress=False)
    assert lines(tmp_path / "out") == lines(analysed)


def test_an_analysis_that_has_ended_is_told_again_and_not_done_again(footage, analysed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(analysed, out)
    trace = (out / "trace.jsonl").read_bytes()
    monkeypatch.setattr(director.Orchestrator, "run_sync", lambda *_: pytest.fail("worked again"))
    arguments = {"truth": footage / "events.jsonl", "model": colour_model, "workers": 1, "progress": False}
    (out / "report" / "index.html").unlink()
    analyze([footage], out, **arguments)
    assert (out / "trace.jsonl").read_bytes() == trace
    assert (out / "report" / "index.html").exists()
    assert lines(out) == lines(analysed)


SCRIPT = """
import sys
from colours import slow_model
from k25lite.gameplay import director, segments
from k25lite.gameplay.analyze import analyze
segments.SHORTEST, director.MARGIN = 10.0, 3.0
if __name__ == "__main__":
    analyze([sys.argv[1]], sys.argv[2], model=slow_model, workers=2, progress=False)
"""


def test_killed_and_resumed_it_finds_the_same_and_keeps_what_was_done(footage, analysed, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, tmp_path / "run.py", footage, out]
    running = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len([*(out / "work").glob("*.json")] if out.exists() else []) < 4:
            assert running.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        others = psutil.Process(running.pid).children(recursive=True)
        assert len(others) >= 2
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert not (out / "events.jsonl").exists()
    assert not psutil.wait_procs(others, timeout=30)[1], "workers outlive their parent"
    done = {path: path.stat().st_mtime_ns for path in (out / "work").glob("*.json")}
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert lines(out) == lines(analysed)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    events = [event["event"] for event in read_trace(out / "trace.jsonl")]
    assert events.count("resume") == 1
    assert events.count("end") == 1


def attempts(out: Path):
    """Of each fine assignment, its second and status, and those of all further attempts."""
    run = summarise(read_trace(out / "trace.jsonl"))
    return {path: a.status for path, a in run.assignments.items() if '"fine"' in a.prompt}


def test_a_crash_of_a_sub_agent_costs_one_retry_of_its_segment(footage, analysed, tmp_path):
    (tmp_path / "crash").touch()
    analyze([footage], tmp_path / "out", model=Crashing(tmp_path), workers=2, progress=False)
    assert lines(tmp_path / "out") == lines(analysed)
    tried = attempts(tmp_path / "out")
    failed = [path for path, status in tried.items() if status == "failed"]
    assert len(failed) == 1
    assert [path for path in tried if "#" in path] == [f"{failed[0]}#2"]
    assert tried[f"{failed[0]}#2"] == "done"


def test_a_segment_that_fails_is_reported_and_tried_again_by_the_next_run(footage, analysed, tmp_path, capsys):
    broken, out = tmp_path / "broken", tmp_path / "out"
    broken.touch()
    analyze([footage], out, model=Broken(tmp_path), workers=1, progress=False)
    assert re.search(r"^k25lite: a\.mp4: .*policy: RuntimeError: out of order$", capsys.readouterr().err, re.MULTILINE)
    assert {"fight", "pickup"} <= {*kinds(out, "a.mp4")}
    assert "level" not in kinds(out, "a.mp4")
    assert "out of order" in (out / "report" / "index.html").read_text()
    done = {path: path.stat().st_mtime_ns for path in (out / "work").glob("*.json")}
    broken.unlink()
    analyze([footage], out, model=Broken(tmp_path), workers=1, progress=False)
    assert lines(out) == lines(analysed)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert "out of order" not in capsys.readouterr().err + (out / "report" / "index.html").read_text()


def with_sound(path: Path, video: bool) -> Path:
    """A second of a tone, with grey pictures or without."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=10) if video else None
        sound = container.add_stream("aac", rate=44100)
        if pictures is not None:
            pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
            for _ in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24")
                container.mux(pictures.encode(frame))
            container.mux(pictures.encode())
        tone = (np.sin(np.arange(44100) / 20) * 9000).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def test_odd_files_are_analysed_or_reported_and_nobody_else_suffers(tmp_path, capsys):
    folder = tmp_path / "odd files <b>é'\"&"
    folder.mkdir()
    shown = [(2.0, 4.0, "death")]
    whole = write_video(folder / "whole.mp4", shown, 8.0)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video at all")
    (folder / "notes.txt").write_text("is passed over in a folder")
    with_sound(folder / "sound alone.mp4", video=False)
    with_sound(folder / "with sound.mp4", video=True)
    (folder / "no end.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])  # its index is gone
    cut = write_video(folder / "cut.mkv", [*shown, (9.0, 11.0, "boss")], 30.0)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.4, 40))
    write_video(folder / "varying.mp4", shown, times=[0.0, *times.tolist()])
    write_video(folder / "rotated.mp4", shown, 8.0, size=(96, 48), rotation=90)
    write_video(folder / "4k.mp4", [(0.4, 1.5, "death")], 2.0, fps=5, size=(3840, 2160), codec="mpeg4")
    write_video(folder / "one frame.mp4", seconds=0.1)
    (folder / "<img src=x onerror=alert(1)> \"quoted\" 'é' 文.mp4").write_bytes(whole.read_bytes())
    analyze([folder], tmp_path / "out", model=colour_model, workers=1, progress=False)

    told = capsys.readouterr().err
    for name in ("empty.mp4", "text.mp4", "sound alone.mp4", "no end.mp4", "cut.mkv"):
        assert re.search(f"^k25lite: {re.escape(name)}: ", told, re.MULTILINE), name
    assert "holds no video stream" in told
    for name in ("whole", "with sound", "varying", "rotated", "4k", "one frame"):
        assert not re.search(f"^k25lite: {re.escape(name)}", told, re.MULTILINE), name
    for name in ("whole.mp4", "varying.mp4", "rotated.mp4", "4k.mp4"):
        assert kinds(tmp_path / "out", name) == ["death"], name
    assert kinds(tmp_path / "out", "cut.mkv")[:1] == ["death"]
    assert len({line["video"] for line in lines(tmp_path / "out")}) == 6
    page = (tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8")
    assert "sound alone.mp4" in page
    assert "<img src=x" not in page


@pytest.mark.usefixtures("_no_keys")
def test_names_that_are_no_utf_8_are_analysed_reported_and_scored(tmp_path, capfd):
    folder = tmp_path / "footage"
    folder.mkdir()
    try:
        write_video(folder / "a.mp4", SHOWN["b.mp4"], 35.0).rename(folder / os.fsdecode(b"bad\xff.mp4"))
    except OSError:
        pytest.skip("needs a file system that takes any bytes for a name")
    cut = write_video(folder / "cut.mkv", [(2.0, 4.0, "death")], 30.0)
    (folder / os.fsdecode(b"cut\xff.mkv")).write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    cut.unlink()
    (folder / os.fsdecode(b"text\xff.mp4")).write_text("no video")
    with endpoint() as server:
        remotely = {"backend": "openai", "model": "eyes", "base_url": server.url}
        for arguments, told in (({"model": colour_model}, {"cut", "text"}), (remotely, {"text"})):
            out = tmp_path / arguments.get("backend", "local")
            analyze([folder], out, workers=1, progress=False, **arguments)
            analyze([folder], tmp_path / "again", workers=1, progress=False, truth=out / "events.jsonl", **arguments)
            assert kinds(out, r"bad\xff.mp4") == ["pickup", "fight", "level"]
            assert "bad%FF.mp4" in (out / "report" / "data.js").read_text(encoding="utf-8")
            assert told <= set(re.findall(r"^k25lite: (\w+)\\xff\.\w+: ", capfd.readouterr().err, re.MULTILINE))
            assert json.loads((tmp_path / "again" / "metrics.json").read_text())["macro_f1"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": []}, "at least one video"),
        ({"paths": ["missing"]}, "no such file or folder: missing"),
        ({"paths": ["{empty}"]}, "no video in the folder"),
        ({"paths": ["{empty}/../text.mp4"]}, "no video can be read"),
        ({"backend": "magic"}, "local or openai"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"backend": "openai", "model": None}, "name of a vision model"),
        ({"base_url": "http://127.0.0.1:1"}, "base_url is for the backend openai"),
        ({"model": "{empty}"}, "no folder with a detector"),
        (
            {"backend": "openai", "model": "m", "base_url": "http://127.0.0.1:1/v1", "budget": Budget(images=3)},
            "too few",
        ),
        ({"truth": "{empty}/../other.jsonl"}, "has no event of these videos"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_writes_nothing(footage, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    write_truth(tmp_path / "other.jsonl", {"c.mp4": [(0.0, 1.0, "boss")]})
    given = {"paths": [footage], "model": colour_model, "progress": False} | arguments
    empty = str(tmp_path / "empty")
    given["paths"] = [str(path).format(empty=empty) for path in given["paths"]]
    given |= {k: v.format(empty=empty) for k, v in given.items() if k in ("truth", "model") and isinstance(v, str)}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        analyze(out=tmp_path / "out", **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_file_of_states_that_is_none_is_named_before_any_work(footage, tmp_path):
    shutil.copy(footage / "b.mp4", tmp_path / "b.mp4")
    (tmp_path / "states.csv").write_text("video,second,health\nb.mp4,0,full\n")
    with pytest.raises(ValueError, match=r"states\.csv: a row needs video, second and health"):
        analyze([tmp_path], tmp_path / "out", model=colour_model, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.mp4"], "no such file or folder: missing.mp4"),
        (["{footage}", "--truth", "nowhere.jsonl"], "nowhere.jsonl"),
        (["{footage}", "--backend", "openai"], "name of a vision model"),
        (["{footage}", "--workers", "0"], "workers must be at least 1"),
        (["{footage}", "--model", "nowhere"], "no folder with a detector: nowhere"),
    ],
    ids=str,
)
def test_the_command_says_what_is_wrong_in_one_line(footage, tmp_path, arguments, message):
    given = [argument.format(footage=footage) for argument in arguments]
    failed = CliRunner().invoke(app, ["analyze", *given, "--out", str(tmp_path / "out")])
    assert failed.exit_code == 2
    [line] = [line for line in failed.stderr.splitlines() if line.startswith("k25lite: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["death", "boss"])
def test_the_scout_asks_the_model_only_where_little_changes_and_overlooks_nothing_there(tmp_path, kind):
    class Counting(ColourModel):
        asked = 0

        def probabilities(self, frames):
            Counting.asked += len(frames)
            return super().probabilities(frames)

    path = write_video(tmp_path / "a.mp4", [(20.0, 60.0, kind), (60.0, 62.0, "level")], 100.0)
    answer = LocalViewer(Counting, f"counting {kind}", tmp_path)._coarse({"path": str(path), "seconds": 100.0})
    inside = [start <= 20.0 and end >= 62.0 for start, end in answer["active"]]
    assert inside == [True], (
        "a still event between two changes is watched from its beginning to its end, and nothing else"
    )
    assert answer["keyframes"] == 50
    assert 10 < Counting.asked < 25, "one in four seconds, and what lies near a change is watched anyway"
    quiet = dict(answer["quiet"])
    assert max(level for time, level in quiet.items() if not 10 < time < 70) < min(
        level for time, level in quiet.items() if 20 < time < 60
    )


def test_bytes_turned_at_random_are_reported_and_raise_nothing_else(footage, tmp_path):
    rng = np.random.default_rng(0)
    whole = np.frombuffer((footage / "b.mp4").read_bytes(), np.uint8)
    viewer = LocalViewer(colour_model, "colours", tmp_path / "work")
    outcomes = set()
    for number in range(200):
        data = whole[: rng.integers(1, len(whole) + 1)].copy() if number % 4 == 0 else whole.copy()
        data[rng.integers(0, len(data), rng.integers(0, 200))] = rng.integers(0, 256)
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(data.tobytes())
        try:
            video = probe(path)
        except MediaError:
            outcomes.add("unreadable")
            continue
        task = {"path": str(path), "digest": video.digest, "seconds": video.seconds, "video": video.name}
        answers = [viewer._coarse(task), viewer._fine(task | {"spans": [[0.0, 20.0], [20.0, 35.0]]})]
        answers.append(illustrate(task | {"out": str(tmp_path / "out"), "clips": [(3.0, 6.0)], "frames": [30.0]}))
        for answer in answers:
            json.dumps(answer, allow_nan=False)
            outcomes.add("error" if answer.get("error") else "fine")
    assert outcomes == {"unreadable", "error", "fine"}


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for path in ("one/x/a.mp4", "two/x/a.mp4", "two/x/b.mp4"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    named = find_videos([tmp_path / "one" / "x", tmp_path / "two" / "x", tmp_path / "one" / "x" / "a.mp4"])
    assert [*named] == ["one/x/a.mp4", "two/x/a.mp4", "b.mp4"]


def test_files_whose_names_read_alike_are_refused(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"a\xff.mp4")).touch()
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    (tmp_path / r"a\xff.mp4").touch()
    with pytest.raises(ValueError, match=r"two videos have names that read alike: .*a\\xff\.mp4"):
        find_videos([tmp_path])


def test_a_plan_covers_the_video_and_cuts_where_it_is_quiet(monkeypatch):
    monkeypatch.undo()
    rng = np.random.default_rng(0)
    for seconds in (0.1, 20.0, 89.0, 91.0, 400.0, 3000.0, 86_400.0):
        video = Footage(Path("a"), "a", "", seconds, 10.0, 64, 48, 0, "h264", 1)
        quiet = [(time, float(rng.random())) for time in np.arange(0, seconds, 10.0)]
        planned = plan(video, quiet)
        assert planned[0].start == 0.0
        assert planned[-1].end == seconds
        assert all(one.end == other.start for one, other in pairwise(planned))
        lengths = [segment.end - segment.start for segment in planned]
        assert max(lengths) <= 1.5 * segments.LONGEST
        assert min(lengths) >= min(seconds, 0.5 * segments.SHORTEST)
        soon = [
            (float(time), float(time)) for time in np.arange(0, min(seconds, 3000.0), 0.5)
        ]  # cuts as early as can be
        assert len(plan(video, quiet)) <= most_segments(video)
        assert len(plan(video, soon)) <= most_segments(video) <= 1.5 * len(planned) + 1
    much = dict(quiet)
    cuts = [much[segment.start] for segment in planned[1:]]
    assert np.mean(cuts) < 0.15  # the quietest of about fifteen; any of them would be 0.5 on average
    assert [segment.end for segment in plan(Footage(Path("a"), "a", "", 400.0, 10, 64, 48, 0, "", 1), [])] == [
        100.0, 200.0, 300.0, 400.0,
    ]  # fmt: skip


def test_probing_a_file_tells_what_it_is(tmp_path):
    video = probe(write_video(tmp_path / "a.mp4", seconds=3.0, size=(96, 48), rotation=90))
    assert (video.name, video.width, video.height, video.rotation, video.codec) == ("a.mp4", 96, 48, 90, "h264")
    assert video.seconds == pytest.approx(3.0, abs=0.11)
    assert video.fps == pytest.approx(10, rel=0.05)
    with pytest.raises(MediaError, match="none"):
        probe(tmp_path / "none.mp4")
    raw = write_video(tmp_path / "a.h264", seconds=3.0)  # a bare stream, without a duration
    assert probe(raw).seconds > 0


class Sighted(ThreadingHTTPServer):
    """Speaks the protocol of an endpoint and sees colours: an event where frames have the colour of a kind."""

    daemon_threads = True

    def __init__(self, garble=0):
        self.bodies, self.garble, self.lock = [], garble, threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            garbled = len(self.server.bodies) <= self.server.garble
        text = "I see nothing but fog." if garbled else f"Here it is:\n```json\n{json.dumps(see(body))}\n```"
        answer = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
        answer["usage"] = {"prompt_tokens": 1000, "completion_tokens": 50}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def pictures(body):
    """(seconds, mean colour) of the images in a request."""
    parts = body["messages"][1]["content"][1:]
    for text, image in zip(parts[::2], parts[1::2], strict=True):
        data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        yield float(text["text"].removesuffix(" s")), np.asarray(Image.open(io.BytesIO(data)))[24:].mean((0, 1))


def see(body):
    events = []
    for second, colour in pictures(body):
        kind = min(COLOURS, key=lambda kind: np.abs(colour - COLOURS[kind]).max())
        if np.abs(colour - COLOURS[kind]).max() < 40:
            last = events[-1] if events else {"kind": ""}
            if last["kind"] == kind:
                last["end"] = second
            else:
                events.append({"kind": kind, "start": second, "end": second, "confidence": 0.8, "keyframes": [second]})
    return {"events": events, "summary": f"{len(events)} things happen."}


@contextmanager
def endpoint(**options):
    with Sighted(**options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def _no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_keys")
def test_a_model_elsewhere_gets_frames_and_its_answers_are_kept(footage, tmp_path):
    with endpoint() as server:
        arguments = {"backend": "openai", "model": "eyes", "base_url": server.url, "progress": False}
        analyze([footage], tmp_path / "out", truth=footage / "events.jsonl", **arguments)
        asked = len(server.bodies)
        assert asked == sum('"fine"' in e.get("prompt", "") for e in read_trace(tmp_path / "out" / "trace.jsonl"))
        for body in server.bodies:
            assert body["model"] == "eyes"
            seconds = [second for second, _ in pictures(body)]
            assert seconds == sorted(seconds)
            assert 2 <= len(seconds) <= module.IMAGES
        # The frames are denser than the events are long.
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["macro_f1"] > 0.8
        before = lines(tmp_path / "out")
        (tmp_path / "out" / "trace.jsonl").unlink()
        shutil.rmtree(tmp_path / "out" / "report")
        analyze([footage], tmp_path / "out", truth=footage / "events.jsonl", **arguments)
        assert lines(tmp_path / "out") == before
        assert len(server.bodies) == asked
    run = summarise(read_trace(tmp_path / "out" / "trace.jsonl"))
    assert "things happen" in (tmp_path / "out" / "report" / "index.html").read_text()
    assert run.tokens == 0  # of the second run


@pytest.mark.usefixtures("_no_keys")
def test_the_budget_of_images_and_tokens_is_kept(footage, tmp_path, capsys):
    with endpoint() as server:
        arguments = {"backend": "openai", "model": "eyes", "base_url": server.url, "progress": False, "workers": 1}
        analyze([footage], tmp_path / "few", budget=Budget(images=40), **arguments)
        assert 0 < sum(len(list(pictures(body))) for body in server.bodies) <= 40
        server.bodies.clear()
        analyze([footage], tmp_path / "cheap", budget=Budget(tokens=2500), **arguments)
        assert len(server.bodies) == 3  # 1,050 tokens each: the third goes beyond, and no fourth begins
        assert "limit of tokens reached" in capsys.readouterr().err


def test_frames_of_a_segment_are_chosen_without_decoding_what_comes_before(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", [(4.0, 8.0, "boss"), (73.0, 77.0, "boss")], 80.0)
    looked, decode = [], reading._decode

    def watched(*args, **options):
        for moment, frame in decode(*args, **options):
            looked.append(moment)
            yield moment, frame

    monkeypatch.setattr(reading, "_decode", watched)
    eyes = RemoteViewer(OpenAIPolicy("eyes", "http://127.0.0.1:1/v1"), tmp_path, images=4)
    shown = [moment for moment, _ in eyes._pictures(str(path), 60.0, 80.0)]
    assert min(looked) > 50.0
    assert len(shown) == 4
    assert all(60.0 + 5 * part <= moment <= 65.0 + 5 * part for part, moment in enumerate(shown))
    assert 73.0 <= shown[2] < 75.0, "the boss comes into view"


@pytest.mark.usefixtures("_no_keys")
@pytest.mark.parametrize("workers", [1, 16])
def test_retries_show_no_more_images_than_there_may_be(footage, tmp_path, capsys, workers):
    arguments = {"backend": "openai", "model": "eyes", "progress": False, "workers": workers}
    with endpoint(garble=1000) as server:
        for _ in range(2):  # what the first run showed counts in the second
            analyze([footage], tmp_path, base_url=server.url, budget=Budget(images=40), **arguments)
            assert 30 < sum(len(list(pictures(body))) for body in server.bodies) <= 40
    assert "limit of images reached" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_keys")
def test_copies_of_a_viewer_share_its_budget(footage, tmp_path):
    """As tasks on a cluster have them."""

    def watch(number):
        task = {"pass": "fine", "video": "b.mp4", "path": str(footage / "b.mp4"), "spans": [[number, number + 10.0]]}
        try:
            return asyncio.run(pickle.loads(copy)([{"role": "user", "content": json.dumps(task)}], ())).content
        except Exceeded as limit:
            return str(limit)

    with endpoint() as server, ThreadPoolExecutor(8) as pool:
        copy = pickle.dumps(RemoteViewer(OpenAIPolicy("eyes", server.url), tmp_path, 3, Budget(images=10)))
        told = list(pool.map(watch, range(20)))
        assert len(server.bodies) == 3
    assert told.count("images") == 17


def test_odd_events_of_an_answer_are_left_out_and_told_and_cost_no_other():
    good = {"kind": "boss", "start": 12, "end": 15.0, "keyframes": [13.0]}
    odd = ({"kind": "level-up"}, {"confidence": 90}, {"start": None}, {"end": float("nan")}, {"keyframes": 13.0})
    said = {"events": [*(good | change for change in odd), good, "boss"], "summary": None}
    answer = remote._read(json.dumps(said), "a.mp4", 10.0, 20.0)
    assert [(e["kind"], e["start"], e["end"], e["keyframes"]) for e in answer["events"]] == [
        ("boss", 12.0, 15.0, (13.0,))
    ]
    assert answer["error"] == "6 of 7 events are not as asked for"
    assert "boss" in answer["summary"]
    assert "error" not in remote._read(json.dumps({"events": [good]}), "a.mp4", 10.0, 20.0)


@pytest.mark.usefixtures("_no_keys")
def test_an_answer_that_is_no_json_is_asked_for_again(footage, tmp_path):
    with endpoint(garble=1) as server:
        arguments = {"backend": "openai", "model": "eyes", "base_url": server.url, "progress": False, "workers": 1}
        analyze([footage / "b.mp4"], tmp_path / "out", **arguments)
    tried = attempts(tmp_path / "out")
    assert sorted(tried.values()).count("failed") == 1
    assert "fight" in kinds(tmp_path / "out", "b.mp4")


def test_a_span_too_short_for_a_chunk_is_no_fault_of_the_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", [(20.0, 24.0, "death")], 40.0)
    viewer = LocalViewer(colour_model, "short spans", tmp_path)
    task = {"path": str(path), "video": path.name, "seconds": 40.0, "spans": [(6.5, 6.8), (18.0, 26.0)]}
    answer = viewer._fine(task)
    assert "error" not in answer
    assert [event["kind"] for event in answer["events"]] == ["death"]
    beyond = viewer._fine(task | {"spans": [(50.0, 60.0)]})
    assert "nothing can be decoded from" in beyond["error"]
