"""The language of rules: hostile text, values beside Python's own, penalties, and the checker beside the repair."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.modalities import tables
from sparring.modalities.tables.check import breaks
from sparring.modalities.tables.rules import compute, kept, negated, penalty, read_rule
from sparring.modalities.tables.schema import Schema

INDEX = {"a": 0, "b": 1, "c": 2, "Flow Bytes/s": 3, "if": 4}
GROUPS = {"flag": {"SF": 5, "S0": 6}}


def rule(text: str) -> object:
    return read_rule("r", text, INDEX, GROUPS)


HOSTILE = [
    "__import__('os').system('true') <= 1", "open('x') <= a", "a.__class__ <= b", "a.b <= c", "().__class__ <= a",
    "[].append(1) <= a", "a[0] <= b", "a[b] = c", "{a: b} <= c", "{} <= a", "lambda: a <= b", "(lambda: a)() <= b",
    "eval('a') <= b", "exec('a') = b", "print(a) <= b", "getattr(a, 'b') <= c", "(a := b) <= c", "a if b else c <= c",
    "f'{a}' <= b", "b'x' <= a", "'x' <= a", '"x" = a', "a <= 'b'", "is(flag, SF) <= 1", "is(flag) <= 1",
    "is(a, 'SF') <= 1",
    "is(flag, 'XX') <= 1", "is(flag, 'SF', 'S0') <= 1", "flag <= 1", "flag = 1", "nobody <= a", "a <= nobody",
    "{no} <= a",
    "a <= b <= c", "a == b", "a != b", "a = b = c", "a + b", "a", "", "   ", "=", "a =", "= a", "<= a", "a <=",
    "a + 1 = b",
    "1 = a", "a ** 2 <= b", "a // 2 <= b", "a % 2 <= b", "a @ b <= c", "a & b <= c", "a | b <= c", "~a <= b",
    "not a <= b",
    "+a <= b", "a in b", "a is b", "a is not b", "a; b <= c", "a <= b\x00", "a <= b # c", "a <= b \\", "a <= `b`",
    "a <= $b",
    "a <= 1j", "a <= True", "a <= None", "a <= ...", "a <= 1e999", "a <= 1e16", "a <= nan", "a <= inf",
    "a <= 1if b else c",
    "a <= 0x", "a <= 1..2", "max(a) <= b", "max() <= b", "max(a, key=b) <= c", "max(*a) <= b", "max(**a) <= b",
    "min(a, b=c) <= b", "whole(a, b) <= c", "where(a, b, c) <= a", "where(a <= b, c) <= a", "max(a <= b, c) <= a",
    "max(a, b)(c) <= a", "if a then b", "if a <= b", "if then a <= b", "if a <= b then", "if a <= b then c = 1",
    "then a <= b", "(a <= b) + 1 <= c", "(a <= b) <= c", "a and b", "a <= b and c", "await a <= b", "yield a <= b",
    "import os", "a, b <= c", "(a, b) <= c", "[a for a in b] <= c", "__quoted0__ <= a", "a <= {b", "a <= b}", 'a <= "b',
    "-" * 1500 + "1 <= a", "(" * 100 + "a" + ")" * 100 + " <= b", "(" * 55 + "a <= b", "-" * 61 + "a <= b",
    "a" + " + a" * 70 + " <= b", "a <= " + "9" * 3000, "a <= " + "9" * 1500, "max(a" + ", a" * 20 + ") <= b",
    "a \uff0b b <= c",
    *(f"{name}(a) <= b" for name in (
        "abs", "all", "any", "ascii", "bin", "bool", "breakpoint", "bytes", "callable", "chr", "classmethod", "compile",
        "complex", "delattr", "dict", "dir", "divmod", "enumerate", "filter", "float", "format", "frozenset", "globals",
        "hasattr", "hash", "help", "hex", "id", "input", "int", "iter", "len", "list", "locals", "map", "memoryview",
        "next", "object", "oct", "ord", "pow", "property", "range", "repr", "reversed", "round", "set", "slice",
        "sorted", "str", "sum", "super", "tuple", "type", "vars", "zip", "__build_class__", "torch", "np", "sin", "log",
        "Max", "MIN", "where_", "is_not", "os.system", "a.b", "(a)", "max(a, b)", "lambda", "exit", "quit",
    )),
    "del a", "pass", "return a", "raise a", "global a", "assert a <= b", "a <= b if a else c", "for a in b: c",
    "while a: b", "def f(): a", "class A: a", "with a as b: c", "try: a", "from os import system", "a: int = b",
    "a += b", "a <<= b", "a -> b", "a ?= b", "a <= b, c", "*a <= b", "a <= *b", "**a", "a <= (yield)", "a <= [b]",
    "a <= {b: c}", "if a <= b else c <= a", "if a <= b then if b <= c then c <= a", "a <= 0b2",
    "a <= 1_", "a <= 0777", "a <= 1e", "a <= .", "a <= 1.2.3", "a <= --", "a < = b", "a => b", "a =< b", "a <> b",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_and_malformed_rules_are_clear_errors(text: str) -> None:
    with pytest.raises(ValueError, match=r"^rule 'r': .+ \(in .*expected 'a <= b'") as error:
        rule(text)
    assert len(str(error.value)) < 400


def test_there_are_enough_of_them_and_what_looks_alike_is_read() -> None:
    assert len({*HOSTILE}) == len(HOSTILE) >= 200
    for text in ("a <= b", "-a <= -1e15", "if a > 0 then b >= 2 and c < 1 or a <= 3", "{Flow Bytes/s} = max(a, {if})",
                 "c = where(is(flag, \"S0\") > 0, whole(a / b), 1_0)", "is(flag,'SF') < 1"):  # fmt: skip
        rule(text)


EXPRESSIONS = [
    "2 * a + b",
    "-(a - b) / c",
    "max(a, b, 3)",
    "min(a, -c) * 2",
    "whole(a / 2) * 2",
    "where(a > b, c, a + 1)",
]


def by_python(text: str, row: list[float]) -> float:
    """The same expression as Python reads it."""
    names = dict(zip("abc", row, strict=True)) | {"max": max, "min": min, "whole": lambda v: float(round(v))}
    if match := re.fullmatch(r"where\((.*), (.*), (.*)\)", text):
        text = f"({match[2]}) if {match[1]} else ({match[3]})"
    return float(eval(text, {"__builtins__": {}}, names))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-9, 9).map(float)] * 3), min_size=1, max_size=5), st.sampled_from(EXPRESSIONS))
def test_values_and_truth_are_those_of_python_both_for_repair_and_checker(rows: list, text: str) -> None:
    rows = [row for row in rows if row[2]] or [(1.0, 2.0, 3.0)]
    x = torch.tensor(rows, dtype=torch.float64)
    wide = torch.cat([x, torch.zeros(len(x), 4, dtype=torch.float64)], 1)
    expected = torch.tensor([by_python(text, [*row]) for row in rows], dtype=torch.float64)
    follows = rule(f"{{if}} = {text}")
    assert torch.equal(compute(follows.tree, wide) + 0 * x[:, 0], expected)
    wide[:, 4] = expected + torch.tensor([0.0, 0.5])[torch.arange(len(x)) % 2]
    broken = torch.arange(len(x)) % 2 == 1
    if expected.abs().max() < 1000:
        assert torch.equal(kept(follows, wide), ~broken) and (breaks(follows, wide.numpy()) == broken.numpy()).all()
    for sign in ("<=", "<", ">=", ">"):
        found, limit = rule(f"{text} {sign} 2 * c"), 2 * x[:, 2]
        true = {"<=": expected <= limit, "<": expected < limit, ">=": expected >= limit, ">": expected > limit}[sign]
        assert torch.equal(kept(found, wide), true) and (breaks(found, wide.numpy()) == ~true.numpy()).all()
        assert torch.equal(penalty(found, wide) > 0, ~true & (expected != limit))


def test_if_then_and_or_as_a_truth_table() -> None:
    rows = torch.tensor([[a, b, c, 0, 0, 0, 0] for a in (0, 1) for b in (0, 1) for c in (0, 1)], dtype=torch.float64)
    a, b, c = rows[:, :3].bool().T
    for text, expected in (
        ("if a > 0 then b > 0", ~a | b), ("if a > 0 and b > 0 then c > 0", ~(a & b) | c),
        ("if a > 0 or b > 0 then c > 0", ~(a | b) | c), ("a > 0 or b > 0 and c > 0", a | (b & c)),
    ):  # fmt: skip
        found = rule(text)
        assert torch.equal(kept(found, rows), expected)
        assert (breaks(found, rows.numpy()) == ~expected.numpy()).all()
        assert torch.equal(kept(type(found)("n", "", negated(found.tree), None), rows), ~expected)
        assert bool((penalty(found, rows)[expected] == 0).all())


def test_penalties_have_the_gradient_of_finite_differences() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0, 0.5, 0.2, 1.0, 0.0]], dtype=torch.float64)
    for text in (
        "a * b <= c",
        "if a > 1 then b >= c",
        "{if} = a / c + max(b, 0.1)",
        "a <= b and c <= b",
        "a - b <= whole(c) - 1",
    ):
        found, at = rule(text), x.clone().requires_grad_()
        value = penalty(found, at)
        assert value.item() > 0
        grad = torch.autograd.grad(value.sum(), at)[0]
        for j in range(5):
            ends = [penalty(found, x + s * 1e-6 * torch.eye(7, dtype=torch.float64)[j]).item() for s in (1, -1)]
            if "whole" not in text or j < 2:  # whole passes the gradient straight through
                assert grad[0, j].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)


def test_rounding_is_no_breach_and_no_number_is_one() -> None:
    x = torch.zeros(3, 7, dtype=torch.float64)
    x[:, 0], x[:, 1] = torch.tensor([0.1 + 0.2, 0.3 + 1e-6, math.nan], dtype=torch.float64), 0.3
    assert kept(rule("a <= b"), x).tolist() == [True, False, False]
    assert breaks(rule("a <= b"), x.numpy()).tolist() == [False, True, True]
    assert kept(rule("a < b"), x).tolist() == [False] * 3  # equal but for rounding is not below
    assert breaks(rule("a = b / c"), x.numpy()).all()  # b / 0


GOOD = 'label = "y"\nattacked = "bad"\n[columns]\na = {type = "integer", low = 0, high = 9}\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("label = ", "no TOML"), ("label = 'y'", "lacks attacked, columns"), (f"more = 1\n{GOOD}", "unknown keys more"),
        (GOOD.replace('"integer"', '"int"'), "column 'a': type = 'int'; expected one of real, integer"),
        (GOOD + "b = {low = 1}\n", "column 'b' needs a type"), (GOOD + "b = 3\n", "column 'b' needs a type.*got 3"),
        (GOOD + 'b = {type = "real", lo = 1}\n', "got lo"),
        (GOOD + 'b = {type = "real", low = 2, high = 1}\n', "low <= high"),
        (GOOD + 'b = {type = "real", unit = 0}\n', "a unit above 0"),
        (GOOD + 'b = {type = "real", low = true}\n', "no number"),
        (GOOD + 'b = {type = "real", unit = nan}\n', "no number"),
        (GOOD + 'b = {type = "real", scale = "log"}\n', "low = 0"),
        (GOOD + 'b = {type = "real", change = "sideways"}\n', "any, none, up, down"),
        (GOOD + 'b = {type = "category"}\n', "expected them for a category"),
        (GOOD + 'b = {type = "category", values = ["x", "x"]}\n', "each once"),
        (GOOD + 'b = {type = "category", values = [1]}\n', "a list of texts"),
        (GOOD + 'b = {type = "real", values = ["x"]}\n', "expected them for a category"),
        (GOOD + 'b = {type = "real", group = "g"}\n', "expected it for boolean"),
        (GOOD + "'b{' = {type = 'real'}\n", "no braces"), (GOOD + "[[relations]]\nname = 'x'\n", "a name and a rule"),
        (GOOD + "[[relations]]\nrule = 3\n", "a name and a rule"), (GOOD + "[[relations]]\nrule = 'a <= z'\n",
        "'z' is no column"),
        ("columns = 3\nlabel = 'y'\nattacked = 'b'", "expected 1 to 5000 tables"),
    ],
)  # fmt: skip
def test_schemas_that_will_not_do(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"^schema .*s.toml.*{sentence}"):
        Schema.read(tmp_path / "s.toml")


def test_a_schema_is_laid_out_as_it_says_and_its_name_tells_its_text() -> None:
    text = GOOD + (
        'p = {type = "category", values = ["tcp", "udp"], change = "none"}\n'
        'r = {type = "real", step = 0.01, scale = "log", low = 0, high = 1, unit = 2, change = "up"}\n'
        'g1 = {type = "boolean", group = "g"}\ng2 = {type = "boolean", group = "g"}\nt = {type = "real"}\n'
        '[[relations]]\nrule = "t = a + 1"\n[[relations]]\nrule = "a = whole(a)"\n'
    )
    s = Schema.of(text)
    assert s.names == ("a", "p=tcp", "p=udp", "r", "g1", "g2", "t")
    assert s.step.tolist() == [1, 1, 1, 0.01, 1, 1, 0] and s.log.tolist() == [False] * 3 + [True] + [False] * 3
    assert s.may_grow.tolist() == [True, False, False, True, True, True, True] and not s.may_fall[3]
    assert s.groups == ([1, 2], [4, 5]) and s.derived.tolist() == [False] * 6 + [True]  # a follows from itself
    with pytest.raises(ValueError, match="t has none"):
        _ = s.range_units
    assert s.__name__ != Schema.of(text + " ").__name__ and s.__name__ == Schema.of(text).__name__


@pytest.mark.parametrize("name", ["phishing_urls", "nsl_kdd"])
def test_the_schemas_that_ship_give_a_reason_for_what_is_not_free(name: str) -> None:
    path = Path(tables.__file__).parent / f"{name}.toml"
    found, lines = Schema.read(path), path.read_text().splitlines()
    assert len(found.columns) == {"phishing_urls": 87, "nsl_kdd": 41}[name]
    bare = [line for line in lines if "change =" in line and not re.search(r"# \w+", line)]
    assert not bare and tomllib.loads(path.read_text())["label"]
    assert np.isfinite(found.range_units).all()


def test_a_division_by_zero_breaks_every_comparison() -> None:
    x = torch.tensor([[1.0, 2.0, 0.0, 0, 0, 0, 0]], dtype=torch.float64)
    for text in ("a / c <= b", "b <= a / c", "-a / c < b", "b >= c / c", "a = a / c", "b = -b / c"):
        assert not kept(rule(text), x).item() and breaks(rule(text), x.numpy()).item()
