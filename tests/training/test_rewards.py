"""Every reward against an independent reference; what leaves it as it is, what lowers it; and answers that are none."""

import math
from functools import cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path
from sklearn.metrics import f1_score, jaccard_score

from k25lite.processing import build_tokenizer
from k25lite.training import rewards
from k25lite.training.rewards import (
    MAX_CANVAS,
    MAX_CHARACTERS,
    MAX_CORNERS,
    MAX_ITEMS,
    box_f1,
    box_iou,
    count_closeness,
    count_exact,
    edit_distance,
    edit_similarity,
    exact,
    point_f1,
    polygon_iou,
)

BOX, SQUARE = [[2, 3, 10, 9]], [[1, 1], [9, 1], [9, 9], [1, 9]]
REWARDS = {
    "exact": lambda answer: exact(answer, "red disc"),
    "edit_similarity": lambda answer: edit_similarity(answer, "K7QZ"),
    "count_exact": lambda answer: count_exact(answer, 3),
    "count_closeness": lambda answer: count_closeness(answer, 3),
    "box_f1": lambda answer: box_f1(answer, BOX),
    "point_f1": lambda answer: point_f1(answer, [[5, 5]], 2.0),
    "polygon_iou": lambda answer: polygon_iou(answer, SQUARE, (12, 12)),
}
NUMERIC = [name for name in REWARDS if name not in ("exact", "edit_similarity")]


def say(rows):
    return ", ".join(str(number) for row in rows for number in row)


@st.composite
def boxes(draw, most=4, least=1):
    side = st.tuples(st.integers(0, 7), st.integers(1, 8)).map(lambda s: (s[0], min(s[0] + s[1], 8)))
    drawn = draw(st.lists(st.tuples(side, side), min_size=least, max_size=most))
    return [(x1, y1, x2, y2) for (x1, x2), (y1, y2) in drawn]


points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4)


def pixels(box):
    x1, y1, x2, y2 = box
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


def pixel_iou(a, b):
    return len(pixels(a) & pixels(b)) / len(pixels(a) | pixels(b))


def f1_by_hand(predicted, true, similarity):
    """Soft F1 over all one-to-one matchings, from soft precision and recall."""
    few, many = sorted((predicted, true), key=len)
    matched = max(
        sum(similarity(a, b) for a, b in zip(few, order, strict=True)) for order in permutations(many, len(few))
    )
    precision, recall = matched / len(predicted), matched / len(true)
    return 2 * precision * recall / (precision + recall) if matched else 0.0


# Boxes


@given(boxes(), boxes())
def test_box_iou_counts_pixels(a, b):
    expected = [[pixel_iou(one, other) for other in b] for one in a]
    np.testing.assert_allclose(box_iou(np.array(a, float), np.array(b, float)), expected)


@given(boxes(), boxes())
def test_box_f1_is_that_of_the_best_of_all_matchings(predicted, true):
    assert box_f1(say(predicted), true) == pytest.approx(f1_by_hand(predicted, true, pixel_iou))


@given(st.lists(st.booleans(), min_size=9, max_size=9), st.lists(st.booleans(), min_size=9, max_size=9).filter(any))
def test_box_f1_of_boxes_that_hit_or_miss_is_the_ordinary_f1(predicted, true):
    cells = [(4 * x, 4 * y, 4 * x + 3, 4 * y + 3) for x in range(3) for y in range(3)]
    pick = lambda chosen: [cell for cell, is_in in zip(cells, chosen, strict=True) if is_in]  # noqa: E731
    assert box_f1(say(pick(predicted)), pick(true)) == pytest.approx(f1_score(true, predicted, zero_division=0))


@given(boxes(), boxes(), st.randoms(use_true_random=False))
def test_box_f1_ignores_the_order(predicted, true, random):
    shuffled, shuffled_true = random.sample(predicted, len(predicted)), random.sample(true, len(true))
    assert box_f1(say(shuffled), shuffled_true) == pytest.approx(box_f1(say(predicted), true))


@given(boxes(), boxes())
def test_box_f1_is_1_for_the_truth_and_for_nothing_else(predicted, true):
    assert box_f1(say(true), true) == 1
    assert (box_f1(say(predicted), true) == 1) == (sorted(predicted) == sorted(true))


