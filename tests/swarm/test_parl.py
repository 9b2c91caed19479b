"""PARL: what the orchestrator reads and writes, what it earns, what it learns from, and what it does not."""

import json
import math
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from records import Rotting, Steady

from k25lite.swarm.parl import ARMS, ParlRecipe, Reward, draw_tasks, learn, log_probs, parl
from k25lite.swarm.parl_language import (
    ACTS,
    ANSWER,
    ASSIGN,
    CREATE,
    END,
    IDS,
    READ,
    SCALE,
    SEARCH,
    STEP_ACTS,
    TOKENS,
    Dialogue,
    Observation,
    closes,
    number,
    serial,
    swarm,
)
from k25lite.swarm.parl_rollout import WINDOW, Rollouts, make_orchestrator, only_acts, roll_out
from k25lite.swarm.parl_stage import ParlRun, cold_start_stage, demonstrate, evaluate, imitate, parl_stage
from k25lite.swarm.simulator import Budget, Outcome, Simulator, WideSearch
from k25lite.training.loop import make_optimiser
from k25lite.training.objective import advantages, policy_loss, token_log_probs

SECONDS = ["rollout_s", "environment_s", "update_s"]


def tiny(**changes):
    small = {"iterations": 2, "tasks": 3, "samples": 4, "names": (4, 12), "updates": 2, "demonstrations": 32}
    return ParlRecipe(**small | changes)


def simulator(budget=40):
    return Simulator(Rotting(), Rotting(limit=500), Budget(budget))


@pytest.fixture(scope="module")
def started():
    """An orchestrator that has seen a few demonstrations, half of them of a team at work."""
    recipe = tiny(demonstrations=320, serial=0.5)
    model = make_orchestrator(0)
    losses = imitate(model, demonstrate(simulator(), recipe, 0), recipe.start)
    assert sum(losses[-5:]) / 5 < 0.6 < math.log(len(ACTS)) < losses[0]
    return model


@pytest.fixture
def model(started):
    same = make_orchestrator(0)
    same.load_state_dict(started.state_dict())
    return same


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


# The language


def test_acts_are_the_beginning_of_the_vocabulary_and_every_token_is_there_once():
    assert TOKENS[: len(ACTS)] == ACTS
    assert max(Counter(TOKENS).values()) == 1


def test_observations_by_hand():
    first = Observation(more=True, left=0, team=0, steps=100)
    assert first.tokens() == ["more", "left:0", "steps:more than 64"]
    later = Observation(more=False, left=7, team=3, steps=66, done=2, failed=1)
    assert later.tokens(first) == ["left:8", "team:3", "done:2", "failed:1"]
    assert replace(later, steps=40).tokens(later) == ["left:8", "done:2", "failed:1", "steps:48"]
    assert Observation(False, 0, 3, 40).tokens(replace(later, steps=41)) == ["left:0"]


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_larger_numbers_never_read_as_smaller_ones(one, other):
    order = [number("left", value) for value in (*SCALE, 65)]
    low, high = (order.index(number("left", value)) for value in sorted((one, other)))
    assert low <= high
    assert one > 4 or SCALE[order.index(number("left", one))] == one


def test_a_dialogue_by_hand():
    observations = [Observation(True, 0, 0, 9), Observation(False, 2, 0, 8), Observation(False, 0, 1, 3, done=1)]
    dialogue = Dialogue(observations, [(SEARCH,), (CREATE, "assign:2", END), (ANSWER,)])
    words = "task more left:0 steps:12 search left:2 steps:8 create assign:2 end left:0 team:1 done:1 steps:3 answer"
    assert [TOKENS[token] for token in dialogue.ids] == words.split()
    assert [TOKENS[token] for token, act in zip(dialogue.ids, dialogue.written, strict=True) if act] == [
        SEARCH, CREATE, "assign:2", END, ANSWER,
    ]  # fmt: skip
    assert Dialogue(observations, dialogue.steps[:2]).ids == dialogue.ids[:-1]


@given(
    st.builds(Observation, st.booleans(), st.integers(0, 300), st.integers(0, 70), st.integers(1, 100)),
    st.sampled_from([serial, *(swarm(names, width) for names in ASSIGN.values() for width in (1, 4, 31))]),
)
def test_scripts_write_whole_steps_that_can_be_carried_out(observation, script):
    acts = script(observation)
    assert closes(acts)
    assert not any(closes(acts[:length]) for length in range(len(acts)))
    assert len(acts) <= STEP_ACTS
    assert sum(act in ASSIGN for act in acts) <= observation.team + acts.count(CREATE)
    assert observation.steps > 1 or acts == (ANSWER,)


