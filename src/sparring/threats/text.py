"""Threat models as text: "linf:8/255", "l2:0.5", "l1:12", "linf:0.1,box=none", "l2:1,box=-3..3"."""

from __future__ import annotations

from typing import Any

import torch

from sparring.threats.balls import L2, Ball, Linf
from sparring.threats.l1 import L1

THREATS: dict[str, type[Ball]] = {"linf": Linf, "l2": L2, "l1": L1}

_EXAMPLES = "right ones: linf:8/255, linf:0.3, l2:0.5, l1:12, linf:0.1,box=none, l2:1,box=-3..3"


def parse_threat(text: str) -> Ball:
    """The threat model that the text names; the box is [0, 1] unless it says otherwise. Raises ValueError.

    >>> parse_threat("linf:8/255") == Linf(8 / 255)
    True
    >>> parse_threat("l2:1,box=none")
    L2(radius=1.0, low=None, high=None, mask=None)
    """
    name, _, rest = text.strip().lower().partition(":")
    radius, *options = rest.split(",")
    if name not in THREATS or not radius:
        raise ValueError(f"threat {text!r} is not NAME:RADIUS with NAME one of {', '.join(THREATS)}; {_EXAMPLES}")
    box: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key.strip() != "box" or not value:
            raise ValueError(f"threat {text!r}: {option!r} is no option; the only one is box=LOW..HIGH or box=none")
        low, dots, high = value.partition("..")
        if not dots and value != "none":
            raise ValueError(f"threat {text!r}: box must be LOW..HIGH or none, got {value!r}; {_EXAMPLES}")
        box = {"low": _number(low, text), "high": _number(high, text)} if dots else {"low": None, "high": None}
        if dots and not _number(low, text) < _number(high, text):
            raise ValueError(f"threat {text!r}: the box is empty, {low} is not below {high}")
    if not _number(radius, text) > 0:
        raise ValueError(f"threat {text!r}: the radius must be above 0; {_EXAMPLES}")
    threat = THREATS[name](_number(radius, text), **box)
    width = None if threat.low is None or threat.high is None else float(threat.high) - float(threat.low)
    if name == "linf" and width is not None and width <= threat.radius < float("inf"):
        hint = f"; did you mean linf:{radius}/255?" if "/" not in radius else ""
        raise ValueError(f"threat {text!r}: with this radius every input may become any other{hint}")
    return threat


def format_threat(threat: object) -> str:
    """The text that `parse_threat` reads back; for threat models that have none, their repr."""
    name = next((n for n, kind in THREATS.items() if type(threat) is kind), None)
    if name is None or not isinstance(threat, Ball) or isinstance(threat.radius, torch.Tensor):
        return repr(threat)
    if threat.mask is not None or isinstance(threat.low, torch.Tensor) or isinstance(threat.high, torch.Tensor):
        return repr(threat)
    short, over_255 = f"{threat.radius:g}", round(threat.radius * 255) if threat.radius < 1e6 else 0
    if float(short) != threat.radius:
        short = f"{over_255}/255" if over_255 / 255 == threat.radius else repr(threat.radius)
    if (threat.low, threat.high) == (0.0, 1.0):
        return f"{name}:{short}"
    if threat.low is None or threat.high is None:
        return f"{name}:{short},box=none" if threat.low is threat.high else repr(threat)
    return f"{name}:{short},box={threat.low}..{threat.high}"


def _number(text: str, whole: str) -> float:
    over, slash, under = text.partition("/")
    try:
        return float(over) / float(under) if slash else float(over)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"threat {whole!r}: {text!r} is not a number; {_EXAMPLES}") from None
