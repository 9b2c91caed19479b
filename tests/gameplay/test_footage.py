"""Chunks and key frames against what PyAV decodes frame by frame, from files written here and the shipped footage."""

import json
import struct
from bisect import bisect_left, bisect_right
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25lite.gameplay.events import KINDS, Event
from k25lite.gameplay.footage import (
    CHUNK_SECONDS,
    FRAME_STEP,
    hide,
    read_all,
    read_chunks,
    read_events,
    read_keyframes,
    shares,
)
from k25lite.vision.media import MediaError

SHIPPED = Path(__file__).parents[2] / "data" / "gameplay"
VIDEO = SHIPPED / "gameplay_0000.mp4"
SIZE = (24, 32)


def write(path, times, *, size=(24, 32), codec="ffv1", pix_fmt="bgr0", pictures=None):
    """A lossless video whose frame i, at times[i] seconds, is grey of value i (or `pictures[i]`)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            picture = np.full((*size, 3), i, np.uint8) if pictures is None else pictures[i]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def values(chunks):
    return chunks.frames[..., 0, 0, 0]


def on_the_screen(times, end):
    """The numbers of the frames of each chunk where changes do not count, by the definition."""
    moments = np.arange(0, end - 2e-3, FRAME_STEP)
    shown = [bisect_right(times, moment + 2e-3) - 1 for moment in moments]
    shown = [shown[0], *shown, shown[-1], shown[-1]]
    return [shown[2 * k : 2 * k + 4] for k in range((len(moments) + 1) // 2)]


def expected(times, end, changes):
    """The numbers of the frames of each chunk, by the definition."""
    chosen = []
    for begins in np.arange(0, end - 2e-3, FRAME_STEP):
        first, after = (bisect_left(times, moment - 2e-3) for moment in (begins, begins + FRAME_STEP))
        new = range(first, after)
        chosen.append(max(new, key=lambda i: changes[i]) if new else max(first - 1, 0))
    chosen = [0, *chosen, chosen[-1], chosen[-1]]
    return [chosen[2 * k : 2 * k + 4] for k in range((len(chosen) - 2) // 2)]


def restless(count, seed=0):
    """Grey values of frames, and how much each differs from those before and after it, as brightness is kept."""
    values = np.random.default_rng(seed).integers(0, 256, count).tolist()
    frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in grey(values, (2, 2))]
    changes = np.abs(np.diff([int(frame.to_ndarray(format="gray")[0, 0]) for frame in frames]))
    return values, np.pad(changes, (1, 0)) + np.pad(changes, (0, 1))


def grey(values, size=(24, 32)):
    return [np.full((*size, 3), value, np.uint8) for value in values]


def check_chosen(path, times):
    """The chunks of a file in which every picture has another grey are those of the definition."""
    values_of, changes = restless(len(times))
    chunks = read_all(read_chunks(write(path, times, pictures=grey(values_of)), SIZE))
    wanted = expected(times, times[-1] + 1 / 30, changes)  # the file says 30 frames per second
    assert values(chunks).tolist() == [[values_of[index] for index in chosen] for chosen in wanted]
    assert chunks.times == pytest.approx(np.arange(len(chunks.times)) * CHUNK_SECONDS)


@pytest.mark.parametrize("fps", [0.7, 2.0, 8.75, 24.0, 30.0])
def test_a_chunk_shows_what_changed_most_in_a_step_before_two_within_and_one_after(tmp_path, fps):
    check_chosen(tmp_path / "a.mkv", [i / fps for i in range(round(8 * fps))])


@pytest.mark.parametrize("seed", range(5))
def test_at_a_variable_frame_rate_as_well(tmp_path, seed):
    gaps = np.random.default_rng(seed).choice([0.02, 0.1, 0.6, 2.5], 60)
    check_chosen(tmp_path / "a.mkv", [0.0, *np.cumsum(gaps).round(3).tolist()])


@pytest.mark.parametrize("flash", range(8, 40))
def test_a_flash_of_one_frame_is_never_missed(tmp_path, flash):
    pictures = grey([200 if i == flash else 50 + i % 3 for i in range(48)])
    chunks = read_all(read_chunks(write(tmp_path / "a.mkv", [i / 8.75 for i in range(48)], pictures=pictures), SIZE))
    step = (flash - 8) // 4 + 2
    seen = values(chunks) > 150
    assert seen[:, 1:3].ravel().nonzero()[0].tolist() == [step]


@pytest.mark.parametrize("fps", [0.7, 2.0, 8.75, 24.0, 30.0])
def test_without_changes_a_chunk_shows_the_picture_on_the_screen(tmp_path, fps):
    times = [i / fps for i in range(round(8 * fps))]
    chunks = read_all(read_chunks(write(tmp_path / "a.mkv", times), SIZE, changed=False))
    assert values(chunks).tolist() == on_the_screen(times, times[-1] + 1 / 30)  # the file says 30 frames per second


@pytest.mark.parametrize("seed", range(5))
def test_without_changes_at_a_variable_frame_rate(tmp_path, seed):
    gaps = np.random.default_rng(seed).choice([0.02, 0.1, 0.6, 2.5], 60)
    times = [0.0, *np.cumsum(gaps).round(3).tolist()]
    chunks = read_all(read_chunks(write(tmp_path / "a.mkv", times), SIZE, changed=False))
    assert values(chunks).tolist() == on_the_screen(times, times[-1] + 1 / 30)


@pytest.fixture(scope="module")
def whole():
    return read_all(read_chunks(VIDEO, SIZE))


@given(st.lists(st.floats(0.01, 25), max_size=3), st.integers(1, 12))
@settings(max_examples=12)
def test_parts_have_the_chunks_of_the_whole(whole, cuts, batch):
    borders = [0.0, *sorted(set(cuts)), np.inf]
    parts = [
        part for start, end in pairwise(borders) for part in read_chunks(VIDEO, SIZE, start=start, end=end, batch=batch)
    ]
    assert all(1 <= len(part.times) <= batch for part in parts)
    assert np.array_equal(np.concatenate([part.times for part in parts]), whole.times)
    assert np.array_equal(np.concatenate([part.frames for part in parts]), whole.frames)


def test_frames_of_a_recording_are_every_fourth_if_changes_do_not_count():
    frames = read_all(read_chunks(VIDEO, SIZE, changed=False)).frames
    with av.open(str(VIDEO)) as container:
        shown = [frame.to_ndarray(format="rgb24", width=32, height=24) for frame in container.decode(video=0)]
    assert np.abs(frames[5].astype(int) - np.stack(shown[36:49:4])).mean() < 3  # scaled another way


def test_key_frames_are_those_that_the_file_marks():
    with av.open(str(VIDEO)) as container:
        marked = [float(frame.time) for frame in container.decode(video=0) if frame.key_frame]
    times, changes, frames = zip(*read_keyframes(VIDEO), strict=True)
    assert times == pytest.approx(marked)
    assert all(frame.key_frame for frame in frames)
    small = [frame.to_ndarray(format="gray", width=16, height=12, interpolation="AREA") for frame in frames]
    assert changes == pytest.approx([0.0, *(np.abs(b.astype(int) - a).mean() / 255 for a, b in pairwise(small))])
    parts = [time for time, _, _ in read_keyframes(VIDEO, start=marked[1] + 0.1, end=marked[2])]
    assert parts == pytest.approx(marked[1:3])


def test_a_rotated_video_stands_upright(tmp_path):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :32, 0] = 250  # the left half is red
    plain = write(
        tmp_path / "a.mp4", [0.0, 0.5, 1.0], size=(48, 64), codec="libx264", pix_fmt="yuv420p", pictures=[picture] * 3
    )
    data = plain.read_bytes()
    one, last = 1 << 16, 1 << 30
    matrix = data.index(struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, last), data.index(b"tkhd"))
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, last)  # a quarter, clockwise, as phones write it
    (tmp_path / "b.mp4").write_bytes(data[:matrix] + turned + data[matrix + len(turned) :])
    frame = read_all(read_chunks(tmp_path / "b.mp4", (64, 48))).frames[0, 0]
    assert frame[:20, :, 0].min() > 200  # the left half is on top now
    assert frame[-20:, :, 0].max() < 50


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "cannot be decoded"),
        (lambda path: path.write_bytes(b"not a video" * 100), "cannot be decoded"),
    ],
)
def test_what_is_no_video_is_said(tmp_path, make, message):
    make(tmp_path / "a.mp4")
    for read in (partial(read_chunks, size=SIZE), read_keyframes):
        with pytest.raises(MediaError, match=message):
            list(read(tmp_path / "a.mp4"))


def test_a_video_cut_short_gives_what_it_holds_and_says_so(tmp_path, whole):
    data = VIDEO.read_bytes()  # its index comes first
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    got = []
    with pytest.raises(MediaError, match=r"a\.mp4"):
        got.extend(read_chunks(tmp_path / "a.mp4", SIZE, batch=1))
    assert 0 < len(got) < len(whole.times)
    assert np.array_equal(got[3].frames[0], whole.frames[3])


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        list(read_chunks(tmp_path / "a.mp4", SIZE))


def test_a_video_in_an_unknown_format_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(VIDEO.read_bytes().replace(b"avc1", b"nope").replace(b"avcC", b"nopC"))
    for read in (partial(read_chunks, size=SIZE), read_keyframes):
        with pytest.raises(MediaError, match=r"a\.mp4"):
            list(read(tmp_path / "a.mp4"))


@pytest.mark.parametrize("options", [{"start": -1.0}, {"start": 3.0, "end": 3.0}, {"batch": 0}, {"end": float("nan")}])
def test_bad_arguments_are_refused_before_the_file_is_opened(options):
    with pytest.raises(ValueError, match="read_chunks needs"):
        read_chunks("nowhere.mp4", SIZE, **options)


def test_nothing_begins_behind_the_end():
    assert list(read_chunks(VIDEO, SIZE, start=1000.0)) == []


EVENTS = st.lists(st.tuples(st.floats(0, 20), st.floats(0.1, 6), st.sampled_from(KINDS)), max_size=4)


@given(EVENTS)
def test_shares_are_what_counting_fine_slices_gives(drawn):
    one_each = {kind: (start, length) for start, length, kind in drawn}  # those of one kind do not overlap
    events = [Event("v", start, start + length, kind) for kind, (start, length) in one_each.items()]
    times = np.linspace(0, 20, 7)
    found = shares(events, times)
    slices = times[:, None] + (np.arange(400) + 0.5) / 400 * CHUNK_SECONDS
    for column, kind in enumerate(KINDS):
        inside = [(event.start <= slices) & (slices < event.end) for event in events if event.kind == kind]
        expected = inside[0].mean(1) if inside else np.zeros(len(times))
        assert found[:, column] == pytest.approx(expected, abs=0.01)


def test_events_of_a_file_are_those_of_the_kinds(tmp_path):
    lines = [
        {"video": "a.mp4", "start": 1, "end": 2.5, "kind": "boss", "confidence": 0.5},
        {"video": "a.mp4", "start": 1, "end": 2, "kind": "kill"},
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_events(path) == [Event("a.mp4", 1.0, 2.5, "boss")]
    assert read_events(SHIPPED / "events.jsonl")


@pytest.mark.parametrize("line", ["{", "3", '{"video": "a", "start": 0, "kind": "boss"}', '{"start": "x"}', "[]"])
def test_a_line_that_is_no_event_is_named(tmp_path, line):
    path = tmp_path / "events.jsonl"
    path.write_text('{"video": "a", "start": 0, "end": 1, "kind": "boss"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"events\.jsonl, line 2"):
        read_events(path)


def test_hiding_blackens_the_status_bar_and_the_messages_alone():
    frames = np.full((2, 4, 200, 8, 3), 9, np.uint8)
    assert (hide(frames)[:, :, :168] == 9).all()
    assert not hide(frames)[:, :, 168:].any()
    both = hide(frames, messages=True)
    assert not both[:, :, :40].any()
    assert (both[:, :, 40:168] == 9).all()
    assert (frames == 9).all()
