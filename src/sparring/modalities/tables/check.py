"""Is an attacked row one that the opponent could have made? In NumPy, without a line of what makes such rows.

Shapes: B rows, D columns as the model gets them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from sparring.modalities.tables.rules import FOLLOWS, HOLDS, Node, TableRule
from sparring.modalities.tables.schema import Schema


def unlawful(schema: Schema, x: np.ndarray, adversarial: np.ndarray, may_change: np.ndarray) -> dict[str, np.ndarray]:
    """(B,) bool for each law, true where a row (B, D) made of x (B, D) breaks it; may_change (B,).

    Cells that stay are lawful whatever they are. A rule that x breaks may stay broken.
    """
    change = adversarial - x
    moved = change != 0
    room = 1e-9 * (1 + np.abs(x))
    below = adversarial < np.minimum(x, schema.low) - room
    above = adversarial > np.maximum(x, schema.high) + room
    steps = np.divide(change, schema.step, out=np.zeros_like(change), where=schema.step > 0)
    with np.errstate(invalid="ignore"):
        uneven = np.abs(steps - np.rint(steps)) > 1e-6
    found = {
        "finite": ~np.isfinite(adversarial).all(1),
        "not his": (moved & ~may_change[:, None]).any(1),
        "change": ((change > 0) & ~schema.may_grow | (change < 0) & ~schema.may_fall).any(1),
        "range": (below | above).any(1),
        "step": (moved & uneven).any(1),
    }
    for group in schema.groups:
        part = adversarial[:, group]
        one = ((part == 0) | (part == 1)).all(1) & (part.sum(1) == 1)
        found["category"] = found.get("category", False) | (moved[:, group].any(1) & ~one)
    for rule in schema.rules:
        found[f"rule {rule.name}"] = breaks(rule, adversarial) & ~breaks(rule, x)
    return found


def breaks(rule: TableRule, x: np.ndarray) -> np.ndarray:
    """(B,) bool: rows that break a rule by more than rounding; what is not finite breaks it."""
    with np.errstate(all="ignore"):
        if rule.target is None:
            return ~np.broadcast_to(_true(rule.tree, x), len(x))
        value = _number(rule.tree, x)
        off = np.abs(x[:, rule.target] - value)
        return ~((off <= FOLLOWS * np.maximum(1, np.abs(value))) & np.isfinite(value))


def _true(node: Node, x: np.ndarray) -> Any:
    if node[0] == "and":
        return functools.reduce(np.logical_and, [_true(part, x) for part in node[1:]])
    if node[0] == "or":
        return functools.reduce(np.logical_or, [_true(part, x) for part in node[1:]])
    left, right = _number(node[1], x), _number(node[2], x)
    slack = HOLDS * (1 + np.abs(left) + np.abs(right))
    true = left <= right + slack if node[0] == "<=" else left < right - slack
    return true & np.isfinite(left) & np.isfinite(right)


def _number(node: Node, x: np.ndarray) -> Any:
    match node:
        case ("number", value):
            return np.float64(value)
        case ("column", index):
            return x[:, index]
        case ("where", condition, one, other):
            return np.where(_true(condition, x), _number(one, x), _number(other, x))
        case ("+", a, b):
            return _number(a, x) + _number(b, x)
        case ("-", a, b):
            return _number(a, x) - _number(b, x)
        case ("*", a, b):
            return _number(a, x) * _number(b, x)
        case ("/", a, b):
            return _number(a, x) / _number(b, x)
        case ("whole", a):
            return np.rint(_number(a, x))
    pick = {"max": np.maximum, "min": np.minimum}[node[0]]
    return functools.reduce(pick, [_number(part, x) for part in node[1:]])
