"""Two evaluations of the same examples, paired through the table that each left on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparring.results.read import Row, read_rows
from sparring.results.statistics import McNemar, mcnemar


def compare(a: Path | str, b: Path | str) -> McNemar:
    """McNemar's exact test on the `robust` columns of two examples.csv, paired by index: (only_a, only_b, p_value).

    a, b: evaluation folders, or the files themselves; the rows may stand in any order. Raises ValueError when a file
    is missing or damaged, and when the two do not hold the same indices with the same labels.
    """
    return pair(read_rows(a), read_rows(b))


def pair(a: Mapping[int, Row], b: Mapping[int, Row]) -> McNemar:
    """The same for rows by index.

    >>> pair({0: Row(3, True), 1: Row(5, True)}, {1: Row(5, False), 0: Row(3, True)})
    McNemar(only_a=1, only_b=0, p_value=1.0)
    """
    if alone := sorted(a.keys() ^ b.keys()):
        raise ValueError(
            f"{len(alone)} examples are in one of the two evaluations only, the first is index {alone[0]}; a paired "
            "test needs the same examples, so evaluate both on the same data, split and number"
        )
    if other := sorted(i for i in a if a[i].label != b[i].label):
        raise ValueError(
            f"{len(other)} examples have another label in the other evaluation: index {other[0]} has "
            f"{a[other[0]].label} in one and {b[other[0]].label} in the other; evaluate both on the same data"
        )
    index = sorted(a)
    return mcnemar([a[i].robust for i in index], [b[i].robust for i in index])
