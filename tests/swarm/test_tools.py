"""Tools: schemas from signatures, what models write held against them, and whatever goes wrong told as an observation."""

import asyncio
import contextvars
import functools
import json
import sys
import threading
import time
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter
from scripts import boss, look, of_kind, prompt_of, subs

from k25lite.swarm import Limits, Orchestrator, Reply, ScriptedPolicy, Tool, ToolCall, Trace, call
from k25lite.swarm.tools import MAX_CHARACTERS, as_tools


class Mode(Enum):
    FAST = "fast"
    EXACT = "exact"


def search(
    query: str,
    pages: Annotated[int, Field(description="How many.", ge=1, le=9)] = 2,
    language: Literal["en", "zh"] = "en",
    sites: list[int] | None = None,
    mode: Mode = Mode.FAST,
    seed: Optional[int] = None,  # noqa: UP045  (models' tools are written like this too)
) -> str:
    """Search the web.

    Twice, if need be.
    """
    return f"{query} {pages} {language} {sites} {mode} {seed}"


def told(tool: Any, arguments: Any = "{}") -> str:
    return asyncio.run((tool if isinstance(tool, Tool) else Tool(tool))(arguments))


def test_the_schema_is_that_of_the_signature():
    function = Tool(search).schema["function"]
    assert (function["name"], function["description"]) == ("search", "Search the web.\n\nTwice, if need be.")
    parameters = function["parameters"]
    assert (parameters["type"], parameters["required"]) == ("object", ["query"])
    assert parameters["additionalProperties"] is False
    found = parameters["properties"]
    assert found["query"]["type"] == "string"
    assert found["pages"] == {
        "type": "integer", "description": "How many.", "minimum": 1, "maximum": 9, "default": 2, "title": "Pages"
    }  # fmt: skip
    assert (found["language"]["enum"], found["language"]["default"]) == (["en", "zh"], "en")
    assert {"type": "array", "items": {"type": "integer"}} in found["sites"]["anyOf"]
    assert found["mode"]["default"] == "fast"
    assert parameters["$defs"]["Mode"]["enum"] == ["fast", "exact"]
    assert {option["type"] for option in found["seed"]["anyOf"]} == {"integer", "null"}
    assert found["seed"]["default"] is None
    json.dumps(Tool(search).schema)


def test_arguments_are_converted_and_defaults_are_the_functions():
    assert told(search, '{"query": "x"}') == "x 2 en None Mode.FAST None"
    given = {"query": "x", "pages": "3", "language": "zh", "sites": [1], "mode": "exact", "seed": 7}
    assert told(search, json.dumps(given)) == "x 3 zh [1] Mode.EXACT 7"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "query: Field required"),
        ("not JSON", "arguments: Invalid JSON"),
        ("[" * 10_000, "arguments: Invalid JSON"),
        ("[1]", "arguments: Input should be an object"),
        ('{"query": 5}', "query: Input should be a valid string"),
        ('{"query": "x", "pages": 10}', "pages: Input should be less than or equal to 9"),
        ('{"query": "x", "language": "fr"}', "language: Input should be 'en' or 'zh'"),
        ('{"query": "x", "sites": [1, "a"]}', "sites.1: Input should be a valid integer"),
        ('{"query": "x", "page": 1}', "page: Extra inputs are not permitted"),
        ('{"query": "x", "path": "0.1.0"}', "path: Extra inputs are not permitted"),
        ('{"query": "\ud800"}', "unicode"),
    ],
)
def test_what_does_not_fit_is_told(arguments, words):
    answer = told(search, arguments)
    assert answer.startswith("error: search: ")
    assert words in answer


@settings(deadline=None)
@given(st.text(max_size=40) | st.from_regex(r'\{"query": .{0,20}\}', fullmatch=True))
def test_no_arguments_raise(arguments):
    tool = Tool(search_async)
    assert isinstance(told(tool, arguments), str)


async def search_async(query: str) -> str:
    return query


