"""`k25lite swarm`: the answer on stdout, a trace and a timeline in files, one clear line for what goes wrong."""

import platform

import pytest
from typer.testing import CliRunner

from k25lite.cli import app
from k25lite.swarm import Reply, ScriptedPolicy, call, command
from k25lite.swarm.critical import summarise
from k25lite.swarm.trace import read_trace


@pytest.fixture
def scripted(monkeypatch):
    """A policy that asks two sub-agents, which use a tool of the standard library."""

    def script(messages):
        said = [message["content"] for message in messages if message["role"] == "tool"]
        if messages[0]["content"] == "Tell the platform.":
            return said[0] if said else Reply(calls=(call("machine"),))
        if not said:
            return Reply(calls=(call("create_subagent", name="a", system_prompt="Tell the platform."),))
        if len(said) == 1:
            return Reply(calls=(call("assign_task", agent="a", prompt="1"), call("assign_task", agent="a", prompt="2")))
        return f"both say: {' '.join(said[1:])}"

    monkeypatch.setattr(command, "_policy", lambda *_: ScriptedPolicy(script))


def swarm(*arguments):
    return CliRunner().invoke(app, ["swarm", *map(str, arguments)])


def test_a_question_gets_an_answer_a_trace_and_a_timeline(scripted, tmp_path):
    trace = tmp_path / "run.jsonl"
    result = swarm("Which machine?", "--tool", "platform:machine", "--trace", trace, "--max-parallel", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"both say: {platform.machine()} {platform.machine()}\n"
    summary = summarise(read_trace(trace))
    assert summary.counts == {"done": 2, "failed": 0, "running": 0}
    assert "Which machine?" in (tmp_path / "run.html").read_text()
    assert "5 critical steps" in result.stderr
    again = swarm("Which machine?", "--trace", trace)
    assert again.exit_code == 2
    assert "has ended" in again.stderr


def test_progress_goes_on_where_the_run_was_killed(scripted, tmp_path):
    trace = tmp_path / "run.jsonl"
    swarm("Which machine?", "--tool", "platform:machine", "--trace", trace)
    trace.write_text("".join(trace.read_text().splitlines(keepends=True)[:-2]))
    again = swarm("Which machine?", "--tool", "platform:machine", "--trace", trace)
    assert again.exit_code == 0
    assert "2 assigned  0 running  2 done  0 failed  5 critical steps" in again.stderr
    assert "-" not in again.stderr.partition("trace:")[0]


def test_the_question_may_stand_in_a_file(scripted, tmp_path):
    (tmp_path / "task.txt").write_text("Which machine?")
    result = swarm("--task", tmp_path / "task.txt", "--trace", tmp_path / "run.jsonl")
    assert result.exit_code == 0
    assert next(iter(read_trace(tmp_path / "run.jsonl")))["task"] == "Which machine?"


def test_a_run_without_an_answer_says_why(scripted, tmp_path):
    result = swarm("Which machine?", "--budget", 2, "--trace", tmp_path / "run.jsonl")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "k25lite: limit of critical steps reached" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a question"),
        (["q", "--tool", "nowhere:nothing"], "no function 'nowhere:nothing'"),
        (["q", "--tool", "platform"], "no function 'platform'"),
        (["q", "--tool", ".:platform"], "no function '.:platform'"),
        (["q", "--tool", "os.path:join"], "join"),
        (["q", "--task", "no-such-file"], "no-such-file"),
        (["q", "--max-parallel", "0"], "max_parallel is 1 or more, got 0\n"),
        (["q", "--budget", "0"], "above 0"),
        (["q", "--base-url", "nonsense"], "base_url"),
        (["q", "--backend", "local", "--ray", "local"], "goes without --ray"),
        (["q", "--backend", "local", "--model", "/no/such/model"], "no model /no/such/model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-for-tests")
    result = swarm(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
