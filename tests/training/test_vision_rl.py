"""Vision RL as stages: what each run begins with, that it is trained once, and what is read back from it."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from k25lite.model import K25Lite
from k25lite.training import examination, rl, vision_rl
from k25lite.training.examination import examine
from k25lite.training.joint import BUDGETS, JointRun, joint_stage
from k25lite.training.rl import RLRecipe
from k25lite.training.rollout import Rollout
from k25lite.training.schedules import EARLY
from k25lite.training.sft import ARMS, MANY, SFTRun, sft_stage, tool_tokenizer
from k25lite.training.tasks import KINDS, make_task
from k25lite.training.vision_rl import RLRun, begin, gather, rl_stage
from k25lite.world.families import FAMILIES

TINY = replace(BUDGETS["smoke"], caption_rows=10, rows=20, questions=2, curve_questions=2)
RECIPE = RLRecipe(steps=2, prompts=6, samples=2, pool=2)
BASE = JointRun("early", 3, TINY, EARLY)
TOOLS = SFTRun("zero-vision", ARMS["zero-vision"], BASE, rows=20, questions=2)
WARM = RLRun("warm", TOOLS, RECIPE, questions=2, curve_questions=2)
ON = RLRun("on", WARM, replace(RECIPE, shown=0.0), questions=0, curve_questions=0)
COLD = RLRun("cold", BASE, RECIPE, questions=2, curve_questions=2)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of the three runs, the weights that each was handed over with, and how often anything was trained."""
    begun = []
    reinforce = vision_rl.reinforce

    def watched(model, *arguments, **options):
        begun.append(weights(model))
        assert options["checkpoints"].is_dir()
        return reinforce(model, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K25LITE_STAGES", str(tmp_path_factory.mktemp("stages")))
        patch.setattr(vision_rl, "reinforce", watched)
        dice = Random(0)  # models this small earn nothing, and would learn nothing
        patch.setattr(rl, "reward", lambda *_: dice.random())
        # The second one trains what it begins with.
        folders = dict(zip(("on", "cold"), map(rl_stage, (ON, COLD)), strict=True)) | {"warm": rl_stage(WARM)}
        yield folders, dict(zip(("warm", "on", "cold"), begun, strict=True)), begun


def test_a_run_is_trained_once_and_found_again_under_another_name(trained):
    folders, _, begun = trained
    assert len(begun) == 3, "that which another begins with was not trained anew"
    assert rl_stage(replace(WARM, name="another name")) == folders["warm"]
    assert rl_stage(replace(ON, start=replace(WARM, name="another name"))) == folders["on"]
    assert len(begun) == 3


def test_what_the_outcome_depends_on_makes_another_run(trained, monkeypatch):
    folders, _, _ = trained

    def key(name, config, build, **_):
        return json.dumps(config, sort_keys=True)

    with monkeypatch.context() as patch:
        patch.setattr(vision_rl, "cached", key)
        others = [
            replace(WARM, recipe=replace(RECIPE, clip="ppo")),
            replace(WARM, recipe=replace(RECIPE, update=replace(RECIPE.update, clip=2.0))),
            replace(WARM, recipe=replace(RECIPE, toggle=(1, 0.5, 50.0))),
            replace(WARM, questions=3),
            replace(WARM, curve_questions=3),
            replace(WARM, start=BASE),
        ]
        assert len({rl_stage(run) for run in (WARM, *others)}) == len(others) + 1
    assert len(set(folders.values())) == 3


def test_seeds_are_those_of_the_joint_training_however_far_back_it_is():
    assert [run.seed for run in (WARM, ON, COLD, replace(WARM, start=ON))] == [3, 3, 3, 3]
    other = replace(BASE, seed=5)
    assert replace(ON, start=replace(WARM, start=replace(TOOLS, base=other))).seed == 5


def test_a_run_begins_with_the_end_of_what_it_starts_from(trained):
    folders, begun, _ = trained
    assert begin(WARM) == folders["warm"]
    for start, name in ((sft_stage(TOOLS), "warm"), (folders["warm"], "on")):
        model = K25Lite.from_pretrained(start)
        for parameter, value in weights(model).items():
            assert torch.equal(begun[name][parameter], value), parameter


def test_a_cold_start_begins_with_the_jointly_trained_model_and_words_that_it_never_met(trained):
    folders, begun, _ = trained
    old = weights(K25Lite.from_pretrained(joint_stage(BASE)))
    assert old.keys() == begun["cold"].keys()
    for name, value in old.items():
        now = begun["cold"][name]
        assert torch.equal(now[: len(value)], value), name
        assert len(now) == (len(tool_tokenizer()) if "embed_tokens" in name else len(value))
    assert K25Lite.from_pretrained(folders["cold"]).config.text_config.vocab_size == len(tool_tokenizer())


def test_weights_are_those_of_after_the_run(trained):
    folders, begun, _ = trained
    for name, before in begun.items():
        after = weights(K25Lite.from_pretrained(folders[name]))
        assert any(not torch.equal(after[parameter], value) for parameter, value in before.items()), name


def test_gather_gives_what_the_runs_left_with_name_and_seed(trained):
    folders, _, _ = trained
    runs = [WARM, replace(COLD, name="another")]
    frames = gather(runs, [folders["warm"], folders["cold"]])
    assert list(frames) == ["log", "scores", "exam", "sampled", "families"]
    for frame in frames.values():
        assert frame.name.drop_duplicates().tolist() == ["warm", "another"]
        assert (frame.seed == 3).all()
        assert frame.index.is_unique
    for name in ("warm", "another"):
        log, scores, exam, sampled, families = (frame[frame.name == name] for frame in frames.values())
        assert log.step.tolist() == [0, 1]
        assert sorted(zip(scores.step, scores.kind, strict=True)) == sorted((s, k) for s in (0, 1, 2) for k in MANY)
        assert sorted(zip(exam.sight, exam.kind, strict=True)) == sorted(
            (s, k) for s in ("shown", "told") for k in KINDS
        )
        assert set(sampled.kind) == set(MANY)
        assert (sampled.asked == 3 * 2).all()
        assert set(families.family) == set(FAMILIES)
        for frame in (scores, exam):
            assert (frame.asked == 2).all()
            assert (frame.valid <= frame.programs).all()
            assert (frame.programs <= frame.asked).all()
            assert (frame.correct <= frame.asked).all()
        assert (families.groupby("family").asked.sum() == 8).all()
    raw = json.loads((folders["warm"] / "log.json").read_text())
    assert frames["log"].entropy.tolist()[:2] == [row["entropy"] for row in raw], "to the last digit"


@pytest.mark.parametrize("count", [2, 5])
def test_swapped_no_task_is_shown_its_own_picture_and_every_picture_is_of_its_kind(monkeypatch, count):
    """The model is asked nothing here: what it would be shown is looked at."""
    shown = {}

    def watched(model, words, prompts, sandbox, **_):
        shown[sight] = [prompt.picture for prompt in prompts]
        return [Rollout([], [], []) for _ in prompts]

    monkeypatch.setattr(examination, "roll_out", watched)
    for sight in ("shown", "swapped", "blank", "told"):
        examine(None, None, None, kinds=("what", "read"), count=count, sight=sight)
    assert all(picture is None for picture in shown["told"])
    assert all((picture == 127).all() for picture in shown["blank"])
    for index, (own, other) in enumerate(zip(shown["shown"], shown["swapped"], strict=True)):
        assert own.shape == other.shape
        first = index - index % count
        assert any(np.array_equal(other, picture) for picture in shown["shown"][first : first + count])
        assert not np.array_equal(other, own)


def test_a_run_without_questions_is_not_examined(trained):
    frames = gather([ON], [trained[0]["on"]])
    assert list(frames) == ["log", "scores"]
    assert frames["log"].step.tolist() == [0, 1]
    assert frames["scores"].empty


def test_every_answer_to_a_question_counts_for_its_kind(monkeypatch):
    """Of three answers to each question of one kind the first is right, of the other the first two."""
    random = Random("k25lite examination 3")
    tasks = [make_task(kind, random, True) for kind in ("what", "read") for _ in range(4)]
    right = {"what": 1, "read": 2}

    def scripted(model, words, prompts, sandbox, *, samples, temperature, generator):
        assert (samples, temperature) == (3, 1.0)
        assert [prompt.question for prompt in prompts] == [task.question for task in tasks]
        said = [task.answer if place < right[task.kind] else "" for task in tasks for place in range(samples)]
        return [Rollout([], [], [], acts=[answer]) for answer in said]

    monkeypatch.setattr(examination, "roll_out", scripted)
    found = examine(None, None, None, kinds=("what", "read"), count=4, seed=3, temperature=1.0, samples=3)
    assert found.set_index("kind").correct.to_dict() == {"what": 4, "read": 8}
    assert (found.asked == 12).all()


def test_one_question_of_a_kind_cannot_be_swapped():
    with pytest.raises(ValueError, match="two questions or more"):
        examine(None, None, None, count=1, sight="swapped")
