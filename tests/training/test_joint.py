"""The joint stage: same seed, same result; strategies differ in order alone; evaluated closely around the injection."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from k25lite.model import K25Lite
from k25lite.training import cache, joint, loop
from k25lite.training.joint import Budget, JointRun, evaluation_steps, joint_stage, run_all, streams, vit_stage
from k25lite.training.schedules import EARLY, LATE, STRATEGIES, Mix

TINY = Budget(caption_rows=20, rows=100, questions=4, curve_questions=2)


@pytest.fixture(autouse=True)
def stages(tmp_path, monkeypatch):
    monkeypatch.setenv("K25LITE_STAGES", str(tmp_path))
    return tmp_path


def test_same_seed_same_result_and_another_seed_another(stages, monkeypatch):
    run = JointRun("early", 0, TINY, EARLY)
    first = joint_stage(run)
    model, scores = K25Lite.from_pretrained(first), (first / "scores.json").read_text()
    log = pd.read_json(first / "log.json", precise_float=True)
    monkeypatch.setenv("K25LITE_STAGES", str(stages / "again"))
    second = joint_stage(run)
    assert second != first
    assert (second / "scores.json").read_text() == scores
    pd.testing.assert_frame_equal(pd.read_json(second / "log.json", precise_float=True), log, check_exact=True)
    for (name, one), two in zip(
        model.state_dict().items(), K25Lite.from_pretrained(second).state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    other = joint_stage(replace(run, seed=1))
    assert (other / "log.json").read_text() != (second / "log.json").read_text()


def test_a_stage_is_trained_once_and_known_by_what_it_depends_on(stages):
    run = JointRun("early", 0, TINY, EARLY)
    folder = joint_stage(run)
    written = (folder / "log.json").stat().st_mtime_ns
    assert joint_stage(replace(run, name="another name")) == folder
    assert (folder / "log.json").stat().st_mtime_ns == written
    (encoder,) = stages.glob("vit-*")
    shutil.rmtree(encoder)
    assert joint_stage(run) == folder
    assert not encoder.exists(), "what is there needs no encoder"
    assert joint_stage(replace(run, mix=Mix(0.5, 0.2))) != folder
    assert len(list(stages.glob("vit-*"))) == 1, "all strategies of a seed begin with one encoder"


KILLED = """
import os, signal
from k25lite.training import loop
from k25lite.training.joint import Budget, JointRun, joint_stage
from k25lite.training.schedules import EARLY

def save(self, step, *rest, whole=loop.Saver.save):
    whole(self, step, *rest)
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

loop.Saver.save = save
loop.train.__kwdefaults__["checkpoint_every"] = 2
joint_stage(JointRun("early", 0, Budget(caption_rows=20, rows=100, questions=4, curve_questions=2), EARLY))
"""


def test_a_stage_killed_half_way_goes_on_and_ends_the_same_to_the_bit(stages, monkeypatch):
    run = JointRun("early", 0, TINY, EARLY)
    vit_stage(0, TINY)
    shutil.copytree(stages, stages / "whole")
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run([sys.executable, "-c", KILLED], env=environment).returncode == -signal.SIGKILL
    begun, resume = [], loop.Saver.resume
    monkeypatch.setattr(loop.Saver, "resume", lambda saver: begun.append(resume(saver)) or begun[-1])
    cut = joint_stage(run)
    assert [step for step, *_ in begun] == [6]
    assert not list(stages.glob(".joint-*-checkpoints"))
    monkeypatch.setenv("K25LITE_STAGES", str(stages / "whole"))
    whole = joint_stage(run)
    assert whole != cut
    for name in ("model.safetensors", "log.json", "scores.json", "final.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def test_every_strategy_begins_with_the_same_weights_and_uses_the_same_rows():
    rows = streams(0, TINY, 0.1)
    assert len(rows["vision"]) == 10
    assert len(rows["text"]) == 90
    logs = {}
    for name, mix in STRATEGIES.items():
        logs[name] = pd.read_json(joint_stage(JointRun(name, 0, TINY, mix)) / "log.json", precise_float=True)
    assert logs["mid"].loss[:5].equals(logs["late"].loss[:5]), "until vision comes in, mid and late are one run"
    assert not logs["mid"].loss[5:8].equals(logs["late"].loss[5:8])


def test_the_encoder_learns_to_name_things():
    """More captions, lower loss: compared with its own beginning."""
    folder = vit_stage(0, replace(TINY, caption_rows=400))
    loss = pd.read_json(folder / "log.json").loss
    assert loss[-5:].mean() < 0.7 * loss[:5].mean()


def test_the_dip_cannot_be_missed():
    run = JointRun("late", 0, replace(TINY, rows=10_000), LATE)
    points = evaluation_steps(run, 1000, 10_000)
    assert {800, 802, 804, 807, 810, 815, 820} <= set(points)
    assert {0, 100, 200, 1000} <= set(points)
    assert evaluation_steps(replace(run, mix=EARLY), 1000, 10_000) == list(range(0, 1001, 100))


def test_runs_side_by_side_are_the_runs_one_by_one(stages, monkeypatch):
    runs = [JointRun(name, 0, TINY, mix) for name, mix in STRATEGIES.items()]
    alone = pd.read_json(joint_stage(runs[0]) / "final.json")
    monkeypatch.setenv("K25LITE_STAGES", str(stages / "pool"))
    cache.stages_folder().mkdir()
    together = run_all(runs)
    assert set(together) == {"log", "scores", "final"}
    assert set(together["final"].name) == set(STRATEGIES)
    part = together["final"][together["final"].name == "early"].drop(columns=["name", "seed"])
    pd.testing.assert_frame_equal(part.reset_index(drop=True), alone)


def test_a_budget_no_strategy_can_meet_is_refused_before_training():
    with pytest.raises(ValueError, match="of training needs"):
        joint_stage(JointRun("x", 0, TINY, LATE, vision_share=0.3))


def test_lite_budgets_fit_the_ratio():
    for budget in joint.BUDGETS.values():
        assert budget.rows % (10 * joint.ROWS_PER_STEP) == 0
