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
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_table_of_results_is_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    row = r'^\|[^|]+\|[^|]+\| ([^|]*) \| ([^|]*) \|[^|]*\| \[([\w ]+)\]\((results/[\w.]+) "([^"]+)"\) \|$'
    rows = re.findall(row, readme, flags=re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| 0\d \|.*\]\(results/", readme, flags=re.MULTILINE)) >= 15
    verdicts = {True: "holds", False: "fails", None: "not established"}
    for ours, interval, verdict, file, name in rows:
        (claim,) = (each for each in json.loads((ROOT / file).read_text())["claims"] if each["name"] == name)
        *sides, difference = claim["ours"].values()
        assert ours == ", ".join(map(short, sides)), name
        assert interval == f"{short(difference)} [{', '.join(map(short, claim['ci95']))}]", name
        assert verdict == verdicts[claim["holds"]], name


def test_the_day_is_told_as_it_was_scored():
    readme = " ".join((ROOT / "README.md").read_text().split())
    metrics = json.loads((ROOT / "results" / "08_day_metrics.json").read_text())
    assert f"At ±2 s the macro-F1 is {metrics['macro_f1']:.2f}: " in readme
    names = {"level": "levels", "death": "deaths", "pickup": "pickups", "fight": "fights", "boss": "bosses"}
    told = ", ".join(f"{names[kind]} {metrics['per_kind'][kind]['f1']:.2f}" for kind in names)
    assert f"{told} (" in readme


def test_the_data_card_tells_the_detectors_as_they_were_scored():
    card = (ROOT / "data" / "README.md").read_text()
    told = json.loads((ROOT / "results" / "08_detector_runs.json").read_text())
    seconds = round(sum(told["seconds on two cores"]["lite"].values()))
    trained = f"{seconds // 60}:{seconds % 60:02d}"
    assert seconds < 240
    assert f"Training took {trained} on two cores" in card
    rows = re.findall(
        r"^\| (.*minutes.*) \| ([\d.]+) \| ([\d.]+) \|$", card.split(f"| trained in {trained} |")[1], re.MULTILINE
    )
    scores = told["scores"]
    assert [row[1:] for row in rows] == [
        tuple(f"{scores[run][where]['macro_f1']:.2f}" for run in ("lite", "full")) for where in told["footage"]
    ]


def short(number):
    """As it is written in the table: two digits."""
    return f"{number:.0f}" if abs(number) >= 10 else f"{number:.1f}" if abs(number) >= 1 else f"{number:.2f}"
