"""Zero-vision SFT and its controls: what goes in, what comes out, and how it is examined."""

from dataclasses import replace
from random import Random

import pandas as pd
import pytest
import torch

from k25lite.model import K25Lite
from k25lite.training import sft
from k25lite.training.evaluation import ask_all, exact_match
from k25lite.training.examination import examine
from k25lite.training.joint import BUDGETS, JointRun, joint_stage, tokenizer
from k25lite.training.sandbox import Sandbox
from k25lite.training.schedules import EARLY
from k25lite.training.sft import ARMS, FEW, MANY, SFTRun, sft_stage, tool_tokenizer
from k25lite.training.tasks import KINDS, NEVER
from k25lite.world.families import LiteWorld
from k25lite.world.streams import make_rows

TINY = replace(BUDGETS["smoke"], caption_rows=10, rows=20, questions=2, curve_questions=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K25LITE_STAGES", str(tmp_path_factory.mktemp("stages")))
        run = JointRun("early", 0, TINY, EARLY)
        joint_stage(run)
        yield run


def test_no_pixel_enters_zero_vision_sft():
    rows = make_rows(ARMS["zero-vision"].demonstrations(Random(0)), 200, 64, tool_tokenizer())
    media = tool_tokenizer().convert_tokens_to_ids("<media>")
    assert not any(row.media for row in rows)
    assert not any((row.input_ids == media).any() for row in rows)


def test_arms_separate_modality_from_diversity():
    assert set(MANY) | set(NEVER) == set(KINDS)
    assert not set(MANY) & set(NEVER)
    assert set(FEW) < set(MANY)
    shares = {}
    assert not ARMS["no SFT"].told
    assert not ARMS["no SFT"].shown
    for name, arm in ARMS.items():
        if name == "no SFT":
            continue
        demonstrations = arm.demonstrations(Random(1))
        documents = [next(demonstrations) for _ in range(400)]
        told = {document.kind for document in documents if not document.media}
        shown = {document.kind for document in documents if document.media}
        assert told == set(arm.told)
        assert shown == set(arm.shown)
        shares[name] = sum(bool(document.media) for document in documents) / 400
    assert shares["zero-vision"] == shares["few text"] == 0
    assert shares["few vision"] == shares["many vision"] == 1
    assert 0.1 < shares["text + few vision"] < 0.3


def test_known_words_keep_their_ids_and_their_meaning(base):
    """The new words come after the old ones, and a model that was not trained further answers as before."""
    old, new = tokenizer(), tool_tokenizer()
    assert {word: new.get_vocab()[word] for word in old.get_vocab()} == old.get_vocab()
    model = K25Lite.from_pretrained(joint_stage(base))
    questions = ask_all(LiteWorld(0), ("text_knowledge", "ocr"), 20, old, 0)
    before = {name: exact_match(model, asked) for name, asked in questions.items()}
    with torch.no_grad():
        ids = questions["text_knowledge"].input_ids
        logits = model(ids).logits
        model.resize_token_embeddings(len(new))
        torch.testing.assert_close(model(ids).logits[..., : len(old)], logits)
    assert model.config.text_config.vocab_size == len(new)
    assert {name: exact_match(model, asked) for name, asked in questions.items()} == before


def test_a_stage_is_trained_once_and_examined_on_pictures(base, monkeypatch):
    run = SFTRun("zero-vision", ARMS["zero-vision"], base, rows=20, questions=2)
    kept, train = [], sft.train
    monkeypatch.setattr(sft, "train", lambda *a, **k: kept.append(k["checkpoints"].is_dir()) or train(*a, **k))
    folder = sft_stage(run)
    assert kept == [True]
    assert sft_stage(replace(run, name="another name")) == folder
    assert sft_stage(replace(run, arm=ARMS["few text"])) != folder
    sampled = pd.read_json(folder / "sampled.json")
    assert set(sampled.kind) == set(MANY)
    assert (sampled.asked == 3 * 2).all()
    model = K25Lite.from_pretrained(folder)
    with Sandbox() as sandbox:
        for sight in ("shown", "blank", "swapped", "told"):
            found = examine(model, tool_tokenizer(), sandbox, kinds=("what", "read", "box"), count=2, sight=sight)
            assert list(found.kind) == ["box", "read", "what"]
            assert (found.asked == 2).all()
            assert (found.valid <= found.programs).all()
            assert (found.programs <= found.asked).all()
            assert (found.correct <= found.asked).all()
