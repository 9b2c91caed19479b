"""What agents do when their context grows: discard all, summarise, and both across a kill."""

import json

import pytest
from scripts import lines, of_kind, steps_taken

from k25lite.swarm import DiscardAll, Limits, Orchestrator, Reply, Summarise, Trace, call
from k25lite.swarm.context import SUMMARISE, estimate

LONG = "x" * 400  # 100 tokens


async def read() -> str:
    """Read."""
    return LONG


class Recorder:
    """A policy that reads until it has read `pages` pages in all, and keeps every context that it was given."""

    def __init__(self, pages: int, summary: str = "sum"):
        self.pages, self.summary = pages, summary
        self.contexts: list[list[str]] = []
        self.tools: list[int] = []
        self.read = 0

    async def __call__(self, messages, tools):
        self.contexts.append([message["content"] or "call" for message in messages])
        self.tools.append(len(tools))
        if messages[-1]["content"] == SUMMARISE:
            return Reply(self.summary)
        self.read += 1
        return Reply(calls=(call("read"),)) if tools and self.read <= self.pages else Reply("answer")


def run(policy, context, trace=None, **options):
    options = {"system_prompt": "S", **options}
    return Orchestrator(policy, [read], context=context, **options).run_sync("task", trace)


def characters(messages):
    return sum(len(message["content"]) for message in messages)


def test_discard_all_begins_again_from_the_task():
    policy, trace = Recorder(4), Trace()
    result = run(policy, DiscardAll(900, count=characters), trace)
    assert (result.answer, result.steps) == ("answer", 5)
    head, page = ["S", "task"], ["call", LONG]
    assert policy.contexts == [head, head + page, head + page * 2, head, head + page]  # 1,205 characters are too many
    assert [(e["step"], e["kept"], e["of"]) for e in of_kind(trace.events, "context")] == [(4, 2, 8)]


def test_summarise_takes_a_step_of_its_own():
    policy, trace = Recorder(4), Trace()
    result = run(policy, Summarise(900, count=characters), trace)
    assert (result.answer, result.steps, result.critical_steps) == ("answer", 6, 6)
    head, page = ["S", "task"], ["call", LONG]
    summed = [*head, "What you found out so far:\nsum"]
    asked = [*head, *page * 3, SUMMARISE]
    assert policy.contexts == [head, head + page, head + page * 2, asked, summed, summed + page]
    assert policy.tools[3] == 0  # nothing to do but to sum up
    assert [(e["step"], e["kept"], e["of"]) for e in of_kind(trace.events, "context")] == [(5, 3, 8)]
    assert [e["step"] for e in of_kind(trace.events, "step")] == [1, 2, 3, 4, 5, 6]


def test_an_empty_summary_is_not_asked_for_again():
    policy = Recorder(4, summary=" ")
    assert run(policy, Summarise(900, count=characters)).answer == "answer"
    assert [context[-1] for context in policy.contexts].count(SUMMARISE) == 1
    assert policy.contexts[-2:] == [["S", "task"], ["S", "task", "call", LONG]]


@pytest.mark.parametrize("context", [Summarise(900, count=characters), DiscardAll(900, count=characters)])
@pytest.mark.parametrize(
    "limits", [{"own_limits": Limits(steps=4)}, {"limits": Limits(critical_steps=4)}, {"limits": Limits(steps=4)}]
)
def test_the_last_step_answers_from_all_that_is_known(context, limits):
    policy = Recorder(9)
    result = run(policy, context, **limits)
    assert (result.answer, result.steps) == ("answer", 4)
    assert policy.contexts[-1].count(LONG) == 3


def test_without_a_system_prompt_the_task_alone_is_kept():
    policy = Recorder(3)
    run(policy, DiscardAll(900, count=characters), system_prompt="")
    assert policy.contexts[-1] == ["task"]


def test_the_estimate_counts_words_and_calls():
    reply = Reply("12345678", (call("f", x=1),))
    assert estimate([{"role": "user", "content": "1234"}, Reply("12345678").message]) == 3
    parts = [{"type": "text", "text": "12345678"}, {"type": "image_url", "image_url": {"url": "data:image/jpeg;..."}}]
    assert estimate([{"role": "user", "content": parts}, {"role": "assistant", "content": None}]) == 2
    assert estimate([Reply("1234", reasoning="12345678").message]) == 3
    assert estimate([reply.message]) == (8 + len(json.dumps(reply.message["tool_calls"]))) // 4


@pytest.mark.parametrize("context", [Summarise(300), DiscardAll(300), Summarise(100)])
@pytest.mark.parametrize("steps", range(8))
def test_a_shortened_context_is_resumed(context, steps, tmp_path):
    """Killed after any number of steps, the run goes on with the context that it would have had."""

    def policy(dies_after):
        taken = 0

        async def step(messages, tools):
            nonlocal taken
            if taken == dies_after:
                raise KeyboardInterrupt
            taken += 1
            contexts.append([message["content"] for message in messages])
            if messages[-1]["content"] == SUMMARISE:
                return Reply(f"sum of {len(messages)}")
            return Reply(calls=(call("read"),)) if len(contexts) < 9 else Reply(f"answer {steps_taken(messages)}")

        return step

    contexts = []
    expected = run(policy(-1), context)
    wanted, contexts = contexts, []
    with pytest.raises(KeyboardInterrupt):
        run(policy(steps), context, Trace(tmp_path / "trace.jsonl"))
    assert run(policy(-1), context, Trace(tmp_path / "trace.jsonl")) == expected
    assert contexts == wanted
    events = lines(tmp_path / "trace.jsonl")
    for kind in ("context", "step", "observation"):
        told = [(event["step"], event["kept"] if kind == "context" else "") for event in of_kind(events, kind)]
        assert len(told) == len(set(told))
    assert len(of_kind(events, "context")) >= 2
