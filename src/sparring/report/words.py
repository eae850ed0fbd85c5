"""Numbers as people read them, and the threat in plain words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

MINUS, DASH, THIN, SPACE = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NARROW NO-BREAK SPACE}", "\N{NO-BREAK SPACE}"


def _missing(value: Any) -> bool:
    return not isinstance(value, Real) or not math.isfinite(value)


def percent(share: Any, digits: int = 1) -> str:
    return DASH if _missing(share) else f"{100 * share:.{digits}f}{SPACE}%"


def interval(block: dict[str, Any]) -> str:
    return f"{100 * block['low']:.1f} to {percent(block['high'])}"


def points(share: float, sign: bool = True) -> str:
    """A difference of two shares in percentage points, with a true minus sign."""
    text = f"{100 * share:{'+' if sign else ''}.1f}".replace("-", MINUS)
    return text if float(f"{100 * share:.1f}") else "0.0"


def number(value: Any) -> str:
    if _missing(value):
        return DASH
    return f"{value:,}".replace(",", THIN) if isinstance(value, int) else f"{value:.4g}".replace("-", MINUS)


def passes(value: Any) -> str:
    """Passes per image: whole numbers from 100 on, else three digits."""
    return number(value) if _missing(value) else number(round(value)) if value >= 100 else f"{value:.3g}"


def duration(seconds: Any) -> str:
    if _missing(seconds):
        return DASH
    size, unit = (1, "s") if seconds < 100 else (60, "min") if seconds < 6000 else (3600, "h")
    amount = seconds / size
    return f"{amount:.0f}{SPACE}{unit}" if amount >= 10 else f"{amount:.1f}{SPACE}{unit}"


def times(ratio: float) -> str:
    """A factor with as many digits as it deserves: 0.052, 1.3 or 18 times."""
    return f"{number(round(ratio)) if ratio >= 10 else f'{ratio:.2g}'}{SPACE}times"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def how_often(p: float) -> str:
    """A probability as a count that a reader can picture."""
    if p < 0.001:
        return f"in fewer than 1 of 1{THIN}000"
    return f"in {1000 * p:.0f} of 1{THIN}000" if p < 0.1 else f"in {100 * p:.0f} of 100"


class Verdict(NamedTuple):
    """A verdict as it is shown: the word, a sign beside it, the class of its colour, and what it means."""

    word: str
    sign: str
    kind: str
    meaning: str


VERDICTS = {
    "TRUSTED": Verdict(
        "TRUSTED", "\N{CHECK MARK}", "trusted",
        "Checks looked for signs that the number under attack is too high, and found none.",
    ),
    "SUSPECT": Verdict(
        "SUSPECT", "!", "suspect",
        "A check found a sign that the number under attack is too high. Read the findings before you use it.",
    ),
    "INVALID": Verdict(
        "INVALID", "\N{HEAVY BALLOT X}", "invalid",
        "A check found that the attacks could not do their work: the number under attack says nothing.",
    ),
    None: Verdict(
        "NOT CHECKED", "?", "unchecked",
        "Nobody looked for signs that the number under attack is too high: the sanity checks were not run.",
    ),
}  # fmt: skip


class Threat(NamedTuple):
    """A threat model as far as its text tells; `radius` None when it does not."""

    words: str
    radius: float | None = None
    low: float | None = None
    high: float | None = None


_N = r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?"
_THREAT = re.compile(rf"(linf|l2|l1):({_N}|inf)(?:/([1-9]\d*))?(?:,box=(none|({_N})\.\.({_N})))?")


def read_threat(text: str, shape: Sequence[int]) -> Threat:
    """What the opponent may do, in a sentence; an unknown text is quoted as it is."""
    found = _THREAT.fullmatch(text.strip().lower())
    if found is None:
        return Threat(f"The opponent may change the input within this threat model: {text}.")
    kind, over, under, box, low, high = found.groups()
    radius, amount = float(over) / float(under or 1), f"at most {over}{'/' + under if under else ''}"
    bounds = (None, None) if box == "none" else (float(low or 0), float(high or 1))
    limits = "may have any value"
    if box != "none":
        limits = f"must stay in the valid range from {bounds[0]:g} to {bounds[1]:g}"
    size, part = math.prod(shape), "feature"
    if len(shape) == 3:
        part = "pixel" if shape[0] == 1 else "colour value of every pixel"
    if math.isinf(radius):
        words = "The opponent may change the input without a bound"
    elif kind == "linf":
        words = f"Every {part} may change by {amount}"
        if bounds[0] is not None and bounds[1] is not None:
            words += f", which is {percent(radius / (bounds[1] - bounds[0]))} of its range"
    elif kind == "l1":
        words = f"The changes of all {size} values add up to {amount}: for instance {radius / size:.3g} each"
    else:
        words = f"The whole change, measured as a Euclidean length over all {size} values, is {amount}"
        words += f": for instance one value by {radius:g}, or all of them by {radius / math.sqrt(size):.3g}"
    return Threat(f"{words}. The result {limits}.", None if math.isinf(radius) else radius, *bounds)
