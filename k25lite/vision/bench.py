"""`k25lite bench vision`: MoonViT-3D against transformers' `Kimi_K25VisionModel`, same weights and inputs, one process.

Each is called as its user would call it: transformers' tower with its default attention (sdpa) and `grid_thw` on the
device of the pixels, which it needs; ours with `grid_thw` on the CPU, which spares it a synchronisation. transformers
cannot take chunks of different length in one call, so there it gets one call per length, the patches sorted off the clock.

Not covered: reading and resizing pictures, memory, other attention kernels of transformers that need extra packages.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from tqdm import tqdm
from transformers.models.kimi_k25 import Kimi_K25VisionModel

from k25lite.bench import (
    PRODUCT,
    SUBJECT,
    Report,
    Row,
    device_name,
    devices,
    fastest_product,
    median_seconds,
    refuse_difference,
    relative_difference,
)
from k25lite.vision.attention import has_bf16
from k25lite.vision.checkpoint import to_transformers
from k25lite.vision.moonvit3d import MoonViT3D, MoonViT3DConfig
from k25lite.vision.packing import Grid

PEER = "transformers"
PEER_BY_LENGTH = "transformers, one call per t"
# Largest differences that rounding explains: of an output of order 1, and of all gradients relative to their norm.
TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.5, 0.2)}
PUBLISHED_MEMORY = 32 * 2**30  # bytes a GPU needs for a training step of the published configuration


@dataclass(frozen=True)
class Setup:
    """One configuration on one device."""

    name: str
    config: Callable[[], MoonViT3DConfig]
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device.type}, {self.name}, {str(self.dtype).removeprefix('torch.')}"


class Contender:
    """An encoder with its inputs, ready to be called again and again.

    Attributes:
        calls: the (pixel_values, grid_thw) of each call that one pass over the inputs takes.
    """

    def __init__(self, model: torch.nn.Module, calls: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        self.model, self.calls = model, calls

    @torch.no_grad()
    def forward(self) -> list[torch.Tensor]:
        """The pooled tokens of each call: [merged tokens, 4, hidden]."""
        return [self.model(*call).pooler_output for call in self.calls]

    def train(self) -> None:
        """Forward and backward to all parameters; the loss is the mean square of all pooled tokens."""
        self.model.zero_grad(set_to_none=True)
        outputs = [self.model(*call).pooler_output for call in self.calls]
        total = sum(output.numel() for output in outputs)
        torch.stack([output.square().mean() * (output.numel() / total) for output in outputs]).sum().backward()


def run(device: str | None = None, quick: bool = False) -> Report:
    """Measure forward pass and training step over all cases: about 3 minutes on 2 CPU cores, as long on a GPU.

    Args:
        device: "cpu" or "cuda"; both by default where there is a GPU. On a GPU the published configuration is measured
            too if the memory allows it.
        quick: tiny cases in a few seconds, to see that everything works. Its numbers mean nothing.

    Raises:
        Disagreement: the two towers do not compute the same; nothing was timed then.
        ValueError: no such device.
    """
    measured = devices(device)
    report = Report("; ".join(device_name(each) for each in measured))
    for each in measured:
        for setup in setups(each, quick):
            measure(report, setup, cases(quick), quick)
        report.rows += geometric_means(report.rows, each.type)
    return report


def cases(quick: bool = False) -> dict[str, list[Grid]]:
    """The batches, about 16,000 patches each: (frames, rows, columns) in patches for every item."""
    random = np.random.default_rng(0)
    small, large, medium = (3, 1, 4) if quick else (256, 4, 64)
    side, widest = (8, 8) if quick else (64, 32)

    def sizes(count: int, low: int, high: int) -> list[tuple[int, int]]:
        return [(int(h), int(w)) for h, w in 2 * random.integers(low // 2, high // 2 + 1, (count, 2))]

    return {
        f"{small} small images": [(1, 8, 8)] * small,
        f"{small} small images, many sizes": [(1, h, w) for h, w in sizes(small, 4, 12)],
        f"{large} large images": [(1, side, side)] * large,
        f"{medium} video chunks": [(4, 8, 8)] * medium,
        f"{medium} mixed images": [(1, h, w) for h, w in sizes(medium, 2, widest)],
        f"{medium} mixed chunks, t=1..4": [(1 + i % 4, h, w) for i, (h, w) in enumerate(sizes(medium, 2, widest // 2))],
    }


def setups(device: torch.device, quick: bool = False) -> list[Setup]:
    """What is measured on a device: lite, and on a large GPU published; bfloat16 on a GPU that has it."""
    if device.type == "cpu":
        return [Setup("lite", MoonViT3DConfig.lite, device, torch.float32)]
    half = has_bf16(device)
    result = [Setup("lite", MoonViT3DConfig.lite, device, torch.bfloat16 if half else torch.float32)]
    if half and not quick and torch.cuda.get_device_properties(device).total_memory >= PUBLISHED_MEMORY:
        result.append(Setup("published", MoonViT3DConfig.published, device, torch.bfloat16))
    return result


def measure(report: Report, setup: Setup, grids_of: dict[str, list[Grid]], quick: bool = False) -> None:
    """Check, then time, every case of `grids_of` in one setup, and add the rows to the report."""
    ours, reference = towers(setup)
    gpu = setup.device.type == "cuda"
    sizes = (128,) if quick else (4096, 8192, 16384) if gpu else (512, 1024, 2048)
    product = fastest_product(setup.device, setup.dtype, sizes)
    seconds, rounds = (0.0, (1, 1)) if quick else (3.0 if gpu else 4.0, (3, 50))
    for name, grids in tqdm(grids_of.items(), desc=str(setup), disable=None):
        case = f"{setup}: {name}"
        contenders = contenders_for(ours, reference, grids, setup)
        check(report, case, contenders, grids, setup.dtype)
        flops = count_flops(ours.config, grids)
        for mode in ("forward", "training"):
            calls = {who: c.forward if mode == "forward" else c.train for who, c in contenders.items()}
            timed = median_seconds({**calls, PRODUCT: product}, setup.device, seconds=seconds, rounds=rounds)
            work = flops * (
                3 if mode == "training" else 1
            )  # backward repeats every product twice, for inputs and weights
            add_rows(report, case, mode, timed, sum(t * h * w for t, h, w in grids), work, product.flops)
        for model in (ours, reference):
            model.zero_grad(set_to_none=True)


def add_rows(
    report: Report, case: str, mode: str, seconds: dict[str, float], tokens: int, work: float, flops_of_product: int
) -> None:
    """The rows of one timing: time, tokens/s and the fraction of the matrix peak; one token is one patch.

    Args:
        seconds: per call of each contender, and of the matrix product that took turns with them.
        work: floating-point operations of one call.
    """
    peak = flops_of_product / seconds[PRODUCT]
    timed = {who: each for who, each in seconds.items() if who != PRODUCT}
    report.add(case, f"{mode} time", "s", timed, timed)
    report.add(case, f"{mode} tokens/s", "tokens/s", {who: tokens / each for who, each in timed.items()}, timed)
    fraction = {who: work / each / peak for who, each in timed.items()}
    report.add(case, f"{mode} fraction of matrix peak", "fraction", fraction)
    report.add(case, f"{mode} matrix peak", "FLOP/s", {PRODUCT: peak})


def geometric_means(rows: Sequence[Row], device: str) -> list[Row]:
    """Geometric means over all cases on a device, of forward, training, and both: the peer's time over ours, and the
    fraction of the matrix peak that ours reaches."""
    case, result = f"{device}: geometric mean", []
    for modes in (("forward",), ("training",), ("forward", "training")):
        of_device = [row for row in rows if row.case.startswith(f"{device}, ") and row.metric.startswith(modes)]
        mean = statistics.geometric_mean(row.ratio for row in of_device if row.ratio and row.metric.endswith(" time"))
        result.append(Row(case, PEER, f"{' and '.join(modes)} time", mean, "times as long", mean))
        fractions = [row.value for row in of_device if row.subject == SUBJECT and row.unit == "fraction"]
        metric = f"{' and '.join(modes)} fraction of matrix peak"
        result.append(Row(case, SUBJECT, metric, statistics.geometric_mean(fractions), "fraction"))
    return result


def count_flops(config: MoonViT3DConfig, grids: Sequence[Grid]) -> float:
    """Floating-point operations of the matrix products of one forward pass, a multiply-add being two.

    Patch embedding, the four projections and the two of the MLP, and per token of an item of L patches 4 L hidden for
    attention in each layer. Norms, activations and position tables do not count.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    embed = 2 * 3 * config.patch_size**2 * width
    project = layers * 2 * (4 * width**2 + 2 * width * config.intermediate_size)
    lengths = [t * h * w for t, h, w in grids]
    return sum(length * (embed + project + layers * 4 * length * width) for length in lengths)


