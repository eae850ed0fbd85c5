"""Pairing two evaluations from their files. Oracle: the counts by hand, the coin's binomial by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from sparring.results.compare import compare, pair
from sparring.results.read import Row, read_rows
from sparring.results.statistics import McNemar

HEAD = (
    "index,label,clean_prediction,clean_confidence,robust,broken_by,adversarial_prediction,adversarial_confidence,size"
)


def table(path: Path, robust: list[int], labels: list[int] | None = None, order: list[int] | None = None) -> Path:
    """An examples.csv, its rows in the given order."""
    labels = labels or [i % 3 for i in range(len(robust))]
    lines = [f"{i},{labels[i]},{labels[i]},0.9,{robust[i]},,,," for i in (order or range(len(robust)))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([HEAD, *lines]) + "\n", encoding="utf-8")
    return path


def test_compare_counts_what_only_one_gets_right(tmp_path: Path) -> None:
    a = [1] * 9 + [0] * 2 + [1] * 30 + [0] * 30
    b = [0] * 9 + [1] * 2 + [1] * 30 + [0] * 30
    order = random.Random(3).sample(range(71), 71)
    first, second = table(tmp_path / "a" / "examples.csv", a), table(tmp_path / "b" / "examples.csv", b, order=order)
    p_value = 2 * sum(math.comb(11, k) for k in (0, 1, 2)) / 2**11
    expected = McNemar(9, 2, pytest.approx(p_value, abs=1e-12))
    assert compare(first, second) == expected  # paired by index, so the order of the rows does not matter
    assert compare(str(tmp_path / "a"), tmp_path / "b") == expected
    assert compare(second, first) == McNemar(2, 9, expected.p_value)
    assert compare(first, first) == McNemar(0, 0, 1.0)


def test_pair_refuses_other_examples() -> None:
    rows = {i: Row(i % 3, True) for i in range(5)}
    with pytest.raises(ValueError, match=r"2 examples are in one .* first is index 4.*same examples"):
        pair(rows, dict.fromkeys((0, 1, 2, 3, 7), rows[0]))
    with pytest.raises(ValueError, match=r"1 examples have another label.*index 2 has 2 in one and 0 in the other"):
        pair(rows, rows | {2: Row(0, True)})


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "holds no examples"),
        (HEAD, "holds no examples"),
        ("index,label\n0,1", "line 2.*robust"),
        ("label,robust\n0,1", "line 2.*index"),
        ("index,label,robust\n0,1,1\n0,1,1", "line 3.*index 0 twice"),
        ("index,label,robust\n0,1,1\n1,1,yes", "line 3.*'yes'"),
        ("index,label,robust\n0,1,", "line 2.*''"),
        ("index,label,robust\n0,1", "line 2.*None"),
        ("index,label,robust\nzero,1,1", "line 2.*'zero'"),
        ("index,label,robust\n0,1.5,1", "line 2.*'1.5'"),
        (b"index,label,robust\n\xff,1,1", "line .*utf-8"),
    ],
)
def test_damaged_tables(content: str | bytes, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "examples.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=fragment):
        read_rows(path)


def test_a_missing_table(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(ValueError, match="is not there"):
            read_rows(source)
