"""What an opponent changes: the probe of a pair, all of it or where glasses sit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparring.core.registry import text_of
from sparring.modalities.base import Dataset
from sparring.threats import THREATS, Lens, Linf, ThreatModel


@dataclass(frozen=True)
class Glasses(Linf):
    """Every value where the mask is true may change by at most `radius`; 1 leaves them free."""

    words: ClassVar[str] = "Every pixel where a pair of glasses sits may change by at most {}"

    def text(self) -> str:
        return f"glasses:{text_of(float(self.radius))}"


def glasses(radius: float, data: Dataset, *, top: float = 0.34, bottom: float = 0.52) -> Glasses:
    """The pixels of a pair of glasses, 1 for free ones; top and bottom: where it sits, as shares of the height."""
    if not 0 < radius <= 1 or not 0 <= top < bottom <= 1:
        got = f"{radius:g}, top={top:g}, bottom={bottom:g}"
        raise ValueError(f"got {got}; expected a radius above 0, at most 1, and 0 <= top < bottom <= 1")
    down, across = (torch.arange(n) / n for n in data.given["shape"][1:])
    lens = ((down >= top) & (down < bottom))[:, None] & ((across - 0.5).abs() < 0.4)
    nose = (down >= top + (bottom - top) / 3)[:, None] & ((across - 0.5).abs() < 0.06)
    return Glasses(radius, mask=(lens & ~nose)[None, None])


def on_probe(builder: Callable[..., ThreatModel]) -> Callable[..., Lens]:
    """The same threat for the probe alone; the reference, which lies with the one who asks, stays."""

    @functools.wraps(builder)
    def made(*values: Any, **options: Any) -> Lens:
        return Lens(builder(*values, **options), "probe")

    return made


PROBE_THREATS = {name: on_probe(builder) for name, builder in {**THREATS, "glasses": glasses}.items()}
