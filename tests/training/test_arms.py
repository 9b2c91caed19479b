import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from k25lite.training import arms
from k25lite.training.arms import Arm, Outcome, run_arms
from k25lite.training.vit import VisionReader
from k25lite.vision import MoonViT3DConfig
from k25lite.world.scenes import SceneSpec

PICTURES, CLIPS = SceneSpec(), SceneSpec(frames=4)
TINY = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
TESTS = (("pictures", PICTURES, 12), ("other pictures", PICTURES, 12), ("clips", CLIPS, 12))
QUESTION = ["asked", "kind", "concept", "answer"]

PLAIN = Arm("plain", ((PICTURES, 24),), TESTS, TINY)
TWIN = Arm("twin", PLAIN.data, TESTS, TINY)
MIXED = Arm("mixed", ((PICTURES, 16), (CLIPS, 20)), TESTS, TINY | {"temporal_embedding": False})
ONE_STEP = Arm("one step", ((PICTURES, 8),), TESTS[:1], TINY, starts_from="plain")

PEAK_RATE, WEIGHT_DECAY = 5e-4, 0.05


def questions(outcome: Outcome, arm: str, seed: int, test: str) -> list[tuple]:
    rows = outcome.answers.query("arm == @arm and seed == @seed and test == @test")
    return list(rows[QUESTION].itertuples(index=False, name=None))


def rows(outcome: Outcome, arm: str, seed: int) -> pd.DataFrame:
    return outcome.answers.query("arm == @arm and seed == @seed").drop(columns="arm").reset_index(drop=True)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return run_arms([PLAIN, TWIN, MIXED], (0, 1), workers=2, progress=False)


@pytest.fixture(scope="module")
def continued(outcome) -> Outcome:
    """In one worker: an arm of `outcome` again, and one that takes a single step from where it ended."""
    return run_arms([MIXED, ONE_STEP], (1,), workers=1, starts=outcome.weights, progress=False)


def test_every_arm_seed_and_test_is_answered_and_logged(outcome):
    answered = outcome.answers.groupby(["arm", "seed", "test"]).size().to_dict()
    per_test = {"pictures": 12 * 4 * 2, "other pictures": 12 * 4 * 2, "clips": 12 * 4 * 3}  # scenes, cells, questions
    names = ("plain", "twin", "mixed")
    assert answered == {(arm, seed, test): n for arm in names for seed in (0, 1) for test, n in per_test.items()}
    steps = outcome.logs.groupby(["arm", "seed"]).step.apply(list).to_dict()
    wanted = {"plain": 3, "twin": 3, "mixed": 4}  # batches of 8 in 24, 24 and 36 scenes
    assert steps == {(arm, seed): list(range(n)) for arm, n in wanted.items() for seed in (0, 1)}
    assert outcome.logs.loss.notna().all()
    assert set(outcome.weights) == {(arm, seed) for arm in names for seed in (0, 1)}
    assert not outcome.answers.isna().any(axis=None)


@pytest.mark.parametrize("test", [name for name, _, _ in TESTS])
def test_arms_of_one_seed_are_asked_the_same_and_seeds_differ(outcome, test):
    for seed in (0, 1):
        assert questions(outcome, "plain", seed, test) == questions(outcome, "mixed", seed, test)
    assert questions(outcome, "plain", 0, test) != questions(outcome, "plain", 1, test)


def test_two_tests_of_one_kind_of_scene_are_asked_about_different_scenes(outcome):
    assert questions(outcome, "plain", 0, "pictures") != questions(outcome, "plain", 0, "other pictures")


def test_no_scene_is_trained_on_and_tested_nor_shared_by_seeds(monkeypatch):
    made = []

    def remember(*args):
        examples = real(*args)
        made.extend(example.chunks[0].tobytes() for example in examples)
        return examples

    real = arms.make_examples
    monkeypatch.setattr(arms, "make_examples", remember)
    monkeypatch.setattr(arms, "side_by_side", lambda run, jobs, **_: [run(job) for job in jobs])
    twice = Arm("twice", ((PICTURES, 10), (PICTURES, 10)), TESTS[:2], TINY)
    run_arms([twice], (0, 1), progress=False)
    assert len(made) == len(set(made)) == 2 * (10 + 10 + 12 + 12)


def test_arms_that_differ_in_name_alone_are_equal_bit_for_bit(outcome):
    for seed in (0, 1):
        plain, twin = outcome.weights["plain", seed], outcome.weights["twin", seed]
        assert all(np.array_equal(plain[name], twin[name]) for name in plain)
        pd.testing.assert_frame_equal(rows(outcome, "plain", seed), rows(outcome, "twin", seed))


def test_what_an_arm_changes_changes_its_weights_and_so_does_the_seed(outcome):
    name = "decoder.embed_tokens.weight"
    weights = {key: outcome.weights[key][name] for key in (("plain", 0), ("mixed", 0), ("plain", 1))}
    assert not np.array_equal(weights["plain", 0], weights["mixed", 0])
    # The same initial weights for both arms, so they are still close; another seed is nowhere near.
    between_arms = np.abs(weights["plain", 0] - weights["mixed", 0]).max()
    between_seeds = np.abs(weights["plain", 0] - weights["plain", 1]).max()
    assert between_arms < 10 * PEAK_RATE < between_seeds


def test_weights_come_back_ready_for_a_model_of_the_arm(outcome):
    model = VisionReader(MoonViT3DConfig.lite(**TINY))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in outcome.weights["plain", 1].items()})


def test_no_row_depends_on_the_number_of_workers(outcome, continued):
    pd.testing.assert_frame_equal(rows(outcome, "mixed", 1), rows(continued, "mixed", 1))


def test_an_arm_starts_from_the_given_weights_of_its_own_seed(outcome, continued):
    ended, start, elsewhere = continued.weights["one step", 1], outcome.weights["plain", 1], outcome.weights["plain", 0]
    # The first step of AdamW moves a weight by the learning rate at most, besides its decay.
    bound = {name: PEAK_RATE * (1.001 + WEIGHT_DECAY * np.abs(array)) for name, array in start.items()}
    assert all((np.abs(ended[name] - start[name]) <= bound[name]).all() for name in start)
    assert not all((np.abs(ended[name] - elsewhere[name]) <= bound[name]).all() for name in start)


def test_a_missing_start_is_a_value_error_that_names_both_arms():
    lost = Arm("lost", PLAIN.data, TESTS[:1], TINY, starts_from="nowhere")
    with pytest.raises(ValueError, match=r"'lost'.*'nowhere'"):
        run_arms([lost], (0,), workers=1, starts={("plain", 0): {}, ("nowhere", 1): {}}, progress=False)


class Deadly(dict):
    """Whatever process receives it dies at once, as one does that the system kills for want of memory."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.timeout(60)
def test_a_worker_that_dies_is_an_error_and_does_not_hang():
    doomed = Arm("doomed", PLAIN.data, TESTS[:1], Deadly())
    with pytest.raises(BrokenProcessPool):
        run_arms([doomed, PLAIN], (0, 1), workers=1, progress=False)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc, where Linux lists the open files")
def test_returned_weights_hold_no_file_open():
    def run():
        return run_arms([Arm("anew", ONE_STEP.data, TESTS[:1], TINY)], (0,), workers=1, progress=False).weights

    run()  # the process that is kept has files open itself
    before = len(os.listdir("/proc/self/fd"))
    weights = run()
    assert weights["anew", 0]
    assert len(os.listdir("/proc/self/fd")) <= before
