"""Files in, patches out; and what happens when the file is not what it should be."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from k25lite.vision import MediaError, MoonViT3DConfig, VideoChunk, pack, read_image, read_video, video_chunks
from k25lite.vision.media import fit_size

LITE = MoonViT3DConfig.lite()


def write_video(
    path, frames: np.ndarray, fps: int = 10, codec: str = "libx264", *, hold: int = 0, sound: int = 0, rotation: int = 0
) -> None:
    """The last frame stays for `hold` frames more; there are `sound` seconds of silence; players turn it by `rotation`."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if str(path).endswith("mp4") else {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "10"})
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, fps)
        if rotation:
            stream.set_display_rotation(rotation)
        silence = container.add_stream("aac", rate=8000) if sound else None
        packets = [p for f in frames for p in stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24"))]
        packets += stream.encode()
        packets[-1].duration = round((1 + hold) / fps / packets[-1].time_base)
        container.mux(packets)
        for start in range(0, 8000 * sound, 1024):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 8000, start
            container.mux(silence.encode(samples))
        if silence:
            container.mux(silence.encode())


@pytest.fixture
def counting_video(tmp_path):
    """5 seconds at 10 frames per second; frame i is a flat grey of value 4 * i, so that a frame tells its own number."""
    frames = np.broadcast_to(np.arange(50, dtype=np.uint8)[:, None, None, None] * 4, (50, 48, 64, 3))
    write_video(tmp_path / "counting.mp4", np.ascontiguousarray(frames))
    return tmp_path / "counting.mp4"


def test_video_is_sampled_by_time_and_cut_into_chunks_of_four(counting_video):
    chunks = read_video(counting_video, fps=2, unit=16)
    assert [len(chunk.frames) for chunk in chunks] == [4, 4, 2]
    times = [time for chunk in chunks for time in chunk.times]
    assert times == pytest.approx(np.arange(10) / 2)
    grey = np.concatenate([chunk.frames for chunk in chunks]).mean(axis=(1, 2, 3))
    assert grey == pytest.approx(np.arange(10) * 5 * 4, abs=4)  # every fifth frame
    assert chunks[1].timestamp == "00:00:02.000"


def test_a_slow_video_gives_every_frame_once(counting_video):
    chunks = read_video(counting_video, fps=1000, unit=16)
    assert sum(len(chunk.frames) for chunk in chunks) == 50


def test_uneven_sampling_never_drifts(counting_video):
    times = [time for chunk in video_chunks(counting_video, fps=3, unit=16) for time in chunk.times]
    assert len(times) == 15
    assert np.all(np.array(times) >= np.arange(15) / 3 - 1e-6)
    assert np.all(np.array(times) < np.arange(15) / 3 + 0.1)


def test_video_is_resized_while_decoding(counting_video):
    assert read_video(counting_video, unit=16)[0].frames.shape == (4, 48, 64, 3)
    assert read_video(counting_video, unit=16, max_tokens=3)[0].frames.shape[1:3] == (16, 32)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00:00.000"), (3661.0014, "01:01:01.001"), (86399.9999, "24:00:00.000")]
)
def test_timestamp(seconds, text):
    assert VideoChunk(np.zeros((1, 2, 2, 3), np.uint8), (seconds,)).timestamp == text


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([16, 28]), st.integers(1, 4096))
def test_fit_size_keeps_to_whole_blocks_and_the_budget(height, width, unit, max_tokens):
    rows, columns = fit_size(height, width, unit, max_tokens)
    assert rows % unit == columns % unit == 0
    assert 1 <= (rows // unit) * (columns // unit) <= max_tokens
    assert rows <= max(unit, height + unit / 2)  # never enlarged by more than rounding
    assert columns <= max(unit, width + unit / 2)


def test_fit_size_keeps_the_aspect_ratio():
    assert fit_size(480, 640, 16, 4096) == (480, 640)
    assert fit_size(4000, 6000, 28, 384) == (16 * 28, 24 * 28)


def test_pack_lays_patches_in_raster_order_frame_after_frame():
    clip = np.arange(2 * 16 * 32 * 3, dtype=np.uint32).reshape(2, 16, 32, 3).astype(np.uint8)
    pixel_values, grid_thw = pack([clip], LITE)
    assert grid_thw.tolist() == [[2, 2, 4]]
    second_row_third_patch = clip[1, 8:16, 16:24].transpose(2, 0, 1)
    torch.testing.assert_close(pixel_values[8 + 4 + 2], torch.from_numpy(second_row_third_patch) / 127.5 - 1)
    assert pixel_values.min() >= -1
    assert pixel_values.max() <= 1


def test_pack_takes_pictures_arrays_and_chunks_together(counting_video):
    items = [Image.new("L", (33, 47)), np.zeros((16, 16, 3), np.uint8), *read_video(counting_video, unit=16)]
    pixel_values, grid_thw = pack(items, LITE, max_tokens=12)
    assert grid_thw.tolist() == [[1, 6, 4], [1, 2, 2], [4, 6, 8], [4, 6, 8], [2, 6, 8]]
    assert len(pixel_values) == grid_thw.prod(1).sum()


def test_tiny_and_enormous_pictures_are_resized_as_documented():
    """Smaller than a patch: one block. 20,000 pixels wide: shrunk to the budget."""
    assert pack([np.zeros((3, 5, 3), np.uint8)], LITE)[1].tolist() == [[1, 2, 2]]
    wide = np.zeros((100, 20_000, 3), np.uint8)
    (_, rows, columns), *_ = pack([wide], LITE, max_tokens=256)[1].tolist()
    assert rows * columns // 4 <= 256
    assert columns > 20 * rows


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((0, 16, 16, 3), np.uint8), r"items\[1\] must be .* uint8 RGB"),
        (np.zeros((5, 16, 16, 3), np.uint8), r"items\[1\] has 5 frames; a chunk has 1 to 4"),
        (np.zeros((16, 16, 3), np.float32), r"items\[1\] must be .* got float32"),
        (np.zeros((16, 16), np.uint8), r"items\[1\] must be"),
        (np.zeros((16, 0, 3), np.uint8), r"items\[1\] must be"),
        (VideoChunk(np.zeros((2, 16, 16, 3), np.float32), (0.0, 0.5)), r"items\[1\] must be .* got float32"),
        (VideoChunk(np.full((2, 16, 16, 3), 300, np.int32), (0.0, 0.5)), r"items\[1\] must be .* got int32"),
    ],
)
def test_items_that_cannot_be_packed_are_named(item, message):
    with pytest.raises(ValueError, match=message):
        pack([np.zeros((16, 16, 3), np.uint8), item], LITE)


