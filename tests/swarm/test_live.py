import asyncio
import io
import re

import nbformat
import papermill
import pytest

from k25lite.reproduce import ThisPython
from k25lite.swarm import Orchestrator, Reply, ScriptedPolicy, Trace, call, read_trace
from k25lite.swarm.critical import summarise
from k25lite.swarm.live import MAX_LANES, LiveView, ProgressLine, View


class Terminal(io.StringIO):
    def isatty(self):
        return True


def orchestrate(messages):
    step = sum(message["role"] == "assistant" for message in messages)
    if step == 0:
        return Reply(calls=tuple(call("create_subagent", name=name, system_prompt="Work.") for name in "ab"))
    if step < 3:
        agents = "aabab" if step == 1 else "bb"
        tasks = (call("assign_task", agent=agent, prompt=f"{step} {n}") for n, agent in enumerate(agents))
        return Reply(calls=tuple(tasks), prompt_tokens=20, completion_tokens=5)
    return Reply("All done.", prompt_tokens=1000, completion_tokens=234)


def work(messages):
    step, task = sum(message["role"] == "assistant" for message in messages), messages[1]["content"]
    if task == "1 2":
        raise ConnectionError("endpoint down")
    if task == "1 3" and step < 2:
        made = call("create_subagent", name="c", system_prompt="Help.")
        return Reply(calls=(call("assign_task", agent="c", prompt="2 0") if step else made,))
    return Reply("Done.") if step >= int(task[-1]) else Reply(calls=(call("look"),), prompt_tokens=7)


async def look() -> str:
    """Look."""
    await asyncio.sleep(0)
    return "seen"


def orchestrator(policy=orchestrate, sub_policy=work, **team):
    team = {"max_depth": 2, "retries": 1} | team
    return Orchestrator(ScriptedPolicy(policy), [look], sub_policy=ScriptedPolicy(sub_policy), team=team)


def test_numbers_are_those_of_the_summary_after_every_event():
    class Checked(View):
        def __call__(self, event):
            super().__call__(event)
            events.append(event)
            summary = summarise(events)
            at_work = [path for path, work in summary.assignments.items() if path != "0" and work.status == "running"]
            assert (self.done, self.failed) == (summary.counts["done"], summary.counts["failed"])
            assert self.running == len(at_work)
            assert (self.critical_steps, self.steps) == (summary.critical_steps, summary.total_steps)
            assert self.tokens == summary.tokens

    events, view = [], Checked(every=0.0)
    orchestrator().run_sync("Go.", Trace(listeners=(view,)))
    assert (view.assigned, view.done, view.failed, view.status) == (8, 7, 1, "done")
    assert view.critical_steps < view.steps
    assert view.seconds == pytest.approx(events[-1]["t"], abs=0.01)


def test_a_terminal_shows_one_line_that_is_written_over(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    orchestrator().run_sync("Go.", Trace(listeners=(ProgressLine(stream, every=1e-9),)))
    lines = stream.getvalue().split("\r")[1:]
    assert len(lines) > 20
    assert all("\n" not in line for line in lines[:-1])
    assert max(len(line.rstrip("\n")) for line in lines) < 60
    assert re.fullmatch(r"done  [\d.]+ s  8 assigned  0 running  7 done  1 failed  \d+.*\n", lines[-1])


def test_a_log_gets_whole_lines_now_and_then():
    stream = io.StringIO()
    trace = Trace(listeners=(ProgressLine(stream),))
    orchestrator().run_sync("Go.", trace)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("running  0.0 s  0 assigned")
    summary = summarise(trace.events)
    assert last.startswith("done")
    assert last.endswith(f"{summary.critical_steps} critical steps  {summary.total_steps} steps  1,333 tokens")
    assert summary.tokens == 1333


class Counted(View):
    """Remembers what it was told to draw."""

    def __init__(self, every):
        super().__init__(every)
        self.drawn = []

    def draw(self, words):
        self.drawn.append(words)


def test_it_draws_on_a_clock_and_not_for_every_event():
    view = Counted(every=1000.0)
    orchestrator().run_sync("Go.", Trace(listeners=(view,)))
    assert [words[0] for words in view.drawn] == ["running", "done"]


def test_it_draws_while_nothing_happens():
    async def wait(messages):
        await asyncio.sleep(0.5)
        return "Done."

    view = Counted(every=0.02)
    Orchestrator(ScriptedPolicy(wait)).run_sync("Go.", Trace(listeners=(view,)))
    shown = [float(words[1].split()[0]) for words in view.drawn]
    assert len(shown) > 5
    assert shown == sorted(shown)
    assert 0.1 < shown[-2] < shown[-1] + 0.1


def test_a_run_that_is_broken_off_is_drawn_as_stopped_and_not_again():
    async def forever(messages):
        await asyncio.sleep(3600)

    async def run(view):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Orchestrator(ScriptedPolicy(forever)).run("Go.", Trace(listeners=(view,))), 0.1)
        await asyncio.sleep(0.05)
        drawn = len(view.drawn)
        await asyncio.sleep(0.1)
        assert len(view.drawn) == drawn

    view = Counted(every=0.01)
    asyncio.run(run(view))
    assert view.drawn[-1][0] == view.status == "stopped"
    assert float(view.drawn[-1][1].split()[0]) >= 0.1


