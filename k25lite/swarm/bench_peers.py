"""The same work in public frameworks, each as its documentation says; those that are not installed are left out.

    pip install -e '.[peers]'

- langgraph: a graph sends every prompt (`Send`) to a compiled subgraph of a model node and a tool node. Both are plain
  functions, which spares it the wrappers of LangChain's models and tools.
- openai-agents: an `Agent` with a model of our own and a `function_tool`; `Runner.run` for each prompt, without tracing.
  Each run has a clone of the agent: in runs that share one, the time of a step grows with their number.
- smolagents: for each prompt a `ToolCallingAgent` with a model of our own, in a thread, because it is synchronous. It
  answers by a call of `final_answer`. Its prompt templates are loaded once, not by each agent anew as by default.

None takes longer than two minutes for 10,000 sub-agents, so no case leaves one out.
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

import asyncio
import json
import operator
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated, Any

from typing_extensions import TypedDict

from k25lite.swarm import bench
from k25lite.swarm.bench import SYSTEM, Contender, Script, at_once, look


def langgraph() -> Contender:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langgraph.graph import END, START, MessagesState, StateGraph
    from langgraph.types import Send

    class Swarm(TypedDict):
        prompts: list[str]
        answers: Annotated[list[str], operator.add]

    class Answers(TypedDict):
        answers: Annotated[list[str], operator.add]

    class Conversation(MessagesState):
        answers: Annotated[list[str], operator.add]

    async def contender(count: int, script: Script) -> Sequence[str]:
        async def model(state: Any) -> dict[str, Any]:
            messages = state["messages"]
            await asyncio.sleep(script.seconds)
            step, last = len(messages) // 2 - 1, messages[-1].content
            arguments = script.next(step, last)
            if arguments is None:
                return {"messages": [AIMessage(last)], "answers": [last]}
            called = {"name": "look", "args": json.loads(arguments), "id": f"call_{step}"}
            return {"messages": [AIMessage("", tool_calls=[called])]}

        async def tools(state: Any) -> dict[str, Any]:
            called = state["messages"][-1].tool_calls
            return {"messages": [ToolMessage(await look(**each["args"]), tool_call_id=each["id"]) for each in called]}

        agent = StateGraph(Conversation, output_schema=Answers)
        agent.add_node("model", model)
        agent.add_node("tools", tools)
        agent.add_edge(START, "model")
        agent.add_conditional_edges("model", lambda state: "tools" if state["messages"][-1].tool_calls else END)
        agent.add_edge("tools", "model")

        swarm = StateGraph(Swarm)
        swarm.add_node("agent", agent.compile())
        swarm.add_conditional_edges(
            START,
            lambda state: [
                Send("agent", {"messages": [SystemMessage(SYSTEM), HumanMessage(prompt)]})
                for prompt in state["prompts"]
            ],
            ["agent"],
        )
        asked = {"prompts": [str(index) for index in range(count)]}
        return (await swarm.compile().ainvoke(asked, {"max_concurrency": bench.AT_ONCE}))["answers"]

    return contender


def openai_agents() -> Contender:
    from agents import Agent, Model, ModelResponse, RunConfig, Runner, Usage, function_tool
    from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

    class Scripted(Model):
        def __init__(self, script: Script):
            self.script = script

        async def get_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> ModelResponse:
            await asyncio.sleep(self.script.seconds)
            items = [{"content": input}] if isinstance(input, str) else input
            step, last = len(items) // 2, items[-1].get("output") or items[-1]["content"]
            arguments = self.script.next(step, last)
            said: Any
            if arguments is None:
                text = ResponseOutputText(text=last, type="output_text", annotations=[])
                said = ResponseOutputMessage(
                    id="m", content=[text], role="assistant", status="completed", type="message"
                )
            else:
                said = ResponseFunctionToolCall(
                    arguments=arguments, call_id=f"call_{step}", name="look", type="function_call"
                )
            return ModelResponse([said], Usage(requests=1, input_tokens=100, output_tokens=10, total_tokens=110), None)

        def stream_response(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    async def contender(count: int, script: Script) -> Sequence[str]:
        agent = Agent(name="a", instructions=SYSTEM, model=Scripted(script), tools=[function_tool(look)])
        config = RunConfig(tracing_disabled=True)

        async def work(prompt: str) -> str:
            return (await Runner.run(agent.clone(), prompt, run_config=config)).final_output

        return await at_once(work, count)

    return contender


def smolagents() -> Contender:
    from smolagents import ChatMessage, LogLevel, MessageRole, Model, ToolCallingAgent, tool
    from smolagents.models import ChatMessageToolCall, ChatMessageToolCallFunction

    class Scripted(Model):
        def __init__(self, script: Script):
            super().__init__()
            self.script = script

        def generate(self, messages: list[ChatMessage], *_: Any, **__: Any) -> ChatMessage:
            time.sleep(self.script.seconds)
            step, last = len(messages) // 2 - 1, messages[-1].content[-1]["text"].split()[-1]
            arguments = self.script.next(step, last)
            name = "look" if arguments else "final_answer"
            function = ChatMessageToolCallFunction(name=name, arguments=arguments or f'{{"answer": "{last}"}}')
            called = ChatMessageToolCall(id=f"call_{step}", type="function", function=function)
            return ChatMessage(role=MessageRole.ASSISTANT, content="", tool_calls=[called])

    @tool
    def look(place: int) -> str:
        """Look at a place, and see the next one.

        Args:
            place: where.
        """
        return str(place + 1)

    async def contender(count: int, script: Script) -> Sequence[str]:
        model = Scripted(script)
        templates = ToolCallingAgent([], model, verbosity_level=LogLevel.OFF).prompt_templates

        def work(prompt: str) -> str:
            agent = ToolCallingAgent(
                [look], model, prompt_templates=templates, instructions=SYSTEM, verbosity_level=LogLevel.OFF
            )
            return str(agent.run(prompt))

        with ThreadPoolExecutor(min(count, bench.AT_ONCE)) as threads:
            return list(threads.map(work, map(str, range(count))))

    return contender


PEERS: dict[str, Callable[[], Contender]] = {
    "langgraph": langgraph,
    "openai-agents": openai_agents,
    "smolagents": smolagents,
}


def peers() -> dict[str, tuple[str, Contender]]:
    """Version and contender by name, of those that are installed."""
    found = {}
    for name, make in PEERS.items():
        with suppress(ModuleNotFoundError):
            found[name] = version(name), make()
    return found
