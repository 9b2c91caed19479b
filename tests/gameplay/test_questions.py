"""Questions about clips: what is true of them, what the model reads, what it learns and is examined on."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoProcessor
from typer.testing import CliRunner

from k25lite.cli import app
from k25lite.gameplay import questions_stage as stage
from k25lite.gameplay.detector import Detector, DetectorConfig
from k25lite.gameplay.events import KINDS, Event
from k25lite.gameplay.footage import CHUNK_SECONDS, FRAME_STEP, Chunks, read_all, read_chunks
from k25lite.gameplay.questions import (
    CLIP_SECONDS,
    QUESTIONS,
    WHAT,
    WHEN,
    WHICH,
    WORDS,
    answer,
    ask_about,
    clip_at,
    clip_start,
    in_words,
    read_clip,
)
from k25lite.gameplay.questions_stage import QUESTIONS_RUNS, Watched, document, examine, questions_stage
from k25lite.model import K25Lite
from k25lite.training.evaluation import exact_match, tokenise
from k25lite.vision import MoonViT3DConfig, VideoChunk

FOOTAGE = Path(__file__).parents[2] / "data" / "gameplay"
VIDEO = FOOTAGE / "gameplay_0000.mp4"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shipped():
    """The model that comes with the project, its processor, and a video as it sees it."""
    model = K25Lite.from_pretrained(stage.SHIPPED_ANSWERER).eval()
    size = Detector.from_pretrained(stage.SHIPPED).size
    return model, AutoProcessor.from_pretrained(stage.SHIPPED_ANSWERER), stage.watch_video(FOOTAGE, VIDEO.name, size)


def event(kind, start, end, detail=""):
    return Event("a", start, end, kind, detail)


def answers(events, start=100.0):
    asked = ask_about(events, start)
    assert {each.question for each in asked} <= set(QUESTIONS)
    assert len({each.question for each in asked}) == len(asked)
    return {each.question: each.answer for each in asked}


def test_where_nothing_happens_every_answer_is_no():
    assert answers([]) == {"what happens here ?": "nothing"} | {
        f"is there a {name} ?": "no" for name in ("fight", "boss", "pickup", "death", "new level")
    }


def test_what_happens_is_told_in_the_order_of_kinds():
    told = answers([event("death", 104, 110), event("pickup", 101, 102, "Clip"), event("fight", 90, 103)])
    assert told["what happens here ?"] == "fight and pickup and death"
    assert [told[f"is there a {name} ?"] for name in ("fight", "boss", "death")] == ["yes", "no", "yes"]


@pytest.mark.parametrize("kind", ["fight", "sight", "death"])
@pytest.mark.parametrize(
    ("start", "end", "happens"),
    [
        (90, 100.49, False),
        (90, 100.5, True),
        (100 + CLIP_SECONDS - 0.5, 130, True),
        (100 + CLIP_SECONDS - 0.49, 130, False),
        (103, 103.49, False),
        (90, 130, True),
    ],
)
def test_what_lasts_happens_if_half_a_second_of_it_is_in_the_clip(kind, start, end, happens):
    name = {"sight": "boss"}.get(kind, kind)
    assert answers([event(kind, start, end, "Cyberdemon")])[f"is there a {name} ?"] == ("no", "yes")[happens]


@pytest.mark.parametrize("kind", ["pickup", "level"])
@pytest.mark.parametrize(
    ("start", "happens"),
    [(99.99, False), (100.0, True), (100 + CLIP_SECONDS - 0.01, True), (100 + CLIP_SECONDS, False)],
)
def test_a_moment_happens_where_it_begins(kind, start, happens):
    name = {"level": "new level"}.get(kind, kind)
    told = answers([event(kind, start, start + 2)])
    assert told[f"is there a {name} ?"] == ("no", "yes")[happens]
    assert (f"when is the {name} ?" in told) == happens


def test_a_boss_behind_the_back_of_the_player_is_none():
    assert answers([event("boss", 90, 130, "Cyberdemon")])["is there a boss ?"] == "no"


def test_which_boss_is_asked_where_there_is_one():
    one, other = event("sight", 90, 103, "BaronOfHell"), event("sight", 104, 110, "Cyberdemon")
    assert answers([one])["which boss is it ?"] == "baron of hell"
    assert answers([one, replace(one, start=105.0, end=120.0)])["which boss is it ?"] == "baron of hell"
    assert "which boss is it ?" not in answers([one, other])
    assert "which boss is it ?" not in answers([replace(one, detail="BaronOfHell, Cyberdemon")])


def test_when_is_asked_of_a_single_one_and_answered_by_the_time_of_its_chunk():
    assert "when is the pickup ?" not in answers([event("pickup", 101, 102), event("pickup", 104, 105)])
    chunks = Chunks(np.arange(9) * CHUNK_SECONDS, np.zeros((9, 4, 1, 1, 3), np.uint8), np.zeros((9, 4)))
    clip = clip_at(chunks, 1)
    for seconds in np.linspace(0, CLIP_SECONDS - 1e-6, 50):
        told = answers([event("level", 100 + seconds, 103 + seconds)])["when is the new level ?"]
        begun = [chunk for chunk in clip if chunk.times[0] <= seconds]
        assert told == begun[-1].timestamp.split(".")[0]


def test_the_words_are_those_of_questions_and_answers():
    assert in_words("SpiderMastermind") == "spider mastermind"
    everything = [event("sight", 100, 107, "Cyberdemon"), *(event(kind, 101, 102) for kind in KINDS)]
    spoken = {word for each in ask_about(everything, 100.0) for word in f"{each.question} {each.answer}".split()}
    assert {word for word in spoken if ":" not in word} <= set(WORDS)


def test_a_clip_is_sixteen_steps_in_a_row():
    frame = np.arange(40, dtype=np.uint8)  # of step i - 1
    steps = np.array([[2 * k + i for i in range(4)] for k in range(19)])
    chunks = Chunks(
        np.arange(19) * CHUNK_SECONDS, frame[steps][..., None, None, None].repeat(3, -1), steps * FRAME_STEP
    )
    clip = clip_at(chunks, 3)
    assert np.concatenate([chunk.frames for chunk in clip])[:, 0, 0, 0].tolist() == list(range(6, 22))
    assert np.concatenate([chunk.times for chunk in clip]) == pytest.approx(np.arange(16) * FRAME_STEP)
    assert clip_start(3) == pytest.approx((6 - 1) * FRAME_STEP)
    with pytest.raises(IndexError, match="cannot be a clip"):
        clip_at(chunks, 13)
    assert len(clip_at(chunks, 12)) == 4


@pytest.mark.parametrize("start", [0.0, 0.6, 10.0, 12.34])
def test_a_clip_is_read_from_where_it_is_asked_for(start):
    begins, clip = read_clip(VIDEO, start, (48, 64))
    assert abs(begins - start) <= CHUNK_SECONDS / 2 + 1e-6
    every = read_all(read_chunks(VIDEO, (48, 64)))
    expected = clip_at(every, round((begins + FRAME_STEP) / CHUNK_SECONDS))
    for chunk, same in zip(clip, expected, strict=True):
        np.testing.assert_array_equal(chunk.frames, same.frames)


def test_where_no_clip_is_left_that_is_said():
    with pytest.raises(ValueError, match=r"ends before a clip of 7\.3 s from 9999 s does"):
        read_clip(VIDEO, 9999.0, (48, 64))


def test_a_document_reads_as_the_processor_writes_it(shipped):
    model, processor, video = shipped
    clip, asked = video.clip(5)
    made = tokenise([document(clip, asked[:1], stage.unit_of(model))], processor.tokenizer)
    inputs = processor(text=f"<video> {asked[0].question}", videos=[clip])
    prompt = made.targets[0] == -100
    assert made.input_ids[0][prompt].tolist() == inputs["input_ids"][0].tolist()
    assert (made.input_ids[0] == model.config.media_token_id).sum() == 48


def test_no_more_is_asked_about_a_clip_than_fits_a_row(shipped):
    model, processor, video = shipped
    made = stage.documents([video], stage.unit_of(model), Random(0))
    (rows,) = [stage.make_rows(made, 40, stage.ROW, processor.tokenizer)]
    assert max(row.tokens for row in rows) <= stage.ROW
    assert all(len(row.media) == 4 for row in rows)  # one clip in each


def test_it_says_what_the_examination_counts(shipped):
    model, processor, video = shipped
    places = [(index, each) for index in list(video.clips)[::2] for each in video.clip(index)[1]]
    clips = [video.clip(index)[0] for index, _ in places]
    said = answer(model, processor, clips, [each.question for _, each in places])
    asked = tokenise(
        [document(clip, [each], stage.unit_of(model)) for clip, (_, each) in zip(clips, places, strict=True)],
        processor.tokenizer,
    )
    right = [words == each.answer for words, (_, each) in zip(said, places, strict=True)]
    assert right == exact_match(model, asked)
    assert 0 < sum(right) < len(right)


def test_what_it_cannot_be_asked_is_said(shipped):
    model, processor, video = shipped
    clip, _ = video.clip(5)
    assert answer(model, processor, [], []) == []
    with pytest.raises(ValueError, match="one question about each clip"):
        answer(model, processor, [clip], [])
    with pytest.raises(
        ValueError, match=r"not every word of 'is there a cat .'; what it can be asked: \('what happens"
    ):
        answer(model, processor, [clip], ["is there a cat ?"])


def test_an_examination_has_as_many_yes_as_no(shipped):
    model, processor, video = shipped
    exam = examine(model, processor.tokenizer, video, most=6)
    assert exam.groupby("question").size().max() <= 6
    yes_or_no = exam[exam.kind == stage.IS_THERE]
    counts = yes_or_no.groupby("question").answer.value_counts().unstack()
    assert (counts["yes"] == counts["no"]).all()
    assert len(counts) >= 3
    assert not yes_or_no.duplicated(["question", "start"]).any()
    for row in exam.itertuples():
        told = {each.question: each.answer for each in ask_about(video.events, row.start)}
        assert told[row.question] == row.answer
    again = examine(model, processor.tokenizer, video, most=6)
    pd.testing.assert_frame_equal(exam, again)


def test_the_shipped_model_is_that_of_full_and_knows_what_happens_in_shipped_footage(shipped, tmp_path, monkeypatch):
    monkeypatch.setenv("K25LITE_STAGES", str(tmp_path))
    folder = questions_stage(QUESTIONS_RUNS["full"])
    assert folder == stage.SHIPPED_ANSWERER
    assert not any(tmp_path.iterdir())
    told = json.loads((folder / "stage.json").read_text())["config"]
    weights = (stage.SHIPPED / "model.safetensors").read_bytes()
    assert told.pop("detector") == hashlib.sha256(weights).hexdigest()
    assert told == json.loads(json.dumps(asdict(QUESTIONS_RUNS["full"])))
    model, processor, _ = shipped
    detector = Detector.from_pretrained(stage.SHIPPED)
    for name, weight in detector.encoder.state_dict().items():  # it sees with the same eyes
        torch.testing.assert_close(model.vision_tower.state_dict()[name], weight, rtol=0, atol=0)
    videos = [stage.watch_video(FOOTAGE, path.name, detector.size) for path in sorted(FOOTAGE.glob("*.mp4"))]
    exam = pd.concat([examine(model, processor.tokenizer, each, most=20) for each in videos])
    assert exam.seeing.mean() > exam.blind.mean() + 0.2
    assert exam[exam.kind == WHAT].seeing.mean() > exam[exam.kind == WHAT].blind.mean() + 0.2
    assert {WHEN, WHICH} <= set(exam.kind)


@pytest.fixture
def eyes(tmp_path, monkeypatch):
    """The folder of a detector smaller than the shipped one, for the time it takes."""
    monkeypatch.setenv("K25LITE_STAGES", str(tmp_path / "stages"))
    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    vision = MoonViT3DConfig.lite(**tiny, pos_emb_height=4, pos_emb_width=6)
    Detector(DetectorConfig(vision_config=vision, height=32, width=48)).save_pretrained(tmp_path / "eyes")
    return tmp_path / "eyes"


def test_a_stage_learns_to_speak_and_leaves_the_eyes_alone(eyes):
    run = replace(QUESTIONS_RUNS["smoke"], steps=30)
    folder = questions_stage(run, eyes, footage=[[FOOTAGE]] * 2)
    log = pd.read_json(folder / "log.json")
    assert len(log) == 30
    assert log.loss.tail(5).mean() < 0.6 * log.loss.head(5).mean()
    model, processor = K25Lite.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for name, weight in Detector.from_pretrained(eyes).encoder.state_dict().items():
        torch.testing.assert_close(model.vision_tower.state_dict()[name], weight, rtol=0, atol=0)
    _, clip = read_clip(VIDEO, 10.0, (32, 48))
    assert len(answer(model, processor, [clip, clip], list(QUESTIONS[:2]))) == 2
    exam = pd.read_csv(folder / "exam.csv")
    assert set(exam.columns) == {"video", "kind", "question", "answer", "start", "seeing", "blind"}
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert questions_stage(run, eyes, footage=[[FOOTAGE]] * 2) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert questions_stage(replace(run, seed=1), eyes, footage=[[FOOTAGE]] * 2) != folder


def test_clips_of_a_video_that_is_too_short_are_none():
    chunks = Chunks(np.arange(7) * CHUNK_SECONDS, np.zeros((7, 4, 32, 48, 3), np.uint8), np.zeros((7, 4)))
    assert not Watched("a", chunks, []).clips
    longer = Chunks(np.arange(8) * CHUNK_SECONDS, np.zeros((8, 4, 32, 48, 3), np.uint8), np.zeros((8, 4)))
    assert list(Watched("a", longer, []).clips) == [1]
    assert isinstance(Watched("a", longer, []).clip(1)[0][0], VideoChunk)
    with pytest.raises(ValueError, match="none of 1 videos is long enough for a clip"):
        next(stage.documents([Watched("a", chunks, [])], 16, Random(0)))


def test_on_the_command_line():
    runner = CliRunner()
    result = runner.invoke(app, ["ask", str(VIDEO), "--at", "10"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("0:09 to 0:16: ")
    result = runner.invoke(app, ["ask", str(VIDEO), "is there a boss ?", "--at", "10"])
    assert result.output.removeprefix("0:09 to 0:16: ").strip() in ("yes", "no")
    for arguments, message in (
        ([str(VIDEO), "is there a cat ?"], "what it can be asked: ('what happens here ?'"),
        ([str(VIDEO), "--at", "9999"], "ends before a clip"),
        (["none.mp4"], "none.mp4"),
        ([str(VIDEO), "--model", "nowhere"], "no folder with a model: nowhere"),
    ):
        result = runner.invoke(app, ["ask", *arguments])
        assert result.exit_code == 2
        assert message in result.output
        assert len(result.output.splitlines()) == 1
