"""The two pre-training stages on the Lite World: the ViT stage, then joint text-vision training, both cached.

Source: Kimi K2.5 report, section 2.1, Tables 1 and 3. The ViT stage trains the encoder by the cross-entropy of captions,
through a small language model that is then thrown away. The joint stage begins with the encoder, the projector and the word
embeddings that this left, and a fresh language model, and trains all of it; what comes trained, at a tenth of the rate.
Simplified here: the small language model is the smallest there is, a table of words, which leaves pictures where their
words are; a million tokens; no long-context stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerFast

from k25lite.model import K25Lite, K25LiteConfig
from k25lite.processing import build_tokenizer
from k25lite.training.cache import cached
from k25lite.training.evaluation import ask_all, scores
from k25lite.training.loop import Recipe, train
from k25lite.training.pool import side_by_side
from k25lite.training.schedules import LearningRate, Mix, plan
from k25lite.vision import MoonViT3DConfig
from k25lite.world.families import FAMILIES, LiteWorld, vocabulary
from k25lite.world.streams import TEXT_MIX, VISION_MIX, Row, captions, documents, make_rows

CONTEXT = 64  # tokens of a row
ROWS_PER_STEP = 10
# Seeds of worlds begin where none was looked at while sizes and rates were chosen.
FIRST_SEED = 1000


@dataclass(frozen=True)
class Budget:
    """How much each stage consumes, in rows of 64 tokens, and how many questions each family is tested with."""

    caption_rows: int
    rows: int
    questions: int
    curve_questions: int


BUDGETS = {
    "smoke": Budget(caption_rows=20, rows=100, questions=8, curve_questions=2),
    "lite": Budget(caption_rows=3_000, rows=12_000, questions=400, curve_questions=100),
    "full": Budget(caption_rows=3_000, rows=16_000, questions=400, curve_questions=100),
}


@dataclass(frozen=True)
class JointRun:
    """One run of joint training: everything its outcome depends on.

    Args:
        name: in figures; it changes nothing else.
        mix: when vision comes in, and how much; None trains on the text rows of `vision_share` alone.
        after: rows per step once vision has been injected, if not as many as before.
        vision_share: of all rows, the budget.
    """

    name: str
    seed: int
    budget: Budget
    mix: Mix | None
    vision_share: float = 0.1
    after: int | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe(LearningRate(3e-3), trained_scale=0.1))
    moe: bool = False


def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(vocabulary())


def model_config(**changes: Any) -> K25LiteConfig:
    """Two layers of width 128 each for seeing and for speaking: what the lite budgets can train."""
    shape = {"num_hidden_layers": 2, "initializer_range": 0.1, "rope_theta": 100.0}  # rows are short: fast rotations
    encoder = MoonViT3DConfig.lite(num_hidden_layers=2)
    return K25LiteConfig.lite(len(tokenizer()), vision_config=encoder, **shape | changes)


def vit_stage(seed: int, budget: Budget) -> Path:
    """The folder of an encoder trained on captions alone; its history beside it."""

    def build(folder: Path) -> None:
        torch.manual_seed(FIRST_SEED + seed)
        model = K25Lite(model_config(moe=False, num_hidden_layers=0))
        world = LiteWorld(FIRST_SEED + seed)
        rows = make_rows(captions(world, FIRST_SEED + seed), budget.caption_rows, CONTEXT, tokenizer())
        steps = plan(None, len(rows), 0, ROWS_PER_STEP)
        train(model, steps, {"text": rows}, Recipe(LearningRate(3e-3), qk_clip=None), progress=False).save(folder)
        model.save_pretrained(folder)

    return cached("vit", {"seed": seed, "caption_rows": budget.caption_rows}, build)


def joint_stage(run: JointRun) -> Path:
    """The folder of a jointly trained model: `K25Lite`, history, final scores. Killed, it goes on from a checkpoint."""

    def build(folder: Path, checkpoints: Path | None) -> None:
        captioner = K25Lite.from_pretrained(vit_stage(run.seed, run.budget))
        torch.manual_seed(FIRST_SEED + run.seed)
        model = K25Lite(model_config(moe=run.moe))
        for part in ("vision_tower", "mm_projector"):
            getattr(model, part).load_state_dict(getattr(captioner, part).state_dict())
        model.set_input_embeddings(captioner.get_input_embeddings())
        model.tie_weights()
        rows = streams(run.seed, run.budget, run.vision_share)
        text, vision = len(rows["text"]), len(rows["vision"])
        steps = plan(run.mix, text, vision, ROWS_PER_STEP, run.after)
        world = LiteWorld(FIRST_SEED + run.seed)
        curve = ask_all(world, FAMILIES, run.budget.curve_questions, tokenizer(), FIRST_SEED // 2 + run.seed)
        history = train(
            model,
            steps,
            rows,
            run.recipe,
            evaluate=lambda model: scores(model, curve),
            evaluate_at=evaluation_steps(run, len(steps), text + vision),
            checkpoints=checkpoints,
            progress=False,
        )
        history.save(folder)
        final = ask_all(world, FAMILIES, run.budget.questions, tokenizer(), FIRST_SEED + run.seed)
        blank = {family: asked.without_sight() for family, asked in final.items() if asked.documents[0].media}
        answered = [scores(model, final).assign(sight=True), scores(model, blank).assign(sight=False)]
        pd.concat(answered).to_json(folder / "final.json", orient="records")
        model.save_pretrained(folder)

    return cached("joint", {name: value for name, value in asdict(run).items() if name != "name"}, build, resumes=True)


def evaluation_steps(run: JointRun, steps: int, rows: int) -> list[int]:
    """Every tenth of training; and, where vision comes in later, closely around it, or the dip would be missed."""
    points = {round(tenth * steps / 10) for tenth in range(11)}
    if run.mix is not None and run.mix.injection > 0:
        injection = round(run.mix.injection * rows / ROWS_PER_STEP)
        points |= {injection + after for after in (0, 2, 4, 7, 10, 15, 20, 30, 50, 80)}
    return sorted(point for point in points if point <= steps)


@lru_cache(maxsize=2)
def streams(seed: int, budget: Budget, vision_share: float) -> dict[str, list[Row]]:
    """The fixed text and vision rows of a seed."""
    vision = round(budget.rows * vision_share)
    world = LiteWorld(FIRST_SEED + seed)
    return {
        name: make_rows(documents(world, mix, FIRST_SEED + seed), count, CONTEXT, tokenizer())
        for name, mix, count in (("text", TEXT_MIX, budget.rows - vision), ("vision", VISION_MIX, vision))
    }


Job = JointRun | tuple[int, Budget]  # a run, or the encoder of a seed


def run_all(runs: Sequence[JointRun], workers: int | None = None) -> dict[str, pd.DataFrame]:
    """Every run, side by side, or from the cache: log, scores and final, each with columns name and seed.

    The encoders come first, one for each seed, because all runs of a seed begin with the same. Where a core has none to
    train it begins with a run, and so trains that run's encoder as well: this costs no time, for it would have to wait.
    """
    encoders = dict.fromkeys((run.seed, run.budget) for run in runs)
    ordered: list[JointRun] = sorted(runs, key=lambda run: run.seed)  # a process then makes the rows of few seeds
    jobs: list[Job] = [*encoders, *ordered]
    side_by_side(_stage, jobs, workers=workers, title="joint training")
    folders = [joint_stage(run) for run in runs]
    frames: dict[str, list[pd.DataFrame]] = {"log": [], "scores": [], "final": []}
    for run, folder in zip(runs, folders, strict=True):
        for name, found in frames.items():
            frame = pd.read_json(folder / f"{name}.json", precise_float=True)
            found.append(frame.assign(name=run.name, seed=run.seed))
    return {name: pd.concat(found, ignore_index=True) for name, found in frames.items()}


def _stage(job: Job) -> Path:
    return joint_stage(job) if isinstance(job, JointRun) else vit_stage(*job)
