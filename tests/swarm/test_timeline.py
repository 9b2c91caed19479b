import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import expect
from test_scorecard import CONTRASTS
from traces import many

from k25lite.swarm import Orchestrator, Reply, ScriptedPolicy, ToolCall, Trace, call
from k25lite.swarm import timeline as module
from k25lite.swarm.critical import critical_path, summarise
from k25lite.swarm.timeline import timeline
from k25lite.swarm.trace import encode

EVIL = [
    "<script>window.broken = 1; alert(1)</script>",
    '"><img src=x onerror="window.broken = 1">',
    "</script><script>window.broken = 1</script>",
    "<!-- <script>",
    "{{ 7 * 7 }} ${7 * 7}",
    "javascript:window.broken=1",
    "<a href='javascript:window.broken=1'>here</a>",
    "\u2028\u2029&lt;b&gt;",
]
ALL_EVIL = " ".join(EVIL)


async def page_of(number: int) -> str:
    """Read a page."""
    await asyncio.sleep(0.002 * number)
    if number == 3:
        raise TimeoutError("no answer")
    return f"Page {number}. " + "It goes on. " * 200


def orchestrate(messages):
    step = sum(message["role"] == "assistant" for message in messages)
    if step == 0:
        names = ("quick", "slow", "broken", "chief")
        makes = (call("create_subagent", name=name, system_prompt=f"You are {name}.") for name in names)
        return Reply("I split it.", tuple(makes), prompt_tokens=1000, completion_tokens=234, cost=0.0125)
    if step == 1:
        names = ("quick", "slow", "broken")
        return Reply(calls=tuple(call("assign_task", agent=name, prompt=f"Work, {name}.") for name in names))
    if step == 2:
        return Reply(calls=(call("assign_task", agent="chief", prompt="Lead."), call("page_of", number=1)))
    return Reply("All is well.")


async def work(messages):
    step, task = sum(message["role"] == "assistant" for message in messages), messages[1]["content"]
    await asyncio.sleep(0.06 if "slow" in task else 0.004)
    if "broken" in task:
        raise ConnectionError("endpoint down")
    if "Lead" in task and step < 2:
        made = call("create_subagent", name="helper", system_prompt="You help.")
        return Reply(calls=(call("assign_task", agent="helper", prompt="Help.") if step else made,))
    if step == 0:
        return Reply("I read.", tuple(call("page_of", number=number) for number in (1, 2, 3)))
    return Reply(f"Result of: {task}")


def run(policy, sub_policy, tools=(), **team):
    trace = Trace()
    task = "Which probes flew?"
    Orchestrator(ScriptedPolicy(policy), tools, sub_policy=ScriptedPolicy(sub_policy), team=team).run_sync(task, trace)
    return trace.events


@pytest.fixture(scope="module")
def events():
    return run(orchestrate, work, [page_of], max_depth=2, retries=1)


def open_page(browser_page, events, folder, **size):
    html = timeline(events, folder / "timeline.html")
    page = browser_page.open(html, **({"width": 1280, "height": 800} | size))
    page.locator(".row").first.wait_for()
    return page


def lane(page, path):
    return page.locator(f'.row[data-path="{path}"]')


def where(page, path, bar):
    """The middle of a bar on the screen."""
    return page.evaluate(
        """([path, n]) => {
          const a = at.get(path), b = box(a.bars[n], rowOf[a.i]), corner = $("bars").getBoundingClientRect();
          return [corner.left + b.left + b.width / 2, corner.top + b.top + b.height / 2];
        }""",
        [path, bar],
    )


