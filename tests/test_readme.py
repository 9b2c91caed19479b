"""The README's numbers are those of the committed measurements."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_benchmark_table_is_the_committed_benchmark():
    readme = (ROOT / "README.md").read_text()
    rows = json.loads((ROOT / "results" / "bench_vision_cpu.json").read_text())["rows"]
    ratios = {
        (row["case"].split(": ")[-1], row["metric"].removesuffix(" time")): row["ratio"]
        for row in rows
        if row["ratio"] and row["metric"] in ("forward time", "training time")
    }
    table = re.findall(r"^\| ([\w ,=.]+?) \| ([\d.]+)x \| ([\d.]+)x \|", readme, flags=re.MULTILINE)
    assert len(table) == len({case for case, _ in ratios})
    for case, forward, training in table:
        assert float(forward) == round(ratios[case, "forward"], 2), case
        assert float(training) == round(ratios[case, "training"], 2), case


def test_every_listed_file_and_link_exists():
    readme = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link