@given(boxes(), boxes(least=0), st.sampled_from([(50, 50, 60, 60), (5, 5, 2, 2), (-4, -4, 3, 3), (3, 3, 3, 3)]))
def test_a_box_that_hits_nothing_never_raises_the_score(true, predicted, wrong):
    without, with_it = box_f1(say(predicted), true), box_f1(say([*predicted, wrong]), true)
    assert with_it < without or with_it == without == 0


@given(boxes(), st.integers(1, 5))
def test_saying_a_right_box_again_lowers_the_score(true, again):
    scores = [box_f1(say([*true, *[true[0]] * extra]), true) for extra in range(again + 1)]
    assert scores == sorted(set(scores), reverse=True)
    assert scores[0] == 1


@given(boxes(most=3), boxes(most=3), boxes(most=1))
def test_one_more_box_pays_only_beyond_half_the_score(true, predicted, more):
    before, after = box_f1(say(predicted), true), box_f1(say(predicted + more), true)
    if after > before + 1e-12:
        assert max(pixel_iou(more[0], box) for box in true) > before / 2


def test_a_thousand_boxes_are_neither_looked_at_nor_forgotten():
    junk = [(0, 0, 1, 1)] * 1000
    assert box_f1(say([*BOX, *junk]), BOX) == pytest.approx(2 / 1002)
    assert box_f1(say([*junk, *BOX]), BOX) == 0, f"only the first {MAX_ITEMS} are matched"
    reversed_boxes = [(1, 1, 0, 0)] * 1000
    assert box_f1(say([*reversed_boxes, *BOX]), BOX) == pytest.approx(2 / 1002)


# Points


