"""Measuring k25lite against its peers: contenders timed side by side, a report for machines and for people.

A ratio is worth something only if both sides ran on the same inputs in the same minutes. So contenders take turns in one
process, medians are compared, and the machine's fastest matrix product takes its turn too: whatever slows the machine
down slows all of them. Results that differ are refused before anything is timed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from k25lite.results import current_commit, write_whole

SUBJECT = "k25lite"
PRODUCT = "matrix product"  # the subject whose speed is the machine's matrix peak


class Disagreement(RuntimeError):
    """Two contenders do not compute the same thing, so comparing their speed would say nothing."""


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        subject: "k25lite", or the peer's name.
        unit: of `value`.
        ratio: peer over k25lite in time, so above 1 k25lite is better; None where there is nothing to compare.
    """

    case: str
    subject: str
    metric: str
    value: float
    unit: str
    ratio: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or not (self.ratio is None or math.isfinite(self.ratio)):
            raise ValueError(
                f"{self.case}, {self.subject}, {self.metric}: {self.value} (ratio {self.ratio}) not finite"
            )


@dataclass
class Report:
    """What one benchmark measured, on what, when, and of which commit."""

    device: str
    rows: list[Row] = field(default_factory=list)
    commit: str | None = field(default_factory=current_commit)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def add(
        self, case: str, metric: str, unit: str, values: Mapping[str, float], seconds: Mapping[str, float] | None = None
    ) -> None:
        """One row per subject of `values`. With the `seconds` they took, peers get their ratios."""
        for subject, value in values.items():
            ratio = seconds[subject] / seconds[SUBJECT] if seconds and subject != SUBJECT else None
            self.rows.append(Row(case, subject, metric, value, unit, ratio))

    def add_fractions(self, case: str, flops: Mapping[str, float], seconds: Mapping[str, float], peak: float) -> None:
        """The fraction each subject reaches of `peak`, the speed of the matrix product that took turns with it.

        Args:
            flops: floating-point operations that took each its `seconds`. peak: in operations per second.
        """
        fractions = {who: flops[who] / each / peak for who, each in seconds.items()}
        self.add(case, "fraction of matrix peak", "fraction", fractions)
        self.add(case, "matrix peak", "FLOP/s", {PRODUCT: peak})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write device, rows, commit and date as JSON, whole or not at all; folders are made as needed."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False)
        return write_whole(Path(path), text + "\n")

    def table(self) -> str:
        """The rows for people: under each case a line per metric and peer, k25lite's value beside the peer's."""
        ours = {(row.case, row.metric): row.value for row in self.rows if row.subject == SUBJECT}
        compared = {(row.case, row.metric) for row in self.rows if row.subject != SUBJECT}
        head = f"{'':32}{SUBJECT:>12}{'peer':>12}{'ratio':>8}  unit, peer"
        lines = [self.device, head]
        case = None
        for row in self.rows:
            key = (row.case, row.metric)
            if row.subject == SUBJECT and key in compared:
                continue  # stands beside its peer
            if row.case != case:
                case = row.case
                lines.append(case)
            peer = "" if row.subject == SUBJECT else _short(row.value)
            unit = row.unit if row.subject == SUBJECT else f"{row.unit}, {row.subject}"
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            mine = _short(ours[key]) if key in ours else ""
            lines.append(f"  {row.metric:30}{mine:>12}{peer:>12}{ratio:>8}  {unit}")
        return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def median_seconds(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (3, 50),
) -> dict[str, float]:
    """Median wall-clock seconds of one call of each contender, on an idle device and until the device is done.

    They take turns, A B C A B C, after one round that does not count, so that drift of the machine meets all alike.

    Args:
        seconds: rounds begin until this much time has passed, ...
        rounds: ... but at least the first, and at most the second number of them.
    """
    for call in contenders.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    begun, done = time.perf_counter(), 0
    while done < rounds[0] or (done < rounds[1] and time.perf_counter() - begun < seconds):
        for name, call in contenders.items():
            times[name].append(_seconds(call, device))
        done += 1
    return {name: statistics.median(each) for name, each in times.items()}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The wall clock between two synchronisations: on a GPU the work of the host counts as much as the kernels."""
    _synchronise(device)
    begun = time.perf_counter()
    result = call()
    _synchronise(device)
    elapsed = time.perf_counter() - begun
    del result  # freed off the clock
    return elapsed


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class MatrixProduct:
    """A square matrix product, the yardstick for everything made of matrix products.

    Args:
        size: rows and columns.
    """

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype):
        self.flops = 2 * size**3
        self.left, self.right, self.result = torch.randn(3, size, size, device=device, dtype=dtype).unbind()

    def __call__(self) -> None:
        torch.mm(self.left, self.right, out=self.result)


def fastest_product(device: torch.device, dtype: torch.dtype, sizes: Sequence[int]) -> MatrixProduct:
    """The product among `sizes` with the most floating-point operations per second."""

    def speed(product: MatrixProduct) -> float:
        return product.flops / median_seconds({PRODUCT: product}, device, seconds=0.2)[PRODUCT]

    # One at a time: on a GPU the largest three matrices fill gigabytes.
    best = max(sizes, key=lambda size: speed(MatrixProduct(size, device, dtype)))
    return MatrixProduct(best, device, dtype)


@dataclass
class _Kept:
    """What autograd holds in a saved tensor's place, so that its end can be noticed."""

    tensor: torch.Tensor


def peak_activations(call: Callable[[], object], outside: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, at the moment of `call` when they are most.

    A storage counts once and whole, however many saved tensors view it, from the first that is saved until the last is
    freed. Gradients and what an operation needs while it runs do not count.

    Args:
        outside: what is in memory anyway and does not count: parameters, the batch.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in outside}
    saved: Counter[int] = Counter()  # address of a storage -> saved tensors that view it
    held = peak = 0

    def keep(tensor: torch.Tensor) -> _Kept:
        nonlocal held, peak
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in ignored:
            held += size if not saved[address] else 0
            saved[address] += 1
            peak = max(peak, held)
            weakref.finalize(kept, free, address, size)
        return kept

    def free(address: int, size: int) -> None:
        nonlocal held
        saved[address] -= 1
        held -= size if not saved[address] else 0

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        call()
    return peak


def allocated(call: Callable[[], object]) -> int:
    """Bytes that `call` has allocated on the GPU, at the moment when they are most, beyond what was before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def refuse_difference(case: str, peer: str, what: str, difference: float, tolerance: float) -> None:
    """Raise Disagreement unless `difference` is at most `tolerance`; what is not a number fails."""
    if not difference <= tolerance:
        raise Disagreement(
            f"{case}: {what} of {peer} and of {SUBJECT} differ by {difference:.2g}, more than {tolerance:g}; not timed"
        )


def relative_difference(ours: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> float:
    """The norm of the difference of all tensors together, over the norm of the reference."""

    def norm(tensors: Iterable[torch.Tensor]) -> float:
        return sum(tensor.float().square().sum().item() for tensor in tensors) ** 0.5

    return norm(ours[name] - each for name, each in reference.items()) / norm(reference.values())


def devices(name: str | None = None) -> list[torch.device]:
    """The device of that name, "cpu" or "cuda"; by default the CPU and the GPU, if there is one.

    Raises:
        ValueError: no such device.
    """
    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"device is 'cpu' or 'cuda', got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device")
    names = [name] if name else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [torch.device(each) for each in names]


def device_name(device: torch.device) -> str:
    """The device as it stands in a report, with the version of torch that drives it."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return f"{name}, torch {torch.__version__}"
