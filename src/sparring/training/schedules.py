"""Schedules: factors as functions of progress in [0, 1], for the learning rate and for the radius."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sparring.attacks.around import part_of
from sparring.core.types import Inputs, Model

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Constant:
    """1 all along."""

    def __call__(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """From 1 to 0 along half a cosine (Loshchilov and Hutter 2017, one period)."""

    def __call__(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class OneCycle:
    """Linearly from 0 up to 1 at `peak`, then down to 0: the triangle of Wong 2020 (there with peak 0.4)."""

    peak: float = 0.1

    def __call__(self, progress: float) -> float:
        return progress / self.peak if progress < self.peak else (1 - progress) / max(1 - self.peak, 1e-12)


@dataclass(frozen=True)
class Piecewise:
    """A tenth after `drops[0]`, a hundredth after `drops[1]`, ...: Rice 2020 (epochs 100 and 150 of 200)."""

    drops: tuple[float, ...] = (0.5, 0.75)

    def __call__(self, progress: float) -> float:
        return 0.1 ** sum(progress >= drop for drop in self.drops)


@dataclass(frozen=True)
class Ramp:
    """Linearly from `start` to 1 at `until`, then 1: for radii that grow while the network learns to walk."""

    until: float
    start: float = 0.0

    def __call__(self, progress: float) -> float:
        return 1.0 if progress >= self.until else self.start + (1 - self.start) * progress / self.until


SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(), "cosine": Cosine(), "one-cycle": OneCycle(), "piecewise": Piecewise(),
}  # fmt: skip


@dataclass(frozen=True)
class Ramped:
    """`recipe` with the radius of its attack, however deep in attacks of attacks, times `radius(progress)`.

    anew: (begin, end) of a second growth from 0, as a guard may set it in the middle of a run.

    >>> from sparring import Linf, pgd_at
    >>> Ramped(pgd_at(Linf(0.2)), Ramp(until=0.5)).at(0.25).attack.threat.radius
    0.1
    """

    recipe: Any
    radius: Schedule
    anew: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.recipe, "attack"):
            kind = getattr(self.recipe, "__name__", type(self.recipe).__name__)
            raise ValueError(f"a ramp of the radius needs a recipe with an `attack`; {kind} has none")
        if part_of(self.recipe.attack, "threat") is None:
            raise ValueError("a ramp of the radius needs an attack with a `threat`; this recipe's is a plain function")

    def __call__(self, model: Model, x: Inputs, y: Tensor, *, noise: Any = None) -> Any:
        """At the full radius."""
        return self.recipe(model, x, y, noise=noise)

    def at(self, progress: float) -> Any:
        """The recipe at this moment of the run."""
        recipe = self.recipe.at(progress) if hasattr(self.recipe, "at") else self.recipe
        factor = self.radius(progress)
        if self.anew and progress < self.anew[1]:
            begin, end = self.anew
            factor = min(factor, max(0.0, (progress - begin) / (end - begin)))
        return recipe if factor == 1.0 else replace(recipe, attack=_scaled(recipe.attack, factor))


def _scaled(attack: Any, factor: float) -> Any:
    if hasattr(attack, "scaled"):
        return attack.scaled(factor)
    if hasattr(attack, "threat"):
        return replace(attack, threat=attack.threat.at(factor))
    return replace(attack, attack=_scaled(attack.attack, factor))