@pytest.mark.browser
def test_numbers_on_the_page_are_those_of_the_summary(events, tmp_path, browser_page):
    page = open_page(browser_page, events, tmp_path)
    summary = summarise(events)

    def tile(key):
        return page.locator(f'[data-number="{key}"] dd').inner_text().split("\n")

    assert tile("critical_steps")[0] == f"{summary.critical_steps:,}"
    assert tile("total_steps")[0] == f"{summary.total_steps:,}"
    assert tile("parallelism") == ["2.0", "stages: 3, 1"] == [f"{summary.mean_parallelism:.1f}", "stages: 3, 1"]
    assert tile("ideal_speed_up")[0] == f"{summary.ideal_speed_up:.2f}×"
    assert tile("achieved_speed_up")[0] == f"{summary.achieved_speed_up:.2f}×"
    assert tile("wall")[0] == f"{summary.wall:,.2f} s"
    assert tile("tokens")[0] == f"{summary.tokens:,}" == "1,234"
    assert tile("cost")[0] == f"${summary.cost:.4f}" == "$0.0125"
    assert summary.counts == {"done": 4, "failed": 1, "running": 0}
    assert tile("counts") == ["4", "1 failed of 5"]
    assert page.locator("h1").inner_text() == "Which probes flew?"
    assert page.locator("#status").inner_text() == "Done"
    assert page.locator("#answer").inner_text() == "All is well."
    assert browser_page.errors == []
    assert browser_page.requests == [(tmp_path / "timeline.html").as_uri()]


@pytest.mark.browser
def test_lanes_follow_the_tree_and_a_click_shows_the_whole_conversation(events, tmp_path, browser_page):
    page = open_page(browser_page, events, tmp_path)
    rows = page.locator(".row").evaluate_all("all => all.map(e => [e.dataset.path, e.ariaLevel])")
    paths = ["0", "0.2.0", "0.2.1", "0.2.2", "0.2.2#2", "0.3.0", "0.3.0.2.0"]
    assert rows == [[path, str(level)] for path, level in zip(paths, [1, 2, 2, 2, 2, 2, 3], strict=True)]
    panel = page.locator("#panel")
    assert panel.is_hidden()

    lane(page, "0.2.1").click()
    texts = panel.inner_text()
    pieces = ["slow", "done", "You are slow.", "Tools: page_of", "Work, slow.", "I read.", "page_of", "number: 1"]
    pieces += ["Page 1. It goes on.", "Page 2.", "error: page_of: TimeoutError: no answer", "Result of: Work, slow."]
    place = 0
    for piece in pieces:
        assert piece in texts[place:]
        place = texts.index(piece, place)
    tallest = "all => Math.max(...all.map(e => e.offsetHeight))"
    height = panel.locator(".said").evaluate_all(tallest)
    panel.get_by_role("button", name="Show all").first.click()
    assert panel.locator(".said").evaluate_all(tallest) > height

    lane(page, "0.2.2").click()
    assert "policy: ConnectionError: endpoint down" in panel.inner_text()
    panel.get_by_role("button", name="attempt 2").click()
    assert "broken (attempt 2)" in panel.locator("h2").inner_text()
    expect(lane(page, "0.2.2#2")).to_have_attribute("aria-selected", "true")

    lane(page, "0").click()
    texts = panel.inner_text()
    assert "Sub-agent made" in texts
    assert "Result of: Lead." in texts
    panel.get_by_role("button", name="chief").click()
    assert "Result of: Help." in panel.inner_text()
    page.keyboard.press("Escape")
    assert panel.is_hidden()


@pytest.mark.browser
def test_critical_path_is_marked_in_the_legend_the_bars_and_the_tooltips(events, tmp_path, browser_page):
    page = open_page(browser_page, events, tmp_path)
    assert "Critical path" in page.get_by_role("list", name="Legend").inner_text()
    shown = page.evaluate("path.map(p => [p.a.path, p.bar.began])")
    assert shown == [[span.path, span.began] for span in critical_path(summarise(events))]
    assert {path for path, _ in shown} == {"0", "0.2.1", "0.3.0", "0.3.0.2.0"}
    edge = """([x, y]) => { const c = $("bars"), at = c.getBoundingClientRect();
      const pixels = c.getContext("2d").getImageData(x - at.left, 0, 1, c.height).data, found = [];
      for (let i = 0; i < pixels.length; i += 4) found.push([...pixels.slice(i, i + 3)].join());
      return found.slice(y - at.top - 10, y - at.top + 10); }"""
    critical = "163,19,108"
    lanes = [("0.2.1", "slow", True), ("0.2.0", "quick", False), ("0.2.2#2", "broken (attempt 2)", False)]
    for path, name, marked in lanes:
        x, y = where(page, path, 0)
        assert (critical in page.evaluate(edge, [x, y])) == marked
        page.mouse.move(x, y)
        expect(page.locator("#tip b")).to_have_text(name)
        assert ("on the critical path" in page.locator("#tip").inner_text()) == marked
    expect(page.locator("#tip")).to_contain_text("Failed: policy: ConnectionError: endpoint down")
    page.get_by_role("button", name="Critical path only").click()
    assert page.locator("#count").inner_text() == "4 of 7 agents"


