"""First-order step rules. Step sizes are fractions of the threat's radius, unless given as `absolute_step`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparring.attacks.loop import Problem, Seen
from sparring.core.geometry import per_example


def step_length(problem: Problem, z: Tensor, fraction: float, absolute: float | None) -> float | Tensor:
    """A step's length in the threat's unit: `absolute` if given, else fraction * radius (a number or (B, 1, ...))."""
    if absolute is not None:
        return absolute
    radius = problem.threat.radius
    if not isinstance(radius, Tensor) and math.isinf(radius):
        raise ValueError(
            "the radius is infinite, so a step cannot be a fraction of it; give absolute_step, or take an attack that "
            "needs no radius, such as fab"
        )
    return fraction * per_example(radius, z)


def check_step(step: float | None) -> None:
    """Raises ValueError for a step that goes nowhere, backwards, or nobody knows where."""
    if step is not None and not 0 < step < math.inf:
        raise ValueError(f"a step must be above 0 and finite, such as 0.25 of the radius; got {step}")


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

    def __post_init__(self) -> None:
        check_step(self.step_size)
        check_step(self.absolute_step)
        if not math.isfinite(self.momentum):
            raise ValueError(f"momentum must be finite, such as 1.0; got {self.momentum}")

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

    def __post_init__(self) -> None:
        check_step(self.absolute_step)

    def init(self, problem: Problem, z: Tensor) -> None:
        return None

    def step(self, problem: Problem, z: Tensor, seen: Seen, state: None, t: int) -> tuple[Tensor, None]:
        assert seen.grad is not None
        return problem.threat.project(problem.x, z + self.absolute_step * seen.grad), None


@dataclass(frozen=True)
class SparseAscent:
    """z <- project(z + step_size * radius * s / size(s)), s the sign of the gradient where it is largest, else 0.

    share: the share of the coordinates that s moves, in (0, 1], at least one, with all that tie with the last. Those
    that the box or the mask of a ball stops give their place to the next. For L1, where the steepest direction is one
    coordinate and soon full; `size` is the threat's, so other threats may be climbed, too. The budget is spread over
    about as many coordinates as move: best is a share that the radius could fill to the edge of the box, and no more.

    Source: Tramer and Boneh 2019, SLIDE. They move 1 % (the 99th percentile) and count coordinates without gradient
    when fewer can move, which shortens the step. Their projection counts one coordinate too many, so that it leaves the
    ball, and clips after that; we use the threat's, which for L1 gives the nearest point of ball and box.
    """

    step_size: float = 0.25
    share: float = 0.01
    absolute_step: float | None = None
    needs_grad: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}; expected the share of the coordinates that move, above 0, at most 1")

    def init(self, problem: Problem, z: Tensor) -> None:
        return None

    def step(self, problem: Problem, z: Tensor, seen: Seen, state: None, t: int) -> tuple[Tensor, None]:
        assert seen.grad is not None
        length, sign = step_length(problem, z, self.step_size, self.absolute_step), seen.grad.sign()
        # less room than rounding leaves is none
        gain = (seen.grad.abs() * _can_move(problem, z, sign, 1e-6 * length)).flatten(1)
        least = gain.topk(max(1, round(self.share * gain.shape[1])), sorted=False).values.amin(1, keepdim=True)
        ahead = sign.where(((gain >= least) & (gain > 0)).view_as(z), 0)
        size = problem.threat.size(problem.x, ahead).clamp_min(torch.finfo(z.dtype).tiny)
        return problem.threat.project(problem.x, z + ahead * (length / per_example(size, z))), None


@dataclass(frozen=True)
class FrankWolfe:
    """z <- z + share * (corner - z), the corner of the set where the linear function of the gradient is largest.

    No projection is needed. Where the corners are the real inputs (`ThreatModel.discrete`) a share of 1 goes from one
    to the next: from the clean text, one step is HotFlip's first-order ranking of all substitutions at once.

    Source: Frank and Wolfe 1956; Ebrahimi 2018 (HotFlip, eq. 3 to 5).
    """

    share: float = 1.0
    needs_grad: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}; expected the share of the way to a corner, in (0, 1]")

    def init(self, problem: Problem, z: Tensor) -> None:
        return None

    def step(self, problem: Problem, z: Tensor, seen: Seen, state: None, t: int) -> tuple[Tensor, None]:
        assert seen.grad is not None
        return torch.lerp(z, problem.threat.corner(problem.x, seen.grad), self.share), None


def _can_move(problem: Problem, z: Tensor, sign: Tensor, least: float | Tensor) -> Tensor:
    """(B, *Z) bool: the threat's room leaves more than `least` to go along `sign`."""
    room, free = problem.threat.room(problem.x), sign != 0
    if room is None:
        return free
    return free & ((sign > 0) | (z - room[0] > least)) & ((sign < 0) | (room[1] - z > least))
