"""Tools: plain typed Python functions that agents may call.

The schema that a model reads comes from the signature, and pydantic holds what the model wrote against it. Whatever goes
wrong in a call is told to the agent as an observation, which it can learn from; it never ends the run.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import re
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from operator import attrgetter
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic.errors import PydanticUserError
from pydantic_core import to_json, to_jsonable_python
from typing_extensions import TypedDict

from k25lite.swarm.trace import TraceError

MAX_CHARACTERS = 20_000  # of an observation
Outcome = TypeVar("Outcome")


class Tool:
    """A function as a tool.

    Async functions run in the event loop. Others are taken to block: each call runs in a thread of its own, which is left
    behind if the agent's time is up, because threads cannot be stopped.

    Args:
        function: or method, its parameters annotated; `Annotated[int, Field(description=...)]` describes one to the model.
            Its docstring describes the tool, and its name, of at most 64 letters, digits, _ and -, is the tool's.
        spawns: the function sets agents to work; its keyword-only parameters are not for the model.

    Raises:
        ValueError: no function (a `functools.partial` is none), a parameter without annotation, without a name that it can
            be given by, or of a type that has no schema, or a name that endpoints refuse.
    """

    def __init__(self, function: Callable[..., Any], spawns: bool = False):
        if not (inspect.isroutine(function) and hasattr(function, "__name__")):
            raise ValueError(f"a tool is a function or a method, got {function!r}")
        self.function, self.name, self.spawns = function, function.__name__, spawns
        if not re.fullmatch("[a-zA-Z0-9_-]{1,64}", self.name):
            raise ValueError(f"a tool cannot have the name {self.name!r}")
        self.is_async = inspect.iscoroutinefunction(function)
        try:
            adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(self._shape())
            parameters = adapter.json_schema()
        except (PydanticUserError, NameError) as error:
            raise ValueError(f"tool {self.name}: {error}") from error
        self.arguments = adapter.validator
        self.schema = {
            "type": "function",
            "function": {
                "name": self.name,
                "description": inspect.getdoc(function) or "",
                "parameters": {key: value for key, value in parameters.items() if key != "title"},
            },
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew from its function elsewhere: validators cannot be pickled."""
        return Tool, (self.function, self.spawns)

    def _shape(self) -> Any:
        """A typed dictionary of the parameters; those with a default may be left out."""
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(self.function, eval_str=True).parameters.values():
            kind, annotation, default = parameter.kind, parameter.annotation, parameter.default
            if self.spawns and kind is parameter.KEYWORD_ONLY:
                continue
            if annotation is parameter.empty or kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(f"tool {self.name}: parameter {parameter} needs an annotation and a name of its own")
            if default is not parameter.empty:
                shown = {"default": to_jsonable_python(default, fallback=str)}
                annotation = NotRequired[Annotated[annotation, Field(json_schema_extra=shown)]]  # type: ignore[misc]
            fields[parameter.name] = annotation
        return with_config(ConfigDict(extra="forbid"))(TypedDict(self.name, fields))  # type: ignore[operator]

    async def __call__(self, arguments: str, **given: Any) -> str:
        """The observation: what the function returned, as text, or `error: ...`.

        Args:
            arguments: JSON, as a model wrote it. given: what is not for the model to give.

        Raises:
            TraceError: the trace cannot be written. CancelledError: from outside.
        """
        try:
            try:
                given.update(self.arguments.validate_json(arguments or "{}"))
            except ValidationError as error:
                return cut(f"error: {self.name}: {_problems(error)}")
            if self.is_async:
                result = await self.function(**given)
            else:
                result = await in_thread(self.function, given)
                if inspect.isawaitable(result):
                    result = await result
            return cut(result if isinstance(result, str) else to_json(result, fallback=str).decode())
        except TraceError:
            raise
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            return f"error: {self.name}: {describe(error)}"
        except (Exception, SystemExit) as error:
            return cut(f"error: {self.name}: {describe(error)}")


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


async def in_thread(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """As `asyncio.to_thread`, but one that hangs takes no other's place, and the end of the loop does not wait for it."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    outcome: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def tell(result: Any, error: BaseException | None) -> None:
        if not outcome.done():
            outcome.set_result((result, error))

    def work() -> None:
        result = error = None
        try:
            result = context.run(function, **given)
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=work, daemon=True).start()
    result, error = await outcome
    if error is not None:
        raise error
    return result


def is_cancelled() -> bool:
    """Whether a CancelledError comes from outside. Policies and tools can raise their own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def plugin(name: str) -> Callable[..., Any]:
    """A function of the user's, named as module:function; modules of the working folder come first.

    Raises:
        ValueError: there is no such function.
    """
    if (here := os.getcwd()) not in sys.path[:1]:
        sys.path.insert(0, here)  # a console script has its own folder there
    module, _, function = name.partition(":")
    try:
        return attrgetter(function)(import_module(module))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"no function {name!r}, which is to be module:function ({error})") from error


def describe(error: BaseException) -> str:
    """Its type and message, whatever the message is like."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def cut(text: str, length: int = MAX_CHARACTERS) -> str:
    """`text`, or its beginning and how much is left out."""
    return text if len(text) <= length else f"{text[:length]} [{len(text) - length:,} characters left out]"


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'arguments'}: {problem['msg']}"
        for problem in error.errors(include_input=False, include_url=False)[:5]
    )


def run_apart(work: Coroutine[Any, Any, Outcome]) -> Outcome:
    """`asyncio.run` in a thread of its own: in a notebook there is an event loop in this one already."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
