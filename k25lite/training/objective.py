"""The objective of reinforcement learning, with a clip on the log-ratio alone, and Toggle, which makes answers short.

Source: Kimi K2.5 report, the RL objective and Toggle. Per prompt x, K responses y_j and their mean reward r̄(x):

    maximise E_x[ 1/N Σ_j Σ_i Clip(π_θ/π_old, α, β) · (r(x, y_j) − r̄(x)) − τ · (log π_θ/π_old)² ]

Read here: α and β bound the log-ratio; N counts the response tokens of the batch, so that every token weighs the same,
however long its response; both terms are summed over tokens; the squared term is outside Clip, so it goes on pulling a
token back towards π_old where Clip has silenced the advantage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Stats = dict[str, float]


def advantages(rewards: Tensor) -> Tensor:
    """Rewards less their group's mean, [prompts, K] -> [prompts, K]; exactly 0 where a group's rewards are all equal.

    Raises:
        ValueError: fewer than two responses per prompt: no baseline.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are [prompts, K] with K of 2 or more, got {list(rewards.shape)}")
    rewards = _at_least_float32(rewards)
    # Relative to the first, because Muon would scale the rounding error of a mean of equals up to a whole step.
    relative = rewards - rewards[:, :1]
    return relative - relative.mean(dim=1, keepdim=True)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float, tau: float
) -> tuple[Tensor, Stats]:
    """The report's objective, negated. Outside [low, high] a token's first term is the constant exp(bound) · advantage.

    Args:
        log_probs, old_log_probs: [responses, length], in nats, of the sampled tokens; the old ones get no gradient.
        advantages: [responses], the flattened `advantages`.
        mask: [responses, length] bool: the tokens that the policy wrote. What is outside (prompt, observations,
            sub-agents' words, padding) changes nothing, whatever its values.
        low, high: α and β, bounds on the log-ratio.
        tau: τ, the weight of the squared log-ratio.

    Returns:
        The loss, 0 for an empty mask; that of a part of a batch is to be scaled by the part's share of N. And, over the
        tokens of `mask`, `kl_k1` and `kl_k3`, which estimate KL(π_old ‖ π_θ) in nats as means of −log-ratio and of
        ratio − 1 − log-ratio; `masked`, the share whose advantage the clip silences; `squared_log_ratio`, a mean.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, bounds without 0 between them, a negative τ.
    """
    log_ratio = _log_ratio(log_probs, old_log_probs, advantages, mask, low, high, tau)
    gain = log_ratio.clamp(low, high).exp() * advantages[:, None]
    return _loss(gain, log_ratio, mask, (log_ratio < low) | (log_ratio > high), tau)


def ppo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float, tau: float
) -> tuple[Tensor, Stats]:
    """`policy_loss` with PPO's one-sided clip, to compare with.

    A token is silenced only if it has already moved the way its advantage pushes: beyond `high` where that is positive,
    beyond `low` where it is negative.
    """
    log_ratio = _log_ratio(log_probs, old_log_probs, advantages, mask, low, high, tau)
    scale = advantages[:, None]
    gain = torch.minimum(log_ratio.exp() * scale, log_ratio.clamp(low, high).exp() * scale)
    silenced = ((log_ratio > high) & (scale > 0)) | ((log_ratio < low) & (scale < 0))
    return _loss(gain, log_ratio, mask, silenced, tau)


def _log_ratio(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float, tau: float
) -> Tensor:
    """[responses, length], 0 outside the mask."""
    if not log_probs.shape == old_log_probs.shape == mask.shape or advantages.shape != log_probs.shape[:1]:
        shapes = [list(tensor.shape) for tensor in (log_probs, old_log_probs, mask, advantages)]
        raise ValueError(f"log-probabilities and mask are [responses, length], advantages [responses], got {shapes}")
    if mask.dtype != torch.bool or not low < 0 < high or tau < 0:
        raise ValueError(f"a bool mask, low < 0 < high and tau >= 0, got {mask.dtype}, {low}, {high} and {tau}")
    # Not a product with the mask: outside it there may be infinities.
    return torch.where(mask, log_probs - old_log_probs.detach(), 0.0)


def _loss(gain: Tensor, log_ratio: Tensor, mask: Tensor, silenced: Tensor, tau: float) -> tuple[Tensor, Stats]:
    tokens = max(int(mask.sum()), 1)
    loss = -torch.where(mask, gain - tau * log_ratio**2, 0.0).sum() / tokens
    moved = log_ratio.detach()
    sums = {"kl_k1": -moved, "kl_k3": moved.expm1() - moved, "masked": silenced, "squared_log_ratio": moved**2}
    return loss, {name: float(each.sum()) / tokens for name, each in sums.items()}


def token_log_probs(logits: Tensor, input_ids: Tensor) -> Tensor:
    """log p(token i | tokens before i), in nats: [rows, length, words], [rows, length] -> [rows, length]; entry 0 is 0.

    In float32 or better. For responses sampled at a temperature, divide the logits by it.
    """
    before, after = _at_least_float32(logits[:, :-1]), input_ids[:, 1:]
    losses = F.cross_entropy(before.flatten(0, 1), after.flatten(), reduction="none")
    return F.pad(-losses.view(after.shape), (1, 0))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Toggle:
    """Token-efficient RL: in turn `period` iterations of a budget phase, which is the first, and as many of a free one.

    In a budget phase a response longer than its prompt's budget earns 0, if the accuracy of its group is at `threshold`
    (the report's formula; its prose wants more than that) or above; below, rewards stay as they are. The budget is a
    percentile, linearly interpolated, of the lengths of the correct responses in the prompt's first group that has any.
    As in the report it then stays: shorter answers do not tighten it.

    Args:
        period: m, in iterations. threshold: λ, in 0..1. percentile: ρ, in 0..100.

    Raises:
        ValueError: one of them is outside its range.
    """

    def __init__(self, period: int, threshold: float, percentile: float):
        if period < 1 or not 0 <= threshold <= 1 or not 0 <= percentile <= 100:
            raise ValueError(
                f"period from 1, threshold in 0..1, percentile in 0..100: {period}, {threshold}, {percentile}"
            )
        self.period, self.threshold, self.percentile = period, threshold, percentile
        self.budgets: dict[str, float] = {}  # in tokens, by prompt

    def in_budget_phase(self, iteration: int) -> bool:
        """Whether an iteration, counted from 0, is in a budget phase."""
        return iteration // self.period % 2 == 0

    def rewards(
        self, iteration: int, prompt_keys: Sequence[str], correct: Tensor, rewards: Tensor, lengths: Tensor
    ) -> Tensor:
        """The rewards that count, [prompts, K]. Budgets are set in both phases.

        Args:
            prompt_keys: [prompts], by which a prompt is known again.
            correct, rewards, lengths: [prompts, K], bool, float, and in tokens.
        """
        counting = rewards.clone()
        for row, (key, right, tokens) in enumerate(zip(prompt_keys, correct.bool(), lengths, strict=True)):
            if key not in self.budgets and right.any():
                budget = np.percentile(tokens[right].cpu().numpy(), self.percentile)
                self.budgets[key] = round(float(budget), 6)  # interpolated, a length may lose its last bit
            if key in self.budgets and self.in_budget_phase(iteration) and right.double().mean() >= self.threshold:
                counting[row, tokens > self.budgets[key]] = 0
        return counting

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs, as JSON holds it."""
        return {"budgets": dict(self.budgets)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.budgets = dict(state["budgets"])