def test_a_screen_that_fails_does_not_end_the_run():
    class Gone(Terminal):
        writes = 0

        def write(self, text):
            self.writes += 1
            raise BrokenPipeError("gone")

    stream = Gone()
    with pytest.warns(UserWarning, match="unseen: BrokenPipeError: gone"):
        result = orchestrator().run_sync("Go.", Trace(listeners=(ProgressLine(stream, every=1e-9),)))
    assert result.done
    assert stream.writes == 1


def test_a_resumed_run_goes_on_from_the_events_before(tmp_path):
    path = tmp_path / "run.jsonl"
    orchestrator().run_sync("Go.", Trace(path))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:30]))
    view = View(every=1000.0)
    for event in read_trace(path):
        view(event)
    orchestrator().run_sync("Go.", Trace(path, listeners=(view,)))
    assert any(event["event"] == "resume" for event in read_trace(path))
    assert (view.assigned, view.done, view.failed, view.running) == (8, 7, 1, 0)
    assert view.critical_steps == summarise(read_trace(path)).critical_steps


def test_time_does_not_go_back_where_a_worker_tells_late_what_it_did():
    view, step = Counted(every=1e-9), {"path": "0", "prompt_tokens": 0, "completion_tokens": 0}
    for t in (5.0, 1.0, 2.0, 6.0):
        view({"t": t, "event": "step", **step})
    assert [words[1] for words in view.drawn] == ["5.0 s", "5.0 s", "5.0 s", "6.0 s"]


def test_who_is_cancelled_is_at_work_again_once_the_run_is_resumed(tmp_path):
    all_at_work = asyncio.Barrier(6)  # the five of the first step, and who cancels them

    async def wait(messages):
        await all_at_work.wait()
        await asyncio.sleep(3600)

    async def break_off(run):
        task = asyncio.create_task(run)
        await all_at_work.wait()
        task.cancel()
        await task

    path, view = tmp_path / "run.jsonl", View(every=1000.0)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(break_off(orchestrator(sub_policy=wait).run("Go.", Trace(path, listeners=(view,)))))
    assert (view.assigned, view.failed) == (5, 5)
    view = View(every=1000.0)
    for event in read_trace(path):
        view(event)
    assert (view.assigned, view.failed) == (5, 5)
    orchestrator().run_sync("Go.", Trace(path, listeners=(view,)))
    counts = summarise(read_trace(path)).counts
    assert (view.done, view.failed) == (counts["done"], counts["failed"]) == (7, 1)


class Display:
    """Stands for IPython's display and for what it returns."""

    def __init__(self):
        self.shown = []

    def __call__(self, display_id):
        return self

    def update(self, html):
        self.shown.append(html.data)


def test_picture_has_the_latest_lanes_and_names_as_text(monkeypatch):
    evil = "<script>alert(1)</script>"

    def orchestrate(messages):
        step = sum(message["role"] == "assistant" for message in messages)
        if step == 0:
            return Reply(calls=(call("create_subagent", name=evil, system_prompt=evil),))
        tasks = (call("assign_task", agent=evil, prompt=f"{n} 0") for n in range(100))
        return Reply(calls=tuple(tasks)) if step == 1 else Reply("Done.")

    screen = Display()
    monkeypatch.setattr("IPython.display.display", screen)
    orchestrator(orchestrate).run_sync("Go.", Trace(listeners=(LiveView(every=1e-9),)))
    assert len(screen.shown) > 100
    assert max(html.count("<text") for html in screen.shown) == MAX_LANES
    last = screen.shown[-1]
    assert "<span>done</span>" in last
    assert "<span>100 assigned</span>" in last
    assert ">orchestrator</text>" in last
    assert last.count("&lt;script&gt;alert(1)&lt;/sc") == MAX_LANES - 1
    assert not any("<script" in html for html in screen.shown)


def test_a_notebook_keeps_the_last_picture(tmp_path):
    lines = [
        "from k25lite.swarm import Orchestrator, ScriptedPolicy, Trace",
        "from k25lite.swarm.live import LiveView",
        "policy = ScriptedPolicy(['Done.'], seconds=0.6)",
        "await Orchestrator(policy).run('Go.', Trace(listeners=(LiveView(every=0.1),)));",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(lines))])
    nbformat.write(notebook, tmp_path / "in.ipynb")
    done = papermill.execute_notebook(
        tmp_path / "in.ipynb",
        tmp_path / "out.ipynb",
        kernel_name="python3",
        kernel_manager_class=ThisPython,
        progress_bar=False,
    )
    (output,) = done.cells[0].outputs
    assert "<span>done</span>" in output.data["text/html"]
    assert "<span>1 steps</span>" in output.data["text/html"]
