import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("agg")
import matplotlib.pyplot as plt

from k25lite import plots
from k25lite.results import paired_interval

SCORES = {"early": [0.70, 0.73, 0.71], "mid": [0.68, 0.69, 0.70], "late": [0.60, 0.66, 0.65]}
FRAME = pd.DataFrame(
    [{"injection": a, "seed": s, "accuracy": v} for a, values in SCORES.items() for s, v in enumerate(values)]
)


@pytest.fixture(autouse=True)
def _theme():
    with mpl.rc_context():
        plots.use_theme()
        yield
        plt.close("all")


def test_arms_show_every_seed_its_pairing_and_the_t_interval():
    ax = plots.compare_arms(FRAME, x="injection", y="accuracy")
    ax.figure.canvas.draw()
    dots = {(round(place), value) for points in ax.collections for place, value in points.get_offsets()}
    assert {(i, v) for i, values in enumerate(SCORES.values()) for v in values} <= dots
    threads = [line.get_ydata() for line in ax.lines[:3]]
    np.testing.assert_allclose(threads, np.array(list(SCORES.values())).T)
    for container, values in zip(ax.containers, SCORES.values(), strict=True):
        mean, _, (bar,) = container
        assert mean.get_ydata()[0] == pytest.approx(np.mean(values))
        interval = paired_interval(values)
        np.testing.assert_allclose(bar.get_segments()[0][:, 1], [interval.low, interval.high])


def test_one_seed_has_a_mean_and_no_interval():
    ax = plots.compare_arms(FRAME[FRAME.seed == 0], x="injection", y="accuracy")
    ax.figure.canvas.draw()
    assert [mean.get_ydata()[0] for mean, _, _ in ax.containers] == [0.70, 0.68, 0.60]
    assert not any(len(segment) for _, _, (bar,) in ax.containers for segment in bar.get_segments())


def test_a_seed_measured_twice_is_refused():
    with pytest.raises(ValueError, match="duplicate"):
        plots.compare_arms(pd.concat([FRAME, FRAME]), x="injection", y="accuracy")


def test_report_and_ours_stand_in_panels_and_scales_of_their_own():
    table = {"late": 61.5, "mid": 64.1, "early": 65.7, "never": 60.0}
    figure = plots.report_beside_ours(
        table, FRAME, x="injection", y="accuracy", source="Table 1", report_unit="OCR score"
    )
    figure.canvas.draw()
    left, right = figure.axes
    assert left.get_title(loc="left") == "Report, Table 1"
    assert right.get_title(loc="left") == "k25lite, 3 seeds"
    assert [t.get_text() for t in right.get_xticklabels()] == ["late", "mid", "early"]
    assert list(left.lines[0].get_ydata()) == list(table.values())
    assert right.get_ylim()[1] < 1 < left.get_ylim()[0]


def test_curves_show_each_seed_and_the_mean():
    steps = np.arange(5)
    rows = [(t, s, a, t * k + s) for a, k in {"early": 1.0, "late": 2.0}.items() for s in range(3) for t in steps]
    frame = pd.DataFrame(rows, columns=["step", "seed", "arm", "loss"])
    ax = plots.seed_curves(frame, x="step", y="loss", hue="arm")
    curves = [line.get_ydata() for line in ax.lines if len(line.get_ydata())]
    assert len(curves) == 2 * 3 + 2
    for expected in (steps + 1.0, 2 * steps + 1.0):  # the mean over seeds, which here is also the middle seed
        assert sum(np.allclose(curve, expected) for curve in curves) == 2
    assert len(plots.seed_curves(frame[frame.arm == "late"], x="step", y="loss").lines) == 4


def test_controls_call_the_drawing_where_there_is_a_front_end_and_are_left_out_where_not(monkeypatch):
    seen = []
    monkeypatch.delenv("K25LITE_STATIC", raising=False)
    plots.explore(lambda x: seen.append(x), x=widgets.IntSlider(3, 0, 9))
    assert seen == [3]
    monkeypatch.setenv("K25LITE_STATIC", "1")
    plots.explore(lambda x: seen.append(x), x=widgets.IntSlider(4, 0, 9))
    assert seen == [3]


def test_an_arm_keeps_its_colour_in_every_figure():
    colours = {"late": "#123456"}
    ax = plots.compare_arms(FRAME, x="injection", y="accuracy", order=["late", "early"], colours=colours)
    assert [mean.get_color() for mean, _, _ in ax.containers] == ["#123456", plots.PALETTE[1]]
    curves = FRAME.assign(step=0)
    ax = plots.seed_curves(curves, x="step", y="accuracy", hue="injection", colours=colours)
    drawn = {line.get_color() for line in ax.lines if len(line.get_ydata())}
    assert drawn == {"#123456", *plots.PALETTE[:2]}
