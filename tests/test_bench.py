"""The machinery of `k25lite bench`, with a clock that tests turn by hand: no test depends on how long anything takes."""

import json

import pytest
import torch

from k25lite import bench
from k25lite.bench import Disagreement, MatrixProduct, Report, Row

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock; the test moves it."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(bench.time, "perf_counter", clock)
    return clock


def contender(clock, durations, log=None, name=""):
    """A call that takes these times one after the other, the last one ever after."""
    left = list(durations)

    def call():
        clock.now += left.pop(0) if len(left) > 1 else left[0]
        if log is not None:
            log.append(name)

    return call


def test_contenders_take_turns(clock):
    log = []
    calls = {name: contender(clock, [1.0], log, name) for name in "ABC"}
    bench.median_seconds(calls, CPU, seconds=0, rounds=(2, 5))
    assert "".join(log) == "ABC" + "ABC" * 2  # the first round warms up


def test_the_median_leaves_out_the_first_round(clock):
    calls = {"even": contender(clock, [50.0, 1.0, 2.0, 90.0]), "steady": contender(clock, [4.0])}
    assert bench.median_seconds(calls, CPU, seconds=0, rounds=(3, 3)) == {"even": 2.0, "steady": 4.0}


@pytest.mark.parametrize(("seconds", "rounds", "expected"), [(0, (3, 9), 3), (10, (3, 9), 5), (1000, (3, 9), 9)])
def test_rounds_follow_the_budget_within_their_limits(clock, seconds, rounds, expected):
    log = []
    bench.median_seconds({"A": contender(clock, [2.0], log, "A")}, CPU, seconds=seconds, rounds=rounds)
    assert len(log) - 1 == expected


def test_the_clock_stops_only_when_the_device_is_done(clock, monkeypatch):
    """A GPU returns at once and works on: the time until it is done counts, and so does what the host takes."""
    pending = contender(clock, [3.0])
    monkeypatch.setattr(bench, "_synchronise", lambda device: pending())
    # Work left over from before, 3 s at the first synchronisation, is off the clock.
    assert bench.median_seconds({"A": contender(clock, [1.0])}, CPU, seconds=0) == {"A": 4.0}


def test_a_ratio_is_the_time_of_the_peer_over_ours():
    report = Report("a device")
    seconds = {"k25lite": 2.0, "peer": 3.0}
    report.add("case", "time", "s", seconds, seconds)
    report.add("case", "speed", "1/s", {"k25lite": 0.5, "peer": 1 / 3}, seconds)
    report.add("case", "size", "MB", {"k25lite": 7.0, "peer": 8.0})
    assert [row.ratio for row in report.rows] == [None, 1.5, None, 1.5, None, None]


def test_the_file_is_what_the_contract_says(tmp_path):
    rows = [Row("case", "k25lite", "time", 2.0, "s"), Row("case", "peer", "time", 3.0, "s", 1.5)]
    report = Report("a device", rows, commit="abc", date="2026-11-28T22:00:00+00:00")
    path = report.save(tmp_path / "new" / "bench.json")
    assert json.loads(path.read_text()) == {
        "device": "a device",
        "rows": [
            {"case": "case", "subject": "k25lite", "metric": "time", "value": 2.0, "unit": "s", "ratio": None},
            {"case": "case", "subject": "peer", "metric": "time", "value": 3.0, "unit": "s", "ratio": 1.5},
        ],
        "commit": "abc",
        "date": "2026-11-28T22:00:00+00:00",
    }


@pytest.mark.parametrize(("value", "ratio"), [(float("nan"), None), (1.0, float("inf"))])
def test_a_row_holds_finite_numbers(value, ratio):
    with pytest.raises(ValueError, match=r"case, peer, time: .* not finite"):
        Row("case", "peer", "time", value, "s", ratio)


def test_the_table_puts_ours_beside_each_peer():
    report = Report("a device")
    report.add("mixed images", "time", "s", {"k25lite": 2.0, "one peer": 3.0, "another": 1.0})
    report.add("mixed images", "load", "s", {"k25lite": 12345.0})
    device, head, case, *lines = report.table().splitlines()
    assert (device, case) == ("a device", "mixed images")
    assert head.split() == ["k25lite", "peer", "ratio", "unit,", "peer"]
    assert [" ".join(line.split()) for line in lines] == [
        "time 2 3 s, one peer",
        "time 2 1 s, another",
        "load 12,345 s",
    ]


@pytest.mark.parametrize("difference", [0.2, float("nan"), float("inf")])
def test_what_differs_is_refused(difference):
    with pytest.raises(Disagreement, match=r"mixed images: outputs of peer and of k25lite differ by .*; not timed"):
        bench.refuse_difference("mixed images", "peer", "outputs", difference, 0.1)


def test_what_agrees_is_not_refused():
    bench.refuse_difference("mixed images", "peer", "outputs", 0.1, 0.1)


def test_relative_difference_is_taken_over_all_tensors_together():
    reference = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    ours = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[4.0]])}
    assert bench.relative_difference(ours, reference) == pytest.approx(1 / 5)


def test_the_yardstick_is_the_product_with_the_most_operations_per_second(monkeypatch):
    seconds = {2: 1.0, 4: 2.0, 8: 100.0}  # 16, 64 and 10.24 operations per second
    monkeypatch.setattr(
        bench, "median_seconds", lambda calls, *_, **__: {n: seconds[len(c.left)] for n, c in calls.items()}
    )
    product = bench.fastest_product(CPU, torch.float32, list(seconds))
    assert (len(product.left), product.flops) == (4, 128)


def test_a_matrix_product_multiplies():
    product = MatrixProduct(5, CPU, torch.float64)
    product()
    torch.testing.assert_close(product.result, torch.einsum("ij,jk->ik", product.left, product.right))


def test_devices_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.devices() == [CPU]
    with pytest.raises(ValueError, match="there is no CUDA device"):
        bench.devices("cuda")
    with pytest.raises(ValueError, match="device is 'cpu' or 'cuda', got 'tpu'"):
        bench.devices("tpu")