@pytest.mark.parametrize(("names", "width"), [(3, 1), (0, 1), (4, 0), (4, 32)])
def test_scripts_of_a_swarm_that_cannot_be_are_refused(names, width):
    with pytest.raises(ValueError, match=f"got {names} and {width}"):
        swarm(names, width)


# Rollouts


class Watched:
    """A simulator that keeps the dialogues."""

    def __init__(self):
        self.inner, self.dialogues = simulator(), []

    def begin(self, tasks):
        observations = self.inner.begin(tasks)
        self.dialogues = [Dialogue([observation]) for observation in observations]
        return observations

    def step(self, acts):
        told = self.inner.step(acts)
        for index, observation in told.items():
            self.dialogues[index].steps.append(acts[index])
            self.dialogues[index].observations += [] if observation is None else [observation]
        return told

    def outcomes(self):
        return self.inner.outcomes()


def test_rollouts_hold_what_was_said_and_the_probabilities_of_what_was_written(model):
    """Over the cache, from which episodes leave one after another, as over whole sequences."""
    environment = Watched()
    rollouts = roll_out(model, environment, draw_tasks((4, 30), 20, 2, 1), generator=dice())
    assert len(set(rollouts.lengths.tolist())) > 5
    for row, dialogue in enumerate(environment.dialogues):
        length = int(rollouts.lengths[row])
        assert rollouts.input_ids[row, :length].tolist() == dialogue.ids[:length]
        assert rollouts.written[row, :length].tolist() == dialogue.written[:length]
        assert not rollouts.written[row, length:].any()
    now = log_probs(model, rollouts).detach()
    torch.testing.assert_close(now[rollouts.written], rollouts.log_probs[rollouts.written], atol=1e-4, rtol=1e-4)
    assert (rollouts.log_probs[~rollouts.written] == 0).all()
    assert (rollouts.input_ids[rollouts.written] < len(ACTS)).all()


def test_entropy_is_that_of_what_acts_were_drawn_from(model):
    rollouts = roll_out(model, simulator(), draw_tasks((4, 30), 4, 2, 1), generator=dice())
    logits = only_acts(model(rollouts.input_ids).logits)[:, :-1][rollouts.written[:, 1:]][:, : len(ACTS)]
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert rollouts.entropy == pytest.approx(expected.item(), abs=1e-4)