def test_nothing_to_pack():
    with pytest.raises(ValueError, match="items is empty"):
        pack([], LITE)


def test_pictures_are_read_upright_and_on_white(tmp_path):
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    picture.save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (4, 2, 3)


def test_grey_of_16_bits_is_scaled_and_grey_of_floats_refused(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    expected = np.repeat((ramp // 256).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(read_image(tmp_path / "deep.png"), expected)
    patches = pack([expected], LITE)[0]
    torch.testing.assert_close(pack([Image.open(tmp_path / "deep.png")], LITE)[0], patches)
    Image.fromarray(ramp / np.float32(65535)).save(tmp_path / "depth.tiff")
    with pytest.raises(MediaError, match=r"depth\.tiff: cannot be decoded \(floating-point pixels"):
        read_image(tmp_path / "depth.tiff")


def test_bad_pictures_name_the_file(tmp_path, monkeypatch):
    with pytest.raises(MediaError, match=r"none\.png: no such file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(MediaError, match=r"text\.png: not a picture"):
        read_image(tmp_path / "text.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"half\.png: cannot be decoded"):
        read_image(tmp_path / "half.png")
    (tmp_path / "bomb.png").write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(MediaError, match=r"bomb\.png: cannot be decoded .*decompression bomb"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1, 0.002])
def test_a_truncated_video_is_an_error_that_names_the_file(tmp_path, keep):
    noise = np.random.default_rng(0).integers(0, 255, (50, 48, 64, 3), np.uint8)
    write_video(tmp_path / "short.mp4", noise)
    whole = (tmp_path / "short.mp4").read_bytes()
    (tmp_path / "short.mp4").write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(MediaError, match=r"short\.mp4: (cut short|cannot be decoded|holds no video stream)"):
        read_video(tmp_path / "short.mp4", unit=16)


def test_a_truncated_matroska_is_an_error_and_sound_that_lasts_longer_is_none(tmp_path):
    """There the header tells of the longest stream alone."""
    noise = np.random.default_rng(0).integers(0, 255, (50, 48, 64, 3), np.uint8)
    write_video(tmp_path / "short.mkv", noise)
    assert sum(len(chunk.frames) for chunk in read_video(tmp_path / "short.mkv", unit=16)) == 10
    whole = (tmp_path / "short.mkv").read_bytes()
    (tmp_path / "short.mkv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"short\.mkv: cut short, 2\.\d\d s can be decoded of the 5\.00 s"):
        read_video(tmp_path / "short.mkv", unit=16)
    write_video(tmp_path / "long.mkv", noise, sound=12)
    assert sum(len(chunk.frames) for chunk in read_video(tmp_path / "long.mkv", unit=16)) == 10


def test_a_last_frame_that_stays_for_seconds_is_no_cut(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (10, 48, 64, 3), np.uint8)
    write_video(tmp_path / "held.mp4", noise, hold=20)
    with av.open(str(tmp_path / "held.mp4")) as container:
        assert float(container.streams.video[0].duration * container.streams.video[0].time_base) > 2.5
    assert [len(chunk.frames) for chunk in read_video(tmp_path / "held.mp4", unit=16)] == [2]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_video_is_turned_upright_as_players_do(tmp_path, rotation):
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[:, :16, :16] = 255  # as the sensor sees it: white, top left
    write_video(tmp_path / "phone.mp4", frames, rotation=rotation)
    (chunk,) = read_video(tmp_path / "phone.mp4", unit=16)
    upright = np.rot90(frames, rotation // 90, axes=(1, 2))
    assert chunk.frames.shape == upright[:1].shape
    assert np.abs(chunk.frames[0].astype(int) - upright[0]).mean() < 8


def test_a_stream_that_changes_its_size_keeps_that_of_its_first_frame(tmp_path):
    for name, height in (("a", 48), ("b", 96)):
        write_video(tmp_path / f"{name}.h264", np.zeros((20, height, 64, 3), np.uint8))
    (tmp_path / "both.h264").write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    with av.open(str(tmp_path / "both.h264")) as container:
        assert {frame.height for frame in container.decode(video=0)} == {48, 96}
    assert {chunk.frames.shape[1:] for chunk in read_video(tmp_path / "both.h264", unit=16)} == {(48, 64, 3)}


def test_files_that_are_no_video_name_the_file(tmp_path):
    with pytest.raises(MediaError, match=r"none\.mp4: no such file"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("not a video at all")
    with pytest.raises(MediaError, match=r"text\.mp4: cannot be decoded"):
        read_video(tmp_path / "text.mp4")
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_video(tmp_path)  # a folder
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        container.mux([*stream.encode(samples), *stream.encode()])
    with pytest.raises(MediaError, match=r"sound\.mp4: holds no video stream"):
        read_video(tmp_path / "sound.mp4")


def test_a_video_without_frames_names_the_file(tmp_path):
    with av.open(str(tmp_path / "empty.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(MediaError, match=r"empty\.avi: the video stream holds no frame"):
        read_video(tmp_path / "empty.avi")


def test_arguments_out_of_range(counting_video):
    with pytest.raises(ValueError, match="must be positive"):
        read_video(counting_video, fps=0)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        read_video(counting_video, max_tokens=0)
