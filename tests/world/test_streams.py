"""Rows: whole documents, kept apart, every token counted, the loss on answers alone."""

from itertools import islice
from random import Random

import numpy as np
import pytest

from k25lite.training.joint import tokenizer
from k25lite.world.families import Document, LiteWorld
from k25lite.world.streams import TEXT_MIX, VISION_MIX, captions, documents, make_rows, media_tokens, pieces


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def world():
    return LiteWorld(0)


def streams(world, words, count=30):
    return {
        "text": make_rows(documents(world, TEXT_MIX, 0), count, 64, words),
        "vision": make_rows(documents(world, VISION_MIX, 0), count, 64, words),
        "captions": make_rows(captions(world, 0), count, 64, words),
    }


def test_rows_hold_whole_documents_and_count_every_token(world, words):
    for name, rows in streams(world, words).items():
        for row in rows:
            assert row.tokens == (row.input_ids != words.pad_token_id).sum()
            assert row.input_ids[row.tokens - 1] == words.eos_token_id, "the last document is whole"
            starts = np.concatenate([[True], row.input_ids[:-1] == words.eos_token_id])
            assert ((row.position_ids == 0) == starts).all()
            assert (row.input_ids == words.convert_tokens_to_ids("<media>")).sum() == row.media_tokens
            assert words.unk_token_id not in row.input_ids, words.decode(row.input_ids)
        waste = 1 - sum(row.tokens for row in rows) / (64 * len(rows))
        assert waste < 0.06, f"{name}: {waste:.0%} of the rows are padding"


def test_the_loss_applies_to_answers_alone(world, words):
    row = make_rows(
        iter([Document("x", "x", (("17 + 25 =", "42"), ("what is top-left ?", "red-disc")))] * 600), 1, 32, words
    )[0]
    assert words.decode(row.input_ids[row.labels != -100]) == " ".join(["42 . red-disc . <eos>"] * 2)
    assert (row.labels[row.labels != -100] == row.input_ids[row.labels != -100]).all()


def test_a_document_reads_as_its_pieces(world):
    random = Random(0)
    for family in (*TEXT_MIX, *VISION_MIX):
        document = world.document(family, random)
        text = " ".join(pieces(document))
        assert text.count("<media>") == sum(media_tokens(item) for item in document.media)
        if not document.media:
            assert text == " ".join(f"{prompt} {answer} ." for prompt, answer in document.turns) + " <eos>"


def test_rows_are_the_same_after_batches_were_padded_and_cut(world):
    def rows(words):
        return [row.input_ids.tolist() for row in make_rows(documents(world, TEXT_MIX, 0), 5, 64, words)]

    words = tokenizer()
    fresh = rows(words)
    words(["17 + 25 =", "42"], padding=True, truncation=True, max_length=2)
    assert rows(words) == fresh


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(world, words):
    def rows(seed):
        return make_rows(documents(world, VISION_MIX, seed), 5, 64, words)

    for one, two in zip(rows(1), rows(1), strict=True):
        assert (one.input_ids == two.input_ids).all()
        assert all((a == b).all() for a, b in zip(one.media, two.media, strict=True))
    assert any((a.input_ids != b.input_ids).any() for a, b in zip(rows(1), rows(2), strict=True))


def test_families_come_in_the_shares_of_the_mix(world):
    drawn = [document.family for document in islice(documents(world, TEXT_MIX, 0), 4000)]
    for family, share in TEXT_MIX.items():
        assert drawn.count(family) / 4000 == pytest.approx(share, abs=0.03)


def test_documents_that_end_before_the_rows_are_full_are_refused(words):
    with pytest.raises(ValueError, match="the documents end after 0 of 1 rows"):
        make_rows(iter([Document("x", "x", (("17 + 25 =", "42"),))] * 10), 1, 32, words)


def test_a_document_longer_than_a_row_is_refused(world, words):
    with pytest.raises(ValueError, match="a row of 8 tokens cannot hold a document of"):
        make_rows(documents(world, TEXT_MIX, 0), 5, 8, words)
