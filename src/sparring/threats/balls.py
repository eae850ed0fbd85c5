"""Norm balls around the input, within a box of valid values: the additive threat models.

Shapes: x and z (B, *X) with any *X. The radius is in the input's own units (images: [0, 1]).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparring.core import geometry
from sparring.core.noise import Noise
from sparring.core.registry import text_of
from sparring.core.types import Inputs
from sparring.threats.base import ThreatModel


@dataclass(frozen=True)
class Ball(ThreatModel):
    """{z : ||z|| <= radius, low <= x + z <= high, z = 0 outside the mask}.

    radius: number >= 0, or (B,), in input units; infinite for no bound.
    low, high: the box of valid values, numbers or tensors that broadcast against one input; None for no bound.
    mask: bool (1, *X) or (B, *X), True where the input may change; None for everywhere.

    Projection: into the ball, then into the box. The result lies in both, since clipping towards a box that contains
    x never lengthens z; it is the point that the published attacks use, for L2 not always the nearest one.
    A new norm says four things: how long, how to shrink, where is up, and how to draw at random.
    """

    radius: float | Tensor
    low: float | Tensor | None = 0.0
    high: float | Tensor | None = 1.0
    mask: Tensor | None = None

    per_example: ClassVar[tuple[str, ...]] = ("radius", "mask")
    words: ClassVar[str] = "The change, in the measure of this threat model, is at most {}"

    def __post_init__(self) -> None:
        if not torch.all(torch.as_tensor(self.radius) >= 0):
            got = torch.as_tensor(self.radius).min().item()
            raise ValueError(f"radius must not be negative, in input units such as 8/255; got {got}")
        if isinstance(self.radius, Tensor) and self.radius.ndim > 1:
            raise ValueError(f"radius must be a number or (B,); got shape {tuple(self.radius.shape)}")
        for name in ("radius", "low", "high", "mask"):  # arrays and lists
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | float | Tensor):
                object.__setattr__(self, name, torch.as_tensor(value))
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, (1, *X) or (B, *X); got {self.mask.dtype}")

    @abstractmethod
    def _norm(self, z: Tensor) -> Tensor:
        """(B,) length of z."""

    @abstractmethod
    def _shrink(self, z: Tensor) -> Tensor:
        """The nearest point of the ball, a new tensor."""

    @abstractmethod
    def _steepest(self, grad: Tensor) -> Tensor:
        """The direction of length 1 along which a linear function with this gradient grows most."""

    @abstractmethod
    def _uniform(self, noise: Noise, like: Tensor) -> Tensor:
        """A uniform draw from the ball of radius 1."""

    def null(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            kind = type(self).__name__
            raise ValueError(
                f"{kind} changes one tensor (B, *X), and these inputs are {', '.join(x)}. Take a threat of their "
                f"kind (sparring list threats), or say which may change: Lens({kind}(...), {next(iter(x))!r})"
            )
        return torch.zeros_like(x)

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        if not isinstance(self.radius, Tensor) and math.isinf(self.radius):
            raise ValueError("a random start needs a finite radius; start an unbounded attack at `null`")
        return self.project(x, self._uniform(noise, x) * geometry.per_example(self.radius, x))

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        return x + z

    def realize(self, x: Tensor, z: Tensor) -> Tensor:
        return self._clip(x + z)  # the clip takes away rounding only

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        z = self._shrink(self._masked(z))
        if self.low is None and self.high is None:
            return z
        # the room left in the box, not clip(x + z) - x: rounding of large x would push z out of its ball
        low, high = (None if side is None else side - x for side in self._limits(x))
        return z.clamp_(low, high)

    def steepest(self, x: Tensor, grad: Tensor) -> Tensor:
        return self._steepest(self._masked(grad))

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        return self._norm(z)

    def valid(self, x: Tensor, adversarial: Tensor) -> Tensor:
        kept = adversarial.isfinite() & (adversarial == self._clip(adversarial.clone()))
        if self.mask is not None:
            kept &= self.mask | (adversarial == x)
        return kept.flatten(1).all(1)

    def room(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.low is None and self.high is None and self.mask is None:
            return None
        low, high = self._limits(x)
        low = torch.full_like(x, -math.inf) if low is None else low - x
        high = torch.full_like(x, math.inf) if high is None else high - x
        return (low, high) if self.mask is None else (low.where(self.mask, 0), high.where(self.mask, 0))

    def complaints(self, x: Inputs) -> list[str]:
        if isinstance(x, Tensor) and not x.is_floating_point():
            return [
                f"inputs are {x.dtype}; expected floats, for a gradient is taken with respect to them: give images as "
                "x.float() / 255"
            ]
        return super().complaints(x)

    def describe(self) -> str:
        radius = torch.as_tensor(self.radius)
        amount = f"{radius.min():.4g} to {radius.max():.4g}, each example its own"
        amount = amount if radius.ndim else text_of(float(self.radius))
        words = self.words.format(amount) if bool(radius.isfinite().all()) else "The input may change without a bound"
        words += "" if self.mask is None else ", where the mask allows it"
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            return f"{words}. The result stays in the box of valid values."
        sides = [f"at {way} {end:g}" for way, end in (("least", self.low), ("most", self.high)) if end is not None]
        return f"{words}. Every value of the result {'is ' + ' and '.join(sides) if sides else 'is allowed'}."

    def text(self) -> str:
        low, high, own = self.low, self.high, type(self).__name__.lower() == self.norm
        tensors = any(isinstance(value, Tensor) for value in (self.radius, self.mask, low, high))
        if not own or tensors or (low is None) != (high is None):
            return repr(self)
        box = None if low is None or high is None else (float(low), float(high))
        return f"{self.norm}:{text_of(float(self.radius))}" + ("" if box == (0, 1) else f",box={text_of(box)}")

    def _why(self, x: Any) -> str:
        if not isinstance(x, Tensor):
            return super()._why(x)
        low, high = x.min().item(), x.max().item()
        numbers = all(isinstance(side, (int, float)) for side in (self.low, self.high))
        limits, unit = f" [{self.low}, {self.high}]" if numbers else "", numbers and (self.low, self.high) == (0, 1)
        if unit and low >= 0 and 2 < high <= 255:
            hint = "They look like bytes, 0 to 255: divide by 255"
        elif unit and low < 0:
            inside = "Sequential(sparring.Normalize(mean, std), network)"
            hint = f"They look normalised: undo that, and put it into the model, {inside}"
        else:
            hint = "Scale the data, or give the threat model the box of your data"
        return (
            f": they reach from {low:.4g} to {high:.4g}, expected the box{limits}. The radius is counted in these "
            f"units, so the verdict would mean nothing. {hint}"
        )

    def _clip(self, v: Tensor) -> Tensor:
        """Into the box, in place."""
        low, high = self._limits(v)
        v = v if low is None else v.clamp_(min=low)
        return v if high is None else v.clamp_(max=high)

    def _limits(self, like: Tensor) -> tuple[Any, Any]:
        """The ends of the box, in the type of the inputs: limits of float64 would make float64 of them."""
        return tuple(side.to(like) if isinstance(side, Tensor) else side for side in (self.low, self.high))  # type: ignore[return-value]

    def _masked(self, z: Tensor) -> Tensor:
        if self.mask is not None and self.mask.ndim != z.ndim:
            raise ValueError(f"mask {tuple(self.mask.shape)} must be (1, *X) or (B, *X) for inputs {tuple(z.shape)}")
        return z if self.mask is None else z * self.mask


@dataclass(frozen=True)
class Linf(Ball):
    """Every entry may change by at most `radius`.

    >>> Linf(8 / 255).size(torch.zeros(1, 3), torch.tensor([[0.0, -0.03, 0.01]]))
    tensor([0.0300])
    """

    norm: ClassVar[str | None] = "linf"
    words: ClassVar[str] = "Every entry may change by at most {}"

    def _norm(self, z: Tensor) -> Tensor:
        return geometry.linf_norm(z)

    def _shrink(self, z: Tensor) -> Tensor:
        return geometry.shrink_linf(z, self.radius)

    def _steepest(self, grad: Tensor) -> Tensor:
        return grad.sign()

    def _uniform(self, noise: Noise, like: Tensor) -> Tensor:
        return geometry.uniform_linf(noise, like)

    @property
    def allows_everything(self) -> bool:
        """Whether a finite radius is as wide as the box, so that any input may become any other."""
        if self.mask is not None or self.low is None or self.high is None:
            return False
        low, high, radius = (torch.as_tensor(v, dtype=torch.float64) for v in (self.low, self.high, self.radius))
        width = high - low
        return bool((width.max() <= radius.min()) & radius.isfinite().all())


@dataclass(frozen=True)
class L2(Ball):
    """The Euclidean length of the change is at most `radius`.

    >>> L2(0.5).steepest(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    norm: ClassVar[str | None] = "l2"
    words: ClassVar[str] = "The Euclidean length of the change is at most {}"

    def _norm(self, z: Tensor) -> Tensor:
        return geometry.l2_norm(z)

    def _shrink(self, z: Tensor) -> Tensor:
        return geometry.shrink_l2(z, self.radius)

    def _steepest(self, grad: Tensor) -> Tensor:
        return geometry.unit_l2(grad)

    def _uniform(self, noise: Noise, like: Tensor) -> Tensor:
        return geometry.uniform_l2(noise, like, self.mask)
