"""What the columns of a table are, what an opponent may do to them, and which rules hold among them: one TOML file.

Shapes: D columns as the model gets them; a category of K values is K of them, one of which is 1.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sparring.modalities.tables.rules import TableRule, columns_in, read_rule

MOST_BYTES, MOST_COLUMNS, MOST_RULES = 10**6, 5000, 1000
Kind = Literal["real", "integer", "boolean", "category"]
_Change = Literal["any", "none", "up", "down"]


@dataclass(frozen=True)
class Column:
    """One column of the file.

    low, high: its range. step: values move by multiples of it (integers: 1). scale: "log" counts changes of
    log(1 + value). unit: the change that counts as 1. change: what the opponent may do. values: of a category. group:
    the boolean columns of one group hold exactly one 1. missing: what stands for a cell without a finite number.
    """

    name: str
    type: Kind
    low: float = -math.inf
    high: float = math.inf
    step: float = 0.0
    scale: Literal["linear", "log"] = "linear"
    unit: float = 1.0
    change: _Change = "any"
    values: tuple[str, ...] = ()
    group: str = ""
    missing: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high", "step", "unit", "missing"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))) or value != value:
                self._fail(f"{name} = {value!r} is no number")
        for name, choices in (("type", Kind), ("change", _Change), ("scale", Literal["linear", "log"])):
            if getattr(self, name) not in get_args(choices):
                self._fail(f"{name} = {getattr(self, name)!r}; expected one of {', '.join(get_args(choices))}")
        if not self.low <= self.high or not 0 < self.unit < math.inf or not 0 <= self.step < math.inf:
            self._fail(f"low = {self.low}, high = {self.high}, unit = {self.unit}, step = {self.step}; expected "
                       "low <= high, a unit above 0 and no negative step")  # fmt: skip
        if self.scale == "log" and self.low < 0:
            self._fail(f"scale = 'log' with low = {self.low}; expected low = 0 or more, for log(1 + value) is counted")
        if (self.type == "category") != bool(self.values) or len({*self.values}) < len(self.values):
            self._fail(f"values = {list(self.values)} for a {self.type}; expected them for a category, each once")
        if self.group and self.type != "boolean":
            self._fail(f"group = {self.group!r} for a {self.type}; expected it for boolean columns")

    def _fail(self, what: str) -> None:
        raise ValueError(f"column {self.name!r}: {what}")


class Schema:
    """A table's schema: columns, rules, and as arrays (D,) what the columns are that the model gets.

    attacked: the labels whose rows the opponent owns; a text "not NAME" means all others. places: the columns that play
    a part in each rule, categories whole. The name holds a hash of the text: results tell which schema they are about.

    >>> text = '[columns]' + chr(10) + 'a = {type = "integer", low = 0, high = 9}' + chr(10) + 'b = {type = "boolean"}'
    >>> Schema.of('label = "y"' + chr(10) + 'attacked = "bad"' + chr(10) + text).names
    ('a', 'b')
    """

    def __init__(self, name: str, text: str, found: Mapping[str, Any]) -> None:
        self.__name__ = f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.label, self.ignore = str(found["label"]), tuple(map(str, found.get("ignore", ())))
        attacked = found["attacked"]
        self.attacked = (attacked,) if isinstance(attacked, str) else tuple(map(str, attacked))
        self.columns = tuple(_column(key, value) for key, value in found["columns"].items())
        self._lay_out()
        index = {c.name: self.start[c.name] for c in self.columns if c.type != "category"}
        values = {
            c.name: {value: self.start[c.name] + i for i, value in enumerate(c.values)}
            for c in self.columns if c.type == "category"
        }  # fmt: skip
        relations = found.get("relations", [])
        told = [(str(r.get("name", r["rule"])), r["rule"]) for r in relations if isinstance(r, Mapping) and "rule" in r]
        if len(told) < len(relations) or len(told) > MOST_RULES or not all(isinstance(rule, str) for _, rule in told):
            raise ValueError(f"relations: expected at most {MOST_RULES} of [[relations]], each with a name and a rule")
        self.rules: tuple[TableRule, ...] = tuple(read_rule(name, rule, index, values) for name, rule in told)
        derived = [r.target for r in self.rules if r.target is not None and r.target not in columns_in(r.tree)]
        kin = {i: group for group in self.groups for i in group}
        self.places = tuple(sorted({j for i in rule.columns for j in kin.get(i, [i])}) for rule in self.rules)
        self.derived = np.zeros(len(self.names), bool)
        self.derived[derived] = True

    @staticmethod
    def read(path: str | Path) -> Schema:
        """The schema of a file. Raises ValueError that begins with the path, FileNotFoundError."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"schema {str(path)!r}: there is no such file; expected TOML, see docs/tables.md")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"schema {str(path)!r} has {path.stat().st_size} bytes; at most {MOST_BYTES} are read")
        try:
            return Schema.of(path.read_text(encoding="utf-8"), path.stem)
        except ValueError as error:
            raise ValueError(f"schema {str(path)!r}: {error}") from error

    @staticmethod
    def of(text: str, name: str = "schema") -> Schema:
        """The schema that a TOML text holds. Raises ValueError in one sentence."""
        try:
            found = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ValueError(f"this is no TOML ({error})") from None
        unknown = found.keys() - {"label", "attacked", "ignore", "columns", "relations"}
        lacks = {"label", "attacked", "columns"} - found.keys()
        if unknown or lacks:
            told = f"lacks {', '.join(sorted(lacks))}" if lacks else f"has unknown keys {', '.join(sorted(unknown))}"
            raise ValueError(f"it {told}; expected label, attacked, columns, and if need be ignore and relations")
        columns = found["columns"]
        if not isinstance(columns, Mapping) or not 0 < len(columns) <= MOST_COLUMNS:
            raise ValueError(f"columns: expected 1 to {MOST_COLUMNS} tables [columns.NAME]")
        return Schema(name, text, found)

    def _lay_out(self) -> None:
        names: list[str] = []
        per: list[tuple[Any, ...]] = []
        groups: dict[str, list[int]] = {}
        self.start: dict[str, int] = {}
        for c in self.columns:
            self.start[c.name] = len(names)
            flag = c.type in ("boolean", "category")
            step = 1.0 if flag or (c.type == "integer" and not c.step) else float(c.step)
            if c.group or c.type == "category":
                many = range(len(names), len(names) + max(1, len(c.values)))
                groups.setdefault(c.group or f"{c.name}=", []).extend(many)
            low, high = (0.0, 1.0) if flag else (float(c.low), float(c.high))
            grows, falls = c.change in ("any", "up"), c.change in ("any", "down")
            names += [f"{c.name}={value}" for value in c.values] or [c.name]
            per += [(low, high, step, float(c.unit), c.scale == "log", grows, falls)] * max(1, len(c.values))
        self.names, self.groups = tuple(names), tuple(groups.values())
        self.low, self.high, self.step, self.unit = (np.array(column) for column in [*zip(*per, strict=True)][:4])
        self.log, self.may_grow, self.may_fall = (np.array(column) for column in [*zip(*per, strict=True)][4:])

    @property
    def movable(self) -> np.ndarray:
        """(D,) bool: columns of which the opponent may change some value."""
        return self.may_grow | self.may_fall

    @functools.cached_property
    def range_units(self) -> np.ndarray:
        """(D,) the whole range of each column as its unit, on its own scale; 1 of a column without a width."""
        ends = [np.where(self.log, np.log1p(np.maximum(end, 0)), end) for end in (self.low, self.high)]
        width = ends[1] - ends[0]
        if not np.isfinite(width).all():
            open_ = ", ".join(np.array(self.names)[~np.isfinite(width)][:5])
            raise ValueError(f"units=range needs low and high of every column; {open_} has none")
        return np.where(width > 0, width, 1.0)

    def without_laws(self) -> Schema:
        """The same columns as plain numbers inside their ranges, which the opponent sets as he likes: no types, steps,
        directions or rules."""
        free, one = copy.copy(self), np.ones(len(self.names), bool)
        free.__name__ = f"{self.__name__} without laws"
        free.rules, free.places, free.groups = (), (), ()
        free.step, free.derived, free.may_grow, free.may_fall = 0.0 * self.step, ~one, one, one
        return free

    def cells(self, rows: np.ndarray) -> list[list[str]]:
        """The cells of rows (N, D) as a file has them, in the order of `columns`; `read_csv` reads the same numbers."""
        found = []
        for c in self.columns:
            part = rows[:, self.start[c.name] : self.start[c.name] + max(1, len(c.values))]
            if c.type == "category":
                found.append([c.values[int(one.argmax())] if one.any() else "" for one in part])
            else:
                found.append([str(int(v)) if v.is_integer() else repr(v) for v in part[:, 0].tolist()])
        return [list(row) for row in zip(*found, strict=True)]

    def is_attacked(self, label: str) -> bool:
        """Whether rows of this label are the opponent's."""
        return any(label != a[4:] if a.startswith("not ") else label == a for a in self.attacked)


def _column(name: str, found: Any) -> Column:
    known = {f.name for f in fields(Column)} - {"name"}
    if not isinstance(found, Mapping) or "type" not in found or found.keys() - known:
        got = ", ".join(sorted(found.keys() - known)) if isinstance(found, Mapping) else repr(found)
        raise ValueError(f"column {name!r} needs a type, and knows {', '.join(sorted(known))}; got {got or 'no type'}")
    if not name or re.search(r"[{}\"']", name):
        raise ValueError(f"column {name!r}: a name has no braces and quotes in it, for rules put them around it")
    values = found.get("values", [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"column {name!r}: values = {values!r}; expected a list of texts")
    return Column(name, **{**found, "values": tuple(values)})
