"""Held-out questions of every family, asked of a model: exact match of the whole answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from k25lite.model import K25Lite
from k25lite.vision import pack
from k25lite.world.families import Document, LiteWorld
from k25lite.world.streams import expand

BATCH = 256  # questions
END = "."  # after an answer, so that the start of a longer one does not count


@dataclass(frozen=True)
class Questions:
    """Questions of one family, tokenised with their answers.

    Attributes:
        input_ids: [questions, length], padded at the end.
        targets: [questions, length]: at the places of the answer and the full stop after it their ids, else -100.
    """

    documents: Sequence[Document]
    input_ids: torch.Tensor
    targets: torch.Tensor

    def without_sight(self) -> Questions:
        """The same questions with a mid-grey in place of every picture: what can be answered without looking."""
        blank = [replace(d, media=tuple(np.full_like(item, 127) for item in d.media)) for d in self.documents]
        return replace(self, documents=blank)


def ask_all(
    world: LiteWorld, families: Sequence[str], count: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, Questions]:
    """`count` held-out questions of each family; the same seed gives the same ones."""
    questions = {}
    for family in families:
        random = Random(f"k25lite questions {family} {seed}")
        questions[family] = tokenise([world.question(family, random) for _ in range(count)], tokenizer)
    return questions


def tokenise(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Questions:
    """Each document's first prompt, and what should follow it."""
    prompts = tokenizer([expand(d.turns[0][0], iter(d.media)) for d in documents], add_special_tokens=False)[
        "input_ids"
    ]
    answers = tokenizer([f"{d.turns[0][1]} {END}" for d in documents], add_special_tokens=False)["input_ids"]
    rows = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
    targets = [torch.tensor([-100] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    return Questions(documents, pad(rows, True, tokenizer.pad_token_id), pad(targets, True, -100))


@torch.no_grad()
def exact_match(model: K25Lite, questions: Questions) -> list[bool]:
    """Whether greedy decoding would give each answer exactly, and then stop.

    One forward pass over prompt and answer tells: greedy decoding gives the answer if and only if every token of it is the
    most likely one after the tokens before it.
    """
    training = model.training
    model.eval()
    correct: list[bool] = []
    for start in range(0, len(questions.documents), BATCH):
        part = slice(start, start + BATCH)
        targets = questions.targets[part].to(model.device)
        logits = model(questions.input_ids[part].to(model.device), **vision_inputs(questions.documents[part], model))[
            "logits"
        ]
        right = (logits[:, :-1].argmax(-1) == targets[:, 1:]) | (targets[:, 1:] == -100)
        correct += right.all(1).tolist()
    model.train(training)
    return correct


def vision_inputs(documents: Sequence[Document], model: K25Lite) -> dict[str, torch.Tensor]:
    """The documents' media as `K25Lite` takes them; empty if there are none."""
    media = [item for document in documents for item in document.media]
    if not media:
        return {}
    pixel_values, grid_thw = pack(media, model.vision_tower.config)
    return {"pixel_values": pixel_values.to(model.device), "grid_thw": grid_thw}


def scores(model: K25Lite, questions: Mapping[str, Questions]) -> pd.DataFrame:
    """Exact matches counted: one row per family and kind of question, with the columns family, kind, correct, asked."""
    rows = [
        (family, document.kind, correct)
        for family, asked in questions.items()
        for document, correct in zip(asked.documents, exact_match(model, asked), strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["family", "kind", "correct"])
    return frame.groupby(["family", "kind"], as_index=False).correct.agg(correct="sum", asked="size")


def blind_guess(questions: Questions) -> float:
    """Accuracy of the best constant answer to each kind of question: what a model can reach that looks at nothing else."""
    frame = pd.DataFrame([(d.kind, d.turns[0][1]) for d in questions.documents], columns=["kind", "answer"])
    return float(frame.groupby("kind").answer.agg(lambda answers: answers.value_counts().iloc[0]).sum() / len(frame))
