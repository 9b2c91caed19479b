"""The detector: what it computes, what it learns, what is kept of it."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from k25lite.gameplay import detector_stage as stage
from k25lite.gameplay.detector import Detector, DetectorConfig
from k25lite.gameplay.detector_stage import RUNS, Labelled, detector_stage, found_events, read_recording, train
from k25lite.gameplay.doom import MAPS
from k25lite.gameplay.events import KINDS, Event
from k25lite.gameplay.footage import CHUNK_SECONDS, read_events
from k25lite.gameplay.scoring import score
from k25lite.gameplay.spans import SpanRule
from k25lite.vision import MoonViT3DConfig

SHIPPED = Path(__file__).parents[2] / "data" / "gameplay"
needs_game = pytest.mark.skipif(find_spec("vizdoom") is None, reason="needs the game: pip install 'k25lite[game]'")
TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}


def tiny(seed=0):
    torch.manual_seed(seed)
    vision = MoonViT3DConfig.lite(**TINY, pos_emb_height=4, pos_emb_width=6)
    return Detector(DetectorConfig(vision_config=vision, height=32, width=48)).eval()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 32, 48, 3), dtype=np.uint8)


def test_chunks_and_images_together_are_as_one_by_one():
    detector = tiny()
    chunks, images = noise(3, 4), noise(2, 1, seed=1)
    with torch.no_grad():
        together = detector.logits([chunks[0], images[0], chunks[1], images[1], chunks[2]]).sigmoid().numpy()
    apart = np.concatenate([detector.probabilities(chunks, batch=2), detector.probabilities(images, batch=1)])
    assert apart.shape == (5, len(KINDS))
    assert apart.dtype == np.float32
    np.testing.assert_allclose(together[[0, 2, 4, 1, 3]], apart, atol=1e-5)


def test_the_order_of_frames_is_seen():
    detector, chunks = tiny(), noise(4, 4)
    assert np.abs(detector.probabilities(chunks) - detector.probabilities(chunks[:, ::-1])).max() > 1e-4


def test_no_chunk_gives_no_row():
    assert tiny().probabilities(noise(0, 4)).shape == (0, len(KINDS))


@pytest.mark.parametrize(
    "frames", [noise(2, 4)[0], noise(2, 4)[:, :, :16], noise(2, 4).astype(np.float32), noise(2, 4)[..., :1]]
)
def test_frames_of_another_shape_or_type_are_refused(frames):
    with pytest.raises(ValueError, match="frames must be"):
        tiny().probabilities(frames)


def test_chunks_longer_than_the_encoder_takes_are_refused():
    with pytest.raises(ValueError, match="a chunk has 1 to 4"):
        tiny().probabilities(noise(1, 5))


@pytest.mark.parametrize("size", [{"height": 40}, {"width": 0}, {"height": -32}])
def test_sizes_that_are_no_whole_blocks_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 32"):
        DetectorConfig(**size)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    detector = tiny()
    detector.config.rules["boss"] = {"begin": 0.3, "stay": 0.5, "gap": 10.0, "shortest": 2.0, "shift": -0.3}
    detector.save_pretrained(tmp_path)
    again = Detector.from_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    assert again.size == (32, 48)
    assert again.rules == {kind: SpanRule() for kind in KINDS} | {"boss": SpanRule(0.3, 0.5, 10.0, 2.0, -0.3)}
    assert np.array_equal(again.probabilities(noise(3, 4)), detector.probabilities(noise(3, 4)))


def labelled(n, seed):
    """Noise; a pickup is a bright square somewhere in all frames, a level a change from dark to bright within a chunk."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(60, 120, (n, 4, 32, 48, 3)).astype(np.uint8)
    targets = np.zeros((n, len(KINDS)), np.float32)
    for i in range(n):
        if rng.random() < 0.5:
            row, column = rng.integers(0, 24), rng.integers(0, 40)
            frames[i, :, row : row + 8, column : column + 8] = 255
            targets[i, KINDS.index("pickup")] = 1
        if rng.random() < 0.5:
            frames[i, 2:] //= 3
            targets[i, KINDS.index("level")] = 1
    return Labelled(np.arange(n, dtype=float), frames, targets, [])


def accuracy(detector, data):
    columns = [KINDS.index("pickup"), KINDS.index("level")]
    found = detector.probabilities(data.frames)[:, columns] > 0.5
    return (found == (data.targets[:, columns] > 0.5)).mean(axis=0)


RUN = stage.DetectorRun(steps=120, chunks=12, images=4, learning_rate=5e-3)


def test_it_learns_what_is_in_a_frame_and_what_is_between_frames(monkeypatch):
    monkeypatch.setattr(stage, "HIDDEN", 0.0)  # a square in a black bar could not be seen
    detector, data, unseen = tiny(), labelled(600, 0), labelled(200, 1)
    before = accuracy(detector, unseen)
    log = train(detector, [data], RUN, progress=False)
    after = accuracy(detector, unseen)
    assert list(log.columns) == ["step", "loss", "learning_rate"]
    assert log.loss[-20:].mean() < log.loss[:20].mean()
    assert (after > before + 0.2).all()
    assert not detector.training


