"""The language of a table's rules: text from a stranger's file -> a tree that nothing executes -> numbers by torch.

    a <= expression            also <, >=, >, joined by `and`, `or`
    if condition then condition
    column = expression        the column follows from others: the repair computes it anew

Expressions: numbers, column names ({Flow Bytes/s} where a name is none in Python), + - * /, and five functions: max,
min, whole(a) (nearest whole number), where(condition, a, b), is(column, "value"). Shapes: B rows, D columns.
"""

from __future__ import annotations

import ast
import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

LONGEST, DEEPEST, LARGEST_NUMBER = 2000, 60, 1e15
"""Of a rule: characters, levels, and the size of its numbers."""
HOLDS, FOLLOWS = 1e-9, 1e-4
"""How far a comparison may be off (relative) and a computed column (absolute, relative above 1): data are rounded."""

Node = tuple[Any, ...]
"""("number", v), ("column", i), (operator or function, *nodes); ("<=" or "<", a, b), ("and" or "or", *conditions)."""

_QUOTED = re.compile(r"\{([^{}]*)\}|\"([^\"]*)\"|'([^']*)'")
_STRANGE = re.compile(r"[^\w\s.,()+\-*/<>=]")
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_SIDES = {ast.LtE: ("<=", False), ast.Lt: ("<", False), ast.GtE: ("<=", True), ast.Gt: ("<", True)}
_NUM_ARGUMENTS = {"max": (2, 20), "min": (2, 20), "whole": (1, 1), "where": (3, 3), "is_": (2, 2)}


@dataclass(frozen=True)
class TableRule:
    """A rule as a tree: an expression from which the column `target` follows, or, with target None, a condition."""

    name: str
    text: str
    tree: Node
    target: int | None

    @functools.cached_property
    def columns(self) -> list[int]:
        """All columns that play a part."""
        own = set() if self.target is None else {self.target}
        return sorted(columns_in(self.tree) | own)


def columns_in(node: Node) -> set[int]:
    """The columns of a tree."""
    if node[0] == "column":
        return {node[1]}
    return set().union(*(columns_in(part) for part in node[1:] if isinstance(part, tuple)))


def read_rule(name: str, text: str, index: Mapping[str, int], groups: Mapping[str, Mapping[str, int]]) -> TableRule:
    """The rule that a text says. index: plain columns by name; groups: the column of each value of a category.

    Raises ValueError with the rule, what is wrong, and what may stand there.

    >>> read_rule("fits", "2 * a <= b", {"a": 0, "b": 1}, {}).tree
    ('<=', ('*', ('number', 2.0), ('column', 0)), ('column', 1))
    """
    return _Reader(name, text, index, groups).read()


