"""Intervals and tests. Oracles: the closed formula by hand, enumeration of every outcome of a fair coin."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from sparring.evaluation.statistics import McNemar, Share, mcnemar, wilson

Z95 = 1.959963984540054


@pytest.mark.parametrize(("count", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (450, 1000), (9999, 10000), (1, 1)])
def test_wilson_is_the_closed_formula(count: int, n: int) -> None:
    p = count / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    share = wilson(count, n)
    assert share == Share(p, pytest.approx(centre - half, abs=1e-9), pytest.approx(centre + half, abs=1e-9), n, count)
    assert 0 <= share.low <= share.value <= share.high <= 1


def test_wilson_by_hand() -> None:
    # p = 1/2, n = 4: centre 1/2, half width z / (4 + z^2) * sqrt(4 + z^2) / 2 = z / (2 sqrt(4 + z^2)) = 0.349964...
    assert wilson(2, 4).low == pytest.approx(0.5 - Z95 / (2 * math.sqrt(4 + Z95**2)), abs=1e-9)
    # none of n: from 0 to z^2 / (n + z^2)
    assert wilson(0, 100).high == pytest.approx(Z95**2 / (100 + Z95**2), abs=1e-9) and wilson(0, 100).low == 0
    assert wilson(5, 10, level=0.5).high < wilson(5, 10).high < wilson(5, 10, level=0.99).high
    plain = wilson(3, 7)
    assert [type(v) for v in plain] == [float, float, float, int, int]


@pytest.mark.parametrize(("count", "n", "level"), [(0, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0), (1, 5, 0)])
def test_wilson_refuses(count: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match=r"got count|level"):
        wilson(count, n, level)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 0), (0, 5), (3, 3), (7, 2), (4, 5)])
def test_mcnemar_is_the_share_of_coin_rows_at_least_as_lopsided(only_a: int, only_b: int) -> None:
    tosses = only_a + only_b
    rows = [abs(2 * sum(row) - tosses) for row in product((0, 1), repeat=tosses)]
    p_value = sum(gap >= abs(only_a - only_b) for gap in rows) / len(rows)
    a = [True] * only_a + [False] * only_b + [True, False, True]
    b = [False] * only_a + [True] * only_b + [True, False, True]
    assert mcnemar(a, b) == McNemar(only_a, only_b, pytest.approx(p_value, abs=1e-12))
    assert mcnemar(torch.tensor(a), torch.tensor(b)) == mcnemar(a, b)


def test_mcnemar_refuses() -> None:
    for a, b in (([True], [True, False]), ([], []), ([1, 0], [0, 1]), ([[True]], [[True]])):
        with pytest.raises(ValueError, match="got"):
            mcnemar(a, b)
