import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from k25lite.training.vit import (
    MOTION_WEIGHT,
    Example,
    VisionReader,
    collate,
    evaluate,
    make_examples,
    train,
    warmup_stable_decay,
)
from k25lite.vision import MoonViT3DConfig, pack
from k25lite.world.scenes import (
    ASKED,
    CELLS,
    COLOURS,
    DIRECTIONS,
    TOKEN,
    WORDS,
    Question,
    SceneSpec,
    draw,
    sample_scenes,
)

PICTURES, CLIPS, LONG_CLIPS = SceneSpec(), SceneSpec(frames=4), SceneSpec(frames=8)
FLASHES = SceneSpec(frames=8, flash_frames=2)
TINY = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
PAD, START = TOKEN["<pad>"], TOKEN["<start>"]


pytestmark = pytest.mark.usefixtures("one_thread")


def reader(seed: int = 0, **changes) -> VisionReader:
    torch.manual_seed(seed)
    return VisionReader(MoonViT3DConfig.lite(**TINY | changes), width=32, layers=1)


def only(example: Example, *asked: str) -> Example:
    return replace(example, questions=tuple(tuple(q for q in cell if q.asked in asked) for cell in example.questions))


def see(model: VisionReader, examples: list[Example]) -> torch.Tensor:
    pixel_values, grid_thw = pack([chunk for e in examples for chunk in e.chunks], model.encoder.config)
    with torch.no_grad():
        return model.see(pixel_values, grid_thw, len(examples))


# -- the schedule


def test_learning_rate_rises_in_a_twentieth_stays_and_falls_to_a_tenth():
    rate = [warmup_stable_decay(step, 100) for step in range(101)]
    assert rate[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rate[4:70] == [1.0] * 66
    assert rate[85] == pytest.approx(0.1 + 0.9 * 15 / 30)
    assert rate[99] == pytest.approx(0.13)
    assert rate[100] == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 19, 20, 21, 333])
def test_learning_rate_never_falls_before_it_has_risen_nor_rises_again(steps):
    rate = np.array([warmup_stable_decay(step, steps) for step in range(steps)])
    assert rate.min() > 0
    assert rate.max() == 1.0
    turn = rate.argmax()
    assert (np.diff(rate[: turn + 1]) > 0).all()
    assert (np.diff(rate[turn:]) <= 0).all()


# -- examples


def test_examples_are_the_drawn_scenes_in_chunks_of_four_with_the_questions_of_each_cell():
    examples = make_examples(LONG_CLIPS, 3, seed=5)
    for example, scene in zip(examples, sample_scenes(LONG_CLIPS, 3, seed=5), strict=True):
        assert [chunk.shape for chunk in example.chunks] == [(4, 32, 32, 3)] * 2
        assert np.array_equal(np.concatenate(example.chunks), draw(scene))
        for where, cell in zip(CELLS, example.questions, strict=True):
            assert {q.where for q in cell} == {where}
        assert sorted(map(str, scene.questions)) == sorted(str(q) for cell in example.questions for q in cell)


def test_examples_of_equal_seed_are_equal_bit_for_bit():
    one, other, third = (make_examples(CLIPS, 5, seed) for seed in (1, 1, 2))
    for a, b, c in zip(one, other, third, strict=True):
        assert a.questions == b.questions
        assert all(np.array_equal(x, y) for x, y in zip(a.chunks, b.chunks, strict=True))
        assert not np.array_equal(a.chunks[0], c.chunks[0])


@pytest.mark.parametrize(("stride", "shown"), [(1, range(8)), (2, (1, 3, 5, 7)), (4, (2, 6)), (8, (4,))])
def test_a_stride_leaves_out_frames_but_no_question(stride, shown):
    (every,), (some,) = make_examples(LONG_CLIPS, 1, seed=5), make_examples(LONG_CLIPS, 1, seed=5, stride=stride)
    assert np.array_equal(np.concatenate(some.chunks), np.concatenate(every.chunks)[list(shown)])
    assert some.questions == every.questions


# -- batches


def test_collate_strings_a_cell_together_as_written_by_hand():
    asked = Question("colour", CELLS[0], "red"), Question("what", CELLS[0], "disc")
    (picture,) = make_examples(PICTURES, 1, seed=0)
    example = replace(picture, questions=(asked, asked[:1], (), asked[1:]))
    _, grid_thw, words, targets = collate([example], MoonViT3DConfig.lite(), np.random.default_rng(0))
    assert grid_thw.tolist() == [[1, 4, 4]]
    colour, what, red, disc = (TOKEN[word] for word in ("colour", "what", "red", "disc"))
    assert words[0].tolist() in ([START, colour, red, what, disc], [START, what, disc, colour, red])
    assert words[1:].tolist() == [
        [START, colour, red, PAD, PAD],
        [START, PAD, PAD, PAD, PAD],
        [START, what, disc, PAD, PAD],
    ]
    both = [-100, red, -100, disc, -100] if words[0][1] == colour else [-100, disc, -100, red, -100]
    assert targets.tolist() == [both, [-100, red] + [-100] * 3, [-100] * 5, [-100, disc] + [-100] * 3]


