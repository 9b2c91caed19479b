"""A run as a figure: who was at work when."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from k25lite.plots import PALETTE
from k25lite.swarm.critical import Summary


def gantt(summary: Summary, ax: Axes | None = None, *, seconds: float | None = None) -> Axes:
    """One line for each assignment, in the order in which they began: steps of the model, and of the tools.

    seconds: that the axis shows, so that runs can be compared; by default as many as this one took.
    """
    lanes = sorted(summary.assignments.values(), key=lambda assignment: assignment.began)
    ax = ax or plt.subplots(figsize=(9, 0.7 + 0.2 * len(lanes)))[1]
    for lane, assignment in enumerate(lanes):
        for kind, colour in (("step", PALETTE[1]), ("tool", PALETTE[0])):
            spans = [(span.began, span.seconds) for span in assignment.spans if span.kind == kind]
            ax.broken_barh(spans, (lane - 0.35, 0.7), facecolor=colour, label=None if lane else kind)
    ax.set(yticks=range(len(lanes)), ylim=(len(lanes) - 0.4, -0.6), xlim=(0, seconds), xlabel="seconds")
    ax.legend(
        ax.get_legend_handles_labels()[0], ["model", "tool"], fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    ax.set_yticklabels([assignment.agent for assignment in lanes], fontsize=8)
    ax.grid(axis="y", visible=False)
    return ax
