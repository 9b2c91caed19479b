"""The scorecard: every claim of every notebook on one page, the report's number beside ours, interval and verdict.

The page is one file that asks nothing of the network and runs no script. Nothing is left out: a notebook that failed
stands there as failed, and a claim that does not hold stands beside those that do.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from k25lite.results import Claim, Record, load, write_whole

VERDICTS = {True: "holds", False: "fails", None: "not established"}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Entry:
    """One notebook on the scorecard: its record, or why there is none."""

    notebook: str
    record: Record | None
    failure: str | None


def build(results: Sequence[Path], out_dir: Path, failures: Mapping[str, str] | None = None) -> tuple[Path, Path]:
    """Write scorecard.html and scorecard.json into `out_dir` from results files; returns the two paths.

    The name of a results file is the notebook's. A notebook in `failures` (name -> what failed) counts as failed,
    whatever it recorded before; so does one whose file is missing or is not a results file.
    """
    entries = [_entry(path, (failures or {}).get(path.stem)) for path in results]
    summary = summarise(entries)
    written = datetime.now(UTC).isoformat(timespec="seconds")
    page = _environment().get_template("scorecard.html.j2").render(entries=entries, summary=summary, written=written)
    data = {
        "written": written,
        "summary": summary,
        "notebooks": [
            {"notebook": e.notebook, "failure": e.failure} | (asdict(e.record) if e.record else {}) for e in entries
        ],
    }
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_whole(out_dir / "scorecard.html", page), write_whole(out_dir / "scorecard.json", text)


def summarise(entries: Sequence[Entry]) -> dict[str, Any]:
    """Counts over all notebooks: claims by verdict, checks and notebooks by outcome, and the profiles that were run."""
    records = [e.record for e in entries if e.record]
    verdicts = Counter(VERDICTS[c.holds] for r in records for c in r.claims)
    checks = [check.holds for r in records for check in r.checks]
    return {
        "claims": {verdict: verdicts[verdict] for verdict in VERDICTS.values()},
        "checks": {"passed": sum(checks), "failed": len(checks) - sum(checks)},
        "notebooks": {"ran": len(records), "failed": len(entries) - len(records)},
        "profiles": sorted({r.profile for r in records}),
    }


def interval_bar(claim: Claim) -> dict[str, float] | None:
    """Where low, mean, high and zero lie on a claim's own axis, in percent of its width; None without an interval.

    The axis spans the interval and zero with a margin on both sides, so each claim has a scale of its own.
    """
    if claim.ci95 is None:
        return None
    low, high = claim.ci95
    start, end = min(low, 0.0), max(high, 0.0)
    span = end - start or 1.0

    def place(value: float) -> float:
        return round(8 + 84 * (value - start) / span, 2)

    return {"low": place(low), "mean": place((low + high) / 2), "high": place(high), "zero": place(0.0)}


def number(value: float | None, signed: bool = False, digits: int = 4) -> str:
    """A number for reading: `digits` significant ones, thousands grouped, a true minus, a power of ten for extremes."""
    if value is None:
        return "not finite"
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    size = abs(value)
    if size and not 1e-4 <= size < 1e7:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        return f"{sign}{mantissa.rstrip('0').rstrip('.')} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size))) if size else 0
    text = f"{size:,.{decimals}f}"
    return sign + (text.rstrip("0").rstrip(".") if decimals else text)


def _entry(path: Path, failure: str | None) -> Entry:
    if failure:
        return Entry(path.stem, None, failure)
    try:
        return Entry(path.stem, load(path), None)
    except FileNotFoundError:
        return Entry(path.stem, None, f"no results: {path} does not exist")
    except ValueError as error:
        return Entry(path.stem, None, str(error))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("k25lite", "."),
        autoescape=True,  # whatever a results file holds is shown as text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.globals.update(VERDICTS=VERDICTS, interval_bar=interval_bar)
    return environment
