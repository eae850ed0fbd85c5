"""The L1 ball within a box: sparse changes, whose nearest point takes a projection of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core import geometry
from sparring.core.noise import Noise
from sparring.threats.balls import Ball


@dataclass(frozen=True)
class L1(Ball):
    """The absolute changes of all coordinates add up to at most `radius`.

    Unlike `Ball`, `project` gives the nearest point of ball and box together: in L1 the clip after the shrink takes
    away most of a sparse change and leaves the budget unspent, which makes models look more robust than they are.
    `steepest` is one coordinate, which the box soon stops: attack with `slide`, whose steps go round full coordinates.

    Source: Croce and Hein 2021 ("Mind the Box"), who show how much earlier L1 attacks lose by the clip.

    >>> L1(12.0).steepest(torch.zeros(1, 3), torch.tensor([[1.0, -3.0, 3.0]]))
    tensor([[ 0., -1.,  0.]])
    """

    norm: ClassVar[str | None] = "l1"
    words: ClassVar[str] = "The absolute changes of all entries add up to at most {}"

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        low, high = (None if side is None else side - x for side in self._limits(x))
        return geometry.project_l1_box(self._masked(z), self.radius, low, high)

    def _norm(self, z: Tensor) -> Tensor:
        return geometry.l1_norm(z)

    def _shrink(self, z: Tensor) -> Tensor:
        return geometry.shrink_l1(z, self.radius)

    def _steepest(self, grad: Tensor) -> Tensor:
        flat = grad.flatten(1)
        first = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, first, flat.gather(1, first).sign()).view_as(grad)

    def _uniform(self, noise: Noise, like: Tensor) -> Tensor:
        return geometry.uniform_l1(noise, like, self.mask)
