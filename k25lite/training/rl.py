"""Reinforcement learning on questions about pictures, told or shown, that a model works on with programs.

Source: Kimi K2.5 report, section 2.3 and Figure 2: outcome rewards, the objective of `objective.py`, MuonClip, tasks
grouped by ability and not by modality. Simplified here: one process, and rollouts that wait for the last of their batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from k25lite.model import K25Lite
from k25lite.training.loop import History, Recipe, Saver, fingerprint, make_optimiser, precision
from k25lite.training.objective import Toggle, advantages, policy_loss, ppo_loss, token_log_probs
from k25lite.training.rewards import box_f1, count_closeness, count_exact, edit_similarity
from k25lite.training.rollout import Prompt, Rollout, roll_out
from k25lite.training.sandbox import Sandbox
from k25lite.training.schedules import LearningRate
from k25lite.training.tasks import ABILITIES, Task, make_task
from k25lite.vision import pack
from k25lite.world.streams import media_tokens

ROWS_AT_ONCE = 32  # rollouts of similar length


@dataclass(frozen=True)
class RLRecipe:
    """How to learn from rewards.

    Args:
        prompts: in a step, equally many of each ability; samples: K, the responses to each.
        pool: questions there are of each ability; they come again.
        shown: the share of questions that come with their picture; the others are told.
        low, high, tau: of the objective; clip: "mask" for the report's, "ppo" for the one-sided clip, "none" for neither.
        reuse: updates on each batch of rollouts; from the second one on it is stale.
        hedging: pay counts by their closeness, which can be hacked, and not only exact ones.
        toggle: period, threshold and percentile of `Toggle`; None for no budgets.
    """

    steps: int = 40
    prompts: int = 36
    samples: int = 8
    pool: int = 200
    shown: float = 1.0
    temperature: float = 1.0
    low: float = -0.7
    high: float = 0.7
    tau: float = 0.05
    clip: Literal["mask", "ppo", "none"] = "mask"
    reuse: int = 1
    hedging: bool = False
    toggle: tuple[int, float, float] | None = None
    update: Recipe = Recipe(LearningRate(1e-3), trained_scale=0.3)  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        rules = {
            "steps": self.steps >= 1,
            "prompts": self.prompts >= 1 and self.prompts % len(ABILITIES) == 0,  # equally many of each ability
            "samples": self.samples >= 2,
            "pool": self.pool >= self.prompts // len(ABILITIES),  # a step's worth
            "shown": 0 <= self.shown <= 1,
            "temperature": 0 < self.temperature < math.inf,
            "low": self.low < 0,
            "high": self.high > 0,
            "tau": self.tau >= 0,
            "clip": self.clip in ("mask", "ppo", "none"),
            "reuse": self.reuse >= 1,
        }
        if wrong := [f"{name} = {getattr(self, name)!r}" for name, holds in rules.items() if not holds]:
            raise ValueError(f"a recipe of RL cannot have {', '.join(wrong)}")


@dataclass(frozen=True)
class Question:
    """A task to learn from, perhaps with its picture, and the true answer."""

    key: str
    task: Task
    prompt: Prompt
    truth: str


@dataclass
class RLHistory(History):
    """As any training's, with another log.

    Attributes:
        log: one row per step: reward (before Toggle), accuracy, length (tokens written per rollout), programs (share of
            rollouts that ran one), entropy [nats per token], the figures of the objective, gradient_norm, tokens written,
            flops, and the seconds that rollout, reward and update took.
    """


@dataclass
class Batch:
    """Rollouts to learn from.

    Attributes:
        input_ids: [rollouts, length], padded at the end. written: [rollouts, length] bool, what the policy wrote.
        old_log_probs: [rollouts, length], in nats. advantages: [rollouts].
        pictures: of the prompts, None where there is none; each has equally many rollouts here, one after another.
        share: of all tokens written in the step, those here.
    """

    input_ids: Tensor
    written: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    pictures: list[np.ndarray | None]
    share: float

    @classmethod
    def of(
        cls, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], gains: Tensor, pad: int, all_of_them: bool = False
    ) -> Batch | None:
        """The rollouts of groups whose advantages are not all zero; None if there are none.

        While the policy is the one that wrote them the others have no gradient. `all_of_them` keeps these beside, for what
        is used again.

        Args:
            gains: [prompts, K], advantages.
        """
        samples = gains.shape[1]
        kept = [index for index, gain in enumerate(gains) if all_of_them or gain.any()]
        chosen = [rollout for index in kept for rollout in rollouts[index * samples : (index + 1) * samples]]
        if not gains.any():  # Muon would scale up the rounding of no gradient at all
            return None
        length = max(len(rollout.ids) for rollout in chosen)

        def padded(values: Sequence[Sequence[Any]], fill: Any) -> Tensor:
            return torch.tensor([[*row, *[fill] * (length - len(row))] for row in values])

        return cls(
            padded([rollout.ids for rollout in chosen], pad),
            padded([rollout.written for rollout in chosen], False),
            padded([rollout.log_probs for rollout in chosen], 0.0),
            gains[kept].flatten(),
            [prompts[index].picture for index in kept],
            sum(rollout.length for rollout in chosen) / sum(rollout.length for rollout in rollouts),
        )

    def log_probs(self, model: K25Lite, temperature: float = 1.0) -> Tensor:
        """What the model holds of the tokens now, [rollouts, length] in nats, with gradients; 0 at padding.

        Rollouts of similar length go through the model together: one that went astray is three times as long as most.
        """
        vision = self._vision(model)
        samples = len(self.input_ids) // len(self.pictures)
        lengths = (self.written * torch.arange(1, self.written.shape[1] + 1)).amax(1)  # the last token is a written one
        order = lengths.argsort(stable=True)
        found = []
        for rows in order.split(ROWS_AT_ONCE):
            ids = self.input_ids[rows, : int(lengths[rows].max())].to(model.device)
            seen = torch.cat([vision[row // samples] for row in rows.tolist()]) if vision else None
            logits = model(ids, vision_embeds=seen).logits / temperature
            media = torch.arange(logits.shape[-1], device=logits.device) == model.config.media_token_id
            log_probs = token_log_probs(logits.masked_fill(media, -math.inf), ids)  # it could not be written
            found.append(F.pad(log_probs, (0, self.input_ids.shape[1] - log_probs.shape[1])))
        return torch.cat(found)[order.argsort()]

    def _vision(self, model: K25Lite) -> list[Tensor]:
        """The vision tokens of each prompt, whose picture is seen once, whatever was written; nothing if none has one."""
        shown = [picture[None] for picture in self.pictures if picture is not None]
        if not shown:
            return []
        pixel_values, grid_thw = pack(shown, model.vision_tower.config)
        seen = model.encode_vision(pixel_values.to(model.device), grid_thw)
        parts = iter(seen.split([media_tokens(picture) for picture in shown]))
        return [seen[:0] if picture is None else next(parts) for picture in self.pictures]


def make_pool(recipe: RLRecipe, seed: int) -> dict[str, list[Question]]:
    """Of each ability the questions to learn from; none has the content of a test."""
    random = Random(f"k25lite RL pool {seed}")
    pool: dict[str, list[Question]] = {}
    for ability, kinds in ABILITIES.items():
        pool[ability] = []
        for index in range(recipe.pool):
            task = make_task(random.choice(kinds), random, False)
            picture, truth = task.draw(random)
            shown = random.random() < recipe.shown
            prompt = Prompt(task.question, task.content, picture if shown else None)
            pool[ability].append(Question(f"{ability} {index}", task, prompt, truth if shown else task.answer))
    return pool


def reward(question: Question, answer: str, hedging: bool = False) -> float:
    """0 to 1 for an answer: by count, by overlap, by edit distance, or all or nothing."""
    kind, truth = question.task.kind, question.truth
    if kind == "box":
        return box_f1(answer, [[int(side) for side in truth.split(" , ")]])
    if kind.startswith("count"):
        return (count_closeness if hedging else count_exact)(answer, int(truth))
    if kind == "read":
        return edit_similarity(answer, truth)
    return float(question.task.is_right(answer, truth))


def reinforce(
    model: K25Lite,
    words: PreTrainedTokenizerBase,
    recipe: RLRecipe,
    seed: int,
    *,
    evaluate: Callable[[K25Lite], pd.DataFrame] | None = None,
    evaluate_at: Collection[int] = (),
    checkpoints: Path | None = None,
    checkpoint_every: int = 5,
    progress: bool = True,
) -> RLHistory:
    """Train `model` in place.

    Every step's questions and its dice follow from seed and step, so that a resumed training goes on as if never stopped.

    Args:
        evaluate: called with the model before each step of `evaluate_at` (the number of steps: after the last).
        checkpoints: a folder to resume from, if it holds this very training, and to leave checkpoints in.

    Raises:
        ValueError: the checkpoint is of another training, or there is no room for checkpoints. OSError: the disk filled.
    """
    accelerator = Accelerator(mixed_precision=precision(), project_dir=checkpoints)
    toggle = Toggle(*recipe.toggle) if recipe.toggle else None
    optimiser = make_optimiser(model, recipe.update)
    wrapped, optimiser = accelerator.prepare(model.train(), optimiser)
    if toggle:
        accelerator.register_for_checkpointing(toggle)
    saver = Saver(checkpoints, accelerator, fingerprint([asdict(recipe), seed], model)) if checkpoints else None
    first, log, scores = saver.resume() if saver else (0, [], [])
    pool = make_pool(recipe, seed)
    with Sandbox() as sandbox:
        for step in tqdm(range(first, recipe.steps), leave=False, mininterval=1.0, disable=not progress):
            if evaluate and step in evaluate_at:
                scores += evaluate(model).assign(step=step).to_dict("records")
            start = time.perf_counter()
            questions = _questions(pool, recipe, seed, step)
            with accelerator.autocast():  # as in `update`: both are to see alike
                rollouts = roll_out(
                    model,
                    words,
                    [question.prompt for question in questions],
                    sandbox,
                    samples=recipe.samples,
                    temperature=recipe.temperature,
                    generator=torch.Generator().manual_seed(seed * 1_000_003 + step),
                )
            rolled = time.perf_counter()
            earned, correct = _judge(questions, rollouts, recipe)
            lengths = torch.tensor([float(rollout.length) for rollout in rollouts]).view(earned.shape)
            counting = earned
            if toggle:
                keys = [question.key for question in questions]
                counting = toggle.rewards(step, keys, correct, earned, lengths)
            gains = advantages(counting)
            judged = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = recipe.update.learning_rate((step + 1) / recipe.steps) * group.get("lr_scale", 1.0)
            prompts = [question.prompt for question in questions]
            batch = Batch.of(prompts, rollouts, gains, words.pad_token_id, recipe.reuse > 1)
            for _ in range(recipe.reuse):
                figures = update(accelerator, wrapped, optimiser, batch, recipe)
            tokens = int(lengths.sum())
            log.append(
                {
                    "step": step,
                    "reward": float(earned.mean()),
                    "accuracy": float(correct.double().mean()),
                    "length": float(lengths.mean()),
                    "programs": sum(bool(rollout.observations) for rollout in rollouts) / len(rollouts),
                    "entropy": -sum(sum(rollout.log_probs) for rollout in rollouts) / max(tokens, 1),
                    **figures,
                    "tokens": tokens,
                    "flops": flops(model, rollouts, batch, recipe.reuse),
                    "rollout_s": rolled - start,
                    "reward_s": judged - rolled,
                    "update_s": time.perf_counter() - judged,
                }
            )
            if saver and (step + 1) % checkpoint_every == 0 and step + 1 < recipe.steps:
                saver.save(step + 1, log, scores)
    if evaluate and recipe.steps in evaluate_at:
        scores += evaluate(model).assign(step=recipe.steps).to_dict("records")
    return RLHistory(pd.DataFrame(log).astype(float), pd.DataFrame(scores))


def update(
    accelerator: Accelerator,
    model: K25Lite,
    optimiser: torch.optim.Optimizer,
    batch: Batch | None,
    recipe: RLRecipe,
) -> dict[str, float]:
    """One step on a batch; the figures of the objective, over the tokens of all rollouts, and the gradient's norm."""
    names = ("kl_k1", "kl_k3", "masked", "squared_log_ratio")
    if batch is None:  # every group agrees: nothing to learn
        return dict.fromkeys((*names, "gradient_norm"), 0.0)
    optimiser.zero_grad()
    with accelerator.autocast():
        log_probs = batch.log_probs(accelerator.unwrap_model(model), recipe.temperature)
    bounds = {"low": -math.inf, "high": math.inf} if recipe.clip == "none" else {"low": recipe.low, "high": recipe.high}
    device = log_probs.device
    loss, figures = (ppo_loss if recipe.clip == "ppo" else policy_loss)(
        log_probs,
        batch.old_log_probs.to(device),
        batch.advantages.to(device),
        batch.written.to(device),
        tau=recipe.tau,
        **bounds,
    )
    accelerator.backward(loss * batch.share)
    norm = accelerator.clip_grad_norm_(model.parameters(), recipe.update.clip)
    optimiser.step()
    return {name: figures[name] * batch.share for name in names} | {"gradient_norm": float(norm)}


