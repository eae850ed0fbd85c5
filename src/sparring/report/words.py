"""Numbers as people read them."""

from __future__ import annotations

import json
import math
from numbers import Real
from typing import Any

from sparring.results.schema import Metric

MINUS, DASH, THIN, SPACE = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NARROW NO-BREAK SPACE}", "\N{NO-BREAK SPACE}"


def _missing(value: Any) -> bool:
    return not isinstance(value, Real) or not math.isfinite(value)


def percent(share: Any, digits: int = 1) -> str:
    return DASH if _missing(share) else f"{100 * share:.{digits}f}{SPACE}%"


def interval(share: Metric) -> str:
    return f"{100 * share.low:.1f} to {percent(share.high)}"


def points(share: float, sign: bool = True) -> str:
    """A difference of two shares in percentage points, with a true minus sign."""
    text = f"{100 * share:{'+' if sign else ''}.1f}".replace("-", MINUS)
    return text if float(f"{100 * share:.1f}") else "0.0"


def numeral(value: Any) -> str:
    if _missing(value):
        return DASH
    return f"{value:,}".replace(",", THIN) if isinstance(value, int) else f"{value:.4g}".replace("-", MINUS)


def passes(value: Any) -> str:
    """Passes per image: whole numbers from 100 on, else three digits."""
    return numeral(value) if _missing(value) else numeral(round(value)) if value >= 100 else f"{value:.3g}"


def duration(seconds: Any) -> str:
    if _missing(seconds):
        return DASH
    size, unit = (1, "s") if seconds < 100 else (60, "min") if seconds < 6000 else (3600, "h")
    amount = seconds / size
    return f"{amount:.0f}{SPACE}{unit}" if amount >= 10 else f"{amount:.1f}{SPACE}{unit}"


def times(ratio: float) -> str:
    """A factor with as many digits as it deserves: 0.052, 1.3 or 18 times."""
    return f"{numeral(round(ratio)) if ratio >= 10 else f'{ratio:.2g}'}{SPACE}times"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def how_often(p: float) -> str:
    """A probability as a count that a reader can picture."""
    if p < 0.001:
        return f"in fewer than 1 of 1{THIN}000"
    return f"in {1000 * p:.0f} of 1{THIN}000" if p < 0.1 else f"in {100 * p:.0f} of 100"


def pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=lambda record: record.model_dump(mode="json"))


FILTERS: dict[str, Any] = {
    "percent": percent, "interval": interval, "points": points, "number": numeral, "passes": passes,
    "duration": duration, "times": times, "p_value": p_value, "how_often": how_often, "pretty": pretty,
}  # fmt: skip
"""Of the templates."""
