"""First-order step rules. Step sizes are fractions of the threat's radius, unless given as `absolute_step`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.attack import Problem, Seen
from sparring.geometry import per_example


def step_length(problem: Problem, z: Tensor, fraction: float, absolute: float | None) -> float | Tensor:
    """A step's length in the threat's unit: `absolute` if given, else fraction * radius (a number or (B, 1, ...))."""
    if absolute is not None:
        return absolute
    radius = problem.threat.radius
    if not isinstance(radius, Tensor) and math.isinf(radius):
        raise ValueError("the radius is infinite, so a step cannot be a fraction of it; give absolute_step")
    return fraction * per_example(radius, z)


@dataclass(frozen=True)
class Ascent:
    """z <- project(z + step_size * radius * steepest(v)) with v <- momentum * v + grad / mean|grad|.

    Without momentum (FGSM, BIM, PGD) v is the gradient. Source of the momentum: Dong 2018, eq. 6; like the authors'
    code we divide by the mean, not the sum, of the absolute gradient, which changes the scale of v and nothing else.
    """

    step_size: float = 0.25
    momentum: float = 0.0
    absolute_step: float | None = None
    needs_grad: ClassVar[bool] = True

    def init(self, problem: Problem, z: Tensor) -> Tensor | None:
        return torch.zeros_like(z) if self.momentum else None

    def step(
        self, problem: Problem, z: Tensor, seen: Seen, state: Tensor | None, t: int
    ) -> tuple[Tensor, Tensor | None]:
        assert seen.grad is not None
        direction = seen.grad
        if state is not None:
            mean = direction.abs().flatten(1).mean(1).clamp_min(torch.finfo(z.dtype).tiny)
            direction = state = self.momentum * state + direction / per_example(mean, z)
        length = step_length(problem, z, self.step_size, self.absolute_step)
        ahead = problem.threat.steepest(problem.x, direction)
        # one pass over memory instead of two where the length is a number: measured in benchmarks/overhead.py
        z = ahead.mul_(length).add_(z) if isinstance(length, Tensor) else torch.add(z, ahead, alpha=length)
        return problem.threat.project(problem.x, z), state


@dataclass(frozen=True)
class RawAscent:
    """z <- project(z + absolute_step * grad): the gradient ascent of textbooks, slow where gradients are small."""

    absolute_step: float
    needs_grad: ClassVar[bool] = True

    def init(self, problem: Problem, z: Tensor) -> None:
        return None

    def step(self, problem: Problem, z: Tensor, seen: Seen, state: None, t: int) -> tuple[Tensor, None]:
        assert seen.grad is not None
        return problem.threat.project(problem.x, z + self.absolute_step * seen.grad), None
