"""Reinforcement learning: what is learnt from, what each step does to the weights, and that a kill changes nothing."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import replace
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st

from k25lite.model import K25Lite
from k25lite.training import rl
from k25lite.training.examination import examine
from k25lite.training.joint import model_config
from k25lite.training.loop import Recipe, make_optimiser, train
from k25lite.training.objective import advantages
from k25lite.training.rewards import box_f1
from k25lite.training.rl import Batch, Question, RLRecipe, make_pool, reinforce, reward, update
from k25lite.training.rollout import MAX_TURNS, MAX_WRITTEN, Prompt, Rollout, roll_out
from k25lite.training.sandbox import Sandbox
from k25lite.training.schedules import LearningRate
from k25lite.training.sft import tool_tokenizer
from k25lite.training.tasks import ABILITIES, KINDS, Task, as_code, make_task, run_all
from k25lite.vision import pack
from k25lite.world.families import is_held_out
from k25lite.world.streams import make_rows

FEW = {"recognise": ("what",), "count": ("count colour",)}  # what the model of these tests half knows
ALL = [kind for kinds in ABILITIES.values() for kind in kinds]
SECONDS = ["rollout_s", "reward_s", "update_s"]


@pytest.fixture(scope="module")
def words():
    return tool_tokenizer()


@pytest.fixture(scope="module")
def known(words):
    """A model that works with programs, and is right about a third of the time."""
    torch.manual_seed(0)
    model = K25Lite(model_config(hidden_size=64, intermediate_size=128))
    model.resize_token_embeddings(len(words))
    random = Random(1)
    kinds = [kind for few in FEW.values() for kind in few]
    documents = (
        make_task(random.choice(kinds), random, False).document(random, random.random() < 0.5) for _ in iter(int, 1)
    )
    rows = make_rows(documents, 400, 64, words)
    steps = [[("text", index) for index in range(start, start + 8)] for start in range(0, 400, 8)]
    train(model, steps, {"text": rows}, Recipe(LearningRate(5e-3)), progress=False)
    return model.eval()


@pytest.fixture
def model(known):
    return copy.deepcopy(known)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def few_kinds(monkeypatch, sandbox):
    """Trainings on what the model half knows, in one sandbox, because each takes seconds to start."""
    monkeypatch.setattr(rl, "ABILITIES", FEW)
    monkeypatch.setattr(rl, "Sandbox", lambda: nullcontext(sandbox))


def tiny(**changes):
    """A recipe for `few_kinds`."""
    return RLRecipe(**{"steps": 2, "prompts": 4, "samples": 4, "pool": 4, "shown": 0.5} | changes)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def timeless(history):
    return history.log.drop(columns=SECONDS)


# Batches


def rollout_of(ids, written):
    return Rollout(list(ids), [bool(w) for w in written], [-0.5 * w for w in written])


# Three prompts, two rollouts each; 2 + 1, 1 + 3 and 2 + 2 tokens were written.
WRITTEN = [[0, 1, 1], [0, 1], [0, 1], [0, 1, 1, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1]]
BY_HAND = [rollout_of(range(10 * i, 10 * i + len(row)), row) for i, row in enumerate(WRITTEN, start=1)]
PICTURE = np.zeros((32, 32, 3), np.uint8)
PROMPTS = [Prompt("a ?", "A", PICTURE), Prompt("b ?", "B", PICTURE + 1), Prompt("c ?", "C")]


def test_a_group_whose_advantages_are_all_zero_is_left_out():
    batch = Batch.of(PROMPTS, BY_HAND, torch.tensor([[0.5, -0.5], [0.0, 0.0], [-1.0, 1.0]]), pad=0)
    assert batch.input_ids.tolist() == [[10, 11, 12, 0], [20, 21, 0, 0], [50, 51, 52, 53], [60, 61, 62, 63]]
    f, t = False, True
    assert batch.written.tolist() == [[f, t, t, f], [f, t, f, f], [f, f, t, t], [f, t, f, t]]
    assert batch.old_log_probs.tolist() == [[0, -0.5, -0.5, 0], [0, -0.5, 0, 0], [0, 0, -0.5, -0.5], [0, -0.5, 0, -0.5]]
    assert batch.advantages.tolist() == [0.5, -0.5, -1, 1]
    assert batch.pictures[0] is PICTURE
    assert batch.pictures[1:] == [None]
    assert batch.share == 7 / 11, "2 + 1 + 2 + 2 of 2 + 1 + 1 + 3 + 2 + 2 written tokens"


def test_groups_that_agree_are_kept_if_asked_for():
    gains = torch.tensor([[0.5, -0.5], [0.0, 0.0], [0.0, 0.0]])
    batch = Batch.of(PROMPTS, BY_HAND, gains, 0, all_of_them=True)
    assert batch.input_ids.shape == (6, 5)
    assert batch.advantages.tolist() == [0.5, -0.5, 0, 0, 0, 0]
    assert [picture if picture is None else picture.max() for picture in batch.pictures] == [0, 1, None]
    assert batch.share == 1
    assert Batch.of(PROMPTS, BY_HAND, gains, 0).share == 3 / 11


def test_there_is_no_batch_if_every_group_agrees():
    assert Batch.of(PROMPTS, BY_HAND, torch.zeros(3, 2), 0) is None


SAMPLES = 3
GAINS = torch.tensor([[1.0, -0.5, -0.5], [0, 0, 0], [0.5, 0.5, -1.0], [0.25, -0.5, 0.25], [0, 0, 0], [-1.0, 0.0, 1.0]])


@pytest.fixture(scope="module")
def rolled(known, words, sandbox):
    """Prompts, told and shown, about pictures of two sizes, and what was written about each at temperature 1."""
    random = Random(2)
    prompts = []
    for kind, shown in (("what", 1), ("what", 0), ("read", 1), ("count colour", 0), ("box", 1), ("count colour", 1)):
        task = make_task(kind, random, False)
        prompts.append(Prompt(task.question, task.content, task.draw(random)[0] if shown else None))
    generator = torch.Generator().manual_seed(3)
    with Sandbox() as sandbox:
        return prompts, roll_out(known, words, prompts, sandbox, samples=SAMPLES, temperature=1.0, generator=generator)


def alone(model, prompt, rollout, temperature=1.0):
    """Log-probabilities of one rollout's tokens, [length], by a forward over nothing but it."""
    ids = torch.tensor([rollout.ids])
    vision = {}
    if prompt.picture is not None:
        pixel_values, grid_thw = pack([prompt.picture[None]], model.vision_tower.config)
        vision = {"pixel_values": pixel_values, "grid_thw": grid_thw}
    logits = model(ids, **vision).logits[0, :-1] / temperature
    logits = logits.index_fill(1, torch.tensor([model.config.media_token_id]), -math.inf)
    return F.pad(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0], (1, 0))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("gains", [GAINS, GAINS[[1, 0, 2, 3, 5, 4]]], ids=["first is shown", "first is told"])
