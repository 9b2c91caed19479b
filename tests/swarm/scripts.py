"""Policies and plans for the tests of this folder: what every agent does is written in its prompt."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from k25lite.swarm import Orchestrator, Reply, Result, ScriptedPolicy, Trace, call
from k25lite.swarm.policy import Message

Plan = dict[str, Any]
LOOK = "look"


def plan(*steps: list[Plan | str], answer: str = "done") -> Plan:
    """What an agent does in each step, at the same time: look, or have a sub-agent follow a plan. Then it answers."""
    return {"steps": list(steps), "answer": answer}


def leaf(steps: int, answer: str = "done") -> Plan:
    """So many steps, the answer included."""
    return plan(*[[LOOK]] * (steps - 1), answer=answer)


def critical(of: Plan) -> int:
    """The critical steps of a plan, from its definition: each step of the agent, and the slowest it waits for."""
    return 1 + sum(1 + max((critical(sub) for sub in step if sub != LOOK), default=0) for step in of["steps"])


def total(of: Plan) -> int:
    return 1 + sum(1 + sum(total(sub) for sub in step if sub != LOOK) for step in of["steps"])


async def look() -> str:
    """Look."""
    return "seen"


def steps_taken(messages: Sequence[Message]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def prompt_of(messages: Sequence[Message]) -> str:
    return next(message["content"] for message in messages if message["role"] == "user")


def follow(messages: Sequence[Message]) -> Reply:
    """The script of a plan. The agent that it needs is made in the step that needs it first."""
    todo, step = json.loads(prompt_of(messages)), steps_taken(messages)
    if step >= len(todo["steps"]):
        return Reply(todo["answer"], prompt_tokens=3, completion_tokens=2, cost=0.5)
    spawning = [any(part != LOOK for part in parts) for parts in todo["steps"]]
    make = [call("create_subagent", name="a", system_prompt="Follow.")] if spawning[step] > any(spawning[:step]) else []
    parts = [
        call(LOOK) if part == LOOK else call("assign_task", agent="a", prompt=json.dumps(part))
        for part in todo["steps"][step]
    ]
    return Reply(calls=(*make, *parts), prompt_tokens=3, completion_tokens=2, cost=0.5)


def followed(todo: Plan, trace: Trace | None = None, script: Callable = follow, **options: Any) -> tuple[Result, Trace]:
    """A run of the plan, and its trace, by default in memory."""
    trace = trace or Trace()
    depth = {"max_depth": 3, **options.pop("team", {})}
    orchestrator = Orchestrator(ScriptedPolicy(script), [look], team=depth, **options)
    return orchestrator.run_sync(json.dumps(todo), trace), trace


def boss(prompts: Sequence[str], answer: str | None = None) -> ScriptedPolicy:
    """An orchestrator that gives one sub-agent all tasks at once, and answers with what came back."""

    def script(messages: Sequence[Message]) -> Reply | str:
        match steps_taken(messages):
            case 0:
                return Reply(calls=(call("create_subagent", name="a", system_prompt="Work."),))
            case 1:
                return Reply(calls=tuple(call("assign_task", agent="a", prompt=prompt) for prompt in prompts))
        return json.dumps(told(messages)) if answer is None else answer

    return ScriptedPolicy(script)


def subs(script: Callable[[str, int], Any]) -> ScriptedPolicy:
    """Sub-agents that reply according to their prompt and the number of steps they have taken."""
    return ScriptedPolicy(lambda messages: script(prompt_of(messages), steps_taken(messages)))


def told(messages: Sequence[Message]) -> list[str]:
    """The last step's observations."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return [message["content"] for message in messages[last + 1 :]]


def fraction(*of: object) -> float:
    """A number from 0 to 1 that looks random and depends on nothing but the arguments."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:4]) / 2**32


def of_kind(events: Sequence[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] in kinds]


def lines(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """The events in a file, as strict JSON: NaN and Infinity are none. Only a torn last line may be unfinished."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    *whole, rest = path.read_bytes().decode().split("\n")
    assert torn or not rest
    return [json.loads(line, parse_constant=refuse) for line in whole]
