"""PARL: the orchestrator learns when to work alone and when to set sub-agents to work, and they stay as they are.

Source: Kimi K2.5 report, section 3: r = λ1 · r_parallel + λ2 · r_finish + r_perf, with λ1 and λ2 annealed to zero, under a
budget of critical steps; sub-agents are frozen, and their trajectories outside the objective. The report gives no formulas
of the bonuses. Read here: r_parallel grows linearly with the sub-agents created, to 1 at `full_team`; r_finish is the share
of assigned sub-tasks that were completed, 0 if none was assigned; r_perf is the item F1 of the table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from k25lite.swarm.parl_language import Acts, Observation
from k25lite.swarm.parl_rollout import WINDOW, Rollouts, only_acts, roll_out
from k25lite.swarm.simulator import PUBLISHED, Budget, Environment, Outcome, WideSearch
from k25lite.training.loop import Recipe, make_optimiser
from k25lite.training.objective import advantages, policy_loss, token_log_probs
from k25lite.training.schedules import LearningRate


@dataclass(frozen=True)
class ParlRecipe:
    """How an orchestrator learns.

    Args:
        iterations: of rollouts and updates; tasks: in each; samples: K, the episodes of each task.
        names: of a task, at least and at most.
        parallel, finish: λ1 and λ2 in the beginning. annealed: the share of training in which they fall to zero, linearly;
            None leaves them as they are. full_team: sub-agents that earn the whole of r_parallel.
        updates: on each batch of rollouts, every one on a part of its tasks; from the second on these are stale.
        window: tokens of an episode, at most; one that is longer ends without an answer.
        low, high, tau: of the objective.
        serial: the share of demonstrations in which the orchestrator works alone. demonstrations: to begin with.
        start, update: how to learn from demonstrations, and from rewards.

    Raises:
        ValueError: one of them is out of range.
    """

    iterations: int = 40
    tasks: int = 16
    samples: int = 8
    names: tuple[int, int] = (10, 80)
    budget: Budget = PUBLISHED
    parallel: float = 2.0
    finish: float = 0.2
    annealed: float | None = 0.7
    full_team: int = 8
    updates: int = 4
    temperature: float = 1.0
    window: int = WINDOW
    low: float = -0.7
    high: float = 0.7
    tau: float = 0.05
    serial: float = 0.95
    demonstrations: int = 2048
    start: Recipe = Recipe(LearningRate(5e-3), qk_clip=None, weight_decay=0.0)  # noqa: RUF009  (frozen)
    update: Recipe = Recipe(LearningRate(2e-3), qk_clip=None, weight_decay=0.0)  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        rules = {
            "iterations": self.iterations >= 0,
            "tasks": self.tasks >= 1,
            "samples": self.samples >= 2,
            "names": 1 <= self.names[0] <= self.names[1],
            "parallel": 0 <= self.parallel < math.inf,
            "finish": 0 <= self.finish < math.inf,
            "annealed": self.annealed is None or 0 < self.annealed <= 1,
            "full_team": self.full_team >= 1,
            "updates": 1 <= self.updates <= self.tasks,
            "temperature": 0 < self.temperature < math.inf,
            "window": 2 <= self.window <= WINDOW,
            "low": self.low < 0,
            "high": self.high > 0,
            "tau": self.tau >= 0,
            "serial": 0 <= self.serial <= 1,
            "demonstrations": self.demonstrations >= PER_STEP,
        }
        if wrong := [f"{name} = {getattr(self, name)!r}" for name, holds in rules.items() if not holds]:
            raise ValueError(f"a recipe of PARL cannot have {', '.join(wrong)}")

    def bonus(self, iteration: int) -> float:
        """What is left of λ1 and λ2 in an iteration, 1 to 0."""
        return 1.0 if self.annealed is None else max(0.0, 1 - iteration / (self.annealed * self.iterations))


PER_STEP = 16  # demonstrations
TOGETHER = 16  # episodes in a forward pass with gradients
FULL = ParlRecipe()
# What each arm of the experiment goes without.
ARMS: dict[str, ParlRecipe] = {
    "PARL": FULL,
    "without r_parallel": replace(FULL, parallel=0.0),
    "without r_finish": replace(FULL, finish=0.0),
    "without both": replace(FULL, parallel=0.0, finish=0.0),
    "without annealing": replace(FULL, annealed=None),
    "total steps": replace(FULL, budget=Budget(of="total")),
}


@dataclass(frozen=True)
class Reward:
    """What an episode earned, in parts from 0 to 1."""

    parallel: float
    finish: float
    performance: float

    @classmethod
    def of(cls, outcome: Outcome, full_team: int) -> Reward:
        return cls(min(outcome.created / full_team, 1.0), outcome.finish_rate, outcome.item_f1)

    def total(self, recipe: ParlRecipe, iteration: int) -> float:
        bonus = recipe.parallel * self.parallel + recipe.finish * self.finish
        return recipe.bonus(iteration) * bonus + self.performance


def draw_tasks(names: tuple[int, int], tasks: int, samples: int, *seed: int) -> list[WideSearch]:
    """`samples` episodes of each task, one after another, each with dice of its own."""
    random = np.random.default_rng(seed)
    sizes = random.integers(names[0], names[1], tasks, endpoint=True).repeat(samples)
    return [
        WideSearch(int(size), int(dice))
        for size, dice in zip(sizes, random.integers(2**62, size=len(sizes)), strict=True)
    ]


def log_probs(model: PreTrainedModel, batch: Rollouts, temperature: float = 1.0) -> Tensor:
    """What the model holds of the acts now, [episodes, length] in nats, with gradients; −inf where something was told.

    Episodes of a length go together: one that is five times as long as the others would have them all padded.
    """
    order, length = batch.lengths.argsort(), batch.input_ids.shape[1]
    parts = []
    for rows in order.split(TOGETHER):
        part = batch[rows]
        logits = model(part.input_ids, use_cache=False).logits
        found = token_log_probs(only_acts(logits / temperature), part.input_ids)
        parts.append(pad(found, (0, length - found.shape[1]), value=-torch.inf))
    return torch.cat(parts)[order.argsort()]


def parl(
    model: PreTrainedModel, environment: Environment, recipe: ParlRecipe, seed: int, *, progress: bool = True
) -> pd.DataFrame:
    """Train `model` in place.

    Args:
        environment: where episodes take place; after the simulated one a live one may follow.

    Returns:
        One row per iteration: `iteration`; `reward`, `r_perf`, `r_parallel`, `r_finish`, `answered`, `parallelism` and the
        numbers of `own` reads, `created`, `assigned`, `critical_steps` and `total_steps`, on average over episodes;
        `finish_rate` (completed of all that was assigned), `bonus` (what is left of λ1 and λ2), `entropy` [nats per act],
        `tokens`, the figures of the objective, and the seconds that rollouts, environment and updates took.
    """
    timed = _Timed(environment)
    optimiser = make_optimiser(model, recipe.update)
    log: list[dict[str, float]] = []
    for iteration in tqdm(range(recipe.iterations), leave=False, mininterval=1.0, disable=not progress):
        tasks = draw_tasks(recipe.names, recipe.tasks, recipe.samples, seed, 4, iteration)
        start, timed.seconds = time.perf_counter(), 0.0
        dice = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
        rollouts = roll_out(model, timed, tasks, temperature=recipe.temperature, window=recipe.window, generator=dice)
        outcomes, rolled = timed.outcomes(), time.perf_counter()
        rewards = [Reward.of(outcome, recipe.full_team) for outcome in outcomes]
        earned = torch.tensor([reward.total(recipe, iteration) for reward in rewards]).view(-1, recipe.samples)
        figures = learn(model, optimiser, rollouts, advantages(earned), recipe, seed, iteration)
        log.append(
            {
                "iteration": iteration,
                "reward": float(earned.mean()),
                "r_perf": _mean(reward.performance for reward in rewards),
                "r_parallel": _mean(reward.parallel for reward in rewards),
                "r_finish": _mean(reward.finish for reward in rewards),
                **averages(outcomes),
                "bonus": recipe.bonus(iteration),
                "entropy": rollouts.entropy,
                **figures,
                "tokens": int(rollouts.lengths.sum()),
                "rollout_s": rolled - start - timed.seconds,
                "environment_s": timed.seconds,
                "update_s": time.perf_counter() - rolled,
            }
        )
    return pd.DataFrame(log).astype(float)


def averages(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of episodes, by name; `finish_rate` is that of all assignments together, 0 if there are none."""
    names = ("answered", "parallelism", "own", "created", "assigned", "critical_steps", "total_steps")
    assigned = sum(outcome.assigned for outcome in outcomes)
    finished = sum(outcome.completed for outcome in outcomes) / max(assigned, 1)
    return {name: _mean(getattr(outcome, name) for outcome in outcomes) for name in names} | {"finish_rate": finished}