class _Reader:
    def __init__(self, name: str, text: str, index: Mapping[str, int], groups: Mapping[str, Mapping[str, int]]) -> None:
        self.name, self.text, self.index, self.groups = name, text, index, groups
        self.quoted: dict[str, str] = {}

    def fail(self, what: str) -> NoReturn:
        shown = self.text if len(self.text) <= 120 else self.text[:120] + "..."
        raise ValueError(
            f"rule {self.name!r}: {what} (in {shown!r}); expected 'a <= b', 'if c then c' or 'column = a' of numbers, "
            'columns, + - * /, max, min, whole, where and is(column, "value")'
        )

    def read(self) -> TableRule:
        if len(self.text) > LONGEST:
            self.fail(f"it has {len(self.text)} characters, at most {LONGEST} are read")
        if "__quoted" in self.text:
            self.fail("__quoted is a name of the reader's own")
        plain = _QUOTED.sub(self._keep, self.text).strip()
        if strange := _STRANGE.search(plain):
            self.fail(f"{strange[0]!r} means nothing here")
        plain = re.sub(r"\bis\s*\(", "is_(", plain)
        if match := re.fullmatch(r"if\b(.*?)\bthen\b(.*)", plain, re.DOTALL):
            given, then = (self.condition(self.parsed(part)) for part in match.groups())
            return TableRule(self.name, self.text, ("or", negated(given), then), None)
        sides = re.split(r"(?<![<>=])=(?!=)", plain)
        if len(sides) > 2:
            self.fail("it has two signs of equality")
        if len(sides) == 1:
            return TableRule(self.name, self.text, self.condition(self.parsed(plain)), None)
        target = self.expression(self.parsed(sides[0]))
        if target[0] != "column":
            self.fail("left of = stands no column")
        return TableRule(self.name, self.text, self.expression(self.parsed(sides[1])), target[1])

    def _keep(self, match: re.Match[str]) -> str:
        name = f"__quoted{len(self.quoted)}__"
        self.quoted[name] = next(part for part in match.groups() if part is not None)
        return f" {name} " if match[0][0] == "{" else f" {name}v "

    def parsed(self, text: str) -> ast.expr:
        if text.count("(") > DEEPEST:
            self.fail(f"it has {text.count('(')} brackets, at most {DEEPEST} are read")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about numbers that run into names
                return ast.parse(" ".join(text.split()), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            self.fail(f"it cannot be read: {getattr(error, 'msg', None) or type(error).__name__}")

    def condition(self, node: ast.expr, depth: int = 0) -> Node:
        if depth > DEEPEST:
            self.fail(f"it is nested more than {DEEPEST} deep")
        if isinstance(node, ast.BoolOp):
            word = "and" if isinstance(node.op, ast.And) else "or"
            return (word, *(self.condition(part, depth + 1) for part in node.values))
        if not isinstance(node, ast.Compare):
            self.fail("a comparison is missing")
        if len(node.ops) > 1:
            self.fail("a chain of comparisons; join two by `and`")
        if type(node.ops[0]) not in _SIDES:
            self.fail("of the comparisons there are <=, <, >= and >")
        sign, turned = _SIDES[type(node.ops[0])]
        sides = [self.expression(side, depth + 1) for side in (node.left, node.comparators[0])]
        return (sign, *(sides[::-1] if turned else sides))

    def expression(self, node: ast.expr, depth: int = 0) -> Node:
        if depth > DEEPEST:
            self.fail(f"it is nested more than {DEEPEST} deep")
        if isinstance(node, ast.Constant):
            return self.number(node.value)
        if isinstance(node, ast.Name):
            return self.column(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return ("-", ("number", 0.0), self.expression(node.operand, depth + 1))
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return (_OPERATORS[type(node.op)], *(self.expression(n, depth + 1) for n in (node.left, node.right)))
        if isinstance(node, ast.Call):
            return self.call(node, depth)
        self.fail(f"{type(node).__name__} is not part of the language")

    def number(self, value: Any) -> Node:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(f"{value!r} is no number")
        if abs(value) > LARGEST_NUMBER or not math.isfinite(value):
            self.fail(f"a number is larger than {LARGEST_NUMBER:g}")
        return ("number", float(value))

    def column(self, name: str) -> Node:
        if name.removesuffix("v") in self.quoted and name not in self.quoted:
            self.fail('a text in quotes stands where only is(column, "value") has one')
        name = self.quoted.get(name, name)
        if name in self.groups:
            self.fail(f'{name!r} is a category; ask is({name}, "value")')
        if name not in self.index:
            self.fail(f"{name!r} is no column of this table")
        return ("column", self.index[name])

    def call(self, node: ast.Call, depth: int) -> Node:
        name = node.func.id if isinstance(node.func, ast.Name) else "?"
        if name not in _NUM_ARGUMENTS:
            self.fail(f"{name!r} is no function of this language")
        least, most = _NUM_ARGUMENTS[name]
        if node.keywords or not least <= len(node.args) <= most:
            self.fail(f"{name.strip('_')} takes {least if least == most else f'{least} to {most}'} argument(s)")
        if name == "is_":
            return self.category(*node.args)
        if name == "where":
            asked = self.condition(node.args[0], depth + 1)
            return (name, asked, *(self.expression(part, depth + 1) for part in node.args[1:]))
        return (name, *(self.expression(part, depth + 1) for part in node.args))

    def category(self, column: ast.expr, value: ast.expr) -> Node:
        ids = [part.id if isinstance(part, ast.Name) else "" for part in (column, value)]
        name, wanted = self.quoted.get(ids[0], ids[0]), self.quoted.get(ids[1].removesuffix("v"))
        if name not in self.groups or wanted is None:
            self.fail("is() asks a category for a value in quotes")
        if wanted not in self.groups[name]:
            self.fail(f"{name!r} has no value {wanted!r}")
        return ("column", self.groups[name][wanted])


def negated(node: Node) -> Node:
    """The condition that holds where this one does not."""
    if node[0] in ("and", "or"):
        return ("or" if node[0] == "and" else "and", *map(negated, node[1:]))
    return ("<" if node[0] == "<=" else "<=", node[2], node[1])


# Numbers: what the repair and the gradient see. The checker has an evaluation of its own.


_TORCH: dict[str, Callable[..., Tensor]] = {
    "+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div,
    "max": lambda *parts: functools.reduce(torch.maximum, parts),
    "min": lambda *parts: functools.reduce(torch.minimum, parts),
    "whole": lambda part: part.round().detach() + (part - part.detach()),
}  # fmt: skip


def compute(node: Node, x: Tensor) -> Tensor:
    """(B,) or () values of an expression on rows (B, D), differentiable (`whole` as if it were not there)."""
    if node[0] == "column":
        return x[:, node[1]]
    if node[0] == "number":
        return x.new_tensor(node[1])
    if node[0] == "where":
        return torch.where(holds(node[1], x), compute(node[2], x), compute(node[3], x))
    return _TORCH[node[0]](*(compute(part, x) for part in node[1:]))


def holds(node: Node, x: Tensor, slack: float = HOLDS) -> Tensor:
    """(B,) bool: whether a condition holds, up to `slack`, which is for <= what 2 HOLDS - slack is against <.

    What is not finite, such as a division by 0, holds nowhere.
    """
    if node[0] in ("and", "or"):
        join = torch.logical_and if node[0] == "and" else torch.logical_or
        return functools.reduce(join, (holds(part, x, slack) for part in node[1:]))
    a, b = compute(node[1], x), compute(node[2], x)
    scale = 1 + a.abs() + b.abs()
    true = a - b <= slack * scale if node[0] == "<=" else a - b < (slack - 2 * HOLDS) * scale
    return true & scale.isfinite()


def kept(rule: TableRule, x: Tensor, strictness: float = 1.0) -> Tensor:
    """(B,) bool: whether rows keep a rule; strictness 0.5 allows half of the tolerance."""
    if rule.target is None:
        return holds(rule.tree, x, HOLDS * strictness)
    value = compute(rule.tree, x)
    good = (x[:, rule.target] - value).abs() <= FOLLOWS * strictness * value.abs().clamp_min(1)
    return good & value.isfinite()


def penalty(rule: TableRule, x: Tensor) -> Tensor:
    """(B,) how far rows are from keeping a rule, 0 where they do, differentiable."""
    if rule.target is not None:
        return (x[:, rule.target] - compute(rule.tree, x)).abs()
    return _excess(rule.tree, x)


def _excess(node: Node, x: Tensor) -> Tensor:
    if node[0] == "and":
        return functools.reduce(torch.add, (_excess(part, x) for part in node[1:]))
    if node[0] == "or":
        return functools.reduce(torch.minimum, (_excess(part, x) for part in node[1:]))
    return (compute(node[1], x) - compute(node[2], x)).clamp_min(0)
