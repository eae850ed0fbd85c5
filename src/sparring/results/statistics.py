"""How sure a measured share is, and whether two models that saw the same examples really differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Share(NamedTuple):
    """count / n with its confidence interval [low, high]."""

    value: float
    low: float
    high: float
    n: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants here


def wilson(count: int, n: int, level: float = 0.95) -> Share:
    """The share count / n with Wilson's score interval. Raises ValueError when there is no share (n = 0).

    Source: Wilson 1927; Brown, Cai and DasGupta 2001 recommend it. Unlike count / n +- 1.96 standard errors it stays
    in [0, 1], and says something at 0 and at n.

    >>> share = wilson(450, 1000)
    >>> f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
    '45.0% (41.9% to 48.1%)'
    """
    from scipy.stats import binomtest

    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"a share needs 0 <= count <= n and n >= 1, got count {count} of n {n}: nothing was measured")
    if not 0 < level < 1:
        raise ValueError(f"the confidence level must lie between 0 and 1, such as 0.95; got {level}")
    interval = binomtest(int(count), int(n)).proportion_ci(confidence_level=level, method="wilson")
    return Share(count / n, float(interval.low), float(interval.high), int(n), int(count))


def examples_needed(width: float, share: float = 0.5, level: float = 0.95) -> int:
    """The smallest number of examples with which Wilson's interval is at most `width` wide (high - low).

    width in [1e-6, 1): twice the "plus or minus"; share in [0, 1]: about where the share is expected, 0.5 needs the
    most. ValueError otherwise. The width is 2 z sqrt(share (1 - share) n + z^2 / 4) / (n + z^2), as if share * n
    examples could be counted whether whole or not. It falls with every n, so a search by halves finds the first.

    Source: Wilson 1927; z is the point of the normal distribution that leaves (1 - level) / 2 above it.

    >>> examples_needed(0.02), examples_needed(0.02, share=0.9)  # plus or minus one point
    (9600, 3461)
    """
    from scipy.special import ndtri

    if not 1e-6 <= width < 1 or not 0 <= share <= 1 or not 0 < level < 1:
        raise ValueError(
            f"got width {width}, share {share}, level {level}; expected a width from 1e-6 to below 1 (0.02 is plus or "
            "minus one point), a share in [0, 1] and a level between 0 and 1: all three are shares, not per cent"
        )
    z = float(ndtri((1 + level) / 2))

    def wide(n: int) -> bool:
        return 2 * z * math.sqrt(share * (1 - share) * n + z * z / 4) / (n + z * z) > width

    too_few, enough = 0, 1
    while wide(enough):
        too_few, enough = enough, 2 * enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (middle, enough) if wide(middle) else (too_few, middle)
    return enough


class McNemar(NamedTuple):
    """What two models make of the same examples: those that only one gets right, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(a_right: Sequence[bool] | Tensor, b_right: Sequence[bool] | Tensor) -> McNemar:
    """(only_a, only_b, p_value) from whether each model is right (N,), on the same examples in the same order.

    If neither were better, each example that only one gets right would be a fair coin. Raises ValueError for
    unequal lengths, no examples, or values that are not bool.

    Source: McNemar 1947, in the exact binomial form.

    >>> mcnemar([True] * 5 + [False], [False] * 5 + [False])
    McNemar(only_a=5, only_b=0, p_value=0.0625)
    """
    from scipy.stats import binomtest

    a, b = torch.as_tensor(a_right).cpu(), torch.as_tensor(b_right).cpu()
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(
            f"got {tuple(a.shape)} and {tuple(b.shape)} values; McNemar's test pairs them, so both models must have "
            "been judged on the same examples, at least one"
        )
    if a.dtype != torch.bool or b.dtype != torch.bool:
        raise ValueError(f"got {a.dtype} and {b.dtype}; expected bool: whether the model is right on each example")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a, only_b, p_value)
