"""Outcome rewards: what a model answered, as text, against the truth.

Every reward is in [0, 1], 1 for the truth itself. No answer makes one raise: what cannot be read scores 0. A truth that
cannot be right (empty, reversed, not finite) is a mistake in the data and does raise ValueError.

Source: Kimi K2.5 report, the rewards of vision RL: rule-based outcomes; grounding by F1 with soft matching by IoU; points
by F1 with Gaussian-weighted distance under optimal matching; polygons by rasterised IoU; OCR by normalised edit distance;
counting by absolute difference.

Numbers are read wherever they stand. Ask a `K25Lite` for whole ones with commas between them: its tokenizer brings
"12, 30" back as "12 , 30", but "12 30" as "1230" and "0.5" as "0 . 5".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from skimage.draw import polygon

# So that, beyond reading its numbers, no answer takes a reward more than some tenths of a second.
MAX_ITEMS = 256  # boxes or points of an answer that are matched
MAX_CORNERS, MAX_CANVAS = 64, 512  # of a polygon, and pixels along the sides of what it is drawn on
MAX_CHARACTERS = 4096  # of a text whose edit distance is taken
MAX_NUMBER = 1e9  # beyond any picture

# A sign may stand apart from its number; midway between two numbers it is a dash. NaN and infinity are read to be refused.
NUMBER = re.compile(
    r"(?:(?<![0-9])[-−]|(?<![0-9])(?<![0-9] )[-−] )?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?|\b(?:nan|inf|infinity)\b",
    re.IGNORECASE | re.ASCII,  # in Unicode "ı" equals "i", and no float reads "ınf"
)


def exact(answer: str | None, truth: str) -> float:
    """Whether answer and truth are equal but for white space."""
    if not _words(truth):
        raise ValueError("a truth of one or more words, got none")
    return float(_words(answer) == _words(truth))


def edit_similarity(answer: str | None, truth: str) -> float:
    """1 − Levenshtein distance / length of the longer text, white space apart: OCR. Over `MAX_CHARACTERS`: 0."""
    read, true = _words(answer), _words(truth)
    if not 0 < len(true) <= MAX_CHARACTERS:
        raise ValueError(f"a truth of 1 to {MAX_CHARACTERS} characters, got {len(true)}")
    if len(read) > MAX_CHARACTERS:
        return 0.0
    return 1 - edit_distance(read, true) / max(len(read), len(true))


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of one character that turn a into b."""
    row = places = np.arange(len(b) + 1)
    letters = np.array([ord(letter) for letter in b])
    for deleted, letter in enumerate(a, start=1):
        above = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        # Insertions go from left to right along the row, each at a cost of 1: a running minimum, apart from the place.
        row = np.minimum.accumulate(np.concatenate(([deleted], above)) - places) + places
    return int(row[-1])


def count_exact(answer: str | None, truth: int) -> float:
    """Whether the only number of the answer is the true count."""
    return float(_count(answer, truth) == truth)


def count_closeness(answer: str | None, truth: int) -> float:
    """max(0, 1 − |answer − truth| / max(truth, 1)), for the only number of the answer: the report's absolute difference.

    It pays hedging: a policy that is unsure gains most by a median of what it believes (weighted by 1 / truth), even if it
    holds that very count for unlikely. `count_exact` pays best the count that it holds for most likely.
    """
    count = _count(answer, truth)
    return 0.0 if count is None else max(0.0, 1 - abs(count - truth) / max(truth, 1))


