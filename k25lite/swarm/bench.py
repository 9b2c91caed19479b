"""`k25lite bench swarm`: what the runtime costs, against bare asyncio and, where they are installed, public frameworks.

Everybody does the same: so many sub-agents, at most 1,000 at a time, take three steps each. In the first two a tool is
called with arguments in JSON, the second time on what it said the first; the third answers with what it said then. The
model takes no time, or 50 ms. k25lite writes its trace to a file, validates arguments and keeps its limits meanwhile; bare
asyncio does none of it. While it runs, k25lite also has Python look for garbage less often (`RareCollection`); the others
are left as they are. `ideal` is the model's time alone.

Up to 1,000 sub-agents, times are medians of five runs in turn; beyond, of a single run. The CPU time is that of the whole
process: all threads, the making of the agents and the orchestrator's own steps included.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from k25lite.swarm import Limits, Orchestrator, Reply, ScriptedPolicy, ToolCall, Trace, call
from k25lite.swarm.policy import Message

if TYPE_CHECKING:  # brings torch, which would be most of what `peak` measures
    from k25lite.bench import Report

SUBJECT, BARE, IDEAL, ALONE = "k25lite", "asyncio", "ideal", "one at a time"
STEPS, AT_ONCE = 3, 1000
SIZES, LATENCIES = (100, 1_000, 10_000), (0, 50)  # sub-agents; milliseconds
SYSTEM = "Look."


class Script:
    """What the model of every contender says, one for all its sub-agents.

    Args:
        seconds: that each step takes; it is up to the contender's model to wait so long.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._steps = itertools.count()  # safe to share among threads

    def next(self, step: int, place: str) -> str | None:
        """The arguments of a call of `look`, or None where `place` is the answer.

        Args:
            step: of this sub-agent, from 0. place: the last words in its conversation.
        """
        next(self._steps)
        return f'{{"place": {place}}}' if step < STEPS - 1 else None

    def taken(self) -> int:
        """How many steps all sub-agents took; to be asked once."""
        return next(self._steps)


# Has sub-agents work, the one of index i on the prompt str(i), and returns their answers in this order.
Contender = Callable[[int, Script], Coroutine[Any, Any, Sequence[str]]]


async def look(place: int) -> str:
    """Look at a place, and see the next one."""
    return str(place + 1)


async def at_once(work: Callable[[str], Awaitable[str]], count: int) -> list[str]:
    """Answers to the prompts 0, 1, ..., as many at a time as there may be; nothing does it with less than so many tasks."""
    answers, prompts = [""] * count, iter(range(count))

    async def worker() -> None:
        for index in prompts:
            answers[index] = await work(str(index))

    await asyncio.gather(*(worker() for _ in range(min(count, AT_ONCE))))
    return answers


