"""The report in a real browser: read, searched, watched, by mouse and keyboard, on a phone, in the dark, at full scale."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from colours import colour_model, write_truth, write_video
from playwright.sync_api import expect
from test_scorecard import CONTRASTS
from traces import many

from k25lite.gameplay.analyze import analyze
from k25lite.gameplay.director import Outcome
from k25lite.gameplay.events import KINDS
from k25lite.gameplay.merge import Found
from k25lite.gameplay.report import Scored, build, compare
from k25lite.gameplay.scoring import score
from k25lite.gameplay.segments import Footage, Segment
from k25lite.gameplay.story import clock, length, overall, tell

EVIL = "<img src=x onerror=window.broken=1> \"q\" 'a' & %41 #1 é文 {{7*7}}.mp4"
PLAIN = "plain.mp4"
SHOWN = {
    EVIL: [(2.0, 6.0, "fight"), (8.0, 12.0, "boss"), (12.5, 14.5, "death"), (16.0, 18.0, "level")],
    PLAIN: [(1.0, 2.5, "pickup"), (5.0, 9.0, "fight")],
}
TRUE = {  # a level is missed, and a boss is wrong
    EVIL: [(2.0, 6.0, "fight"), (12.5, 14.5, "death"), (16.0, 18.0, "level")],
    PLAIN: [(1.0, 2.5, "pickup"), (5.0, 9.0, "fight"), (14.0, 16.0, "level")],
}


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd 'folder' <b>&")
    for name, shown in SHOWN.items():
        write_video(folder / name, shown, 20.0)
    truth = write_truth(folder / "events.jsonl", TRUE)
    rows = [
        f'"{name.replace(chr(34), chr(34) * 2)}",{second},{100 - 4 * second}' for name in SHOWN for second in range(20)
    ]
    (folder / "states.csv").write_text("\n".join(["video,second,health", *rows]) + "\n", encoding="utf-8")
    analyze([folder], folder / "out", truth=truth, model=colour_model, workers=1, progress=False)
    return folder / "out"


@pytest.fixture
def report(analysed):
    return analysed / "report" / "index.html"


def rows(page):
    return page.locator("#list .row .title").all_inner_texts()


def plays(page, beyond):
    """Wait until the player's clock is beyond so many seconds; the page's policy lets no test evaluate strings."""
    page.evaluate(
        "async s => { while ($('player').currentTime <= s) await new Promise(requestAnimationFrame); }", beyond
    )


def drawn(page, name):
    page.locator(f"#plot-{name}").scroll_into_view_if_needed()
    page.locator(f"#plot-{name} .main-svg").first.wait_for()


@pytest.mark.browser
def test_the_report_is_searched_and_its_clips_play_from_the_disk(report, browser_page):
    page = browser_page.open(report)
    assert page.locator("#count").inner_text() == "6 events"
    assert rows(page) == ["fight", "boss\nwrong", "death", "level", "pickup", "fight"]
    page.get_by_role("button", name="fight", exact=True).click()
    assert rows(page) == ["boss\nwrong", "death", "level", "pickup"]
    assert page.locator("#count").inner_text() == "4 of 6 events"
    page.locator("#search").fill("PLAIN pick")
    assert rows(page) == ["pickup"]
    page.locator("#search").fill("nowhere")
    expect(page.locator("#none")).to_be_visible()
    page.get_by_role("button", name="Reset").click()
    page.locator("#video").select_option(label=PLAIN)
    assert rows(page) == ["pickup", "fight"]
    page.get_by_role("button", name="Reset").click()
    page.locator("#status").select_option("missed")
    assert rows(page) == ["level\nmissed"]
    page.locator("#status").select_option("wrong")
    assert rows(page) == ["boss\nwrong"]
    page.get_by_role("button", name="Reset").click()
    page.locator("#least").fill("100")
    assert len(rows(page)) < 6
    page.get_by_role("button", name="Reset").click()

    page.locator(".row").nth(1).click()
    plays(page, beyond=0.3)
    about = page.locator("#about").inner_text()
    assert "boss at 0:08" in about
    assert EVIL in about
    assert re.search(r"clips/[0-9a-f]{10}-\d+-\d+\.mp4$", page.locator("#player").get_attribute("src"))
    assert 5 < page.evaluate("document.getElementById('player').duration") < 7
    assert page.locator("#strip img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)")
    page.locator("#strip button").last.click()
    assert page.evaluate("document.getElementById('player').paused")
    page.get_by_role("button", name="Play from the original video").click()
    plays(page, beyond=7.2)
    assert browser_page.errors == []
    assert all(url.startswith("file:") or url.startswith("data:") for url in browser_page.requests)


@pytest.mark.browser
def test_names_of_files_are_shown_and_never_run(report, browser_page):
    page = browser_page.open(report)
    for name in ("timeline", "rate", "lengths", "health", "swarm"):
        drawn(page, name)
    assert page.locator(".row .name").first.inner_text() == EVIL
    assert page.locator(".video summary b").first.inner_text().removeprefix("▸ ") == EVIL
    assert page.locator("#video option").all_inner_texts() == ["all", EVIL, PLAIN]
    assert page.locator("img[src=x]").count() == 0
    sources = page.locator("script[src]").evaluate_all("all => all.map(e => e.getAttribute('src'))")
    assert sorted(sources) == ["data.js", "plotly.min.js"]
    assert page.evaluate("window.broken") is None
    page.mouse.move(*middle(page, 0))
    assert page.evaluate("window.broken") is None
    assert browser_page.errors == []


def middle(page, event):
    """Where on the screen the start of an event is in the timeline."""
    drawn(page, "timeline")
    return page.evaluate(
        """i => {
          const box = $("plot-timeline"), {xaxis, yaxis} = box._fullLayout, at = box.getBoundingClientRect(), e = events[i];
          return [at.left + xaxis._offset + xaxis.d2p(e.start), at.top + yaxis._offset + yaxis.d2p(lane(e))]; }""",
        event,
    )


@pytest.mark.browser
def test_a_click_in_the_timeline_and_on_a_mistake_shows_the_event(report, browser_page):
    page = browser_page.open(report)
    page.mouse.move(*middle(page, 2))
    page.mouse.click(*middle(page, 2))
    expect(page.locator("#what")).to_contain_text("death at 0:12")
    expect(page.locator(".row[aria-selected=true] b")).to_have_text("death")
    assert page.locator("#mistakes .mistake").count() == 2
    page.get_by_role("button", name="wrong", exact=True).click()
    page.locator("#mistakes .mistake").click()
    expect(page.locator("#what")).to_contain_text("level at 0:14")
    expect(page.locator("#what")).to_contain_text("missed")
    plays(page, beyond=13)  # in the original video
    assert browser_page.errors == []


@pytest.mark.browser
def test_an_original_video_that_is_gone_leaves_the_key_frame(analysed, tmp_path, browser_page):
    moved = tmp_path / "elsewhere" / "report"
    shutil.copytree(analysed / "report", moved)
    page = browser_page.open(moved / "index.html")
    page.locator("#status").select_option("missed")
    page.locator(".row").click()
    expect(page.locator("#still")).to_be_visible()
    assert "does not lie where it was" in page.locator("#message").inner_text()


@pytest.mark.browser
def test_the_keyboard_is_enough(report, browser_page):
    page = browser_page.open(report)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.kind") == "0"
    page.keyboard.press("Space")
    assert len(rows(page)) == 4
    page.keyboard.press("Space")
    page.locator("#list").focus()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    for key in ("ArrowDown", "ArrowDown", "End", "ArrowUp"):
        page.keyboard.press(key)
    expect(page.locator(".row[aria-selected=true] b")).to_have_text("pickup")
    assert page.locator("#list").get_attribute("aria-activedescendant") == page.locator(
        ".row[aria-selected=true]"
    ).get_attribute("id")
    page.keyboard.press("Enter")
    plays(page, beyond=0.1)
    page.keyboard.press("k")
    expect(page.locator(".row[aria-selected=true] b")).to_have_text("level")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_is_legible_in_both_schemes(report, browser_page, scheme):
    browser_page.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for width, height in ((375, 812), (1280, 900)):
        page = browser_page.open(report, width=width, height=height)
        page.locator(".row").nth(1).click()
        for details in page.locator("details").all():
            details.evaluate("e => e.open = true")
        for name in ("timeline", "rate", "lengths", "health", "swarm"):
            drawn(page, name)
        assert browser_page.overflow() == 0
        assert min(page.evaluate(CONTRASTS)) >= 4.5
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def a_day(count=10_000):
    """24 hours in 32 videos with so many events, and as many true ones, most of them the same."""
    rng = random.Random(0)
    videos = [
        Footage(
            Path(f"/day/gameplay_{n:04d}.mp4"),
            f"gameplay_{n:04d}.mp4",
            f"{n:064x}",
            2700.0,
            8.75,
            160,
            120,
            0,
            "h264",
            1,
        )
        for n in range(32)
    ]
    events, taken = [], set()
    while len(events) < count:
        start = round(rng.uniform(0, 2680), 3)
        key = (video := rng.choice(videos).name, kind := rng.choice(KINDS), start)
        if key not in taken:
            taken.add(key)
            end = round(start + rng.expovariate(0.15) + 0.5, 3)
            keyframes = tuple(sorted(round(rng.uniform(start, end), 3) for _ in range(3)))
            events.append(Found(video, start, min(end, 2700.0), kind, round(rng.random(), 3), keyframes))
    return videos, sorted(events), sorted(rng.sample(events, count - 500))


@pytest.mark.browser
def test_a_day_of_video_is_small_and_soon_there(analysed, tmp_path, browser_page):
    videos, events, true = a_day()
    names = [video.name for video in videos]
    health = {name: [(float(s), 100.0 - s % 90) for s in range(2700)] for name in names}
    segments = {
        Segment(name, 300.0 * n, 300.0 * n + 300): "twelve fights, a boss and three pickups"
        for name in names
        for n in range(9)
    }
    outcome = Outcome(events, {}, segments, dict.fromkeys(names, 2700.0))
    scored = compare(true, events, score(true, events), names)
    folder = tmp_path / "report"
    for kind in ("clips", "frames"):
        (folder / kind).mkdir(parents=True)
    for event in events:  # names alone are looked for
        digest = videos[names.index(event.video)].digest
        for time in event.keyframes:
            (folder / "frames" / f"{digest[:10]}-{round(time * 1000)}.webp").touch()

    def prompt(number):
        return json.dumps({"pass": "fine", "video": names[number % 32], "start": 0.0, "end": 300.0})

    trace = tmp_path / "trace.jsonl"  # of as many sub-agents as a day takes, who say as much
    said = many(450, each=50, said="0123456789 " * 450, ask=prompt)
    trace.write_text("".join(f"{json.dumps(event)}\n" for event in said))
    index = build(folder, videos, outcome, {}, trace, scored, health)
    assert sum((folder / name).stat().st_size for name in ("index.html", "data.js", "swarm.html")) <= 2_000_000
    page = browser_page.open(index)
    assert page.locator("#count").inner_text() == "10,000 events"
    page.locator("#list").focus()
    page.keyboard.press("End")
    expect(page.locator(".row[aria-selected=true]")).to_have_attribute("aria-posinset", "10000")
    assert page.locator(".row").count() < 40
    page.locator("#search").fill("gameplay_0031 boss")
    expected = sum(event.video == names[31] and event.kind == "boss" for event in events)
    assert page.locator("#count").inner_text() == f"{expected} of 10,000 events"
    drawn(page, "timeline")
    assert page.locator("#plot-timeline path.js-fill").count() == len(KINDS)
    assert browser_page.overflow() == 0


def test_numbers_on_the_page_are_those_of_the_files(analysed):
    page = (analysed / "report" / "index.html").read_text(encoding="utf-8")
    metrics = json.loads((analysed / "metrics.json").read_text())
    assert metrics["per_kind"]["boss"]["precision"] == 0.0
    assert metrics["per_kind"]["level"]["recall"] == 0.5
    assert f"<dd>{metrics['macro_f1']:.2f}</dd>" in page
    for number, name in ((6, "all"), (1, "boss"), (2, "fight"), (1, "death")):
        assert re.search(rf'data-number="{name}"><dt>[^<]*</dt><dd>{number}</dd>', page)
    assert "1 found that are not true, 1 true that were missed" in page


def test_mistakes_are_those_of_the_matching():
    found = [Found("a", 1.0, 2.0, "boss", 0.9), Found("a", 9.0, 10.0, "boss", 0.9)]
    true = [Found("a", 1.5, 2.0, "boss"), Found("a", 5.0, 6.0, "death"), Found("b", 1.0, 2.0, "boss")]
    scored = compare(true, found, score(true, found, videos=["a"]), ["a"])
    assert isinstance(scored, Scored)
    assert scored.wrong == {found[1]}
    assert scored.missed == [true[1]]


def test_stories_say_what_happened():
    events = [
        Found("a", 10.0, 20.0, "fight"),
        Found("a", 21.0, 22.0, "death"),
        Found("a", 40.0, 60.0, "boss"),
        Found("a", 61.0, 63.0, "death"),
        Found("a", 70.0, 72.0, "level"),
        Found("a", 75.0, 76.0, "pickup"),
    ]
    first, second = tell(events, 100.0)
    assert first == (
        "0:00 to 1:10, on the level the video opens with: one fight of ten seconds at 0:10. "
        "A boss at 0:40, for 20 seconds, until the player dies at 1:01. The player dies once, at 0:21."
    )
    assert second == "1:10 to 1:40, on level 2: one pickup."
    told = overall(events, {"a": 100.0, "b": 50.0})
    assert "one fight, one boss, one pickup, two deaths and one level" in told
    assert "Of one boss fight, one ends with the player's death." in told
    assert "Fighting fills 20% of the time." in told
    assert "The player dies twice, every 75 seconds on average." in told
    assert tell([], 30.0) == ["Nothing of note happens in 30 seconds."]
    assert overall([], {"a": 3600.0}) == "In 60 minutes of video nothing of note was found."


@pytest.mark.parametrize(
    ("seconds", "at", "long"),
    [
        (0, "0:00", "no seconds"),
        (1, "0:01", "one second"),
        (89, "1:29", "89 seconds"),
        (5400, "1:30:00", "1 h 30 min"),
        (86400, "24:00:00", "24 hours"),
    ],
)
def test_times_read_well(seconds, at, long):
    assert (clock(seconds), length(seconds)) == (at, long)