@pytest.fixture(scope="module")
def evil_events():
    def orchestrate(messages):
        step = sum(message["role"] == "assistant" for message in messages)
        if step == 0:
            return Reply(ALL_EVIL, tuple(call("create_subagent", name=evil, system_prompt=ALL_EVIL) for evil in EVIL))
        if step == 1:
            calls = (call("assign_task", agent=evil, prompt=f"{number} {ALL_EVIL}") for number, evil in enumerate(EVIL))
            return Reply(calls=(*calls, *(ToolCall("", evil, ALL_EVIL) for evil in EVIL)))
        return Reply(ALL_EVIL)

    def work(messages):
        if messages[1]["content"].startswith("0"):
            raise ValueError(ALL_EVIL)
        if messages[1]["content"].startswith("1"):
            return Reply(refusal=ALL_EVIL)
        return Reply(ALL_EVIL) if len(messages) > 2 else Reply(calls=(call("echo", **{ALL_EVIL: ALL_EVIL}),))

    events = run(orchestrate, work)
    events[0]["task"] = events[-1]["answer"] = ALL_EVIL
    return events


@pytest.mark.browser
def test_what_models_and_tools_wrote_is_shown_and_never_run(evil_events, tmp_path, browser_page):
    dialogs = []
    browser_page.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page = open_page(browser_page, evil_events, tmp_path)
    assert page.locator("h1").text_content() == ALL_EVIL
    assert page.locator("#answer").text_content() == ALL_EVIL
    names = page.locator(".row .name").evaluate_all("all => all.map(e => e.textContent)")
    assert names == ["orchestrator", *EVIL]
    for number in range(len(names)):
        page.locator(".row").nth(number).click()
        for summary in page.locator("#panel summary").all():
            summary.click()
        assert page.locator("#panel").evaluate("e => e.textContent").count(ALL_EVIL) >= 3
        page.mouse.move(*where(page, "0" if number == 0 else f"0.2.{number - 1}", 0))
    assert page.locator("script").count() == 2
    assert page.locator("img, iframe, a, object, embed, base, form").count() == 0
    assert page.evaluate("window.broken") is None
    assert dialogs == []
    assert browser_page.errors == []
    assert browser_page.requests == [(tmp_path / "timeline.html").as_uri()]


@pytest.mark.browser
def test_keyboard_filter_and_zoom(events, tmp_path, browser_page):
    page = open_page(browser_page, events, tmp_path)

    chosen, rows = page.locator('.row[aria-selected="true"]'), page.locator(".row")
    page.locator("#lanes").focus()
    for key in ("ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    expect(chosen).to_have_attribute("data-path", "0.2.1")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "slow"
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(rows).to_have_count(1)
    expect(rows).to_have_attribute("aria-expanded", "false")
    assert rows.locator("small").inner_text() == "5 agents"
    page.keyboard.press("ArrowRight")
    expect(rows).to_have_count(7)

    page.keyboard.press("+")
    page.keyboard.press("Shift+ArrowRight")
    start, end = page.evaluate("[view.from, view.to]")
    wall = summarise(events).wall
    assert end - start < 0.7 * wall
    assert start > 0.2 * wall
    page.get_by_role("button", name="Fit").click()
    assert page.evaluate("[view.from, view.to]") == [0, pytest.approx(1.01 * wall)]
    canvas = page.locator("#bars").bounding_box()
    page.mouse.move(canvas["x"] + canvas["width"] * 0.4, canvas["y"] + 10)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -600)
    page.keyboard.up("Control")
    page.evaluate("async () => { while (view.to - view.from > 0.6 * full) await new Promise(requestAnimationFrame); }")
    under_the_mouse = page.evaluate("time(0.4 * wide())")
    assert under_the_mouse == pytest.approx(0.4 * 1.01 * wall, rel=0.02)

    page.locator("#lanes").focus()
    page.keyboard.press("/")
    page.keyboard.type("failed")
    assert page.locator("#count").inner_text() == "2 of 7 agents"
    expect(rows).to_have_count(3)  # the orchestrator stays, as their parent
    page.locator("#filter").fill("nobody")
    expect(page.locator("#none")).to_be_visible()
    assert browser_page.errors == []


