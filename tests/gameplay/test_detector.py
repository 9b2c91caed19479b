"""The detector: what it computes, what it learns, what is kept of it."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score

from k25lite.gameplay import detector_stage as stage
from k25lite.gameplay.detector import Detector, DetectorConfig
from k25lite.gameplay.detector_stage import RUNS, Labelled, detector_stage, found_events, read_recording, train
from k25lite.gameplay.doom import MAPS
from k25lite.gameplay.encounters import MONSTERS
from k25lite.gameplay.events import KINDS, Box, Event
from k25lite.gameplay.footage import CHUNK_SECONDS, read_events
from k25lite.gameplay.scoring import score
from k25lite.gameplay.segments import MARGIN
from k25lite.gameplay.spans import SpanRule
from k25lite.vision import MoonViT3DConfig

SHIPPED = Path(__file__).parents[2] / "data" / "gameplay"
needs_game = pytest.mark.skipif(find_spec("vizdoom") is None, reason="needs the game: pip install 'k25lite[game]'")
TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}


def tiny(seed=0):
    torch.manual_seed(seed)
    vision = MoonViT3DConfig.lite(**TINY, pos_emb_height=4, pos_emb_width=6)
    return Detector(DetectorConfig(vision_config=vision, height=32, width=48)).eval()


pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 32, 48, 3), dtype=np.uint8)


def test_chunks_and_images_together_are_as_one_by_one():
    detector = tiny()
    chunks, images = noise(3, 4), noise(2, 1, seed=1)
    with torch.no_grad():
        features, monsters = detector.see([chunks[0], images[0], chunks[1], images[1], chunks[2]])
        together = features[:, -len(KINDS) :].sigmoid().numpy()
    assert monsters.shape == (14 * 24, len(MONSTERS))  # patches of 14 frames
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
    "frames", [noise(2, 4)[0], noise(2, 4)[:, :, :20], noise(2, 4).astype(np.float32), noise(2, 4)[..., :1]]
)
def test_frames_of_another_shape_or_type_are_refused(frames):
    with pytest.raises(ValueError, match="frames must be"):
        tiny().probabilities(frames)


def test_chunks_longer_than_the_encoder_takes_are_refused():
    with pytest.raises(ValueError, match="a chunk has 1 to 4"):
        tiny().probabilities(noise(1, 5))


def test_a_small_picture_is_judged_as_well_and_for_itself():
    detector, small = tiny(), noise(3, 1)[:, :, :16, :32]
    apart = np.concatenate([detector.probabilities(small[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(detector.probabilities(small), apart, atol=1e-5)
    with torch.no_grad():
        mixed, _ = detector.see([small[0], noise(1, 4)[0], small[1]])
    np.testing.assert_allclose(mixed[[0, 2], -len(KINDS) :].sigmoid().numpy(), apart[:2], atol=1e-5)


def in_context_of_noise(n=80):
    detector = tiny()
    features = np.random.default_rng(0).normal(size=(n, detector.context.mean.numel())).astype(np.float32)
    return detector, features


def test_a_chunk_is_judged_by_its_neighbours_and_by_none_further():
    detector, features = in_context_of_noise()
    reach = sum(detector.config.dilations)
    before, changed = detector.in_context(features), features.copy()
    changed[40] += 3.0
    moved = np.flatnonzero(np.abs(detector.in_context(changed) - before).max(1) > 1e-7)
    assert (moved.min(), moved.max()) == (40 - reach, 40 + reach)
    part = detector.in_context(features[20 - reach : 30 + reach])[reach:-reach]
    np.testing.assert_allclose(
        part, before[20:30], atol=1e-6
    )  # what a segment with its margin sees is what the whole does
    assert reach * CHUNK_SECONDS < MARGIN


def test_a_stretch_that_comes_in_parts_is_watched_as_a_whole():
    detector, chunks = tiny(), noise(5, 4)
    whole = detector.in_context(detector.features(chunks))
    np.testing.assert_allclose(detector.watch(iter([chunks[:2], chunks[2:]])), whole, atol=1e-6)
    assert detector.watch([]).shape == detector.in_context(detector.features(noise(0, 4))).shape == (0, len(KINDS))


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
    assert np.array_equal(again.watch([noise(3, 4)]), detector.watch([noise(3, 4)]))


def labelled(n, seed):
    """Noise; a pickup is a bright square somewhere in all frames, a level a change from bright to dark within a chunk.

    And the square is a Cyberdemon, where it covers half a patch of 8 pixels.
    """
    rng = np.random.default_rng(seed)
    frames = rng.integers(60, 120, (n, 4, 32, 48, 3)).astype(np.uint8)
    targets = np.zeros((n, len(KINDS)), np.float32)
    monsters = np.zeros((n, 4, 4, 6, len(MONSTERS)), np.uint8)
    for i in range(n):
        if rng.random() < 0.5:
            row, column = rng.integers(0, 24), rng.integers(0, 40)
            frames[i, :, row : row + 8, column : column + 8] = 255
            targets[i, KINDS.index("pickup")] = 1
            down, across = (np.clip(8 - np.abs(8 * np.arange(k) - at), 0, 8) for k, at in ((4, row), (6, column)))
            monsters[i, ..., MONSTERS.index("Cyberdemon")] = 255 * (down[:, None] * across >= 32)
        if rng.random() < 0.5:
            frames[i, 2:] //= 3
            targets[i, KINDS.index("level")] = 1
    return Labelled(np.arange(n, dtype=float), frames, targets, [], monsters.reshape(n, 4, 24, len(MONSTERS)))


def accuracy(detector, data):
    columns = [KINDS.index("pickup"), KINDS.index("level")]
    found = detector.probabilities(data.frames)[:, columns] > 0.5
    return (found == (data.targets[:, columns] > 0.5)).mean(axis=0)


RUN = stage.DetectorRun(steps=120, chunks=12, images=4, small=4, learning_rate=5e-3)
SMALL = (16, 32)  # of the pictures here, a half


def test_it_learns_what_is_in_a_frame_and_what_is_between_frames(monkeypatch):
    monkeypatch.setattr(stage, "HIDDEN", 0.0)  # a square in a black bar could not be seen
    monkeypatch.setattr(stage, "SMALL", SMALL)
    detector, data, unseen = tiny(), labelled(600, 0), labelled(200, 1)
    before = accuracy(detector, unseen)
    log = train(detector, [data], RUN, progress=False)
    after = accuracy(detector, unseen)
    assert list(log.columns) == ["step", "loss", "learning_rate"]
    assert log.loss[-20:].mean() < log.loss[:20].mean()
    assert (after > before + 0.2).all()
    assert not detector.training
    square = unseen.monsters[:, 0, :, MONSTERS.index("Cyberdemon")] > 0
    with torch.no_grad():
        monsters = detector.see(list(unseen.frames[:, :1]))[1].view(len(square), 24, -1)[
            ..., MONSTERS.index("Cyberdemon")
        ]
    hit = square[np.arange(len(square)), monsters.argmax(1)]
    assert hit[square.any(1)].mean() > 0.8, "the patch that shows the square is found, though half were mirrored"


def test_encounters_fade_in_favour_of_play(monkeypatch):
    seen = []
    monkeypatch.setattr(stage, "_changed", lambda frames, *_: seen.append(int(frames.max() > 0)) or frames)
    monkeypatch.setattr(stage, "SMALL", SMALL)
    play, encounters = labelled(60, 0), labelled(60, 1)
    play.frames[:] = 0
    train(tiny(), [play], replace(RUN, steps=60), [encounters], progress=False)
    first, last = np.mean(seen[: len(seen) // 4]), np.mean(seen[-len(seen) // 4 :])
    assert (first, last) == pytest.approx((0.46, 0.24), abs=0.1)


def test_the_context_learns_what_one_chunk_alone_cannot_tell():
    """A fight is a chunk with a square before and after it."""
    detector, n = tiny(), 240

    def film(seed):
        data = labelled(n, seed)
        square = data.targets[:, KINDS.index("pickup")]
        data.targets[1:-1, KINDS.index("fight")] = square[:-2] * square[2:]
        return data

    unseen = film(9)
    detector.monsters.weight.data.zero_()
    train(detector, [film(0), film(1)], replace(RUN, steps=150), progress=False)
    stage.train_context(detector, [film(2), film(3), film(4)], replace(RUN, context_steps=250), progress=False)
    fight = unseen.targets[:, KINDS.index("fight")] > 0.5
    alone, judged = (
        scores[:, KINDS.index("fight")]
        for scores in (detector.probabilities(unseen.frames), detector.watch([unseen.frames]))
    )
    assert average_precision_score(fight, judged) > max(0.7, average_precision_score(fight, alone) + 0.25)


def test_a_context_without_footage_is_refused():
    with pytest.raises(ValueError, match="one video or more"):
        stage.train_context(tiny(), [], RUN, progress=False)


def test_boxes_become_shares_of_patches():
    """Pictures of 32 x 48 pixels in patches of 16: one box covers the upper middle patch and half of its left one."""
    rows = [
        ("v", 7, "Cyberdemon", 8 / 48, 0.0, 32 / 48, 16 / 32),
        ("v", 7, "Spectre", 33 / 48, 17 / 32, 37 / 48, 21 / 32),  # 16 square pixels in the last patch
        ("v", 7, "DoomImp", 0.0, 0.0, 2 / 48, 2 / 32),  # too small
        ("v", 7, "Unknown", 0.0, 0.0, 1.0, 1.0),
        ("v", 8, "Demon", 4 / 48, 0.0, 8 / 48, 16 / 32),  # a quarter of the first
    ]
    boxes = pd.DataFrame(rows, columns=["video", "frame", *Box._fields])
    found = stage._monsters(boxes, np.array([[6, 7, 8, 8]]), (32, 48), 16)
    assert found.shape == (1, 4, 6, len(MONSTERS))
    shown = {(f, patch, MONSTERS[m]): v for (_, f, patch, m), v in np.ndenumerate(found) if v}
    assert shown == {
        (1, 0, "Cyberdemon"): 255,
        (1, 1, "Cyberdemon"): 255,
        (1, 5, "Spectre"): 255,
        (2, 0, "Demon"): 255,
        (3, 0, "Demon"): 255,
    }


def test_equal_seeds_train_equal_weights(monkeypatch):
    monkeypatch.setattr(stage, "SMALL", SMALL)
    run = replace(RUN, steps=3)
    one, same, other = tiny(), tiny(), tiny()
    for detector, seed in ((one, 0), (same, 0), (other, 1)):
        train(detector, [labelled(40, 0)], replace(run, seed=seed), progress=False)
    weights = [torch.cat([p.flatten() for p in detector.parameters()]) for detector in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_on_too_little_is_refused():
    with pytest.raises(ValueError, match="10 chunks are less than the 20"):
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
    monkeypatch.setattr(stage, "SMALL", SMALL)
    return tmp_path / "stages"


def test_a_stage_on_given_footage_is_kept(stages):
    run = replace(RUNS["smoke"], steps=4)
    folder = detector_stage(run, footage=[[SHIPPED]] * 4)
    detector = Detector.from_pretrained(folder)
    assert set(detector.rules) == set(KINDS)
    assert (folder / "metrics.json").exists()
    assert (folder / "log.json").exists()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert detector_stage(run, footage=[[SHIPPED]] * 4) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert detector_stage(replace(run, seed=1), footage=[[SHIPPED]] * 4) != folder


def test_the_shipped_detector_is_that_of_full_and_knows_what_happens_in_shipped_footage(stages):
    folder = detector_stage(RUNS["full"])
    assert folder == stage.SHIPPED
    assert not stages.exists()
    told = json.loads((folder / "stage.json").read_text())["config"]
    assert stage.DetectorRun(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}) == RUNS["full"]
    detector = Detector.from_pretrained(folder).eval()
    true, found = [], []
    for video in read_recording(SHIPPED, detector.size):
        true += video.events
        found += found_events(detector, video.events[0].video, video.times, detector.watch([video.frames]))
    assert score(true, found)["macro_f1"] > 0.6  # 27 events: one more or less is up to 0.1


@needs_game
def test_the_shipped_detector_knows_what_happens_on_maps_it_has_not_seen(tmp_path):
    made = stage.record(tmp_path, videos=2, minutes=12.0, seed=5, maps=stage.TEST_MAPS, progress=False).parent
    detector = Detector.from_pretrained(stage.SHIPPED).eval()
    true, found = [], []
    for number, video in enumerate(read_recording(made, detector.size)):
        true += [replace(event, video=f"{number}") for event in video.events]
        found += found_events(detector, f"{number}", video.times, detector.watch([video.frames]))
    assert len(true) > 50
    assert score(true, found)["macro_f1"] > 0.7  # the bar of notebook 08


def test_videos_are_dealt_out_among_the_widths(monkeypatch, tmp_path):
    made = []

    def record(out, *, videos, minutes, seed, width, encounters, boxes, **options):
        made.append((videos, minutes, width))
        seeds.add(seed)
        told.append((encounters, boxes))
        return out / "manifest.json"

    seeds, told = set(), []
    monkeypatch.setattr(stage, "record", record)
    run = stage.DetectorRun(videos=(5, 1, 2, 1), minutes=(10.0, 2.0, 4.0, 3.0), widths=(160, 320))
    recordings = [stage.record_for(what, tmp_path, run) for what in range(4)]
    assert made == [(3, 6, 160), (2, 4, 320), (1, 2, 160), (1, 2, 160), (1, 2, 320), (1, 3, 160)]
    assert told == [(False, True)] * 2 + [(True, True)] + [(False, False)] * 3
    assert len(seeds) == 6
    assert [len(each) for each in recordings] == [2, 1, 2, 1]


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
    *training, (validation, _) = recorded
    assert len(training) == 3
    for maps, _ in training:
        assert not maps & validation
        assert not (maps | validation) & set(stage.TEST_MAPS)
    assert len({seed for _, seed in recorded}) == 4
    assert sorted(path.name for path in stages.iterdir()) == [folder.name]  # no footage is left behind
