"""Tools: plain typed Python functions that agents may call.

The schema that a model reads comes from the signature, and pydantic holds what the model wrote against it. Whatever goes
wrong in a call is told to the agent as an observation, which it can learn from; it never ends the run.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterable
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from k25lite.swarm.trace import TraceError

MAX_CHARACTERS = 20_000  # of an observation


class Tool:
    """A function as a tool.

    Async functions run in the event loop. Others are taken to block and run in a thread, which cannot be stopped: one that
    may hang should be async, or start a process of its own.

    Args:
        function: its parameters annotated; `Annotated[int, Field(description=...)]` describes one to the model. Its
            docstring describes the tool.
        spawns: the function sets agents to work; it takes the `path` of the call beside what the model gives.

    Raises:
        ValueError: a parameter without annotation, or one that takes any number of arguments.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None, spawns: bool = False):
        self.function, self.name, self.spawns = function, name or function.__name__, spawns
        self.is_async = inspect.iscoroutinefunction(function)
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if spawns and parameter.name == "path":
                continue
            if parameter.annotation is parameter.empty or parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                raise ValueError(f"tool {self.name}: parameter {parameter} needs an annotation and a name of its own")
            annotation = parameter.annotation
            fields[parameter.name] = annotation if parameter.default is parameter.empty else NotRequired[annotation]
        shape = with_config(ConfigDict(extra="forbid"))(TypedDict(self.name, fields))  # type: ignore[operator]
        self.arguments: TypeAdapter[dict[str, Any]] = TypeAdapter(shape)
        parameters = self.arguments.json_schema()
        self.schema = {
            "type": "function",
            "function": {
                "name": self.name,
                "description": inspect.getdoc(function) or "",
                "parameters": {key: value for key, value in parameters.items() if key != "title"},
            },
        }

    async def __call__(self, arguments: str, path: str = "") -> str:
        """The observation: what the function returned, as text, or `error: ...`.

        Args:
            arguments: JSON, as a model wrote it. path: of the call in the trace.
        """
        try:
            given = self.arguments.validate_json(arguments or "{}")
            if self.spawns:
                given["path"] = path
            result = await self.function(**given) if self.is_async else await asyncio.to_thread(self.function, **given)
        except ValidationError as error:
            return f"error: {self.name}: {_problems(error)}"
        except TraceError:
            raise
        except Exception as error:
            return cut(f"error: {self.name}: {type(error).__name__}: {error}")
        return cut(result if isinstance(result, str) else json.dumps(result, default=str, ensure_ascii=False))


def as_tools(functions: Iterable[Callable[..., Any] | Tool]) -> dict[str, Tool]:
    """Tools by their names.

    Raises:
        ValueError: two of the same name, or a function that is no tool.
    """
    tools: dict[str, Tool] = {}
    for function in functions:
        tool = function if isinstance(function, Tool) else Tool(function)
        if tool.name in tools:
            raise ValueError(f"two tools have the name {tool.name}")
        tools[tool.name] = tool
    return tools


def cut(text: str, length: int = MAX_CHARACTERS) -> str:
    """`text`, or its beginning and how much is left out."""
    return text if len(text) <= length else f"{text[:length]} [{len(text) - length:,} characters left out]"


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'arguments'}: {problem['msg']}"
        for problem in error.errors(include_input=False, include_url=False)[:5]
    )
