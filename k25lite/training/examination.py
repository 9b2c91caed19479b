"""Examinations of models with tools: held-out questions of every kind, answered about real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from k25lite.model import K25Lite
from k25lite.training.evaluation import ask_all, scores
from k25lite.training.joint import FIRST_SEED
from k25lite.training.rollout import Prompt, roll_out
from k25lite.training.sandbox import Sandbox
from k25lite.training.tasks import KINDS, make_task
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
) -> pd.DataFrame:
    """Held-out tasks of each kind, answered greedily; programs run on real pixels.

    Args:
        sight: what the model sees: the picture; grey; another task's picture; or the content in words. Where it is blank or
            swapped, programs run on that picture too: a right answer then comes from neither eye nor tool.
        tools: whether the questions are asked as to a model with tools.

    Raises:
        ValueError: one question of each kind, to be swapped.

    Returns:
        One row per kind: asked, correct (exact answers), programs (rollouts that ran one), valid (whose programs all ran).
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
    found = []
    for task, (_, truth), rollout in zip(tasks, drawn, roll_out(model, words, prompts, sandbox), strict=True):
        right = task.is_right(rollout.answer, task.answer if sight == "told" else truth)
        ran = [seen.ok for seen in rollout.observations]
        found.append((task.kind, right, bool(ran), bool(ran) and all(ran)))
    frame = pd.DataFrame(found, columns=["kind", "correct", "programs", "valid"])
    counted = frame.groupby("kind", as_index=False)[["correct", "programs", "valid"]].sum()
    return counted.assign(asked=count)


def examine_and_save(
    model: K25Lite, words: PreTrainedTokenizerBase, seed: int, count: int, folder: Path, *, tools: bool = True
) -> None:
    """Leave exam.json, questions of every kind under every sight, and families.json, what is known without tools."""
    with Sandbox() as sandbox:
        found = [
            examine(model, words, sandbox, count=count, seed=FIRST_SEED + seed, sight=sight, tools=tools).assign(
                sight=sight
            )
            for sight in SIGHTS
        ]
    pd.concat(found).to_json(folder / "exam.json", orient="records")
    questions = ask_all(LiteWorld(FIRST_SEED + seed), FAMILIES, 4 * count, words, FIRST_SEED + seed)
    scores(model, questions).to_json(folder / "families.json", orient="records")