def learn(
    model: PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    rollouts: Rollouts,
    gains: Tensor,
    recipe: ParlRecipe,
    seed: int,
    iteration: int,
) -> dict[str, float]:
    """The updates of an iteration; the objective's figures, on average.

    Args:
        gains: [tasks, K], advantages.
    """
    order = torch.from_numpy(np.random.default_rng([seed, 5, iteration]).permutation(len(gains)))
    sums: dict[str, float] = dict.fromkeys(("kl_k1", "kl_k3", "masked", "squared_log_ratio", "gradient_norm"), 0.0)
    for part in order.tensor_split(recipe.updates):
        rows = (part[:, None] * recipe.samples + torch.arange(recipe.samples)).flatten()
        batch, mine = rollouts[rows], gains[part].flatten()
        now = log_probs(model, batch, recipe.temperature)
        loss, figures = policy_loss(
            now, batch.log_probs, mine, batch.written, low=recipe.low, high=recipe.high, tau=recipe.tau
        )
        norm = 0.0
        if mine.any():  # Muon would scale up the rounding of no gradient at all
            norm = descend(model, optimiser, recipe.update, loss, (iteration + 1) / recipe.iterations)
        for name, value in (figures | {"gradient_norm": norm}).items():
            sums[name] += value / recipe.updates
    return sums


class _Timed:
    """An environment, and the seconds it takes."""

    def __init__(self, environment: Environment):
        self.environment, self.seconds = environment, 0.0

    @contextmanager
    def _clock(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def begin(self, tasks: Sequence[WideSearch]) -> list[Observation]:
        with self._clock():
            return self.environment.begin(tasks)

    def step(self, acts: Mapping[int, Acts]) -> dict[int, Observation | None]:
        with self._clock():
            return self.environment.step(acts)

    def outcomes(self) -> list[Outcome]:
        return self.environment.outcomes()


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def descend(
    model: PreTrainedModel, optimiser: torch.optim.Optimizer, recipe: Recipe, loss: Tensor, progress: float
) -> float:
    """One step; the gradient's norm."""
    for group in optimiser.param_groups:
        group["lr"] = recipe.learning_rate(progress) * group.get("lr_scale", 1.0)
    optimiser.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimiser.step()
    return float(norm)
