"""`k25lite bench video`: its rows, contenders that see the same pictures, and no timing of those that do not."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec

import av
import numpy as np
import pytest
from colours import Broken, colour_model, write_video
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from k25lite.bench import SUBJECT, Disagreement, Report
from k25lite.cli import app
from k25lite.gameplay import bench, bench_readers, viewer
from k25lite.gameplay.analyze import analyze
from k25lite.gameplay.bench_readers import PYAV, check_pictures, decode, ours, read_recording, to_ndarray
from k25lite.swarm.orchestrator import in_this_loop

needs_game = pytest.mark.skipif(find_spec("vizdoom") is None, reason="needs the game: pip install 'k25lite[game]'")
FPS, SIZE = 8.75, (24, 32)
SHOWN = [(2.0, 4.0, "fight"), (6.0, 7.5, "death")]
READERS = {SUBJECT: ours, PYAV: to_ndarray}


def write_recording(folder, frames):
    """A folder as `record` leaves one, with a coloured video of each number of frames."""
    folder.mkdir(exist_ok=True)
    entries = []
    for index, count in enumerate(frames):
        name = f"gameplay_{index:04d}.mp4"
        write_video(folder / name, SHOWN, times=[n / FPS for n in range(count)])
        entries.append({"video": name, "frames": count, "seconds": count / FPS, "fps": FPS})
    (folder / "manifest.json").write_text(json.dumps({"videos": entries}))
    return folder


@pytest.fixture
def videos(tmp_path):
    return read_recording(write_recording(tmp_path / "footage", [90, 70]))


@pytest.fixture
def untimed(monkeypatch):
    """Fails the test if anything is timed."""
    monkeypatch.setattr(bench, "median_seconds", lambda *_, **__: pytest.fail("timed"))


@needs_game
def test_a_quick_run_fills_the_report(tmp_path):
    path = tmp_path / "bench.json"
    ran = CliRunner().invoke(app, ["bench", "video", "--quick", "--device", "cpu", "--json", str(path)])
    assert ran.exit_code == 0, ran.output
    report = json.loads(path.read_text())
    assert report["device"].startswith("CPU")
    rows = report["rows"]
    assert all(list(row) == ["case", "subject", "metric", "value", "unit", "ratio"] for row in rows)
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows)
    found = {(row["case"], row["metric"], row["subject"]): row for row in rows if row["subject"] != "torchcodec"}
    decoding, coarse = "decode, every 4th frame a picture of 128x96", "coarse pass, 0.0033 h"
    small, large, growth = "analysis, 0.00165 h", "analysis, 0.0033 h", "analysis, 2 times the footage"
    expected = {
        (decoding, "decode frames/s"): {PYAV, "decoding alone"},
        (coarse, "time"): {"k25lite without the detector", "decoding key frames alone"},
        (coarse, "time, as a multiple"): set(),
        (small, "time with start of processes"): set(),
        **{(case, metric): {"decoding alone"} for case in (small, large) for metric in ("time", "time per hour")},
        **{(case, "watched closely"): set() for case in (small, large)},
        (growth, "time per hour"): set(),
    }
    if sys.platform == "linux":
        expected |= {(case, "peak memory of all processes"): set() for case in (small, large, growth)}
    assert set(found) == {(*key, who) for key, peers in expected.items() for who in {SUBJECT, *peers}}
    for (case, metric), peers in expected.items():
        mine = found[case, metric, SUBJECT]
        assert mine["ratio"] is None
        for peer in peers:
            row = found[case, metric, peer]
            more_is_better = metric.endswith("/s")
            ratio = mine["value"] / row["value"] if more_is_better else row["value"] / mine["value"]
            assert row["ratio"] == pytest.approx(ratio)
    for case, hours in ((small, 13 / 8.75 * 4 / 3600), (large, 13 / 8.75 * 8 / 3600)):
        seconds, rate = (found[case, metric, SUBJECT]["value"] for metric in ("time", "time per hour"))
        assert rate == pytest.approx(seconds / hours, rel=1e-3)
        assert found[case, "watched closely", SUBJECT]["value"] > 0.99  # to fresh weights all looks worth it
    for metric in {metric for case, metric in expected if case == growth}:
        first, last = (found[case, metric, SUBJECT]["value"] for case in (small, large))
        assert found[growth, metric, SUBJECT]["value"] == pytest.approx(last / first)


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 8, 9, 12, 13, 61])
def test_both_readers_take_the_same_pictures_whatever_the_number_of_frames(frames, tmp_path):
    [video] = read_recording(write_recording(tmp_path, [frames]))
    assert decode(video.path) == frames
    check_pictures("case", video, READERS, SIZE)
    taken = np.concatenate(list(to_ndarray(video, SIZE)))
    with av.open(str(video.path)) as container:
        alone = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][::4]
    assert len(taken) == len(alone) == video.pictures
    for picture, whole in zip(taken, alone, strict=True):
        assert np.abs(picture.mean((0, 1)) - whole.mean((0, 1))).max() < 3


def test_a_missing_picture_is_refused_before_anything_is_timed(videos, monkeypatch, untimed):
    def forgetful(video, size):
        yield from list(to_ndarray(video, size))[:-1]

    monkeypatch.setattr(bench, "to_ndarray", forgetful)
    with pytest.raises(
        Disagreement, match=r"PyAV, to_ndarray takes 22 pictures of gameplay_0000\.mp4, not 23; not timed"
    ):
        bench.decoding(Report("a device"), videos, SIZE)


def test_a_missing_chunk_of_ours_is_refused_before_anything_is_timed(videos, monkeypatch, untimed):
    monkeypatch.setattr(bench_readers, "read_chunks", lambda path, size, changed: read_all_but_one(path, size))
    with pytest.raises(Disagreement, match=r"k25lite takes 22 pictures of gameplay_0000\.mp4, not 24; not timed"):
        bench.decoding(Report("a device"), videos, SIZE)


def read_all_but_one(path, size):
    from k25lite.gameplay.footage import read_chunks

    yield from list(read_chunks(path, size, batch=1, changed=False))[:-1]


def test_pictures_of_other_moments_are_refused_before_anything_is_timed(videos, monkeypatch, untimed):
    def late(video, size):
        first, *others = to_ndarray(video, size)
        yield from [*others, first]

    monkeypatch.setattr(bench, "to_ndarray", late)
    with pytest.raises(
        Disagreement, match=r"a picture of gameplay_0000\.mp4 of PyAV, to_ndarray and of k25lite differ"
    ):
        bench.decoding(Report("a device"), videos, SIZE)


def test_a_video_with_fewer_frames_than_recorded_is_refused_before_anything_is_timed(tmp_path, untimed):
    folder = write_recording(tmp_path, [90])
    write_video(folder / "gameplay_0000.mp4", times=[n / FPS for n in range(86)])
    with pytest.raises(Disagreement, match=r"86 frames of gameplay_0000\.mp4 can be decoded, 90 were recorded"):
        bench.decoding(Report("a device"), read_recording(folder), SIZE)


def test_other_numbers_of_key_frames_are_refused_before_anything_is_timed(videos, monkeypatch, untimed):
    monkeypatch.setattr(bench, "decode", lambda path, keyframes=False: decode(path))
    with pytest.raises(Disagreement, match="numbers of key frames differ"):
        bench.coarse(Report("a device"), videos, colour_model)


def test_the_analysis_finds_what_analyze_finds(videos, tmp_path):
    paths = [video.path for video in videos]
    told = bench.analyse(paths, colour_model, 1, in_this_loop)
    analyze(paths, tmp_path / "out", model=colour_model, workers=1, progress=False)
    assert told["events"] == len((tmp_path / "out" / "events.jsonl").read_text().splitlines()) == 4
    assert 0 < told["watched"] <= sum(video.seconds for video in videos)


def test_an_analysis_with_problems_counts_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "_MODELS", {})  # of other tests
    (tmp_path / "broken").touch()
    path = write_video(tmp_path / "a.mp4", [(3.0, 6.0, "level")], seconds=10.0)
    with pytest.raises(RuntimeError, match=r"the analysis failed: .*a\.mp4"):
        bench.analyse([path], Broken(tmp_path), 1, in_this_loop)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_is_what_all_processes_hold_and_what_they_share_counts_once():
    program = """
