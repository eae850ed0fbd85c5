"""Threat models by name: linf:8/255, l2:0.5, l1:12, linf:0.1,box=none, l2:1,box=-3..3, FILE.py:FUNCTION."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparring.core.registry import Builder, named
from sparring.threats.balls import L2, Ball, Linf
from sparring.threats.base import ThreatModel
from sparring.threats.l1 import L1


def linf(radius: float, *, box: tuple[float, float] | None = (0.0, 1.0)) -> Ball:
    """Every entry may change by at most the radius, within the box of valid values."""
    ball = _ball(Linf, radius, box)
    if isinstance(ball, Linf) and ball.allows_everything:
        hint = f"; did you mean linf:{radius:g}/255?" if radius == round(radius) else ""
        raise ValueError(f"with this radius every input may become any other{hint}")
    return ball


def l2(radius: float, *, box: tuple[float, float] | None = (0.0, 1.0)) -> Ball:
    """The Euclidean length of the change is at most the radius, within the box of valid values."""
    return _ball(L2, radius, box)


def l1(radius: float, *, box: tuple[float, float] | None = (0.0, 1.0)) -> Ball:
    """The absolute changes of all entries add up to at most the radius, within the box of valid values."""
    return _ball(L1, radius, box)


def _ball(kind: type[Ball], radius: float, box: tuple[float, float] | None) -> Ball:
    if not radius > 0:
        raise ValueError(f"the radius must be above 0, such as 8/255 or 0.5; got {radius:g}")
    if box is not None and not box[0] < box[1]:
        raise ValueError(f"the box is empty, {box[0]:g} is not below {box[1]:g}")
    low, high = box or (None, None)
    return kind(radius, low, high)


THREATS: dict[str, Builder] = {"linf": linf, "l2": l2, "l1": l1}


def make_threat(
    text: str, data: Any = None, model: Any = None, table: Mapping[str, Builder] | None = None
) -> ThreatModel:
    """The threat model that the text names: linf:8/255, l2:1,box=-3..3, or FILE.py:FUNCTION.

    table: the builders by name, the balls unless given; a builder gets `data` and `model` if it asks for them. Raises
    ValueError, TypeError and FileNotFoundError, in words that begin with the text.

    >>> make_threat("linf:8/255") == Linf(8 / 255)
    True
    >>> make_threat("l2:1,box=none")
    L2(radius=1.0, low=None, high=None, mask=None)
    """
    builder = named(text, THREATS if table is None else table, "threat", given=("data", "model"))
    try:
        threat = builder(data, model)
    except ValueError as error:
        raise ValueError(f"threat {text!r}: {error}") from error
    if not isinstance(threat, ThreatModel):
        raise TypeError(f"threat {text!r} made a {type(threat).__name__}; expected a subclass of ThreatModel")
    return threat


def threat_text(threat: object) -> str:
    """The text that `make_threat` reads back, or the repr of a threat that has none."""
    return threat.text() if isinstance(threat, ThreatModel) else repr(threat)
