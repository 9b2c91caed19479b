import json

import pytest

from k25lite.results import Record
from k25lite.scorecard import VERDICTS, build, interval_bar, number

SCRIPT = "<script>alert(1)</script>"
BETTER, WORSE, SAME = [0.7, 0.8, 0.9], [0.2, 0.35, 0.5], [0.8, 0.7, 0.95]


# WCAG 2.2: the contrast of every text on the page with the ground it stands on
CONTRASTS = """() => {
  const rgb = colour => colour.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const ground = element => {
    const colour = rgb(getComputedStyle(element).backgroundColor);
    return colour[3] === 0 ? ground(element.parentElement) : colour;
  };
  const hasText = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll("body *:not(svg *)")].filter(hasText).map(element => {
    const pair = [rgb(getComputedStyle(element).color), ground(element)].map(luminance);
    return (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
  });
}"""


def write(folder, name, fill, profile="lite"):
    record = Record(name, profile, range(3), device="Test Device", commit="c0ffee" * 6 + "beef-dirty", versions={})
    fill(record)
    return record.save(folder / "results" / f"{name}.json")


def three_verdicts(record):
    common = {"report": "65.7 vs 61.5", "source": "Table 1", "arms": ("early", "late")}
    record.compare("early>late", BETTER, WORSE, **common, unit="accuracy")
    record.compare("late>early", WORSE, BETTER, **common, reason="measured: too few steps")
    record.compare("early>mid", BETTER, SAME, **common)
    record.compare("seconds.down", WORSE, BETTER, **common, direction=-1)
    record.check("parity", 2e-6, 1e-5, source="section 4.2")
    record.check("isolation", float("nan"), 1e-5, source="section 4.2")
    record.metric("tokens_per_second", 128000.0, unit="tokens/s")


def hostile(record):
    name = SCRIPT + ".a_name_without_any_place_to_break_it" * 4
    text = {"report": SCRIPT, "source": SCRIPT, "reason": "<img src=http://example.org/x onerror=alert(1)>"}
    record.claim(name, ours=SCRIPT, ci95=None, n=1, holds=None, unit=SCRIPT, **text)
    record.claim("wide", ours={"arm" * 20: -1.23456789e-30}, ci95=(-1e-30, 1e30), n=3, holds=None, **text)
    record.check(name, 1e300, 1e-300, source=SCRIPT, unit=SCRIPT * 3)
    record.metric(name, -123456789.125, unit=SCRIPT * 3)


@pytest.fixture
def built(tmp_path):
    paths = [
        write(tmp_path, "01_three", three_verdicts),
        write(tmp_path, "02_hostile", hostile),
        write(tmp_path, "03_failed", three_verdicts),  # it failed after it had recorded
        tmp_path / "results" / "04_missing.json",
        tmp_path / "results" / "05_corrupt.json",
    ]
    paths[-1].write_text("{")
    return build(paths, tmp_path, {"03_failed": f"cell 3/9: ValueError: {SCRIPT}"})


def test_json_holds_every_notebook_and_the_counts(built):
    data = json.loads(built[1].read_text())
    assert data["summary"] == {
        "claims": {"holds": 2, "fails": 1, "not established": 3},
        "checks": {"passed": 1, "failed": 2},
        "notebooks": {"ran": 2, "failed": 3},
        "profiles": ["lite"],
    }
    assert [n["notebook"][:2] for n in data["notebooks"]] == ["01", "02", "03", "04", "05"]
    assert [bool(n["failure"]) for n in data["notebooks"]] == [False, False, True, True, True]
    assert "claims" not in data["notebooks"][2]
    assert data["notebooks"][0]["claims"][0]["per_seed"] == {"early": BETTER, "late": WORSE}


