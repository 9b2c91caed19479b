"""Zero-vision SFT and the fine-tunings it is held against: demonstrations of tools, told, shown, or both.

Source: Kimi K2.5 report, section 2.2. Every arm begins with the same jointly trained model and consumes equally many rows,
of which the same share is replayed from the text that the model was trained on, against forgetting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerFast

from k25lite.model import K25Lite
from k25lite.processing import build_tokenizer
from k25lite.training.cache import cached
from k25lite.training.joint import CONTEXT, FIRST_SEED, ROWS_PER_STEP, JointRun, joint_stage
from k25lite.training.loop import Recipe, train
from k25lite.training.rollout import Prompt, roll_out
from k25lite.training.sandbox import Sandbox
from k25lite.training.schedules import LearningRate
from k25lite.training.tasks import KINDS, PROGRAM_WORDS, make_task
from k25lite.world.families import Document, LiteWorld, vocabulary
from k25lite.world.streams import TEXT_MIX, documents, make_rows

FEW = ("count colour", "what")  # the kinds of a small set of vision trajectories
NEVER = ("count not", "character")  # in no SFT at all
MANY = tuple(kind for kind in KINDS if kind not in NEVER)
Sight = Literal["shown", "blank", "swapped", "told"]


@dataclass(frozen=True)
class Arm:
    """What an SFT learns from: kinds of demonstrations in words, kinds with pictures, and the share of these."""

    told: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    share: float = 0.0

    def demonstrations(self, random: Random) -> Iterator[Document]:
        while True:
            shown = random.random() < self.share
            yield make_task(random.choice(self.shown if shown else self.told), random, False).document(random, shown)


ZERO_VISION = Arm(told=MANY)
ARMS = {
    "zero-vision": ZERO_VISION,
    "text + few vision": Arm(told=MANY, shown=FEW, share=0.2),
    "few vision": Arm(shown=FEW, share=1.0),
    "many vision": Arm(shown=MANY, share=1.0),  # as diverse as the text
    "few text": Arm(told=FEW),  # as narrow as the small vision set
}


@dataclass(frozen=True)
class SFTRun:
    """One fine-tuning: everything its outcome depends on, beside the joint run it begins with."""

    name: str
    arm: Arm
    base: JointRun
    rows: int = 2_000
    replay: float = 0.25
    recipe: Recipe = Recipe(LearningRate(1e-3), trained_scale=0.3)  # noqa: RUF009  (frozen)


@cache
def tool_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the world with the words of programs after it, so that known words keep their ids."""
    return build_tokenizer([*vocabulary(), *PROGRAM_WORDS])


def sft_stage(run: SFTRun) -> Path:
    """The folder of a fine-tuned model and its history."""

    def build(folder: Path) -> None:
        seed = FIRST_SEED + run.base.seed
        torch.manual_seed(seed)
        model = K25Lite.from_pretrained(base)
        words = tool_tokenizer()
        model.resize_token_embeddings(len(words))
        random = Random(f"k25lite SFT {seed}")
        replayed = round(run.rows * run.replay)
        rows = {
            "replay": make_rows(documents(LiteWorld(seed), TEXT_MIX, seed + 1), replayed, CONTEXT, words),
            "tools": make_rows(run.arm.demonstrations(random), run.rows - replayed, CONTEXT, words),
        }
        order: list[tuple[Any, int]] = [(stream, index) for stream, part in rows.items() for index in range(len(part))]
        random.shuffle(order)
        steps = [order[start : start + ROWS_PER_STEP] for start in range(0, len(order), ROWS_PER_STEP)]
        train(model, steps, rows, run.recipe, progress=False).save(folder)
        model.save_pretrained(folder)

    base = joint_stage(run.base)
    config = {"base": base.name, **{name: value for name, value in asdict(run).items() if name not in ("name", "base")}}
    return cached("sft", config, build)


def examine(
    model: K25Lite,
    words: PreTrainedTokenizerFast,
    sandbox: Sandbox,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    count: int = 50,
    seed: int = 0,
    sight: Sight = "shown",
) -> pd.DataFrame:
    """Held-out tasks of each kind, answered greedily; programs run on real pixels.

    Args:
        sight: what the model sees: the picture; grey; another task's picture; or the content in words. Where it is blank or
            swapped, programs run on that picture too: a right answer then comes from neither eye nor tool.

    Returns:
        One row per kind: asked, correct (exact answers), programs (rollouts that ran one), valid (whose programs all ran).
    """
    random = Random(f"k25lite examination {seed}")
    tasks = [make_task(kind, random, True) for kind in kinds for _ in range(count)]
    drawn = [task.draw(random) for task in tasks]
    shown = [picture for picture, _ in drawn]
    if sight == "blank":
        shown = [np.full_like(picture, 127) for picture in shown]
    elif sight == "swapped":  # with the next task of the kind
        shown = [shown[i + 1 if (i + 1) % count else i + 1 - count] for i in range(len(tasks))]
    prompts = [
        Prompt(task.question, task.content, None if sight == "told" else picture)
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
