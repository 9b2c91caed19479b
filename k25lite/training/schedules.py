"""When vision enters training, in which order rows are consumed, and how the learning rate moves.

Source: Kimi K2.5 report, section 2.1 and Table 1: the total of vision and of text tokens is fixed; only the moment of
injection and the ratio after it change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Step = list[tuple[Literal["text", "vision"], int]]  # the rows of one optimiser step: (stream, index in it)
TOLERANCE = 0.005  # by which a share of rows may miss a ratio, because rows are whole


@dataclass(frozen=True)
class Mix:
    """Vision enters after the share `injection` of all rows; of the rows after it, the share `ratio` is vision.

    Raises:
        ValueError: a ratio outside (0, 1), or an injection before the start or after the end.
    """

    injection: float
    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"the vision ratio lies between 0 and 1, got {self.ratio}")
        if not 0 <= self.injection < 1:
            raise ValueError(f"vision is injected at a share of training in [0, 1), got {self.injection}")

    @property
    def vision_share(self) -> float:
        """Of all rows: the budget."""
        return self.ratio * (1 - self.injection)


# Table 1. All three spend one tenth of the budget on vision.
EARLY, MID, LATE = Mix(0.0, 0.1), Mix(0.5, 0.2), Mix(0.8, 0.5)
STRATEGIES = {"early": EARLY, "mid": MID, "late": LATE}


def plan(mix: Mix | None, text_rows: int, vision_rows: int, rows_per_step: int, after: int | None = None) -> list[Step]:
    """The order in which a strategy consumes the same rows: every text and every vision row exactly once.

    Args:
        mix: None consumes the text rows alone.
        rows_per_step: rows of one optimiser step. after: the same, once vision has been injected.

    Raises:
        ValueError: these numbers of rows do not have the shares of `mix`: the budget cannot be met.
    """
    rows: Step = [("text", i) for i in range(text_rows)]
    first = text_rows
    if mix is not None:
        total = text_rows + vision_rows
        if abs(vision_rows / total - mix.vision_share) > TOLERANCE:
            raise ValueError(
                f"{vision_rows} vision rows of {total} are a share of {vision_rows / total:.3f}; vision at "
                f"{mix.ratio:.0%} after {mix.injection:.0%} of training needs {mix.vision_share:.3f}"
            )
        # Whatever rounding does to the injection, all vision rows lie evenly in what comes after it.
        first = min(round(mix.injection * total), text_rows)
        rest = total - first
        places = {first + (2 * i + 1) * rest // (2 * vision_rows): i for i in range(vision_rows)}
        text = iter(rows)
        rows = [("vision", places[place]) if place in places else next(text) for place in range(total)]
    return _batches(rows[:first], rows_per_step) + _batches(rows[first:], after or rows_per_step)


def _batches(rows: Step, size: int) -> list[Step]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a function of the share of rows consumed, so that step sizes do not matter.

    Args:
        peak: after warm-up.
        shape: "wsd" (warm-up, stable, linear decay) or "cosine".
        warmup, decay: shares of training; decay only for "wsd".
        floor: the last learning rate, as a share of the peak.
        rewarm: share of training at which the schedule begins anew, over what is left.
    """

    peak: float
    shape: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.02
    decay: float = 0.15
    floor: float = 0.1
    rewarm: float | None = None

    def __post_init__(self) -> None:
        within = 0 <= self.warmup < 1 and 0 < self.decay <= 1 and (self.rewarm is None or 0 <= self.rewarm < 1)
        if self.peak <= 0 or not within:
            raise ValueError(
                f"a learning rate above 0, and warm-ups and a decay within training, are needed, got {self}"
            )

    def __call__(self, progress: float) -> float:
        """The learning rate after the share `progress` of all rows."""
        if self.rewarm is not None and progress >= self.rewarm:
            progress = (progress - self.rewarm) / (1 - self.rewarm)
        rising = progress / self.warmup if self.warmup else 1.0
        if self.shape == "cosine":
            passed = max(0.0, progress - self.warmup) / (1 - self.warmup)
            falling = self.floor + (1 - self.floor) * (1 + math.cos(math.pi * passed)) / 2
        else:
            falling = self.floor + (1 - self.floor) * (1 - progress) / self.decay
        return self.peak * min(1.0, rising, falling)


def rows_in(steps: Sequence[Step]) -> list[int]:
    """Rows consumed before each step, and at the end: [steps + 1]."""
    consumed = [0]
    for step in steps:
        consumed.append(consumed[-1] + len(step))
    return consumed
