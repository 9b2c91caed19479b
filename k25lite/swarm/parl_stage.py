"""An orchestrator from nothing: demonstrations to begin with, PARL, and an examination, kept as stages.

A run takes about half a minute; one that is killed begins anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from k25lite.swarm.parl import ARMS, PER_STEP, ParlRecipe, averages, descend, draw_tasks, log_probs, parl
from k25lite.swarm.parl_language import ASSIGN, Acts, Dialogue, Script, serial, swarm
from k25lite.swarm.parl_rollout import Rollouts, make_orchestrator, roll_out
from k25lite.swarm.simulator import Environment, Record, Simulator, WideSearch
from k25lite.training.cache import cached
from k25lite.training.loop import Recipe, make_optimiser

FIRST_SEED = 2000  # of the experiment; the recipes were chosen with seeds 100 to 223
HELD_OUT = (10, 20, 40, 80, 120, 160, 200)  # names of the tasks that a run is evaluated with; training has up to 80

EPISODES = {"smoke": 4, "lite": 8, "full": 32}  # of each of these sizes, by profile


def profile_recipes(profile: str) -> dict[str, ParlRecipe]:
    """The arms of the experiment; `lite` has shorter tasks and less training, and `smoke` next to nothing."""

    def shortened(recipe: ParlRecipe) -> ParlRecipe:
        if profile == "lite":
            return replace(recipe, iterations=12, names=(10, 40), window=192, demonstrations=1024)
        if profile == "smoke":
            return replace(recipe, iterations=2, tasks=4, samples=2, names=(4, 12), demonstrations=32)
        return recipe

    return {name: shortened(recipe) for name, recipe in ARMS.items()}


def play(environment: Environment, tasks: Sequence[WideSearch], scripts: Sequence[Script]) -> list[Dialogue]:
    """What each script does in its episode."""
    dialogues = [Dialogue([observation]) for observation in environment.begin(tasks)]
    working = dict(enumerate(dialogues))
    while working:
        acts: dict[int, Acts] = {index: scripts[index](of.observations[-1]) for index, of in working.items()}
        for index, observation in environment.step(acts).items():
            working[index].steps.append(acts[index])
            if observation is None:
                del working[index]
            else:
                dialogues[index].observations.append(observation)
    return dialogues


def demonstrate(environment: Environment, recipe: ParlRecipe, seed: int) -> list[Dialogue]:
    """Mostly an orchestrator that works alone; others assign so many names to so many at a time, whatever comes of it."""
    tasks = draw_tasks(recipe.names, recipe.demonstrations, 1, seed, 1)
    random = np.random.default_rng([seed, 2])
    scripts: list[Script] = []
    for _ in tasks:
        parallel = swarm(int(random.choice([*ASSIGN.values()])), 2 ** int(random.integers(5)))
        scripts.append(serial if random.random() < recipe.serial else parallel)
    return play(environment, tasks, scripts)


def imitate(model: PreTrainedModel, dialogues: Sequence[Dialogue], recipe: Recipe) -> list[float]:
    """Learn the acts of demonstrations, each of them once, in order; the loss of each step, in nats per act."""
    optimiser = make_optimiser(model, recipe)
    parts = [dialogues[start : start + PER_STEP] for start in range(0, len(dialogues), PER_STEP)]
    losses = []
    for step, part in enumerate(parts):
        batch = Rollouts.of([dialogue.ids for dialogue in part], [dialogue.written for dialogue in part])
        loss = -log_probs(model, batch)[batch.written].mean()
        descend(model, optimiser, recipe, loss, (step + 1) / len(parts))
        losses.append(loss.item())
    return losses


def evaluate(
    model: PreTrainedModel | Script,
    environment: Environment,
    seed: int,
    sizes: Sequence[int] = HELD_OUT,
    episodes: int = 32,
) -> pd.DataFrame:
    """One row per episode of so many names: `names`, `item_f1`, and what `averages` tells; acts are sampled.

    Args:
        model: or a script in its place.
    """
    tasks = [task for size in sizes for task in draw_tasks((size, size), 1, episodes, seed, 6, size)]
    if isinstance(model, PreTrainedModel):
        roll_out(model, environment, tasks, generator=torch.Generator().manual_seed(seed))
    else:
        play(environment, tasks, [model] * len(tasks))
    return pd.DataFrame(
        {"names": task.names, "item_f1": outcome.item_f1, **averages([outcome])}
        for task, outcome in zip(tasks, environment.outcomes(), strict=True)
    ).astype(float)


@dataclass(frozen=True)
class ParlRun:
    """One training: everything its outcome depends on.

    Args:
        team, alone: the record of the frozen sub-agent, as a part of the team and on its own.
        episodes: of each of these sizes that it is evaluated with in the beginning and in the end.
    """

    name: str
    seed: int
    recipe: ParlRecipe
    team: Record
    alone: Record
    episodes: int = 32
    sizes: tuple[int, ...] = HELD_OUT

    @property
    def simulator(self) -> Simulator:
        return Simulator(self.team, self.alone, self.recipe.budget)


def profile_run(profile: str, name: str, seed: int, team: Record, alone: Record) -> ParlRun:
    """An arm of the experiment."""
    sizes = HELD_OUT[:3] if profile == "smoke" else HELD_OUT
    return ParlRun(name, seed, profile_recipes(profile)[name], team, alone, EPISODES[profile], sizes)


def parl_stage(run: ParlRun) -> Path:
    """The folder of a trained orchestrator: weights, log.json and evaluation.json."""

    def build(folder: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(start)
        save(parl(model, run.simulator, run.recipe, run.seed, progress=False), folder / "log.json")
        save(evaluate(model, run.simulator, run.seed, run.sizes, run.episodes), folder / "evaluation.json")
        model.save_pretrained(folder)

    start = cold_start_stage(run)
    return cached("parl", {"start": start.name, "seed": run.seed, "recipe": asdict(run.recipe)}, build)


def cold_start_stage(run: ParlRun) -> Path:
    """The folder of an orchestrator that has learnt from demonstrations only; arms that demonstrate alike share it.

    It holds weights, log.json and evaluation.json.
    """
    recipe = run.recipe
    simulator = Simulator(run.team, run.alone)  # a budget of its own is what an arm learns under, not what it is shown

    def build(folder: Path) -> None:
        model = make_orchestrator(run.seed)
        losses = imitate(model, demonstrate(simulator, recipe, run.seed), recipe.start)
        save(pd.DataFrame({"step": range(len(losses)), "loss": losses}), folder / "log.json")
        save(evaluate(model, simulator, run.seed, run.sizes, run.episodes), folder / "evaluation.json")
        model.save_pretrained(folder)

    demonstrated = {name: asdict(recipe)[name] for name in ("names", "serial", "demonstrations", "start")}
    records = [_digest(record) for record in (run.team, run.alone)]
    evaluated = {"sizes": run.sizes, "episodes": run.episodes}
    return cached("parl-start", {"seed": run.seed, "records": records, **demonstrated, **evaluated}, build)


def save(rows: pd.DataFrame, path: Path) -> None:
    rows.to_json(path, orient="records", double_precision=15)


def _digest(record: Record) -> str:
    """Of what a record, which is a dataclass, holds."""
    held = json.dumps(asdict(record), default=np.ndarray.tolist, sort_keys=True)  # type: ignore[call-overload]
    return hashlib.sha256(f"{type(record).__name__} {held}".encode()).hexdigest()