def test_log_probabilities_of_a_batch_are_those_of_each_rollout_with_its_own_picture(model, rolled, temperature, gains):
    prompts, rollouts = rolled
    assert len({prompt.picture.shape for prompt in prompts if prompt.picture is not None}) == 2
    batch = Batch.of(prompts, rollouts, gains, 0)
    kept = [index for index in range(len(rollouts)) if gains[index // SAMPLES].any()]
    assert 0 < len(kept) < len(rollouts)
    with torch.no_grad():
        together = batch.log_probs(model, temperature)
        for row, index in zip(together, kept, strict=True):
            expected = alone(model, prompts[index // SAMPLES], rollouts[index], temperature)
            torch.testing.assert_close(row[: len(expected)], expected, atol=2e-4, rtol=1e-4)


def test_log_probabilities_of_what_the_model_sampled_are_those_that_were_recorded(model, rolled):
    batch = Batch.of(*rolled, GAINS, 0, all_of_them=True)
    with torch.no_grad():
        found = batch.log_probs(model)
    torch.testing.assert_close(found[batch.written], batch.old_log_probs[batch.written], atol=2e-4, rtol=1e-4)
    assert (batch.old_log_probs[batch.written] < -0.01).any(), "not everything was certain"


def test_what_a_program_prints_is_never_taken_for_the_place_of_a_picture(model, words, sandbox):
    """A program of 33 tokens prints "<media>", out of pieces of other words; it must not end the training."""
    program = as_code("' < ' + ' medo ' [ : 3 ] + ' img ' [ : 1 ] + ' abs ' [ : 1 ] + ' > '")
    printed = sandbox.run([(program, None)])
    assert printed[0].text == "<media>"

    class Prints:
        def run(self, programs):
            return printed * len(programs)

    task = make_task("what", Random(0), False)
    prompts = [Prompt(task.question, task.content)]
    rollouts = roll_out(model, words, prompts, Prints(), samples=2)
    assert rollouts[0].observations, "the model runs programs"
    assert Batch.of(prompts, rollouts, torch.tensor([[1.0, -1.0]]), 0).log_probs(model).shape[0] == 2


# Updates

LOOSE = Recipe(LearningRate(1e-3), clip=1e9)  # leaves the gradient as it is


def gradients(model, batch, recipe):
    """What an update leaves in the parameters, by an optimiser that leaves those alone, and its figures."""
    figures = update(Accelerator(), model, torch.optim.SGD(model.parameters(), lr=0.0), batch, recipe)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, figures


def close(found, expected):
    """Whether gradients are equal up to what float32 loses in a sum over a few hundred tokens."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    return True


def test_on_policy_the_gradient_is_the_policy_gradient_with_or_without_the_groups_that_agree(model, rolled):
    """The oracle: −Σ advantage · ∇ log p over the number of written tokens, one rollout at a time."""
    prompts, rollouts = rolled
    model.zero_grad()
    written = sum(rollout.length for rollout in rollouts)
    for index, rollout in enumerate(rollouts):
        log_probs = alone(model, prompts[index // SAMPLES], rollout)[torch.tensor(rollout.written)]
        (-GAINS.flatten()[index] * log_probs.sum() / written).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    assert norm > 0.05, "tolerances would hide a smaller one"
    recipe = RLRecipe(update=LOOSE)
    for all_of_them in (False, True):
        found, figures = gradients(model, Batch.of(prompts, rollouts, GAINS, 0, all_of_them), recipe)
        assert close(found, expected)
        assert figures["gradient_norm"] == pytest.approx(norm, rel=1e-3)
        assert figures["masked"] == 0
        assert abs(figures["kl_k1"]) < 1e-4
        assert figures["squared_log_ratio"] < 1e-6


def test_a_step_does_not_depend_on_whether_groups_that_agree_are_left_out(known, rolled):
    """The whole step, by the optimiser of the runs, from the same weights."""
    after = []
    for all_of_them in (False, True):
        model = copy.deepcopy(known)
        recipe = RLRecipe(update=replace(LOOSE, optimiser="adamw"))
        batch = Batch.of(*rolled, GAINS, 0, all_of_them)
        update(Accelerator(), model, make_optimiser(model, recipe.update), batch, recipe)
        after.append(weights(model) - weights(known))
    moved = after[0].norm()
    assert moved > 0
    # AdamW's first step is the sign of the gradient, rounding errors of parameters without one included.
    assert (after[0] - after[1]).norm() < 0.05 * moved


def test_without_a_batch_nothing_moves_not_even_by_momentum(model, rolled):
    recipe = RLRecipe()
    optimiser = make_optimiser(model, recipe.update)
    figures = update(Accelerator(), model, optimiser, Batch.of(*rolled, GAINS, 0), recipe)
    assert figures["gradient_norm"] > 0
    before, state = weights(model), copy.deepcopy(optimiser.state_dict())
    nothing = update(Accelerator(), model, optimiser, None, recipe)
    assert nothing == dict.fromkeys(figures, 0.0), "the same columns"
    assert torch.equal(weights(model), before)
    for parameter, moments in optimiser.state_dict()["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, state["state"][parameter][name])


@pytest.fixture(scope="module")
def stale(known, rolled):
    """A model that has moved away from the one that wrote the rollouts, and these as a batch."""
    model = copy.deepcopy(known)
    recipe = RLRecipe(update=Recipe(LearningRate(5e-3), trained_scale=0.3), low=-5, high=5)
    optimiser = make_optimiser(model, recipe.update)
    batch = Batch.of(*rolled, GAINS, 0, all_of_them=True)
    for _ in range(2):
        update(Accelerator(), model, optimiser, batch, recipe)
    return model, batch


LOW, HIGH = -0.1, 0.15


@pytest.mark.parametrize("clip", ["mask", "ppo", "none"])
def test_on_stale_rollouts_each_clip_silences_the_tokens_that_it_should(stale, clip):
    """The report's: what is out of bounds, whatever the sign of its advantage; PPO's: what has moved as it was pushed."""
    model, batch = copy.deepcopy(stale[0]), stale[1]
    log_probs = batch.log_probs(model)
    moved = torch.where(batch.written, log_probs - batch.old_log_probs, 0.0).detach()
    gain = batch.advantages[:, None].expand_as(moved)
    outside = (moved < LOW) | (moved > HIGH)
    pushed = ((moved > HIGH) & (gain > 0)) | ((moved < LOW) & (gain < 0))
    for over in (moved < LOW, moved > HIGH):
        for sign in (gain < 0, gain > 0):
            assert (over & sign).any(), "each of the four cases is among the tokens"
    silent = {"mask": outside, "ppo": pushed, "none": torch.zeros_like(outside)}[clip]
    weight = torch.where(batch.written & ~silent, moved.exp() * gain, 0.0)
    surrogate = -(weight * torch.where(batch.written, log_probs, 0.0)).sum() / batch.written.sum()
    model.zero_grad()
    surrogate.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    recipe = RLRecipe(clip=clip, low=LOW, high=HIGH, tau=0.0, update=LOOSE)
    found, figures = gradients(model, batch, recipe)
    assert close(found, expected)
    assert figures["masked"] == pytest.approx(float(silent.sum() / batch.written.sum()))


def test_on_stale_rollouts_the_clips_give_different_updates(stale):
    steps = []
    for clip in ("mask", "ppo", "none"):
        recipe = RLRecipe(clip=clip, low=LOW, high=HIGH, update=LOOSE)
        found, _ = gradients(copy.deepcopy(stale[0]), stale[1], recipe)
        steps.append(torch.cat([gradient.flatten() for gradient in found.values()]))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (steps[one] - steps[other]).norm() > 0.05 * steps[one].norm()


def test_the_squared_log_ratio_pulls_back_what_no_reward_pushes(stale):
    """With no advantages at all, steps against the gradient bring the model nearer to the one that wrote."""
    model, batch = copy.deepcopy(stale[0]), replace(stale[1], advantages=torch.zeros(len(stale[1].advantages)))
    recipe = RLRecipe(tau=1.0, update=replace(LOOSE, optimiser="adamw"))
    optimiser = make_optimiser(model, recipe.update)
    figures = [update(Accelerator(), model, optimiser, batch, recipe) for _ in range(6)]
    assert figures[-1]["squared_log_ratio"] < 0.7 * figures[0]["squared_log_ratio"]
    _, free = gradients(copy.deepcopy(stale[0]), batch, replace(recipe, tau=0.0))
    assert free["gradient_norm"] == 0


# Whole trainings


def test_rollouts_are_written_in_the_precision_of_the_updates(model, words, few_kinds, monkeypatch):
    monkeypatch.setattr(rl, "precision", lambda: "bf16")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # else the precision of the process's first training
    seen, encode = [], K25Lite.encode_vision
    watched = lambda self, *pixels: seen.append(torch.is_autocast_enabled("cpu")) or encode(self, *pixels)  # noqa: E731
    monkeypatch.setattr(K25Lite, "encode_vision", watched)
    reinforce(model, words, tiny(steps=1, shown=1.0), 0, progress=False)
    assert len(seen) >= 1
    assert all(seen)


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(known, words, few_kinds):
    runs = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(known)
        runs.append((timeless(reinforce(model, words, tiny(), seed, progress=False)), weights(model)))
    (log, end), (again, same_end), (other, other_end) = runs
    pd.testing.assert_frame_equal(log, again, check_exact=True)
    assert torch.equal(end, same_end)
    assert not log.equals(other)
    assert not torch.equal(end, other_end)


def test_every_figure_of_the_log_is_within_its_range(model, words, few_kinds):
    recipe = tiny(steps=3, reuse=2, toggle=(1, 0.0, 50.0), hedging=True)
    log = reinforce(model, words, recipe, 0, progress=False).log
    assert list(log.step) == [0, 1, 2]
    assert np.isfinite(log.to_numpy(float)).all()
    for share in ("reward", "accuracy", "programs", "masked"):
        assert log[share].between(0, 1).all(), share
    assert (log.reward >= log.accuracy - 1e-6).all(), "counts are paid by closeness, what is right in full"
    assert log.length.between(1, MAX_TURNS * MAX_WRITTEN).all()
    rollouts = recipe.prompts * recipe.samples
    assert (log.tokens == (log.length * rollouts).round()).all()
    assert (log.entropy >= 0).all()
    assert (log.programs > 0.5).all(), "the model has been shown to run programs"
    # The second update on each batch is off-policy; k3 and squares are sums of what is never negative.
    assert (log[["kl_k3", "squared_log_ratio", "gradient_norm"]] > 0).all(axis=None)
    assert (log.flops > 0).all()
    assert (log[SECONDS] >= 0).all(axis=None)


def test_it_learns_what_is_rewarded_and_not_from_rewards_without_meaning(known, words, few_kinds, monkeypatch):
    monkeypatch.setattr(rl, "ABILITIES", {"recognise": ("what",)})
    recipe = RLRecipe(steps=20, prompts=4, samples=16, pool=4, shown=0.0, update=Recipe(LearningRate(3e-3)))
    dice = Random(0)
    rises = []
    for pay in (rl.reward, lambda *_: float(dice.random() < 0.3)):  # earned; or as many, given to anyone
        monkeypatch.setattr(rl, "reward", pay)
        accuracy = reinforce(copy.deepcopy(known), words, recipe, 0, progress=False).log.accuracy
        rises.append(accuracy.iloc[-3:].mean() - accuracy.iloc[:2].mean())
    earned, given = rises
    assert earned > 0.15
    assert earned > given + 0.15


def test_only_rollouts_that_are_used_again_are_all_learnt_from_and_no_step_throws_the_dice_of_another(
    known, words, few_kinds, monkeypatch
):
    """Rewards that depend on the question alone, but for one group."""
    batches, dice = [], []
    real_update, real_roll_out = rl.update, rl.roll_out

    def watched_update(accelerator, model, optimiser, batch, recipe):
        batches.append(batch)
        return real_update(accelerator, model, optimiser, batch, recipe)

    def watched_roll_out(*arguments, generator, **options):
        dice.append(generator.initial_seed())
        return real_roll_out(*arguments, generator=generator, **options)

    def judge(questions, rollouts, recipe):
        earned = torch.zeros(len(questions), recipe.samples)
        earned[2, 0] = 1
        return earned, earned.bool()

    monkeypatch.setattr(rl, "update", watched_update)
    monkeypatch.setattr(rl, "roll_out", watched_roll_out)
    monkeypatch.setattr(rl, "_judge", judge)
    for reuse, rows in ((1, 4), (2, 16)):
        batches.clear()
        reinforce(copy.deepcopy(known), words, tiny(reuse=reuse), 0, progress=False)
        assert [len(batch.input_ids) for batch in batches] == [rows] * 2 * reuse
        assert all(batches[step * reuse] is batches[(step + 1) * reuse - 1] for step in range(2))
    reinforce(copy.deepcopy(known), words, tiny(), 1, progress=False)
    assert dice[:2] == dice[2:4], "they follow from seed and step"
    assert len(set(dice)) == 4


@pytest.mark.parametrize("reuse", [1, 2])
def test_nothing_moves_while_every_group_agrees(model, words, few_kinds, monkeypatch, reuse):
    """Muon would scale the rounding error of rollouts, read again in another order, up to a whole step."""
    monkeypatch.setattr(rl, "reward", lambda *_: 1.0)
    before = weights(model)
    log = reinforce(model, words, tiny(reuse=reuse), 0, progress=False).log
    assert (log.reward == 1).all()
    assert (log.gradient_norm == 0).all()
    assert torch.equal(weights(model), before)


def test_it_is_evaluated_before_the_steps_asked_for_and_after_the_last(model, words, few_kinds):
    seen = []

    def evaluate(model):
        seen.append(weights(model))
        return pd.DataFrame([{"kind": "what", "correct": len(seen)}, {"kind": "read", "correct": 0}])

    before = weights(model)
    history = reinforce(model, words, tiny(), 0, evaluate=evaluate, evaluate_at=(0, 2), progress=False)
    assert history.scores.step.tolist() == [0, 0, 2, 2]
    assert history.scores.correct.tolist() == [1, 0, 2, 0]
    assert torch.equal(seen[0], before)
    assert torch.equal(seen[1], weights(model))


def test_evaluating_changes_nothing_of_the_training(known, words, few_kinds, sandbox):
    ends = []
    for evaluate_at in ((), (0, 1)):
        model = copy.deepcopy(known)

        def evaluate(model):
            return examine(model, words, sandbox, kinds=("what",), count=2)

        reinforce(model, words, tiny(), 0, evaluate=evaluate, evaluate_at=evaluate_at, progress=False)
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_budgets_change_what_is_learnt_and_not_what_the_log_calls_reward(known, words, few_kinds):
    """With a percentile of 0 every right answer but the shortest earns nothing; the log still says what it was worth."""
    runs = []
    for toggle in (None, (1, 0.0, 0.0)):
        model = copy.deepcopy(known)
        runs.append((reinforce(model, words, tiny(steps=1, toggle=toggle), 0, progress=False).log, weights(model)))
    (plain, end), (toggled, other_end) = runs
    told = ["reward", "accuracy", "length", "programs", "entropy", "tokens"]
    pd.testing.assert_frame_equal(plain[told], toggled[told], check_exact=True)
    assert not torch.equal(end, other_end)


# Checkpoints

SCRIPT = """
import sys, time
from pathlib import Path
import pandas as pd
import torch
from k25lite.model import K25Lite
from k25lite.training import rl
from k25lite.training.loop import Recipe
from k25lite.training.schedules import LearningRate
from k25lite.training.sft import tool_tokenizer

start, slow = Path(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(1)
rl.ABILITIES = {"recognise": ("what",), "count": ("count colour",)}
# Phases of two steps, with budgets in steps 0, 1, 4 and 5: those that bind in step 4 were found before.
recipe = rl.RLRecipe(steps=6, prompts=4, samples=4, pool=4, shown=0.5, toggle=(2, 0.0, 0.0),
                     update=Recipe(LearningRate(3e-3), trained_scale=0.3))

def evaluate(model):
    time.sleep(slow)
    print("step", flush=True)
    return pd.DataFrame([{"kind": "none", "correct": 0}])

for out in map(Path, sys.argv[3:]):
    model = K25Lite.from_pretrained(start)
    history = rl.reinforce(model, tool_tokenizer(), recipe, 0, evaluate=evaluate, evaluate_at=range(7),
                           checkpoints=out / "checkpoints", checkpoint_every=2, progress=False)
    history.save(out)
    torch.save(torch.cat([p.detach().flatten() for p in model.parameters()]), out / "weights.pt")
"""


def test_killed_and_resumed_is_the_same_to_the_bit_and_budgets_are_remembered(known, tmp_path):
    """Kill -9 somewhere after the evaluation before step 4: the second process goes on from the last checkpoint.

    The same process then trains from the start, in another folder.
    """
    script, start, cut, whole = (tmp_path / name for name in ("script.py", "model", "cut", "whole"))
    script.write_text(textwrap.dedent(SCRIPT))
    known.save_pretrained(start)
    cut.mkdir()
    whole.mkdir()
    process = subprocess.Popen([sys.executable, script, start, "0.2", cut], stdout=subprocess.PIPE, text=True)
    for _ in range(5):
        process.stdout.readline()
    time.sleep(0.3 * int.from_bytes(os.urandom(1)) / 255)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "weights.pt").exists()
    saved = json.loads((cut / "checkpoints" / "last" / "progress.json").read_text())["step"]
    assert saved == 4
    again = subprocess.run([sys.executable, script, start, "0", cut, whole], check=True, capture_output=True, text=True)
    assert again.stdout.count("step") == 7 - saved + 7, "it went on, it did not begin anew"
    assert (cut / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    logs = [json.loads((folder / "log.json").read_text()) for folder in (whole, cut)]
    assert [row["step"] for row in logs[0]] == list(range(6))
    assert any(row["accuracy"] > 0 for row in logs[0][:4]), "else there are no budgets"
    for row in logs[0] + logs[1]:
        for name in SECONDS:
            del row[name]
    assert logs[0] == logs[1]
    assert torch.equal(torch.load(cut / "weights.pt"), torch.load(whole / "weights.pt"))


def test_a_resumed_log_has_the_types_of_one_that_never_stopped(known, words, few_kinds, tmp_path):
    logs = []
    for _ in range(2):  # the second one goes on from step 1
        options = {"checkpoints": tmp_path, "checkpoint_every": 1, "progress": False}
        logs.append(timeless(reinforce(copy.deepcopy(known), words, tiny(), 0, **options)))
    pd.testing.assert_frame_equal(*logs, check_exact=True)


def test_a_checkpoint_of_another_training_is_refused(known, words, few_kinds, tmp_path):
    options = {"checkpoints": tmp_path, "checkpoint_every": 1, "progress": False}
    reinforce(copy.deepcopy(known), words, tiny(), 0, **options)
    assert (tmp_path / "last").exists()
    for recipe, seed in ((tiny(clip="ppo"), 0), (tiny(toggle=(1, 0.5, 50.0)), 0), (tiny(), 1)):
        with pytest.raises(ValueError, match="another model, plan, data or recipe"):
            reinforce(copy.deepcopy(known), words, recipe, seed, **options)
    other = copy.deepcopy(known)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="another model, plan, data or recipe"):
        reinforce(other, words, tiny(), 0, **options)


# Questions


def keys(questions):
    return [question.key for question in questions]


@pytest.fixture(scope="module")
def pool():
    return make_pool(RLRecipe(pool=60, shown=0.5), 0)


def test_no_content_of_the_pool_is_held_out_for_tests(pool):
    contents = [question.task.content for questions in pool.values() for question in questions]
    assert not any(is_held_out(content if isinstance(content, str) else str(list(content))) for content in contents)
    # Among as many contents of any kind there would be some.
    random = Random(0)
    anything = [f"{random.choice(contents)} {index}" for index in range(len(contents))]
    assert sum(map(is_held_out, anything)) > 10


def test_the_pool_has_equally_many_questions_of_each_ability_and_all_of_its_kinds(pool):
    assert list(pool) == list(ABILITIES)
    for ability, questions in pool.items():
        assert len(questions) == 60
        assert {question.task.kind for question in questions} == set(ABILITIES[ability])
    everything = [question for questions in pool.values() for question in questions]
    assert len(set(keys(everything))) == len(everything), "budgets are kept by key"


@pytest.mark.parametrize(("share", "fewest", "most"), [(0.0, 0, 0), (1.0, 360, 360), (0.5, 140, 220)])
def test_the_share_that_is_shown_is_the_one_asked_for(share, fewest, most):
    """Of 360; four standard deviations around the half are 38."""
    pool = make_pool(RLRecipe(pool=60, shown=share), 1)
    shown = [question.prompt.picture is not None for questions in pool.values() for question in questions]
    assert fewest <= sum(shown) <= most


def test_the_truth_of_what_is_shown_is_that_of_the_pixels_and_of_what_is_told_that_of_the_words(pool):
    """The oracle: the tools themselves, on what the prompt holds. What is told of a box is the cell it is in."""
    boxes = {False: 0, True: 0}
    for questions in pool.values():
        for question in questions:
            picture = question.prompt.picture
            answer = run_all(question.task.programs, question.task.content if picture is None else picture)[-1]
            if question.task.kind != "box":
                assert answer == question.truth == question.task.answer
                continue
            boxes[picture is not None] += 1
            truth = [int(side) for side in question.truth.split(" , ")]
            if picture is None:
                assert answer == question.truth == question.task.answer
                assert (truth[2] - truth[0], truth[3] - truth[1]) == (16, 16)
            else:
                assert question.truth != question.task.answer
                assert box_f1(answer, [truth]) > 0.7
                assert reward(question, answer) > reward(question, question.task.answer)
    assert min(boxes.values()) > 10


def test_the_pool_follows_from_its_seed(pool):
    again, other = (make_pool(RLRecipe(pool=60, shown=0.5), seed) for seed in (0, 1))
    for ability, questions in pool.items():
        for one, two in zip(questions, again[ability], strict=True):
            assert (one.key, one.task, one.truth) == (two.key, two.task, two.truth)
            assert np.array_equal(one.prompt.picture, two.prompt.picture)
        assert [question.task for question in questions] != [question.task for question in other[ability]]


@pytest.mark.parametrize("each", [1, 2, 5])
def test_each_question_comes_once_before_any_of_its_ability_comes_again(each):
    recipe = RLRecipe(prompts=each * len(ABILITIES), pool=5)
    pool = make_pool(recipe, 0)
    orders = {ability: [] for ability in pool}
    for step in range(20):
        questions = rl._questions(pool, recipe, 0, step)
        assert len(questions) == recipe.prompts
        for ability, mine in orders.items():
            now = [key for key in keys(questions) if key in keys(pool[ability])]
            assert len(now) == each
            mine += now
    for ability, order in orders.items():
        passes = [tuple(order[start : start + 5]) for start in range(0, len(order), 5)]
        assert all(set(one) == set(keys(pool[ability])) for one in passes)
        assert len(set(passes)) > 1, "shuffled anew each time"


def test_the_questions_of_a_step_follow_from_seed_and_step(pool):
    recipe = RLRecipe(pool=60)
    assert keys(rl._questions(pool, recipe, 0, 3)) == keys(rl._questions(pool, recipe, 0, 3))
    assert keys(rl._questions(pool, recipe, 0, 3)) != keys(rl._questions(pool, recipe, 0, 4))
    assert keys(rl._questions(pool, recipe, 0, 3)) != keys(rl._questions(pool, recipe, 1, 3))


# Rewards

BOARD = ("red-disc", "none", "blue-ring", "none")


def question(kind, truth):
    task = Task(kind, truth if kind == "read" else BOARD, "what ?", (), (truth,))
    return Question("x", task, Prompt("what ?", task.content), truth)


@pytest.mark.parametrize(
    ("kind", "truth", "answer", "paid"),
    [
        ("count colour", "3", "3", 1),
        ("count shape", "3", "2", 0),
        ("count both", "0", "0", 1),
        ("count like", "3", "3 4", 0),
        ("box", "0 , 0 , 12 , 12", "0 , 0 , 12 , 12", 1),
        ("box", "0 , 0 , 12 , 12", "6 , 0 , 18 , 12", 1 / 3),  # 72 of 216 pixels are shared
        ("box", "0 , 0 , 12 , 12", "0 , 0 , 12 , 12 , 20 , 20 , 30 , 30", 2 / 3),  # one of two right: P 1/2, R 1
        ("box", "0 , 0 , 12 , 12", "12 , 12 , 0 , 0", 0),
        ("box", "0 , 0 , 12 , 12", "0 , 0 , 12", 0),
        ("read", "K7QZ", "K7QZ", 1),
        ("read", "K7QZ", "K7QA", 0.75),
        ("read", "K7QZ", "K7", 0.5),
        ("read", "K7QZ", "K7QZK7QZ", 0.5),
        ("what", "red-disc", "red-disc", 1),
        ("what", "red-disc", " red-disc ", 1),
        ("what", "red-disc", "red", 0),
        ("what", "none", "none", 1),
        ("compare colours", "same", "red", 0),
        ("where thing", "top-left", "top-left", 1),
        ("where colour", "top-left", "top-right", 0),
    ],
)
def test_each_kind_pays_as_worked_out_by_hand(kind, truth, answer, paid):
    assert reward(question(kind, truth), answer) == pytest.approx(paid)


@pytest.mark.parametrize("kind", ABILITIES["count"])
@pytest.mark.parametrize(
    ("truth", "answer", "paid"), [("3", "3", 1), ("3", "2", 2 / 3), ("4", "2", 0.5), ("1", "4", 0), ("0", "1", 0)]
)
def test_hedging_pays_counts_and_only_counts_by_their_closeness(kind, truth, answer, paid):
    assert reward(question(kind, truth), answer, hedging=True) == pytest.approx(paid)
    assert reward(question(kind, truth), answer) == (answer == truth)
    assert reward(question("what", "red-disc"), "red-ring", hedging=True) == 0


TRUTHS = {"box": "0 , 0 , 12 , 12", "read": "K7QZ"} | dict.fromkeys(ABILITIES["count"], "2")
MALFORMED = {
    "nothing": "",
    "None": None,
    "the word none": "None",
    "nan": "nan nan nan nan",
    "inf": "inf , -inf , inf , 1e999",
    "1000 boxes": " , ".join(["0 , 0 , 12 , 12"] * 1000),
    "a megabyte of words": "red-disc " * 120_000,
    "a megabyte of digits": "9" * 2**20,
    "a megabyte of letters": "K7QZ" * 2**18,
    "unicode": "٣ ３ ² \x00 \ud800",
}


@pytest.mark.parametrize("kind", ["count colour", "box", "read", "what", "where colour"])
@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED)
def test_no_malformed_answer_raises_or_is_paid_for_the_truth(kind, answer):
    for hedging in (False, True):
        paid = reward(question(kind, TRUTHS.get(kind, "same")), answer, hedging)
        assert isinstance(paid, float)
        assert 0 <= paid < 0.01, "1000 boxes: 2/1001"


@settings(max_examples=100)
@given(st.sampled_from(ALL), st.text() | st.text("0123456789 ,.-einfa"), st.booleans())
def test_any_answer_earns_between_0_and_1(kind, answer, hedging):
    assert 0 <= reward(question(kind, TRUTHS.get(kind, "same")), answer, hedging) <= 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in ALL])
def test_the_truth_is_paid_in_full(kind):
    for seed in range(5):
        task = make_task(kind, Random(seed), False)
        _, truth = task.draw(Random(seed))
        for hedging in (False, True):
            assert reward(Question("x", task, Prompt(task.question, task.content), truth), truth, hedging) == 1


def test_rewards_and_right_answers_stand_in_the_rows_of_their_prompts():
    questions = [question("count colour", "3"), question("read", "K7QZ")]
    rollouts = [Rollout([], [], [], [answer]) for answer in ("3", "2", "K7", "K7QZ")]
    earned, right = rl._judge(questions, rollouts, RLRecipe(samples=2))
    assert earned.tolist() == [[1, 0], [0.5, 1]]
    assert right.tolist() == [[True, False], [False, True]]
    assert advantages(earned).tolist() == [[0.5, -0.5], [-0.25, 0.25]]
    earned, right = rl._judge(questions, rollouts, RLRecipe(samples=2, hedging=True))
    assert earned.tolist() == [[1, pytest.approx(2 / 3)], [0.5, 1]]
    assert right.tolist() == [[True, False], [False, True]], "closeness is paid for, it is not right"


# Recipes


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"reuse": 0},
        {"samples": 1},
        {"prompts": 0},
        {"prompts": -6},
        {"prompts": 7},
        {"pool": 5},
        {"shown": -0.1},
        {"shown": 1.1},
        {"shown": math.nan},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"clip": "pro"},
        {"low": 0.1},
        {"high": -0.1},
        {"tau": -1.0},
        {"tau": math.nan},
    ],
)
def test_what_is_out_of_range_is_refused_and_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} = {re.escape(repr(value))}"):
        RLRecipe(**wrong)


def test_budgets_out_of_range_are_refused_before_the_first_step(model, words, few_kinds):
    before = weights(model)
    with pytest.raises(ValueError, match="period from 1"):
        reinforce(model, words, tiny(toggle=(0, 0.5, 50.0)), 0, progress=False)
    assert torch.equal(weights(model), before)
