"""Vision RL from a model that has learnt its tools, or from one that has not: runs, cached as stages.

Source: Kimi K2.5 report, section 2.3, Figure 2, Table 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from k25lite.model import K25Lite
from k25lite.training.cache import cached
from k25lite.training.examination import examine, examine_and_save
from k25lite.training.joint import FIRST_SEED, JointRun, joint_stage
from k25lite.training.rl import RLRecipe, reinforce
from k25lite.training.sandbox import Sandbox
from k25lite.training.sft import MANY, SFTRun, sft_stage, tool_tokenizer


@dataclass(frozen=True)
class RLRun:
    """One run: everything its outcome depends on.

    Args:
        name: in figures; it changes nothing else.
        start: what it begins with: a fine-tuned model; the end of another run; or, a cold start, a jointly trained model.
        questions: of each kind in the examination at the end; curve_questions: in those on the way.
    """

    name: str
    start: SFTRun | JointRun | RLRun
    recipe: RLRecipe = RLRecipe()  # noqa: RUF009  (frozen)
    questions: int = 50
    curve_questions: int = 20

    @property
    def seed(self) -> int:
        return self.start.base.seed if isinstance(self.start, SFTRun) else self.start.seed


def begin(start: SFTRun | JointRun | RLRun) -> Path:
    """The folder of the model that a run begins with."""
    if isinstance(start, RLRun):
        return rl_stage(start)
    return joint_stage(start) if isinstance(start, JointRun) else sft_stage(start)


def rl_stage(run: RLRun) -> Path:
    """The folder of a model after its run, with log, curve and examinations."""

    def build(folder: Path) -> None:
        seed = FIRST_SEED + run.seed
        torch.manual_seed(seed)
        model, words = K25Lite.from_pretrained(first), tool_tokenizer()
        model.resize_token_embeddings(len(words))  # nothing, after SFT
        every = max(run.recipe.steps // 6, 1)
        with Sandbox() as sandbox:

            def curve(model: K25Lite) -> pd.DataFrame:
                return examine(
                    model, words, sandbox, kinds=MANY, count=run.curve_questions, seed=FIRST_SEED // 2 + run.seed
                )

            points = range(0, run.recipe.steps + 1, every)
            history = reinforce(model, words, run.recipe, seed, evaluate=curve, evaluate_at=points, progress=False)
        history.save(folder)
        model.save_pretrained(folder)
        examine_and_save(model, words, run.seed, run.questions, folder)

    first = begin(run.start)
    config: dict[str, Any] = {name: value for name, value in asdict(run).items() if name not in ("name", "start")}
    return cached("rl", {"start": first.name} | config, build)


def gather(runs: Sequence[RLRun], folders: Sequence[Path]) -> dict[str, pd.DataFrame]:
    """What the runs left: log, scores, exam and families, each with the columns name and seed."""
    frames: dict[str, list[pd.DataFrame]] = {"log": [], "scores": [], "exam": [], "families": []}
    for run, folder in zip(runs, folders, strict=True):
        for name, found in frames.items():
            frame = pd.read_json(folder / f"{name}.json", precise_float=True)
            found.append(frame.assign(name=run.name, seed=run.seed))
    return {name: pd.concat(found, ignore_index=True) for name, found in frames.items()}
