"""Rollouts: what was sampled is what is recorded, batches change nothing, programs run on the pixels."""

from random import Random

import pytest
import torch

from k25lite.model import K25Lite
from k25lite.training.joint import model_config
from k25lite.training.loop import Recipe, train
from k25lite.training.objective import token_log_probs
from k25lite.training.rollout import MAX_WRITTEN, Prompt, program_of, roll_out
from k25lite.training.sandbox import Sandbox
from k25lite.training.schedules import LearningRate
from k25lite.training.sft import tool_tokenizer
from k25lite.training.tasks import as_code, make_task
from k25lite.vision import pack
from k25lite.world.streams import make_rows

KINDS = ("what", "beside", "count like")


@pytest.fixture(scope="module")
def words():
    return tool_tokenizer()


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def tasks():
    random = Random(0)
    return [make_task(kind, random, False) for kind in KINDS for _ in range(2)]


@pytest.fixture(scope="module")
def model(words, tasks):
    """One that knows the demonstrations of these tasks by heart, told and shown."""
    torch.manual_seed(0)
    model = K25Lite(model_config(hidden_size=64, intermediate_size=128))
    model.resize_token_embeddings(len(words))
    random = Random(1)
    documents = (random.choice(tasks).document(random, random.random() < 0.5) for _ in iter(int, 1))
    rows = make_rows(documents, 400, 64, words)
    steps = [[("text", index) for index in range(start, start + 8)] for start in range(0, 400, 8)]
    train(model, steps, {"text": rows}, Recipe(LearningRate(5e-3)), progress=False)
    return model.eval()


def prompts_of(tasks, shown):
    random = Random(2)
    return [Prompt(task.question, task.content, task.draw(random)[0] if shown else None) for task in tasks]


def test_a_model_that_knows_its_demonstrations_works_with_programs(model, words, sandbox, tasks):
    rollouts = roll_out(model, words, prompts_of(tasks, False), sandbox)
    right = [rollout.answer == task.answer for rollout, task in zip(rollouts, tasks, strict=True)]
    assert sum(right) >= len(tasks) - 1
    for rollout, task in zip(rollouts, tasks, strict=True):
        if rollout.answer == task.answer:
            assert len(rollout.acts) == len(task.programs) + 1
            assert [seen.text for seen in rollout.observations] == list(task.observations)


def test_programs_run_on_the_pixels_that_are_given(model, words, sandbox, tasks):
    """What the first program gives is what it gives on that very picture, whatever the words would have told."""
    prompts = prompts_of(tasks, True)
    ran = 0
    for prompt, rollout in zip(prompts, roll_out(model, words, prompts, sandbox), strict=True):
        if rollout.observations:
            program = as_code(program_of(rollout.acts[0]))
            other = Prompt(prompt.question, ("none",) * 4, prompt.picture)  # told contents are not looked at
            assert rollout.observations == roll_out(model, words, [other], sandbox)[0].observations
            assert sandbox.run([(program, prompt.picture)]) == rollout.observations[:1]
            ran += 1
    assert ran >= len(prompts) // 2


@pytest.mark.parametrize("shown", [False, True])
def test_recorded_log_probabilities_are_those_of_one_pass_over_the_whole(model, words, sandbox, tasks, shown):
    prompts = prompts_of(tasks, shown)
    generator = torch.Generator().manual_seed(3)
    rollouts = roll_out(model, words, prompts, sandbox, samples=3, temperature=1.3, generator=generator)
    assert len(rollouts) == 3 * len(prompts)
    for index, rollout in enumerate(rollouts):
        ids = torch.tensor([rollout.ids])
        vision = {}
        if shown:
            pixel_values, grid_thw = pack([prompts[index // 3].picture[None]], model.vision_tower.config)
            vision = {"pixel_values": pixel_values, "grid_thw": grid_thw}
        with torch.no_grad():
            logits = model(ids, **vision).logits / 1.3
            logits[..., model.config.media_token_id] = -torch.inf
            whole = token_log_probs(logits, ids)[0]
        written = torch.tensor(rollout.written)
        assert len(rollout.ids) == len(rollout.written) == len(rollout.log_probs)
        assert written.any()
        torch.testing.assert_close(whole[written], torch.tensor(rollout.log_probs)[written], atol=2e-4, rtol=1e-4)
        assert not torch.tensor(rollout.log_probs)[~written].any()


@pytest.mark.parametrize("shown", [False, True])
def test_a_batch_gives_what_one_by_one_gives(model, words, sandbox, tasks, shown):
    prompts = prompts_of(tasks, shown)
    together = roll_out(model, words, prompts, sandbox)
    alone = [roll_out(model, words, [prompt], sandbox)[0] for prompt in prompts]
    assert [rollout.ids for rollout in together] == [rollout.ids for rollout in alone]
    assert [rollout.written for rollout in together] == [rollout.written for rollout in alone]


def test_observations_and_prompts_are_not_the_models_words(model, words, sandbox, tasks):
    for rollout, task in zip(roll_out(model, words, prompts_of(tasks, False), sandbox), tasks, strict=True):
        prompt = words(f"img = {task.told} {task.question}")["input_ids"]
        assert rollout.ids[: len(prompt)] == prompt
        assert not any(rollout.written[: len(prompt)])
        said = words.decode([i for i, mine in zip(rollout.ids, rollout.written, strict=True) if mine])
        assert "sees" not in said.split()
        assert said.replace(" ", "") == "".join(f"{act} ." for act in rollout.acts).replace(" ", "")


def test_a_model_that_knows_nothing_comes_to_an_end(words, sandbox, tasks):
    """And writes no place of a picture, which no picture would fill."""
    torch.manual_seed(1)
    model = K25Lite(model_config(hidden_size=64, intermediate_size=128))
    model.resize_token_embeddings(len(words))
    generator = torch.Generator().manual_seed(0)
    prompts = prompts_of(tasks, False)
    for rollout in roll_out(model, words, prompts, sandbox, samples=8, temperature=3.0, generator=generator):
        assert rollout.length <= 3 * MAX_WRITTEN
        assert rollout.is_whole or rollout.answer == ""
        assert model.config.media_token_id not in rollout.ids


@pytest.mark.parametrize(
    ("act", "program"),
    [
        ("run 1 + 1", "1 + 1"),
        ("<think> how many </think> run count ( img , ' red ' )", "count ( img , ' red ' )"),
        ("red", None),
        ("", None),
        ("run", ""),
        ("running 2", None),
    ],
)
def test_what_an_act_asks_to_run(act, program):
    assert program_of(act) == program
