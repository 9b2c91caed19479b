"""Rollouts in `k25lite bench training`: the same words from all contenders, or no timing; shares that are a whole."""

import math

import pytest
import torch

from k25lite.bench import Disagreement, Report
from k25lite.model import K25Lite
from k25lite.training import bench, bench_rollouts
from k25lite.training.rl import RLRecipe, make_pool
from k25lite.training.rollout import MAX_WRITTEN, roll_out
from k25lite.training.sandbox import Sandbox
from k25lite.training.sft import tool_tokenizer
from k25lite.training.tasks import ABILITIES

CPU = torch.device("cpu")
GPU = torch.cuda.is_available()  # then reinforcement learning runs there


@pytest.fixture
def quick():
    return bench.Bench(Report("a device"), CPU, quick=True)


@pytest.fixture(scope="module")
def model():
    """One and the same for all tests, which only ask it."""
    return bench_rollouts.trained(bench.Bench(Report("a device"), CPU, quick=True))


@pytest.fixture
def contenders():
    """For a model and so many prompts, two samples of each."""
    with Sandbox(seconds=10.0) as sandbox:

        def make(model, count):
            recipe = RLRecipe(prompts=count, samples=2, pool=count // len(ABILITIES))
            prompts = [question.prompt for pool in make_pool(recipe, 0).values() for question in pool]
            return bench_rollouts.Contenders(model, tool_tokenizer(), sandbox, prompts, 2)

        yield make


@pytest.fixture
def untimed(monkeypatch, model):
    """Fails the test if anything is timed."""
    monkeypatch.setattr(bench_rollouts, "trained", lambda _: model)
    monkeypatch.setattr(bench, "median_seconds", lambda *_, **__: pytest.fail("timed"))


def test_a_quick_run_gives_speeds_and_shares(quick, monkeypatch, model):
    monkeypatch.setattr(bench_rollouts, "trained", lambda _: model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    bench_rollouts.rollouts(quick)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())  # RL has its copy
    found = {(row.case, row.metric, row.subject): row for row in quick.report.rows}
    assert len(found) == len(quick.report.rows)
    for case, peer in (("rollouts", bench_rollouts.ALONE), ("first acts", bench_rollouts.GENERATE)):
        case = f"cpu: {case}, 6 prompts x 2"
        mine, theirs = (found[case, "tokens/s", who] for who in ("k25lite", peer))
        assert min(mine.value, theirs.value) > 0
        assert mine.ratio is None
        assert theirs.ratio == pytest.approx(mine.value / theirs.value)
        assert found[case, "rollouts that differ", peer].value == 0
    if not GPU:
        step = {row.metric: row.value for row in quick.report.rows if row.case == "cpu: RL step, 6 prompts x 2"}
        assert 0 < step.pop("RL step time") < math.inf
        assert set(step) == {f"{part} share of the step" for part in ("rollout", "reward", "update")}
        assert min(step.values()) > 0
        assert sum(step.values()) == pytest.approx(1)


def test_the_model_that_is_measured_writes_programs_that_run(contenders):
    model = bench_rollouts.trained(bench.Bench(Report("a device"), CPU, quick=False))
    rollouts = contenders(model, 36).together(0)
    assert sum(any(seen.ok for seen in rollout.observations) for rollout in rollouts) > 18


def test_generate_samples_as_many_first_acts_of_each_prompt(model, contenders):
    sampled = contenders(model, 6)
    ours, theirs = sampled.first_acts(), sampled.generate()
    end = sampled.words.convert_tokens_to_ids(".")
    assert len(ours) == len(theirs) == 12
    for a, b in zip(ours, theirs, strict=True):
        for rollout in (a, b):
            assert len(rollout.ids) == len(rollout.written) == len(rollout.log_probs)
            act = rollout.ids[-rollout.length :]
            assert end not in act[:-1]
            assert (act[-1] == end) or len(act) == MAX_WRITTEN
        assert a.ids[: -a.length] == b.ids[: -b.length]  # the prompt
    assert {a.length for a in ours} | {b.length for b in theirs} != {MAX_WRITTEN}


def mixed_up(model, words, prompts, *args, **options):
    """Every prompt gets another one's rollouts, if there are several."""
    return roll_out(model, words, prompts[::-1], *args, **options)


def forgetful(model, words, prompts, *args, **options):
    """Words are right and their log-probabilities are not."""
    rollouts = roll_out(model, words, prompts, *args, **options)
    if len(prompts) > 1:
        for rollout in rollouts:
            rollout.log_probs = [0.0] * len(rollout.ids)
    return rollouts


@pytest.mark.parametrize("wrong", [mixed_up, forgetful])
def test_rollouts_that_are_not_those_of_one_by_one_are_refused(quick, monkeypatch, untimed, wrong):
    monkeypatch.setattr(bench_rollouts, "roll_out", wrong)
    with pytest.raises(Disagreement, match="rollouts of one by one"):
        bench_rollouts.rollouts(quick)


@pytest.mark.parametrize(
    "changes",
    [
        lambda given: {"max_new_tokens": 5},
        lambda given: {"pixel_values": given["pixel_values"].flip(0)},
        lambda given: {"attention_mask": torch.ones_like(given["attention_mask"])},
    ],
    ids=["shorter", "other pictures", "padding is read"],
)
def test_another_generate_is_refused(quick, monkeypatch, untimed, changes):
    generate = K25Lite.generate
    monkeypatch.setattr(K25Lite, "generate", lambda self, **given: generate(self, **given | changes(given)))
    with pytest.raises(Disagreement, match="rollouts of plain generate"):
        bench_rollouts.rollouts(quick)
