"""Look at the Lite World: samples of any family, as a student would see them."""

from __future__ import annotations

import textwrap
from random import Random

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from k25lite.world.families import FAMILIES, Document, LiteWorld


def show(family: str, count: int = 3, *, seed: int = 0, test: bool = False) -> Figure:
    """Draw `count` training documents of a family, or held-out questions: pictures, clips as their frames, and words.

    Raises:
        ValueError: no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    world, random = LiteWorld(seed), Random(seed)
    documents = [(world.question if test else world.document)(family, random) for _ in range(count)]
    height = 2.4 if documents[0].media else 1.1
    figure, axes = plt.subplots(1, count, figsize=(3.4 * count, height), squeeze=False)
    for ax, document in zip(axes[0], documents, strict=True):
        if document.media:
            ax.imshow(contact_sheet(document), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        text = "\n".join(textwrap.fill(f"{prompt} [{answer}]", 34, break_on_hyphens=False) for prompt, answer in document.turns)
        where = {"y": -0.06, "va": "top"} if document.media else {"y": 0.5, "va": "center"}
        ax.text(0.5, s=text, ha="center", transform=ax.transAxes, fontsize=8, family="monospace", **where)
    figure.suptitle(f"{family}{', held-out questions' if test else ''}", fontweight="bold")
    return figure


def contact_sheet(document: Document) -> np.ndarray:
    """All frames of all media side by side, [height, width, 3], with a gap of grey."""
    frames = [frame for item in document.media for frame in item]
    height = max(len(frame) for frame in frames)
    padded = [np.pad(f, ((0, height - len(f)), (0, 2), (0, 0)), constant_values=200) for f in frames]
    return np.concatenate(padded, axis=1)[:, :-2]
