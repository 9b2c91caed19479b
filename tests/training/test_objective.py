"""The objective of reinforcement learning by hand, against a loop over tokens, and beside PPO; Toggle phase by phase."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25lite.training.objective import Toggle, advantages, policy_loss, ppo_loss, token_log_probs

BOUNDS = {"low": -0.2, "high": 0.3}


def make(log_ratios, advantage, mask=None):
    """Arguments of a loss with these log-ratios; π_old gives every token the probability 1/2."""
    log_ratio = torch.tensor(log_ratios, dtype=torch.float64)
    old = torch.full_like(log_ratio, math.log(0.5))
    mask = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return (old + log_ratio).requires_grad_(), old, torch.tensor(advantage, dtype=torch.float64), mask


def gradient(loss, arguments, **how):
    (found,) = torch.autograd.grad(loss(*arguments, **how)[0], arguments[0])
    return found


def test_three_tokens_by_hand():
    arguments = make([[0.1, 0.5, -0.5]], [2.0])
    loss, stats = policy_loss(*arguments, **BOUNDS, tau=0.1)
    # Inside: e^0.1 = 1.105171. Clipped: e^0.3 = 1.349859, e^-0.2 = 0.818731. Squares: 0.01 + 0.25 + 0.25.
    assert loss.item() == pytest.approx(-(2 * (1.105170918 + 1.349858808 + 0.818730753) - 0.1 * 0.51) / 3)
    # d/d log p: inside A·ratio − 2τ·0.1; outside −2τ·(±0.5), which pulls back.
    by_hand = [-(2 * 1.105170918 - 0.02) / 3, 0.1 / 3, -0.1 / 3]
    assert gradient(policy_loss, arguments, **BOUNDS, tau=0.1)[0].tolist() == pytest.approx(by_hand)
    assert stats == pytest.approx(
        {
            "kl_k1": -0.1 / 3,
            "kl_k3": (0.005170918 + 0.148721271 + 0.106530660) / 3,
            "masked": 2 / 3,
            "squared_log_ratio": 0.51 / 3,
        }
    )


def test_three_tokens_by_hand_under_ppo():
    arguments = make([[0.1, 0.5, -0.5]], [2.0])
    loss, stats = ppo_loss(*arguments, **BOUNDS, tau=0.1)
    # Below the lower bound a positive advantage keeps its ratio: e^-0.5 = 0.606531.
    assert loss.item() == pytest.approx(-(2 * (1.105170918 + 1.349858808 + 0.606530660) - 0.1 * 0.51) / 3)
    assert stats["masked"] == pytest.approx(1 / 3)
    loss, stats = ppo_loss(*make([[0.1, 0.5, -0.5]], [-2.0]), **BOUNDS, tau=0.1)
    # A negative one keeps its ratio above the upper bound: e^0.5 = 1.648721.
    assert loss.item() == pytest.approx((2 * (1.105170918 + 1.648721271 + 0.818730753) + 0.1 * 0.51) / 3)
    assert stats["masked"] == pytest.approx(1 / 3)


def token_by_token(log_probs, old, advantage, mask, low, high, tau):
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for j in range(log_probs.shape[0]):
        for i in range(log_probs.shape[1]):
            if not mask[j, i]:
                continue
            tokens += 1
            moved = log_probs[j, i] - old[j, i]
            if moved < low:
                term = math.exp(low) * advantage[j]
            elif moved > high:
                term = math.exp(high) * advantage[j]
            else:
                term = torch.exp(moved) * advantage[j]
            total = total + term - tau * moved * moved
    return -total / tokens


@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_equal_a_loop_over_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    log_ratio = torch.randn(4, 7, generator=generator, dtype=torch.float64) * 0.4
    mask = torch.rand(4, 7, generator=generator) < 0.6
    arguments = make(log_ratio.tolist(), torch.randn(4, generator=generator).tolist(), mask.tolist())
    loss, stats = policy_loss(*arguments, low=-0.3, high=0.5, tau=0.05)
    expected = token_by_token(*arguments, -0.3, 0.5, 0.05)
    torch.testing.assert_close(loss, expected)
    (expected_gradient,) = torch.autograd.grad(expected, arguments[0])
    torch.testing.assert_close(gradient(policy_loss, arguments, low=-0.3, high=0.5, tau=0.05), expected_gradient)
    outside = ((log_ratio < -0.3) | (log_ratio > 0.5))[mask].double().mean()
    assert stats["masked"] == pytest.approx(float(outside))


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("moved", [-0.7, 0.7])
def test_outside_the_bounds_the_advantage_is_silent_whatever_its_sign_and_under_ppo_only_with_one(moved, advantage):
    arguments = make([[moved, 0.0]], [advantage])
    policy = gradient(policy_loss, arguments, **BOUNDS, tau=0)
    assert policy[0, 0] == 0
    assert policy[0, 1] == -advantage / 2
    ppo = gradient(ppo_loss, arguments, **BOUNDS, tau=0)
    if moved * advantage > 0:
        assert ppo[0, 0] == 0
    else:
        assert ppo[0, 0].item() == pytest.approx(-advantage / 2 * math.exp(moved))


@pytest.mark.parametrize("moved", [-0.7, 0.7])
def test_outside_the_bounds_the_squared_term_pulls_back(moved):
    pull = gradient(policy_loss, make([[moved]], [100.0]), **BOUNDS, tau=0.5)
    assert pull.item() == pytest.approx(moved), "a step against the gradient leads to π_old"


def test_at_the_bounds_the_gradient_still_flows():
    bounds = torch.tensor([[-0.25, 0.25]], requires_grad=True)
    arguments = (bounds, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
    assert gradient(policy_loss, arguments, low=-0.25, high=0.25, tau=0).ne(0).all()
    assert policy_loss(*arguments, low=-0.25, high=0.25, tau=0)[1]["masked"] == 0


def test_every_token_weighs_the_same_however_long_its_response():
    arguments = make([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [1.0, 1.0], [[True, False, False], [True, True, True]])
    found = gradient(policy_loss, arguments, **BOUNDS, tau=0)
    assert found.tolist() == [[-0.25, 0, 0], [-0.25, -0.25, -0.25]]  # by the mean per response: 1/2 and 1/6


def test_parts_of_a_batch_add_up_to_it_by_their_share_of_the_tokens():
    mask = [[True, False, False], [True, True, True]]
    whole = make([[0.1, 0.2, 0.3], [-0.1, 0.5, 0.0]], [1.0, -2.0], mask)
    parts = [policy_loss(*(each[row : row + 1] for each in whole), **BOUNDS, tau=0.1)[0] for row in (0, 1)]
    torch.testing.assert_close(parts[0] * 1 / 4 + parts[1] * 3 / 4, policy_loss(*whole, **BOUNDS, tau=0.1)[0])


def test_rewards_less_their_mean_by_hand():
    found = advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]))
    assert found.tolist() == [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25]]
    assert advantages(torch.tensor([[True, False]])).tolist() == [[0.5, -0.5]]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(-10, 10))
def test_a_constant_added_to_a_group_changes_nothing(rewards, constant):
    group = torch.tensor([rewards], dtype=torch.float64)
    torch.testing.assert_close(advantages(group + constant), advantages(group), atol=1e-12, rtol=0)
    assert float(advantages(group).sum()) == pytest.approx(0, abs=1e-12)


@given(st.floats(0, 1, width=32), st.integers(2, 9))
def test_equal_rewards_give_a_policy_gradient_of_exactly_zero(reward, responses):
    relative = advantages(torch.full((1, responses), reward))
    assert not relative.any(), "not even a rounding error"
    arguments = make([[0.1, -0.4]] * responses, [0.0] * responses)
    arguments = (*arguments[:2], relative.flatten().double(), arguments[3])
    assert not gradient(policy_loss, arguments, **BOUNDS, tau=0).any()


@pytest.mark.parametrize("loss", [policy_loss, ppo_loss])
@pytest.mark.parametrize("strange", [7.0, -math.inf, math.nan])
def test_observations_change_nothing_whatever_their_probabilities(loss, strange):
    plain = make([[0.1, 0.0, -0.5]], [2.0], [[True, False, True]])
    odd = make([[0.1, strange, -0.5]], [2.0], [[True, False, True]])
    assert loss(*odd, **BOUNDS, tau=0.1)[1] == loss(*plain, **BOUNDS, tau=0.1)[1]
    torch.testing.assert_close(loss(*odd, **BOUNDS, tau=0.1)[0], loss(*plain, **BOUNDS, tau=0.1)[0])
    assert gradient(loss, odd, **BOUNDS, tau=0.1)[0, 1] == 0
    shorter = make([[0.1, -0.5]], [2.0])
    assert loss(*odd, **BOUNDS, tau=0.1)[0].item() == pytest.approx(loss(*shorter, **BOUNDS, tau=0.1)[0].item())


def test_observations_get_no_gradient_down_to_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator, requires_grad=True)
    input_ids = torch.randint(11, (2, 5), generator=generator)
    mask = torch.tensor([[False, False, True, False, True]] * 2)
    log_probs = token_log_probs(logits, input_ids)
    loss, stats = policy_loss(log_probs, log_probs, torch.tensor([1.0, -1.0]), mask, **BOUNDS, tau=0.1)
    loss.backward()
    moved = logits.grad.ne(0).any(-1)
    assert moved.tolist() == [[False, True, False, True, False]] * 2, (
        "token i is drawn from logits i − 1, and only own ones"
    )
    assert stats == {"kl_k1": 0, "kl_k3": 0, "masked": 0, "squared_log_ratio": 0}, (
        "π_old is a constant, here π_θ itself"
    )


def test_nothing_written_is_nothing_to_learn():
    arguments = make([[0.1, 0.2]], [1.0], [[False, False]])
    loss, stats = policy_loss(*arguments, **BOUNDS, tau=0.1)
    assert loss.item() == 0
    assert set(stats.values()) == {0.0}
    assert not gradient(policy_loss, arguments, **BOUNDS, tau=0.1).any()


def test_the_estimates_of_kl_approach_it():
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    new = (0.3 * new + 0.7 * old).log_softmax(-1)
    sampled = torch.multinomial(old.exp(), 200_000, replacement=True, generator=generator)[None]
    mask = torch.ones_like(sampled, dtype=torch.bool)
    stats = policy_loss(new[sampled], old[sampled], torch.zeros(1).double(), mask, **BOUNDS, tau=0)[1]
    kl = float(torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=p) for p in (old, new))))
    assert stats["kl_k1"] == pytest.approx(kl, rel=0.1)
    assert stats["kl_k3"] == pytest.approx(kl, rel=0.03), "of lower variance"


@pytest.mark.parametrize(
    "change",
    [
        {"low": 0.1},
        {"high": -0.1},
        {"tau": -1.0},
        {"mask": torch.ones(2, 3)},
        {"mask": torch.ones(2, 4, dtype=torch.bool)},
        {"advantages": torch.zeros(1, 2)},
        {"old_log_probs": torch.zeros(2, 1)},
    ],
)
def test_arguments_that_do_not_fit_are_refused(change):
    fitting = {"log_probs": torch.zeros(2, 3), "old_log_probs": torch.zeros(2, 3), "advantages": torch.zeros(2)}
    fitting |= {"mask": torch.ones(2, 3, dtype=torch.bool), **BOUNDS, "tau": 0.1}
    for loss in (policy_loss, ppo_loss):
        with pytest.raises(ValueError, match=r"needed|are \[responses|a bool mask"):
            loss(**(fitting | change))


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_a_group_without_a_baseline_is_refused(shape):
    with pytest.raises(ValueError, match="K of 2 or more"):
        advantages(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_the_distribution_before_each_token(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64).to(dtype)
    input_ids = torch.randint(9, (3, 6), generator=generator)
    found = token_log_probs(logits, input_ids)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found[:, 0].any()
    for i in range(1, 6):
        before = torch.distributions.Categorical(logits=logits[:, i - 1].to(found.dtype))
        torch.testing.assert_close(found[:, i], before.log_prob(input_ids[:, i]))


def test_a_policy_learns_what_is_rewarded():
    torch.manual_seed(0)
    logits = torch.zeros(5, requires_grad=True)
    optimiser = torch.optim.SGD([logits], lr=2.0)
    for _ in range(60):
        with torch.no_grad():
            old = logits.log_softmax(-1)
            tokens = torch.multinomial(old.exp(), 16, replacement=True)
        relative = advantages((tokens == 3).double()[None]).float().flatten()
        for _ in range(2):
            log_probs = logits.log_softmax(-1)[tokens][:, None]
            mask = torch.ones_like(log_probs, dtype=torch.bool)
            loss, _ = policy_loss(log_probs, old[tokens][:, None], relative, mask, low=-0.5, high=0.5, tau=0.01)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert logits.softmax(-1)[3].item() > 0.9, "untrained: 0.2"


def toggled(toggle, iteration, correct, lengths, keys=("x",), rewards=None):
    correct = torch.tensor(correct)
    rewards = correct.double() if rewards is None else torch.tensor(rewards)
    return toggle.rewards(iteration, keys, correct, rewards, torch.tensor(lengths)).tolist()


def test_toggle_alternates_phases_beginning_with_the_budget():
    toggle = Toggle(period=2, threshold=0.5, percentile=50)
    assert [toggle.in_budget_phase(iteration) for iteration in range(6)] == [True, True, False, False, True, True]
    group = [[True, True, True, False]], [[10, 20, 60, 5]]  # the median of 10, 20, 60 is 20
    for iteration in range(6):
        expected = [[1, 1, 0, 0]] if toggle.in_budget_phase(iteration) else [[1, 1, 1, 0]]
        assert toggled(toggle, iteration, *group) == expected
    assert toggle.budgets == {"x": 20}


def test_toggle_spares_prompts_below_the_threshold():
    toggle = Toggle(period=1, threshold=0.75, percentile=0)
    correct = [[True, True, False, False], [True, True, True, False], [True, True, True, True]]
    lengths = [[1, 9, 9, 9]] * 3
    assert toggled(toggle, 0, correct, lengths, "abc") == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]


def test_toggle_sets_a_budget_by_the_first_group_with_a_correct_response_and_keeps_it():
    toggle = Toggle(period=1, threshold=0.5, percentile=100)
    assert toggled(toggle, 0, [[False, False]], [[3, 4]], rewards=[[0.25, 0.5]]) == [[0.25, 0.5]]
    assert toggle.budgets == {}
    assert toggled(toggle, 1, [[True, False]], [[30, 50]]) == [[1, 0]], "set in the free phase too"
    assert toggle.budgets == {"x": 30}
    assert toggled(toggle, 2, [[True, True]], [[30, 31]]) == [[1, 0]]
    assert toggled(toggle, 4, [[True, True]], [[10, 12]]) == [[1, 1]]
    assert toggle.budgets == {"x": 30}, "shorter answers do not tighten it"


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.floats(0, 100))
def test_toggle_budgets_are_percentiles_of_the_correct_lengths(lengths, percentile):
    toggle = Toggle(1, 0.0, percentile)
    wrong = [[True] * len(lengths) + [False] * 3]
    toggled(toggle, 1, wrong, [[*lengths, 1000, 1, 1]])
    assert toggle.budgets["x"] == pytest.approx(np.quantile(lengths, percentile / 100))


def test_toggle_counts_a_response_of_exactly_the_budget():
    # Of the lengths 1..101 the percentile is 1 + percentile, but for rounding: 0.29 · 100 = 28.999999999999996.
    for percentile in range(101):
        counted = toggled(Toggle(1, 0.0, percentile), 0, [[True] * 101], np.arange(1.0, 102)[None])
        assert sum(counted[0]) == percentile + 1


def test_toggle_has_nothing_to_enforce_before_a_correct_response():
    assert toggled(Toggle(1, 0.0, 50), 0, [[False, False]], [[1, 2]], rewards=[[0.5, 0.25]]) == [[0.5, 0.25]]


def test_toggle_leaves_its_input_alone():
    rewards = torch.ones(1, 2)
    Toggle(1, 0, 0).rewards(0, ["x"], torch.tensor([[True, True]]), rewards, torch.tensor([[1, 2]]))
    assert rewards.tolist() == [[1, 1]]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_toggle_resumes_as_if_it_had_never_stopped(seed, stop):
    generator = torch.Generator().manual_seed(seed)
    draw = [
        (torch.rand(3, 4, generator=generator) < 0.5, torch.randint(1, 99, (3, 4), generator=generator))
        for _ in range(8)
    ]

    def run(toggle, steps):
        return [toggle.rewards(i, "abc", draw[i][0], draw[i][0].float(), draw[i][1]).tolist() for i in steps]

    straight = run(Toggle(2, 0.5, 60), range(8))
    first = Toggle(2, 0.5, 60)
    before = run(first, range(stop))
    second = Toggle(2, 0.5, 60)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + run(second, range(stop, 8)) == straight


@pytest.mark.parametrize("wrong", [(0, 0.5, 50), (1, 1.5, 50), (1, 0.5, 101), (1, -0.1, 50), (1, 0.5, -1)])
def test_toggle_refuses_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match="period"):
        Toggle(*wrong)


def test_toggle_refuses_fewer_prompts_than_groups():
    with pytest.raises(ValueError, match="zip"):
        toggled(Toggle(1, 0.5, 50), 0, [[True], [True]], [[1], [1]])
