"""How sure a measured share is, and whether two models really differ: closed forms, no torch, no slow import."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

from sparring.results.schema import Metric


def _two_sided(level: float) -> float:
    """The point of the normal distribution that leaves (1 - level) / 2 above it."""
    return NormalDist().inv_cdf((1 + level) / 2)


def wilson(count: int, n: int, level: float = 0.95, *, higher_is_better: bool = True) -> Metric:
    """The share count / n with Wilson's score interval. Raises ValueError when there is no share (n = 0).

    The ends are (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with p = count / n. Unlike
    p -+ 1.96 standard errors they stay in [0, 1], and say something at 0 and at n.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001 recommend it.

    >>> share = wilson(450, 1000)
    >>> f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
    '45.0% (41.9% to 48.1%)'
    """
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"a share needs 0 <= count <= n and n >= 1, got count {count} of n {n}: nothing was measured")
    if not 0 < level < 1:
        raise ValueError(f"the confidence level must lie between 0 and 1, such as 0.95; got {level}")
    z, p = _two_sided(level), count / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    # the ends are exact at none and at all, where rounding could miss them
    return Metric(p, low if count else 0.0, high if count < n else 1.0, int(n), int(count), higher_is_better)


def examples_needed(width: float, share: float = 0.5, level: float = 0.95) -> int:
    """The smallest number of examples with which Wilson's interval is at most `width` wide (high - low).

    width in [1e-6, 1): twice the "plus or minus"; share in [0, 1]: about where the share is expected, 0.5 needs the
    most. ValueError otherwise. The width is 2 z sqrt(share (1 - share) n + z^2 / 4) / (n + z^2), as if share * n
    examples could be counted whether whole or not; it falls with every n.

    Source: Wilson 1927.

    >>> examples_needed(0.02), examples_needed(0.02, share=0.9)  # plus or minus one point
    (9600, 3461)
    """
    if not 1e-6 <= width < 1 or not 0 <= share <= 1 or not 0 < level < 1:
        raise ValueError(
            f"got width {width}, share {share}, level {level}; expected a width from 1e-6 to below 1 (0.02 is plus or "
            "minus one point), a share in [0, 1] and a level between 0 and 1: all three are shares, not per cent"
        )
    z = _two_sided(level)

    def narrow(n: int) -> bool:
        return 2 * z * math.sqrt(share * (1 - share) * n + z * z / 4) / (n + z * z) <= width

    return 1 + bisect_left(range(1, 10**15), True, key=narrow)


class McNemar(NamedTuple):
    """What two models make of the same examples: those that only one gets right, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(a_right: Sequence[bool] | Any, b_right: Sequence[bool] | Any) -> McNemar:
    """(only_a, only_b, p_value) from whether each model is right (N,), on the same examples in the same order.

    Sequences, arrays or tensors of bool. If neither model were better, each example that only one gets right would be
    a fair coin: p = min(1, 2 P(at most min(only_a, only_b) of all tosses)), summed in whole numbers. Raises ValueError
    for unequal lengths, no examples, or values that are not bool.

    Source: McNemar 1947, in the exact binomial form.

    >>> mcnemar([True] * 5 + [False], [False] * 5 + [False])
    McNemar(only_a=5, only_b=0, p_value=0.0625)
    """
    a, b = (right.tolist() if hasattr(right, "tolist") else list(right) for right in (a_right, b_right))
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(
            f"got {len(a)} and {len(b)} values; McNemar's test pairs them, so both models must have been judged on the "
            "same examples, at least one"
        )
    if odd := [value for value in (*a, *b) if not isinstance(value, bool)]:
        raise ValueError(f"got {odd[0]!r:.40}; expected bool: whether the model is right on each example")
    only_a, only_b = (sum(x and not y for x, y in zip(*sides, strict=True)) for sides in ((a, b), (b, a)))
    tosses = only_a + only_b
    ways = heads = 1  # ways to see exactly 0 heads, and to see at most that many
    for k in range(min(only_a, only_b)):
        ways = ways * (tosses - k) // (k + 1)
        heads += ways
    return McNemar(only_a, only_b, min(1.0, 2 * heads / 2**tosses))


@dataclass(frozen=True)
class Change:
    """From `before` to `after` (shares of n) with the 95 % interval of the difference.

    test: McNemar's, `only_a` the examples lost and `only_b` those gained; None when the examples are not the same.
    """

    before: float
    after: float
    n: int
    low: float
    high: float
    test: McNemar | None = None

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def within_chance(self) -> bool:
        return self.low <= 0 <= self.high if self.test is None else not self.is_sure(1)

    def is_sure(self, num_looks: int) -> bool:
        """Whether it is beyond chance by McNemar's test, with Bonferroni's correction for that many looks."""
        return self.test is not None and self.test.p_value * num_looks < 0.05


def paired_change(before: Sequence[bool], after: Sequence[bool]) -> Change:
    """The change on the same examples. Interval: Agresti and Min 2005, Wald with 1/2 added to each cell."""
    test, n = mcnemar(before, after), len(before)
    middle = (test.only_b - test.only_a) / (n + 2)
    spread = (test.only_b + test.only_a + 1) / (n + 2) - middle**2
    half = _two_sided(0.95) * math.sqrt(spread / (n + 2))
    return Change(sum(before) / n, sum(after) / n, n, max(-1.0, middle - half), min(1.0, middle + half), test)


def unpaired_change(before: Metric, after: Metric) -> Change:
    """The change between two sets of examples. Interval: Newcombe 1998, method 10, from Wilson's intervals."""
    a, b = before.value, after.value
    low = b - a - math.hypot(b - after.low, before.high - a)
    high = b - a + math.hypot(after.high - b, a - before.low)
    return Change(a, b, min(before.n, after.n), low, high)
