"""One agent: what it is told, how its task ends, and what policies may get wrong."""

import asyncio
import json

import pytest
from scripts import look, of_kind, steps_taken

from k25lite.swarm import Limits, Orchestrator, Reply, ScriptedPolicy, ToolCall, Trace, call
from k25lite.swarm.agent import MAX_CALLS, Agent, Work
from k25lite.swarm.limits import Account
from k25lite.swarm.tools import as_tools


def work(policy, prompt="go", tools=(), trace=None, **options):
    """What becomes of one agent's task."""
    agent = Agent("agent", policy, tools=as_tools(tools), **options)
    return asyncio.run(Work(agent, "0", trace or Trace(), Account(agent.limits)).run(prompt))


async def double(x: int) -> int:
    """Double it."""
    return 2 * x


def test_a_conversation_is_that_of_chat_endpoints():
    contexts = []

    async def policy(messages, tools):
        contexts.append(json.loads(json.dumps(list(messages))))
        assert [tool["function"]["name"] for tool in tools] == ["double"]
        if len(messages) == 2:
            return Reply("Let me see.", (call("double", x=3), ToolCall("mine", "double", '{"x": 4}')))
        return Reply("14", prompt_tokens=5, completion_tokens=1, cost=0.25)

    result = work(policy, "3 and 4", [double], system_prompt="Be brief.")
    assert (result.status, result.answer, result.steps, result.tokens, result.cost) == ("done", "14", 2, 6, 0.25)
    calls = [
        {"id": "call_1_0", "type": "function", "function": {"name": "double", "arguments": '{"x": 3}'}},
        {"id": "call_1_1", "type": "function", "function": {"name": "double", "arguments": '{"x": 4}'}},
    ]
    assert contexts[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "3 and 4"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1_0", "content": "6"},
        {"role": "tool", "tool_call_id": "call_1_1", "content": "8"},
    ]


@pytest.mark.parametrize(
    ("given", "kept"), [(["a", "b"], True), (["a", "a"], False), (["a", ""], False), ([""], False)]
)
def test_ids_of_calls_are_kept_if_they_tell_calls_apart(given, kept):
    trace = Trace()
    calls = tuple(ToolCall(name, "double", '{"x": 1}') for name in given)
    work(ScriptedPolicy([Reply(calls=calls), "end"]), tools=[double], trace=trace)
    ids = [name for name, _, _ in of_kind(trace.events, "step")[0]["calls"]]
    assert (ids == given) is kept
    assert len(set(ids)) == len(ids)


def test_tools_of_one_step_run_at_the_same_time_and_are_told_in_the_order_of_calls():
    now = most = 0

    async def wait(turns: int) -> int:
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _ in range(turns):
            await asyncio.sleep(0)
        now -= 1
        return turns

    def script(messages):
        if steps_taken(messages) == 0:
            return Reply(calls=tuple(call("wait", turns=turns) for turns in (9, 1, 5)))
        return " ".join(message["content"] for message in messages[2:])

    assert work(ScriptedPolicy(script), tools=[wait]).answer == "9 1 5"
    assert most == 3


class Speechless(Exception):
    def __str__(self):
        raise ValueError("no words")


def raises(error):
    async def policy(messages, tools):
        raise error

    return policy


def returns(reply):
    async def policy(messages, tools):
        return reply

    return policy


@pytest.mark.parametrize(
    ("policy", "reason", "steps"),
    [
        (raises(RuntimeError("503")), "policy: RuntimeError: 503", 0),
        (raises(Speechless()), "policy: Speechless", 0),
        (raises(RuntimeError("x" * 10**6)), "policy: RuntimeError: xxx", 0),
        (returns(None), "malformed: the policy returned NoneType, not a reply", 0),
        (returns("words"), "malformed: the policy returned str, not a reply", 0),
        (lambda messages, tools: Reply("not async"), "policy: TypeError", 0),
        (lambda: None, "policy: TypeError", 0),
        (returns(Reply()), "malformed: neither an answer nor a call", 1),
        (returns(Reply(" \n")), "malformed: neither an answer nor a call", 1),
        (returns(Reply(refusal="not that")), "refused: not that", 1),
        (returns(Reply("words", (call("look"),), refusal="no " * 10**6)), "refused: no no", 1),
        (returns(Reply(calls=(call("look"),) * (MAX_CALLS + 1))), f"malformed: {MAX_CALLS + 1} calls in one step", 1),
    ],
)
def test_how_a_task_fails(policy, reason, steps):
    result = work(policy, tools=[look])
    assert (result.status, result.answer, result.steps) == ("failed", "", steps)
    assert result.reason.startswith(reason)
    assert len(result.reason) < 600


