"""Documents tokenised and packed into rows: the fixed text and vision streams that every training strategy consumes.

A row is as long as the context and holds whole documents of one stream. Because strategies differ in the order of the same
rows and in nothing else, their token budgets are equal by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random

import numpy as np
from transformers import PreTrainedTokenizerBase

from k25lite.world.families import Document, LiteWorld

# Shares of the documents of each stream, chosen so that every family gets a similar number of answers to learn from.
TEXT_MIX = {"text_knowledge": 0.55, "text_reasoning": 0.25, "code": 0.2}
VISION_MIX = {"vision_knowledge": 0.4, "vision_reasoning": 0.25, "ocr": 0.25, "handwriting": 0.05, "video": 0.05}
OPEN_ROWS = 16  # rows that packing keeps open: more waste less, and hold documents back longer
PIXELS_PER_TOKEN = 16  # side of the square of pixels one vision token covers: patches of 8, merged 2 x 2


@dataclass(frozen=True)
class Row:
    """One packed training row of `context` tokens.

    Attributes:
        input_ids: [context] int64, padding at the end.
        position_ids: [context] int64, starting again at 0 after each <eos>.
        labels: [context] int64: input_ids where the loss applies; -100 at media tokens, padding, and the first token of a
            document, which would be guessed from the end of another.
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


def expand(document: Document, text: str) -> str:
    """`text` of a document with a `<media>` for each vision token its marks stand for, and the clip's timestamp."""
    for item in document.media:
        pads = " ".join(["<media>"] * media_tokens(item))
        mark = min(("<image>", "<video>"), key=lambda m: text.index(m) if m in text else len(text))
        text = text.replace(mark, pads if mark == "<image>" else f"00:00:00.000 {pads}", 1)
    return text


def make_rows(documents: Iterator[Document], count: int, context: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Pack documents into `count` rows, each document into the fullest open row that still holds it.

    Raises:
        ValueError: a document is longer than a row.
    """
    rows: list[Row] = []
    open_rows: list[tuple[list[int], list[np.ndarray]]] = []  # token ids, media
    while len(rows) < count:
        batch = list(islice(documents, 512))
        texts = [expand(d, d.text if d.apart else f"{d.text} <eos>") for d in batch]
        for document, ids in zip(batch, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            if len(ids) > context:
                raise ValueError(f"a row of {context} tokens cannot hold a document of {len(ids)}: {document.text}")
            fits = [row for row in open_rows if len(row[0]) + len(ids) <= context]
            if not fits:
                fits = [([], [])]
                open_rows += fits
            row_ids, row_media = max(fits, key=lambda row: len(row[0]))
            row_ids += ids
            row_media += document.media
            if len(open_rows) > OPEN_ROWS:
                open_rows.sort(key=lambda row: len(row[0]))
                rows.append(_row(*open_rows.pop(), context, tokenizer))
    return rows[:count]


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


def _row(ids: list[int], media: list[np.ndarray], context: int, tokenizer: PreTrainedTokenizerBase) -> Row:
    input_ids = np.full(context, tokenizer.pad_token_id, np.int64)
    input_ids[: len(ids)] = ids
    # Every document ends with <eos>, so that the padding, too, begins anew.
    starts = np.flatnonzero(np.concatenate([[True], input_ids[:-1] == tokenizer.eos_token_id]))
    index = np.arange(context)
    position_ids = index - starts[np.searchsorted(starts, index, side="right") - 1]
    media_id = tokenizer.convert_tokens_to_ids("<media>")
    asked = (input_ids != media_id) & (index < len(ids)) & (position_ids > 0)
    return Row(input_ids, position_ids, np.where(asked, input_ids, -100), tuple(media), len(ids))