import os, sys, time
shared = b"x" * 100_000_000
if os.fork() == 0:
    own = b"y" * 50_000_000
    print(1, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            process.stdout.readline()
            held = bench.held(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert 150 < held < 180
    for _ in range(100):
        if not bench.held(process.pid):
            break
        time.sleep(0.1)
    assert not bench.held(process.pid)


@pytest.mark.parametrize("error", [ModuleNotFoundError("torchcodec"), OSError("libavutil"), RuntimeError("no FFmpeg")])
def test_a_torchcodec_that_does_not_load_is_left_out(error, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(bench_readers, "import_module", fail)
    assert bench_readers.torchcodec() is None


@pytest.mark.skipif(bench_readers.torchcodec() is None, reason="needs torchcodec, and the libraries of FFmpeg")
def test_torchcodec_takes_the_same_pictures(videos):
    for video in videos:
        check_pictures("case", video, READERS | {bench_readers.TORCHCODEC: bench_readers.torchcodec()}, SIZE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "abacus"}, "abacus"),
        ({"model": "nowhere"}, "no folder with a detector: .*nowhere"),
        ({"footage": "nowhere"}, "no recording in the folder .*nowhere"),
    ],
)
def test_bad_input_is_told_before_anything_is_recorded(given, message, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "record", lambda *_, **__: pytest.fail("recorded"))
    with pytest.raises(ValueError, match=message):
        bench.run(**{"device": "cpu", **{key: tmp_path / v if v == "nowhere" else v for key, v in given.items()}})


def test_too_few_videos_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds 1 videos, the benchmark needs 8 or more"):
        bench.run("cpu", footage=write_recording(tmp_path, [5]))


@pytest.mark.parametrize("fps", [30, 0, -8.75, math.nan, math.inf])
def test_footage_whose_frames_are_at_no_moments_of_chunks_is_refused(fps, tmp_path):
    write_recording(tmp_path, [5])
    entry = {"video": "gameplay_0000.mp4", "frames": 5, "seconds": 1.0, "fps": fps}
    (tmp_path / "manifest.json").write_text(json.dumps({"videos": [entry]}))
    with pytest.raises(ValueError, match=r"frame rate must be a multiple of 2\.1875|no recording"):
        read_recording(tmp_path)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
entries = st.fixed_dictionaries(
    dict.fromkeys(("frames", "seconds", "fps"), scalars) | {"video": st.just("gameplay_0000.mp4") | scalars}
)


@given(manifest=scalars | st.fixed_dictionaries({"videos": scalars | st.lists(scalars | entries, max_size=3)}))
def test_any_manifest_is_read_or_refused(tmp_path_factory, manifest):
    folder = tmp_path_factory.mktemp("any")
    (folder / "gameplay_0000.mp4").touch()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with suppress(ValueError):
        assert all(video.frames > 0 and video.pictures > 0 and video.seconds > 0 for video in read_recording(folder))