@pytest.mark.parametrize("spec", [PICTURES, CLIPS, FLASHES], ids=["pictures", "clips", "flashes"])
def test_targets_stand_at_the_words_that_ask_and_their_answer_only_afterwards(spec):
    examples = make_examples(spec, 20, seed=1)
    _, _, words, targets = collate(examples, MoonViT3DConfig.lite(), np.random.default_rng(2))
    cells = [cell for example in examples for cell in example.questions]
    assert words.shape == targets.shape
    assert len(words) == len(cells) == 80
    asking = torch.isin(words, torch.tensor([TOKEN[word] for word in ASKED]))
    assert torch.equal(targets != -100, asking)
    for row, target, cell in zip(words.tolist(), targets.tolist(), cells, strict=True):
        places = [place for place, answer in enumerate(target) if answer != -100]
        assert all(row[place + 1] == target[place] and target[place] not in row[: place + 1] for place in places)
        said = {(WORDS[row[place]], WORDS[target[place]]) for place in places}
        assert said == {(q.asked, q.answer) for q in cell}
        assert len(places) == len(cell)


def test_the_order_of_the_questions_varies_with_the_generator_alone():
    examples, config = make_examples(CLIPS, 10, seed=1), MoonViT3DConfig.lite()
    one, same, other = (collate(examples, config, np.random.default_rng(seed))[2] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len(set(one[:, 1].tolist())) == 3  # each of what, colour and move comes first somewhere


# -- the model


@pytest.mark.parametrize("pooling", [True, False], ids=["pooled", "frame by frame"])
def test_see_gives_each_cell_its_own_tokens_in_the_order_of_time(pooling):
    # Without attention layers a token depends on its own pixels only, so that a changed cell shows where its token went.
    model = reader(num_hidden_layers=0, temporal_pooling=pooling)
    examples = make_examples(LONG_CLIPS, 3, seed=4)
    before = see(model, examples)
    assert before.shape == (3 * 4, 2 if pooling else 8, 32)
    for scene, cell, frame in [(0, 0, 0), (1, 1, 2), (1, 2, 5), (2, 3, 7)]:
        chunks = [chunk.copy() for chunk in examples[scene].chunks]
        top, left = 16 * (cell // 2), 16 * (cell % 2)
        chunks[frame // 4][frame % 4, top : top + 16, left : left + 16] = 255
        changed = [replace(e, chunks=tuple(chunks)) if i == scene else e for i, e in enumerate(examples)]
        different = (see(model, changed) - before).abs().amax(-1) > 1e-6
        assert different.nonzero().tolist() == [[4 * scene + cell, frame // 4 if pooling else frame]]


def test_see_of_a_batch_is_each_chunk_encoded_alone():
    model, examples = reader(), make_examples(LONG_CLIPS, 3, seed=4)
    together = see(model, examples)
    for scene, example in enumerate(examples):
        for k, chunk in enumerate(example.chunks):
            with torch.no_grad():
                alone = model.projector(model.encoder(*pack([chunk], model.encoder.config)).pooler_output)
            torch.testing.assert_close(together[4 * scene : 4 * scene + 4, k], alone, rtol=1e-4, atol=1e-5)


def test_an_answer_is_read_from_the_vision_and_the_words_before_it_alone():
    model, examples = reader(), make_examples(CLIPS, 2, seed=3)
    _, _, words, _ = collate(examples, model.encoder.config, np.random.default_rng(0))
    vision = see(model, examples)
    with torch.no_grad():
        logits = model.read(vision, words)
        assert logits.shape == (*words.shape, len(WORDS))
        for place in range(1, words.shape[1]):
            changed = words.clone()
            changed[:, place] = TOKEN["none"]
            after = model.read(vision, changed)
            torch.testing.assert_close(after[:, :place], logits[:, :place])
            assert (after[:, place] != logits[:, place]).any(-1).all()
        blind = model.read(vision.flip(0), words)
    assert (blind[:, 1] != logits[:, 1]).any(-1).all()


# -- training


def test_loss_of_a_model_that_knows_nothing_is_the_logarithm_of_the_vocabulary():
    model = reader()
    torch.nn.init.zeros_(model.decoder.embed_tokens.weight)  # tied to the output: every word gets the same logit
    log = train(model, make_examples(CLIPS, 8, seed=0), seed=0, progress=False)
    assert log.loss[0] == pytest.approx(math.log(len(WORDS)), rel=1e-6)


def test_loss_is_the_cross_entropy_of_the_answers_with_motion_weighted():
    model = reader()
    examples = [only(e, "move" if i % 2 else "what") for i, e in enumerate(make_examples(CLIPS, 8, seed=0))]
    vision, total, weights = see(model, examples), 0.0, 0.0
    for row, (question,) in enumerate(cell for example in examples for cell in example.questions):
        words = torch.tensor([[START, TOKEN[question.asked]]])
        with torch.no_grad():
            logits = model.read(vision[row : row + 1], words)[0, -1].double()
        weight = MOTION_WEIGHT if question.answer in DIRECTIONS else 1.0
        total -= weight * F.log_softmax(logits, -1)[TOKEN[question.answer]].item()
        weights += weight
    log = train(model, examples, seed=0, progress=False)
    assert log.loss[0] == pytest.approx(total / weights, rel=1e-5)


def test_training_is_one_pass_in_batches_and_logs_the_rate_of_each_step():
    log = train(reader(), make_examples(PICTURES, 87, seed=0), seed=0, batch_size=4, learning_rate=1e-3, progress=False)
    assert log.step.tolist() == list(range(21))  # 87 is 21 batches of 4, and a rest that is left out
    expected = [1e-3 * warmup_stable_decay(step, 21) for step in range(21)]
    np.testing.assert_allclose(log.learning_rate, expected)


def trained(seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = reader()
    log = train(model, make_examples(CLIPS, 32, seed=0), seed=seed, progress=False)
    return log.loss.tolist(), {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_seed_fixes_training_to_the_bit():
    (losses, weights), (again, same), (elsewhere, _) = trained(0), trained(0), trained(1)
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert losses != elsewhere


def test_training_reaches_every_weight():
    model = reader()
    train(model, make_examples(CLIPS, 8, seed=0), seed=0, progress=False)
    left_out = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not left_out


@pytest.fixture(scope="module")
def colour_reader() -> tuple[VisionReader, float]:
    """A reader after a short training on the colours of pictures, and its accuracy before."""
    torch.set_num_threads(1)
    model = reader()
    before = evaluate(model, [only(e, "colour") for e in make_examples(PICTURES, 64, seed=1)]).correct.mean()
    data = [only(e, "colour") for e in make_examples(PICTURES, 800, seed=0)]
    train(model, data, seed=0, learning_rate=2e-3, progress=False)
    return model, before


def test_a_short_training_teaches_the_colours(colour_reader):
    model, before = colour_reader
    unseen = evaluate(model, [only(e, "colour") for e in make_examples(PICTURES, 64, seed=1)])
    assert unseen.correct.mean() > max(0.8, before + 0.5)
    assert unseen.groupby("answer").correct.mean().reindex(COLOURS).min() > 0.5  # chance is 1 in 6


def test_a_reader_that_is_shown_the_wrong_pictures_learns_no_colours():
    examples = [only(e, "colour") for e in make_examples(PICTURES, 400, seed=0)]
    shuffled = [replace(e, chunks=other.chunks) for e, other in zip(examples, examples[1:] + examples[:1], strict=True)]
    model = reader()
    train(model, shuffled, seed=0, learning_rate=2e-3, progress=False)
    answers = evaluate(model, [only(e, "colour") for e in make_examples(PICTURES, 64, seed=1)])
    assert answers.correct.mean() < 0.35


# -- evaluation


@pytest.fixture
def asked(colour_reader) -> tuple[VisionReader, list[Example]]:
    """A reader of colours, whose answers vary, and clips to ask it everything about."""
    return colour_reader[0], make_examples(CLIPS, 12, seed=1)


def test_evaluate_asks_every_question_once_and_tells_right_from_wrong(asked):
    model, examples = asked
    answers = evaluate(model, examples)
    expected = [(q.asked, q.kind, q.concept, q.answer) for e in examples for cell in e.questions for q in cell]
    assert list(answers[["asked", "kind", "concept", "answer"]].itertuples(index=False, name=None)) == expected
    assert answers.given.isin(WORDS).all()
    assert answers.given.nunique() > 3
    assert answers.correct.tolist() == [a == g for a, g in zip(answers.answer, answers.given, strict=True)]
    assert 0 < answers.correct.mean() < 1


def test_evaluate_asks_each_question_as_if_it_were_the_only_one(asked):
    model, examples = asked
    answers = evaluate(model, examples, batch_size=5)
    rows = iter(answers.given)
    for example in examples:
        vision = see(model, [example])
        for cell, questions in enumerate(example.questions):
            for question in questions:
                words = torch.tensor([[START, TOKEN[question.asked]]])
                with torch.no_grad():
                    given = model.read(vision[cell : cell + 1], words)[0, -1].argmax()
                assert next(rows) == WORDS[given]


def test_what_is_given_does_not_depend_on_any_true_answer(asked):
    model, examples = asked
    liars = [
        replace(e, questions=tuple(tuple(replace(q, answer="none") for q in cell) for cell in e.questions))
        for e in examples
    ]
    told = evaluate(model, liars)
    assert told.given.equals(evaluate(model, examples).given)
    assert told.correct.tolist() == (told.given == "none").tolist()


def test_evaluate_changes_no_weight_and_draws_no_random_number(asked):
    model, examples = asked
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(model, examples)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
