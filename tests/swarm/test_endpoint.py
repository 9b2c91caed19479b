"""The endpoint policy against servers on this machine: one that misbehaves on command, and `transformers serve`."""

import asyncio
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_local import TOKENIZER, add, conversations, taught_model

from k25lite.swarm import Limits, Orchestrator, Reply, ScriptedPolicy, ToolCall, Trace, call
from k25lite.swarm.endpoint import EndpointError, OpenAIPolicy

KEY = "k25-test-key-0123456789"
VARIABLE = "K25_TEST_CREDENTIAL"  # named so that the trace alone would not take it for a secret
USER = [{"role": "user", "content": "2 + 2 = ?"}]
SCHEMA = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
SOON = {"retry-after-ms": "1"}


def completion(message: dict, finish: str | None = "stop", **fields) -> dict:
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
    return {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage} | fields


FOUR = completion({"role": "assistant", "content": "4"})


class Endpoint(ThreadingHTTPServer):
    """Answers requests as the `plan` says, in the order in which they come: its last entry stands for all that follow."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *plan):
        self.plan, self.lock = list(plan) or [answer(FOUR)], threading.Lock()
        self.bodies, self.times, self.keys = [], [], []
        self.accepted = self.connections = self.at_work = self.most_at_work = 0
        self.stop = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def policy(self, **options) -> OpenAIPolicy:
        return OpenAIPolicy("tiny", self.url, **{"key_variable": VARIABLE} | options)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        with self.server.lock:
            self.server.accepted += 1
            self.server.connections += 1

    def finish(self):
        with self.server.lock:
            self.server.connections -= 1
        super().finish()

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.times.append(time.monotonic())
            server.bodies.append(body)
            server.keys.append((self.path, self.headers["authorization"]))
            act = server.plan[min(len(server.bodies), len(server.plan)) - 1]
            server.at_work += 1
            server.most_at_work = max(server.most_at_work, server.at_work)
        act(self)

    def send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with self.server.lock:
            self.server.at_work -= 1  # before the client can know that it has the reply
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def answer(body, status=200, headers=(), seconds=0.0):
    def act(handler):
        time.sleep(seconds)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send(status, content, {"content-type": "application/json"} | dict(headers))

    return act


def error(status, message="no", headers=()):
    return answer({"error": {"message": message}}, status, headers)


def half_a_body(handler):
    handler.send(200, json.dumps(FOUR).encode()[:40], {"content-type": "application/json"}, length=400)
    handler.close_connection = True


def silence(handler):
    handler.server.stop.wait(30)
    handler.close_connection = True


@contextmanager
def endpoint(*plan):
    with Endpoint(*plan) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.stop.set()
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def ask(policy, messages=USER, tools=()):
    return asyncio.run(policy(messages, tools))


def test_a_reply_and_the_request_that_it_answers():
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
        {"role": "tool", "tool_call_id": "1", "content": "4", "unknown": {"kept": None}},
    ]
    with endpoint() as server:
        policy = server.policy(price=(0.5, 2.0), max_tokens=7, temperature=0.0, extra={"top_k": 1})
        reply = ask(policy, messages, [SCHEMA])
        assert server.keys == [("/v1/chat/completions", f"Bearer {KEY}")]
    assert (reply.content, reply.prompt_tokens, reply.completion_tokens) == ("4", 1000, 10)
    assert reply.cost == pytest.approx(1000 * 0.5e-6 + 10 * 2e-6)
    sent = {"model": "tiny", "messages": messages, "max_tokens": 7, "temperature": 0.0, "top_k": 1, "tools": [SCHEMA]}
    assert server.bodies == [sent]


def test_nothing_is_sent_that_was_not_asked_for():
    with endpoint() as server:
        ask(server.policy(), tools=[])
    assert server.bodies == [{"model": "tiny", "messages": USER}]


def test_the_last_step_names_the_tools_that_were_called_and_lets_none_be_used():
    calls = completion({"content": "", "tool_calls": [tool_call(), tool_call("f", id="c2"), tool_call(id="c3")]})
    with endpoint(answer(calls), answer(FOUR)) as server:
        assert Orchestrator(server.policy(), own_limits=Limits(steps=2)).run_sync("2 + 2 = ?").answer == "4"
    first, last = server.bodies
    assert "tool_choice" not in first
    assert last["tool_choice"] == "none"
    assert [tool["function"]["name"] for tool in last["tools"]] == ["add", "f"]
    assert all(tool["type"] == "function" for tool in last["tools"])


def test_half_a_surrogate_pair_is_replaced_and_the_rest_sent_as_it_is():
    with endpoint() as server:
        assert ask(server.policy(), [{"role": "user", "content": "half \ud83d, whole 😀"}]).content == "4"
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "half ?, whole 😀"}]


def tool_call(name="add", arguments: object = '{"a": 2}', **fields):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}} | fields


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (completion({"content": None}), Reply()),
        (completion({}), Reply()),
        (completion({"content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}), Reply("42")),
        (completion({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "4"}]}), Reply("4")),
        (completion({"content": "4", "refusal": None}, None), Reply("4")),
        (completion({"content": None, "refusal": "I will not."}), Reply(refusal="I will not.")),
        (completion({"content": [{"type": "refusal", "refusal": "No."}]}), Reply(refusal="No.")),
        (completion({"content": "4"}, "length"), Reply("4", refusal="cut off after 10 tokens (length)")),
        (
            completion({"content": "4"}, "content_filter"),
            Reply("4", refusal="cut off after 10 tokens (content_filter)"),
        ),
        (
            completion({"content": "so", "tool_calls": [tool_call(), tool_call("f", id="c2")]}, "tool_calls"),
            Reply("so", (ToolCall("c1", "add", '{"a": 2}'), ToolCall("c2", "f", '{"a": 2}'))),
        ),
        (
            completion({"tool_calls": [tool_call(arguments='{"a"')]}, "length"),
            Reply("", (ToolCall("c1", "add", '{"a"'),)),
        ),
        (completion({"tool_calls": [tool_call(arguments=None)]}), Reply("", (ToolCall("c1", "add", "{}"),))),
        (completion({"tool_calls": [tool_call(arguments="")]}), Reply("", (ToolCall("c1", "add", "{}"),))),
        (
            completion({"tool_calls": [tool_call(arguments={"a": "é"})]}),
            Reply("", (ToolCall("c1", "add", '{"a": "é"}'),)),
        ),
        (completion({"tool_calls": [tool_call(id=None)]}), Reply("", (ToolCall("", "add", '{"a": 2}'),))),
        (completion({"tool_calls": [{"function": {"name": "f"}}]}), Reply("", (ToolCall("", "f", "{}"),))),
        (completion({"content": "4", "tool_calls": []}), Reply("4")),
        (completion({"content": "4", "reasoning_content": "2 and 2"}), Reply("4", reasoning="2 and 2")),
        (completion({"content": "4", "reasoning": "2 and 2"}), Reply("4", reasoning="2 and 2")),
        (
            completion({"content": "4", "reasoning_content": "", "reasoning": "2 and 2"}),
            Reply("4", reasoning="2 and 2"),
        ),
        (completion({"content": "4", "reasoning_content": None}), Reply("4")),
        (completion({"content": "4", "reasoning": ["2 and 2"]}), Reply("4")),
    ],
)
def test_replies(body, expected):
    with endpoint(answer(body)) as server:
        reply = ask(server.policy())
    assert (reply.content, reply.calls, reply.refusal) == (expected.content, expected.calls, expected.refusal)
    assert reply.reasoning == expected.reasoning
    assert (reply.prompt_tokens, reply.completion_tokens) == (1000, 10)


def test_reasoning_is_sent_back_with_its_calls_also_by_a_run_that_is_resumed(tmp_path):
    """Kimi K2.5 refuses calls in a history that come without what it thought before them."""
    thought = completion({"content": "", "reasoning_content": "add first", "tool_calls": [tool_call(arguments="{}")]})
    path = tmp_path / "trace.jsonl"

    async def add() -> int:
        """Add."""
        return 4

    def run(server):
        trace = Trace(path)
        result = Orchestrator(server.policy(retries=0), [add]).run_sync("2 + 2 = ?", trace)
        trace.close()
        return result

    with endpoint(answer(thought), answer(FOUR)) as server:
        assert run(server).answer == "4"
    (told,) = (message for message in server.bodies[1]["messages"] if message["role"] == "assistant")
    assert told["reasoning_content"] == "add first"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))  # killed before the second step
    with endpoint() as again:
        assert run(again).answer == "4"
    assert again.bodies == [server.bodies[1]]


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}])
def test_an_endpoint_need_not_count(usage):
    """Tokens are then a fourth of the characters, and the limits of a run hold."""
    with endpoint(answer(completion({"content": "12345678"}, usage=usage))) as server:
        policy = server.policy(price=(1.0, 1.0))
        reply = ask(policy, [{"role": "user", "content": "x" * 40}])
        assert reply == Reply("12345678", prompt_tokens=10, completion_tokens=2, cost=12 / 1e6)
    calling = completion({"reasoning": "x" * 400, "tool_calls": [tool_call("no_such_tool")]}, usage=usage)
    with endpoint(answer(calling)) as server:
        result = Orchestrator(server.policy(), limits=Limits(tokens=1000)).run_sync("2 + 2 = ?")
    assert result.reason == "limit of tokens reached"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Bad gateway</html>",
        json.dumps(FOUR).encode()[:60],
        b'"4"',
        b"null",
        b"[" * 100_000,
        {},
        {"choices": []},
        {"choices": None, "error": {"message": "overloaded"}},
        {"choices": [None]},
        {"choices": [{}]},
        {"choices": [{"message": None}]},
        completion({"content": 4}),
        completion({"content": {"text": "4"}}),
        completion({"content": ["4"]}),
        completion({"content": [{"type": "text", "text": None}]}),
        completion({"tool_calls": [None]}),
        completion({"tool_calls": [{"type": "custom"}]}),
        completion({"tool_calls": [tool_call(name=None)]}),
        completion({"content": "4"}, usage={"prompt_tokens": "many"}),
        completion({"content": "4"}, usage={"prompt_tokens": -1}),
    ],
)
def test_what_is_no_reply_is_told_as_it_came(body):
    with endpoint(answer(body)) as server, pytest.raises(EndpointError, match="malformed reply: '") as caught:
        ask(server.policy())
    text = body.decode() if isinstance(body, bytes) else json.dumps(body)
    assert text[:60] in str(caught.value)
    assert len(server.bodies) == 1


def test_too_many_requests_are_sent_again_when_the_endpoint_says():
    with endpoint(error(429, headers={"retry-after": "1"}), answer(FOUR)) as server:
        assert ask(server.policy()).content == "4"
    assert server.times[1] - server.times[0] > 0.99
    assert server.bodies[0] == server.bodies[1]


def test_a_wait_of_minutes_is_a_failure_at_once():
    with endpoint(error(429, "come back tomorrow", {"retry-after": "3600"})) as server:
        with pytest.raises(EndpointError, match=r"429.*come back tomorrow"):
            ask(server.policy())
        assert len(server.bodies) == 1


@pytest.mark.parametrize("bad", [error(500, headers=SOON), error(503), error(408), error(409), half_a_body, silence])
def test_what_may_pass_is_tried_again(bad):
    with endpoint(bad, answer(FOUR)) as server:
        assert ask(server.policy(timeout=1.5)).content == "4"
        assert len(server.bodies) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_does_not_pass_is_not(status):
    with endpoint(error(status, "no such thing")) as server:
        with pytest.raises(EndpointError, match=rf"tiny at http://127.*{status}.*no such thing.*after 0 retries"):
            ask(server.policy())
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (error(500, "out of order", SOON), r"500.*out of order.*\(after 2 retries\)"),
        (half_a_body, r"Connection error.*closed connection.*\(after 2 retries\)"),
        (silence, r"timed out.*\(after 2 retries\)"),
    ],
)
def test_what_does_not_pass_in_time_fails_with_its_reason(bad, reason, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with endpoint(bad) as server:
        with pytest.raises(EndpointError, match=reason):
            ask(server.policy(retries=2, timeout=1.0))
        assert len(server.bodies) == 3


def test_retries_wait_longer_each_time():
    with endpoint(error(500)) as server, pytest.raises(EndpointError):
        ask(server.policy(retries=2))
    gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert gaps[0] > 0.37  # half a second, and one second, each less a random fourth at most
    assert gaps[1] > 0.74


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="Connection error"):
            ask(OpenAIPolicy("tiny", url, retries=0))


async def ask_often(policy, times):
    return await asyncio.gather(*(policy(USER, ()) for _ in range(times)))


def test_no_more_requests_at_once_than_allowed():
    with endpoint(answer(FOUR, seconds=0.2)) as server:
        replies = asyncio.run(ask_often(server.policy(max_concurrent=3), 9))
        assert server.most_at_work == 3
    assert [reply.content for reply in replies] == ["4"] * 9


def test_requests_are_spaced_evenly():
    with endpoint() as server:
        asyncio.run(ask_often(server.policy(requests_per_minute=600), 6))
    assert len(server.times) == 6
    assert max(server.times) - min(server.times) > 0.3  # half a second, less what the first was late


def test_retries_wait_for_their_turn_too():
    with endpoint(error(500, headers=SOON), answer(FOUR)) as server:
        ask(server.policy(requests_per_minute=60))
    assert server.times[1] - server.times[0] > 0.7


def test_a_cancelled_request_gives_up_its_place():
    async def run(policy):
        tasks = [asyncio.create_task(policy(USER, ())) for _ in range(4)]
        while server.at_work < 2:
            await asyncio.sleep(0.001)
        for task in tasks[:3]:  # two under way, one that waits
            task.cancel()
        return await asyncio.wait_for(tasks[3], 25)

    with endpoint(silence, silence, answer(FOUR)) as server:
        assert asyncio.run(run(server.policy(max_concurrent=2))).content == "4"


def all_closed(server) -> bool:
    for _ in range(200):
        if server.connections == 0:
            return True
        time.sleep(0.01)
    return False


def test_one_policy_in_several_event_loops_leaves_no_connection_open():
    with endpoint() as server:
        policy = server.policy()
        for _ in range(2):
            assert len(asyncio.run(ask_often(policy, 5))) == 5
            assert all_closed(server)

        async def closed_by_hand():
            await policy(USER, ())
            await policy.close()
            assert await asyncio.to_thread(all_closed, server)
            await policy.close()
            await policy(USER, ())

        asyncio.run(closed_by_hand())
        loop = asyncio.new_event_loop()
        loop.run_until_complete(policy(USER, ()))
        loop.close()
        assert ask(policy).content == "4"


def test_connections_are_used_again():
    async def run(policy):
        for _ in range(5):
            await policy(USER, ())

    with endpoint() as server:
        asyncio.run(run(server.policy()))
        assert (server.accepted, len(server.bodies)) == (1, 5)


def test_a_copy_reads_the_key_where_it_is(monkeypatch):
    with endpoint() as server:
        policy = server.policy(requests_per_minute=6000)

        async def used_and_pickled():
            await policy(USER, ())
            return pickle.dumps(policy)

        pickled = asyncio.run(used_and_pickled())
        assert KEY.encode() not in pickled
        copy = pickle.loads(pickled)
        assert ask(copy).content == "4"
        monkeypatch.delenv(VARIABLE)
        assert ask(copy).content == "4"  # this machine needs none
        assert server.keys[-1][1] == "Bearer none"


@pytest.mark.parametrize(
    ("value", "url", "problem"),
    [
        (None, "https://example.com/v1", VARIABLE),
        ("", "https://example.com/v1", VARIABLE),
        (None, None, VARIABLE),
        (f"{KEY}\nX-Other: 1", "http://127.0.0.1/v1", VARIABLE),
        (f"{KEY} …", "https://example.com/v1", VARIABLE),
        (KEY, "example.com/v1", "base_url"),
        (KEY, "file:///etc/passwd", "base_url"),
        (KEY, f"https://{KEY}@example.com/v1", "base_url"),
        (KEY, f"https://example.com/v1?key={KEY}", "base_url"),
    ],
)
def test_what_is_wrong_is_said_at_once(value, url, problem, monkeypatch):
    monkeypatch.delenv(VARIABLE) if value is None else monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=problem) as caught:
        OpenAIPolicy("tiny", url, key_variable=VARIABLE)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"retries": -1}, {"max_concurrent": 0}, {"requests_per_minute": 0}, {"price": (-1, 0)}]
)
def test_numbers_out_of_range(options):
    with pytest.raises(ValueError, match="above 0"):
        OpenAIPolicy("tiny", "http://localhost/v1", **options)


def test_a_key_that_is_a_line_of_a_file():
    with endpoint() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"{KEY}\n")
        ask(server.policy())
        assert server.keys == [("/v1/chat/completions", f"Bearer {KEY}")]


@pytest.mark.parametrize(
    "bad",
    [
        error(401, f"Incorrect API key provided: {KEY}"),
        error(500, f"Bearer {KEY}", SOON),
        answer(f"{KEY} is not JSON".encode()),
        answer(completion({"refusal": f"Not for {KEY}"})),
        answer(completion({"content": f"Your key is {KEY}"})),
        answer(completion({"tool_calls": [tool_call(KEY, KEY)]})),
    ],
)
def test_an_endpoint_that_tells_the_key_back_is_not_repeated(bad, tmp_path):
    with endpoint(bad) as server:
        policy = server.policy(retries=1)
        assert KEY not in repr(policy)
        try:
            said = repr(ask(policy))
        except EndpointError as failure:
            said = repr(failure) + str(failure.__cause__) + str(failure.__context__)
        assert KEY not in said
        trace = Trace(tmp_path / "trace.jsonl")
        created = call("create_subagent", name="a", system_prompt="Add.")
        script = ScriptedPolicy(
            [Reply(calls=(created,)), Reply(calls=(call("assign_task", agent="a", prompt="2"),)), "."]
        )
        Orchestrator(script, sub_policy=policy, team={"limits": Limits(steps=2)}).run_sync("2 + 2 = ?", trace)
        trace.close()
        text = (tmp_path / "trace.jsonl").read_text()
        assert '"result"' in text
        assert KEY not in text


def test_a_swarm_on_an_endpoint(tmp_path):
    """Whatever the endpoint does to some, the others answer, and the failures have their reasons."""
    plan = [
        error(400, "context too long"),
        answer({"choices": []}),
        error(500, headers=SOON),
        half_a_body,
        answer(FOUR),
    ]
    created = call("create_subagent", name="a", system_prompt="Add.")
    assigned = tuple(call("assign_task", agent="a", prompt=str(n)) for n in range(20))
    script = ScriptedPolicy([Reply(calls=(created,)), Reply(calls=assigned), "done"])
    with endpoint(*plan) as server:
        policy = server.policy(price=(1.0, 0.0))
        with_trace = Trace(tmp_path / "trace.jsonl")
        result = Orchestrator(script, sub_policy=policy).run_sync("Add.", with_trace)
        with_trace.close()
    assert (result.answer, result.cost) == ("done", pytest.approx(18 * 0.001))
    events = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    ended = [event for event in events if event["event"] == "result"]
    assert sum(event["status"] == "done" for event in ended) == 18
    reasons = " ".join(event["reason"] for event in ended)
    assert "context too long" in reasons
    assert "malformed reply" in reasons


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`transformers serve` with a tiny model that has learned to add with a tool; the URL, and the model's name."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="needs transformers[serving]: fastapi and uvicorn")
    folder = tmp_path_factory.mktemp("served")
    taught_model(conversations([(2, 3), (40, 2)])).save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    for _ in range(3):  # somebody else may take the port before the server does
        with serving(folder) as port:
            if port is not None:
                yield f"http://127.0.0.1:{port}/v1", str(folder / "model")
                return
    pytest.fail(f"transformers serve did not start:\n{(folder / 'log').read_text()[-2000:]}")


@contextmanager
def serving(folder):
    """The port at which `transformers serve` answers; None if it ended before it did, or takes longer than two minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder / "model")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield port if answers(server, f"http://127.0.0.1:{port}/health") else None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(server, url) -> bool:
    for _ in range(1200):
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=1)
            return server.poll() is None
        if server.poll() is not None:
            return False
        time.sleep(0.1)
    return False