@pytest.mark.browser
def test_a_run_that_has_not_ended_is_drawn_as_far_as_it_went(events, tmp_path, browser_page):
    past = next(i for i, event in enumerate(events) if event["event"] == "result" and event["path"] == "0.2.0")
    lines = [encode(event) for event in events[: past + 1]]
    (tmp_path / "run.jsonl").write_text("\n".join(lines) + '\n{"t": 1, "eve')
    page = open_page(browser_page, tmp_path / "run.jsonl", tmp_path)
    assert page.locator("#status").inner_text() == "Not ended"
    page.mouse.move(*where(page, "0.2.1", -1 % page.evaluate("at.get('0.2.1').bars.length")))
    expect(page.locator("#tip")).to_contain_text("Under way")
    lane(page, "0.2.1").click()
    assert "None in the trace." in page.locator("#panel").inner_text()
    assert browser_page.errors == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_legible_in_both_schemes(events, tmp_path, browser_page, scheme):
    browser_page.page.emulate_media(color_scheme=scheme)
    for size in ({"width": 390, "height": 844}, {"width": 1280, "height": 800}):
        page = open_page(browser_page, events, tmp_path, **size)
        lane(page, "0.2.1").click()
        page.locator("#panel h2").wait_for()
        assert browser_page.overflow() == 0
        assert min(page.evaluate(CONTRASTS)) >= 4.5


@pytest.mark.browser
def test_ten_thousand_assignments_are_on_one_page(tmp_path, browser_page):
    page = open_page(browser_page, many(10_000), tmp_path)
    assert page.locator("#count").inner_text() == "10,001 agents"
    page.locator("#lanes").focus()
    page.keyboard.press("End")
    lane(page, "0.40.249").wait_for()
    assert page.locator(".row").count() < 50
    lane(page, "0.40.249").click()
    assert "Find number 9999" in page.locator("#panel").inner_text()
    page.locator("#filter").fill("number 4321")
    assert page.locator("#count").inner_text() == "1 of 10,001 agents"
    assert browser_page.errors == []


@given(st.text(alphabet=st.characters(codec=None)) | st.sampled_from(EVIL))
def test_data_cannot_leave_its_script_element(text):
    island = module._as_island({"text": text})
    assert not set(island) & set("<>&\u2028\u2029")
    assert json.loads(island) == {"text": text}


def test_half_a_surrogate_pair_does_not_keep_the_page_from_being_written(tmp_path):
    events = many(1, each=1)
    events[0]["task"] = events[2]["prompt"] = events[-1]["answer"] = "half \ud83d"
    assert "half ?" in timeline(events, tmp_path / "timeline.html").read_text()


def test_texts_are_cut_only_as_far_as_the_page_needs():
    texts = ["short", "x" * 30_000]
    assert module._shortened(texts, module.TEXTS) == ["short", "x" * 24_000 + " [6,000 characters left out]"]
    assert module._shortened(texts, 10_000) == ["short", "x" * 6_000 + " [24,000 characters left out]"]


def test_a_page_of_many_long_texts_is_as_small_as_asked_and_shows_every_agent(tmp_path):
    said = "".join(f"{number} " for number in range(1000))
    whole, small = (
        timeline(many(500, said=said), tmp_path / f"{limit}.html", characters=limit) for limit in (10**7, 10**5)
    )
    assert whole.stat().st_size > 1_900_000
    assert small.stat().st_size < whole.stat().st_size - 1_700_000
    assert "characters left out]" in small.read_text()
    assert all(f"Find number {number}:" in small.read_text() for number in range(500))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        timeline([], tmp_path / "timeline.html")
    with pytest.raises(ValueError, match="begins with"):
        timeline(many(1, each=1)[1:], tmp_path / "timeline.html")
    with pytest.raises(FileNotFoundError):
        timeline(tmp_path / "none.jsonl", tmp_path / "timeline.html")
    assert not (tmp_path / "timeline.html").exists()
