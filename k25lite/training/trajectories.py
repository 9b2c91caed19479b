"""Look at rollouts: the picture, what the model wrote, what its programs saw, and whether the answer is right."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from k25lite.training.rollout import Prompt, Rollout

RIGHT, WRONG = "#00694E", "#A34700"
WIDTH = 34  # characters of a line
WRAP: dict[str, Any] = {"subsequent_indent": "  ", "break_on_hyphens": False}


def show_rollouts(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], truths: Sequence[str], right: Sequence[bool]
) -> Figure:
    """One column for each: the picture, or the words in its place, and below it the conversation and the truth."""
    figure, axes = plt.subplots(1, len(prompts), figsize=(3.3 * len(prompts), 2.0), squeeze=False, layout="none")
    for ax, prompt, rollout, truth, is_right in zip(axes[0], prompts, rollouts, truths, right, strict=True):
        ax.set(xticks=[], yticks=[])
        if prompt.picture is not None:
            ax.imshow(prompt.picture, interpolation="nearest")
        else:
            ax.spines[:].set_visible(False)
            ax.text(0.5, 0.5, "\n".join(prompt.content), ha="center", va="center", family="monospace", fontsize=8)
        ax.set_title(prompt.question, fontsize=9, pad=16)
        lines = []
        for act, seen in zip_longest(rollout.acts, rollout.observations):
            lines.append(textwrap.fill(f"» {act}", WIDTH, **WRAP))
            if seen is not None:
                lines.append(textwrap.fill(f"  sees {seen.text}", WIDTH, max_lines=2, **WRAP))
        ax.text(0.02, -0.08, "\n".join(lines), va="top", transform=ax.transAxes, fontsize=7.5, family="monospace")
        mark = "right" if is_right else f"wrong, it is {truth}"
        style = {"fontsize": 8, "color": RIGHT if is_right else WRONG, "fontweight": "bold"}
        ax.annotate(mark, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", **style)
    return figure


def show_group(
    tokens: Sequence[Sequence[str]],
    log_ratios: np.ndarray,
    written: np.ndarray,
    rewards: Sequence[float],
    advantages: Sequence[float],
    bounds: tuple[float, float],
) -> Figure:
    """The responses to one prompt, token by token: what became likelier, what less likely, and what the mask silences.

    Args:
        tokens: of each response, from the end of the prompt on. log_ratios: [responses, longest], in nats.
        written: [responses, longest] bool; what was read is hatched. bounds: of the log-ratio; beyond, a token is framed.
    """
    figure, ax = plt.subplots(figsize=(13, 0.42 * len(tokens) + 0.9))
    limit = max(-bounds[0], bounds[1])
    for row, (response, ratios, mine) in enumerate(zip(tokens, log_ratios, written, strict=True)):
        x = 0.0
        for token, ratio, own in zip(response, ratios, mine, strict=False):
            width = 0.55 * len(token) + 0.9
            colour = plt.get_cmap("PuOr")(0.5 + 0.4 * np.clip(ratio / limit, -1, 1)) if own else "#EDEDED"
            beyond = own and not bounds[0] <= ratio <= bounds[1]
            style = {"edgecolor": "black", "linewidth": 2} if beyond else {"edgecolor": "white", "linewidth": 1}
            read = {} if own else {"hatch": "////"}
            ax.add_patch(plt.Rectangle((x, row - 0.42), width, 0.84, facecolor=colour, **style, **read))
            ink = "white" if own and abs(ratio) > 0.7 * limit else "black"
            ax.text(x + width / 2, row, token, ha="center", va="center", fontsize=7.5, family="monospace", color=ink)
            x += width + 0.15
        ax.text(
            -1,
            row,
            f"reward {rewards[row]:.2f}   advantage {advantages[row]:+.2f}",
            ha="right",
            va="center",
            fontsize=8,
        )
    longest = max(sum(0.55 * len(token) + 1.05 for token in response) for response in tokens)
    ax.set(xlim=(-0.2, max(longest, 40)), ylim=(len(tokens) - 0.4, -0.6), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return figure
