"""`k25lite bench swarm`: its rows, and no timing of contenders that do not do the work."""

import asyncio
import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from k25lite.bench import Disagreement, Report
from k25lite.cli import app
from k25lite.swarm import bench, bench_parl, bench_peers

ROOT = Path(__file__).parents[2]
OWN = {"asyncio": bench.bare, "k25lite": bench.ours}


async def lazy(count, script):
    """Knows the answers without asking the model in the last step."""
    answers = await bench.bare(count, script)
    script._steps = iter([(bench.STEPS - 1) * count])
    return answers


async def careless(count, script):
    """Asks the model three times, and calls the tool once."""
    for _ in range(bench.STEPS * count):
        script.next(0, "0")
    return [await bench.look(index) for index in range(count)]


async def forgetful(count, script):
    """Loses the answer of one sub-agent."""
    return (await bench.bare(count, script))[1:]


@pytest.mark.parametrize("peer", [*OWN, *bench_peers.PEERS])
def test_contenders_do_the_work(peer):
    contender = OWN.get(peer) or bench_peers.peers().get(peer, (None, None))[1]
    if contender is None:
        pytest.skip(f"needs {peer}: pip install 'k25lite[peers]', in an environment of its own")
    script = bench.Script(0.001)
    assert list(asyncio.run(contender(20, script))) == [str(index + 2) for index in range(20)]
    assert script.taken() == 3 * 20


@pytest.mark.parametrize(("peer", "why"), [(lazy, "steps"), (careless, "answers"), (forgetful, "answers")])
def test_a_contender_that_does_less_is_not_timed(peer, why):
    report = Report("a device")
    with pytest.raises(Disagreement, match=f"n=20,latency_ms=0: a peer .* {why}.*not timed"):
        bench.compare(report, {**OWN, "a peer": peer}, 20, 0, rounds=1)
    assert not report.rows


def test_everything_at_a_time_that_may_be(monkeypatch):
    monkeypatch.setattr(bench, "AT_ONCE", 7)
    for contender in OWN.values():
        at_work, most = 0, 0

        class Counting(bench.Script):
            def next(self, step, place):
                nonlocal at_work, most
                at_work += (step == 0) - (step == bench.STEPS - 1)
                most = max(most, at_work)
                return super().next(step, place)

        asyncio.run(contender(20, Counting(0.001)))
        assert most == 7


def test_a_quick_run_fills_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_peers, "PEERS", {})
    path = tmp_path / "bench.json"
    ran = CliRunner().invoke(app, ["bench", "swarm", "--quick", "--device", "cpu", "--json", str(path)])
    assert ran.exit_code == 0, ran.output
    report = json.loads(path.read_text())
    assert report["device"].startswith("CPU")
    rows = report["rows"]
    assert all(list(row) == ["case", "subject", "metric", "value", "unit", "ratio"] for row in rows)
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows)
    found = {(row["case"], row["metric"], row["subject"]): row for row in rows}
    expected = {
        ("n=100,latency_ms=0", "cpu_us_per_subagent"): {"asyncio"},
        ("n=100,latency_ms=0", "wall_s"): {"asyncio"},
        ("n=100,latency_ms=50", "cpu_us_per_subagent"): {"asyncio"},
        ("n=100,latency_ms=50", "wall_s"): {"asyncio", "ideal"},
        ("n=1000,latency_ms=0", "peak_memory"): {"asyncio"},
        ("64 agents, local model", "tokens_per_second"): {"one at a time"},
        ("simulator, serial script", "episodes_per_second"): set(),
        ("simulator, swarm script", "episodes_per_second"): set(),
        ("PARL, 4 tasks, K=8", "episodes_per_second"): set(),
        **{("PARL, 4 tasks, K=8", f"{part}, share of time"): set() for part in bench_parl.PARTS},
    }
    assert set(found) == {(*key, who) for key, peers in expected.items() for who in {"k25lite", *peers}}
    assert len(found) == len(rows)
    for (case, metric), peers in expected.items():
        mine = found[case, metric, "k25lite"]
        assert mine["ratio"] is None
        for peer in peers - {"asyncio"} if metric == "peak_memory" else peers:
            row = found[case, metric, peer]
            more_is_better = metric == "tokens_per_second"
            ratio = mine["value"] / row["value"] if more_is_better else row["value"] / mine["value"]
            assert row["ratio"] == pytest.approx(ratio)
    shares = [row["value"] for row in rows if row["unit"] == "fraction"]
    assert sum(shares) == pytest.approx(1)
    wall = found["n=100,latency_ms=50", "wall_s", "ideal"]
    assert wall["value"] == pytest.approx(0.15)
    assert found["n=100,latency_ms=50", "wall_s", "k25lite"]["value"] >= wall["value"]


def test_training_is_measured_on_one_thread_and_leaves_the_others_as_they_were(monkeypatch):
    threads, used = torch.get_num_threads(), []

    def stopped(*_, **__):
        used.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_parl, "parl", stopped)
    monkeypatch.setattr(bench_parl, "imitate", lambda *_: None)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            bench_parl.training(Report("a device"), quick=True)
        assert (used, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(threads)


def test_the_readme_shows_the_committed_measurements():
    readme = (ROOT / "README.md").read_text()

    def measured(file):
        rows = json.loads((ROOT / "results" / file).read_text())["rows"]
        value = {(row["case"], row["metric"], row["subject"]): row["value"] for row in rows}
        for who in {subject for *_, subject in value} & {"k25lite", "asyncio", *bench_peers.PEERS}:
            cpu, wall = (
                value["n=1000,latency_ms=0", "cpu_us_per_subagent", who],
                value["n=10000,latency_ms=50", "wall_s", who],
            )
            yield who, f"{cpu:,.0f} µs", f"{wall:.3g} s"

    table = {*measured("bench_swarm_cpu.json")}
    assert {who for who, *_ in table} == {"k25lite", "asyncio", *bench_peers.PEERS}
    assert all(f"\n| {who} | {cpu} | {wall} |\n" in readme for who, cpu, wall in table)
    assert all(f"{cpu} and {wall} for {who}" in readme for who, cpu, wall in measured("bench_swarm_alone_cpu.json"))