@pytest.mark.browser
def test_page_shows_each_verdict_beside_its_claim_and_asks_nothing_of_the_network(built, browser_page):
    page = browser_page.open(built[0])

    def claim(name):
        return page.locator(f'[data-claim="{name}"]')

    for name, verdict in {"early>late": "Holds", "late>early": "Fails", "early>mid": "Not established"}.items():
        assert claim(name).locator(".verdict").inner_text() == verdict
    assert claim("seconds.down").locator(".verdict").inner_text() == "Holds"
    assert claim("early>late").locator(".report").inner_text().split("\n") == ["Report", "65.7 vs 61.5"]
    ours = claim("early>late").locator(".ours").inner_text().split()
    assert ours == ["k25lite", "(accuracy)", "early", "0.8", "late", "0.35", "difference", "+0.45"]
    assert "3 seeds" in claim("early>late").locator(".interval").inner_text()
    assert "measured: too few steps" in claim("late>early").inner_text()
    assert "includes zero" in claim("early>mid").inner_text()
    assert page.locator('[data-check="parity"]').inner_text().startswith("Passed")
    assert page.locator('[data-check="isolation"]').inner_text().startswith("Failed")
    about = page.locator('[data-notebook="01_three"] .about').inner_text()
    assert "Test Device" in about
    assert "c0ffeec0ff with uncommitted changes" in about

    for name in ("03_failed", "04_missing", "05_corrupt"):
        assert "Notebook failed" in page.locator(f'[data-notebook="{name}"]').inner_text()
    assert page.locator('[data-notebook="02_hostile"] h3').first.inner_text().startswith(SCRIPT)
    assert f"ValueError: {SCRIPT}" in page.locator('[data-notebook="03_failed"]').inner_text()
    assert page.locator("script, img").count() == 0

    page.locator("label.fails").click()
    assert page.locator("article:visible").evaluate_all("all => all.map(a => a.dataset.claim)") == ["late>early"]
    assert browser_page.errors == []
    assert browser_page.requests == [built[0].as_uri()]


@pytest.mark.browser
def test_bar_is_drawn_where_the_interval_lies(built, browser_page):
    page = browser_page.open(built[0])

    def middle(name, part):
        box = page.locator(f'[data-claim="{name}"] .axis {part}').bounding_box()
        return box["x"] + box["width"] / 2

    assert middle("early>late", "circle") > middle("early>late", ".zero")
    assert middle("late>early", "circle") < middle("late>early", ".zero")
    # The shaded side is the report's: above zero, but below it where the report found less.
    assert middle("late>early", ".side") > middle("late>early", ".zero")
    assert middle("seconds.down", ".side") < middle("seconds.down", ".zero")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_is_legible_in_both_schemes(built, browser_page, scheme):
    browser_page.page.emulate_media(color_scheme=scheme)
    page = browser_page.open(built[0], width=390, height=844)
    assert browser_page.overflow() == 0
    assert min(page.evaluate(CONTRASTS)) >= 4.5


@pytest.mark.browser
def test_smoke_page_says_that_it_claims_nothing(tmp_path, browser_page):
    html, data = build([write(tmp_path, "01_three", three_verdicts, "smoke")], tmp_path)
    assert json.loads(data.read_text())["summary"]["claims"] == {"holds": 0, "fails": 0, "not established": 4}
    page = browser_page.open(html)
    assert "makes no scientific claim" in page.locator("header").inner_text()
    assert set(page.locator("article .verdict").all_inner_texts()) == {"Not established"}


def test_empty_scorecard_is_still_a_page(tmp_path):
    html, data = build([], tmp_path)
    assert "<h1>k25lite scorecard</h1>" in html.read_text()
    assert json.loads(data.read_text())["notebooks"] == []


def test_bar_places_keep_order_and_stay_on_the_axis():
    record = Record("n", "lite", range(3), device="", commit=None, versions={})
    for i, differences in enumerate([[0.1, 0.2, 0.3], [-3.0, -2.0, -2.5], [-1.0, 1.0, 0.5], [2.0] * 3, [0.0] * 3]):
        bar = interval_bar(record.compare(str(i), differences, report="", source=""))
        assert 0 <= bar["low"] <= bar["mean"] <= bar["high"] <= 100
        assert 0 <= bar["zero"] <= 100
    assert set(VERDICTS) == {True, False, None}


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (0, {}, "0"),
        (128000.0, {}, "128,000"),
        (0.72400001, {}, "0.724"),
        (-0.086, {"signed": True}, "−0.086"),
        (0.0297123, {"signed": True, "digits": 3}, "+0.0297"),
        (9.9999, {}, "10"),
        (3.1e-6, {}, "3.1 × 10⁻⁶"),
        (1e300, {}, "1 × 10³⁰⁰"),
        (None, {}, "not finite"),
    ],
)
def test_numbers_read_well(value, options, text):
    assert number(value, **options) == text
