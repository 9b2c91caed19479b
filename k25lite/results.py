"""What a notebook leaves behind: claims with intervals over seeds, deterministic checks, metrics.

A claim is judged here and only here: its verdict follows from its 95 % interval and the direction the report found, and
a verdict that does not follow is refused, on recording and again on loading, so that nobody can round up. Not covered:
whether the experiment behind the numbers is a fair one. That is for the notebook to argue.
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import scipy  # scipy.stats takes seconds to import, so it is left to its first use
from numpy.typing import ArrayLike

PROFILES = ("smoke", "lite", "full")
SMOKE_REASON = "the smoke profile tests the mechanics and makes no scientific claim"
NO_SPREAD_REASON = "every seed gave the same difference: no spread to build an interval from"
NO_DIFFERENCE_REASON = "no seed came out differently in the two arms"
ONE_SEED_REASON = "a single seed has no spread to build an interval from"


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and the two ends of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"an interval needs at least 2 seeds, got {self.n}")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"an interval is two finite numbers, low <= high, got ({self.low}, {self.high})")

    @property
    def has_width(self) -> bool:
        """False when all seeds agreed: then their spread is unknown, not zero."""
        return self.low < self.high


def paired_interval(treatment: ArrayLike, control: ArrayLike | None = None, confidence: float = 0.95) -> Interval:
    """Student t interval of the mean of `treatment - control`, paired by seed.

    treatment, control: [seeds], one value per seed in the same order of seeds. Without a control, `treatment` holds the
    differences (a score minus chance, say). Differences that agree up to rounding give an interval without width.
    Raises ValueError for fewer than 2 seeds, lengths that differ, or a value that is not finite.
    Source: Student (1908), "The probable error of a mean". A bootstrap of 3 to 5 seeds covers far less than it says.
    """
    treated = _per_seed("treatment", treatment)
    baseline = np.zeros_like(treated) if control is None else _per_seed("control", control)
    if len(treated) != len(baseline):
        raise ValueError(f"paired values need equal lengths: {len(treated)} of treatment, {len(baseline)} of control")
    if len(treated) < 2:
        raise ValueError(f"an interval needs at least 2 seeds, got {len(treated)}")
    differences = treated - baseline
    mean, standard_error = float(differences.mean()), float(scipy.stats.sem(differences))
    # 0.3 - 0.1 and 0.8 - 0.6 differ in the last bit. That is rounding and must not pass for a tiny spread.
    if standard_error <= 1e-12 * max(np.abs(treated).max(), np.abs(baseline).max()):
        return Interval(mean, mean, mean, len(differences))
    low, high = scipy.stats.t.interval(confidence, len(differences) - 1, loc=mean, scale=standard_error)
    return Interval(mean, float(low), float(high), len(differences))


def verdict(interval: Interval, direction: int = 1) -> bool | None:
    """True if the interval lies beyond zero in the report's direction (+1 or -1), False if beyond zero the other way.

    None, "not established", if it touches or includes zero or has no width: seeds without spread support no inference.
    """
    if direction not in (1, -1):
        raise ValueError(f"direction is +1 or -1, got {direction!r}")
    if not interval.has_width or interval.low <= 0 <= interval.high:
        return None
    return bool(interval.low > 0) == (direction > 0)


@dataclass(frozen=True)
class Claim:
    """One statement of the report beside our measurement; see `Record.claim` for the fields and the errors."""

    name: str
    report: str
    ours: float | str | dict[str, float]
    ci95: tuple[float, float] | None
    n: int
    holds: bool | None
    source: str
    direction: int = 1
    reason: str | None = None
    unit: str = ""
    per_seed: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        told = self.ours.values() if isinstance(self.ours, dict) else [self.ours]
        numbers = [*(value for value in told if not isinstance(value, str)), *chain(*self.per_seed.values())]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"claim {self.name!r} has a value that is not finite: {self.ours}, {self.per_seed}")
        if self.ci95 is None and not self.reason:
            raise ValueError(f"claim {self.name!r} has no interval: say why in `reason`")
        judged = None
        if self.ci95 is not None and self.reason != SMOKE_REASON:
            judged = verdict(Interval(sum(self.ci95) / 2, *self.ci95, self.n), self.direction)
        if self.holds is not judged:
            gives = f"the interval {self.ci95} in direction {self.direction:+d} gives {judged}"
            raise ValueError(f"claim {self.name!r} says holds={self.holds}, but {gives}")


@dataclass(frozen=True)
class Check:
    """A deterministic statement, the same for every seed: `value` is at most, or at least, `limit`."""

    name: str
    value: float | None  # None: the measurement was not finite, which no limit allows
    limit: float
    relation: Literal["<=", ">="]
    source: str
    unit: str = ""
    holds: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.relation not in ("<=", ">="):
            raise ValueError(f"check {self.name!r}: relation is '<=' or '>=', got {self.relation!r}")
        if not math.isfinite(self.limit):
            raise ValueError(f"check {self.name!r}: a limit is a finite number, got {self.limit}")
        within = self.value is not None and (
            self.value <= self.limit if self.relation == "<=" else self.value >= self.limit
        )
        object.__setattr__(self, "holds", within)


@dataclass(frozen=True)
class Metric:
    """A measured number that claims nothing."""

    name: str
    value: float
    unit: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"metric {self.name!r} is not a finite number: {self.value}")


Entry = TypeVar("Entry", Claim, Check, Metric)


@dataclass
class Record:
    """The results of one notebook at one profile: fill it in the last cell, then `save` it.

    Names are unique among claims, among checks and among metrics: a second one of the same name raises ValueError.
    """

    notebook: str
    profile: str
    seeds: Sequence[int]
    device: str = field(default_factory=lambda: _device())
    commit: str | None = field(default_factory=lambda: current_commit())
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    claims: list[Claim] = field(default_factory=list, init=False)
    checks: list[Check] = field(default_factory=list, init=False)
    metrics: list[Metric] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"profile is one of {', '.join(PROFILES)}, got {self.profile!r}")
        self.seeds = [int(seed) for seed in self.seeds]
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are one or more different integers, got {self.seeds}")

    def claim(
        self,
        name: str,
        *,
        report: str,
        ours: float | str | dict[str, float],
        ci95: tuple[float, float] | None,
        n: int,
        holds: bool | None,
        source: str,
        direction: int = 1,
        reason: str | None = None,
        unit: str = "",
        per_seed: dict[str, list[float]] | None = None,
    ) -> Claim:
        """Record a claim whose interval was computed elsewhere; `compare` computes it too.

        ci95: the interval of the paired difference over `n` seeds, in `unit`. direction: the sign that this difference
        has in the report. holds: the verdict that `ci95` and `direction` give; ValueError for any other. A claim that
        could not be measured has ci95=None, holds=None and a `reason`. The smoke profile turns `holds` into None.
        """
        ci95 = None if ci95 is None else (float(ci95[0]), float(ci95[1]))
        holds = None if holds is None else bool(holds)  # numpy has booleans of its own
        claim = Claim(name, report, ours, ci95, int(n), holds, source, direction, reason, unit, per_seed or {})
        if self.profile == "smoke":
            claim = replace(claim, holds=None, reason=SMOKE_REASON)
        return self._add(self.claims, claim)

    def compare(
        self,
        name: str,
        treatment: ArrayLike,
        control: ArrayLike | None = None,
        *,
        report: str,
        source: str,
        direction: int = 1,
        reason: str | None = None,
        unit: str = "",
        arms: tuple[str, str] = ("treatment", "control"),
    ) -> Claim:
        """Record a claim from the values of its two arms, [seeds] each; interval, n and verdict are computed here.

        `arms` names the two for the reader ("early", "late"). Without a control, `treatment` holds the differences.
        One seed gives no interval: the claim is not established. Raises as `paired_interval` and `claim` do.
        """
        values = {arms[0]: _per_seed(arms[0], treatment).tolist()}
        if control is not None:
            values[arms[1]] = _per_seed(arms[1], control).tolist()
        ours = {arm: float(np.mean(per_seed)) for arm, per_seed in values.items()}
        if control is not None:
            ours["difference"] = ours[arms[0]] - ours[arms[1]]
        told: dict[str, Any] = {"report": report, "source": source, "direction": direction, "unit": unit}
        if all(len(per_seed) == 1 for per_seed in values.values()):
            reason = reason or ONE_SEED_REASON
            return self.claim(name, ours=ours, ci95=None, n=1, holds=None, reason=reason, per_seed=values, **told)
        interval = paired_interval(treatment, control)
        if not interval.has_width:
            reason = reason or NO_SPREAD_REASON
        return self.claim(
            name,
            ours=ours,
            ci95=(interval.low, interval.high),
            n=interval.n,
            holds=verdict(interval, direction),
            reason=reason,
            per_seed=values,
            **told,
        )

    def count(
        self,
        name: str,
        treatment: Sequence[bool],
        control: Sequence[bool],
        *,
        report: str,
        source: str,
        direction: int = 1,
        reason: str | None = None,
        arms: tuple[str, str] = ("treatment", "control"),
    ) -> Claim:
        """Record a claim about something that happens or does not, [seeds] each, paired: the exact sign test.

        Of the seeds in which the arms differ, the share where it happened under the treatment less the share where it
        happened under the control, with the interval of Clopper and Pearson (1934); it lies beyond zero where McNemar's
        exact test rejects at 5 %. Raises as `paired_interval` and `claim` do.
        """
        happened = np.asarray(treatment, dtype=bool), np.asarray(control, dtype=bool)
        if happened[0].shape != happened[1].shape or happened[0].ndim != 1 or not happened[0].size:
            raise ValueError(f"paired outcomes are one per seed and arm, got {happened[0].shape}, {happened[1].shape}")
        ours = {arm: float(values.mean()) for arm, values in zip(arms, happened, strict=True)}
        only, other = int((happened[0] & ~happened[1]).sum()), int((happened[1] & ~happened[0]).sum())
        interval, without = None, NO_DIFFERENCE_REASON if happened[0].size > 1 else ONE_SEED_REASON
        if only + other and happened[0].size > 1:
            share = scipy.stats.binomtest(only, only + other).proportion_ci(0.95, "exact")
            interval = (2 * share.low - 1, 2 * share.high - 1)
        return self.claim(
            name,
            report=report,
            ours=ours | {"difference": ours[arms[0]] - ours[arms[1]]},
            ci95=interval,
            n=happened[0].size,
            holds=None if interval is None else verdict(Interval(sum(interval) / 2, *interval, 2), direction),
            source=source,
            direction=direction,
            reason=reason or (without if interval is None else None),
            unit="share of seeds",
            per_seed={arm: values.astype(float).tolist() for arm, values in zip(arms, happened, strict=True)},
        )

    def check(
        self,
        name: str,
        value: float,
        limit: float,
        *,
        source: str,
        relation: Literal["<=", ">="] = "<=",
        unit: str = "",
    ) -> Check:
        """Record a statement no seed changes, such as a parity error within tolerance. What is not finite fails."""
        finite = float(value) if math.isfinite(value) else None
        return self._add(self.checks, Check(name, finite, float(limit), relation, source, unit))

    def metric(self, name: str, value: float, unit: str = "") -> Metric:
        """Record a finite number that claims nothing, with its unit."""
        return self._add(self.metrics, Metric(name, float(value), unit))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record as JSON, whole or not at all; folders are made as needed."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False, default=float)
        return write_whole(Path(path), text + "\n")

    def _add(self, entries: list[Entry], entry: Entry) -> Entry:
        if any(entry.name == other.name for other in entries):
            raise ValueError(f"{entry.name!r} is recorded already")
        if isinstance(entry, Claim):
            if not 1 <= entry.n <= len(self.seeds):
                raise ValueError(f"claim {entry.name!r} has n={entry.n}, but n counts seeds, of {len(self.seeds)}")
            if (entry.reason == SMOKE_REASON) != (self.profile == "smoke"):
                raise ValueError(f"claim {entry.name!r} has the reason {entry.reason!r} at profile {self.profile!r}")
        entries.append(entry)
        return entry


def load(path: str | os.PathLike[str]) -> Record:
    """Read a saved record and judge it anew. Raises FileNotFoundError, or ValueError naming the file and the fault."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        saved = json.loads(text)
        entries = {kind: saved.pop(kind) for kind in ("claims", "checks", "metrics")}
        about = [f.name for f in fields(Record) if f.init]
        record = Record(**{name: saved[name] for name in about})
        for claim in entries["claims"]:
            record._add(record.claims, Claim(**claim | {"ci95": claim["ci95"] and tuple(claim["ci95"])}))
        for check in entries["checks"]:
            holds = check.pop("holds")
            if record._add(record.checks, Check(**check)).holds is not holds:
                raise ValueError(f"check {check['name']!r} says holds={holds}, which its value and limit deny")
        for metric in entries["metrics"]:
            record.metric(**metric)
    except KeyError as error:
        raise ValueError(f"{path} is not a results file: {error} is missing") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a results file: {error}") from error
    return record


def write_whole(path: Path, text: str) -> Path:
    """Write `text` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _per_seed(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} needs one value per seed, got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has a value that is not finite: {array.tolist()}")
    return array


def _device() -> str:
    import torch  # here, because reading results back needs no torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def current_commit() -> str | None:
    """The commit of the checkout this library lies in, `-dirty` if tracked files differ from it; None outside one."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie in a virtual environment inside somebody else's checkout.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "numpy", "scipy")
    return {"python": platform.python_version()} | {package: metadata.version(package) for package in packages}
