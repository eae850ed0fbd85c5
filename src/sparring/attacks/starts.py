"""Where an attack starts: records that make the first z of (threat, x, noise)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.types import Inputs
from sparring.threats.base import ThreatModel

Start = Callable[[ThreatModel, Inputs, Noise], Tensor]


@dataclass(frozen=True)
class Null:
    """Start at the clean input."""

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        return threat.null(x)


@dataclass(frozen=True)
class Uniform:
    """Start at a random point of the set."""

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        return threat.sample(x, noise)


@dataclass(frozen=True)
class Gaussian:
    """Start close to the clean input: normal noise of standard deviation `scale`, in the units of z."""

    scale: float

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        null = threat.null(x)
        return threat.project(x, null + self.scale * noise.normal(null.shape[1:]).to(null))


@dataclass(frozen=True, eq=False)
class Given:
    """Start at a known z (B, *Z)."""

    z: Tensor
    per_example: ClassVar[tuple[str, ...]] = ("z",)

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        return threat.project(x, self.z)


@dataclass(frozen=True)
class OnTheEdge:
    """Start in a random direction, as far out as the radius allows, and from there into the box."""

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        null = threat.null(x)
        if threat.norm == "l2":
            direction = threat.steepest(x, noise.normal(null.shape[1:]).to(null))
        else:
            cube = noise.uniform(null.shape[1:]).to(null) * 2 - 1
            direction = cube / per_example(threat.size(x, cube).clamp_min(1e-12), cube)
        return threat.project(x, null + per_example(threat.radius, null) * direction)


@dataclass(frozen=True)
class Corner:
    """Start where a random linear function is largest in the set: for Linf a random corner of the cube."""

    def __call__(self, threat: ThreatModel, x: Inputs, noise: Noise) -> Tensor:
        null = threat.null(x)
        direction = threat.steepest(x, noise.normal(null.shape[1:]).to(null))
        return threat.project(x, null + per_example(threat.radius, null) * direction)


null, uniform = Null(), Uniform()
