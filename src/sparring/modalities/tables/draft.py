"""A first schema of a table from its data, for a person to correct: what the columns are, and what may be a law.

Shapes: N rows of a chunk, D columns of numbers.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sparring.core.files import write_text
from sparring.modalities.tables.cells import Chunk, read_chunks
from sparring.modalities.tables.read import WORDS, as_number

MOST_VALUES, MOST_FOR_LAWS, MOST_LAWS, SAMPLE = 100, 300, 40, 20_000
"""Values of a category; columns among which laws are sought; laws that are written; rows that quantiles are read of."""
_OWN_WORDS = {"max", "min", "whole", "where", "is", "then"}


@dataclass
class _Seen:
    """What was seen of one column, chunk by chunk."""

    name: str
    values: Counter[str] = field(default_factory=Counter)  # up to one more than a category may have
    num: int = 0
    missing: int = 0
    words: bool = True
    numbers: bool = True
    whole: bool = True
    decimals: int = 0
    low: float = math.inf
    high: float = -math.inf
    sample: list[np.ndarray] = field(default_factory=list)

    def see(self, cells: list[str]) -> None:
        if len(self.values) <= MOST_VALUES:
            self.values.update(cells)
        self.num += len(cells)
        self.words = self.words and {cell.lower() for cell in cells} <= WORDS.keys()
        found = np.array([as_number(cell) for cell in cells])
        good = np.isfinite(found)
        odd = [cell for cell, fine in zip(cells, good, strict=True) if not fine and not _absent(cell)]
        self.numbers = self.numbers and not odd
        self.missing += int((~good).sum())
        if not self.numbers or not good.any():
            return
        found = found[good]
        self.whole = self.whole and bool((found == np.rint(found)).all())
        self.low, self.high = min(self.low, float(found.min())), max(self.high, float(found.max()))
        if not self.whole and self.decimals <= 3:
            self.decimals = max(self.decimals, *(len(cell.partition(".")[2]) if "e" not in cell.lower() else 9
                                                 for cell in cells))  # fmt: skip
        if sum(map(len, self.sample)) < SAMPLE:
            self.sample.append(found)

    @property
    def kind(self) -> str:
        """boolean, integer, real, category, or "" for what is no feature."""
        if self.words and len({cell.lower() for cell in self.values}) > 1:
            return "boolean"
        if self.numbers and math.isfinite(self.low):
            return "" if max(abs(self.low), abs(self.high)) > 2**53 else "integer" if self.whole else "real"
        return "category" if len(self.values) <= MOST_VALUES else ""

    def line(self) -> str:
        """The column in TOML, with what a person should look at."""
        notes = [f"{self.missing} cells hold no number"] if self.missing and self.kind != "category" else []
        if len(self.values) == 1:
            notes.append("the same in all rows")
        keys = [f'type = "{self.kind}"']
        if self.kind == "category":
            keys.append(f"values = {json.dumps(sorted(self.values), ensure_ascii=False)}")
        elif self.kind != "boolean":
            keys += self._measures(notes)
        if self.missing and self.kind in ("integer", "real"):
            keys.append(f"missing = {_text(math.floor(self.low) - 1)}")
        told = f"  # {'; '.join(notes)}" if notes else ""
        return f'{_key(self.name)} = {{{", ".join(keys)}, change = "any"}}{told}'

    def _measures(self, notes: list[str]) -> list[str]:
        seen = np.concatenate(self.sample)
        q10, q50, q90 = np.quantile(seen, [0.1, 0.5, 0.9])
        log = self.low >= 0 and self.high > 1000 * (1 + q50)
        scaled = np.log1p(seen) if log else seen
        ends = np.quantile(scaled, [0.1, 0.9])
        step = 10.0**-self.decimals if self.kind == "real" and 0 < self.decimals <= 3 else 0.0
        smallest = 0.0 if log else 1.0 if self.kind == "integer" else step
        unit = float(f"{max((ends[1] - ends[0]) / 2.56, scaled.std() / 5, smallest):.2g}") or 1.0
        keys = [f"low = {_text(self.low)}", f"high = {_text(self.high)}"]
        if step:
            keys.append(f"step = {_text(step)}")
        if log:
            keys.append('scale = "log"')
        if self.low < self.high:
            notes.append(f"a tenth up to {q10:.4g}, half up to {q50:.4g}, a tenth from {q90:.4g}")
        return [*keys, f"unit = {_text(unit)}"]


def draft_schema(data: str, label: str, attacked: str, *, out: Path | None = None, encoding: str = "utf-8") -> str:
    """The text of a schema for a CSV file, which a person should correct; written to `out`, too, if that is given.

    Types, ranges, steps and units are those of the data; every column may change, the strongest opponent. Laws are only
    candidates, as comments: what holds in every row need not be a law. Reads the file twice, in chunks. Raises
    ValueError where the file has no column `label`, or no row of the label(s) `attacked` (several: A,B).
    """
    if out and out.exists():
        raise ValueError(f"{out} is there already; a draft would overwrite what was corrected: choose another file")
    seen: dict[str, _Seen] = {}
    for chunk in read_chunks(data, encoding):
        if not seen:
            _check_names(data, chunk.header, label)
            seen = {name: _Seen(name) for name in chunk.header}
        for i, name in enumerate(chunk.header):
            seen[name].see([row[i] for row in chunk.cells])
    labels, wanted = seen.pop(label).values, [part.strip() for part in attacked.split(",")]
    if missing := [name for name in wanted if name not in labels]:
        there = ", ".join(f"{name!r} ({num})" for name, num in labels.most_common(10))
        raise ValueError(f"{data}: no row has the label {missing[0]!r}; there are {there}: mind case and blanks")
    columns = [column for column in seen.values() if column.kind]
    if not columns:
        raise ValueError(f"{data}: no column holds numbers, or at most {MOST_VALUES} values: nothing can be changed")
    ignored = [column.name for column in seen.values() if not column.kind]
    laws = _Laws([c for c in columns if c.kind != "category" and not c.missing and len(c.values) > 1][:MOST_FOR_LAWS])
    for chunk in read_chunks(data, encoding):
        laws.see(chunk)
    num, name = next(iter(seen.values())).num, Path(data).name
    text = "\n".join([
        f"# A draft from the {num} rows of {name}. Correct it: whose is each column (change = any, none, up or down,",
        "# with the reason beside it), what is its true range, and what change is as costly as any other (unit).",
        f"label = {json.dumps(label)}", f"attacked = {json.dumps(wanted)}",
        f"ignore = {json.dumps(ignored, ensure_ascii=False)}" + ("  # ids, times or free text" if ignored else ""),
        "", "[columns]", *(column.line() for column in columns), "", *laws.lines(num), "",
    ])  # fmt: skip
    if out:
        write_text(out, text)
    return text


class _Laws:
    """Which pairs of columns kept a <= b, or had b > 0 wherever a > 0, in all rows."""

    def __init__(self, columns: list[_Seen]) -> None:
        self.names = [column.name for column in columns]
        many = len(columns)
        self.below, self.follows = ~np.eye(many, dtype=bool), ~np.eye(many, dtype=bool)
        self.equal, self.positive, self.num = np.zeros((many, many)), np.zeros(many), 0

    def see(self, chunk: Chunk) -> None:
        at = [chunk.header.index(name) for name in self.names]
        x = np.array([[WORDS.get(row[i].lower(), as_number(row[i])) for i in at] for row in chunk.cells])
        x = x.reshape(len(chunk.cells), len(at))
        self.num += len(x)
        self.positive += (x > 0).sum(0)
        for i in range(len(at)):
            mine = x[:, [i]]
            self.below[i] &= (mine <= x).all(0)
            self.equal[i] += ((mine == x) & (mine != 0)).sum(0)
            self.follows[i] &= (x[mine[:, 0] > 0] > 0).all(0)

    def lines(self, num: int) -> list[str]:
        """Comments, the likeliest first: of one stem, and often at the limit."""
        found = []
        for i, j in np.argwhere(self.below | self.follows):
            a, b = (_column(self.names[k]) for k in (i, j))
            kin, tight = _stem(self.names[i]) == _stem(self.names[j]), self.equal[i, j] / num
            if self.below[i, j] and self.below[j, i]:
                found += [(3.0, f"{a} = {b}", "equal")] if i < j else []
            elif self.below[i, j] and tight > 0:
                found.append((kin + tight, f"{a} <= {b}", f"equal in {tight:.1%} of the rows"))
            elif self.follows[i, j] and not self.below[i, j] and self.positive[i] and self.positive[j] < num:
                share = self.positive[i] / num
                worth = kin + share * (1 - self.positive[j] / num)
                found.append((worth, f"if {a} > 0 then {b} > 0", f"asked in {share:.1%}"))
        found.sort(key=lambda law: (-law[0], law[1]))
        lines = [
            f"# {len(found)} candidates for laws, likeliest first. Each holds in all {num} rows; most are accidents of",
            "# these data. Is it a law? Then take the # away. Sums, products and ratios of columns were not tried.",
        ]
        for _, rule, why in found[:MOST_LAWS]:
            lines += ["#[[relations]]", f"#rule = {json.dumps(rule, ensure_ascii=False)}  # {why}"]
        return lines


def _check_names(data: str, header: list[str], label: str) -> None:
    if label not in header:
        raise ValueError(f"{data}: has no column {label!r}; it has {', '.join(map(repr, header[:20]))}")
    for name in header:
        if not name or header.count(name) > 1 or re.search(r"[{}\"']", name):
            what = "has no name" if not name else "is there twice" if header.count(name) > 1 else "has braces or quotes"
            raise ValueError(f"{data}: the column {header.index(name) + 1}, {name!r}, {what}; rename it in the file")


def _stem(name: str) -> str:
    return re.split(r"[\W_]+", name.lower())[0]


def _column(name: str) -> str:
    """A column's name as rules write it."""
    plain = name.isidentifier() and name.isascii() and not keyword.iskeyword(name) and name not in _OWN_WORDS
    return name if plain else f"{{{name}}}"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def _absent(cell: str) -> bool:
    """Whether a cell says that there is no number."""
    return cell.lower().lstrip("+-") in ("", "na", "n/a", "nan", "none", "null", "inf", "infinity", "?")
