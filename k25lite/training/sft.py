"""Zero-vision SFT and the fine-tunings it is held against: demonstrations of tools, told, shown, or both.

Source: Kimi K2.5 report, section 2.2. Every arm begins with the same jointly trained model and consumes equally many rows,
of which the same share is replayed from the text that the model was trained on, against forgetting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
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
from k25lite.training.joint import BUDGETS, CONTEXT, FIRST_SEED, ROWS_PER_STEP, JointRun, joint_stage
from k25lite.training.loop import Recipe, train
from k25lite.training.schedules import STRATEGIES, LearningRate
from k25lite.training.tasks import ABILITIES, PROGRAM_WORDS, make_task
from k25lite.world.families import Document, LiteWorld, vocabulary
from k25lite.world.streams import TEXT_MIX, Row, documents, make_rows

FEW = ("count colour", "what")  # the kinds of a small set of vision trajectories
MANY = tuple(kind for kinds in ABILITIES.values() for kind in kinds)


@dataclass(frozen=True)
class Arm:
    """What an SFT learns from: kinds of demonstrations in words, kinds with pictures, and the share of these."""

    told: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    share: float = 0.0

    def demonstrations(self, random: Random) -> Iterator[Document]:
        """Without end, equally many of each ability that has a kind here."""
        while True:
            shown = random.random() < self.share
            learnt = self.shown if shown else self.told
            abilities = [mine for kinds in ABILITIES.values() if (mine := [kind for kind in kinds if kind in learnt])]
            yield make_task(random.choice(random.choice(abilities)), random, False).document(random, shown)


ARMS = {
    "no SFT": Arm(),
    "zero-vision": Arm(told=MANY),
    "text + few vision": Arm(told=MANY, shown=FEW, share=0.2),
    "few vision": Arm(shown=FEW, share=1.0),
    "many vision": Arm(shown=MANY, share=1.0),  # as diverse as the text
    "few text": Arm(told=FEW),  # as narrow as the small vision set
}


@dataclass(frozen=True)
class Size:
    """How much post-training does: rows of SFT, steps of RL, questions of each kind in an examination."""

    rows: int
    steps: int
    questions: int


SIZES = {
    "smoke": Size(rows=20, steps=2, questions=2),
    "lite": Size(rows=4_000, steps=20, questions=25),
    "full": Size(rows=8_000, steps=40, questions=50),
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
    rows: int
    questions: int
    replay: float = 0.25
    recipe: Recipe = Recipe(LearningRate(3e-3), trained_scale=0.1)  # noqa: RUF009  (frozen)


@cache
def tool_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the world with the words of programs after it, so that known words keep their ids."""
    return build_tokenizer([*vocabulary(), *PROGRAM_WORDS])


def sft_run(name: str, seed: int, profile: str, **changes: Any) -> SFTRun:
    """An arm at a profile, from the early-fusion model of a seed."""
    size = SIZES[profile]
    base = JointRun("early", seed, BUDGETS[profile], STRATEGIES["early"])
    run = SFTRun(name, ARMS[name], base, size.rows if ARMS[name] != Arm() else 0, size.questions)
    return replace(run, **changes)


def sft_rows(run: SFTRun) -> dict[str, list[Row]]:
    """What a fine-tuning learns from: replayed text, and demonstrations of tools."""
    seed, words = FIRST_SEED + run.base.seed, tool_tokenizer()
    replayed = round(run.rows * run.replay)
    return {
        "replay": make_rows(documents(LiteWorld(seed), TEXT_MIX, seed + 1), replayed, CONTEXT, words),
        "tools": make_rows(run.arm.demonstrations(Random(f"k25lite SFT {seed}")), run.rows - replayed, CONTEXT, words),
    }


def sft_stage(run: SFTRun) -> Path:
    """The folder of a fine-tuned model and its history. Killed, it goes on from a checkpoint."""

    def build(folder: Path, checkpoints: Path | None) -> None:
        seed = FIRST_SEED + run.base.seed
        torch.manual_seed(seed)
        model = K25Lite.from_pretrained(base)
        words = tool_tokenizer()
        model.resize_token_embeddings(len(words))
        if run.rows:
            rows = sft_rows(run)
            order: list[tuple[Any, int]] = [(stream, i) for stream, part in rows.items() for i in range(len(part))]
            Random(f"k25lite SFT order {seed}").shuffle(order)
            steps = [order[start : start + ROWS_PER_STEP] for start in range(0, len(order), ROWS_PER_STEP)]
            train(model, steps, rows, run.recipe, checkpoints=checkpoints, progress=False).save(folder)
        model.save_pretrained(folder)
        # Who has learnt no tools is not told of any: it is asked as in its training.
        examine_and_save(model, words, run.base.seed, run.questions, folder, tools=run.rows > 0)

    base = joint_stage(run.base)
    config = {"base": base.name, **{name: value for name, value in asdict(run).items() if name not in ("name", "base")}}
    return cached("sft", config, build, resumes=True)