async def bare(count: int, script: Script) -> Sequence[str]:
    """asyncio and nothing else."""

    async def work(prompt: str) -> str:
        messages: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        while True:
            await asyncio.sleep(script.seconds)
            arguments = script.next(len(messages) // 2 - 1, messages[-1]["content"])
            if arguments is None:
                return messages[-1]["content"]
            messages.append(Reply(calls=(ToolCall("c", "look", arguments),)).message)
            messages.append({"role": "tool", "tool_call_id": "c", "content": await look(**json.loads(arguments))})

    return await at_once(work, count)


async def ours(count: int, script: Script) -> Sequence[str]:
    """An orchestrator that assigns everything in one turn."""
    answers: list[str] = []

    async def sub_policy(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Reply:
        await asyncio.sleep(script.seconds)
        arguments = script.next(len(messages) // 2 - 1, messages[-1]["content"])
        if arguments is None:
            return Reply(messages[-1]["content"], prompt_tokens=100, completion_tokens=5)
        return Reply(calls=(ToolCall("c", "look", arguments),), prompt_tokens=100, completion_tokens=10)

    def assign_all(messages: Sequence[Message]) -> Reply | str:
        told = [message["content"] for message in messages if message["role"] == "tool"]
        if not told:
            return Reply(calls=(call("create_subagent", name="a", system_prompt=SYSTEM),))
        if len(told) == 1:
            arguments = (f'{{"agent": "a", "prompt": "{index}"}}' for index in range(count))
            return Reply(calls=tuple(ToolCall(f"c{i}", "assign_task", each) for i, each in enumerate(arguments)))
        answers[:] = told[1:]
        return "done"

    swarm = Orchestrator(
        ScriptedPolicy(assign_all),
        sub_policy=sub_policy,
        sub_tools=[look],
        limits=Limits(steps=STEPS * count + 3, tokens=10**12),
        max_calls=count,  # everything in one turn, as the others do
        team={"max_parallel": AT_ONCE, "limits": Limits(steps=10, tokens=10**6)},
    )
    with tempfile.TemporaryDirectory() as folder:
        trace = Trace(Path(folder, "trace.jsonl"))
        result = await swarm.run("look everywhere", trace)
        trace.close()
    assert result.done, result.reason
    assert result.steps == STEPS * count + 3  # the orchestrator's own
    return answers


def run(device: str | None = None, quick: bool = False) -> Report:
    """Measure everything: some 15 minutes with all peers, 1 without.

    Args:
        device: of the local model, "cpu" or "cuda"; by default the GPU, if there is one. All else is the work of a CPU.
        quick: the smallest sizes once, in a few seconds, to see that everything works. Its numbers mean nothing.

    Raises:
        Disagreement: a contender does not do the work; it was not timed then.
        ValueError: no such device.
    """
    from k25lite.bench import Report, device_name, devices
    from k25lite.swarm.bench_peers import peers

    where, found = devices(device)[-1], peers()
    versions = ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {peer[0]}" for name, peer in found.items())]
    )
    report = Report(f"CPU ({platform.machine()}), {versions}; local model: {device_name(where)}")
    contenders: dict[str, Contender] = {BARE: bare, SUBJECT: ours} | {name: peer[1] for name, peer in found.items()}
    cases = list(itertools.product(SIZES[:1] if quick else SIZES, LATENCIES))
    for count, latency in tqdm(cases, desc="swarm", disable=None):
        compare(report, contenders, count, latency, rounds=1 if quick or count > 1_000 else 5)
    memory(report, 1_000 if quick else 100_000)
    batching(report, where, quick)
    from k25lite.swarm.bench_parl import (
        training,
    )  # here, because what it brings would slow down the others' collections

    training(report, quick)
    return report


def compare(report: Report, contenders: Mapping[str, Contender], count: int, latency: int, rounds: int) -> None:
    """CPU time and wall clock of so many sub-agents. First everybody works once off the clock, with few of them.

    Args:
        latency: of the model, in ms.

    Raises:
        Disagreement: somebody does not do the work; nobody was timed then if it shows with few sub-agents.
    """
    case, seconds = f"n={count},latency_ms={latency}", latency / 1000
    for name, contender in contenders.items():
        work(case, name, contender, 10, seconds)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(work(case, name, contender, count, seconds))
    cpu = {name: statistics.median(cpu for cpu, _ in each) for name, each in times.items()}
    wall = {name: statistics.median(wall for _, wall in each) for name, each in times.items()}
    report.add(case, "cpu_us_per_subagent", "µs", {name: 1e6 * each / count for name, each in cpu.items()}, cpu)
    if latency:
        wall[IDEAL] = STEPS * seconds * -(-count // AT_ONCE)
    report.add(case, "wall_s", "s", wall, wall)


def work(case: str, name: str, contender: Contender, count: int, seconds: float) -> tuple[float, float]:
    """The CPU time and the wall clock that a contender takes, in s.

    Args:
        seconds: that each step of the model takes.

    Raises:
        Disagreement: it took another number of steps, or came to other answers.
    """
    from k25lite.bench import Disagreement

    script = Script(seconds)
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    answers = asyncio.run(contender(count, script))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if (steps := script.taken()) != STEPS * count:
        raise Disagreement(f"{case}: {name} took {steps:,} steps of {STEPS * count:,}; not timed")
    if list(answers) != [str(index + STEPS - 1) for index in range(count)]:
        raise Disagreement(f"{case}: {name} came to other answers; not timed")
    return cpu, wall


def memory(report: Report, count: int) -> None:
    """The most memory that a process of its own takes for so many sub-agents, the interpreter and all imports included."""
    values = {}
    for name, contender in {BARE: bare, SUBJECT: ours}.items():
        program = f"from k25lite.swarm import bench; print(bench.peak(bench.{contender.__name__}, {count}))"
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
        values[name] = float(done.stdout)
    report.add(f"n={count},latency_ms=0", "peak_memory", "MB", values)


def peak(contender: Contender, count: int) -> float:
    """Have it work; the most memory that this process has had by then, in MB."""
    asyncio.run(contender(count, Script(0.0)))
    status = Path("/proc/self/status")  # on Linux, ru_maxrss is that of the process which started this one, if larger
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def batching(report: Report, device: Any, quick: bool) -> None:
    """Tokens per second of 64 concurrent agents that share a local model, against one agent at a time.

    The model is the lite one, with random weights, which an end of the reply is not left to: all replies are of the same
    length. On a CPU it has one thread, because matrices this small are slower on more.
    """
    import torch
    from transformers import DeepseekV3ForCausalLM

    from k25lite.model import lite_text_config
    from k25lite.processing import build_tokenizer
    from k25lite.swarm.local import LocalPolicy

    tokenizer = build_tokenizer(first + second for first in "bdfgklmnprst" for second in "aeiou")
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(lite_text_config(len(tokenizer)))
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    length = 8 if quick else 64

    async def rate(agents: int, asked: int) -> float:
        """Tokens per second of so many agents that ask one after another so many times."""
        policy = LocalPolicy(model, tokenizer, max_new_tokens=length, max_batch=agents, device=device)

        async def agent(index: int) -> int:
            messages = [{"role": "user", "content": "ba " * (1 + index % 8)}]
            return sum([(await policy(messages, [])).completion_tokens for _ in range(asked)])

        begun = time.perf_counter()
        tokens = sum(await asyncio.gather(*map(agent, range(agents))))
        assert tokens == agents * asked * length
        return tokens / (time.perf_counter() - begun)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        asyncio.run(rate(64, 1))
        turns = [(asyncio.run(rate(64, 2)), asyncio.run(rate(1, 2))) for _ in range(1 if quick else 5)]
    finally:
        torch.set_num_threads(threads)
    many, one = (statistics.median(each) for each in zip(*turns, strict=True))
    report.add(
        "64 agents, local model",
        "tokens_per_second",
        "tokens/s",
        {SUBJECT: many, ALONE: one},
        {SUBJECT: 1, ALONE: many / one},
    )