def test_a_mistake_of_a_megabyte_is_cut():
    for arguments in (json.dumps({"query": "x", "k" * 10**6: 1}), json.dumps({"query": ["x" * 10**6]}), "x" * 10**6):
        assert len(told(search, arguments)) < MAX_CHARACTERS + 100


async def refuses() -> str:
    raise PermissionError("no " * 10)


async def stops() -> str:
    raise StopIteration


def stops_in_a_thread() -> str:
    return next(iter([]))


async def gives_up() -> str:
    raise asyncio.CancelledError("their own")


async def times_out() -> str:
    async with asyncio.timeout(0.001):
        await asyncio.sleep(60)
    return ""


def leaves() -> str:
    sys.exit(2)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


async def speechless() -> str:
    raise Unspeakable


async def validates() -> str:
    return TypeAdapter(int).validate_python("x")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (refuses, "PermissionError: no no"),
        (stops, "RuntimeError"),
        (stops_in_a_thread, "StopIteration"),
        (gives_up, "CancelledError: their own"),
        (times_out, "TimeoutError"),
        (leaves, "SystemExit: 2"),
        (speechless, "Unspeakable"),
        (validates, "ValidationError"),
    ],
)
def test_what_a_tool_raises_is_told(function, words):
    answer = told(function)
    assert answer.startswith(f"error: {function.__name__}: ")
    assert words in answer


@dataclass
class Page:
    title: str
    size: float


def circle() -> Any:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("as it is", "as it is"),
        (None, "null"),
        ({"a": [1, "é"]}, '{"a":[1,"é"]}'),
        ({1: {2}}, '{"1":[2]}'),
        (Page("x", 0.5), '{"title":"x","size":0.5}'),
        (float("nan"), "NaN"),
        (10**30, "1" + "0" * 30),
        (object, "<class 'object'>"),
        (b"\xff", "error: back: "),
        ({"a": "\ud800"}, "error: back: "),
        (circle(), "error: back: "),
    ],
)
def test_results_become_text(result, text):
    async def back() -> Any:
        return result

    assert told(back).strip('"').startswith(text)


def test_a_megabyte_is_cut():
    def much() -> str:
        return "x" * 10**6

    assert told(much) == "x" * MAX_CHARACTERS + " [980,000 characters left out]"


def test_blocking_tools_overlap_and_do_not_block_the_loop():
    """Two that only end once both have begun, while the loop goes on."""
    both = threading.Barrier(2, timeout=10)
    turns = 0

    def meet() -> str:
        both.wait()
        time.sleep(0.05)
        return "met"

    async def tick() -> str:
        nonlocal turns
        for _ in range(10):
            await asyncio.sleep(0.001)
            turns += not both.broken
        return "ticked"

    calls = (call("meet"), call("meet"), call("tick"))
    trace = Trace()
    Orchestrator(ScriptedPolicy([Reply(calls=calls), "end"]), [meet, tick]).run_sync("go", trace)
    observations = of_kind(trace.events, "observation")
    assert [event["tool"] for event in observations] == ["tick", "meet", "meet"]
    assert [event["content"] for event in observations] == ["ticked", "met", "met"]
    assert turns == 10


@pytest.mark.timeout(120)
def test_blocking_tools_that_hang_hold_up_nobody():
    """More of them than any pool has threads: others get theirs, and the run ends without waiting for them."""
    release = threading.Event()

    def hang() -> str:
        release.wait(600)
        return ""

    def work() -> str:
        return "worked"

    def sub(prompt, step):
        return Reply(calls=(call(prompt),)) if step == 0 else "ok"

    trace = Trace()
    run = Orchestrator(
        boss(["hang"] * 60 + ["work"]),
        sub_tools=[hang, work],
        sub_policy=subs(sub),
        team={"limits": Limits(seconds=2)},
    )
    try:
        assert run.run_sync("go", trace).answer.count("limit of 2 seconds") == 60
    finally:
        release.set()
    assert [event["content"] for event in of_kind(trace.events, "observation")] == ["worked"]