def test_the_same_dice_the_same_rollouts_and_the_model_goes_on_as_it_was(model):
    tasks = draw_tasks((4, 30), 4, 2, 1)
    model.train()
    one, same, other = (roll_out(model, simulator(), tasks, generator=dice(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.input_ids, same.input_ids)
    assert torch.equal(one.log_probs, same.log_probs)
    assert one.input_ids.shape != other.input_ids.shape or not torch.equal(one.input_ids, other.input_ids)
    assert model.training


def test_an_episode_that_outgrows_the_window_ends_without_an_answer(model):
    environment = simulator(100)
    rollouts = roll_out(model, environment, draw_tasks((70, 80), 8, 1, 1), window=12, generator=dice())
    assert rollouts.input_ids.shape[1] == 12
    ended = (rollouts.input_ids == IDS[ANSWER]).any(1).tolist()
    assert [outcome.answered for outcome in environment.outcomes()] == ended
    assert sum(ended) < 8


def test_some_of_the_episodes_are_those_episodes(model):
    rollouts = roll_out(model, simulator(), draw_tasks((4, 30), 6, 2, 1), generator=dice())
    rows = torch.tensor([3, 0])
    part = rollouts[rows]
    length = int(rollouts.lengths[rows].max())
    assert part.input_ids.shape == (2, length)
    assert torch.equal(part.input_ids, rollouts.input_ids[rows, :length])
    assert part.lengths.tolist() == rollouts.lengths[rows].tolist()


# The objective


def test_what_was_told_has_no_gradient(model):
    """Observations, and with them all that sub-agents did, are outside the loss: exactly, not nearly."""
    rollouts = roll_out(model, simulator(), draw_tasks((4, 30), 4, 4, 1), generator=dice())
    logits = model(rollouts.input_ids).logits.detach().requires_grad_()
    now = token_log_probs(only_acts(logits), rollouts.input_ids)
    gains = torch.linspace(-1, 1, len(rollouts.input_ids))
    loss, _ = policy_loss(now, rollouts.log_probs + 0.1, gains, rollouts.written, low=-1.0, high=1.0, tau=0.1)
    loss.backward()
    predicts_act = rollouts.written.roll(-1, 1)  # the logits before a token are those of the token
    predicts_act[:, -1] = False
    assert (logits.grad[~predicts_act] == 0).all()
    assert (logits.grad[predicts_act][:, : len(ACTS)].abs().sum(1) > 0).all()
    assert (logits.grad[..., len(ACTS) :] == 0).all(), "nor is the model taught not to write what others say"


def test_what_was_told_may_change_without_changing_the_loss_but_for_what_follows(model):
    """The last observation of an episode that is cut off is followed by nothing."""
    acts = [IDS["task"], IDS["more"], IDS["left:0"], IDS["steps:64"], IDS[SEARCH]]
    losses = []
    for last in ("left:8", "left:64"):
        ids = torch.tensor([[*acts, IDS[last]]])
        written = torch.tensor([[False] * 4 + [True, False]])
        batch = Rollouts(ids, written, torch.zeros(1, 6))
        figures = {"low": -9.0, "high": 9.0, "tau": 0.1}
        losses.append(
            policy_loss(log_probs(model, batch), batch.log_probs, torch.ones(1), written, **figures)[0].item()
        )
    assert losses[0] == losses[1]


def test_rewards_by_hand():
    outcome = Outcome(item_f1=0.5, answered=True, created=4, completed=3, stages=[2, 4])
    reward = Reward.of(outcome, full_team=8)
    assert (reward.parallel, reward.finish, reward.performance) == (0.5, 0.5, 0.5)
    recipe = ParlRecipe(iterations=40, annealed=0.5, parallel=0.3, finish=0.2)
    assert reward.total(recipe, 0) == pytest.approx(0.3 * 0.5 + 0.2 * 0.5 + 0.5)
    assert reward.total(recipe, 5) == pytest.approx(0.75 * 0.25 + 0.5)
    assert reward.total(recipe, 20) == reward.total(recipe, 39) == 0.5
    assert reward.total(replace(recipe, annealed=None), 39) == pytest.approx(0.75)
    assert Reward.of(Outcome(created=100), 8) == Reward(1.0, 0.0, 0.0), (
        "it saturates; nothing assigned, nothing finished"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"iterations": -1},
        {"samples": 1},
        {"names": (0, 5)},
        {"names": (9, 5)},
        {"parallel": -0.1},
        {"finish": math.nan},
        {"annealed": 0.0},
        {"full_team": 0},
        {"updates": 17},
        {"temperature": 0.0},
        {"low": 0.1},
        {"serial": 1.1},
        {"demonstrations": 3},
    ],
)
def test_recipes_out_of_range_are_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"cannot have {name} = "):
        ParlRecipe(**changes)


def test_arms_differ_from_the_whole_in_what_their_name_says():
    changed = {
        name: [key for key, value in vars(recipe).items() if value != getattr(ParlRecipe(), key)]
        for name, recipe in ARMS.items()
    }
    assert changed == {
        "PARL": [],
        "without r_parallel": ["parallel"],
        "without r_finish": ["finish"],
        "without both": ["parallel", "finish"],
        "without annealing": ["annealed"],
        "total steps": ["budget"],
    }


# Learning


class Taught:
    """An environment of one step, which pays for an act, as it would for the rows of a table."""

    def __init__(self, pays):
        self.pays, self.earned = pays, []

    def begin(self, tasks):
        self.earned = [Outcome() for _ in tasks]
        return [Observation(True, 0, 0, task.names) for task in tasks]

    def step(self, acts):
        for index, of in acts.items():
            self.earned[index].item_f1 = float(self.pays(of))
        return dict.fromkeys(acts)

    def outcomes(self):
        return self.earned


def test_any_environment_will_do_and_what_pays_is_learnt():
    model, recipe = make_orchestrator(1), tiny(iterations=16, tasks=8, samples=8)
    log = parl(model, Taught(lambda acts: acts == [READ]), recipe, 0, progress=False)
    assert log.r_perf[:2].mean() < 0.5
    assert log.r_perf[-2:].mean() > 0.8
    assert log.entropy.iloc[-1] < log.entropy.iloc[0]


def test_nothing_is_learnt_where_every_group_agrees(model):
    before = weights(model)
    log = parl(model, Taught(lambda acts: True), tiny(), 0, progress=False)
    assert (log.gradient_norm == 0).all()
    assert torch.equal(weights(model), before)


