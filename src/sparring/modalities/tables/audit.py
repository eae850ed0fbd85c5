"""A schema beside the data it is for: what rows break, and which rules say nothing.

Shapes: N rows of a chunk, D columns as the model gets them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sparring.modalities.tables.cells import read_chunks
from sparring.modalities.tables.check import breaks
from sparring.modalities.tables.read import numbers_of
from sparring.modalities.tables.rules import TableRule
from sparring.modalities.tables.schema import Schema

NUM_TRIED, NUM_SHOWN = 20_000, 3
"""Rows inside the ranges on which a rule is tried; numbers of rows that are named."""


@dataclass
class _Count:
    """How many rows break something, and the lines where the first of them stand."""

    num: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, broken: np.ndarray, numbers: list[int]) -> None:
        self.num += int(broken.sum())
        if len(self.first) < NUM_SHOWN:
            self.first += [numbers[i] for i in np.flatnonzero(broken)[: NUM_SHOWN - len(self.first)]]

    def __str__(self) -> str:
        return f"{self.num} row{'s' * (self.num != 1)}: {', '.join(map(str, self.first))}{', ...' * (self.num > 3)}"


def check_table(schema: str | Path, data: str, *, encoding: str = "utf-8", seed: int = 0) -> list[str]:
    """What is to be said of a schema and a CSV file, a sentence each; a summary comes last.

    Named: what rows break (ranges, steps, groups, rules; with line numbers), a rule that none of 20,000 rows drawn
    inside the ranges breaks, which forbids nothing, and one that no change of the opponent's to one column of a row
    would break, which never binds. Reads the file in chunks: memory does not grow with it. Raises ValueError for cells
    that cannot be read, with row, column and value.
    """
    known = Schema.read(schema)
    broken: dict[str, _Count] = {}
    labels: Counter[str] = Counter()
    ends = np.stack([np.full(len(known.names), np.inf), np.full(len(known.names), -np.inf)])
    binds = {rule.name: rule.target is not None for rule in known.rules}
    started = 0
    for chunk in read_chunks(data, encoding):
        x, some = numbers_of(data, chunk, known)
        labels.update(some)
        ends = np.stack([np.minimum(ends[0], x.min(0)), np.maximum(ends[1], x.max(0))])
        against = np.zeros(len(x), bool)
        for what, bad in _broken(known, x).items():
            broken.setdefault(what, _Count()).add(bad, chunk.numbers)
            against |= bad & what.startswith("rule ")
        started += int(against.sum())
        for rule in known.rules:
            binds[rule.name] = binds[rule.name] or _binds(known, rule, x)
    told = [f"the header stands again in {chunk.repeated} rows, which are left out"] if chunk.repeated else []
    told += [f"{what}: broken by {count}" for what, count in broken.items() if count.num]
    tried = _inside(known, ends, seed)
    empty = [rule.name for rule in known.rules if rule.target is None and not breaks(rule, tried).any()]
    told += [f"rule {name!r}: none of {NUM_TRIED} rows drawn inside the ranges breaks it; does it forbid anything?"
             for name in empty]  # fmt: skip
    told += [f"rule {name!r}: never binds: no change of the opponent's to one column of a row breaks it"
             for name, bound in binds.items() if not bound and name not in empty]  # fmt: skip
    told += [f"column {name!r}: {low:.6g} in all rows" for name, low, high in zip(known.names, *ends, strict=True)
             if low == high]  # fmt: skip
    num, own = sum(labels.values()), sum(n for label, n in labels.items() if known.is_attacked(label))
    kinds = ", ".join(f"{label!r} {n}" for label, n in labels.most_common(10))
    if not 0 < own < num:
        told.append(f"labels: {'all' if own else 'no'} rows are attacked, as attacked = {list(known.attacked)} says")
    told.append(
        f"{num} rows, {own} of them attacked ({kinds}); {int(known.movable.sum())} of "
        f"{len(known.names)} columns may change; {len(known.rules)} rules, which {started} rows break from the start"
    )
    return told


def _broken(schema: Schema, x: np.ndarray) -> dict[str, np.ndarray]:
    """What rows break, (N,) bool each. Values off the ranges or steps are read, but an attack does not go there."""
    found: dict[str, np.ndarray] = {}
    room = 1e-9 * (1 + np.abs(x))
    outside = (x < schema.low - room) | (x > schema.high + room)
    steps = np.divide(x, schema.step, out=np.zeros_like(x), where=schema.step > 0)
    uneven = np.abs(steps - np.rint(steps)) > 1e-6
    for j, name in enumerate(schema.names):
        if outside[:, j].any():
            found[f"column {name!r}: range {schema.low[j]:.6g} to {schema.high[j]:.6g}"] = outside[:, j]
        if uneven[:, j].any():
            found[f"column {name!r}: step {schema.step[j]:.6g}"] = uneven[:, j]
    for group in schema.groups:
        if (bad := x[:, group].sum(1) != 1).any():
            found[f"group of {schema.names[group[0]]!r}: exactly one is 1"] = bad
    return found | {f"rule {rule.name!r}": bad for rule in schema.rules if (bad := breaks(rule, x)).any()}


def _binds(schema: Schema, rule: TableRule, x: np.ndarray) -> bool:
    """Whether a row would break the rule where one column goes to an end of its range that the opponent may go to."""
    for j in rule.columns:
        for end, may in ((schema.low[j], schema.may_fall[j]), (schema.high[j], schema.may_grow[j])):
            if may:
                moved = x.copy()
                moved[:, j] = end if np.isfinite(end) else np.sign(end) * 1e12
                if (breaks(rule, moved) & ~breaks(rule, x)).any():
                    return True
    return False


def _inside(schema: Schema, ends: np.ndarray, seed: int) -> np.ndarray:
    """Rows (NUM_TRIED, D) inside the ranges (of the data, where the schema has none): a third of the cells anywhere, on
    the column's own scale; the others at an end or 0."""
    draw = np.random.default_rng(seed)
    low, high = (
        np.where(np.isfinite(own), own, seen) for own, seen in zip((schema.low, schema.high), ends, strict=True)
    )
    shape = (NUM_TRIED, len(low))
    scale = [np.where(schema.log, np.log1p(np.maximum(end, 0)), end) for end in (low, high)]
    x = scale[0] + draw.random(shape) * (scale[1] - scale[0])
    x = np.where(schema.log, np.expm1(np.where(schema.log, x, 0)), x)
    x = np.where(schema.step > 0, np.rint(x / np.maximum(schema.step, 1e-300)) * schema.step, x)
    kind = draw.integers(0, 6, shape)
    x = np.where(kind == 2, low, np.where(kind == 3, high, np.where(kind == 4, 0.0, x)))
    x = np.clip(x, low, high)
    for group in schema.groups:
        x[:, group] = np.eye(len(group))[draw.integers(0, len(group), NUM_TRIED)]
    return x
