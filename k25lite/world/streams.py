"""Documents tokenised and packed into rows: the fixed text and vision streams that every training strategy consumes.

A row is as long as the context and holds whole documents of one stream. Because strategies differ in the order of the same
rows and in nothing else, their token budgets are equal by construction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

import numpy as np
from transformers import PreTrainedTokenizerFast

from k25lite.world.families import Document, LiteWorld

# Shares of the documents of each stream, chosen so that every family gets a similar number of answers to learn from.
TEXT_MIX = {"text_knowledge": 0.4, "text_reasoning": 0.4, "code": 0.2}
VISION_MIX = {"vision_knowledge": 0.3, "vision_reasoning": 0.3, "ocr": 0.1, "handwriting": 0.05, "video": 0.25}
OPEN_ROWS = 16  # rows that packing keeps open: more waste less, and hold documents back longer
PIXELS_PER_TOKEN = 16  # side of the square of pixels one vision token covers: patches of 8, merged 2 x 2


@dataclass(frozen=True)
class Row:
    """One packed training row of `context` tokens.

    Attributes:
        input_ids: [context] int64, padding at the end.
        position_ids: [context] int64, starting again at 0 after each <eos>.
        labels: [context] int64: input_ids in the answers and the signs that end them, else -100. What the questions are
            about is drawn at random, so that nothing can be learnt from predicting it.
        media: the documents' pictures and chunks in order, each [t, h, w, 3] uint8.
        tokens: how many count against a budget: all but padding.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    media: tuple[np.ndarray, ...]
    tokens: int

    @property
    def media_tokens(self) -> int:
        return sum(media_tokens(item) for item in self.media)


def media_tokens(item: np.ndarray) -> int:
    """Vision tokens of a picture or chunk [t, h, w, 3], whatever t."""
    return item.shape[1] * item.shape[2] // PIXELS_PER_TOKEN**2


def expand(text: str, media: Iterator[np.ndarray]) -> str:
    """`text` with a `<media>` for each vision token its marks stand for, items taken in order, and a clip's timestamp."""

    def pads(match: re.Match) -> str:
        tokens = " ".join(["<media>"] * media_tokens(next(media)))
        return tokens if match[0] == "<image>" else f"00:00:00.000 {tokens}"

    return re.sub("<image>|<video>", pads, text)


def pieces(document: Document) -> list[str]:
    """Prompt, answer, prompt, answer, ...: a document's text, cut where the loss begins and ends to apply."""
    media = iter(document.media)
    end = " <eos>" if document.apart else " ."
    parts = [part for prompt, answer in document.turns for part in (expand(prompt, media), answer + end)]
    return parts if document.apart else [*parts[:-1], parts[-1] + " <eos>"]


def make_rows(documents: Iterator[Document], count: int, context: int, tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    """Pack documents into `count` rows, each document into the fullest open row that still holds it.

    Raises:
        ValueError: a document is longer than a row, or there are too few documents.
    """
    rows: list[Row] = []
    open_rows: list[OpenRow] = []
    while len(rows) < count:
        batch = list(islice(documents, 512))
        if not batch:
            raise ValueError(
                f"the documents end after {len(rows)} of {count} rows and {len(open_rows)} half-filled ones"
            )
        for document in tokenised(batch, tokenizer):
            if len(document.ids) > context:
                text = tokenizer.decode(document.ids)
                raise ValueError(f"a row of {context} tokens cannot hold a document of {len(document.ids)}: {text}")
            fits = [row for row in open_rows if len(row.ids) + len(document.ids) <= context]
            if not fits:
                fits = [OpenRow([], [], [])]
                open_rows += fits
            row = max(fits, key=lambda row: len(row.ids))
            row.ids += document.ids
            row.asked += document.asked
            row.media += document.media
            if len(open_rows) > OPEN_ROWS:
                open_rows.sort(key=lambda row: len(row.ids))
                rows.append(open_rows.pop().close(context, tokenizer))
    return rows[:count]


@dataclass
class OpenRow:
    """A row being filled, or a document: token ids, whether each belongs to an answer, media."""

    ids: list[int]
    asked: list[bool]
    media: list[np.ndarray]

    def close(self, context: int, tokenizer: PreTrainedTokenizerFast) -> Row:
        input_ids = np.full(context, tokenizer.pad_token_id, np.int64)
        input_ids[: len(self.ids)] = self.ids
        # Every document ends with <eos>, so that the padding, too, begins anew.
        starts = np.flatnonzero(np.concatenate([[True], input_ids[:-1] == tokenizer.eos_token_id]))
        index = np.arange(context)
        position_ids = index - starts[np.searchsorted(starts, index, side="right") - 1]
        asked = np.array(self.asked + [False] * (context - len(self.ids)))
        return Row(input_ids, position_ids, np.where(asked, input_ids, -100), tuple(self.media), len(self.ids))


def tokenised(batch: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[OpenRow]:
    cut = [pieces(document) for document in batch]
    # The tokenizer beneath, because transformers' own takes longer to repack the ids than that takes to find them.
    every = [piece for parts in cut for piece in parts]
    beneath = tokenizer.backend_tokenizer
    beneath.no_padding()  # transformers leaves it as its last call had it
    beneath.no_truncation()
    ids = iter(beneath.encode_batch_fast(every, add_special_tokens=False))
    for document, parts in zip(batch, cut, strict=True):
        tokens = [piece.ids for piece in islice(ids, len(parts))]
        asked = [i % 2 == 1 for i, part in enumerate(tokens) for _ in part]
        yield OpenRow([token for part in tokens for token in part], asked, list(document.media))


def documents(world: LiteWorld, mix: Mapping[str, float], seed: int) -> Iterator[Document]:
    """Training documents without end, their families drawn by the shares of `mix`."""
    random = Random(f"k25lite documents {seed}")
    families, weights = list(mix), list(mix.values())
    while True:
        yield world.document(random.choices(families, weights)[0], random)


def captions(world: LiteWorld, seed: int) -> Iterator[Document]:
    """Captioned pictures and clips without end."""
    random = Random(f"k25lite captions {seed}")
    while True:
        yield world.captions(random)
