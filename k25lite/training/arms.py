"""The arms of an experiment: the same training, but for one difference, over several seeds, side by side in processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from k25lite.training.pool import side_by_side
from k25lite.training.vit import VisionReader, evaluate, make_examples, train
from k25lite.vision import MoonViT3DConfig
from k25lite.world.scenes import SceneSpec

# numpy, because torch would hand tensors between processes as one open file each.
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Arm:
    """What one arm trains on and is tested on.

    Args:
        name: as it stands in figures.
        data: (scenes, how many) to train on, shuffled together.
        tests: what to be asked about, by name; the same scenes for every arm of a seed.
        encoder: changes to the lite configuration.
        stride: show the encoder every stride-th frame only, in training and in tests.
        starts_from: the name of an arm, given in `starts`, whose weights of the same seed to begin with.
    """

    name: str
    data: tuple[tuple[SceneSpec, int], ...]
    tests: tuple[tuple[str, SceneSpec, int], ...]
    encoder: Mapping[str, Any] = field(default_factory=dict)
    stride: int = 1
    starts_from: str | None = None


@dataclass
class Outcome:
    """All arms and seeds: answers has one row per test question, logs one per step; both with columns arm and seed."""

    answers: pd.DataFrame
    logs: pd.DataFrame
    weights: dict[tuple[str, int], Weights]


def run_arms(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    *,
    device: str = "cpu",
    workers: int | None = None,
    starts: Mapping[tuple[str, int], Weights] | None = None,
    progress: bool = True,
) -> Outcome:
    """Train and test every arm with every seed.

    The runs are independent and small, so they go side by side. A seed fixes the data, the initial weights and the order,
    whatever the arm.

    Raises:
        Whatever a run raised, once the other runs are cancelled.
    """
    starts = starts or {}
    jobs = [(arm, seed, device, starts.get((arm.starts_from or "", seed))) for seed in seeds for arm in arms]
    outcomes = side_by_side(_run, jobs, workers=workers, title="arms x seeds", progress=progress)
    names = [(arm.name, seed) for arm, seed, *_ in jobs]
    answers, logs, weights = zip(*outcomes, strict=True)
    return Outcome(
        pd.concat(answers, ignore_index=True),
        pd.concat(logs, ignore_index=True),
        dict(zip(names, weights, strict=True)),
    )


def _run(job: tuple[Arm, int, str, Weights | None]) -> tuple[pd.DataFrame, pd.DataFrame, Weights]:
    """One arm with one seed, in a process of its own: its answers, its log, its weights."""
    arm, seed, device, start = job
    # Streams of a seed are numbered, so that no two of its training sets, nor a test set, share a stream. They begin where
    # no seed was looked at while the learning rate and the sizes were chosen.
    stream = 1_000 * (seed + 100)
    torch.manual_seed(stream)
    if arm.starts_from and start is None:
        raise ValueError(f"arm {arm.name!r} starts from {arm.starts_from!r}, which is not among the given weights")
    model = VisionReader(MoonViT3DConfig.lite(**arm.encoder))
    if start is not None:
        model.load_state_dict({name: torch.from_numpy(array) for name, array in start.items()})
    data = [e for i, (spec, n) in enumerate(arm.data) for e in make_examples(spec, n, stream + i, arm.stride)]
    log = train(model, data, seed=seed, device=device, progress=False)
    answers = [
        evaluate(model, make_examples(spec, n, stream + 500 + i, arm.stride), device=device).assign(test=name)
        for i, (name, spec, n) in enumerate(arm.tests)
    ]
    weights = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
    mark = {"arm": arm.name, "seed": seed}
    return pd.concat(answers, ignore_index=True).assign(**mark), log.assign(**mark), weights