@given(points, points, st.floats(0.5, 10))
def test_point_f1_is_that_of_the_best_of_all_matchings(predicted, true, sigma):
    def similarity(a, b):
        return math.exp(-((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / (2 * sigma**2))

    assert point_f1(say(predicted), true, sigma) == pytest.approx(f1_by_hand(predicted, true, similarity))


@given(points, points, st.randoms(use_true_random=False))
def test_point_f1_ignores_the_order_and_is_1_for_the_truth_alone(predicted, true, random):
    score = point_f1(say(predicted), true, 2.0)
    assert point_f1(say(random.sample(predicted, len(predicted))), true, 2.0) == pytest.approx(score)
    assert (score == 1) == (sorted(predicted) == sorted(true))


def test_point_f1_by_hand():
    assert point_f1("3, 4", [[0, 0]], sigma=5.0) == pytest.approx(math.exp(-0.5)), "at a distance of σ"
    assert point_f1("3, 4", [[0, 0], [900, 900]], sigma=5.0) == pytest.approx(2 * math.exp(-0.5) / 3)


def test_more_points_than_there_are_lower_the_score():
    scores = [point_f1(say([(5, 5)] * count), [[5, 5]], 2.0) for count in (1, 2, 10, 1000)]
    assert scores == pytest.approx([1, 2 / 3, 2 / 11, 2 / 1001])
    assert point_f1(say([(500, 500)] * MAX_ITEMS + [(5, 5)]), [[5, 5]], 2.0) == 0


# Polygons


@given(boxes(most=1), boxes(most=1))
def test_polygon_iou_of_rectangles_is_that_of_boxes(predicted, true):
    corners = [[(x1, y1), (x2, y1), (x2, y2), (x1, y2)] for x1, y1, x2, y2 in (predicted[0], true[0])]
    assert polygon_iou(say(corners[0]), corners[1], (8, 9)) == pytest.approx(pixel_iou(predicted[0], true[0]))


# Between corners with one irrational part along x and another along y no edge runs through the centre of a pixel.
corner = st.tuples(*[st.integers(-2000, 14000)] * 2).map(
    lambda c: (c[0] / 1000 + 2**0.5 / 1e4, c[1] / 1000 + 3**0.5 / 1e4)
)


@settings(max_examples=60)
@given(st.lists(corner, min_size=3, max_size=6), st.lists(corner, min_size=3, max_size=6))
def test_polygon_iou_is_the_jaccard_index_of_pixels_within_even_if_the_outline_crosses_itself(predicted, true):
    centres = np.stack(np.meshgrid(np.arange(12) + 0.5, np.arange(10) + 0.5), -1).reshape(-1, 2)
    inside = [Path([*each, each[0]]).contains_points(centres) for each in (predicted, true)]
    if inside[1].any():
        expected = jaccard_score(inside[1], inside[0])
        assert polygon_iou(say(predicted), true, (10, 12)) == pytest.approx(expected)


@given(st.integers(0, 3), st.booleans())
def test_polygon_iou_does_not_depend_on_where_an_outline_begins_or_which_way_it_runs(start, backwards):
    outline = [[1, 1], [9, 2], [8, 8], [2, 9]]
    same = (outline[start:] + outline[:start])[:: -1 if backwards else 1]
    assert polygon_iou(say(same), outline, (12, 12)) == 1


def test_polygon_iou_sees_only_the_canvas():
    everywhere = [[-(10**8), -(10**8)], [10**8, -(10**8)], [10**8, 10**8], [-(10**8), 10**8]]
    assert polygon_iou(say(everywhere), SQUARE, (12, 12)) == pytest.approx(64 / 144)
    assert polygon_iou(say([(x + 100, y) for x, y in SQUARE]), SQUARE, (12, 12)) == 0


def test_polygon_iou_wants_three_to_so_many_corners():
    assert polygon_iou("1.5, 1.5, 8.5, 8.5", SQUARE, (12, 12)) == 0
    for corners, score in ((MAX_CORNERS, 1), (MAX_CORNERS + 1, 0)):
        along_the_top = [(1 + 8 * i / corners, 1) for i in range(corners - 3)]
        assert polygon_iou(say([*along_the_top, *SQUARE[1:]]), SQUARE, (12, 12)) == score


# Text and counts


@cache
def distance_by_recursion(a, b):
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance_by_recursion(a[1:], b[1:])
    return 1 + min(
        distance_by_recursion(a[1:], b), distance_by_recursion(a, b[1:]), distance_by_recursion(a[1:], b[1:])
    )


@given(st.text("abé", max_size=7), st.text("abé", max_size=7))
def test_edit_distance_is_the_least_of_all_ways(a, b):
    assert edit_distance(a, b) == distance_by_recursion(a, b) == edit_distance(b, a)


def test_edit_similarity_by_hand():
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity("  K7  QZ\n", "K7 QZ") == 1
    assert edit_similarity("k7qz", "K7QZ") == pytest.approx(0.25), "case counts"
    assert edit_similarity("xxxx", "K7QZ") == 0


def test_edit_similarity_of_endless_text_is_0():
    assert edit_similarity("a" * MAX_CHARACTERS, "a" * MAX_CHARACTERS) == 1
    assert edit_similarity("a" * (MAX_CHARACTERS + 1), "a" * MAX_CHARACTERS) == 0


@given(st.text(min_size=1).filter(str.strip))
def test_exact_forgives_white_space_alone(text):
    assert exact(f"\n {text}\t ", text) == 1
    assert exact("  ".join(text.split()), text) == 1
    assert exact(text + "x", text) == 0
    assert edit_similarity(text, text) == 1


@given(st.integers(0, 30), st.integers(0, 30))
def test_counts(answer, truth):
    assert count_exact(f"{answer} .", truth) == (answer == truth)
    assert count_closeness(str(answer), truth) == pytest.approx(max(0, 1 - abs(answer - truth) / max(truth, 1)))


def test_closeness_pays_a_hedge_and_exactness_does_not():
    belief = {4: 0.4, 5: 0.2, 6: 0.4}

    def expected(reward):
        return {said: sum(share * reward(str(said), truth) for truth, share in belief.items()) for said in belief}

    closeness, exactness = expected(count_closeness), expected(count_exact)
    assert max(closeness, key=closeness.get) == 5, "the count believed least"
    assert min(exactness, key=exactness.get) == 5


@pytest.mark.parametrize("several", ["2 or 3", "2, 3, 4", "2 3", "3 3", "1.5 3"])
def test_several_counts_are_none(several):
    assert count_exact(several, 3) == count_closeness(several, 3) == 0


def test_a_count_is_whole():
    assert count_exact("2.5", 2) == count_closeness("2.5", 2) == 0
    assert count_exact("2.0", 2) == 1


# How answers are read


@pytest.mark.parametrize(
    "answer",
    [
        "2 3 10 9",
        "[2, 3, 10, 9]",
        "(2,3),(10,9)",
        "box: 2.0, 3.0, 1e1, 9",
        "2-3-10-9",
        "2 - 3 - 10 - 9",
        "２ 2 3 10 9 .",
    ],
)
def test_four_numbers_are_a_box_however_they_are_set(answer):
    assert box_f1(answer, BOX) == 1


@pytest.mark.parametrize("negative", ["-3", "- 3", "−3", "is - 3 .", "(-3)"])
def test_a_negative_number_is_not_taken_for_its_amount(negative):
    assert count_exact(negative, 3) == count_closeness(negative, 3) == 0
    assert point_f1(f"{negative}, 4", [[-3, 4]], 1.0) == 1


def test_what_the_tokenizer_of_k25lite_does_to_numbers_is_borne():
    words = build_tokenizer([*"0123456789,.-"])
    back = lambda text: words.decode(words(text)["input_ids"])  # noqa: E731
    boxes = [[2, 30, 10, 64], [0, 0, 7, 12]]
    assert box_f1(back(say(boxes)), boxes) == 1
    assert count_exact(back("12 ."), 12) == 1
    assert point_f1(back("-3, 14"), [[-3, 14]], 1.0) == 1


# What is no answer

malformed = [
    *(
        "",
        " ",
        "\n",
        ".",
        "-",
        "nan",
        "inf",
        "nan nan nan nan",
        "2 3 10 nan",
        "2, 3, 10, 9, -inf",
        "nan 2 3 10 9",
        "2 3 10",
        "2 3 10 9 7",
    ),
    *("1e999 0 5 5", "9" * 5000, "0 0 5 1" + "0" * 400, "10 9 2 3", "-10 -9 -2 -3", "2 3 2 9", "ınf", "İnf nan", "٣"),
    *("\ud800", "\x00", "²³", "½", None),
]


@pytest.mark.parametrize("answer", malformed)
@pytest.mark.parametrize("name", ["box_f1", "count_exact", "count_closeness", "exact"])
def test_what_is_malformed_scores_0(name, answer):
    assert REWARDS[name](answer) == 0


@pytest.mark.parametrize("answer", [3, 2.5, b"3", ["2"], {"count": 3}])
@pytest.mark.parametrize("name", REWARDS)
def test_what_is_not_even_text_scores_0(name, answer):
    assert REWARDS[name](answer) == 0


numbers = st.one_of(st.integers(), st.integers(-20, 20), st.floats(), st.floats(-20, 20)).map(str)
anything = st.one_of(
    st.none(),
    st.text(),
    st.text("0123456789.,-−+eE nNaAiIfFıİ[]()\n", max_size=60),
    st.lists(numbers, max_size=40).map(", ".join),
    st.lists(numbers, max_size=40).map(" ".join),
)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", REWARDS)
@given(answer=anything)
def test_no_answer_raises_and_every_reward_is_in_0_to_1(name, answer):
    score = REWARDS[name](answer)
    assert type(score) is float
    assert 0 <= score <= 1


@pytest.mark.parametrize("name", NUMERIC)
@given(answer=st.text().filter(lambda text: not set(text) & set("0123456789")))
def test_text_without_digits_scores_0(name, answer):
    assert REWARDS[name](answer) == 0


@pytest.mark.parametrize(
    ("reward", "arguments"),
    [
        (exact, (" ",)),
        (edit_similarity, ("",)),
        (edit_similarity, ("a" * (MAX_CHARACTERS + 1),)),
        (count_exact, (-1,)),
        (count_closeness, (-1,)),
        (box_f1, ([],)),
        (box_f1, ([[5, 5, 2, 2]],)),
        (box_f1, ([[1, 2, 3]],)),
        (box_f1, ([[0, 0, 1, math.nan]],)),
        (point_f1, ([], 1.0)),
        (point_f1, ([[-math.inf, 1]], 1.0)),
        (point_f1, ([[1, 1]], 0.0)),
        (point_f1, ([[1, 1]], math.nan)),
        (polygon_iou, ([[0, 0], [1, 1]], (8, 8))),
        (polygon_iou, ([[20, 20], [30, 20], [30, 30]], (8, 8))),
        (polygon_iou, (SQUARE, (8, MAX_CANVAS + 1))),
        (polygon_iou, (SQUARE, (0, 8))),
    ],
)
def test_a_truth_that_cannot_be_is_a_mistake_in_the_data(reward, arguments):
    with pytest.raises(ValueError, match=r"truth|true|count|sigma|sides"):
        reward("1, 1, 2, 2", *arguments)


def test_every_reward_of_the_module_is_fuzzed_here():
    public = {name for name, value in vars(rewards).items() if getattr(value, "__module__", "") == rewards.__name__}
    assert {n for n in public if not n.startswith("_")} - {"box_iou", "edit_distance"} == set(REWARDS)
