"""Examinations of models with tools: held-out questions of every kind, answered about real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from k25lite.model import K25Lite
from k25lite.training.evaluation import ask_all, scores
from k25lite.training.joint import FIRST_SEED
from k25lite.training.rollout import Prompt, roll_out
from k25lite.training.sandbox import Sandbox
from k25lite.training.tasks import KINDS, NEVER, make_task
from k25lite.world.families import FAMILIES, LiteWorld

Sight = Literal["shown", "blank", "swapped", "told"]
SIGHTS: tuple[Sight, ...] = ("shown", "blank", "swapped", "told")


def examine(
    model: K25Lite,
    words: PreTrainedTokenizerBase,
    sandbox: Sandbox,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    count: int = 50,
    seed: int = 0,
    sight: Sight = "shown",
    tools: bool = True,
    temperature: float = 0.0,
    samples: int = 1,
) -> pd.DataFrame:
    """Held-out tasks of each kind; programs run on real pixels.

    Args:
        sight: what the model sees: the picture; grey; another task's picture; or the content in words. Where it is blank or
            swapped, programs run on that picture too: a right answer then comes from neither eye nor tool.
        tools: whether the questions are asked as to a model with tools.
        temperature: at which to answer; 0 takes the likeliest tokens. samples: answers to each question.

    Raises:
        ValueError: one question of each kind, to be swapped.

    Returns:
        One row per kind, its answers counted: asked, correct (exact), programs (that ran one), valid (whose programs all
        ran).
    """
    if sight == "swapped" and count < 2:
        raise ValueError("pictures are swapped within a kind: ask two questions or more of each")
    random = Random(f"k25lite examination {seed}")
    tasks = [make_task(kind, random, True) for kind in kinds for _ in range(count)]
    drawn = [task.draw(random) for task in tasks]
    shown = [picture for picture, _ in drawn]
    if sight == "blank":
        shown = [np.full_like(picture, 127) for picture in shown]
    elif sight == "swapped":  # with the next task of the kind
        shown = [shown[i + 1 if (i + 1) % count else i + 1 - count] for i in range(len(tasks))]
    prompts = [
        Prompt(task.question, task.content, None if sight == "told" else picture, tools)
        for task, picture in zip(tasks, shown, strict=True)
    ]
    dice = torch.Generator().manual_seed(seed)
    rollouts = roll_out(model, words, prompts, sandbox, samples=samples, temperature=temperature, generator=dice)
    found = []
    for number, rollout in enumerate(rollouts):
        task, (_, truth) = tasks[number // samples], drawn[number // samples]
        right = task.is_right(rollout.answer, task.answer if sight == "told" else truth)
        ran = [seen.ok for seen in rollout.observations]
        found.append((task.kind, right, bool(ran), bool(ran) and all(ran)))
    frame = pd.DataFrame(found, columns=["kind", "correct", "programs", "valid"])
    counted = frame.groupby("kind", as_index=False)[["correct", "programs", "valid"]].sum()
    return counted.assign(asked=count * samples)


def examine_and_save(
    model: K25Lite,
    words: PreTrainedTokenizerBase,
    seed: int,
    count: int,
    folder: Path,
    *,
    tools: bool = True,
    sights: Sequence[Sight] = SIGHTS,
) -> None:
    """Leave what a model can do in a folder.

    exam.json: questions of every kind under `sights`, answered by the likeliest tokens. sampled.json: questions about
    pictures of the kinds that are trained on, three answers to each at temperature 1, as multimodal benchmarks of Kimi K2.5
    are run (Moonshot, "Best Practices for Benchmarking"; with top-p 0.95 beside). families.json: what is known without
    tools.
    """
    options: dict[str, Any] = {"count": count, "seed": FIRST_SEED + seed, "tools": tools}
    trained = [kind for kind in KINDS if kind not in NEVER]
    with Sandbox() as sandbox:
        found = [examine(model, words, sandbox, sight=sight, **options).assign(sight=sight) for sight in sights]
        sampled = examine(model, words, sandbox, kinds=trained, temperature=1.0, samples=3, **options)
    pd.concat(found).to_json(folder / "exam.json", orient="records")
    sampled.to_json(folder / "sampled.json", orient="records")
    questions = ask_all(LiteWorld(FIRST_SEED + seed), FAMILIES, 4 * count, words, FIRST_SEED + seed)
    scores(model, questions).to_json(folder / "families.json", orient="records")
