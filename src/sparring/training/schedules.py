"""Schedules: factors as functions of progress in [0, 1], for the learning rate and for the radius."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sparring.training.recipes import Standard

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
    "constant": Constant(),
    "cosine": Cosine(),
    "one-cycle": OneCycle(),
    "piecewise": Piecewise(),
}


def at_radius(recipe: Any, factor: float) -> Any:
    """The recipe with its attack's radius times `factor`, for radius schedules; standard training stays."""
    if factor == 1.0 or isinstance(recipe, Standard):
        return recipe
    if not hasattr(recipe, "attack"):
        raise ValueError(f"a radius schedule needs a recipe with an `attack`; {type(recipe).__name__} has none")
    if hasattr(recipe.attack, "threat"):
        return replace(recipe, attack=replace(recipe.attack, threat=recipe.attack.threat.at(factor)))
    if hasattr(recipe.attack, "attack"):  # restarts of an attack
        return replace(recipe, attack=at_radius(recipe.attack, factor))
    raise ValueError("a radius schedule needs an attack with a `threat`; this recipe's attack is a plain function")