def test_as_many_calls_as_may_be():
    assert work(ScriptedPolicy([Reply(calls=(call("look"),) * MAX_CALLS), "end"]), tools=[look]).answer == "end"


def test_how_many_calls_there_may_be_is_up_to_the_agent():
    for count, status in ((3, "done"), (4, "failed")):
        policy = ScriptedPolicy([Reply(calls=(call("look"),) * count), "end"])
        assert work(policy, tools=[look], max_calls=3).status == status
        assert Orchestrator(policy, [look], max_calls=3).run_sync("go").status == status


@pytest.mark.parametrize(
    "wrong",
    [
        {"content": None}, {"content": 5}, {"refusal": None}, {"prompt_tokens": -1}, {"prompt_tokens": 1.5},
        {"completion_tokens": None}, {"completion_tokens": 10**400}, {"cost": float("nan")}, {"cost": float("inf")},
        {"cost": -0.1},
    ],
)  # fmt: skip
def test_a_reply_that_no_account_could_be_kept_of_is_refused(wrong):
    with pytest.raises(ValueError, match="a reply"):
        Reply(**wrong)


@pytest.mark.parametrize("wrong", [(None, "f"), ("", None), ("", "f", None), ("", "f", {"x": 1}), ("", ["f"])])
def test_a_call_is_made_of_text(wrong):
    with pytest.raises(ValueError, match="a call"):
        ToolCall(*wrong)


def test_an_interrupt_is_nobodys_failure():
    with pytest.raises(KeyboardInterrupt):
        work(raises(KeyboardInterrupt()))


def test_a_task_that_is_cancelled_is_cancelled():
    async def main():
        task = asyncio.ensure_future(
            Work(Agent("a", ScriptedPolicy(["late"], 60)), "0", Trace(), Account(Limits())).run("go")
        )
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_policy_that_turns_cancellation_into_an_error_of_its_own_is_out_of_time_all_the_same():
    async def policy(messages, tools):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ConnectionError("aborted") from None

    assert work(policy, limits=Limits(seconds=0.02)).reason == "limit of 0.02 seconds reached"


def test_a_scripts_replies_end():
    result = work(ScriptedPolicy([Reply(calls=(call("look"),))]), tools=[look])
    assert result.reason == "policy: IndexError: the script has 1 replies, and step 1 is asked for"


def test_one_agent_works_on_many_tasks():
    async def main():
        agent = Agent("a", ScriptedPolicy(lambda messages: messages[-1]["content"].upper(), 0.001))
        tasks = [Work(agent, f"0.1.{i}", Trace(), Account(Limits())).run(word) for i, word in enumerate("abc")]
        return [result.answer for result in await asyncio.gather(*tasks)]

    assert asyncio.run(main()) == ["A", "B", "C"]


def test_the_orchestrator_is_an_agent_like_any_other():
    alone = Orchestrator(ScriptedPolicy([Reply(calls=(call("look"),)), "seen"]), [look]).run_sync("go")
    assert alone == work(ScriptedPolicy([Reply(calls=(call("look"),)), "seen"]), tools=[look])


@pytest.mark.parametrize("arguments", ["{", "", "{'a': 1}", "\ud800", "<tool>"])
def test_a_history_holds_only_arguments_that_endpoints_can_parse(arguments):
    (told,) = Reply(calls=(ToolCall("c", "look", arguments),)).message["tool_calls"]
    assert json.loads(told["function"]["arguments"]) == {"malformed": arguments}
    (kept,) = Reply(calls=(ToolCall("c", "look", '{"a": 1}'),)).message["tool_calls"]
    assert kept["function"]["arguments"] == '{"a": 1}'