def towers(setup: Setup) -> tuple[MoonViT3D, Kimi_K25VisionModel]:
    """The two towers with the same weights."""
    with setup.device:
        ours = MoonViT3D._from_config(setup.config(), dtype=setup.dtype)
        reference = Kimi_K25VisionModel._from_config(setup.config(), dtype=setup.dtype, attn_implementation="sdpa")
    # Fresh weights are so small that a wrong position or neighbour hardly shows: larger ones, to make the check strict.
    generator = torch.Generator(setup.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            scale = 0.1 if parameter.ndim == 1 else 0.5 if "position" in name else parameter[0].numel() ** -0.5
            parameter.normal_(0, scale, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    reference.load_state_dict(to_transformers(ours.state_dict(), ours.config.num_attention_heads))
    return ours, reference


def contenders_for(
    ours: MoonViT3D, reference: torch.nn.Module, grids: Sequence[Grid], setup: Setup
) -> dict[str, Contender]:
    """Both towers with the same random patches."""
    generator = torch.Generator(setup.device).manual_seed(0)
    lengths = [t * h * w for t, h, w in grids]
    shape = (sum(lengths), 3, ours.config.patch_size, ours.config.patch_size)
    pixels = torch.randn(shape, generator=generator, device=setup.device, dtype=setup.dtype)
    parts = pixels.split(lengths)
    grouped = [
        (torch.cat([parts[i] for i in items]), torch.tensor([grids[i] for i in items], device=setup.device))
        for items in by_length(grids)
    ]
    peer = PEER if len(grouped) == 1 else PEER_BY_LENGTH
    return {SUBJECT: Contender(ours, [(pixels, torch.tensor(grids))]), peer: Contender(reference, grouped)}


def by_length(grids: Sequence[Grid]) -> list[list[int]]:
    """The items of each number of frames."""
    return [[i for i, grid in enumerate(grids) if grid[0] == t] for t in sorted({t for t, _, _ in grids})]


def check(
    report: Report, case: str, contenders: dict[str, Contender], grids: Sequence[Grid], dtype: torch.dtype
) -> None:
    """Record how far apart outputs and gradients of the contenders are; raise Disagreement where rounding cannot be it."""
    mine, (peer, other) = contenders[SUBJECT], next(item for item in contenders.items() if item[0] != SUBJECT)
    tokens = mine.forward()[0].split([h * w // 4 for _, h, w in grids])
    grouped = torch.cat([tokens[i] for items in by_length(grids) for i in items])
    difference = (grouped - torch.cat(other.forward())).abs().max().item()
    refuse_difference(case, peer, "outputs", difference, TOLERANCE[dtype][0])
    report.add(case, "max difference", "absolute", {peer: difference})

    heads = cast(MoonViT3D, mine.model).config.num_attention_heads
    difference = relative_difference(to_transformers(gradients(mine), heads), gradients(other))
    refuse_difference(case, peer, "gradients", difference, TOLERANCE[dtype][1])
    report.add(case, "gradient difference", "of their norm", {peer: difference})


def gradients(contender: Contender) -> dict[str, torch.Tensor]:
    """Of one training step, by parameter."""
    contender.train()
    return {name: p.grad for name, p in contender.model.named_parameters() if p.grad is not None}
