"""Zero-vision SFT and the fine-tunings it is held against: demonstrations of tools, told, shown, or both.

Source: Kimi K2.5 report, section 2.2. Every arm begins with the same jointly trained model and consumes equally many rows,
of which the same share is replayed from the text that the model was trained on, against forgetting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from k25lite.model import K25Lite
from k25lite.processing import build_tokenizer
from k25lite.training.cache import cached
from k25lite.training.examination import examine_and_save
from k25lite.training.joint import CONTEXT, FIRST_SEED, ROWS_PER_STEP, JointRun, joint_stage
from k25lite.training.loop import Recipe, train
from k25lite.training.schedules import LearningRate
from k25lite.training.tasks import KINDS, PROGRAM_WORDS, make_task
from k25lite.world.families import Document, LiteWorld, vocabulary
from k25lite.world.streams import TEXT_MIX, documents, make_rows

FEW = ("count colour", "what")  # the kinds of a small set of vision trajectories
NEVER = ("count not", "character")  # in no SFT at all
MANY = tuple(kind for kind in KINDS if kind not in NEVER)


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
    """One fine-tuning: everything its outcome depends on, beside the joint run it begins with.

    Args:
        rows: to learn from, of 64 tokens. replay: the share of them that is text of the joint training.
        questions: of each kind, and of each family, that the model is examined with in the end.
    """

    name: str
    arm: Arm
    base: JointRun
    rows: int = 8_000
    questions: int = 50
    replay: float = 0.25
    recipe: Recipe = Recipe(LearningRate(3e-3), trained_scale=0.3)  # noqa: RUF009  (frozen)


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
        examine_and_save(model, words, run.base.seed, run.questions, folder)

    base = joint_stage(run.base)
    config = {"base": base.name, **{name: value for name, value in asdict(run).items() if name not in ("name", "base")}}
    return cached("sft", config, build)
