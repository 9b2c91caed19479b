"""Figures in one style: seeds as points, means with 95 % t intervals, the report's numbers in a panel of their own.

The colours are those of Okabe and Ito (2008), "Color Universal Design": they stay apart for common colour blindnesses.
"""

import os
from collections.abc import Callable, Mapping, Sequence

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from k25lite.results import paired_interval

PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#666666", "#000000", "#B8A800"]
REPORT_COLOUR = "#8A8F98"


def use_theme() -> None:
    """Set the theme for every figure drawn after this call."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=PALETTE,
        rc={
            "figure.figsize": (7.0, 4.0),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#8A8F98",
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.titlesize": "medium",
            "grid.color": "#E4E5E8",
            "legend.frameon": False,
            "lines.linewidth": 2.0,
        },
    )


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the 95 % t interval of a mean, for seaborn's `errorbar`; one value gives (nan, nan), not drawn."""
    if len(values) < 2:
        return (np.nan, np.nan)
    interval = paired_interval(np.asarray(values, dtype=float))
    return (interval.low, interval.high)


def compare_arms(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    seed: str = "seed",
    order: Sequence[str] | None = None,
    colours: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Compare arms: each seed a point, paired across arms by a thin line, each arm's mean with its own 95 % t interval.

    frame: one row per arm (column `x`) and seed (column `seed`) with the measured `y`. colours: of arms, so that they have
    the same in every figure; the others take those of their places. Two overlapping intervals do not mean "no difference":
    the claim rests on the paired differences, which the thin lines show. Give `y` its unit in the column's name or by
    `ax.set_ylabel`.
    """
    ax = ax or plt.subplots()[1]
    order = list(order or dict.fromkeys(frame[x]))
    paired = frame.pivot(index=seed, columns=x, values=y)[order]
    ax.plot(range(len(order)), paired.T.to_numpy(), color="#B9BDC4", linewidth=0.9, zorder=1)
    shades = _shades(order, colours)
    sns.stripplot(
        frame, x=x, y=y, order=order, hue=x, hue_order=order, palette=shades, jitter=False, size=6, legend=False, ax=ax
    )
    for place, (arm, colour) in enumerate(shades.items()):
        values = paired[arm].dropna()
        mean, (low, high) = values.mean(), t_interval(values)
        ax.errorbar(
            place + 0.14, mean, [[mean - low], [high - mean]], fmt="D", color=colour, markersize=7, capsize=5
        )  # beside the seeds, so that none is hidden
    ax.set_xlim(-0.4, len(order) - 0.6)
    ax.grid(visible=False, axis="x")
    return ax


def _shades(arms: Sequence[str], colours: Mapping[str, str] | None) -> dict[str, str]:
    return {arm: (colours or {}).get(arm, PALETTE[place % len(PALETTE)]) for place, arm in enumerate(arms)}


def seed_curves(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    hue: str | None = None,
    seed: str = "seed",
    colours: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw curves over training: one thin line per seed, the mean over seeds, and the band of its 95 % t interval.

    frame: one row per point of a curve, with the columns `x` (a step, say), `y`, `seed`, and `hue` for the arms.
    colours: of arms, as for `compare_arms`.
    """
    ax = ax or plt.subplots()[1]
    arms = {"hue": hue, "palette": _shades([*frame[hue].unique()], colours)} if hue else {"color": PALETTE[0]}
    sns.lineplot(frame, x=x, y=y, units=seed, estimator=None, linewidth=0.7, alpha=0.45, legend=False, ax=ax, **arms)
    sns.lineplot(frame, x=x, y=y, errorbar=t_interval, err_kws={"alpha": 0.15}, ax=ax, **arms)
    return ax


def report_beside_ours(
    report: Mapping[str, float],
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    source: str,
    report_unit: str,
    seed: str = "seed",
) -> Figure:
    """Draw the report's numbers and ours side by side: two panels, two scales, since they are different experiments.

    report: arm -> the number printed in `source` ("Table 1"), in `report_unit`. frame, x, y, seed: ours, as for
    `compare_arms`; its arms are drawn in the report's order, and an arm that the report lacks comes after those.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.8))
    arms = [*report]
    left.plot(arms, list(report.values()), "s", color=REPORT_COLOUR, markersize=9)
    for place, value in enumerate(report.values()):
        left.annotate(f"{value:g}", (place, value), (0, 9), textcoords="offset points", ha="center", color="#555A63")
    left.set(title=f"Report, {source}", xlabel=x, ylabel=report_unit)
    left.grid(visible=False, axis="x")
    left.margins(x=0.25, y=0.25)
    left.set_facecolor("#F7F7F5")
    ours = list(dict.fromkeys(frame[x]))
    order = [arm for arm in arms if arm in ours] + [arm for arm in ours if arm not in arms]
    compare_arms(frame, x=x, y=y, seed=seed, order=order, ax=right)
    right.set_title(f"k25lite, {frame[seed].nunique()} seeds")
    return figure


def explore(draw: Callable[..., None], **controls: widgets.Widget) -> None:
    """Call `draw` with the values of ipywidgets controls, again at each change; do nothing where nobody can move them.

    `k25lite reproduce` sets K25LITE_STATIC: without a front end, a widget shows nothing, and one that captures figures can
    leave the run waiting forever for a message that was lost.
    """
    if not os.environ.get("K25LITE_STATIC"):
        widgets.interact(draw, **controls)
