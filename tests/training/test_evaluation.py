"""Exact match by one forward pass is what greedy decoding would give."""

import pytest
import torch

from k25lite.training.evaluation import ask_all, blind_guess, exact_match, scores, tokenise, vision_inputs
from k25lite.training.loop import Recipe, train
from k25lite.training.schedules import LearningRate
from k25lite.world.families import FAMILIES, Document
from k25lite.world.streams import expand


@pytest.fixture(scope="module")
def taught(words, world, rows):
    """A model that knows some answers: trained on a few rows, again and again."""
    from k25lite.model import K25Lite, K25LiteConfig
    from k25lite.vision import MoonViT3DConfig

    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "moe": False, "initializer_range": 0.1}
    vision = MoonViT3DConfig.lite(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    model = K25Lite(K25LiteConfig.lite(len(words), vision_config=vision, **small))
    steps = [[("text", i % 36), ("vision", i % 4)] for i in range(150)]
    train(model, steps, rows, Recipe(LearningRate(5e-3)), progress=False)
    return model


def test_it_is_what_greedy_decoding_gives(taught, words, world):
    questions = ask_all(world, FAMILIES, 30, words, 0)
    seen = 0
    for asked in questions.values():
        for document, correct in zip(asked.documents, exact_match(taught, asked), strict=True):
            prompt, answer = document.turns[0]
            ids = words([expand(prompt, iter(document.media))], add_special_tokens=False, return_tensors="pt").input_ids
            wanted = words([f"{answer} ."], add_special_tokens=False)["input_ids"][0]
            given = (
                taught.eval()
                .generate(ids, **vision_inputs([document], taught), max_new_tokens=len(wanted), do_sample=False)[
                    0, ids.shape[1] :
                ]
                .tolist()
            )
            assert (given == wanted) == correct
            seen += correct
    assert seen > 0, "a model that is always wrong tests nothing"


def test_questions_are_the_same_for_the_same_seed(words, world):
    one, two, other = (ask_all(world, ("code",), 20, words, seed)["code"] for seed in (0, 0, 1))
    assert [d.turns for d in one.documents] == [d.turns for d in two.documents]
    assert [d.turns for d in one.documents] != [d.turns for d in other.documents]


def test_scores_count_by_family_and_kind(taught, words, world):
    frame = scores(taught, ask_all(world, FAMILIES, 10, words, 0))
    assert frame.groupby("family").asked.sum().to_dict() == dict.fromkeys(FAMILIES, 10)
    assert (frame.correct <= frame.asked).all()


def test_the_blind_guess_by_hand(words):
    documents = [Document("x", "a", (("1 + 1 =", answer),)) for answer in ("2", "2", "3")]
    documents += [Document("x", "b", (("2 + 2 =", "4"),))]
    assert blind_guess(tokenise(documents, words)) == pytest.approx(3 / 4)


def test_without_sight_every_picture_is_grey_and_the_question_the_same(words, world):
    asked = ask_all(world, ("ocr",), 5, words, 0)["ocr"]
    blank = asked.without_sight()
    assert torch.equal(asked.input_ids, blank.input_ids)
    assert all((item == 127).all() for document in blank.documents for item in document.media)