def test_equal_seeds_train_equal_weights():
    run = replace(RUN, steps=3)
    one, same, other = tiny(), tiny(), tiny()
    for detector, seed in ((one, 0), (same, 0), (other, 1)):
        train(detector, [labelled(40, 0)], replace(run, seed=seed), progress=False)
    weights = [torch.cat([p.flatten() for p in detector.parameters()]) for detector in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_on_too_little_is_refused():
    with pytest.raises(ValueError, match="10 chunks are less than the 16"):
        train(tiny(), [labelled(10, 0)], RUN, progress=False)


def test_the_maps_of_tests_are_not_trained_on():
    groups = [stage.TRAINING_MAPS, stage.VALIDATION_MAPS, stage.TEST_MAPS]
    assert [len(group) for group in groups] == [20, 4, 8]
    assert sorted(name for group in groups for name in group) == sorted(MAPS)


def test_a_recording_is_read_with_its_targets():
    videos = read_recording(SHIPPED, (32, 48))
    assert len(videos) == 4
    for video in videos:
        assert video.frames.shape == (len(video.times), 4, 32, 48, 3)
        deaths = [event for event in video.events if event.kind == "death"]
        inside = [any(e.start <= t and t + 0.9 <= e.end for e in deaths) for t in video.times]
        assert (video.targets[inside, KINDS.index("death")] > 0.99).all()
        assert video.targets[:, KINDS.index("death")].any() == bool(deaths)


def test_of_a_boss_the_sight_is_learnt_and_of_another_map_the_change():
    times = np.arange(20) * CHUNK_SECONDS  # chunk 10 is 9.14 to 10.06 s, and shows 8.69 to 10.51 s
    events = [
        Event("v", 2.0, 9.0, "boss"),
        Event("v", times[3], times[4], "sight"),
        Event("v", times[8], times[8] + CHUNK_SECONDS / 4, "sight"),
        Event("v", 10.1, 12.1, "level"),
        Event("v", times[15], times[17], "death"),
    ]
    targets = {kind: column.tolist() for kind, column in zip(KINDS, stage._targets(events, times).T, strict=True)}
    assert targets["boss"] == pytest.approx([{3: 1.0, 8: 0.5}.get(i, 0.0) for i in range(20)], abs=1e-6)
    assert targets["level"] == [float(i in (10, 11)) for i in range(20)]
    assert targets["death"] == pytest.approx([float(i in (15, 16)) for i in range(20)], abs=1e-6)
    assert not any(targets["fight"] + targets["pickup"])
    assert not stage._targets([], times).any()


def test_the_shipped_recording_has_sights_within_its_bosses():
    sights, bosses = (read_events(SHIPPED / "events.jsonl", [kind]) for kind in ("sight", "boss"))
    assert sights
    for boss in bosses:
        inside = [s for s in sights if s.video == boss.video and boss.start <= s.start and s.end <= boss.end]
        assert (inside[0].start, max(s.end for s in inside)) == (boss.start, boss.end)


def test_what_is_no_recording_is_said(tmp_path):
    with pytest.raises(ValueError, match="no finished recording"):
        read_recording(tmp_path, (32, 48))


@pytest.fixture
def stages(tmp_path, monkeypatch):
    monkeypatch.setenv("K25LITE_STAGES", str(tmp_path / "stages"))
    monkeypatch.setattr(stage, "Detector", lambda config: tiny())  # smaller, for the time it takes
    return tmp_path / "stages"


def test_a_stage_on_given_footage_is_kept(stages):
    run = replace(RUNS["smoke"], steps=4)
    folder = detector_stage(run, footage=([SHIPPED], [SHIPPED]))
    detector = Detector.from_pretrained(folder)
    assert set(detector.rules) == set(KINDS)
    assert (folder / "metrics.json").exists()
    assert (folder / "log.json").exists()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert detector_stage(run, footage=([SHIPPED], [SHIPPED])) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert detector_stage(replace(run, seed=1), footage=([SHIPPED], [SHIPPED])) != folder


def test_the_shipped_detector_is_that_of_lite_and_knows_what_happens_in_shipped_footage(stages):
    folder = detector_stage(RUNS["lite"])
    assert folder == stage.SHIPPED
    assert not stages.exists()
    told = json.loads((folder / "stage.json").read_text())["config"]
    assert stage.DetectorRun(**told | {"widths": tuple(told["widths"])}) == RUNS["lite"] == RUNS["full"]
    detector = Detector.from_pretrained(folder).eval()
    true, found = [], []
    for video in read_recording(SHIPPED, detector.size):
        true += video.events
        found += found_events(detector, video.events[0].video, video.times, detector.probabilities(video.frames))
    assert score(true, found)["macro_f1"] > 0.7


def test_videos_are_dealt_out_among_the_widths(monkeypatch, tmp_path):
    made = []

    def record(out, *, videos, minutes, seed, width, **options):
        made.append((videos, minutes, seed, width))
        return out / "manifest.json"

    monkeypatch.setattr(stage, "record", record)
    run = stage.DetectorRun(videos=5, minutes=10.0, validation_videos=1, validation_minutes=3.0, widths=(160, 320))
    training, validation = stage._record(tmp_path, run, False)
    assert [(videos, minutes, width) for videos, minutes, _, width in made] == [(3, 6, 160), (2, 4, 320), (1, 3, 160)]
    assert len({seed for _, _, seed, _ in made}) == 3
    assert (len(training), len(validation)) == (2, 1)


@needs_game
def test_the_stage_records_what_it_needs(stages, monkeypatch):
    recorded = []
    record = stage.record

    def spy(out, **options):
        recorded.append((set(options["maps"]), options["seed"]))
        return record(out, **options)

    monkeypatch.setattr(stage, "record", spy)
    folder = detector_stage(RUNS["smoke"])
    assert Detector.from_pretrained(folder).size == (32, 48)
    (training, one), (validation, other) = recorded
    assert not training & validation
    assert not (training | validation) & set(stage.TEST_MAPS)
    assert one != other
    assert sorted(path.name for path in stages.iterdir()) == [folder.name]  # no footage is left behind