def test_a_real_server_takes_part_in_a_swarm(served):
    url, model = served
    policy = OpenAIPolicy(model, url, max_tokens=64, price=(1.0, 1.0))
    created = call("create_subagent", name="adder", system_prompt="Add.")
    assigned = tuple(call("assign_task", agent="adder", prompt=prompt) for prompt in ("2 + 3", "40 + 2"))
    script = ScriptedPolicy([Reply(calls=(created,)), Reply(calls=assigned), "done"])
    trace = Trace()
    result = Orchestrator(script, sub_policy=policy, sub_tools=[add]).run_sync("Add.", trace)
    events = [event for event in trace.events if event["event"] == "result"]
    assert sorted((event["status"], event["answer"], event["steps"]) for event in events) == [
        ("done", "42", 2),
        ("done", "5", 2),
    ]
    assert result.tokens > 300
    assert result.cost == pytest.approx(result.tokens / 1e6)


def test_a_real_server_says_what_is_wrong(served):
    url, model = served
    with pytest.raises(EndpointError, match=r"pinned to|after 0 retries"):
        ask(OpenAIPolicy("another", url))
    called = Reply(calls=(ToolCall("1", "add", '{"a": 40, "b": 2}'),)).message
    told = {"role": "tool", "tool_call_id": "1", "content": "42"}
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "40 + 2"}, called, told]
    reply = ask(OpenAIPolicy(model, url, max_tokens=1), messages, [SCHEMA])
    assert (reply.content, reply.refusal) == ("4", "cut off after 1 tokens (length)")
