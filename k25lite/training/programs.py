"""The small language of a model's programs over a picture.

A subset of Python: assignments to names, expressions, comprehensions, `for`, `if`, and calls of the vision tools and a few
builtins; nothing has attributes, and nothing opens, imports or defines. `img` is the picture, or what is told in its place.
The value of the last expression is what the model observes. What this cannot bound, time and memory, `sandbox.py` does.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, TypeAlias

import numpy as np

from k25lite.training.vision_tools import TOOLS

LONGEST_PROGRAM, LONGEST_STRING, LONGEST_LIST = 1000, 100, 10_000
LARGEST_CONSTANT, LARGEST_NUMBER = 10**6, 2**63
DEEPEST_BRACKETS, DEEPEST_TREE = 12, 30
Image: TypeAlias = np.ndarray | Sequence[str] | None


def evaluate(program: str, image: Image) -> Any:
    """The value of a program's last expression.

    Raises:
        ValueError, SyntaxError: it is not of the language. Also what the program itself raises.
    """
    if not program.strip():
        raise ValueError("empty program")
    if len(program) > LONGEST_PROGRAM:
        raise ValueError("program too long")
    if re.search(r"[^\n -~]", program):
        raise ValueError("only printable ASCII is allowed")
    # Before parsing, because the parser itself is recursive.
    if max(accumulate((c in "([{") - (c in ")]}") for c in program)) > DEEPEST_BRACKETS:
        raise ValueError("nested too deeply")
    tree = ast.parse(program.strip())
    depth, level = 0, list(ast.iter_child_nodes(tree))
    while level := [child for node in level for child in ast.iter_child_nodes(node)]:
        if (depth := depth + 1) > DEEPEST_TREE:
            raise ValueError("nested too deeply")
    _Language().visit(tree)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        raise ValueError("the last line is no expression")
    tree.body[-1] = ast.Assign([ast.Name("_value", ast.Store())], last.value)
    scope: dict[str, Any] = {"__builtins__": {}, **FUNCTIONS, **GUARDS, "img": image}
    exec(compile(ast.fix_missing_locations(tree), "<program>", "exec"), scope)
    return scope["_value"]


class _Language(ast.NodeTransformer):
    """Refuses what is not of the language, and puts bounded functions in place of + * and %."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, NODES):
            raise ValueError(f"{type(node).__name__} is not allowed")
        return super().generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in FUNCTIONS or node.id.startswith("_"):
            raise ValueError(f"{node.id} is no variable")
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        short = value is None or (isinstance(value, str) and len(value) <= LONGEST_STRING)
        if not short and not (isinstance(value, int | float) and abs(value) <= LARGEST_CONSTANT):
            raise ValueError("constant too large")
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.ctx, ast.Store):
            raise ValueError("only a name can be assigned to")
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = node.func.id if isinstance(node.func, ast.Name) else type(node.func).__name__
        if name not in FUNCTIONS:
            raise ValueError(f"no function {name}")
        if node.keywords:
            raise ValueError("no keyword arguments")
        node.args = [self.visit(argument) for argument in node.args]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        guard = f"_{type(node.op).__name__}"
        return ast.Call(ast.Name(guard, ast.Load()), [node.left, node.right], []) if guard in GUARDS else node


def _bounded(value: Any) -> Any:
    number, sequence = isinstance(value, int), isinstance(value, str | list | tuple | range)
    if (number and abs(value) > LARGEST_NUMBER) or (sequence and len(value) > LONGEST_LIST):
        raise ValueError("too large")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        raise TypeError("no * and no % of strings and lists")
    return value


def words(value: Any) -> Iterator[str]:
    """A value as words, lazily, because lists that share their items can be longer than any memory."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.ndarray):
        kind = "mask" if value.dtype == bool else "picture" if value.ndim == 3 else "array"
        yield f"{kind} {' x '.join(map(str, value.shape[:2]))}"
    elif isinstance(value, dict):
        yield from words(list(value.items()))
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            numbers = index and all(isinstance(each, int | float | np.number) for each in (value[index - 1], item))
            # Between numbers, because digits are tokens: 1 and 12 must not become 112.
            if numbers or (index and isinstance(item, list | tuple | dict | np.ndarray)):
                yield ","
            yield from words(item)
    elif isinstance(value, float):
        yield f"{value:.4g}"
    elif isinstance(value, int | str):
        yield str(value)
    elif value is None or isinstance(value, list | tuple):
        yield "none"
    else:
        raise TypeError(f"a {type(value).__name__} is no result")


def _str(value: Any) -> str:
    return " ".join(islice(words(value), LONGEST_STRING))


BUILTINS = (abs, all, any, enumerate, int, len, list, max, min, round, sorted, sum, zip)
FUNCTIONS: dict[str, Callable[..., Any]] = TOOLS | {builtin.__name__: builtin for builtin in BUILTINS}
FUNCTIONS |= {"range": lambda *bounds: _bounded(range(*bounds)), "str": _str}
GUARDS: dict[str, Callable[[Any, Any], Any]] = {
    "_Add": lambda a, b: _bounded(a + b),
    "_Sub": lambda a, b: _bounded(a - b),
    "_Mult": lambda a, b: _bounded(_number(a) * _number(b)),
    "_Mod": lambda a, b: _number(a) % b,
}
NODES = (
    *(ast.Module, ast.Expr, ast.Assign, ast.For, ast.If, ast.Name, ast.List, ast.Tuple, ast.Dict, ast.Slice),
    *(ast.Subscript, ast.ListComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.IfExp, ast.Compare),
    *(ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd),
    *(ast.BitOr, ast.boolop, ast.unaryop, ast.cmpop, ast.expr_context),
)
