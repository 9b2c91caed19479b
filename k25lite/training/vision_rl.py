"""Vision RL, from a model that has learnt its tools or from one that has not, and rejection sampling: cached stages.

Source: Kimi K2.5 report, section 2.3, Figure 2, Table 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from k25lite.model import K25Lite
from k25lite.training.cache import cached
from k25lite.training.examination import examine, examine_and_save
from k25lite.training.joint import CONTEXT, FIRST_SEED, ROWS_PER_STEP, JointRun, joint_stage
from k25lite.training.loop import History, train
from k25lite.training.rl import Question, RLRecipe, make_pool, reinforce
from k25lite.training.rollout import roll_out
from k25lite.training.sandbox import Sandbox
from k25lite.training.schedules import plan
from k25lite.training.sft import MANY, SFTRun, sft_stage, tool_tokenizer
from k25lite.training.tasks import ABILITIES, LONGEST_OBSERVATION, SEES
from k25lite.world.families import Document
from k25lite.world.streams import make_rows


@dataclass(frozen=True)
class RLRun:
    """One run: everything its outcome depends on.

    Args:
        name: in figures; it changes nothing else.
        start: what it begins with: a fine-tuned model; the end of another run; or, a cold start, a jointly trained model.
        questions: of each kind in the examination at the end, curve_questions: in those on the way; 0 for none.
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
    """The folder of a model after its run, with log, curve and examinations. Killed, it goes on from a checkpoint."""

    def learn(model: K25Lite, words: PreTrainedTokenizerBase, seed: int, checkpoints: Path | None) -> History:
        with Sandbox() as sandbox:

            def curve(model: K25Lite) -> pd.DataFrame:
                options: dict[str, Any] = {"count": run.curve_questions, "seed": FIRST_SEED // 2 + run.seed}
                return examine(model, words, sandbox, kinds=MANY, temperature=1.0, **options)

            points = {round(part * run.recipe.steps / 5) for part in range(6)} if run.curve_questions else ()
            options: dict[str, Any] = {"evaluate": curve, "evaluate_at": points, "checkpoints": checkpoints}
            return reinforce(model, words, run.recipe, seed, **options, progress=False)

    return _stage("rl", run, learn)


def rejection_stage(run: RLRun) -> Path:
    """The folder of a model fine-tuned on what it got right itself, with as many rollouts as the run has.

    Rejection-sampling fine-tuning: all rollouts come from the start, the right ones are learnt from as demonstrations are.
    """

    def learn(model: K25Lite, words: PreTrainedTokenizerBase, seed: int, _: Path | None) -> History | None:
        recipe = replace(run.recipe, pool=-(-run.recipe.steps * run.recipe.prompts // len(ABILITIES)))
        questions = [question for part in make_pool(recipe, seed).values() for question in part]
        with Sandbox() as sandbox:
            documents = list(successes(model, questions, sandbox, recipe, seed))
        Random(f"k25lite rejection {seed}").shuffle(documents)
        if not documents:
            return None
        # Without end, because rows are counted: each success is learnt from about once.
        rows = make_rows(cycle(documents), max(len(documents) // 2, ROWS_PER_STEP), CONTEXT, words)
        return train(model, plan(None, len(rows), 0, ROWS_PER_STEP), {"text": rows}, run.recipe.update, progress=False)

    return _stage("rejection", run, learn)


def _stage(name: str, run: RLRun, learn: Callable[..., History | None]) -> Path:
    """The folder of what `learn` (model, words, seed, checkpoints) makes of the model a run begins with, examined."""

    def build(folder: Path, checkpoints: Path | None) -> None:
        seed = FIRST_SEED + run.seed
        torch.manual_seed(seed)
        model, words = K25Lite.from_pretrained(first), tool_tokenizer()
        model.resize_token_embeddings(len(words))  # nothing, after SFT
        if history := learn(model, words, seed, checkpoints):
            history.save(folder)
        model.save_pretrained(folder)
        if run.questions:
            examine_and_save(model, words, run.seed, run.questions, folder, sights=("shown", "told"))

    first = begin(run.start)
    config: dict[str, Any] = {key: value for key, value in asdict(run).items() if key not in ("name", "start")}
    return cached(name, {"start": first.name} | config, build, resumes=True)


def successes(
    model: K25Lite, questions: Sequence[Question], sandbox: Sandbox, recipe: RLRecipe, seed: int
) -> Iterator[Document]:
    """The right ones of `recipe.samples` rollouts of each question, as demonstrations."""
    generator, words = torch.Generator().manual_seed(seed), tool_tokenizer()
    for start in range(0, len(questions), recipe.prompts):
        part = questions[start : start + recipe.prompts]
        prompts = [question.prompt for question in part]
        options: dict[str, Any] = {"samples": recipe.samples, "temperature": recipe.temperature, "generator": generator}
        for index, rollout in enumerate(roll_out(model, words, prompts, sandbox, **options)):
            question = part[index // recipe.samples]
            fits = len(rollout.ids) < CONTEXT  # <eos> comes after
            if fits and question.task.is_right(rollout.answer, question.truth):
                picture = question.prompt.picture
                seen = [" ".join([SEES, *each.text.split()[:LONGEST_OBSERVATION]]) for each in rollout.observations]
                read = [question.prompt.text, *seen]
                media = () if picture is None else (picture[None],)
                yield Document("tools", question.task.kind, tuple(zip(read, rollout.acts, strict=True)), media)


def gather(runs: Sequence[RLRun], folders: Sequence[Path]) -> dict[str, pd.DataFrame]:
    """What the runs left, all or none of them: log, scores, exam, sampled, families, with the columns name and seed."""
    frames: dict[str, list[pd.DataFrame]] = {"log": [], "scores": [], "exam": [], "sampled": [], "families": []}
    for run, folder in zip(runs, folders, strict=True):
        for name, found in frames.items():
            if (file := folder / f"{name}.json").exists():
                found.append(pd.read_json(file, precise_float=True).assign(name=run.name, seed=run.seed))
    return {name: pd.concat(found, ignore_index=True) for name, found in frames.items() if found}
