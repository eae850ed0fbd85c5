"""Intervals and tests. Oracles: the closed formula by hand, enumeration of every outcome of a fair coin."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from sparring.results.schema import Metric
from sparring.results.statistics import McNemar, examples_needed, mcnemar, wilson

Z95 = 1.959963984540054


@pytest.mark.parametrize(("count", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (450, 1000), (9999, 10000), (1, 1)])
def test_wilson_is_the_closed_formula(count: int, n: int) -> None:
    p = count / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    share = wilson(count, n)
    assert (share.low, share.high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert share == Metric(p, share.low, share.high, n, count)
    assert 0 <= share.low <= share.value <= share.high <= 1


def test_wilson_by_hand() -> None:
    # p = 1/2, n = 4: centre 1/2, half width z / (4 + z^2) * sqrt(4 + z^2) / 2 = z / (2 sqrt(4 + z^2)) = 0.349964...
    assert wilson(2, 4).low == pytest.approx(0.5 - Z95 / (2 * math.sqrt(4 + Z95**2)), abs=1e-9)
    # none of n: from 0 to z^2 / (n + z^2)
    assert wilson(0, 100).high == pytest.approx(Z95**2 / (100 + Z95**2), abs=1e-9) and wilson(0, 100).low == 0
    assert wilson(5, 10, level=0.5).high < wilson(5, 10).high < wilson(5, 10, level=0.99).high
    plain = wilson(3, 7)
    assert [type(v) for v in vars(plain).values()] == [float, float, float, int, int, bool]


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("n", [1, 2, 7, 250, 10**6])
def test_wilson_is_scipys(n: int, level: float) -> None:
    for count in {0, 1, n // 3, n // 2, n - 1, n}:
        other = binomtest(count, n).proportion_ci(confidence_level=level, method="wilson")
        share = wilson(count, n, level)
        assert (share.low, share.high) == pytest.approx((other.low, other.high), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "fields",
    [(0.5, 0.0, 1.0, 0), (0.5, 0.6, 0.4, 10), (0.5, 0.0, 1.0, 10, 4), (1.1, 0.0, 1.2, 10, 11), (0.5, 0.0, 1.0, 2, True),
     (math.nan, 0.0, 1.0, 10), (0.5, 0.0, math.inf, 10), ("0.5", 0.0, 1.0, 10), (0.45, 0.0, 1.0, 10, 4.5)],
)  # fmt: skip
def test_a_metric_is_a_number_with_its_interval(fields: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError):
        Metric(*fields)
    with pytest.raises(AttributeError):
        wilson(1, 2).value = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(("count", "n", "level"), [(0, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0), (1, 5, 0)])
def test_wilson_refuses(count: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match=r"got count|level"):
        wilson(count, n, level)


WIDTHS = (0.97, 0.5, 0.2, 0.1, 0.0999999, 0.06, 0.02, 0.01, 0.001, 1e-6)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_examples_needed_solves_the_quadratic(width: float, share: float) -> None:
    # width^2 (n + z^2)^2 = 4 z^2 (share (1 - share) n + z^2 / 4), the larger root m = n + z^2
    z2, p = Z95**2, share * (1 - share)
    half = 2 * z2 * p / width**2
    root = half + math.sqrt(half**2 + z2**2 * (1 - 4 * p) / width**2) - z2
    n = examples_needed(width, share)
    assert type(n) is int and n >= 1
    assert n - 1 - 1e-9 * n <= max(root, 0.5) <= n * (1 + 1e-9)  # the ceiling of the root, up to rounding


def test_examples_needed_is_the_first_whose_interval_is_that_narrow() -> None:
    for width in (0.5, 0.2, 0.1, 0.02):  # at share 0 every n has a count: one by one
        wide = [n for n in range(1, 300) if wilson(0, n).high > width]
        assert wide == list(range(1, examples_needed(width, share=0)))
    for width in (0.5, 0.2, 0.1):  # at share 1/2 every other n has one
        n = examples_needed(width)
        for even in range(2, n + 40, 2):
            share = wilson(even // 2, even)
            assert (share.high - share.low <= width) == (even >= n), (width, even)


def test_examples_needed_knows_its_table_and_its_order() -> None:
    assert [examples_needed(w) for w in (0.2, 0.1, 0.02)] == [93, 381, 9600]
    numbers = [examples_needed(w) for w in WIDTHS]
    assert numbers == sorted(numbers) and numbers[0] == 1 < numbers[1]  # a narrower interval needs more
    shares = [examples_needed(0.02, share) for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)]
    assert shares == shares[::-1] and max(shares) == shares[3] and shares[:4] == sorted(set(shares))
    levels = [examples_needed(0.02, level=level) for level in (0.5, 0.9, 0.95, 0.99)]
    assert levels == sorted(set(levels))


@pytest.mark.parametrize(
    ("width", "share", "level"),
    [(0, 0.5, 0.95), (1, 0.5, 0.95), (2, 0.5, 0.95), (-0.1, 0.5, 0.95), (math.nan, 0.5, 0.95), (1e-7, 0.5, 0.95),
     (0.1, -0.1, 0.95), (0.1, 1.1, 0.95), (0.1, math.nan, 0.95), (0.1, 0.5, 0), (0.1, 0.5, 1), (0.1, 50, 0.95)],
)  # fmt: skip
def test_examples_needed_refuses(width: float, share: float, level: float) -> None:
    with pytest.raises(ValueError, match="not per cent"):
        examples_needed(width, share, level)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 0), (0, 5), (3, 3), (7, 2), (4, 5)])
def test_mcnemar_is_the_share_of_coin_rows_at_least_as_lopsided(only_a: int, only_b: int) -> None:
    tosses = only_a + only_b
    rows = [abs(2 * sum(row) - tosses) for row in product((0, 1), repeat=tosses)]
    p_value = sum(gap >= abs(only_a - only_b) for gap in rows) / len(rows)
    a = [True] * only_a + [False] * only_b + [True, False, True]
    b = [False] * only_a + [True] * only_b + [True, False, True]
    assert mcnemar(a, b) == McNemar(only_a, only_b, pytest.approx(p_value, abs=1e-12))
    assert mcnemar(torch.tensor(a), torch.tensor(b)) == mcnemar(a, b)


def test_mcnemar_is_scipys_for_many_examples() -> None:
    for only_a, only_b in ((30, 31), (100, 140), (0, 400), (3000, 2800)):
        p_value = binomtest(only_a, only_a + only_b).pvalue
        found = mcnemar([True] * only_a + [False] * only_b, [False] * only_a + [True] * only_b)
        assert found == McNemar(only_a, only_b, pytest.approx(p_value, rel=1e-9))


def test_mcnemar_refuses() -> None:
    for a, b in (([True], [True, False]), ([], []), ([1, 0], [0, 1]), ([[True]], [[True]])):
        with pytest.raises(ValueError, match="got"):
            mcnemar(a, b)