def box_f1(answer: str | None, truth_boxes: Sequence[Sequence[float]]) -> float:
    """Soft F1 of boxes x1, y1, x2, y2: true positives are the IoUs of the best one-to-one matching, summed.

    Of the answer each four numbers are a box. A box with reversed corners or a negative coordinate matches nothing but
    counts as predicted, and so does a box beyond the first `MAX_ITEMS`. A further box pays only if it adds more IoU than
    half of the F1 without it.
    """
    true, predicted = _truth(truth_boxes, 4), _rows(answer, 4)
    if not _is_box(true).all():
        raise ValueError(f"truth boxes are x1, y1, x2, y2 with 0 <= x1 < x2 and 0 <= y1 < y2, got {truth_boxes}")
    return _soft_f1(box_iou(predicted[_is_box(predicted)][:MAX_ITEMS], true), len(predicted))


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of boxes x1, y1, x2, y2: [n, 4], [m, 4] -> [n, m]."""
    corner, other_corner = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    shared = (other_corner - corner).clip(min=0).prod(-1)
    area, other_area = ((boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b))
    return shared / (area[:, None] + other_area - shared)


def point_f1(answer: str | None, truth_points: Sequence[Sequence[float]], sigma: float) -> float:
    """Soft F1 of points x, y: true positives are exp(−d² / 2σ²) of the best one-to-one matching, summed.

    Of the answer each two numbers are a point; one beyond the first `MAX_ITEMS` matches nothing but counts as predicted.

    Args:
        sigma: σ, in the units of the points.
    """
    true, predicted = _truth(truth_points, 2), _rows(answer, 2)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma is a finite distance above 0, got {sigma}")
    distance = np.linalg.norm(predicted[:MAX_ITEMS, None] - true, axis=-1)
    return _soft_f1(np.exp(-((distance / sigma) ** 2) / 2), len(predicted))


def polygon_iou(answer: str | None, truth_polygon: Sequence[Sequence[float]], size: tuple[int, int]) -> float:
    """Intersection over union of two polygons, in pixels whose centres they hold; one that crosses itself by even-odd.

    Of the answer each two numbers are a corner x, y. Fewer than three, or more than `MAX_CORNERS`, score 0.

    Args:
        size: (height, width) of the picture; what lies outside it does not count, for or against.
    """
    true, predicted = _truth(truth_polygon, 2), _rows(answer, 2)
    if not all(1 <= side <= MAX_CANVAS for side in size) or not 3 <= len(true) <= MAX_CORNERS:
        raise ValueError(
            f"sides of 1 to {MAX_CANVAS} pixels and 3 to {MAX_CORNERS} corners are needed, got {size} and {len(true)}"
        )
    mask = _fill(true, size)
    if not mask.any():
        raise ValueError(f"the true polygon holds no pixel of a canvas of {size}: {truth_polygon}")
    if not 3 <= len(predicted) <= MAX_CORNERS:
        return 0.0
    drawn = _fill(predicted, size)
    return float((mask & drawn).sum() / (mask | drawn).sum())


def _fill(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[height, width] bool. The centre of the first pixel is at (0.5, 0.5), so that a rectangle fills its area."""
    mask = np.zeros(size, bool)
    mask[polygon(corners[:, 1] - 0.5, corners[:, 0] - 0.5, size)] = True
    return mask


def _soft_f1(similarity: np.ndarray, predicted: int) -> float:
    """2PR / (P + R), where P = matched / predicted and R = matched / true, from similarities [predictions, truths]."""
    matched = similarity[linear_sum_assignment(similarity, maximize=True)].sum()
    return float(2 * matched / (predicted + similarity.shape[1]))


def _is_box(boxes: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = boxes.T
    return (x1 >= 0) & (y1 >= 0) & (x1 < x2) & (y1 < y2)


def _truth(values: Sequence[Sequence[float]], width: int) -> np.ndarray:
    rows = np.asarray(values, dtype=float)
    if rows.ndim != 2 or rows.shape[1] != width or not len(rows) or not (abs(rows) <= MAX_NUMBER).all():
        raise ValueError(f"the truth is one or more rows of {width} finite numbers, got {values}")
    return rows


def _rows(answer: str | None, width: int) -> np.ndarray:
    """The answer's numbers as [n, width]; none if they do not come out even."""
    numbers = _numbers(answer)
    return np.array(numbers if len(numbers) % width == 0 else [], dtype=float).reshape(-1, width)


def _count(answer: str | None, truth: int) -> int | None:
    """The answer's only number, if it is whole. Several would be a hedge."""
    if truth < 0:
        raise ValueError(f"a count is 0 or more, got {truth}")
    numbers = _numbers(answer)
    if len(numbers) != 1 or not numbers[0].is_integer():
        return None
    return int(numbers[0])


def _numbers(answer: str | None) -> list[float]:
    """All numbers of the answer; none if one of them is not finite, or absurdly large."""
    if not isinstance(answer, str):
        return []
    numbers = [float(re.sub(r"[-−] ?", "-", number, count=1)) for number in NUMBER.findall(answer)]
    return numbers if all(abs(number) <= MAX_NUMBER for number in numbers) else []


def _words(text: str | None) -> str:
    return " ".join(text.split()) if isinstance(text, str) else ""