def test_a_blocking_tool_sees_the_context_of_its_caller():
    variable = contextvars.ContextVar("variable", default="unset")

    def read() -> str:
        return variable.get()

    async def main():
        variable.set("set")
        return await Tool(read)("{}")

    assert asyncio.run(main()) == "set"


def test_a_function_that_returns_a_coroutine_is_awaited():
    def later() -> Any:
        return search_async("x")

    assert told(later) == "x"


class Browser:
    def __init__(self, start: str):
        self.start = start

    async def open(self, page: str) -> str:
        """Open a page."""
        return f"{self.start}/{page}"

    def __call__(self, page: str) -> str:
        return page


def test_methods_are_tools():
    tool = Tool(Browser("here").open)
    assert (tool.name, list(tool.schema["function"]["parameters"]["properties"])) == ("open", ["page"])
    assert told(tool, '{"page": "x"}') == "here/x"


def star(*queries: str) -> str: ...
def stars(**queries: str) -> str: ...
def bare(query) -> str: ...
def positional(query: str, /) -> str: ...
def unknown(query: "Nowhere") -> str: ...  # type: ignore[name-defined]  # noqa: F821
def shapeless(query: threading.Lock) -> str: ...  # type: ignore[valid-type]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (star, r"star: parameter \*queries"),
        (stars, r"stars: parameter \*\*queries"),
        (bare, "bare: parameter query"),
        (positional, "positional: parameter query"),
        (unknown, "unknown: .*Nowhere"),
        (shapeless, "shapeless: "),
        (functools.partial(search, pages=1), "a function or a method"),
        (Browser("here"), "a function or a method"),
        (Browser, "a function or a method"),
        (lambda: "", "<lambda>"),
    ],
)
def test_what_cannot_be_a_tool_is_refused(function, words):
    with pytest.raises(ValueError, match=words):
        Tool(function)


def test_names_clash():
    with pytest.raises(ValueError, match="two tools have the name look"):
        as_tools([look, Tool(look)])

    async def assign_task(prompt: str) -> str:
        return prompt

    for own in ({"tools": [assign_task]}, {"sub_tools": [assign_task]}):
        with pytest.raises(ValueError, match="assign_task"):
            Orchestrator(ScriptedPolicy(["x"]), **own)


def test_only_what_was_handed_out_can_be_called():
    """A sub-agent that calls a tool of its team that it was not given, one of the orchestrator's, and one of nobody's."""
    called = []

    async def danger() -> str:
        called.append(1)
        return "bang"

    async def secret() -> str:
        called.append(1)
        return "own"

    names = ["look", "danger", "secret", "assign_task", "create_subagent", "x" * 10**6]

    def script(messages):
        if prompt_of(messages) == "sub":
            return Reply(calls=tuple(ToolCall("", name) for name in names)) if len(messages) < 4 else "ok"
        if len(messages) == 2:
            creations = [["look"], ["secret"], ["look", "nothing"], None]
            return Reply(
                calls=tuple(
                    call("create_subagent", name=f"a{i}", system_prompt="s", tools=tools)
                    for i, tools in enumerate(creations)
                )
            )
        return Reply(calls=(call("assign_task", agent="a0", prompt="sub"),)) if len(messages) == 7 else "end"

    trace = Trace()
    run = Orchestrator(ScriptedPolicy(script), [secret], sub_tools=[look, danger])
    assert run.run_sync("go", trace).done
    told = [event["content"] for event in of_kind(trace.events, "observation") if event["path"] == "0.2.0"]
    assert told[0] == "seen"
    assert all(content.startswith("error: no tool") and content.endswith("there are: look") for content in told[1:])
    assert max(map(len, told)) < 200
    assert not called
    refused = [event["content"] for event in of_kind(trace.events, "observation") if event["path"] == "0"]
    assert refused == [f"error: no tools ['{name}']; there are: look, danger" for name in ("secret", "nothing")]
    assert [event["tools"] for event in of_kind(trace.events, "subagent")] == [["look"], ["look", "danger"]]