def test_the_bonus_for_sub_agents_makes_more_of_them():
    """All else being equal, and the answer worth nothing."""

    class Counting(Taught):
        def step(self, acts):
            for index, of in acts.items():
                self.earned[index].created = of.count(CREATE)
            return dict.fromkeys(acts)

    recipe = tiny(iterations=12, tasks=8, samples=8, parallel=1.0, annealed=None)
    log = parl(make_orchestrator(1), Counting(None), recipe, 0, progress=False)
    assert log.created[-3:].mean() > 3 * log.created[:2].mean()
    assert log.reward.iloc[-1] == pytest.approx(log.r_parallel.iloc[-1])


def test_one_update_on_what_the_model_just_wrote_is_not_clipped(model):
    recipe = tiny(updates=1)
    rollouts = roll_out(model, simulator(), draw_tasks((4, 30), 3, 4, 1), generator=dice())
    gains = advantages(torch.rand(3, 4, generator=dice()))
    figures = learn(model, make_optimiser(model, recipe.update), rollouts, gains, recipe, 0, 0)
    assert figures["masked"] == 0
    assert figures["kl_k3"] == pytest.approx(0, abs=1e-6)
    again = learn(model, make_optimiser(model, recipe.update), rollouts, gains, recipe, 0, 0)
    assert again["kl_k3"] > 1e-6, "now it is stale"


def test_a_training_can_be_repeated_to_the_bit(started):
    logs, ends = [], []
    for _ in range(2):
        model = make_orchestrator(0)
        model.load_state_dict(started.state_dict())
        logs.append(parl(model, simulator(), tiny(), 5, progress=False).drop(columns=SECONDS))
        ends.append(weights(model))
    pd.testing.assert_frame_equal(*logs, check_exact=True)
    assert torch.equal(*ends)


def test_demonstrations_are_as_serial_as_said():
    for share, fewest, most in ((1.0, 0, 0), (0.5, 50, 78), (0.0, 128, 128)):
        dialogues = demonstrate(simulator(), tiny(demonstrations=128, serial=share), 0)
        parallel = sum(any(CREATE in acts for acts in dialogue.steps) for dialogue in dialogues)
        assert fewest <= parallel <= most


def test_scripts_are_examined_like_models(model):
    sizes = {"sizes": (6, 20), "episodes": 4}
    scripted, learnt = evaluate(serial, simulator(), 0, **sizes), evaluate(model, simulator(), 0, **sizes)
    assert [*scripted.columns] == [*learnt.columns]
    assert scripted.names.tolist() == learnt.names.tolist() == [6.0] * 4 + [20.0] * 4
    assert (scripted.parallelism == 0).all()
    assert scripted.item_f1.between(0.5, 1).all()


# Stages


def test_a_run_is_kept_and_arms_share_their_start(tmp_path, monkeypatch):
    monkeypatch.setenv("K25LITE_STAGES", str(tmp_path))
    run = ParlRun("PARL", 0, tiny(), Rotting(), Rotting(limit=500), episodes=2)
    folder = parl_stage(run)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert parl_stage(run) == parl_stage(replace(run, name="another name")) == folder
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept
    log = pd.read_json(folder / "log.json")
    assert len(log) == 2
    assert {"reward", "r_perf", "parallelism", "finish_rate", "bonus", "entropy", "masked", *SECONDS} <= {*log.columns}
    for stage in (folder, cold_start_stage(run)):
        assert len(json.loads((stage / "evaluation.json").read_text())) == 7 * 2
    other = replace(run, recipe=tiny(parallel=0.0))
    assert cold_start_stage(other) == cold_start_stage(run)
    assert parl_stage(other) != folder
    assert cold_start_stage(replace(run, team=Steady())) != cold_start_stage(run)
    total = replace(run, recipe=tiny(budget=Budget(of="total")))
    assert cold_start_stage(total) == cold_start_stage(run), (
        "arms differ in what they learn under, not in what they saw"
    )
    assert parl_stage(total) != folder


def test_no_episode_is_longer_than_the_window_of_the_model():
    assert make_orchestrator(0).config.max_position_embeddings == WINDOW
    assert WideSearch(200).pages < 100


def test_log_probs_do_not_depend_on_which_episodes_stand_together(model):
    tasks = [WideSearch(names, names) for names in (40, 3, 20, 1, 8)]
    rollouts = roll_out(model, simulator(), tasks, generator=torch.Generator().manual_seed(0))
    together = log_probs(model, rollouts)
    assert together.shape == rollouts.input_ids.shape
    for row in range(len(tasks)):
        (one,) = log_probs(model, rollouts[torch.tensor([row])])
        written = rollouts.written[row]
        torch.testing.assert_close(one[written[: len(one)]], together[row][written], atol=1e-5, rtol=1e-5)
