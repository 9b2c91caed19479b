import json

import av
import numpy as np
import pytest
from colours import COLOURS, GREY, write_video
from PIL import Image

from k25lite.gameplay import clips
from k25lite.gameplay.clips import choose, clip_name, clip_span, cut_clip, frame_name, frames_at, illustrate
from k25lite.gameplay.merge import Found
from k25lite.vision.media import MediaError

SHOWN = [(3.05, 5.0, "death"), (7.2, 9.0, "pickup")]


def decoded(path):
    """(seconds, mean colour) of all frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(float(f.pts * stream.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
        return stream, [(time, frame[frame.shape[0] // 2 :].mean((0, 1))) for time, frame in frames]


def is_like(colour, other):
    return np.abs(np.asarray(colour) - other).max() < 25


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clips") / "a.mp4", SHOWN, seconds=12.0)


def test_a_clip_has_the_frames_of_its_span_and_no_others(video, tmp_path):
    stream, frames = decoded(cut_clip(video, 2.55, 6.0, tmp_path / "clips" / "clip.mp4"))
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    # From the frame that is on the screen at 2.55 s, which began at 2.5, to the one of 5.9.
    assert [time for time, _ in frames] == pytest.approx([0.0, *(n / 10 - 2.55 for n in range(26, 60))], abs=2e-3)
    for time, colour in frames:
        assert is_like(colour, COLOURS["death"] if 3.05 <= round(time + 2.55, 2) < 5.0 else GREY)
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["clip.mp4"]


def test_a_clip_can_be_played_before_it_is_loaded(video, tmp_path):
    data = cut_clip(video, 0.0, 2.0, tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_the_end_of_the_video_ends_the_clip(video, tmp_path):
    _, frames = decoded(cut_clip(video, 11.5, 99.0, tmp_path / "clip.mp4"))
    assert len(frames) == 5
    _, frames = decoded(cut_clip(video, 11.98, 12.4, tmp_path / "clip.mp4"))
    assert len(frames) == 1


def test_frames_of_a_varying_rate_keep_their_times(tmp_path):
    times = [0.0, 0.04, 1.5, 1.6, 1.61, 4.0, 6.5]
    video = write_video(tmp_path / "vfr.mp4", [(1.55, 4.0, "boss")], times=times)
    _, frames = decoded(cut_clip(video, 1.0, 6.6, tmp_path / "clip.mp4"))
    assert [time for time, _ in frames] == pytest.approx([0.0, 0.5, 0.6, 0.61, 3.0, 5.5], abs=2e-3)
    assert [is_like(colour, COLOURS["boss"]) for _, colour in frames] == [False, False, True, True, False, False]


def test_a_large_video_is_scaled_down_and_a_rotated_one_turned(tmp_path):
    large = write_video(tmp_path / "4k.mp4", seconds=0.4, size=(3840, 2160), codec="mpeg4")
    stream, _ = decoded(cut_clip(large, 0.0, 0.3, tmp_path / "large.mp4"))
    assert (stream.width, stream.height) == (640, 360)
    rotated = write_video(tmp_path / "rotated.mp4", seconds=1.0, size=(320, 120), rotation=90)
    stream, _ = decoded(cut_clip(rotated, 0.0, 0.9, tmp_path / "turned.mp4"))
    assert (stream.width, stream.height) == (120, 320)
    [(_, picture)] = frames_at(rotated, [0.9])
    assert picture.size == (120, 320)
    # The stripe at the top of the stored picture, turned counter-clockwise, is at the left.
    with av.open(str(rotated)) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][-1]
    assert np.abs(np.rot90(stored) - np.asarray(picture, dtype=float)).mean() < 4


def test_a_frame_is_the_one_on_the_screen(video):
    times = [4.95, 3.04, 3.1, 0.0, 11.99]
    shown = dict(frames_at(video, times))
    assert [*shown] == sorted(times)
    for time, picture in shown.items():
        expected = COLOURS["death"] if 3.1 <= time < 5.0 else GREY
        assert is_like(np.asarray(picture)[24:].mean((0, 1)), expected)


def test_illustrating_twice_makes_nothing_anew(video, tmp_path):
    task = {"path": str(video), "digest": "0123456789abcdef", "seconds": 12.0, "out": str(tmp_path)}
    task |= {"clips": [(2.0, 6.0)], "frames": [4.0, 8.0]}
    assert illustrate(task) == {"files": 3}
    clip = tmp_path / "clips" / clip_name(task["digest"], 2.0, 6.0)
    frame = tmp_path / "frames" / frame_name(task["digest"], 8.0)
    assert is_like(np.asarray(Image.open(frame))[24:].mean((0, 1)), COLOURS["pickup"])
    written = [path.stat().st_mtime_ns for path in (clip, frame)]
    assert illustrate(json.loads(json.dumps(task))) == {"files": 3}
    assert [path.stat().st_mtime_ns for path in (clip, frame)] == written
    assert sum(1 for path in tmp_path.rglob("*") if path.is_file()) == 3


def test_a_broken_file_costs_its_clips_and_leaves_no_half_ones(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", seconds=10.0)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(whole.read_bytes()[:400])
    task = {"path": str(broken), "digest": "f" * 64, "seconds": 10.0, "out": str(tmp_path / "out")}
    answer = illustrate(task | {"clips": [(1.0, 2.0)], "frames": [1.0]})
    assert answer["files"] == 0
    assert "broken.mp4" in answer["error"]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    with pytest.raises(MediaError, match=r"missing\.mp4"):
        cut_clip(tmp_path / "missing.mp4", 0.0, 1.0, tmp_path / "out" / "clip.mp4")


@pytest.mark.parametrize(("start", "end"), [(-1.0, 2.0), (2.0, 2.0), (float("nan"), 2.0)])
def test_a_span_that_is_none_is_refused(video, tmp_path, start, end):
    with pytest.raises(ValueError, match="a clip goes from"):
        cut_clip(video, start, end, tmp_path / "clip.mp4")


def test_few_events_all_get_clips_and_of_many_the_notable_ones():
    few = [Found("a", n, n + 1, "pickup") for n in range(clips.FIGHTS + clips.PICKUPS)]
    assert choose(few) == {*range(len(few))}
    kinds = ("fight", "pickup", "boss", "fight", "death", "pickup", "level", "fight")
    many = [Found("a", 10 * n, 10 * n + 1 + n % 97 / 100, kinds[n % 8]) for n in range(4000)]
    chosen = choose(many)
    of = {kind: {n for n, event in enumerate(many) if event.kind == kind} for kind in kinds}
    assert of["boss"] | of["death"] | of["level"] <= chosen
    fights = sorted((many[n].end - many[n].start for n in of["fight"]), reverse=True)
    assert sorted((many[n].end - many[n].start for n in of["fight"] & chosen), reverse=True) == fights[: clips.FIGHTS]
    pickups = sorted(of["pickup"] & chosen)
    assert len(pickups) == clips.PICKUPS
    assert max(np.diff(pickups)) <= 2 * 4000 / clips.PICKUPS


def test_spans_stay_within_the_video():
    assert clip_span(Found("a", 0.2, 3.0, "fight"), 100.0) == (0.0, 4.0)
    assert clip_span(Found("a", 97.0, 99.5, "fight"), 100.0) == (96.0, 100.0)
    assert clip_span(Found("a", 10.0, 500.0, "fight"), 1000.0) == (9.0, 9.0 + clips.LONGEST)