def flops(model: K25Lite, rollouts: Sequence[Rollout], batch: Batch | None, reuse: int = 1) -> float:
    """Of a step, by the usual estimate: 2 operations per parameter and token read or written, 6 per token learnt from."""
    parameters = sum(parameter.numel() for parameter in model.language_model.parameters())
    learnt = 0 if batch is None else batch.input_ids.numel() * reuse
    return 2.0 * parameters * sum(len(rollout.ids) for rollout in rollouts) + 6.0 * parameters * learnt


def _questions(pool: Mapping[str, Sequence[Question]], recipe: RLRecipe, seed: int, step: int) -> list[Question]:
    """Equally many of each ability, no question again before all others of its ability have come."""
    each = recipe.prompts // len(ABILITIES)
    found = []
    for ability, questions in pool.items():
        for place in range(step * each, (step + 1) * each):
            order = list(range(len(questions)))
            Random(f"k25lite RL order {seed} {ability} {place // len(order)}").shuffle(order)
            found.append(questions[order[place % len(order)]])
    return found


def _judge(questions: Sequence[Question], rollouts: Sequence[Rollout], recipe: RLRecipe) -> tuple[Tensor, Tensor]:
    """Rewards and whether each answer is right, [prompts, K]."""
    answers = [
        (question, rollout.answer)
        for question, mine in zip(questions, _groups(rollouts, recipe.samples), strict=True)
        for rollout in mine
    ]
    earned = torch.tensor([reward(question, answer, recipe.hedging) for question, answer in answers])
    right = torch.tensor([question.task.is_right(answer, question.truth) for question, answer in answers])
    return earned.view(-1, recipe.samples), right.view(-1, recipe.samples)


def _groups(rollouts: Sequence[Rollout], samples: int) -> list[Sequence[Rollout]]:
    return [rollouts[start : start + samples] for start in range(0, len(rollouts), samples)]
